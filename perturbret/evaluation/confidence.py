"""How far a single answer can be trusted: probabilities, abstention, candidate sets, conditions not in the library.

All that is chosen is chosen on validation cells and held by a `Calibration`; query cells show what comes of it.
Definitions and sources: docs/method.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import rankdata

from ..data.prepared import Prepared
from .metrics import coverage_accuracy, coverage_area, rank_top
from .scoring import candidate_names, score_queries
from .stats import cluster_bootstrap
from .validation import can_choose

COVERAGE = 0.9
ACCURACIES = (0.5, 0.8)
N_BINS = 10
# Of a threshold: fewer validation cells reach any accuracy by luck.
MIN_ANSWERED = 20
_LOG_TEMPERATURES = (-10.0, 10.0)
# A probability of 0 counts as this in log losses.
_SMALLEST = np.finfo(np.float64).eps
_COLUMNS = ["quantity", "estimate", "ci_low", "ci_high", "n"]


@dataclass(frozen=True, eq=False)
class Answers:
    """How single cells of one role are answered at one read-out.

    Attributes
    ----------
    scores : ndarray of float, shape (q, c)
    candidates : ndarray of str, shape (c,)
    conditions : ndarray of str, shape (q,)
        True condition of each cell; it need not be among the candidates.
    """

    scores: np.ndarray
    candidates: np.ndarray
    conditions: np.ndarray

    @cached_property
    def own(self) -> np.ndarray:
        """Whether a candidate is the cell's own condition, bool (q, c)."""
        return self.conditions[:, None] == self.candidates

    @cached_property
    def hit(self) -> np.ndarray:
        """exact_hit@1 of each cell, ties in expectation, (q,)."""
        return (rank_top(self.scores) * self.own).sum(axis=1)


@dataclass(frozen=True)
class Calibration:
    """What was chosen on validation cells.

    Attributes
    ----------
    temperature : float
        Scores are divided by it before the softmax.
    thresholds : dict of float to float
        Accuracy -> the probability of the first-ranked condition from which on a cell is answered; infinite where no
        threshold reached that accuracy.
    quantiles : dict of str to float
        Name in `NONCONFORMITY` -> the largest nonconformity that a candidate set admits.
    n_cells : int
        Validation cells behind these.
    """

    temperature: float
    thresholds: dict[float, float]
    quantiles: dict[str, float]
    n_cells: int

    def probabilities(self, scores: np.ndarray) -> np.ndarray:
        """Calibrated probability of each candidate, (q, c), rows summing to 1."""
        return softmax(scores / self.temperature, axis=1)

    def sets(self, scores: np.ndarray, kind: str) -> np.ndarray:
        """Whether each candidate is in the cell's conformal set, bool (q, c)."""
        return NONCONFORMITY[kind](self.probabilities(scores)) <= self.quantiles[kind]


@dataclass(frozen=True)
class Confidence:
    """Of one encoder at one read-out.

    Attributes
    ----------
    calibration : Calibration or None
        None where no validation cell has its condition among the candidates: there is nothing to calibrate by, and the
        tables have no rows.
    table : pandas.DataFrame
        One row per quantity of docs/method.md, section Confidence: `quantity`, `estimate`, `ci_low`, `ci_high` (95%,
        conditions resampled), `n` cells.
    reliability : pandas.DataFrame
        One row per `stage` (`uncalibrated`, `calibrated`) and bin of equally many cells: mean `probability` of the
        first-ranked condition, `accuracy` with `ci_low` and `ci_high`, `n` cells.
    probability : ndarray of float, shape (q,)
        Calibrated probability of the first-ranked condition of each query cell, NaN without a calibration.
    """

    calibration: Calibration | None
    table: pd.DataFrame
    reliability: pd.DataFrame
    probability: np.ndarray


def judge_confidence(
    encoder, prepared: Prepared, *, library: str, scoring: str, n_resamples: int = 1000, seed: int = 0
) -> Confidence:
    """Calibrate a read-out on validation cells and say what that is worth on query cells.

    Parameters
    ----------
    encoder : Encoder
    prepared : Prepared
        Cells with the mask, split and genes that the encoder was fitted with.
    library, scoring : str
        The read-out, as in `perturbret.evaluation.judge.evaluate`.
    n_resamples : int
        Of conditions, behind intervals.
    seed : int
        Of the bootstrap library, of resamples and of other draws.
    """
    query = ask(encoder, prepared, "query", library=library, scoring=scoring, seed=seed)
    if not can_choose(prepared):
        nothing, none = np.full(len(query.scores), np.nan), pd.DataFrame(columns=_COLUMNS)
        return Confidence(
            None, none, pd.DataFrame(columns=["stage", "probability", "accuracy", *_COLUMNS[2:]]), nothing
        )
    calibration = calibrate(ask(encoder, prepared, "val", library=library, scoring=scoring, seed=seed))
    options = {"n_resamples": n_resamples, "seed": seed}
    rows = [("temperature", calibration.temperature, np.nan, np.nan, calibration.n_cells)]
    rows += [
        (f"threshold@{asked:g}", found if np.isfinite(found) else np.nan, np.nan, np.nan, calibration.n_cells)
        for asked, found in calibration.thresholds.items()
    ]
    rows += on_queries(calibration, query, **options)
    rows += tell_unknown(calibration, query, prepared.candidates, **options)
    top = calibration.probabilities(query.scores).max(axis=1)
    return Confidence(
        calibration, pd.DataFrame(rows, columns=_COLUMNS), reliability(calibration, query, **options), top
    )


def ask(encoder, prepared: Prepared, role: str, *, library: str, scoring: str, seed: int) -> Answers:
    """Scores of the single cells of a role at one read-out, among the candidates that the track is read under."""
    (scored,) = score_queries(
        encoder,
        prepared,
        role=role,
        libraries=("mean" if library == "none" else library,),
        query_sizes=(1,),
        poolings=("scores",),
        scorings=(scoring,),
        candidates=prepared.candidate_sets[0],
        seed=seed,
    )
    names = np.array(candidate_names(prepared, prepared.candidate_sets[0], role))
    return Answers(scored.scores, names, np.asarray(scored.queries.conditions, str))


def calibrate(
    answers: Answers, *, coverage: float = COVERAGE, accuracies: Sequence[float] = ACCURACIES
) -> Calibration:
    """Choose temperature, thresholds and conformal quantiles on the answers to validation cells.

    Parameters
    ----------
    answers : Answers
    coverage : float
        Share of cells whose conformal set is to hold the true condition.
    accuracies : sequence of float
        Shares of answered cells that are to be right, one threshold each.

    Raises
    ------
    ValueError
        No cell has its condition among the candidates, or `coverage` is not between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage: expected a share between 0 and 1, got {coverage}")
    rows, columns = np.nonzero(answers.own)
    if not len(rows):
        raise ValueError("answers: expected a cell whose condition is among the candidates, there is none")
    known, place = answers.scores[rows], (np.arange(len(rows)), columns)

    def loss(log_temperature: float) -> float:
        found = log_softmax(known / np.exp(log_temperature), axis=1)[place]
        return -np.nan_to_num(found, neginf=np.log(_SMALLEST)).mean()

    found = minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    probability = softmax(answers.scores / temperature, axis=1)
    quantiles = {
        kind: conformal_quantile(np.where(answers.own, of(probability), np.inf).min(axis=1), coverage)
        for kind, of in NONCONFORMITY.items()
    }
    top = probability.max(axis=1)
    thresholds = {asked: answer_threshold(top, answers.hit, asked) for asked in accuracies}
    return Calibration(temperature, thresholds, quantiles, len(answers.scores))


def conformal_quantile(nonconformity: np.ndarray, coverage: float) -> float:
    """The ceil((n + 1) coverage)-th smallest of n values; infinite where that is more than n.

    Of one more exchangeable value, at least the share `coverage` lies at or below it (Papadopoulos et al. 2002).
    """
    rank = int(np.ceil((len(nonconformity) + 1) * coverage - 1e-9))
    return float(np.sort(nonconformity)[rank - 1]) if rank <= len(nonconformity) else np.inf


def _least_ambiguous(probability: np.ndarray) -> np.ndarray:
    """1 - p of each candidate (Sadinle, Lei & Wasserman 2019)."""
    return 1 - probability


def _adaptive(probability: np.ndarray) -> np.ndarray:
    """Sum of p over all candidates that are at least as probable (Romano, Sesia & Candès 2020, not randomised)."""
    order = np.argsort(-probability, axis=1)
    descending = np.take_along_axis(probability, order, axis=1)
    # Tied candidates all have the sum up to the last of them.
    last = np.full(order.shape, order.shape[1] - 1)
    last[:, :-1] = np.where(
        descending[:, 1:] != descending[:, :-1], np.arange(order.shape[1] - 1), last[:, :-1]
    )
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    sums = np.empty_like(probability)
    np.put_along_axis(sums, order, np.take_along_axis(np.cumsum(descending, axis=1), last, axis=1), axis=1)
    return sums.round(12)


NONCONFORMITY: dict[str, Callable[[np.ndarray], np.ndarray]] = {"lac": _least_ambiguous, "aps": _adaptive}


def answer_threshold(confidence: np.ndarray, hit: np.ndarray, accuracy: float) -> float:
    """The smallest confidence from which on the cells answered reach an accuracy.

    Infinite where no threshold that `MIN_ANSWERED` cells pass reaches it.
    """
    curve = coverage_accuracy(confidence, hit)["accuracy"].to_numpy()
    ordered = np.sort(confidence)[::-1]
    whole = np.append(ordered[1:] != ordered[:-1], True)  # equals are answered together
    reached = np.flatnonzero(
        whole & (curve >= accuracy - 1e-9) & (np.arange(1, len(curve) + 1) >= MIN_ANSWERED)
    )
    return float(ordered[reached[-1]]) if len(reached) else np.inf


def mass_bins(probability: np.ndarray, n_bins: int = N_BINS) -> np.ndarray:
    """Bin of each cell, int (q,): equally many cells in each, but for equal probabilities, which share a bin."""
    last = (
        -(-np.arange(1, n_bins) * len(probability) // n_bins) - 1
    )  # of each bin but the uppermost, in order
    return np.searchsorted(np.sort(probability)[last], probability)


def expected_calibration_error(probability: np.ndarray, hit: np.ndarray) -> float:
    """Mean over cells of |mean probability - accuracy| of the cell's bin of `mass_bins`."""
    return float(np.abs(np.bincount(mass_bins(probability), probability - hit)).sum() / len(hit))


def on_queries(calibration: Calibration, answers: Answers, *, n_resamples: int, seed: int) -> list[tuple]:
    """Rows of `Confidence.table` on calibration, abstention and candidate sets."""
    scores, own, hit, conditions = answers.scores, answers.own, answers.hit, answers.conditions
    options = {"n_resamples": n_resamples, "seed": seed}
    stages = {"_uncalibrated": softmax(scores, axis=1), "": calibration.probabilities(scores)}
    top = stages[""].max(axis=1)
    # Quantities that are means over cells, with the smallest and largest value of one cell.
    means = {"accuracy": (hit, 0, 1), "overconfidence": (top - hit, -1, 1)}
    for stage, probability in stages.items():
        own_probability = (probability * own).sum(axis=1)
        loss = -np.log(np.maximum(own_probability, _SMALLEST))
        squares = (probability**2).sum(axis=1) - 2 * own_probability + 1
        means |= {f"log_loss{stage}": (loss, 0, np.inf), f"brier{stage}": (squares.clip(0, 2), 0, 2)}
    for kind in NONCONFORMITY:
        sets = calibration.sets(scores, kind)
        means[f"conformal_{kind}_coverage"] = ((sets & own).any(axis=1), 0, 1)
        means[f"conformal_{kind}_size"] = (sets.sum(axis=1), 0, scores.shape[1])
    answered = {asked: top >= threshold for asked, threshold in calibration.thresholds.items()}
    means |= {f"answered@{asked:g}": (cells, 0, 1) for asked, cells in answered.items()}
    values, lowest, highest = zip(*means.values(), strict=True)
    found = cluster_bootstrap(np.column_stack(values), conditions, bounds=(lowest, highest), **options)
    rows = list(zip(means, found.estimate, found.low, found.high, [len(hit)] * len(means), strict=True))
    for asked, cells in answered.items():
        if cells.any():
            right = cluster_bootstrap(hit[cells], conditions[cells], bounds=(0, 1), **options)
            rows.append((f"accuracy@{asked:g}", *_only(right), int(cells.sum())))
    statistics = {
        **{
            f"ece{stage}": (expected_calibration_error, probability.max(axis=1))
            for stage, probability in stages.items()
        },
        "coverage_area": (coverage_area, top),
        "coverage_area_margin": (coverage_area, _margin(scores)),
    }
    for name, (statistic, confidence) in statistics.items():
        found = _without_each(statistic, (confidence, hit), conditions, **options)
        rows.append((name, *found, len(hit)))
    return [*rows, ("ece_if_calibrated", *_error_by_luck(top, seed), len(hit))]


def tell_unknown(
    calibration: Calibration, answers: Answers, trained: Sequence[str], *, n_resamples: int, seed: int
) -> list[tuple]:
    """AUROC by which confidence tells a cell whose condition is in the library from one whose condition is not.

    Of cells whose condition was held out and has prototypes, each ranked twice: among the conditions of training,
    where no answer can be right, and with its own condition in the place of one of these, drawn at random, so that both
    rankings are as long. Rows `unknown_auroc_probability`, `_margin` and `_score` (the best score itself); none
    where no condition was held out.
    """
    known = np.isin(answers.candidates, list(trained))
    cells = np.flatnonzero((answers.own & ~known).any(axis=1))
    if not len(cells) or known.sum() < 2:
        return []
    without = answers.scores[np.ix_(cells, np.flatnonzero(known))]
    among = without.copy()
    replaced = np.random.default_rng(seed).integers(among.shape[1], size=len(cells))
    among[np.arange(len(cells)), replaced] = answers.scores[cells, answers.own[cells].argmax(axis=1)]
    signals = {
        "probability": lambda scores: calibration.probabilities(scores).max(axis=1),
        "margin": _margin,
        "score": lambda scores: scores.max(axis=1),
    }
    rows = []
    for name, signal in signals.items():
        pair = (signal(among), signal(without))
        found = _without_each(auroc, pair, answers.conditions[cells], n_resamples=n_resamples, seed=seed)
        rows.append((f"unknown_auroc_{name}", *found, len(cells)))
    return rows


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive value exceeds a negative one, half for equals (Mann & Whitney 1947)."""
    n, m = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def reliability(calibration: Calibration, answers: Answers, *, n_resamples: int, seed: int) -> pd.DataFrame:
    """`Confidence.reliability`: accuracy against probability, before and after calibration."""
    hit, conditions, rows = answers.hit, answers.conditions, []
    stages = {"uncalibrated": softmax(answers.scores, axis=1)}
    stages["calibrated"] = calibration.probabilities(answers.scores)
    for stage, probability in stages.items():
        top = probability.max(axis=1)
        bins = mass_bins(top)
        for cells in (bins == each for each in np.unique(bins)):
            right = cluster_bootstrap(
                hit[cells], conditions[cells], bounds=(0, 1), n_resamples=n_resamples, seed=seed
            )
            rows.append((stage, top[cells].mean(), *_only(right), int(cells.sum())))
    return pd.DataFrame(rows, columns=["stage", "probability", "accuracy", *_COLUMNS[2:]])


def _margin(scores: np.ndarray) -> np.ndarray:
    """Best score minus the second best, (q,)."""
    return np.diff(np.partition(scores, -2, axis=1)[:, -2:])[:, 0]


def _only(found) -> tuple[float, float, float]:
    return found.estimate[0], found.low[0], found.high[0]


def _without_each(
    statistic: Callable, values: tuple, conditions: np.ndarray, *, n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """A statistic from 0 to 1 that is no mean over cells, with its interval.

    Its pseudo-values, one per condition that is left out (Tukey 1958), are resampled as means of conditions are.
    """
    names, codes = np.unique(conditions, return_inverse=True)
    whole = statistic(*values)
    if len(names) < 2:
        return whole, np.nan, np.nan
    without = np.array([statistic(*(x[codes != i] for x in values)) for i in range(len(names))])
    pseudo = whole + (len(names) - 1) * (without.mean() - without)
    found = cluster_bootstrap(pseudo, names, n_resamples=n_resamples, seed=seed)
    return whole, max(found.low[0], 0.0), min(found.high[0], 1.0)


def _error_by_luck(probability: np.ndarray, seed: int, n_draws: int = 200) -> tuple[float, float, float]:
    """Mean and 95% range of the ECE of a perfectly calibrated method on as many independent cells."""
    rng, bins, n = np.random.default_rng(seed), mass_bins(probability), len(probability)
    drawn = [
        np.abs(np.bincount(bins, probability - (rng.random(n) < probability))).sum() / n
        for _ in range(n_draws)
    ]
    return float(np.mean(drawn)), *map(float, np.quantile(drawn, [0.025, 0.975]))
