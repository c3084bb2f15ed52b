"""The tables of the ablation report: gather finished runs, compare them, judge their null controls."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .atomic import replacing
from .compare import (
    LEAK_FREE,
    choose_readouts,
    chosen_scores,
    collect,
    comparison,
    mask_deltas,
    null_verdicts,
)
from .masking import UNSAFE
from .pipeline import fit_code
from .runs import outputs_root, write_table
from .screen import Screen


@dataclass(frozen=True)
class Report:
    """Everything that notebook 06 shows.

    Attributes
    ----------
    directory : pathlib.Path
        outputs/<dataset>/report/
    readouts, scores, table, verdicts, deltas : pandas.DataFrame
        See `perturbret.compare`.
    missing : list of str
        Runs that were expected or begun and have no complete evaluation.
    chance : dict of str to float
        Chance of every metric for single cells, micro average.
    prior : float
        Share of the most common condition among the single-cell queries.
    """

    directory: Path
    readouts: pd.DataFrame
    scores: pd.DataFrame
    table: pd.DataFrame
    verdicts: pd.DataFrame
    deltas: pd.DataFrame
    missing: list
    chance: dict
    prior: float

    def rows(self, mask: str = LEAK_FREE, metric: str = "exact_hit@1", average: str = "micro", **others):
        """Rows of the comparison for one mask, metric and average; `others` are further column = value."""
        wanted = {"mask": mask, "metric": metric, "average": average, **others}
        return self.table[np.logical_and.reduce([self.table[key] == value for key, value in wanted.items()])]

    def single(self, mask: str = LEAK_FREE, metric: str = "exact_hit@1", average: str = "micro"):
        """Rows of the primary read-outs for single cells, best first."""
        rows = self.rows(mask, metric, average, query_size=1)
        return rows[rows["primary"]].sort_values("estimate", ascending=False)


def build_report(
    screen: Screen,
    *,
    runs: list | None = None,
    failed: list | None = None,
    outputs: str = "",
    n_resamples: int = 1000,
) -> Report:
    """Compare the finished runs of a dataset and write comparison.csv, readouts.csv and null_control.csv.

    Parameters
    ----------
    screen : Screen
        Runs made with other data, or by other fitting code than today's, count as missing.
    runs : list of str, optional
        Names of the runs to compare; all that are there when empty.
    failed : list of str, optional
        Names of runs known to have failed; left out, and named in the report like unfinished ones.
    outputs : str
        See `perturbret.runs.outputs_root`.
    n_resamples : int
        Bootstrap resamples.

    Raises
    ------
    FileNotFoundError
        No finished run under the leak-free mask.
    """
    root = outputs_root(outputs) / screen.name
    finished, missing = collect(root, runs, fingerprint=screen.fingerprint, code=fit_code)
    finished = [run for run in finished if run.name not in (failed or [])]
    missing = sorted({*missing, *(failed or [])})
    if not any(run.params["mask"] == LEAK_FREE for run in finished):
        raise FileNotFoundError(
            f"{root}: expected at least one finished run with mask {LEAK_FREE}, found {len(finished)} finished runs in "
            f"all and {len(missing)} unfinished; run `make report` or notebooks 03 and 05"
        )
    readouts = choose_readouts(finished)
    scores = chosen_scores(finished, readouts)
    table = comparison(scores, readouts, n_resamples=n_resamples)
    verdicts = null_verdicts(finished, readouts)
    deltas = mask_deltas(scores, n_resamples=n_resamples)
    summary = finished[0].table("summary").query("query_size == 1 and average == 'micro'")
    chance = summary.groupby("metric")["chance"].first().to_dict()
    first = scores.query("query_size == 1 and seed == seed.min()").drop_duplicates("query_id")
    prior = float(first["condition"].value_counts(normalize=True).iloc[0])
    directory = root / "report"
    write_table(directory / "comparison.csv", table)
    write_table(directory / "null_control.csv", verdicts)
    write_table(directory / "readouts.csv", readouts)
    return Report(directory, readouts, scores, table, verdicts, deltas, missing, chance, prior)


def save_figure(report: Report, figure, name: str) -> None:
    """Write a figure of the report as PNG, atomically."""
    with replacing(report.directory / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png")


def validity(report: Report) -> pd.DataFrame:
    """Null-control verdict by encoder and mask: runs that hold, worst case, INVALID where one does not."""
    primary = report.verdicts[report.verdicts["primary"]]
    rows = []
    for (encoder, mask), part in primary.groupby(["encoder", "mask"]):
        failed = int((~part["holds"]).sum())
        verdict = "holds" if not failed else ("LEAK (mask is unsafe)" if mask in UNSAFE else "INVALID")
        row = {"encoder": encoder, "mask": mask, "runs": len(part), "not holding": failed}
        row |= {
            name: part[name].mean()
            for name in ("estimate", "ci_low", "ci_high", "luck", "class_prior", "chance")
        }
        rows.append({**row, "verdict": verdict})
    return pd.DataFrame(rows)


def per_condition(report: Report, encoder: str) -> pd.DataFrame:
    """exact_hit@1 of every condition for one encoder's primary read-out.

    Returns
    -------
    pandas.DataFrame
        condition; `estimate` with a Wilson 95% interval whose size is the number of distinct cells (several
        seeds may query the same cell); `base_rate`, how often the condition is ranked first for queries of
        other conditions: what a leaning towards it would hit; n_cells.
    """
    part = _leak_free_singles(report, encoder)
    first = part["top10"].str.split("|").str[0]
    rows = []
    for condition, group in part.groupby("condition"):
        hits, n = group["exact_hit@1"].mean(), group["query_id"].nunique()
        low, high = wilson_interval(hits, n)
        base = (first[part["condition"] != condition] == condition).mean()
        rows.append((condition, hits, low, high, base, n))
    return pd.DataFrame(rows, columns=["condition", "estimate", "ci_low", "ci_high", "base_rate", "n_cells"])


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of `n` (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    z = 1.959964
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def confusion(report: Report, encoder: str, n: int = 12) -> pd.DataFrame:
    """Row-normalised confusion among the `n` conditions that take part in the largest mix-ups."""
    part = _leak_free_singles(report, encoder)
    first = part["top10"].str.split("|").str[0]
    full = pd.crosstab(part["condition"], first, normalize="index")
    names = sorted(set(full.index) | set(full.columns))
    full = full.reindex(index=names, columns=names, fill_value=0.0)
    mixed = full.to_numpy(copy=True)
    np.fill_diagonal(mixed, 0.0)
    chosen: list[str] = []
    for flat in np.argsort(mixed, axis=None)[::-1]:
        for name in (names[i] for i in np.unravel_index(flat, mixed.shape)):
            if name not in chosen and len(chosen) < n:
                chosen.append(name)
        if len(chosen) == n:
            break
    return full.loc[sorted(chosen), sorted(chosen)]


def _leak_free_singles(report: Report, encoder: str) -> pd.DataFrame:
    scores = report.scores
    chosen = scores["primary"] & (scores["encoder"] == encoder) & (scores["mask"] == LEAK_FREE)
    return scores[chosen & (scores["query_size"] == 1)]
