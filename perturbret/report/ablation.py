"""The tables of the ablation report: gather finished runs, compare them, judge their null controls."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from ..data.conditions import targets
from ..data.masking import UNSAFE
from ..data.screen import Screen
from ..encoders.base import load_encoder
from ..evaluation.occlusion import occlusion
from ..evaluation.readouts import common_readout, readout_name
from ..files.atomic import replacing
from ..runs.pipeline import cache_directory, fit_code, open_saved
from ..runs.runs import outputs_root, write_table
from . import compare
from .audit import Checks
from .compare import ARENA, LEAK_FREE, Finished, collect, display_name, first_of
from .wording import difference, spread, with_interval, with_p


@dataclass(frozen=True)
class Report:
    """Everything that notebook 06 shows of one track and share of training labels.

    Attributes
    ----------
    directory : pathlib.Path
        outputs/<dataset>/report/
    track, train_share, candidates
        See `perturbret.runs.runs.Identity.arena`.
    readouts, scores, table, verdicts : pandas.DataFrame
        See `choose_readouts`, `kept_scores`, `estimates` and `null_verdicts` of `perturbret.report.compare`.
    contrasts, confidence : pandas.DataFrame
        See `contrasts` and `confidences` of `perturbret.report.compare`.
    chance : dict of str to float
        Chance of every metric for single cells, micro average.
    prior : float
        Share of the most common condition among the single-cell queries.
    missing : list of str
        Runs that were expected or begun and have no complete evaluation.
    warnings : list of str
        What the reader must know before anything else, in Markdown.
    suspect, confounded : bool
        A check of the screen found that labels may be given away, or that batches are (nearly) the conditions: no
        verdict is given then.
    checks : list of str
        Checks of the screen that were run and found nothing, beside the null control.
    others : list of Report
        Of further tracks and shares of labels; no method is compared across them.
    """

    directory: Path
    track: str
    train_share: float
    candidates: str
    readouts: pd.DataFrame
    scores: pd.DataFrame
    table: pd.DataFrame
    verdicts: pd.DataFrame
    contrasts: pd.DataFrame
    confidence: pd.DataFrame
    chance: dict
    prior: float
    missing: list = field(default_factory=list)
    warnings: list = field(default_factory=list)
    suspect: bool = False
    confounded: bool = False
    checks: list = field(default_factory=list)
    others: list = field(default_factory=list)

    @property
    def best(self) -> str | None:
        """The method that reads expression and is best on validation cells under the mask of the headline."""
        return first_of(self.readouts, LEAK_FREE, "simple", "tuned")

    @property
    def baseline(self) -> str | None:
        """The best of the simple opponents that read expression."""
        return first_of(self.readouts, LEAK_FREE, "simple")

    @property
    def tuned(self) -> str | None:
        """The best of scGPT's modes."""
        return first_of(self.readouts, LEAK_FREE, "tuned")

    @property
    def nuisance(self) -> str | None:
        """The best of the opponents that read no expression."""
        return first_of(self.readouts, LEAK_FREE, "nuisance")

    def rows(self, mask: str = LEAK_FREE, metric: str = "exact_hit@1", average: str = "micro", **others):
        """Rows of the estimates for one mask, metric and average; `others` are further column = value."""
        wanted = {"mask": mask, "metric": metric, "average": average, **others}
        return self.table[np.logical_and.reduce([self.table[key] == value for key, value in wanted.items()])]

    def single(self, mask: str = LEAK_FREE, metric: str = "exact_hit@1", average: str = "micro"):
        """Rows of the chosen read-outs for single cells, best first."""
        rows = self.rows(mask, metric, average, query_size=1, primary=True)
        return rows.sort_values(["estimate", "encoder"], ascending=[False, True])

    def asked(self, question: str, mask: str = LEAK_FREE) -> pd.DataFrame:
        """Contrasts of one question, by method."""
        rows = self.contrasts[(self.contrasts["question"] == question) & (self.contrasts["mask"] == mask)]
        return rows.set_index("encoder")


def build_report(
    screen: Screen,
    checks: Checks | None = None,
    *,
    runs: list | None = None,
    failed: list | None = None,
    outputs: str = "",
    n_resamples: int = 1000,
) -> Report:
    """Compare the finished runs of a dataset and write its tables as CSV.

    comparison.csv (estimates), differences.csv (paired differences and verdicts), readouts.csv, null_control.csv,
    confidence.csv, and as text headline.csv (`headline_table`) and contrasts.csv (`contrast_table`).

    Parameters
    ----------
    screen : Screen
        Runs made with other data, or by other fitting code than today's, count as missing.
    checks : perturbret.report.audit.Checks, optional
        Of the same screen; without them the report says that nothing was checked.
    runs : list of str, optional
        Names of the runs to compare; all that are there when empty.
    failed : list of str, optional
        Names of runs known to have failed; left out, and named in the report like unfinished ones.
    outputs : str
        See `perturbret.runs.runs.outputs_root`.
    n_resamples : int
        Resamples of conditions behind intervals and the stability of read-outs; ten sign patterns of paired tests each.

    Raises
    ------
    FileNotFoundError
        No finished run under the mask all_targets.
    """
    root = outputs_root(outputs) / screen.name
    finished, missing = collect(root, runs, fingerprint=screen.fingerprint, code=fit_code)
    finished = [run for run in finished if run.name not in (failed or [])]
    missing = sorted({*missing, *(failed or [])})
    arenas = {run.identity.arena for run in finished if run.identity.mask == LEAK_FREE}
    if not arenas:
        raise FileNotFoundError(
            f"{root}: expected at least one finished run with mask {LEAK_FREE}, found {len(finished)} finished runs in "
            f"all and {len(missing)} unfinished; notebooks 03 and 04 fit a run and notebook 05 evaluates it, `make "
            "report` does all of it"
        )
    shared = {"missing": missing, "warnings": ["No check of the screen was run."]}
    if checks is not None:
        shared |= {"warnings": checks.warnings, "suspect": checks.suspect, "confounded": checks.confounded}
        shared["checks"] = checks.names
    parts = [
        _compared(
            root / "report", [run for run in finished if run.identity.arena == arena], n_resamples, shared
        )
        for arena in sorted(arenas, key=_main_first)
    ]
    columns = [*ARENA, *(["candidates"] if len({part.candidates for part in parts}) > 1 else [])]
    for name, tables in (
        ("comparison", [part.table for part in parts]),
        ("differences", [part.contrasts for part in parts]),
        ("contrasts", [contrast_table(part, "baseline", "adapting", "pretraining") for part in parts]),
        ("null_control", [part.verdicts for part in parts]),
        ("confidence", [part.confidence for part in parts]),
        ("readouts", [part.readouts.drop(columns=["available", "request", "run"]) for part in parts]),
        ("headline", [headline_table(part) for part in parts]),
    ):
        for part, table in zip(parts, tables, strict=True):
            for column in reversed([column for column in columns if column not in table]):
                table.insert(0, column, getattr(part, column))
        write_table(root / "report" / f"{name}.csv", pd.concat(tables, ignore_index=True))
    main, *others = parts
    main.others.extend(others)
    return main


def headline_table(report: Report) -> pd.DataFrame:
    """A row per method, as a README shows it: single cells, pools of 20, read-out, verdict against the baseline."""
    mrr = report.single(metric="mrr").set_index("encoder")["estimate"]
    pooled = report.rows(query_size=20, pooling="scores", primary=True).set_index("encoder")
    twenty = {name: with_interval(row) for name, row in pooled.iterrows()}
    verdicts = report.readouts.query("mask == @LEAK_FREE").set_index("encoder")["role"].to_dict()
    verdicts |= {**report.asked("baseline")["verdict"], report.baseline: "the baseline"}
    return pd.DataFrame(
        {
            "method": display_name(row.encoder),
            "exact_hit@1": with_interval(row),
            "mrr": f"{mrr[row.encoder]:.3f}",
            "exact_hit@1, 20 cells": twenty.get(row.encoder, ""),
            "read-out": readout_name(row.scoring, row.library),
            "verdict": verdicts[row.encoder],
        }
        for row in report.single().itertuples()
    )


def contrast_table(report: Report, *questions: str) -> pd.DataFrame:
    """Paired differences with their verdicts, as text; see `perturbret.report.compare.contrasts`."""
    rows = report.contrasts[report.contrasts["question"].isin(questions)]
    rows = rows.assign(place=rows["question"].map(questions.index), largest=-rows["difference"])
    return pd.DataFrame(
        {
            "question": row.question,
            "method": display_name(row.encoder),
            "against": f"{row.mask} instead of {row.against}"
            if row.question == "mask"
            else display_name(row.against),
            "at": readout_name(row.scoring, row.library),
            "exact_hit@1": f"{row.estimate:.3f} against {row.other:.3f}",
            "difference": difference(row),
            "spread": spread(row.spread, row.n_repeats),
            "verdict": with_p(row),
            "mrr": f"{row.mrr:+.3f} [{row.mrr_low:+.3f}, {row.mrr_high:+.3f}]",
        }
        for row in rows.sort_values(["place", "largest"]).itertuples()
    )


def _main_first(arena: tuple) -> tuple:
    track, share, candidates = arena
    return track != "in_dist", track, -share, candidates != "train", candidates


def _compared(directory: Path, runs: list[Finished], n_resamples: int, shared: dict) -> Report:
    """The report of one arena."""
    readouts = compare.choose_readouts(runs, n_resamples=n_resamples)
    scores = compare.kept_scores(runs, readouts)
    reason = "suspect" if shared.get("suspect") else "confounded" if shared.get("confounded") else ""
    judge = next(run for run in runs if run.identity.mask == LEAK_FREE)
    summary = judge.table("summary").query("query_size == 1 and average == 'micro'")
    queries = scores[scores["query_size"] == 1].drop_duplicates("query_id")
    return Report(
        directory,
        *judge.identity.arena,
        readouts=readouts,
        scores=scores,
        table=compare.estimates(scores, n_resamples=n_resamples),
        verdicts=compare.null_verdicts(runs, readouts),
        contrasts=compare.contrasts(
            scores, readouts, n_resamples=n_resamples, no_verdict=f"not judged: {reason}" if reason else ""
        ),
        confidence=compare.confidences(runs),
        chance=summary.groupby("metric")["chance"].first().to_dict(),
        prior=float(queries["condition"].value_counts(normalize=True).iloc[0]),
        **shared,
    )


def informative_genes(
    report: Report, screen: Screen, encoder: str, conditions: pd.DataFrame, *, outputs: str = ""
) -> pd.DataFrame:
    """What the first run of a method goes by in the three conditions that it finds best: `evaluation.occlusion`, five
    genes each.

    Empty where no condition is found at all.
    """
    choice = report.readouts.query("encoder == @encoder and mask == @LEAK_FREE").iloc[0]
    best = conditions[conditions["estimate"] > 0].nlargest(3, "estimate")["condition"].tolist()
    if not best:
        return pd.DataFrame(columns=["condition", "gene", "fall", "error", "expressed", "n_cells"])
    run = open_saved(
        screen, run=choice["run"], outputs=outputs, encoder="", mask="", track="", seed=-1, search={}
    )
    loaded = load_encoder(run.directory, cache=cache_directory(run))
    table = occlusion(loaded, run.prepared, best, library=choice["library"], scoring=choice["scoring"])
    return table.groupby("condition", sort=False).head(5).reset_index(drop=True)


def save_figure(report: Report, figure, name: str) -> None:
    """Write a figure of the report as PNG, atomically."""
    with replacing(report.directory / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png")


def validity(report: Report) -> pd.DataFrame:
    """Null-control verdict by encoder and mask: runs that hold, INVALID where one does not.

    `detectable` is that of the run which finds least: the smallest leak found with 80% power, infinite for none.
    """
    rows = []
    for (encoder, mask), part in report.verdicts.groupby(["encoder", "mask"]):
        broken = int((~part["holds"]).sum())
        verdict = "holds" if not broken else ("LEAK (mask is unsafe)" if mask in UNSAFE else "INVALID")
        row = {"encoder": encoder, "mask": mask, "runs": len(part), "not holding": broken}
        row |= {
            name: part[name].mean()
            for name in ("estimate", "ci_low", "ci_high", "luck", "class_prior", "chance")
        }
        row["detectable"] = part["detectable"].fillna(np.inf).max()
        rows.append({**row, "verdict": verdict})
    return pd.DataFrame(rows)


def per_condition(report: Report, encoder: str) -> pd.DataFrame:
    """exact_hit@1 of every condition for one encoder's chosen read-out.

    Returns
    -------
    pandas.DataFrame
        condition; `estimate`, over its cells and the repeats, with a Wilson 95% interval whose size is the number of
        cells; `base_rate`, how often the condition is ranked first for queries of other conditions: what a leaning
        towards it would hit; n_cells.
    """
    part = _own_singles(report, encoder)
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
    # The ends of 0 and 1 are exact, and their sums are off by rounding.
    return (max(0.0, centre - half) if share > 0 else 0.0), (min(1.0, centre + half) if share < 1 else 1.0)


def confusion(report: Report, encoder: str, n: int = 12) -> pd.DataFrame:
    """Row-normalised confusion among the `n` conditions that take part in the largest mix-ups, in clustered order."""
    part = _own_singles(report, encoder)
    first = part["top10"].str.split("|").str[0]
    full = pd.crosstab(part["condition"], first, normalize="index")
    names = sorted(set(full.index) | set(full.columns))
    full = full.reindex(index=names, columns=names, fill_value=0.0)
    mixed = full.to_numpy(copy=True)  # of which the diagonal does not count
    np.fill_diagonal(mixed, 0.0)
    largest = np.unravel_index(np.argsort(mixed, axis=None)[::-1], mixed.shape)
    chosen = sorted(names[i] for i in pd.unique(np.column_stack(largest).ravel())[:n])
    alike = full.loc[chosen, chosen].to_numpy()
    if len(chosen) > 2:  # conditions that are taken for one another side by side
        apart = 1 - (alike + alike.T) / 2
        order = leaves_list(linkage(squareform(apart, checks=False), "average", optimal_ordering=True))
        chosen = [chosen[i] for i in order]
    return full.loc[chosen, chosen]


def gains(report: Report, one: str, other: str) -> pd.DataFrame:
    """What one method hits more than another in each condition, on the same query cells at the read-out of their
    verdict.

    Returns
    -------
    pandas.DataFrame
        condition, n_cells, `other` and `one` (exact_hit@1 over cells and repeats), gain with ci_low and ci_high (normal
        approximation over the condition's cells: one condition alone, nothing is adjusted for looking at many); empty
        where the two have no read-out in common. Largest gain first.
    """
    hits = [part.groupby("query_id")["exact_hit@1"].mean() for part in _at_common(report, one, other)]
    columns = ["condition", "n_cells", "other", "one", "gain", "ci_low", "ci_high"]
    if not hits:
        return pd.DataFrame(columns=columns)
    conditions = (
        _at_common(report, one, other)[0].drop_duplicates("query_id").set_index("query_id")["condition"]
    )
    table = pd.DataFrame({"one": hits[0], "other": hits[1], "condition": conditions})
    table["gain"] = table["one"] - table["other"]
    grouped = table.groupby("condition")
    found = grouped[["other", "one", "gain"]].mean().assign(n_cells=grouped.size())
    error = 1.959964 * grouped["gain"].std() / np.sqrt(found["n_cells"])
    found = found.assign(ci_low=found["gain"] - error, ci_high=found["gain"] + error).reset_index()
    return found.sort_values(["gain", "condition"], ascending=[False, True])[columns].reset_index(drop=True)


def changed_confusions(report: Report, one: str, other: str, n: int = 12) -> pd.DataFrame:
    """The `n` confusions that differ most between two methods, at the read-out of their verdict.

    Returns
    -------
    pandas.DataFrame
        condition, `ranked first` in its place, relation (whether the two share a target), `other` and `one`: shares
        of the condition's cells so confused; change.
    """
    shares = []
    for part in _at_common(report, one, other):
        first = part["top10"].str.split("|").str[0].rename("ranked first")
        shares.append(pd.crosstab(part["condition"], first, normalize="index").stack().rename("share"))
    if not shares:
        return pd.DataFrame(columns=["condition", "ranked first", "relation", "other", "one", "change"])
    table = pd.concat(shares, axis=1, keys=["one", "other"]).fillna(0.0).reset_index()
    table["change"] = table["one"] - table["other"]
    table["size"] = table["change"].abs()
    table = table[(table["condition"] != table["ranked first"]) & (table["size"] > 0)]
    order = ["size", "condition", "ranked first"]
    table = table.sort_values(order, ascending=[False, True, True]).head(n)
    pairs = zip(table["condition"], table["ranked first"], strict=True)
    shared = [bool(set(targets(true)) & set(targets(found))) for true, found in pairs]
    table["relation"] = np.where(shared, "shares a target", "")
    return table[["condition", "ranked first", "relation", "other", "one", "change"]].reset_index(drop=True)


def _at_common(report: Report, one: str, other: str) -> list[pd.DataFrame]:
    """Single cells of two methods at the read-out that they are compared at; empty without one."""
    available = report.readouts.query("mask == @LEAK_FREE").set_index("encoder")["available"]
    shared = common_readout(available[one], available[other])
    if shared is None:
        return []
    scores = report.scores.query("mask == @LEAK_FREE and query_size == 1")
    at = (scores["scoring"] == shared[0]) & (scores["library"] == shared[1])
    return [scores[at & (scores["encoder"] == name)] for name in (one, other)]


def _own_singles(report: Report, encoder: str) -> pd.DataFrame:
    scores = report.scores
    chosen = scores["primary"] & (scores["encoder"] == encoder) & (scores["mask"] == LEAK_FREE)
    return scores[chosen & (scores["query_size"] == 1)]
