"""Fit a run's encoder and evaluate it: the two steps behind notebooks 03 and 05."""

import inspect
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..data.prepared import Prepared, prepare
from ..data.screen import Screen
from ..data.sources import CheckpointNotFound, find_checkpoint
from ..encoders.base import load_encoder, without_cache
from ..encoders.baselines import fit_baseline, fit_functions
from ..evaluation.confidence import judge_confidence
from ..evaluation.judge import evaluate, null_control, summarise
from ..evaluation.metrics import METRICS
from ..evaluation.nulls import permute_conditions
from ..evaluation.query_sizes import cells_needed_by_condition
from ..evaluation.readouts import primary_readout
from ..evaluation.scoring import candidate_sets
from ..evaluation.validation import Fitted
from ..files.atomic import replacing, write_json, write_text
from ..files.provenance import code_hash, directory_hash, environment
from ..networks.families import NETWORKS
from .limits import find_limits, pooling_to_use
from .progress import Progress
from .runs import SCRATCH, Run, open_run, outputs_root, read_manifest, write_table

# A fit starts from masked cells whose content is hashed (`Context.cells_hash`) and from checkpoints hashed by content:
# whatever makes these may change without making an encoder stale that was fitted on the same.
_HASHED_BY_CONTENT = (
    *("files.atomic", "files.cache", "files.downloads"),
    *("data", "alignment.chunks", "alignment.remapping"),
)
# Pseudo-bulks and bootstrap libraries of query cells are the same for every seed, as the query cells are.
QUERY_SEED = 0
# What is judged where nothing is named.
_JUDGED = {"encoder": "pca", "mask": "all_targets", "track": "in_dist", "seed": 0, "search": {}}
_VALIDATION = (evaluate, summarise, *(each.of for each in METRICS.values()))


def fit_run(run: Run) -> pd.DataFrame:
    """Fit the run's encoder and its null twin and save both, or keep those that are there; see `fit`, `save_run`.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.data import simulate_screen
    >>> from perturbret.runs import open_run
    >>> screen = simulate_screen(n_singles=3, n_doubles=0, n_genes=20, cells_per_condition=30)
    >>> with TemporaryDirectory() as outputs:
    ...     run = open_run(screen, encoder="prior", mask="all_targets", seed=0, outputs=outputs)
    ...     selection = fit_run(run)
    ...     print(run.manifest["identity"]["method"], (run.directory / "encoder").is_dir())
    prior True
    """
    return save_run(run, fit(run))


def fit(run: Run) -> Fitted:
    """The run's encoder: the saved one where it was made with the same parameters, data and code, else fitted anew.

    Nothing is saved but the state of a training under way, which the next call goes on from. Query cells are not
    touched. Several processes (accelerate, torchrun) fit together.
    """
    if not _kept(run):
        started = time.perf_counter()
        fitted = _fit(run, run.prepared, "encoder")
        return replace(fitted, wall_s=time.perf_counter() - started)
    made, history = run.manifest["fit"], run.directory / "history.csv"
    return Fitted(
        load_encoder(run.directory, cache=cache_directory(run)),
        pd.read_csv(run.directory / "selection.csv"),
        made["chosen"],
        pd.read_csv(history) if history.exists() else None,
        made["checks"],
    )


def save_run(
    run: Run, fitted: Fitted, scores: pd.DataFrame | None = None, summary: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Fit the null twin with the settings that were chosen, and write all files of a run; of several processes, one.

    Parameters
    ----------
    run : Run
    fitted : Fitted
        From `fit`; one that was read from the run's directory is not written again.
    scores, summary : pandas.DataFrame, optional
        `evaluate` and `summarise` of every read-out of single validation cells, where that was done before.

    Returns
    -------
    pandas.DataFrame
        The hyperparameter settings tried, with validation exact_hit@1 and the choice.

    Raises
    ------
    ContextMismatch
        The encoder was fitted on other cells than those of the run.
    """
    fitted.encoder.context.check(run.prepared.context)
    # Only what was saved and read back has passed this check.
    if "reloaded_equal" in fitted.checks and _kept(run):
        made = run.manifest["fit"]
        identity = run.identity.as_json()
        if made["validation_code"] != _code(*_VALIDATION):
            _validate(run, fitted.encoder, scores, summary)
            made["validation_code"] = _code(*_VALIDATION)
        if run.manifest != {**run.manifest, "identity": identity, "fit": made}:
            write_json(run.directory / "manifest.json", {**run.manifest, "identity": identity, "fit": made})
        return fitted.selection
    started, code = time.perf_counter(), fit_code(run.params)
    twin = null_twin(run)
    # Of several processes that train together, the first writes.
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        (run.directory / "manifest.json").unlink(missing_ok=True)
        fitted.encoder.save(run.directory / "encoder")
    # Of an ensemble one member: what gives labels away gives them to each.
    alone = {"members": 1} if "members" in fitted.chosen else {}
    null = _fit(run, twin, "null_encoder", fixed={**fitted.chosen, **alone})
    if not leads:
        return fitted.selection
    null.encoder.save(run.directory / "null_encoder")
    checks = {**fitted.checks, "reloaded_equal": _reloaded(run, fitted.encoder)}
    _validate(run, fitted.encoder, scores, summary)
    write_table(run.directory / "selection.csv", fitted.selection)
    if fitted.history is None:
        (run.directory / "history.csv").unlink(missing_ok=True)
    else:
        write_table(run.directory / "history.csv", fitted.history)
    write_text(run.directory / "params.yaml", yaml.safe_dump(run.params, sort_keys=False))
    entry = {
        "params": run.params,
        "context": asdict(run.prepared.context),
        "null_context": asdict(twin.context),
        "chosen": fitted.chosen,
        "checks": checks,
        "code": code,
        "validation_code": _code(*_VALIDATION),
        "encoder_sha256": directory_hash(run.directory / "encoder"),
        "null_encoder_sha256": directory_hash(run.directory / "null_encoder"),
        "wall_s": round(fitted.wall_s + time.perf_counter() - started, 2),
    }
    manifest = {
        "identity": run.identity.as_json(),
        "fit": entry,
        "environment": environment(_device(run.params)),
    }
    write_json(run.directory / "manifest.json", manifest)
    for name in ("encoder", "null_encoder"):
        shutil.rmtree(_state(run, name).parent, ignore_errors=True)
    return fitted.selection


def _kept(run: Run) -> bool:
    """Whether what lies in the run's directory was made with the same parameters, data and code, and is whole."""
    made = run.manifest.get("fit")
    if not made or made["params"] != run.params or made["context"] != asdict(run.prepared.context):
        return False
    if made["code"] != fit_code(run.params, made["code"]) or not _intact(run.directory, made):
        return False
    return made.get("null_context") == asdict(null_twin(run).context)


def notebook_run(run: str, overwrite: bool) -> dict:
    """Where a notebook saves: `run` and `overwrite` for `open_run`.

    In JupyterLab, unless a name is given, that is the run `scratch`, which the next fit replaces and no report reads.
    """
    if run or "JPY_SESSION_NAME" not in os.environ:  # set by Jupyter's server for kernels that it starts
        return {"run": run, "overwrite": overwrite}
    return {"run": SCRATCH, "overwrite": True}


def open_saved(screen: Screen, *, run: str = "", outputs: str = "", overwrite: bool = False, **asked) -> Run:
    """Open a run to judge it, whatever encoder it holds.

    Parameters
    ----------
    screen, run, outputs, overwrite
        See `open_run`. In JupyterLab, where neither a run nor an encoder is named, the run `scratch` if there is one.
    asked : encoder, mask, track, seed and search
        What is left empty, or a seed below 0, is as in the run that was named; without one, as in `_JUDGED`.

    Raises
    ------
    FileNotFoundError
        Neither is there a run of that name nor was an encoder named.
    """
    root = outputs_root(outputs) / screen.name
    if not run and not asked["encoder"] and (root / SCRATCH / "manifest.json").exists():
        run = notebook_run(run, overwrite)["run"]
    made = read_manifest(root / run).get("fit", {}).get("params", {}) if run else {}
    if run and not made and not asked["encoder"]:
        there = sorted(path.parent.name for path in root.glob("*/manifest.json"))
        raise FileNotFoundError(
            f"{root / run}: expected a run that notebook 03 or 04 saved, got none; there: {', '.join(there) or 'none'}"
        )
    given = {name: value for name, value in asked.items() if value not in ("", {}) and value != -1}
    known = {name: made[name] for name in _JUDGED if name in made}
    return open_run(screen, **{**_JUDGED, **known, **given}, run=run, outputs=outputs, overwrite=overwrite)


def _validate(run: Run, encoder, scores=None, summary=None) -> None:
    """Judge every read-out on validation cells: validation_scores.parquet, a row per cell, and validation.csv."""
    seed = run.params["seed"]
    first, *more = candidate_sets(run.prepared)
    options = {"role": "val", "query_sizes": (1,), "seed": seed}
    if scores is None:
        scores = evaluate(encoder, run.prepared, candidates=first, **options)
    others = [evaluate(encoder, run.prepared, candidates=each, **options) for each in more]
    if others:
        scores, summary = pd.concat([scores, *others], ignore_index=True), None
    kept = ["query_id", "condition", "library", "scoring", "candidates", "exact_hit@1", "mrr"]
    with replacing(run.directory / "validation_scores.parquet") as temporary:
        scores[kept].to_parquet(temporary, index=False)
    write_table(
        run.directory / "validation.csv", summarise(scores, seed=seed) if summary is None else summary
    )


def _device(params: dict) -> str:
    if params["encoder"] not in NETWORKS:
        return "cpu"
    from ..networks.embedding import device_name

    return device_name()


def _fit(run: Run, prepared: Prepared, name: str, fixed: dict | None = None) -> Fitted:
    """Fit the run's method on true or permuted labels; `fixed`: with settings that were chosen before."""
    options = {"seed": run.params["seed"], "search": run.params["search"] or None, "fixed": fixed}
    family = NETWORKS.get(run.params["encoder"])
    if family is None:
        return fit_baseline(run.params["encoder"], prepared, **options)
    from ..networks.fit import fit_network

    return fit_network(
        family.backbone,
        prepared,
        **options,
        report=Progress("" if name == "encoder" else "null twin"),
        settings=run.params.get("settings"),
        cache=cache_directory(run),
        state=_state(run, name),
    )


def fit_code(params: dict, made: str = "") -> str:
    """A hash of what a fit with these parameters is made by: today's code and, for a network, where it may start.

    made : the hash of a fit that is there. A checkpoint that is no longer on this machine counts as what it was then:
        to judge what was fitted, nobody needs it.
    """
    code, family = fitting_code(params["encoder"]), NETWORKS.get(params["encoder"])
    if family is None:
        return code
    checkpoints = params["search"].get("checkpoint")
    if not isinstance(checkpoints, list):
        checkpoints = [(params.get("settings") or {}).get("checkpoint", family.settings().checkpoint)]
    # Other weights under the same name are another start.
    then = made.split("-")[1:] if made else []
    known = then if len(then) == len(checkpoints) else [""] * len(checkpoints)
    return "-".join([code, *map(_start, checkpoints, known)])


def fitting_code(encoder: str) -> str:
    """Hash of the code that fits encoders of this kind or network family. ValueError for an unknown one."""
    family = NETWORKS.get(encoder)
    if family is None:
        return _code(*fit_functions(encoder))
    return _code("networks.fit:fit_network", family.backbone_at, family.settings_at)


def _start(checkpoint: str, known: str) -> str:
    """Hash of a checkpoint's content, empty where none is named; `known`, unless empty, where it is not here."""
    if not checkpoint:
        return ""
    try:
        found = find_checkpoint(checkpoint, fetch=not known)
    except CheckpointNotFound:
        if not known:
            raise
        return known
    files = sorted(path for path in Path(found).rglob("*") if path.is_file())
    return _content(found, tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@cache
def _content(directory: Path, state: tuple) -> str:
    """Hash of a directory; taken once for each state of its files."""
    return directory_hash(directory)[:16]


@cache
def _code(*starts: str | Callable) -> str:
    """Hash of what runs behind the starts, functions or `room.module:name`, on cells that are ready.

    Of a function from outside of the package its whole file counts, or itself alone where it stands in a notebook.
    """
    own, outside = [], set()
    for start in starts:
        if isinstance(start, str):
            own.append(start)
        elif start.__module__.startswith("perturbret."):
            own.append(f"{start.__module__.removeprefix('perturbret.')}:{start.__qualname__}")
        else:
            outside.add(
                inspect.getsource(start if start.__module__ == "__main__" else inspect.getmodule(start))
            )
    return code_hash("data.prepared", *own, source="\n".join(sorted(outside)), without=_HASHED_BY_CONTENT)


def _state(run: Run, name: str) -> Path:
    # Named by the code: what other code began is not gone on with.
    return run.directory / f"training_{name}" / fit_code(run.params)[:16]


def cache_directory(run: Run) -> Path:
    """Where tokens and embeddings of a dataset are kept: outputs/<dataset>/cache/."""
    return run.directory.parent / "cache"


def _reloaded(run: Run, encoder) -> bool:
    """Load the encoder just saved and compare it with the one in memory, bit for bit."""
    loaded = load_encoder(run.directory)
    cells = run.prepared.cells.take(np.arange(min(256, len(run.prepared.cells))))
    # Anew on both sides: from a cache, they would be equal whatever was saved.
    mine, theirs = (each.embed(cells) for each in (without_cache(encoder), loaded))
    same = np.array_equal(mine, theirs, equal_nan=True)
    if same and encoder.head is not None:
        same = np.array_equal(encoder.log_proba(mine), loaded.log_proba(theirs), equal_nan=True)
    if not same:
        raise RuntimeError(
            f"{run.directory.name}: expected the saved encoder to embed cells as the one in memory does, they differ"
        )
    return same


def null_twin(run: Run) -> Prepared:
    """The run's cells with labels permuted within role and batch, masked by the permuted labels."""
    prepared = run.prepared
    permuted = permute_conditions(
        prepared.conditions, prepared.roles, batch=prepared.cells.batch, seed=run.params["seed"]
    )
    return prepare(
        run.screen,
        run.split,
        mask=run.params["mask"],
        conditions=permuted,
        train_share=prepared.context.train_share,
    )


def evaluate_run(
    run: Run, *, libraries: list, query_sizes: list, poolings: list, n_resamples: int = 1000
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Score the saved encoder on the query cells and write scores, summary, null control, confidence and limits.

    Parameters
    ----------
    run : Run
        Fitted first where it is not.
    libraries, query_sizes, poolings : list
        See `perturbret.evaluation.judge.evaluate`.
    n_resamples : int
        Of the bootstrap behind intervals.

    Returns
    -------
    scores : pandas.DataFrame
        One row per query and read-out; `probability`, the calibrated one of the condition ranked first, for single
        cells at the read-out that validation cells choose.
    summary : pandas.DataFrame
        Estimates with intervals.
    null : pandas.DataFrame
        The null control, one row per read-out.

    Raises
    ------
    ContextMismatch
        The encoder was made with other data, another split or another mask.
    """
    started = time.perf_counter()
    fit_run(run)
    judged = {f"{name}_sha256": directory_hash(run.directory / name) for name in ("encoder", "null_encoder")}
    encoder, null_encoder = (
        load_encoder(run.directory, name, cache=cache_directory(run)) for name in ("encoder", "null_encoder")
    )
    encoder.context.check(run.prepared.context)
    options = {"libraries": tuple(libraries), "seed": QUERY_SEED}
    asked = {"query_sizes": tuple(query_sizes), "poolings": tuple(poolings)}
    sets, twin = candidate_sets(run.prepared), null_twin(run)
    scores = pd.concat(
        [evaluate(encoder, run.prepared, candidates=each, **asked, **options) for each in sets],
        ignore_index=True,
    )
    summary = summarise(scores, n_resamples=n_resamples, seed=QUERY_SEED)
    controls = [
        null_control(null_encoder, twin, candidates=each, n_resamples=n_resamples, **options) for each in sets
    ]
    null = pd.concat(controls, ignore_index=True)
    library, scoring = primary_readout(run.directory, libraries)
    sure = judge_confidence(
        encoder, run.prepared, library=library, scoring=scoring, n_resamples=n_resamples, seed=QUERY_SEED
    )
    own = (scores["library"] == library) & (scores["scoring"] == scoring) & (scores["query_size"] == 1)
    own &= scores["candidates"] == sets[0]
    scores["probability"] = np.nan
    if own.any():
        scores.loc[own, "probability"] = sure.probability
    embeddings = encoder.embed(run.prepared.cells)
    limits = find_limits(
        run,
        encoder,
        embeddings,
        summary,
        library=library,
        scoring=scoring,
        query_sizes=query_sizes,
        poolings=poolings,
        n_resamples=n_resamples,
        seed=QUERY_SEED,
    )
    chosen = scores[(scores["library"] == library) & (scores["scoring"] == scoring)]
    chosen = chosen[chosen["candidates"] == sets[0]]
    pooled = chosen["pooling"].isin(["single", pooling_to_use(limits)])
    # Tables are replaced one by one: until all are there, the manifest must not vouch for them.
    manifest = {name: part for name, part in run.manifest.items() if name != "evaluation"}
    write_json(run.directory / "manifest.json", manifest)
    with replacing(run.directory / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    write_table(run.directory / "summary.csv", summary)
    write_table(run.directory / "null_control.csv", null)
    confidence = sure.table.assign(library=library, scoring=scoring, candidates=sets[0])
    write_table(run.directory / "confidence.csv", confidence)
    write_table(run.directory / "reliability.csv", sure.reliability)
    write_table(run.directory / "limits.csv", limits)
    write_table(run.directory / "cells_needed.csv", cells_needed_by_condition(chosen[pooled]))
    save_embeddings(run, embeddings)
    manifest["evaluation"] = {
        "libraries": list(libraries),
        "candidate_sets": list(sets),
        "query_sizes": list(query_sizes),
        "poolings": list(poolings),
        "n_resamples": n_resamples,
        **judged,
        "checks": {"context": "passed", "null_p_value_min": float(null["p_value"].min())},
        "wall_s": round(time.perf_counter() - started, 2),
    }
    write_json(run.directory / "manifest.json", manifest)
    return scores, summary, null


def save_embeddings(run: Run, embeddings: np.ndarray) -> None:
    """Write embeddings.h5ad: X = cells x d, obs = condition, role, batch."""
    import anndata

    prepared = run.prepared
    obs = pd.DataFrame({"condition": prepared.conditions, "role": prepared.roles}, index=prepared.cells.names)
    if prepared.cells.batch is not None:
        obs["batch"] = prepared.cells.batch
    adata = anndata.AnnData(embeddings, obs=obs.astype("category"))
    adata.uns["perturbret"] = {name: str(value) for name, value in run.params.items()}
    with replacing(run.directory / "embeddings.h5ad") as temporary:
        adata.write_h5ad(temporary, compression="lzf")


def _intact(directory: Path, made: dict) -> bool:
    folders = ("encoder", "null_encoder")
    return all((directory / folder).is_dir() for folder in folders) and all(
        directory_hash(directory / folder) == made[f"{folder}_sha256"] for folder in folders
    )
