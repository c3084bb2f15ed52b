"""Finished runs of a dataset compared: methods and their roles, estimates, paired differences, verdicts."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.masking import UNSAFE
from ..evaluation.metrics import find_metric, metric_columns
from ..evaluation.nulls import detectable_in_family
from ..evaluation.readouts import FIXED, LIBRARIES, choose_readout, common_readout, read_validation
from ..evaluation.stats import holm, repeated_difference, repeated_mean
from ..files.provenance import directory_hash
from ..networks.families import NETWORKS
from ..runs.runs import SCRATCH, Identity, read_manifest

CEILING = "bayes_ceiling"
# They read no expression: what they reach is the screen's design, not biology.
NUISANCE = ("prior", "library_size", "batch")
ROLES = ("simple", "tuned", "nuisance", "ceiling", "precomputed")


def role_of(encoder: str, mask: str) -> str:
    """What an encoder can stand for.

    Returns
    -------
    str
        `tuned`: a mode of a network; `nuisance`: it reads no expression; `ceiling`: it knows the simulated truth;
        `precomputed`: an embedding that was made before the mask acted; `simple`: any other opponent.
    """
    if encoder.startswith("obsm:") and mask != "none":
        return "precomputed"
    named = dict.fromkeys(NETWORKS, "tuned") | dict.fromkeys(NUISANCE, "nuisance") | {CEILING: "ceiling"}
    return named.get(encoder, "simple")


def first_of(readouts: pd.DataFrame, mask: str, *roles: str) -> str | None:
    """The method of these roles whose best read-out hits most validation cells under `mask`; None without any.

    The best method is the first of `simple` and `tuned`, the baseline the first of `simple`: a nuisance opponent is
    neither.

    Parameters
    ----------
    readouts : pandas.DataFrame
        From `choose_readouts`.
    mask : str
    roles : str
        Some of `ROLES`.
    """
    rows = readouts[(readouts["mask"] == mask) & readouts["role"].isin(roles)]
    rows = rows.assign(best=rows["best"].round(9)).sort_values(["best", "encoder"], ascending=[False, True])
    return rows["encoder"].iloc[0] if len(rows) else None


def display_name(encoder: str) -> str:
    """Name of a method in tables and figures."""
    return "Bayes ceiling" if encoder == CEILING else encoder


LEAK_FREE = "all_targets"  # the mask of all headline numbers
# What must be equal for two methods to be compared.
ARENA = ["track", "train_share"]
# Read-outs that every method is shown at, beside the one chosen on validation cells.
SHOWN = (("classifier", "none"), ("classifier_corrected", "none"), ("whitened", "mean"), ("cosine", "mean"))


# Refits that a verdict needs: the spread between them is part of the interval.
MIN_REPEATS = 3
NO_DIFFERENCE = "no clear difference"
# Questions whose verdicts form one Holm family each; `nuisance` is an excess with an interval, without a verdict.
FAMILIES = (("baseline", "adapting", "pretraining"), ("mask",))
CONTRASTS_SHOWN = ("exact_hit@1", "mrr")


@dataclass(frozen=True)
class Finished:
    """A run whose evaluation is complete and belongs to the encoder that lies beside it, in one candidate set.

    Attributes
    ----------
    directory : pathlib.Path
    manifest : dict
    identity : perturbret.runs.runs.Identity
    label : str
        Name of its method in this comparison, by `label_methods`: the `encoder` column of every table.
    """

    directory: Path
    manifest: dict
    identity: Identity
    label: str = ""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def params(self) -> dict:
        return self.manifest["fit"]["params"]

    @property
    def key(self) -> dict:
        """What tells the run from others of its arena: the first columns of every table."""
        return {"encoder": self.label, "mask": self.identity.mask, "seed": self.identity.seed}

    def table(self, name: str) -> pd.DataFrame:
        """A CSV of the run, the rows of its candidate set, with its key in front."""
        table = pd.read_csv(self.directory / f"{name}.csv", keep_default_na=False, na_values=[""])
        table = table[table["candidates"] == self.identity.candidates].reset_index(drop=True)
        return pd.concat([pd.DataFrame(self.key, index=table.index), table], axis=1)


def collect(
    directory: Path,
    expected: list[str] | None = None,
    *,
    fingerprint: str = "",
    code: Callable[[dict, str], str] | None = None,
) -> tuple[list[Finished], list[str]]:
    """Find the finished runs of a dataset.

    Parameters
    ----------
    directory : pathlib.Path
        outputs/<dataset>/
    expected : list of str, optional
        Names of the runs to use; runs of other names are left out. All that are there but `scratch` when not given.
    fingerprint : str, optional
        Runs that were made with other data are not finished.
    code : callable, optional
        Parameters of a run, and the hash of the code that fitted it -> hash of the code that would fit it today; runs
        fitted by other code are not finished. See `perturbret.runs.pipeline.fit_code`.

    Returns
    -------
    finished : list of Finished
    missing : list of str
        Runs that were expected or begun, and are not complete.

    Raises
    ------
    ValueError
        Two runs are the same method under the same mask and seed.
    """
    directory = Path(directory)
    finished, missing = [], []
    there = {path.parent.name for path in directory.glob("*/manifest.json")} - {SCRATCH}
    for name in expected or sorted(there):
        manifest = read_manifest(directory / name)
        if _is_finished(manifest, directory / name, fingerprint, code):
            identity = Identity.read(manifest)
            sets = manifest["evaluation"].get("candidate_sets", [identity.candidates])
            for candidates in sets:
                asked = dataclasses.replace(identity, candidates=candidates)
                finished.append(Finished(directory / name, manifest, asked))
        else:
            missing.append(name)
    taken: dict[Identity, str] = {}
    for run in finished:
        other = taken.setdefault(run.identity, run.name)
        if other != run.name:
            raise ValueError(
                f"runs: {other!r} and {run.name!r} are the same method, mask and seed; name one of them"
            )
    return label_methods(finished), missing


def _is_finished(manifest: dict, directory: Path, fingerprint: str, code: Callable | None) -> bool:
    """Whether a run was judged, on today's data, by today's fitting code, and is the one that lies there."""
    judged, fit = manifest.get("evaluation"), manifest.get("fit")
    return (
        bool(judged and fit)
        and fingerprint in ("", fit["context"].get("fingerprint"))
        and (code is None or code(fit["params"], fit["code"]) == fit["code"])
        and all(
            judged.get(f"{name}_sha256") == directory_hash(directory / name)
            for name in ("encoder", "null_encoder")
        )
    )


def label_methods(runs: list[Finished]) -> list[Finished]:
    """Label every run so that runs of an arena share a label only where all but mask and seed is equal.

    A method that was run in one way is called by its name; where it was run in several, what differs is added, e.g.
    `pca (n_components=[20])`.
    """
    labelled = []
    for run in runs:
        known = (run.identity.arena, run.identity.method)
        alike = [
            other.identity.request for other in runs if (other.identity.arena, other.identity.method) == known
        ]
        keys = sorted({key for request in alike for key in request})
        differ = [key for key in keys if len({request.get(key) for request in alike}) > 1]
        parts = [f"{key.rpartition('.')[2]}={run.identity.request.get(key, 'default')}" for key in differ]
        text = f" ({', '.join(parts)})".replace('"', "") if parts else ""
        labelled.append(dataclasses.replace(run, label=run.identity.method + text))
    return labelled


def _require_one_arena(runs: list[Finished]) -> None:
    """Refuse runs of several tracks, shares of the labels or candidates: nothing is averaged across these."""
    arenas = sorted({run.identity.arena for run in runs})
    if len(arenas) > 1:
        raise ValueError(f"runs: expected one track, train_share and candidates, got {arenas}")


def _grouped(runs: list[Finished]) -> dict[tuple[str, str], list[Finished]]:
    """Runs of each method and mask: its seeds."""
    _require_one_arena(runs)
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.label, run.identity.mask), []).append(run)
    return dict(sorted(groups.items()))


def choose_readouts(runs: list[Finished], *, n_resamples: int) -> pd.DataFrame:
    """The read-out that stands for every method, chosen on the validation cells of all its seeds.

    Returns
    -------
    pandas.DataFrame
        One row per encoder and mask: the fields of `readouts.Choice`; `role` (see `role_of`); `track`
        and `train_share`; `mode`, `init` and `members` of scGPT's; `available`, a set of (scoring, library) that all
        its runs were evaluated with; `request` and `run`, of its first run.
    """
    rows = []
    for (encoder, mask), group in _grouped(runs).items():
        evaluated = set.intersection(*(set(run.manifest["evaluation"]["libraries"]) for run in group))
        libraries = [library for library in LIBRARIES[1:] if library in evaluated]
        candidates = group[0].identity.candidates
        validation = pd.concat([read_validation(run.directory, libraries, candidates) for run in group])
        role = role_of(group[0].params["encoder"], mask)
        if role == "ceiling":  # only its posterior bounds other methods, not a cosine of its likelihoods
            validation = validation[validation["scoring"] == "classifier"]
        # What is to be exceeded stands at its best: no standard error is given away.
        choice = choose_readout(validation, n_errors=float(role != "nuisance"), n_resamples=n_resamples)
        chosen = group[0].manifest["fit"]["chosen"] if role == "tuned" else {}
        arena = {name: getattr(group[0].identity, name) for name in ARENA}
        row = {"encoder": encoder, "mask": mask, **arena, "role": role, **asdict(choice)}
        row |= {name: chosen.get(name, "") for name in ("mode", "init", "members")}
        row["available"] = set(zip(validation["scoring"], validation["library"], strict=True))
        row |= {"request": group[0].identity.request, "run": group[0].name}
        rows.append(row)
    return pd.DataFrame(rows)


def kept_scores(runs: list[Finished], readouts: pd.DataFrame) -> pd.DataFrame:
    """Per-query scores of all runs: the chosen read-outs, and for single cells those of `FIXED` and `SHOWN`.

    Returns
    -------
    pandas.DataFrame
        Rows of scores.parquet with encoder, mask, seed and `primary`, whether the read-out is the chosen one.
    """
    _require_one_arena(runs)
    chosen = {(row.encoder, row.mask): (row.scoring, row.library) for row in readouts.itertuples()}
    fixed = pd.MultiIndex.from_tuples([*FIXED, *SHOWN])
    tables = []
    for run in runs:
        scores = pd.read_parquet(run.directory / "scores.parquet").assign(**run.key)
        scores = scores[scores["candidates"] == run.identity.candidates]
        pairs = pd.MultiIndex.from_frame(scores[["scoring", "library"]])
        primary = pairs == chosen[run.label, run.identity.mask]
        ceiling = run.params["encoder"] == CEILING
        keep = primary | ((scores["query_size"] == 1) & pairs.isin(fixed) & (not ceiling))
        tables.append(scores.assign(primary=primary)[keep])
    return pd.concat(tables, ignore_index=True)


def repeats(scores: pd.DataFrame, metrics: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Metrics of one method's queries over its training repeats.

    Parameters
    ----------
    scores : pandas.DataFrame
        Rows of one method, mask, read-out, query size and pooling.
    metrics : list of str

    Returns
    -------
    values : ndarray of float64, shape (n_metrics, n_queries, n_repeats)
        Queries in the order of their ids, repeats in that of their seeds.
    queries : pandas.DataFrame
        `query_id` and `condition` of each.

    Raises
    ------
    ValueError
        The seeds do not have the same queries.
    """
    seeds = sorted(scores["seed"].unique())
    scores = scores.sort_values(["query_id", "seed"])
    ids = scores["query_id"].to_numpy()
    n = len(scores) // len(seeds)
    if len(scores) % len(seeds) or (ids.reshape(n, -1) != ids.reshape(n, -1)[:, :1]).any():
        raise ValueError(
            f"{scores['encoder'].iloc[0]}: expected the same query cells in seeds {', '.join(map(str, seeds))}, got "
            f"others in some; runs made before query cells were the same for all seeds must be made again"
        )
    values = scores[metrics].to_numpy(float).T.reshape(len(metrics), n, len(seeds))
    return values, scores[["query_id", "condition"]].iloc[:: len(seeds)].reset_index(drop=True)


def estimates(scores: pd.DataFrame, *, n_resamples: int) -> pd.DataFrame:
    """Every method by itself: means over queries and training repeats.

    Returns
    -------
    pandas.DataFrame
        One row per mask, encoder, scoring, library, query_size, pooling, metric and average: `estimate` with `ci_low`
        and `ci_high` (conditions are the unit; widened by `spread`, the standard deviation between repeats),
        `n_queries` (distinct ones), `n_conditions`, `n_repeats`, `primary`. Pooled queries have exact_hit@1 and mrr
        only; so do read-outs that were not chosen, micro.
    """
    keys = ["mask", "encoder", "scoring", "library", "query_size", "pooling", "primary"]
    rows = []
    for values, part in scores.groupby(keys, sort=True, observed=True):
        key = dict(zip(keys, values, strict=True))
        metrics = ["exact_hit@1", "mrr"]
        if key["primary"] and key["query_size"] == 1:  # what was registered after these runs is not there
            metrics = [
                name for name in metric_columns("compared") if name in part and part[name].notna().all()
            ]
        found, queries = repeats(part, metrics)
        key |= {"n_queries": len(queries), "n_conditions": queries["condition"].nunique()}
        key["n_repeats"] = found.shape[2]
        for metric, matrix in zip(metrics, found, strict=True):
            for average in ("micro", "macro") if key["primary"] else ("micro",):
                bounds = find_metric(metric).limits(part["n_candidates"].max())
                mean = repeated_mean(
                    matrix, queries["condition"], average=average, n_resamples=n_resamples, bounds=bounds
                )
                row = {**key, "metric": metric, "average": average, "estimate": mean.estimate}
                rows.append(row | {"ci_low": mean.low, "ci_high": mean.high, "spread": mean.spread})
    return pd.DataFrame(rows)


def confidences(runs: list[Finished]) -> pd.DataFrame:
    """Rows of confidence.csv of every run, at the read-out that its own validation cells chose.

    Runs that were judged before there was one have no rows.
    """
    found = [run.table("confidence") for run in runs if (run.directory / "confidence.csv").exists()]
    empty = pd.DataFrame(columns=["encoder", "mask", "seed", "quantity", "estimate", "ci_low", "ci_high"])
    return pd.concat(found, ignore_index=True) if found else empty


def null_verdicts(runs: list[Finished], readouts: pd.DataFrame) -> pd.DataFrame:
    """Null control of every run at the read-out of its method, with Holm-adjusted p-values and the verdict.

    Returns
    -------
    pandas.DataFrame
        Rows of null_control.csv plus `p_holm` and `holds` (adjusted p at least 0.05), and `detectable`, the smallest
        leak that it finds with 80% power, as a share of cells (NaN: none). Adjusted over all runs; those under an
        unsafe mask are a family of their own.
    """
    nulls = pd.concat([run.table("null_control").assign(run=run.name) for run in runs], ignore_index=True)
    nulls = nulls.merge(readouts[["encoder", "mask", "scoring", "library"]])
    unsafe = nulls["mask"].isin(UNSAFE)
    for family in (unsafe, ~unsafe):
        nulls.loc[family, "p_holm"] = holm(nulls.loc[family, "p_value"].to_numpy()) if family.any() else []
        limits = [detectable_in_family(row, int(family.sum())) for _, row in nulls[family].iterrows()]
        nulls.loc[family, "detectable"] = np.array(limits, float)
    nulls["holds"] = ~(nulls["p_holm"] < 0.05)
    return nulls


def contrasts(
    scores: pd.DataFrame, readouts: pd.DataFrame, *, n_resamples: int = 1000, no_verdict: str = ""
) -> pd.DataFrame:
    """All paired differences of a report, on the same single query cells.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `kept_scores`, of one track and share of labels.
    readouts : pandas.DataFrame
        From `choose_readouts`, of the same.
    n_resamples : int
        Of the bootstrap behind intervals; ten sign patterns of paired tests for each.
    no_verdict : str
        Why nothing may be concluded on this screen; every verdict then says so.

    Returns
    -------
    pandas.DataFrame
        One row per comparison: `question` (`baseline`: against the best simple opponent; `adapting`: against the
        frozen network from the same weights; `pretraining`: against the same mode from random weights; `mask`: against
        the same method under the mask of the headline; `nuisance`: over the best nuisance opponent), `encoder`, `mask`,
        `against`, `scoring` and `library` (of both sides; `own` where each side has the one chosen for it, as
        `nuisance` has), the two sides' exact_hit@1 as `estimate` and `other`, `difference` with `low` and `high`,
        `spread` between repeats, `p_value` (paired permutation), `p_holm` (adjusted within `FAMILIES`), `verdict`,
        `mrr`, `mrr_low`, `mrr_high`, `n_repeats`.
    """
    columns = (
        "question encoder mask against scoring library estimate other difference low high spread p_value"
    )
    columns = f"{columns} mrr mrr_low mrr_high n_repeats".split()
    single = scores[scores["query_size"] == 1]
    parts = dict(list(single.groupby(["encoder", "mask", "scoring", "library"], observed=True)))
    by_name = readouts.set_index(["encoder", "mask"])
    rows = []
    for question, one, other in _pairs(readouts):
        a, b = by_name.loc[one], by_name.loc[other]
        shared = common_readout(a["available"], b["available"])
        sides = [shared, shared]
        if question == "nuisance":
            shared, sides = ("own", "own"), [(a["scoring"], a["library"]), (b["scoring"], b["library"])]
        tables = [parts.get((*name, *side)) for name, side in zip((one, other), sides, strict=True) if side]
        if len(tables) == 2 and all(table is not None for table in tables):
            against = other[0] if question != "mask" else other[1]
            found = _difference(*tables, n_resamples)
            rows.append({"question": question, "encoder": one[0], "mask": one[1], "against": against})
            rows[-1] |= {"scoring": shared[0], "library": shared[1], **found}
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"], table["verdict"] = np.nan, ""
    for family in FAMILIES:
        enough = (table["n_repeats"] >= MIN_REPEATS) & table["p_value"].notna()
        judged = table["question"].isin(family) & enough
        table.loc[judged, "p_holm"] = holm(table.loc[judged, "p_value"].to_numpy()) if judged.any() else []
    table["verdict"] = [
        ""
        if row.question == "nuisance"
        else no_verdict or verdict(row.n_repeats, row.p_holm, row.low, row.high)
        for row in table.itertuples()
    ]
    return table


def verdict(n_repeats: int, p_holm: float, low: float, high: float) -> str:
    """`better`, `worse`, `no clear difference`, or why it is not judged.

    It takes an adjusted p below 0.05, an interval (which the spread between repeats widens) without 0, and at least
    `MIN_REPEATS` repeats.
    """
    if n_repeats < MIN_REPEATS:
        return f"not judged: {n_repeats} repeat{'s' if n_repeats != 1 else ''}"
    if p_holm < 0.05 and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    return NO_DIFFERENCE


def _pairs(readouts: pd.DataFrame) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """Question and the two (encoder, mask) of every comparison."""
    baseline, nuisance = (first_of(readouts, LEAK_FREE, role) for role in ("simple", "nuisance"))
    under = readouts[readouts["mask"] == LEAK_FREE]
    tuned = under[under["role"] == "tuned"]
    for one in under.itertuples():
        name = (one.encoder, LEAK_FREE)
        if nuisance and one.encoder != nuisance:
            yield "nuisance", name, (nuisance, LEAK_FREE)
        if baseline and one.encoder != baseline and one.role in ("simple", "tuned"):
            yield "baseline", name, (baseline, LEAK_FREE)
        if one.role == "tuned" and one.mode != "frozen":
            if other := _closest(one, tuned[(tuned["mode"] == "frozen") & (tuned["init"] == one.init)]):
                yield "adapting", name, (other, LEAK_FREE)
        if one.role == "tuned" and one.init != "random":
            same = (tuned["mode"] == one.mode) & (tuned["members"] == one.members)
            if other := _closest(one, tuned[same & (tuned["init"] == "random")]):
                yield "pretraining", name, (other, LEAK_FREE)
        if one.role not in ("ceiling", "precomputed"):
            for mask in sorted(readouts.loc[readouts["encoder"] == one.encoder, "mask"]):
                if mask != LEAK_FREE:
                    yield "mask", (one.encoder, mask), (one.encoder, LEAK_FREE)


def _closest(one, others: pd.DataFrame) -> str | None:
    """The one that was asked for most alike, by the number of parameters that differ."""
    differ = [
        (sum(one.request.get(key) != asked.get(key) for key in {*one.request, *asked}), name)
        for name, asked in zip(others["encoder"], others["request"], strict=True)
    ]
    return min(differ)[1] if differ else None


def _difference(one: pd.DataFrame, other: pd.DataFrame, n_resamples: int) -> dict:
    """Over the seeds that both have."""
    seeds = set(one["seed"]) & set(other["seed"])
    if not seeds:
        return {"n_repeats": 0}
    (a, queries), (b, others) = (
        repeats(part[part["seed"].isin(seeds)], list(CONTRASTS_SHOWN)) for part in (one, other)
    )
    if not queries.equals(others):
        raise ValueError(
            f"{one['encoder'].iloc[0]} and {other['encoder'].iloc[0]}: expected the same query cells, got others"
        )
    hit, mrr = (
        repeated_difference(
            x, y, queries["condition"], n_resamples=n_resamples, n_permutations=10 * n_resamples, seed=0
        )
        for x, y in zip(a, b, strict=True)
    )
    found = {"estimate": a[0].mean(), "other": b[0].mean(), "difference": hit.estimate}
    found |= {"low": hit.low, "high": hit.high, "spread": hit.spread, "p_value": hit.p_value}
    found |= {"mrr": mrr.estimate, "mrr_low": mrr.low, "mrr_high": mrr.high}
    return found | {"n_repeats": hit.n_repeats}
