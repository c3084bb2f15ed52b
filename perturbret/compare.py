"""Finished runs of a dataset, what their methods are called, and their scores over training repeats."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .contenders import CEILING, role_of
from .masking import UNSAFE
from .nulls import detectable_in_family
from .provenance import directory_hash
from .readouts import FIXED, LIBRARIES, choose_readout, read_validation
from .runs import TUNED, read_manifest
from .stats import holm, repeated_mean

METRICS = (
    "exact_hit@1 exact_hit@5 exact_hit@8 exact_hit@10 relevant_hit@1 relevant_hit@5 relevant_hit@10 "
    "mrr mrr@10 ndcg@5 ndcg_binary@5 ap"
).split()
LEAK_FREE = "all_targets"  # the mask of all headline numbers
# What must be equal for two methods to be compared.
ARENA = ["track", "train_share"]
# Read-outs that every method is shown at, beside the one chosen on validation cells.
SHOWN = (("classifier", "none"), ("classifier_corrected", "none"), ("whitened", "mean"), ("cosine", "mean"))


@dataclass(frozen=True)
class Finished:
    """A run whose evaluation is complete and belongs to the encoder that lies beside it.

    Attributes
    ----------
    directory : pathlib.Path
    manifest : dict
    method : str
        Name in comparisons, by `name_methods`: runs that differ in more than mask and seed have different ones.
    """

    directory: Path
    manifest: dict
    method: str = ""

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def params(self) -> dict:
        return self.manifest["fit"]["params"]

    @property
    def recipe(self) -> str:
        """The recipe, where the directory is named after it, else the encoder."""
        found, named, _ = self.name.partition(f"-{self.params['mask']}-seed{self.params['seed']}")
        return found if named else self.params["encoder"]

    @property
    def request(self) -> dict:
        """Everything that was asked for but dataset, mask and seed: name -> value as JSON."""
        flat = {"train_share": self.manifest["fit"]["context"].get("train_share", 1.0)}
        for name, value in self.params.items():
            if name in ("search", "settings"):
                flat |= {f"{name}.{key}": part for key, part in (value or {}).items()}
            elif name not in ("dataset", "mask", "seed"):
                flat[name] = value
        return {name: json.dumps(value, sort_keys=True) for name, value in flat.items()}

    @property
    def arena(self) -> tuple[str, float]:
        """Track and share of the training labels."""
        share = self.manifest["fit"]["context"].get("train_share", 1.0)
        return self.params.get("track", "in_dist"), float(share)

    @property
    def key(self) -> dict:
        """What tells the run from others in a comparison."""
        return {"encoder": self.method, "mask": self.params["mask"], "seed": self.params["seed"]}

    def table(self, name: str) -> pd.DataFrame:
        """A CSV of the run with its encoder, mask and seed in front."""
        table = pd.read_csv(self.directory / f"{name}.csv", keep_default_na=False, na_values=[""])
        for position, (key, value) in enumerate(self.key.items()):
            table.insert(position, key, value)
        return table


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
        Names of the runs to use; runs of other names are left out. All that are there when not given.
    fingerprint : str, optional
        Runs that were made with other data are not finished.
    code : callable, optional
        Parameters of a run, and the hash of the code that fitted it -> hash of the code that would fit it today; runs
        fitted by other code are not finished. See `perturbret.pipeline.fit_code`.

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
    there = {path.parent.name for path in Path(directory).glob("*/manifest.json")}
    finished, missing = [], []
    for name in sorted(there) if not expected else expected:
        manifest = read_manifest(Path(directory) / name)
        evaluation = manifest.get("evaluation")
        fit = manifest.get("fit", {"context": {}})
        current = fingerprint in ("", fit["context"].get("fingerprint"))
        current = current and (
            not evaluation or code is None or code(fit["params"], fit["code"]) == fit["code"]
        )
        if evaluation and current and _judged(evaluation, Path(directory) / name):
            finished.append(Finished(Path(directory) / name, manifest))
        else:
            missing.append(name)
    finished = name_methods(finished)
    taken: dict[tuple, str] = {}
    for run in finished:
        other = taken.setdefault(tuple(run.key.values()), run.name)
        if other != run.name:
            raise ValueError(
                f"runs: {other!r} and {run.name!r} are the same method, mask and seed; name one of them"
            )
    return finished, missing


def _judged(evaluation: dict, directory: Path) -> bool:
    """Whether the encoders that lie in a run's directory are those that its evaluation judged."""
    return all(
        evaluation.get(f"{name}_sha256") == directory_hash(directory / name)
        for name in ("encoder", "null_encoder")
    )


def name_methods(runs: list[Finished]) -> list[Finished]:
    """Name every run's method so that runs share a name only where all but mask and seed is equal.

    A recipe that was run in one way is called by its name; where it was run in several, what differs is added, e.g.
    `logreg (train_share=0.25)`.
    """
    named = []
    for run in runs:
        alike = [other.request for other in runs if other.recipe == run.recipe]
        keys = sorted({key for request in alike for key in request})
        differ = [key for key in keys if len({request.get(key) for request in alike}) > 1]
        parts = [f"{key.rpartition('.')[2]}={run.request.get(key, 'default')}" for key in differ]
        text = f" ({', '.join(parts)})".replace('"', "") if parts else ""
        named.append(dataclasses.replace(run, method=run.recipe + text))
    return named


def choose_readouts(runs: list[Finished], *, n_resamples: int) -> pd.DataFrame:
    """The read-out that stands for every method, chosen on the validation cells of all its seeds.

    Returns
    -------
    pandas.DataFrame
        One row per encoder and mask: the fields of `readouts.Choice`; `role` (see `contenders.role_of`); `track`
        and `train_share`; `mode`, `init` and `members` of scGPT's; `available`, a set of (scoring, library) that all
        its runs were evaluated with; `request`, of its first run.
    """
    rows = []
    for (encoder, mask), group in _grouped(runs).items():
        libraries = [
            b for b in LIBRARIES[1:] if all(b in run.manifest["evaluation"]["libraries"] for run in group)
        ]
        validation = pd.concat([read_validation(run.directory, libraries) for run in group])
        params = group[0].params
        role = role_of(params["encoder"], mask, TUNED)
        if role == "ceiling":  # only its posterior bounds other methods, not a cosine of its likelihoods
            validation = validation[validation["scoring"] == "classifier"]
        # What is to be exceeded stands at its best: no standard error is given away.
        choice = choose_readout(validation, n_errors=float(role != "nuisance"), n_resamples=n_resamples)
        chosen = group[0].manifest["fit"]["chosen"] if role == "tuned" else {}
        row = {
            "encoder": encoder,
            "mask": mask,
            **dict(zip(ARENA, group[0].arena, strict=True)),
            "role": role,
        }
        row |= asdict(choice) | {name: chosen.get(name, "") for name in ("mode", "init", "members")}
        row["available"] = set(zip(validation["scoring"], validation["library"], strict=True))
        row["request"] = group[0].request
        rows.append(row)
    return pd.DataFrame(rows)


def kept_scores(runs: list[Finished], readouts: pd.DataFrame) -> pd.DataFrame:
    """Per-query scores of all runs: the chosen read-outs, and for single cells those of `FIXED` and `SHOWN`.

    Returns
    -------
    pandas.DataFrame
        Rows of scores.parquet with encoder, mask, seed and `primary`, whether the read-out is the chosen one.
    """
    chosen = {(row.encoder, row.mask): (row.scoring, row.library) for row in readouts.itertuples()}
    fixed = pd.MultiIndex.from_tuples([*FIXED, *SHOWN])
    tables = []
    for run in runs:
        scores = pd.read_parquet(run.directory / "scores.parquet").assign(**run.key)
        pairs = pd.MultiIndex.from_frame(scores[["scoring", "library"]])
        primary = pairs == chosen[run.method, run.params["mask"]]
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
        metrics = METRICS if key["primary"] and key["query_size"] == 1 else ["exact_hit@1", "mrr"]
        found, queries = repeats(part, metrics)
        key |= {"n_queries": len(queries), "n_conditions": queries["condition"].nunique()}
        key["n_repeats"] = found.shape[2]
        for metric, matrix in zip(metrics, found, strict=True):
            for average in ("micro", "macro") if key["primary"] else ("micro",):
                # Every metric lies between 0 and 1, and so does its mean.
                mean = repeated_mean(
                    matrix, queries["condition"], average=average, n_resamples=n_resamples, bounds=(0, 1)
                )
                row = {**key, "metric": metric, "average": average, "estimate": mean.estimate}
                rows.append(row | {"ci_low": mean.low, "ci_high": mean.high, "spread": mean.spread})
    return pd.DataFrame(rows)


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


def _grouped(runs: list[Finished]) -> dict[tuple[str, str], list[Finished]]:
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in runs:
        groups.setdefault((run.method, run.params["mask"]), []).append(run)
    return dict(sorted(groups.items()))
