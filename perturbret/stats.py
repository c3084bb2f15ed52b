"""Intervals and p-values for means of per-query metrics whose queries come in clusters (conditions).

Cells of one condition share its strength, its guides and its prototypes, so they are not independent: what is
resampled or flipped is the condition with all its queries. Formulas: docs/method.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

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


def cluster_bootstrap(
    values: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int,
) -> Estimates:
    """Mean of each column with the percentile interval of a bootstrap that resamples clusters.

    Each resample draws as many clusters as there are, with replacement, and takes every query of a drawn
    cluster as often as the cluster was drawn (Field & Welsh 2007, "Bootstrapping clustered data", J R Stat
    Soc B 69:369).

    Parameters
    ----------
    values : ndarray of float, shape (n, m) or (n,)
        Per-query metrics.
    clusters : sequence, length n
        Condition of each query.
    average : {"micro", "macro"}
        Mean over queries (a ratio of sums in every resample), or mean over the clusters' means.
    n_resamples : int
    level : float
        Between 0 and 1.
    seed : int
        The same seed and clusters give the same resamples, whatever the values.

    Returns
    -------
    Estimates

    Raises
    ------
    ValueError
        `values` holds NaN or no row, lengths differ, or `average`, `n_resamples` or `level` is out of range.
    """
    values = _checked(values, n_resamples, level)
    sums, sizes = _cluster_sums(values, clusters, average)
    if len(sizes) < 2:
        return _interval(sums.sum(axis=0) / sizes.sum(), None, level)
    weights = _multinomial(np.full(len(sizes), 1 / len(sizes)), len(sizes), n_resamples, seed)
    resampled = np.concatenate([(drawn @ sums) / (drawn @ sizes)[:, None] for drawn in weights])
    return _interval(sums.sum(axis=0) / sizes.sum(), resampled, level)


def query_bootstrap(
    values: np.ndarray, *, n_resamples: int = 1000, level: float = 0.95, seed: int
) -> Estimates:
    """Mean of each column with the percentile interval of a bootstrap that resamples single queries.

    For queries that are exchangeable, as those of a null control are: its labels are permuted over cells.

    Parameters
    ----------
    values : ndarray of float, shape (n, m) or (n,)
    n_resamples, level, seed
        As for `cluster_bootstrap`.

    Returns
    -------
    Estimates

    Raises
    ------
    ValueError
        As `cluster_bootstrap`.
    """
    values = _checked(values, n_resamples, level)
    n = len(values)
    # Equal rows are drawn together: the number of draws that fall on them is multinomial too.
    rows, counts = np.unique(values, axis=0, return_counts=True)
    estimate = counts @ rows / n
    if n < 2:
        return _interval(estimate, None, level)
    weights = _multinomial(counts / n, n, n_resamples, seed)
    return _interval(estimate, np.concatenate([drawn @ rows / n for drawn in weights]), level)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int,
) -> Estimates:
    """Mean of `a` - `b`, metrics of two methods on the same queries, with a clustered bootstrap interval.

    Parameters
    ----------
    a, b : ndarray of float, shape (n, m) or (n,)
        Row i of both belongs to the same query.
    clusters, average, n_resamples, level, seed
        As for `cluster_bootstrap`.

    Returns
    -------
    Estimates

    Raises
    ------
    ValueError
        Shapes of `a` and `b` differ; else as `cluster_bootstrap`.
    """
    return cluster_bootstrap(
        _difference(a, b), clusters, average=average, n_resamples=n_resamples, level=level, seed=seed
    )


def repeated_mean(
    values: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    level: float = 0.95,
) -> Repeated:
    """Mean of one method over queries and training repeats, whose interval covers conditions and repeats.

    Conditions and repeats are crossed: every refit answers all queries. With variance components for both
    (Searle, Casella & McCulloch 1992, "Variance Components", ch. 4)

        V = V_c + s^2 / R,    V_c = (G - 1) / G * sum over clusters i of (m_-i - mean of m_-i)^2

    where m_-i is the mean of the repeats' average without cluster i (delete-one jackknife; Bell & McCaffrey 2002),
    s is the standard deviation over the R repeats of their means, and G the number of clusters. What varies
    with cluster and repeat at once is in both terms, so that V is somewhat too large rather than too small. The
    interval is estimate +- t sqrt(V), the quantile t with Satterthwaite's (1946) degrees of freedom

        V^2 / (V_c^2 / (G - 1) + (s^2 / R)^2 / (R - 1))

    Parameters
    ----------
    values : ndarray of float, shape (n_queries, n_repeats) or (n_queries,)
        Metric of each query in each repeat. One repeat: the interval covers conditions only.
    clusters : sequence, length n_queries
        Condition of each query.
    average : {"micro", "macro"}
    level : float
        Between 0 and 1.

    Returns
    -------
    Repeated

    Raises
    ------
    ValueError
        As `cluster_bootstrap`.
    """
    values = _checked(values, 1, level)
    n_repeats = values.shape[1]
    sums, sizes = _cluster_sums(np.column_stack([values, values.mean(axis=1)]), clusters, average)
    means = sums.sum(axis=0) / sizes.sum()
    spread = float(np.std(means[:-1], ddof=1)) if n_repeats > 1 else np.nan
    n = len(sizes)
    half = np.nan
    if n > 1:
        without = (sums[:, -1].sum() - sums[:, -1]) / (sizes.sum() - sizes)
        parts = [(n - 1) / n * np.sum((without - without.mean()) ** 2)]
        freedoms = [n - 1]
        if n_repeats > 1:
            parts.append(spread**2 / n_repeats)
            freedoms.append(n_repeats - 1)
        parts, freedoms = np.array(parts), np.array(freedoms)
        total = parts.sum()
        freedom = total**2 / np.sum(parts**2 / freedoms) if total else 1.0
        half = float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(total))
    estimate = float(means[-1])
    return Repeated(estimate, estimate - half, estimate + half, spread, np.nan, n_repeats, n)


def repeated_difference(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
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
    clusters, average, level
        As for `repeated_mean`.
    n_permutations, seed
        Of `paired_permutation_p`, which gets the average over repeats. It says whether these fitted networks
        differ on other conditions; whether refitted ones would, is in the interval only.

    Returns
    -------
    Repeated

    Raises
    ------
    ValueError
        Numbers of queries differ, or numbers of repeats do and neither is one; else as `cluster_bootstrap`.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    a, b = (x[:, None] if x.ndim == 1 else x for x in (a, b))
    if a.ndim == b.ndim == 2 and len(a) == len(b) and 1 in (a.shape[1], b.shape[1]):
        a, b = np.broadcast_arrays(a, b)
    difference = _difference(a, b)
    found = repeated_mean(difference, clusters, average=average, level=level)
    average_difference = difference.mean(axis=1)
    p = paired_permutation_p(
        average_difference,
        np.zeros_like(average_difference),
        clusters,
        average=average,
        n_permutations=n_permutations,
        seed=seed,
    )
    return replace(found, p_value=p)


def paired_permutation_p(
    a: np.ndarray,
    b: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "micro",
    n_permutations: int = 10_000,
    seed: int,
) -> float:
    """Two-sided p-value of the mean of `a` - `b` when the methods may be swapped within every cluster.

    Swapping two methods on a cluster turns the sign of its differences. All sign patterns are tried where
    there are at most `n_permutations` of them; else as many random ones, and the observed one is counted as
    one more (Phipson & Smyth 2010, "Permutation p-values should never be zero", Stat Appl Genet Mol 9:39).

    Parameters
    ----------
    a, b : ndarray of float, shape (n,)
        Row i of both belongs to the same query.
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
        As `paired_difference`.
    """
    difference = _checked(_difference(a, b), n_permutations, 0.5)
    if difference.shape[1] != 1:
        raise ValueError(f"a, b: expected one value per query, got {difference.shape[1]} columns")
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
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p: expected a list of numbers from 0 to 1, got {p}")
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return adjusted


def _checked(values: np.ndarray, n_resamples: int, level: float) -> np.ndarray:
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


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected the same queries in both, got shapes {a.shape} and {b.shape}")
    return a - b


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


def _multinomial(shares: np.ndarray, n: int, n_resamples: int, seed: int):
    """Draw counts (resamples, categories) as float64, a bounded number of resamples at a time."""
    rng = np.random.default_rng(seed)
    for size in _steps(n_resamples, len(shares)):
        yield rng.multinomial(n, shares, size=size).astype(np.float64)


def _steps(total: int, width: int) -> list[int]:
    step = max(1, _CHUNK // max(width, 1))
    return [min(step, total - done) for done in range(0, total, step)]


def _interval(estimate: np.ndarray, resampled: np.ndarray | None, level: float) -> Estimates:
    if resampled is None:
        unknown = np.full(estimate.shape, np.nan)
        return Estimates(estimate, unknown, unknown)
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return Estimates(estimate, low, high)
