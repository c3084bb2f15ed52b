"""Intervals and p-values for means of per-query metrics whose queries come in clusters (conditions).

Cells of one condition share its strength, its guides and its prototypes, so they are not independent: what is
resampled or flipped is the condition with all its queries. Formulas: docs/method.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ..files.places import RESOURCES

AVERAGES = ("micro", "macro")
# Random numbers held at a time.
_CHUNK = 4_000_000
# Sums of metrics that differ by less are equal: adding the same numbers in another order must neither make a
# difference out of none, nor one sign pattern more extreme than its equal.
_NOISE = 1e-9


@dataclass(frozen=True)
class Estimates:
    """Means with their intervals, one entry per column of the values.

    Attributes
    ----------
    estimate, low, high : ndarray of float64, shape (m,)
        `low` and `high` are NaN (not known) where there are fewer than two clusters.
    """

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Repeated:
    """A mean over queries and training repeats (refits with other random numbers).

    Attributes
    ----------
    estimate, low, high : float
        `low` and `high` are NaN where there are fewer than two clusters.
    spread : float
        Standard deviation over repeats of the mean over queries; NaN for one repeat.
    p_value : float
        Of a difference, by `paired_permutation_p` on the repeats' average; NaN for the mean of one method.
    n_repeats, n_clusters : int
    """

    estimate: float
    low: float
    high: float
    spread: float
    p_value: float
    n_repeats: int
    n_clusters: int


def measured_coverage(n_conditions: int, average: str, *, paired: bool = False) -> pd.Series:
    """Coverage of the 95% intervals for a number of conditions, as benchmarks/coverage.py measured it.

    Parameters
    ----------
    n_conditions : int
        The row of the largest number of conditions up to this is taken; below the smallest, the smallest.
    average : {"micro", "macro"}
    paired : bool
        Of differences between two methods.

    Returns
    -------
    pandas.Series
        `nominal`, the level; `measured`, the share of simulated screens whose interval held the truth, with `lowest`
        and `highest` over populations of conditions, metrics and estimates; `n_repeats`, the screens behind each of
        these; `n_conditions`, of those screens.

    Raises
    ------
    ValueError
        `average` is another word, or there are fewer than two conditions, where there are no intervals.
    """
    if average not in AVERAGES:
        raise ValueError(f"average: expected one of {AVERAGES}, got {average!r}")
    if n_conditions < 2:
        raise ValueError(f"n_conditions: expected at least 2, got {n_conditions}")
    table = pd.read_csv(RESOURCES / "coverage.csv")
    table = table[(table["average"] == average) & (table["paired"] == paired)].sort_values("n_conditions")
    return table.iloc[max(int((table["n_conditions"] <= n_conditions).sum()) - 1, 0)]


def cluster_bootstrap(
    values: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_resamples: int = 1000,
    level: float = 0.95,
    bounds: Sequence | None = None,
    seed: int,
) -> Estimates:
    """Mean of each column with an interval that treats clusters as drawn from a population of clusters.

    The interval is the wider, on each side, of two (docs/decisions/0004-intervals.md has what each holds alone):

    - Jackknife: estimate +- t * SE. The squared SE is (G - 1) / G * sum (m_-i - mean of m_-i)^2 over the means m_-i
      without cluster i, as CR3; the quantile t has the degrees of freedom of Bell & McCaffrey (2002, "Bias
      reduction in standard errors for linear regression with multi-stage samples", Surv Methodol 28:169),
      G - 1 for clusters of equal weight and fewer otherwise.
    - Bootstrap-t: quantiles of (m* - m) / SE* over resamples of clusters, times the SE (Efron 1982, "The
      jackknife, the bootstrap and other resampling plans", ch. 10; for clusters: Cameron, Gelbach & Miller 2008,
      Rev Econ Stat 90:414). It follows skewness. SE and SE* are linearised: G / (G - 1) * sum (S_i - m n_i)^2
      over (sum n_i)^2, S_i the sum over the n_i queries of cluster i. Resamples without any spread are left out.

    Parameters
    ----------
    values : ndarray of float, shape (n, m) or (n,)
        Per-query metrics.
    clusters : sequence, length n
        Condition of each query.
    average : {"micro", "macro"}
        Mean over queries (a ratio of sums), or mean over the clusters' means.
    n_resamples : int
    level : float
        Between 0 and 1.
    bounds : pair of float or of ndarray (m,), optional
        Smallest and largest value that the metric can take: (0, 1) for hits and reciprocal ranks. Intervals
        end there, and where all values lie at one of them the interval reaches as far as the share of clusters could
        that never showed another value (Clopper & Pearson 1934; (sum n_i)^2 / sum n_i^2 clusters).
    seed : int
        The same seed and clusters give the same resamples, whatever the values.

    Raises
    ------
    ValueError
        `values` holds NaN or no row or lies outside `bounds`, lengths differ, or `average`, `n_resamples` or `level`
        is out of range.

    Examples
    --------
    >>> hits, conditions = [1, 1, 1, 0, 0, 0, 1, 0], ["A", "A", "B", "B", "C", "C", "D", "D"]
    >>> found = cluster_bootstrap(hits, conditions, bounds=(0, 1), seed=0)
    >>> found.estimate.tolist(), found.low.round(2).tolist(), found.high.round(2).tolist()
    ([0.5], [0.0], [1.0])
    """
    values = _checked(values, n_resamples, level)
    interval = _Interval(*_cluster_sums(values, clusters, average), n_resamples, level, seed)
    return interval.within(bounds, values)


def query_bootstrap(
    values: np.ndarray, *, n_resamples: int = 1000, level: float = 0.95, seed: int
) -> Estimates:
    """Mean of each column with the percentile interval of a bootstrap that resamples single queries.

    For queries that are exchangeable, as those of a null control are: its labels are permuted over cells. Parameters
    and errors as for `cluster_bootstrap`.
    """
    values = _checked(values, n_resamples, level)
    n = len(values)
    # Equal rows are drawn together: the number of draws that fall on them is multinomial too.
    rows, counts = np.unique(values, axis=0, return_counts=True)
    estimate = counts @ rows / n
    if n < 2:
        return _unknown(estimate)
    resampled = [drawn @ rows / n for drawn in _multinomial(counts / n, n, n_resamples, seed)]
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Estimates(estimate, low, high)


def cluster_mean(values: np.ndarray, clusters: Sequence, *, average: str = "micro") -> np.ndarray:
    """The estimates (m,) of `cluster_bootstrap` without intervals."""
    sums, sizes = _cluster_sums(_checked(values), clusters, average)
    return sums.sum(axis=0) / sizes.sum()


def repeated_mean(
    values: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_resamples: int = 1000,
    level: float = 0.95,
    bounds: Sequence | None = None,
    seed: int = 0,
) -> Repeated:
    """Mean of one method over queries and training repeats, whose interval covers conditions and repeats.

    Conditions and repeats are crossed: every refit answers all queries. Their variance components add up (Searle,
    Casella & McCulloch 1992, "Variance Components", ch. 4):

        V = V_c + V_r,    V_r = s^2 / R,    freedom = V^2 / (V_c^2 / f_c + V_r^2 / (R - 1))

    V_c and its f_c degrees of freedom are the jackknife's of `cluster_bootstrap`, on the average over repeats; s is
    the standard deviation over the R repeats of their means; the degrees of freedom of the sum are Satterthwaite's
    (1946, "An approximate distribution of estimates of variance components", Biometrics Bull 2:110). What varies
    with condition and repeat at once is in both terms, so that V is somewhat too large rather than too small. With
    the half-widths h of `cluster_bootstrap` on one side and j of its jackknife, the interval reaches
    sqrt(t^2 V + h^2 - j^2) to that side: without spread between repeats it is that of `cluster_bootstrap`.

    Parameters
    ----------
    values : ndarray of float, shape (n_queries, n_repeats) or (n_queries,)
        Metric of each query in each repeat. One repeat: the interval covers conditions only.
    clusters : sequence, length n_queries
        Condition of each query.
    average, n_resamples, level, bounds, seed
        As for `cluster_bootstrap`.

    Raises
    ------
    ValueError
        As `cluster_bootstrap`.

    Examples
    --------
    >>> hits = np.array([[1, 1], [1, 0], [0, 0], [1, 1]])
    >>> found = repeated_mean(hits, ["A", "A", "B", "C"], bounds=(0, 1))
    >>> found.estimate, round(found.spread, 3), found.n_repeats, found.n_clusters
    (0.625, 0.177, 2, 3)
    """
    values = _checked(values, n_resamples, level)
    n_repeats, average_value = values.shape[1], values.mean(axis=1)
    sums, sizes = _cluster_sums(np.column_stack([values, average_value]), clusters, average)
    means = sums.sum(axis=0) / sizes.sum()
    spread = float(np.std(means[:-1], ddof=1)) if n_repeats > 1 else np.nan
    interval = _Interval(sums[:, -1:], sizes, n_resamples, level, seed)
    found = interval.within(bounds, average_value[:, None])
    low, high = float(found.low[0]), float(found.high[0])
    if len(sizes) > 1 and n_repeats > 1 and spread > _NOISE:
        whole, variance, freedom = interval.within(None, values), interval.variance[0], interval.freedom
        parts, freedoms = np.array([variance, spread**2 / n_repeats]), np.array([freedom, n_repeats - 1])
        total = parts.sum()
        widened = stdtrit(total**2 / np.sum(parts**2 / freedoms), (1 + level) / 2) ** 2 * total
        widened -= stdtrit(freedom, (1 + level) / 2) ** 2 * variance
        low, high = (
            means[-1] + sign * np.sqrt(max((end[0] - means[-1]) ** 2 + widened, 0.0))
            for sign, end in ((-1, whole.low), (1, whole.high))
        )
        if bounds is not None:
            low, high = (float(np.clip(end, *bounds)) for end in (low, high))
    return Repeated(float(means[-1]), float(low), float(high), spread, np.nan, n_repeats, len(sizes))


def repeated_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_resamples: int = 1000,
    level: float = 0.95,
    n_permutations: int = 10_000,
    seed: int,
) -> Repeated:
    """Mean of `a` - `b`, metrics of two methods on the same queries, over queries and training repeats.

    Parameters
    ----------
    a, b : ndarray of float, shape (n_queries, n_repeats) or (n_queries,)
        Row i of both belongs to the same query. A method that knows no random numbers has one column, which is
        compared with every repeat of the other; else both have the same number of repeats.
    clusters, average, n_resamples, level
        As for `repeated_mean`.
    n_permutations, seed
        Of `paired_permutation_p`, which gets the average over repeats. It says whether these fitted networks
        differ on other conditions; whether refitted ones would, is in the interval only.

    Raises
    ------
    ValueError
        Numbers of queries differ, or numbers of repeats do and neither is one; else as `cluster_bootstrap`.

    Examples
    --------
    >>> one, other = np.array([1, 1, 1, 1, 1, 0]), np.array([0, 0, 1, 0, 0, 0])
    >>> found = repeated_difference(one, other, list("ABCDEF"), seed=0)
    >>> round(found.estimate, 3), found.p_value
    (0.667, 0.125)
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
    if a.ndim == b.ndim == 2 and len(a) == len(b) and 1 in (a.shape[1], b.shape[1]):
        a, b = np.broadcast_arrays(a, b)
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected the same queries in both, got shapes {a.shape} and {b.shape}")
    options = {"average": average, "seed": seed}
    found = repeated_mean(a - b, clusters, n_resamples=n_resamples, level=level, **options)
    p = paired_permutation_p((a - b).mean(axis=1), clusters, n_permutations=n_permutations, **options)
    return replace(found, p_value=p)


def paired_permutation_p(
    difference: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_permutations: int = 10_000,
    seed: int,
) -> float:
    """Two-sided p-value of the mean difference of two methods that may be swapped within every cluster.

    Swapping two methods on a cluster turns the sign of its differences. All sign patterns are tried where
    there are at most `n_permutations` of them; else as many random ones, and the observed one is counted as
    one more (Phipson & Smyth 2010, "Permutation p-values should never be zero", Stat Appl Genet Mol 9:39).

    Parameters
    ----------
    difference : ndarray of float, shape (n,)
        Of the two methods on each query.
    clusters : sequence, length n
    average : {"micro", "macro"}
    n_permutations : int
    seed : int

    Returns
    -------
    float
        Above 0, at most 1.

    Raises
    ------
    ValueError
        `difference` holds NaN or several columns; else as `cluster_bootstrap`.

    Examples
    --------
    >>> paired_permutation_p(np.ones(5), list("ABCDE"), seed=0)
    0.0625
    >>> paired_permutation_p(np.ones(5), list("AAABB"), seed=0)
    0.5
    """
    difference = _checked(difference, n_permutations)
    if difference.shape[1] != 1:
        raise ValueError(f"difference: expected one value per query, got {difference.shape[1]} columns")
    sums = _cluster_sums(difference, clusters, average)[0][:, 0]
    sums = sums[np.abs(sums) > _NOISE]
    observed = abs(sums.sum()) - _NOISE
    n = len(sums)
    if n < 63 and 2**n <= n_permutations:
        patterns = np.arange(2**n)[:, None] >> np.arange(n) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sums) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _steps(n_permutations, n):
        signs = 1 - 2 * rng.integers(0, 2, (size, n), dtype=np.int8)
        extreme += int((np.abs(signs @ sums) >= observed).sum())
    return (1 + extreme) / (1 + n_permutations)


def holm(p: Sequence[float]) -> np.ndarray:
    """p-values adjusted for the number of tests, in the order given.

    Holm (1979, "A simple sequentially rejective multiple test procedure", Scand J Stat 6:65): the i-th
    smallest of m is multiplied by m - i + 1, made at least as large as those before it, and cut at 1.

    Raises
    ------
    ValueError
        A value is NaN or outside 0 … 1.

    Examples
    --------
    >>> holm([0.01, 0.04, 0.02]).round(3).tolist()
    [0.03, 0.04, 0.04]
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p: expected a list of numbers from 0 to 1, got {p}")
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def _checked(values: np.ndarray, n_resamples: int = 1, level: float = 0.5) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if values.ndim != 2 or not len(values):
        raise ValueError(f"values: expected at least one row per query, got shape {values.shape}")
    missing = int(np.isnan(values).any(axis=1).sum())
    if missing:
        raise ValueError(f"values: expected numbers, got NaN in {missing} of {len(values)} queries")
    if n_resamples < 1:
        raise ValueError(f"number of resamples: expected at least 1, got {n_resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    return values


class _Interval:
    """The interval of `cluster_bootstrap` around averages (m,), from sums (g, m) and sizes (g,) of clusters.

    `variance` (m,) and `freedom` are the jackknife's; `reach` (2, m) is how far the interval goes below and above.
    """

    def __init__(self, sums: np.ndarray, sizes: np.ndarray, n_resamples: int, level: float, seed: int):
        self.sizes, self.level = sizes, level
        self.estimate = sums.sum(axis=0) / sizes.sum()
        if len(sizes) > 1:
            self.variance, self.freedom = _jackknife(sums, sizes)
            half = stdtrit(self.freedom, (1 + level) / 2) * np.sqrt(self.variance)
            self.reach = np.fmax(half, _bootstrap_t(sums, sizes, n_resamples, level, seed))

    def within(self, bounds: Sequence | None, values: np.ndarray) -> Estimates:
        """The interval, cut at `bounds`; `values` (n, m) say whether any lies off a bound."""
        estimate, sizes = self.estimate, self.sizes
        if bounds is not None:
            lowest, highest = (np.broadcast_to(np.asarray(end, np.float64), estimate.shape) for end in bounds)
            if (values < lowest - _NOISE).any() or (values > highest + _NOISE).any():
                raise ValueError(f"values: expected {lowest.min():g} to {highest.max():g}, got others")
        if len(sizes) < 2:
            return _unknown(estimate)
        low, high = estimate - self.reach[0], estimate + self.reach[1]
        if bounds is None:
            return Estimates(estimate, low, high)
        # An infinite bound has no value at it, and no interval is taken from there.
        with np.errstate(invalid="ignore"):
            reach = (highest - lowest) * (1 - ((1 - self.level) / 2) ** (np.sum(sizes**2) / sizes.sum() ** 2))
            high = np.where(np.abs(values - lowest).max(axis=0) <= _NOISE, lowest + reach, high)
            low = np.where(np.abs(values - highest).max(axis=0) <= _NOISE, highest - reach, low)
        return Estimates(estimate, np.maximum(low, lowest), np.minimum(high, highest))


def _unknown(estimate: np.ndarray) -> Estimates:
    return Estimates(estimate, np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan))


def _cluster_sums(values: np.ndarray, clusters: Sequence, average: str) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster: numerator (g, m) and denominator (g,) of the average."""
    if average not in AVERAGES:
        raise ValueError(f"average: expected one of {AVERAGES}, got {average!r}")
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    if len(codes) != len(values):
        raise ValueError(f"clusters: expected one per query, {len(values)}, got {len(codes)}")
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.stack([np.bincount(codes, column) for column in values.T], axis=1)
    return (sums, sizes) if average == "micro" else (sums / sizes[:, None], np.ones(len(names)))


def _jackknife(sums: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, float]:
    """Variance of the averages (m,), and the degrees of freedom if all cluster means have the same variance."""
    n = len(sizes)
    without = (sums.sum(axis=0) - sums) / (sizes.sum() - sizes)[:, None]
    variance = (n - 1) / n * np.sum((without - without.mean(axis=0)) ** 2, axis=0)
    shares = sizes / sizes.sum()
    # Residuals of independent cluster means, as the jackknife weighs them: rows of `residual`.
    residual = (shares / (1 - shares))[:, None] * (np.eye(n) - shares)
    form = residual.T @ residual
    return variance, float(np.trace(form) ** 2 / np.sum(form**2))


def _bootstrap_t(
    sums: np.ndarray, sizes: np.ndarray, n_resamples: int, level: float, seed: int
) -> np.ndarray:
    """How far the bootstrap-t interval reaches below and above the averages, (2, m); NaN if unknown."""
    n, estimate = len(sizes), sums.sum(axis=0) / sizes.sum()
    # Around the estimate sums are deviations: nothing cancels in the squares below.
    off = sums - estimate * sizes[:, None]
    error = np.sqrt(np.sum(off**2, axis=0))
    ratios = []
    for drawn in _equal_draws(n, n_resamples, seed, _CHUNK):
        total = (drawn @ sizes)[:, None]
        shift = drawn @ off / total
        square = drawn @ off**2 - 2 * shift * (drawn @ (off * sizes[:, None]))
        square += shift**2 * (drawn @ sizes**2)[:, None]
        spread = np.sqrt(np.maximum(square, 0)) / total
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(np.where(spread > 1e-6 * error / sizes.sum(), shift / spread, np.nan))
    ratios = np.concatenate(ratios)
    reach = np.full((2, len(estimate)), np.nan)
    tails = [(1 + level) / 2, (1 - level) / 2]
    missing = np.isnan(ratios)
    whole, known = ~missing.any(axis=0), ~missing.all(axis=0)
    reach[:, whole] = np.quantile(ratios[:, whole], tails, axis=0) * [[1], [-1]]
    if not (whole == known).all():  # slow
        reach[:, known & ~whole] = np.nanquantile(ratios[:, known & ~whole], tails, axis=0) * [[1], [-1]]
    return reach * error / sizes.sum()


def _equal_draws(n: int, n_resamples: int, seed: int, chunk: int):
    """How often each of n clusters is drawn; kept where that is little, since tables have many rows over the same."""
    if n * n_resamples > chunk // 4:
        return _multinomial(np.full(n, 1 / n), n, n_resamples, seed)
    return _kept_draws(n, n_resamples, seed)


@lru_cache(maxsize=8)
def _kept_draws(n: int, n_resamples: int, seed: int) -> list[np.ndarray]:
    return list(_multinomial(np.full(n, 1 / n), n, n_resamples, seed))


def _multinomial(shares: np.ndarray, n: int, n_resamples: int, seed: int):
    """Draw counts (resamples, categories) as float64, a bounded number of resamples at a time."""
    rng = np.random.default_rng(seed)
    for size in _steps(n_resamples, len(shares)):
        yield rng.multinomial(n, shares, size=size).astype(np.float64)


def _steps(total: int, width: int) -> list[int]:
    step = max(1, _CHUNK // max(width, 1))
    return [min(step, total - done) for done in range(0, total, step)]
