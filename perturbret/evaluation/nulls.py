"""The null control: labels that mean nothing, and how often predictions hit such labels by luck."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import bdtrc, ndtri, pdtrc

from ..data.conditions import CTRL

# Levels of one test at which `null_control` gives the smallest leak that it sees: of a run's own page, and of families.
ALPHAS = (0.05, 0.01, 0.001, 0.0002)
POWER = 0.8
# Shuffled labels held at a time.
_CHUNK = 4_000_000


def permute_conditions(
    conditions: np.ndarray, roles: np.ndarray, batch: np.ndarray | None = None, *, seed: int
) -> np.ndarray:
    """Labels permuted among the perturbed cells of the same role and batch.

    Class counts stay what they are in every role and batch, and controls stay controls, so a pipeline that is
    trained and scored on these labels has the same class prior and the same batch structure, and nothing to
    find.

    Parameters
    ----------
    conditions, roles : ndarray of str, shape (n,)
    batch : ndarray of str, shape (n,), optional
    seed : int

    Returns
    -------
    ndarray of str, shape (n,)

    Raises
    ------
    ValueError
        Lengths differ.

    Examples
    --------
    >>> conditions = np.array(["A", "B", "ctrl", "C", "D", "ctrl"])
    >>> roles = np.array(["train"] * 3 + ["query"] * 3)
    >>> permuted = permute_conditions(conditions, roles, seed=0)
    >>> sorted(permuted[:3].tolist()), sorted(permuted[3:].tolist())
    (['A', 'B', 'ctrl'], ['C', 'D', 'ctrl'])
    >>> permuted[[2, 5]].tolist()
    ['ctrl', 'ctrl']
    """
    permuted = np.array(conditions, str)
    strata = _strata([roles] if batch is None else [roles, batch], len(permuted))
    rng = np.random.default_rng(seed)
    for cells in strata:
        perturbed = cells[permuted[cells] != CTRL]
        permuted[perturbed] = rng.permutation(permuted[perturbed])
    return permuted


def luck(top: np.ndarray, true: np.ndarray, batch: np.ndarray | None = None) -> float:
    """Hit rate that the same predictions have on average when the query labels are permuted within batch.

    The sum over batches b and conditions c of n_b / n * q_bc * p_bc, with q_bc the share of the batch's
    queries that are of condition c, and p_bc the share of its predictions that are c. A read-out that always
    says the most common condition has the class prior as its luck; one that knows the batch, and the batch's
    conditions, has more.

    Parameters
    ----------
    top : ndarray, shape (q, c)
        Probability that each candidate is ranked first (`metrics.rank_top`): what a query gets if its condition is c.
        Another metric may stand in its place (`metrics.metric_by_label`).
    true : ndarray of int, shape (q,)
        Column of each query's condition, -1 when it is not among the candidates.
    batch : ndarray of str, shape (q,), optional
    """
    hits = 0.0
    for rows in _strata([] if batch is None else [batch], len(true)):
        known = true[rows][true[rows] >= 0]
        hits += np.bincount(known, minlength=top.shape[1]) @ top[rows].sum(axis=0) / len(rows)
    return float(hits / len(true))


def luck_p_values(
    tops: Sequence[np.ndarray],
    true: np.ndarray,
    batch: np.ndarray | None = None,
    *,
    n_permutations: int = 9999,
    seed: int,
) -> np.ndarray:
    """One-sided p-values of hitting as often as observed, or more often, by luck.

    Query labels are permuted within batch and the predictions kept. The observed labels count as one
    permutation more (Phipson & Smyth 2010, Stat Appl Genet Mol 9:39), so the value is never 0. All of `tops`
    meet the same permutations.

    Parameters
    ----------
    tops : sequence of ndarray, each (q, c)
        As `top` in `luck`, one per read-out.
    true, batch
        As in `luck`.
    n_permutations : int
    seed : int

    Returns
    -------
    ndarray, shape (len(tops),)

    Raises
    ------
    ValueError
        Lengths differ, or `n_permutations` is below 1.
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations: expected at least 1, got {n_permutations}")
    if any(len(top) != len(true) for top in tops):
        raise ValueError(
            f"true: expected one label per query, got {len(true)} for {[len(top) for top in tops]}"
        )
    batches = _strata([] if batch is None else [batch], len(true))
    order = np.concatenate(batches)
    ends = np.cumsum([len(rows) for rows in batches])
    labels = np.asarray(true, np.int64)[order]
    hits_of = [_Predictions.of(top[order]) for top in tops]
    observed = np.array([predictions.hits(labels[None])[0] for predictions in hits_of])
    rng = np.random.default_rng(seed)
    extreme = np.zeros(len(tops), int)
    step = max(1, _CHUNK // len(labels))
    for done in range(0, n_permutations, step):
        size = min(step, n_permutations - done)
        shuffled = np.empty((size, len(labels)), np.int32)
        for part, end in zip(np.split(labels, ends[:-1]), ends, strict=True):
            shuffled[:, end - len(part) : end] = rng.permuted(np.tile(part, (size, 1)), axis=1)
        # The slack is for sums of the same shares of ties in another order.
        hits = np.array([predictions.hits(shuffled) for predictions in hits_of])
        extreme += (hits >= observed[:, None] - 1e-9 * len(labels)).sum(axis=1)
    return (1 + extreme) / (1 + n_permutations)


def detectable_leak(
    top: np.ndarray,
    true: np.ndarray,
    batch: np.ndarray | None = None,
    *,
    alpha: float,
    power: float = POWER,
    n_permutations: int = 9999,
) -> float:
    """Smallest leak that `luck_p_values` finds with the given power: share of queries whose label is given away.

    A leak of share s puts the true condition first for s of the queries, drawn at random, and leaves the predictions
    of the others as they are. Hits by luck have the mean and variance of permutations within batch (Hoeffding 1951, A
    combinatorial central limit theorem, Ann Math Stat 22:558), with the leak among the predictions; their tail is taken
    from a binomial or moved Poisson distribution of that mean and variance.

    Parameters
    ----------
    top, true, batch
        As in `luck`: predictions of an encoder that was fitted on permuted labels, and these labels.
    alpha : float
        Level of the test. With m runs in a family, at least 0.05 / m (Holm's smallest).
    power : float
        Probability of p < `alpha`.
    n_permutations : int
        Of the test; it can never say less than 1 / (1 + n_permutations).

    Returns
    -------
    float
        From 1 / q to 1; NaN where not even a leak of all labels would be found.

    Raises
    ------
    ValueError
        `alpha` or `power` is not between 0 and 1.
    """
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    if alpha <= 1 / (1 + n_permutations):
        return float("nan")
    n, moments = len(true), _LuckMoments.of(top, true, batch)
    base_mean, base_variance = moments.at(0.0)

    def found(k: int) -> float:
        """Power where k queries are given away."""
        by_luck, share = _Hits(*moments.at(k / n)), k / n
        # The first whole number of hits that so many or more reach with a probability below alpha.
        enough = np.ceil(by_luck.least(alpha) + 1 - 1e-9)
        # Which queries are given away is drawn too: the hits that they had anyway differ.
        spread = (1 - share) ** 2 * base_variance + share * (1 - share) * base_mean * (1 - base_mean / n)
        return _Hits(base_mean * (1 - share), spread).above(enough - k - 1e-9)

    # Not monotone over the first few queries, where hits are whole numbers: the first k from which power suffices.
    low, high = 0, int((true >= 0).sum())
    if found(high) < power:
        return float("nan")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= power else (middle, high)
    return high / n


def detectable_in_family(row: pd.Series, m: int) -> float:
    """Smallest leak that a row of `evaluate.null_control` finds when it is one of m runs, in the worst case of Holm.

    Between the levels of `ALPHAS` it is interpolated on the scale of normal quantiles. NaN where none is found, or
    where 0.05 / m is below the smallest level.
    """
    if m < 1:
        raise ValueError(f"m: expected at least one run, got {m}")
    known = np.array([row[f"detectable@{alpha}"] for alpha in ALPHAS], np.float64)
    if 0.05 / m < min(ALPHAS):
        return float("nan")
    return float(np.interp(-ndtri(0.05 / m), -ndtri(ALPHAS), known))


def null_limits(row: pd.Series, m: int | None = None) -> str:
    """What a null control that holds does not exclude, in one sentence.

    `row` is one of `evaluate.null_control`; `m` the number of runs whose p-values are adjusted together, None for the
    page of one run, which judges at p < 0.01.
    """
    leak = row["detectable@0.01"] if m is None else detectable_in_family(row, m)
    level = "at p < 0.01" if m is None else f"among {m} runs, Holm-adjusted"
    seen = (
        f"with {POWER:.0%} power ({level}) it finds a leak that gives away the label of {leak:.1%} of the cells or more"
        if np.isfinite(leak)
        else f"it would find no leak, however large ({level})"
    )
    return (
        f"The null control detects only leaks that follow the permuted labels; on these {int(row['n_queries']):,} "
        f"queries {seen}. A column that names the guide, a target under another name or a repeated cell keeps its true "
        "label and is not seen by it."
    )


@dataclass(frozen=True)
class _LuckMoments:
    """Mean and variance of hits when labels are permuted within batch, for a share of queries given away.

    Per batch (rows): its queries `n`; of the predictions and of the labels themselves, (2, batches), the sum over
    queries of the mean hits `hit` and of the spread `spread` around it; and (2, batches, c) the summed probabilities
    `named`; `shares` (batches, c) of the labels.
    """

    n: np.ndarray
    hit: np.ndarray
    spread: np.ndarray
    named: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, top: np.ndarray, true: np.ndarray, batch: np.ndarray | None) -> "_LuckMoments":
        parts = []
        labels = np.zeros_like(top)
        known = np.flatnonzero(true >= 0)
        labels[known, true[known]] = 1
        for rows in _strata([] if batch is None else [batch], len(true)):
            shares = labels[rows].mean(axis=0)
            both = np.stack([top[rows], labels[rows]])
            means = both @ shares
            spread = (both**2 @ shares - means**2).sum(axis=1)
            parts.append((len(rows), means.sum(axis=1), spread, both.sum(axis=1), shares))
        n, hit, spread, named, shares = (np.array(part, np.float64) for part in zip(*parts, strict=True))
        return cls(n, hit.T, spread.T, named.swapaxes(0, 1), shares)

    def at(self, share: float) -> tuple[float, float]:
        """Mean and variance of the hits by luck when a random `share` of the queries is given away."""
        weights = np.array([1 - share, share])
        mean = weights @ self.hit
        # Sum over queries and labels of (a - row mean - column mean + mean)^2 by the two-way decomposition.
        named = np.tensordot(weights, self.named, axes=1) / self.n[:, None]
        columns = (self.shares * named**2).sum(axis=1) - (mean / self.n) ** 2
        sum_of_squares = self.n * (weights @ self.spread) - self.n**2 * columns
        variance = np.divide(sum_of_squares, self.n - 1, out=np.zeros_like(self.n), where=self.n > 1)
        return float(mean.sum()), float(np.maximum(variance, 0).sum())


@dataclass(frozen=True)
class _Hits:
    """Numbers of hits of some mean and variance: binomial, or a Poisson moved up where most hits are sure.

    `scipy.stats` has both, and takes longer to import than a small screen to evaluate.
    """

    mean: float
    variance: float

    @cached_property
    def binomial(self) -> tuple[int, float] | None:
        """Its n and p; None for a Poisson."""
        p = 1 - self.variance / self.mean if self.mean > 0 else 0.0
        n = round(self.mean / p) if 0 < p < 0.5 else 0
        return (n, self.mean / n) if n else None

    @property
    def sure(self) -> float:
        return 0.0 if self.binomial else self.mean - self.variance

    def above(self, x: float) -> float:
        """Probability of more than x hits."""
        return self._tail(int(np.floor(x - self.sure)))

    def least(self, alpha: float) -> float:
        """The smallest possible number of hits that is exceeded with a probability of at most `alpha`."""
        low, high = -1, 1
        while self._tail(high) > alpha:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._tail(middle) <= alpha else (middle, high)
        return self.sure + high

    def _tail(self, k: int) -> float:
        """Probability of more than k hits beyond those that are sure."""
        if k < 0:
            return 1.0
        if not self.binomial:
            return float(pdtrc(k, self.variance))
        n, p = self.binomial
        return float(bdtrc(k, n, p)) if k < n else 0.0


@dataclass(frozen=True)
class _Predictions:
    """Predictions taken apart: the one column that hits (-2 where several may), and the shares of those.

    Comparing column numbers is many times faster than looking shares up, and most queries have one best.
    """

    certain: np.ndarray
    tied: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, top: np.ndarray) -> "_Predictions":
        tied = np.flatnonzero((top.max(axis=1) != 1) | (np.count_nonzero(top, axis=1) > 1))
        certain = top.argmax(axis=1).astype(np.int32)
        certain[tied] = -2
        # The last column is what a label outside the candidates, -1, looks up.
        return cls(certain, tied, np.pad(top[tied], ((0, 0), (0, 1))))

    def hits(self, labels: np.ndarray) -> np.ndarray:
        """Expected hits of every row of `labels`, (n, q) column numbers."""
        found = np.count_nonzero(labels == self.certain, axis=1).astype(np.float64)
        if len(self.tied):
            found += self.shares[np.arange(len(self.tied)), labels[:, self.tied]].sum(axis=1)
        return found


def _strata(keys: list[np.ndarray], n: int) -> list[np.ndarray]:
    """Positions of the cells that agree in all `keys`, one array per combination that occurs."""
    codes = np.zeros(n, int)
    for key in keys:
        if len(key) != n:
            raise ValueError(f"roles, batch: expected one entry per cell ({n}), got {len(key)}")
        names, code = np.unique(np.asarray(key, str), return_inverse=True)
        codes = codes * len(names) + code
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
