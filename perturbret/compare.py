"""Compare finished runs: read-outs, baseline, differences, and whether the null control holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .contenders import CEILING, best_baseline
from .masking import UNSAFE
from .provenance import directory_hash
from .runs import TUNED, read_manifest
from .stats import cluster_bootstrap, holm, paired_permutation_p

METRICS = (
    "exact_hit@1 exact_hit@5 exact_hit@8 exact_hit@10 relevant_hit@1 relevant_hit@5 relevant_hit@10 "
    "mrr mrr@10 ndcg@5 ndcg_binary@5 ap"
).split()
TESTED = ("exact_hit@1", "mrr")
# Order of preference among read-outs that validation cannot tell apart: the simpler first.
SCORINGS = ("cosine", "classifier", "whitened", "classifier_corrected")
# Shown beside the others, and never the read-out that stands for an encoder: it answers another question (all
# conditions equally likely), so that a choice between it and `classifier` by micro hits would be noise.
VARIANT = "classifier_corrected"
LIBRARIES = ("none", "mean", "bootstrap", "raw_cell")
LEAK_FREE = "all_targets"


@dataclass(frozen=True)
class Finished:
    """A run whose evaluation is complete and belongs to the encoder that lies beside it."""

    directory: Path
    manifest: dict

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def params(self) -> dict:
        return self.manifest["fit"]["params"]

    @property
    def method(self) -> str:
        """Name in comparisons: the recipe and what varies, where the directory is named after it, else the encoder."""
        recipe, named, more = self.name.partition(f"-{self.params['mask']}-seed{self.params['seed']}")
        return (f"{recipe} ({more[1:]})" if more else recipe) if named else self.params["encoder"]

    def table(self, name: str) -> pd.DataFrame:
        """A CSV of the run with its encoder, mask and seed in front."""
        table = pd.read_csv(self.directory / f"{name}.csv", keep_default_na=False, na_values=[""])
        for position, (key, value) in enumerate(self.key.items()):
            table.insert(position, key, value)
        return table

    @property
    def key(self) -> dict:
        """What tells the run from others in a comparison."""
        return {"encoder": self.method, "mask": self.params["mask"], "seed": self.params["seed"]}


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
    taken: dict[tuple, str] = {}
    for run in finished:
        other = taken.setdefault((*run.key.values(), run.params["track"]), run.name)
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


def choose_readouts(runs: list[Finished]) -> pd.DataFrame:
    """Choose, on validation cells, the library of every scoring and the primary scoring of every encoder.

    Returns
    -------
    pandas.DataFrame
        One row per encoder, mask and scoring: `library`, `validation` (mean exact_hit@1 over seeds) and
        `primary` (the encoder's best scoring under that mask).
    """
    validation = pd.concat([_validation(run) for run in runs], ignore_index=True)
    validation = validation.query("metric == 'exact_hit@1' and average == 'micro'")
    keys = ["encoder", "mask", "scoring", "library"]
    means = (
        validation.groupby(keys, as_index=False)["estimate"].mean().rename(columns={"estimate": "validation"})
    )
    means["validation"] = means["validation"].round(9)
    means["preference"] = [
        SCORINGS.index(scoring) * len(LIBRARIES) + LIBRARIES.index(library)
        for scoring, library in zip(means["scoring"], means["library"], strict=True)
    ]
    means = means.sort_values(
        ["encoder", "mask", "validation", "preference"], ascending=[True, True, False, True]
    )
    chosen = means.drop_duplicates(["encoder", "mask", "scoring"]).copy()
    leading = chosen[chosen["scoring"] != VARIANT].drop_duplicates(["encoder", "mask"])
    chosen["primary"] = chosen.index.isin(leading.index)
    unmasked = {run.method for run in runs if run.params["encoder"].startswith("obsm:")}
    chosen["unmasked"] = chosen["encoder"].isin(unmasked)
    tuned = {run.method: run.manifest["fit"]["chosen"] for run in runs if run.params["encoder"] == TUNED}
    chosen["tuned"] = chosen["encoder"].isin(tuned)
    for name in ("mode", "init", "members"):
        chosen[name] = [tuned[method][name] if method in tuned else "" for method in chosen["encoder"]]
    return chosen.drop(columns="preference").reset_index(drop=True)


def primary_readout(validation: pd.DataFrame, libraries: Sequence[str] = LIBRARIES) -> tuple[str, str]:
    """Library and scoring with the best validation exact_hit@1 of one run; the simpler of equals."""
    rows = validation.query("metric == 'exact_hit@1' and average == 'micro'")
    rows = rows[rows["library"].isin(["none", *libraries]) & (rows["scoring"] != VARIANT)]
    ranked = sorted(
        (-round(row.estimate, 9), SCORINGS.index(row.scoring), LIBRARIES.index(row.library))
        for row in rows.itertuples()
    )
    _, scoring, library = ranked[0]
    return LIBRARIES[library], SCORINGS[scoring]


def chosen_scores(runs: list[Finished], readouts: pd.DataFrame) -> pd.DataFrame:
    """Per-query scores of all runs, for the chosen read-outs only."""
    keys = ["encoder", "mask", "scoring", "library"]
    tables = []
    for run in runs:
        scores = pd.read_parquet(run.directory / "scores.parquet")
        scores = scores.assign(**run.key)
        tables.append(scores.merge(readouts[[*keys, "primary"]], on=keys))
    scores = pd.concat(tables, ignore_index=True)
    return scores.sort_values(["encoder", "mask", "scoring", "query_size", "pooling", "seed", "query_id"])


def comparison(
    scores: pd.DataFrame, readouts: pd.DataFrame, *, n_resamples: int, seed: int = 0
) -> pd.DataFrame:
    """All methods side by side, each against the best baseline on the same queries.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `chosen_scores`.
    readouts : pandas.DataFrame
        From `choose_readouts`.
    n_resamples : int
        Bootstrap resamples of conditions.
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per mask, query_size, pooling, encoder, scoring, metric and average: `estimate` with `ci_low`
        and `ci_high`, `baseline`, `difference` with its interval, `p_value` (paired permutation) and `p_holm`
        (Holm-adjusted over the primary read-outs of the same mask, query size, pooling, metric and average,
        and empty for others). Queries of
        all seeds are pooled; conditions are the clusters, so the interval holds over splits and conditions.
    """
    rows = []
    for (mask, size, pooling), part in scores.groupby(["mask", "query_size", "pooling"], sort=True):
        baseline = best_baseline(readouts, mask)
        methods = dict(list(part.groupby(["encoder", "scoring", "library", "primary"], sort=True)))
        # A size or pooling that the baseline was not evaluated with has estimates and no differences.
        found = [group for key, group in methods.items() if key[0] == baseline and key[3]]
        reference = found[0] if found else part.head(0)
        for (encoder, scoring, library, primary), group in methods.items():
            key = {
                "mask": mask,
                "query_size": size,
                "pooling": pooling,
                "encoder": encoder,
                "scoring": scoring,
            }
            key |= {"library": library, "primary": primary, "baseline": baseline}
            key |= {"n_queries": len(group), "n_conditions": group["condition"].nunique()}
            key["n_seeds"] = group["seed"].nunique()
            rows += _method_rows(key, group, reference, n_resamples=n_resamples, seed=seed)
    table = pd.DataFrame(rows)
    family = ["mask", "query_size", "pooling", "metric", "average"]
    table["p_holm"] = np.nan
    for _, index in table[table["p_value"].notna() & table["primary"]].groupby(family).groups.items():
        table.loc[index, "p_holm"] = holm(table.loc[index, "p_value"].to_numpy())
    return table


def null_verdicts(runs: list[Finished], readouts: pd.DataFrame) -> pd.DataFrame:
    """Null control of every run and chosen read-out, with Holm-adjusted p-values and the verdict.

    Returns
    -------
    pandas.DataFrame
        Rows of null_control.csv plus `p_holm` and `holds` (adjusted p at least 0.05). Adjusted over the primary
        read-outs, one for each run; runs under an unsafe mask are a family of their own. Other read-outs have
        no adjusted value and no verdict of their own.
    """
    keys = ["encoder", "mask", "scoring", "library"]
    nulls = pd.concat([run.table("null_control").assign(run=run.name) for run in runs], ignore_index=True)
    nulls = nulls.merge(readouts[[*keys, "primary"]], on=keys)
    unsafe = nulls["mask"].isin(UNSAFE)
    for family in (unsafe & nulls["primary"], ~unsafe & nulls["primary"]):
        nulls.loc[family, "p_holm"] = holm(nulls.loc[family, "p_value"].to_numpy()) if family.any() else []
    nulls["holds"] = ~(nulls["p_holm"] < 0.05)
    return nulls


def mask_deltas(scores: pd.DataFrame, *, n_resamples: int, seed: int = 0) -> pd.DataFrame:
    """Paired change of exact_hit@1 from the leak-free mask to each other mask, for single cells."""
    single = scores.query("query_size == 1 and primary")
    rows = []
    for encoder, part in single.groupby("encoder", sort=True):
        by_mask = {mask: group.set_index(["seed", "query_id"]) for mask, group in part.groupby("mask")}
        if LEAK_FREE not in by_mask:
            continue
        safe = by_mask[LEAK_FREE]
        for mask in sorted(set(by_mask) - {LEAK_FREE}):
            pair = by_mask[mask].join(safe, rsuffix="_safe", how="inner")
            change = (pair["exact_hit@1"] - pair["exact_hit@1_safe"]).to_numpy()[:, None]
            found = cluster_bootstrap(
                change, pair["condition"].to_numpy(), n_resamples=n_resamples, seed=seed
            )
            low, high = found.low[0], found.high[0]
            rows.append(
                {"encoder": encoder, "mask": mask, "delta": found.estimate[0], "ci_low": low, "ci_high": high}
            )
    return pd.DataFrame(rows, columns=["encoder", "mask", "delta", "ci_low", "ci_high"])


def _validation(run: Finished) -> pd.DataFrame:
    table = run.table("validation")
    if run.method == CEILING:  # only its posterior bounds other methods, not a cosine of its likelihoods
        return table[table["scoring"] == "classifier"]
    return table[table["library"].isin(["none", *run.manifest["evaluation"]["libraries"]])]


def _method_rows(
    key: dict, group: pd.DataFrame, reference: pd.DataFrame, *, n_resamples: int, seed: int
) -> list:
    shared = reference.set_index(["seed", "query_id"])[METRICS].reindex(
        pd.MultiIndex.from_frame(group[["seed", "query_id"]])
    )
    values, clusters = group[METRICS].to_numpy(float), group["condition"].to_numpy(str)
    paired = ~shared.isna().any(axis=1).to_numpy()
    differences = values[paired] - shared.to_numpy()[paired]
    same = key["encoder"] == key["baseline"] and key["primary"]
    rows = []
    for average in ("micro", "macro"):
        options = {"average": average, "n_resamples": n_resamples, "seed": seed}
        own = cluster_bootstrap(values, clusters, **options)
        gap = cluster_bootstrap(differences, clusters[paired], **options) if paired.any() else None
        for i, metric in enumerate(METRICS):
            row = {**key, "metric": metric, "average": average}
            row |= {"estimate": own.estimate[i], "ci_low": own.low[i], "ci_high": own.high[i]}
            if gap is not None:
                row |= {"difference": gap.estimate[i], "diff_low": gap.low[i], "diff_high": gap.high[i]}
            row["p_value"] = np.nan
            if metric in TESTED and average == "micro" and not same and paired.any():
                row["p_value"] = paired_permutation_p(
                    values[paired, i], shared.to_numpy()[paired, i], clusters[paired], seed=seed
                )
            rows.append(row)
    return rows
