"""How well scores rank the conditions that caused a query: one row of metrics per query, ties in expectation.

A metric of tied scores is its mean over all orders of the tied candidates, in closed form
(McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the presence of
tied scores", ECIR). An encoder that gives every candidate the same score gets exactly the chance level.
Definitions with formulas: docs/method.md.

A new metric is one function of a `Ranking` under `@metric(...)`, here or in a file that is imported or named in the
variable PERTURBRET_PLUGINS (`perturbret.files.plugins`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ..data.conditions import targets
from ..files.plugins import load_plugins

KS = (1, 5, 8, 10)
# Scores tie when they are equal after rounding, to a grid coarser than the noise of arithmetic in that
# precision. A tolerance would not do: "closer than" is not transitive.
DECIMALS = {np.dtype(np.float64): 9, np.dtype(np.float32): 6}
# Scores held at a time, so that sorting 100,000 queries needs no more memory than sorting a few thousand.
_CHUNK = 1_000_000


def relevance(true: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Relevance of every candidate for every query: 2 same condition, 1 shares a target gene, 0 neither.

    Parameters
    ----------
    true : sequence of str, length q
        Canonical condition of each query.
    candidates : sequence of str, length c
        Canonical conditions that are ranked, each once (else ValueError).

    Returns
    -------
    ndarray of int8, shape (q, c)
    """
    true, candidates = np.asarray(true, str), np.asarray(candidates, str)
    repeated = [name for name, n in Counter(candidates).items() if n > 1]
    if repeated:
        raise ValueError(f"candidates: expected unique conditions, got {str(repeated[0])!r} more than once")
    names = np.union1d(true, candidates)
    pairs = pd.DataFrame(
        [(i, gene) for i, name in enumerate(names) for gene in targets(name)], columns=["row", "gene"]
    )
    genes = pd.factorize(pairs["gene"])[0]
    shape = (len(names), genes.max(initial=0) + 1)
    incidence = csr_matrix((np.ones(len(pairs)), (pairs["row"].to_numpy(int), genes)), shape=shape)
    levels = (incidence @ incidence.T > 0).toarray().astype(np.int8)
    np.fill_diagonal(levels, 2)
    return levels[np.ix_(np.searchsorted(names, true), np.searchsorted(names, candidates))]


class Ranking:
    """Rankings of some queries, ties left open: what metrics are computed from.

    Each relevant candidate of a query is one entry, ordered by query and then by rank. The rank of an entry is uniform
    on `start` + 1 … `end`: `start` candidates score higher, and `end` - `start` the same, itself included.

    Attributes
    ----------
    scores, relevance : ndarray, shape (q, c)
        As given to `per_query`, scores rounded.
    row : ndarray of int, shape (entries,)
        Query of each entry.
    start, end, level : ndarray of int, shape (entries,)
        Its ranks, see above, and its relevance (1 or 2).
    above, tied : ndarray of int, shape (entries,)
        Relevant candidates among those that score higher, and among those that score the same (itself included).
    ranks : ndarray of float, shape (c,)
        1, 2, … c.

    Examples
    --------
    >>> ranking = Ranking(np.array([[0.9, 0.5, 0.5]]), np.array([[0, 2, 0]]))
    >>> ranking.start.tolist(), ranking.end.tolist()
    ([1], [3])
    >>> ranking.mean(1 / ranking.ranks).round(3).tolist()
    [0.417]
    """

    def __init__(self, scores: np.ndarray, relevance: np.ndarray):
        self.scores, self.relevance = scores, relevance
        n, c = scores.shape
        order = np.argsort(-scores, axis=1)
        scores, relevance = (np.take_along_axis(part, order, axis=1) for part in (scores, relevance))
        steps = scores[:, 1:] != scores[:, :-1]
        start, end = np.zeros((n, c), np.int32), np.full((n, c), c, np.int32)
        start[:, 1:] = np.where(steps, np.arange(1, c), 0)
        end[:, :-1] = np.where(steps, np.arange(1, c), c)
        start = np.maximum.accumulate(start, axis=1)
        end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
        found = np.zeros((n, c + 1), np.int32)
        np.cumsum(relevance > 0, axis=1, out=found[:, 1:])
        self.row, position = np.nonzero(relevance)
        self.start, self.end = start[self.row, position], end[self.row, position]
        self.level = relevance[self.row, position]
        self.above = found[self.row, self.start]
        self.tied = found[self.row, self.end] - self.above
        self.ranks = np.arange(1.0, c + 1)

    @cached_property
    def n_relevant(self) -> np.ndarray:
        """Candidates of relevance 1 or 2 of each query, int (q,)."""
        return np.bincount(self.row, minlength=len(self.scores))

    @cached_property
    def n_exact(self) -> np.ndarray:
        """1 where the query's condition is among the candidates, else 0, int (q,)."""
        return np.bincount(self.row[self.level == 2], minlength=len(self.scores))

    def mean(self, values: np.ndarray, k: int | None = None) -> np.ndarray:
        """Mean of a function of the rank over the ranks that each entry may take, (entries,).

        `values` (c,) are those at ranks 1 … c, for example `1 / ranks`; beyond rank `k` they count as 0.
        """
        sums, k = _sums(values), len(values) if k is None else k
        return (sums[np.minimum(self.end, k)] - sums[np.minimum(self.start, k)]) / (self.end - self.start)

    def of_exact(self, values: np.ndarray, absent: float = 0.0) -> np.ndarray:
        """Of values (entries,) those of the candidates of relevance 2, (q,); `absent` for a query without one."""
        exact, column = self.level == 2, np.full(len(self.scores), float(absent))
        column[self.row[exact]] = values[exact]
        return column

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sums over the entries of each query of values (entries,), (q,)."""
        return np.bincount(self.row, values, minlength=len(self.scores))


@dataclass(frozen=True)
class Metric:
    """A registered metric; the parameters of `metric` say what its attributes mean."""

    name: str
    of: Callable[..., np.ndarray]
    better: str
    bounds: tuple[float, float | None] | None
    cutoffs: bool
    compared: bool | Sequence[int]
    tabled: bool | Sequence[int]
    controlled: bool
    chance: Callable[..., np.ndarray] | None

    @property
    def summarised(self) -> bool:
        """Whether means of it mean anything: it has bounds."""
        return self.bounds is not None

    def columns(self, ks: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Column name -> further arguments of `of`: one column, or one for each cut-off."""
        return {f"{self.name}@{k}": (k,) for k in ks} if self.cutoffs else {self.name: ()}

    def limits(self, n_candidates: int) -> tuple[float, float]:
        """`bounds` in numbers."""
        low, high = self.bounds
        return float(low), float(n_candidates if high is None else high)


METRICS: dict[str, Metric] = {}
# A table of scores begins with these; all others follow in the order of `METRICS`.
_LEADING = ("rank", "mrr", "mrr@10")


def metric(
    name: str,
    *,
    better: str = "higher",
    bounds: tuple[float, float | None] | None = (0, 1),
    cutoffs: bool = False,
    compared: bool | Sequence[int] = True,
    tabled: bool | Sequence[int] = True,
    controlled: bool = False,
    chance: Callable[..., np.ndarray] | None = None,
) -> Callable:
    """Register the decorated function as a metric: a column of `per_query`, and of all that is made of it.

    The function takes a `Ranking`, and a cut-off k where `cutoffs`, and returns a number for each query, (q,): the mean
    over all orders of tied candidates. Its docstring says what it measures.

    Parameters
    ----------
    name : str
        Of the column; `name@k` for each k of `KS` with `cutoffs`.
    better : {"higher", "lower"}
    bounds : pair, optional
        Smallest and largest value; None as the largest: the number of candidates. None as a whole: the unit depends on
        the scoring, and the metric has no place in a summary.
    cutoffs : bool
    compared, tabled : bool or sequence of int
        Whether, or at which cut-offs, the report compares methods by it and shows it in the table of metrics.
    controlled : bool
        Whether the null control tests it, beside exact_hit@1.
    chance : callable, optional
        The same function of a `Ranking` for a ranking drawn at random. By default the metric itself of equal scores.

    Raises
    ------
    ValueError
        The name is taken, `better` is another word, or the function has no docstring.

    Examples
    --------
    >>> @metric("top_half")
    ... def top_half(ranking):
    ...     "Whether the query's own condition is in the upper half."
    ...     return ranking.of_exact(ranking.mean(np.ones_like(ranking.ranks), len(ranking.ranks) // 2))
    >>> per_query(np.array([[0.1, 0.4, 0.3, 0.2]]), np.array([[0, 0, 2, 0]]))["top_half"].item()
    1.0
    """

    def register(of):
        if name in METRICS:
            raise ValueError(f"metric: {name!r} is registered already, by {METRICS[name].of.__module__}")
        if better not in ("higher", "lower"):
            raise ValueError(f"better: expected 'higher' or 'lower' for metric {name!r}, got {better!r}")
        if not of.__doc__:
            raise ValueError(f"metric: expected a docstring that says what {name!r} measures, got none")
        METRICS[name] = Metric(name, of, better, bounds, cutoffs, compared, tabled, controlled, chance)
        return of

    return register


def find_metric(column: str) -> Metric:
    """The metric behind a column, such as `exact_hit` behind `exact_hit@5`. KeyError where there is none."""
    load_plugins()
    return METRICS[column if column in METRICS else column.rpartition("@")[0]]


def metric_columns(use: str, ks: Sequence[int] = KS) -> list[str]:
    """Columns of the metrics for which `use` holds: `compared`, `tabled`, `controlled` or `summarised`."""
    load_plugins()
    found = []
    for each in METRICS.values():
        wanted = getattr(each, use)
        found += each.columns(ks if isinstance(wanted, bool) else wanted) if wanted else ()
    return found


def per_query(scores: np.ndarray, relevance: np.ndarray, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Metrics of every query, each the expectation over random tie breaking.

    Parameters
    ----------
    scores : ndarray of float, shape (q, c)
        Higher is more likely; infinities are allowed, NaN is not. Ties: equal after rounding, see `DECIMALS`.
    relevance : ndarray of int, shape (q, c)
        From `relevance`; at most one 2 in a row.
    ks : sequence of int
        Cut-offs, each at least 1.

    Returns
    -------
    DataFrame, q rows
        A column for each of `METRICS`, or for each of `ks` where it has cut-offs. What is not among the candidates is
        never found: its metrics are 0, and its rank is NaN.

    Raises
    ------
    ValueError
        Shapes differ, there are fewer than two candidates, a score is NaN, a relevance is not 0, 1 or 2, a
        row holds several 2, or a cut-off is below 1.

    Examples
    --------
    >>> levels = relevance(["KLF1"], ["BAK1", "BAK1+KLF1", "KLF1"])
    >>> levels.tolist()
    [[0, 1, 2]]
    >>> table = per_query(np.array([[0.2, 0.9, 0.2]]), levels, ks=(1, 2))
    >>> table[["rank", "mrr", "exact_hit@2", "relevant_hit@1"]].round(3).to_dict("records")
    [{'rank': 2.5, 'mrr': 0.417, 'exact_hit@2': 0.5, 'relevant_hit@1': 1.0}]
    """
    load_plugins()
    scores, relevance = _checked(scores), np.asarray(relevance)
    if relevance.shape != scores.shape:
        raise ValueError(f"relevance: expected the shape of scores {scores.shape}, got {relevance.shape}")
    if not np.isin(relevance, (0, 1, 2)).all():
        raise ValueError(f"relevance: expected 0, 1 or 2, got {np.setdiff1d(relevance, (0, 1, 2))[0]}")
    if ((relevance == 2).sum(axis=1) > 1).any():
        raise ValueError("relevance: expected at most one 2 in a row, got several; are candidates unique?")
    if min(ks, default=1) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, got {min(ks)}")
    step = max(1, _CHUNK // scores.shape[1])
    rows = [slice(start, start + step) for start in range(0, max(len(scores), 1), step)]
    rankings = [Ranking(_rounded(scores[at]), relevance[at]) for at in rows]
    return pd.concat([_table(ranking, ks) for ranking in rankings], ignore_index=True)


def chance(relevance: np.ndarray, ks: Sequence[int] = KS) -> pd.DataFrame:
    """`per_query` of a ranking drawn at random, computed exactly: what equal scores get.

    Examples
    --------
    >>> levels = relevance(["KLF1"], ["BAK1", "BAK1+KLF1", "CEBPA", "KLF1"])
    >>> chance(levels)[["rank", "exact_hit@1", "relevant_hit@1"]].to_dict("records")
    [{'rank': 2.5, 'exact_hit@1': 0.25, 'relevant_hit@1': 0.5}]
    """
    table = per_query(np.zeros(np.shape(relevance)), relevance, ks)
    own = [each for each in METRICS.values() if each.chance]
    if own:
        ranking = Ranking(np.zeros(np.shape(relevance)), np.asarray(relevance))
        for each in own:
            for name, cutoff in each.columns(ks).items():
                table[name] = each.chance(ranking, *cutoff)
    return table


def metric_by_label(column: str, scores: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """What every query gets by one metric, were its condition another: float64 (q, l).

    `scores` (q, c) as in `per_query`, `relevance` (l, c) that of the candidates for each label.
    """
    used, scores = find_metric(column), _rounded(_checked(scores))
    cutoff = used.columns(KS)[column]
    every = (Ranking(scores, np.broadcast_to(levels, scores.shape)) for levels in relevance)
    return np.stack([used.of(ranking, *cutoff) for ranking in every], axis=1)


@metric("exact_hit", cutoffs=True, tabled=(1, 5))
def exact_hit(ranking: Ranking, k: int) -> np.ndarray:
    """Whether the query's own condition is among the first k."""
    return ranking.of_exact(ranking.mean(np.ones_like(ranking.ranks), k))


@metric("relevant_hit", cutoffs=True, compared=(1, 5, 10), tabled=(1,))
def relevant_hit(ranking: Ranking, k: int) -> np.ndarray:
    """Whether a condition that shares a target with the query's is among the first k.

    Only the best-scored relevant tie group decides: none stands above it. With e candidates in it, r of them
    relevant, and s of the first k ranks, all s go to irrelevant ones with probability C(e-r, s) / C(e, s).
    """
    rows, first = np.unique(ranking.row, return_index=True)
    start, tied = ranking.start[first], ranking.tied[first]
    size = ranking.end[first] - start
    slots = np.clip(k - start, 0, size)
    missed = np.ones(len(rows))
    for drawn in range(k):
        left = np.maximum(size - tied - drawn, 0) / np.maximum(size - drawn, 1)
        missed *= np.where(drawn < slots, left, 1.0)
    hit = np.zeros(len(ranking.scores))
    hit[rows] = 1.0 - missed
    return hit


@metric("rank", better="lower", bounds=(1, None), compared=False, tabled=False)
def rank(ranking: Ranking) -> np.ndarray:
    """Rank of the query's own condition, from 1; NaN where it is not among the candidates."""
    return ranking.of_exact((ranking.start + ranking.end + 1) / 2.0, absent=np.nan)


@metric("mrr")
def mrr(ranking: Ranking) -> np.ndarray:
    """1 / rank of the query's own condition."""
    return ranking.of_exact(ranking.mean(1 / ranking.ranks))


@metric("mrr@10")
def mrr_10(ranking: Ranking) -> np.ndarray:
    """1 / rank of the query's own condition, 0 beyond rank 10."""
    return ranking.of_exact(ranking.mean(1 / ranking.ranks, 10))


@metric("ndcg", cutoffs=True, compared=(5,), tabled=(5,))
def ndcg(ranking: Ranking, k: int) -> np.ndarray:
    """Gain 2**relevance - 1 with discount 1 / log2(rank + 1) over the first k, as a share of the largest possible."""
    discount = 1 / np.log2(ranking.ranks + 1)
    found = ranking.total((2.0**ranking.level - 1) * ranking.mean(discount, k))
    sums = _sums(discount)
    exact, relevant = (sums[np.minimum(n, k)] for n in (ranking.n_exact, ranking.n_relevant))
    ideal = 3.0 * exact
    ideal += relevant - exact
    return np.divide(found, ideal, out=np.zeros(len(found)), where=ideal > 0)


@metric("ndcg_binary", cutoffs=True, compared=(5,), tabled=False)
def ndcg_binary(ranking: Ranking, k: int) -> np.ndarray:
    """As `ndcg`, the query's own condition alone being relevant."""
    return ranking.of_exact(ranking.mean(1 / np.log2(ranking.ranks + 1), k))


@metric("ap")
def average_precision(ranking: Ranking) -> np.ndarray:
    """Mean over relevant conditions of the share of relevant ones up to their rank.

    At place i of a tie group of e candidates, r relevant, behind g candidates, R relevant, the candidate has
    R + 1 + (i - 1) (r - 1) / (e - 1) relevant ones up to itself in expectation. The mean over i = 1 … e of
    that divided by g + i is the expression below.
    """
    size = ranking.end - ranking.start
    others = (ranking.tied - 1) / np.maximum(size - 1, 1)
    harmonic = _sums(1 / ranking.ranks)
    inverse = harmonic[ranking.end] - harmonic[ranking.start]
    precision = ((ranking.above + 1 - others * (ranking.start + 1)) * inverse + others * size) / size
    return ranking.total(precision) / np.maximum(ranking.n_relevant, 1)


@metric("margin", bounds=None, compared=False, tabled=False)
def margin(ranking: Ranking) -> np.ndarray:
    """Best score minus the second best: how sure the ranking is of itself."""
    best = np.partition(ranking.scores, -2, axis=1)[:, -2:]
    return np.subtract(best[:, 1], best[:, 0], out=np.zeros(len(best)), where=best[:, 1] != best[:, 0])


def rank_top(scores: np.ndarray) -> np.ndarray:
    """Probability that each candidate is ranked first, shared equally among tied best scores.

    `scores` is (q, c) as in `per_query`; so is the result, float64, its rows summing to 1.
    """
    scores = _rounded(_checked(scores))
    first = scores == scores.max(axis=1, keepdims=True)
    return first / first.sum(axis=1, keepdims=True)


def top_conditions(scores: np.ndarray, candidates: Sequence[str], k: int = 10) -> np.ndarray:
    """Names of the `k` best candidates of each query, best first, for reading rather than for scoring.

    `scores` is (q, c), `candidates` has length c; the result is (q, min(k, c)). Tied candidates stand in the
    order of `candidates`. ValueError where lengths differ.
    """
    scores, candidates = _rounded(_checked(scores)), np.asarray(candidates, str)
    if len(candidates) != scores.shape[1]:
        raise ValueError(f"candidates: expected {scores.shape[1]} names, got {len(candidates)}")
    return candidates[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def coverage_accuracy(margin: np.ndarray, hit: np.ndarray) -> pd.DataFrame:
    """Accuracy over the most confident queries, for every number of queries answered.

    Parameters
    ----------
    margin : ndarray of float, shape (q,)
        Confidence: the queries with the largest margins are answered first. Queries with equal margins are
        answered in random order, and accuracy is the expectation over it.
    hit : ndarray of float, shape (q,)
        exact_hit@1 of each query. ValueError for no queries, a NaN, or arrays of unlike shapes.

    Returns
    -------
    DataFrame, q rows
        `coverage`, the fraction of queries answered (1/q, 2/q, … 1), and `accuracy`, the mean hit over them.
    """
    margin, hit = np.asarray(margin, np.float64), np.asarray(hit, np.float64)
    if margin.ndim != 1 or margin.shape != hit.shape or not len(margin) or np.isnan([margin, hit]).any():
        raise ValueError(
            f"margin, hit: expected numbers, one per query, got shapes {margin.shape} and {hit.shape}, "
            f"{np.isnan(margin).sum()} and {np.isnan(hit).sum()} NaN"
        )
    order = np.argsort(-margin, kind="stable")
    margin, hit = margin[order], hit[order]
    group = np.concatenate([[0], np.cumsum(margin[1:] != margin[:-1])])
    expected = (np.bincount(group, hit) / np.bincount(group))[group]
    answered = np.arange(1, len(hit) + 1)
    return pd.DataFrame({"coverage": answered / len(hit), "accuracy": np.cumsum(expected) / answered})


def coverage_area(margin: np.ndarray, hit: np.ndarray) -> float:
    """Area under `coverage_accuracy`: the mean accuracy over all coverages.

    A margin that tells nothing about being right gives the plain accuracy in expectation, and exactly that
    when all margins are equal. One minus it is the AURC of Geifman, Uziel & El-Yaniv (2019, "Bias-reduced
    uncertainty estimation for deep neural classifiers", ICLR).
    """
    return float(coverage_accuracy(margin, hit)["accuracy"].mean())


def _table(ranking: Ranking, ks: Sequence[int]) -> pd.DataFrame:
    used = sorted(METRICS.values(), key=lambda each: each.name not in _LEADING)
    return pd.DataFrame(
        {name: each.of(ranking, *cutoff) for each in used for name, cutoff in each.columns(ks).items()}
    )


def _sums(values: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1, … values."""
    return np.concatenate([[0.0], np.cumsum(values)])


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected queries x at least 2 candidates, got shape {scores.shape}")
    if scores.dtype.kind in "iub":
        scores = scores.astype(np.float64)
    if scores.dtype not in DECIMALS:
        raise ValueError(f"scores: expected float64 or float32, got {scores.dtype}")
    missing = np.isnan(scores).any(axis=1).sum()
    if missing:
        raise ValueError(f"scores: expected numbers, got NaN in {missing} of {len(scores)} queries")
    return scores


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.round(scores.astype(np.float64), DECIMALS[scores.dtype])
