"""Which read-out stands for a method, how sure that choice is, and at which one two methods are compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .composition import COMPOSITIONS

# In order of preference among read-outs that validation cells do not tell apart: the simpler first. A method's own
# classifier needs nothing beside the method; whitening needs a covariance.
SCORING_PREFERENCE = ("classifier", "cosine", "whitened", "classifier_corrected")
LIBRARIES = ("none", "mean", "bootstrap", "raw_cell", *COMPOSITIONS)
POOLING_PREFERENCE = ("scores", "embeddings", "expression")
# Shown beside the others, and never the read-out that stands for a method: it answers another question (all
# conditions equally likely).
VARIANT = "classifier_corrected"
# Two methods are compared at the first of these that both have. Fixed here, before any score is seen.
FIXED = (("classifier", "none"), *(("whitened", library) for library in LIBRARIES[1:]))
_METRIC = "exact_hit@1"


@dataclass(frozen=True)
class Choice:
    """The read-out that stands for a method.

    Attributes
    ----------
    scoring, library : str
    validation : float
        Its exact_hit@1 on the validation cells of all seeds.
    best : float
        That of the best read-out, by which methods are chosen.
    n_readouts : int
        Among how many it was chosen.
    stability : float
        How often the same one is chosen when conditions are resampled, 0 to 1.
    """

    scoring: str
    library: str
    validation: float
    best: float
    n_readouts: int
    stability: float


def read_validation(directory: Path, libraries=LIBRARIES, candidates: str = "") -> pd.DataFrame:
    """Hits of one run's validation cells, by the read-outs that may stand for a method.

    Parameters
    ----------
    directory : pathlib.Path
        Of a run that was fitted.
    libraries : sequence of str
        Those that the run was evaluated with.
    candidates : str
        The candidate set; by default the first of the run's track.
    """
    table = pd.read_parquet(
        Path(directory) / "validation_scores.parquet",
        columns=["query_id", "condition", "library", "scoring", "candidates", _METRIC],
    )
    table = table[table["candidates"] == (candidates or table["candidates"].iloc[0])]
    table = table.drop(columns="candidates")
    return table[table["library"].isin(["none", *libraries, *COMPOSITIONS]) & (table["scoring"] != VARIANT)]


def choose_readout(
    validation: pd.DataFrame, *, n_errors: float = 1.0, n_resamples: int = 1000, seed: int = 0
) -> Choice:
    """The simplest read-out that is within one standard error of the best on validation cells.

    The standard error is that of the paired difference to the best, with the condition as the unit (Breiman et al.
    1984, "Classification and regression trees", section 3.4.3, with the error of the difference in place of that of
    one estimate). Simplest: first in the order of `SCORING_PREFERENCE`, then of `LIBRARIES`.

    Parameters
    ----------
    validation : pandas.DataFrame
        From `read_validation`, of one seed or of several put together.
    n_errors : float
        Differences of up to this many standard errors do not count; 0: always the best.
    n_resamples : int
        How often conditions are drawn anew, with all their cells in all seeds, for the stability.
    seed : int

    Examples
    --------
    >>> hits = {("cosine", "mean"): [1, 0, 1, 0], ("whitened", "mean"): [1, 1, 1, 1]}
    >>> validation = pd.concat(
    ...     pd.DataFrame({"condition": ["A", "A", "B", "B"], "scoring": s, "library": b, "exact_hit@1": hit})
    ...     for (s, b), hit in hits.items()
    ... )
    >>> choice = choose_readout(validation)
    >>> choice.scoring, choice.library, choice.validation, choice.stability
    ('whitened', 'mean', 1.0, 1.0)
    """
    order = [(s, b) for s in SCORING_PREFERENCE for b in LIBRARIES]
    sums, cells = _by_condition(validation, ["scoring", "library"], order)
    hits, groups = sums.to_numpy(float), len(cells)
    (own,) = _simplest(hits, cells, np.ones((1, groups)), n_errors)
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=n_resamples)
    again = _simplest(hits, cells, drawn.astype(float), n_errors)
    means = hits.sum(axis=0) / cells.sum()
    return Choice(
        *sums.columns[own], float(means[own]), float(means.max()), len(means), float((again == own).mean())
    )


def choose_pooling(pools: pd.DataFrame) -> str:
    """How cells of one query are put together: the first of `POOLING_PREFERENCE` within one standard error of the best.

    The rule of `choose_readout`, on validation pools of one size.

    Parameters
    ----------
    pools : pandas.DataFrame
        condition, pooling, exact_hit@1 of every pool in every pooling.
    """
    sums, cells = _by_condition(pools, ["pooling"], POOLING_PREFERENCE)
    (own,) = _simplest(sums.to_numpy(float), cells, np.ones((1, len(cells))), 1.0)
    return sums.columns[own]


def primary_readout(directory: Path, libraries=LIBRARIES) -> tuple[str, str]:
    """Library and scoring that stand for one run, chosen on its own validation cells."""
    choice = choose_readout(read_validation(directory, libraries), n_resamples=1)
    return choice.library, choice.scoring


def common_readout(one: set, other: set) -> tuple[str, str] | None:
    """Scoring and library at which two methods are compared: the first of `FIXED` that both have."""
    return next((readout for readout in FIXED if readout in one and readout in other), None)


def readout_name(scoring: str, library: str) -> str:
    """`classifier`, or scoring and library: `whitened, mean`."""
    return scoring if library == "none" else f"{scoring}, {library}"


def _by_condition(hits: pd.DataFrame, columns: list[str], order) -> tuple[pd.DataFrame, np.ndarray]:
    """Sums of hits by condition and what was tried, in order of preference, and the queries of each condition (G,)."""
    sums = hits.pivot_table(index="condition", columns=columns, values=_METRIC, aggfunc="sum", observed=True)
    sums = sums[[each for each in order if each in sums.columns]]
    sizes = hits.groupby("condition", observed=True).size() / sums.shape[1]
    return sums, sizes.loc[sums.index].to_numpy(float)


def _simplest(hits: np.ndarray, cells: np.ndarray, weights: np.ndarray, n_errors: float) -> np.ndarray:
    """Column of `hits` (G, K) chosen in each resample; `weights` (B, G) say how often a condition was drawn."""
    total, groups = weights @ cells, len(cells)
    # Rounded, so that sums of hits in another order are equal.
    best = (weights @ hits).round(9).argmax(axis=1)
    chosen = np.empty(len(weights), int)
    for leader in np.unique(best):
        rows = best == leader
        w, n = weights[rows], total[rows, None]
        behind = hits[:, [leader]] - hits
        gap = w @ behind / n
        squares = w @ behind**2 - 2 * gap * (w @ (behind * cells[:, None])) + gap**2 * (w @ cells**2)[:, None]
        error = np.sqrt(np.maximum(squares, 0) * groups / max(groups - 1, 1)) / n
        chosen[rows] = (gap <= n_errors * error * (groups > 1) + 1e-9).argmax(axis=1)
    return chosen
