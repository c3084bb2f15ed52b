"""Fit a run's encoder and evaluate it: the two steps behind notebooks 03 and 05."""

import inspect
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from ..data.prepared import Prepared, prepare
from ..data.sources import CheckpointNotFound, find_checkpoint
from ..encoders.base import load_encoder, without_cache
from ..encoders.baselines import fit_baseline, fit_functions
from ..evaluation.judge import evaluate, null_control, summarise
from ..evaluation.metrics import METRICS
from ..evaluation.nulls import permute_conditions
from ..evaluation.validation import Fitted
from ..files.atomic import replacing, write_json, write_text
from ..files.provenance import code_hash, directory_hash, environment
from ..scgpt.settings import Settings
from .runs import TUNED, Run, write_table

# A fit starts from masked cells whose content is hashed (`Context.cells_hash`) and from checkpoints hashed by content:
# whatever makes these may change without making an encoder stale that was fitted on the same.
_HASHED_BY_CONTENT = ("files.atomic", "files.downloads", "data", "alignment.chunks", "alignment.remapping")
# Pseudo-bulks and bootstrap libraries of query cells are the same for every seed, as the query cells are.
QUERY_SEED = 0
_VALIDATION = (evaluate, summarise, *(each.of for each in METRICS.values()))


def fit_run(run: Run) -> pd.DataFrame:
    """Fit the run's encoder and its null twin, or keep those that are there.

    An encoder is kept when it was made with the same parameters, data and fitting code. Validation scores of
    every read-out are written beside it; query cells are not touched. Several processes (accelerate, torchrun) fit
    together, and one of them writes.

    Returns
    -------
    pandas.DataFrame
        The hyperparameter settings tried, with validation exact_hit@1 and the choice.
    """
    code = fit_code(run.params, run.manifest.get("fit", {}).get("code", ""))
    twin = null_twin(run)
    contexts = {"context": asdict(run.prepared.context), "null_context": asdict(twin.context)}
    made = run.manifest.get("fit")
    same = made and made["params"] == run.params and all(made.get(key) == contexts[key] for key in contexts)
    if same and made["code"] == code and _intact(run.directory, made):
        if made["validation_code"] != _code(*_VALIDATION):
            _validate(run, load_encoder(run.directory, cache=cache_directory(run)))
            made["validation_code"] = _code(*_VALIDATION)
            write_json(run.directory / "manifest.json", {**run.manifest, "fit": made})
        return pd.read_csv(run.directory / "selection.csv")
    started, code = time.perf_counter(), fit_code(run.params)
    # Of several processes that train together, the first writes.
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        (run.directory / "manifest.json").unlink(missing_ok=True)
    fitted = _fit(run, run.prepared, "encoder")
    if leads:
        fitted.encoder.save(run.directory / "encoder")
    # Of an ensemble one member: what gives labels away gives them to each.
    alone = {"members": 1} if "members" in fitted.chosen else {}
    null = _fit(run, twin, "null_encoder", fixed={**fitted.chosen, **alone})
    if not leads:
        return fitted.selection
    null.encoder.save(run.directory / "null_encoder")
    checks = {**fitted.checks, "reloaded_equal": _reloaded(run, fitted.encoder)}
    _validate(run, fitted.encoder)
    write_table(run.directory / "selection.csv", fitted.selection)
    if fitted.history is None:
        (run.directory / "history.csv").unlink(missing_ok=True)
    else:
        write_table(run.directory / "history.csv", fitted.history)
    write_text(run.directory / "params.yaml", yaml.safe_dump(run.params, sort_keys=False))
    fit = {
        "params": run.params,
        **contexts,
        "chosen": fitted.chosen,
        "checks": checks,
        "code": code,
        "validation_code": _code(*_VALIDATION),
        "encoder_sha256": directory_hash(run.directory / "encoder"),
        "null_encoder_sha256": directory_hash(run.directory / "null_encoder"),
        "wall_s": round(time.perf_counter() - started, 2),
    }
    write_json(run.directory / "manifest.json", {"fit": fit, "environment": environment(_device(run.params))})
    for name in ("encoder", "null_encoder"):
        shutil.rmtree(_state(run, name).parent, ignore_errors=True)
    return fitted.selection


def _validate(run: Run, encoder) -> None:
    """Judge every read-out on validation cells: validation_scores.parquet, a row per cell, and validation.csv."""
    seed = run.params["seed"]
    scores = evaluate(encoder, run.prepared, role="val", query_sizes=(1,), seed=seed)
    kept = ["query_id", "condition", "library", "scoring", "exact_hit@1", "mrr"]
    with replacing(run.directory / "validation_scores.parquet") as temporary:
        scores[kept].to_parquet(temporary, index=False)
    write_table(run.directory / "validation.csv", summarise(scores, seed=seed))


def _device(params: dict) -> str:
    if params["encoder"] != TUNED:
        return "cpu"
    from ..scgpt.model import device_name

    return device_name()


def _fit(run: Run, prepared: Prepared, name: str, fixed: dict | None = None) -> Fitted:
    """Fit the run's method on true or permuted labels; `fixed`: with settings that were chosen before."""
    options = {"seed": run.params["seed"], "search": run.params["search"] or None, "fixed": fixed}
    if run.params["encoder"] != TUNED:
        return fit_baseline(run.params["encoder"], prepared, **options)
    from ..scgpt.modes import fit_scgpt

    return fit_scgpt(
        prepared,
        **options,
        report=print if name == "encoder" else lambda line: print(f"null twin: {line}"),
        settings=run.params.get("settings"),
        cache=cache_directory(run),
        state=_state(run, name),
    )


def fit_code(params: dict, made: str = "") -> str:
    """A hash of what a fit with these parameters is made by: today's code and, for a network, where it may start.

    made : the hash of a fit that is there. A checkpoint that is no longer on this machine counts as what it was then:
        to judge what was fitted, nobody needs it.
    """
    if params["encoder"] != TUNED:
        return _code(*fit_functions(params["encoder"]))
    checkpoints = params["search"].get("checkpoint")
    if not isinstance(checkpoints, list):
        checkpoints = [(params.get("settings") or {}).get("checkpoint", Settings().checkpoint)]
    # Other weights under the same name are another start.
    then = made.split("-")[1:] if made else []
    known = then if len(then) == len(checkpoints) else [""] * len(checkpoints)
    return "-".join([_code("scgpt.modes:fit_scgpt"), *map(_start, checkpoints, known)])


def _start(checkpoint: str, known: str) -> str:
    """Hash of a checkpoint's content; `known`, unless empty, where it is not on this machine."""
    try:
        return directory_hash(find_checkpoint(checkpoint, fetch=not known))[:16]
    except CheckpointNotFound:
        if not known:
            raise
        return known


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
    """Score the saved encoder on the query cells and write scores, summary and null control.

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
        One row per query and read-out.
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
    scores = evaluate(
        encoder,
        run.prepared,
        role="query",
        query_sizes=tuple(query_sizes),
        poolings=tuple(poolings),
        **options,
    )
    summary = summarise(scores, n_resamples=n_resamples, seed=QUERY_SEED)
    null = null_control(null_encoder, null_twin(run), role="query", n_resamples=n_resamples, **options)
    # Tables are replaced one by one: until all are there, the manifest must not vouch for them.
    manifest = {name: part for name, part in run.manifest.items() if name != "evaluation"}
    write_json(run.directory / "manifest.json", manifest)
    with replacing(run.directory / "scores.parquet") as temporary:
        scores.to_parquet(temporary, index=False)
    write_table(run.directory / "summary.csv", summary)
    write_table(run.directory / "null_control.csv", null)
    save_embeddings(run, encoder)
    manifest["evaluation"] = {
        "libraries": list(libraries),
        "query_sizes": list(query_sizes),
        "poolings": list(poolings),
        "n_resamples": n_resamples,
        **judged,
        "checks": {"context": "passed", "null_p_value_min": float(null["p_value"].min())},
        "wall_s": round(time.perf_counter() - started, 2),
    }
    write_json(run.directory / "manifest.json", manifest)
    return scores, summary, null


def save_embeddings(run: Run, encoder) -> None:
    """Write embeddings.h5ad: X = cells x d, obs = condition, role, batch."""
    import anndata

    prepared = run.prepared
    obs = pd.DataFrame({"condition": prepared.conditions, "role": prepared.roles}, index=prepared.cells.names)
    if prepared.cells.batch is not None:
        obs["batch"] = prepared.cells.batch
    adata = anndata.AnnData(encoder.embed(prepared.cells), obs=obs.astype("category"))
    adata.uns["perturbret"] = {name: str(value) for name, value in run.params.items()}
    with replacing(run.directory / "embeddings.h5ad") as temporary:
        adata.write_h5ad(temporary, compression="lzf")


def _intact(directory: Path, made: dict) -> bool:
    folders = ("encoder", "null_encoder")
    return all((directory / folder).is_dir() for folder in folders) and all(
        directory_hash(directory / folder) == made[f"{folder}_sha256"] for folder in folders
    )
