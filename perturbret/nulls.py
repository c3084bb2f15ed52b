"""The null control: labels that mean nothing, and how often predictions hit such labels by luck."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .conditions import CTRL

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
        Probability that each candidate is ranked first (`metrics.rank_top`).
    true : ndarray of int, shape (q,)
        Column of each query's condition, -1 when it is not among the candidates.
    batch : ndarray of str, shape (q,), optional

    Returns
    -------
    float
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


@dataclass(frozen=True)
class _Predictions:
    """Predictions taken apart: the one best column (-2 where several tie), and the shares of those that tie.

    Comparing column numbers is many times faster than looking shares up, and most queries have one best.
    """

    certain: np.ndarray
    tied: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, top: np.ndarray) -> "_Predictions":
        tied = np.flatnonzero(top.max(axis=1) < 1)
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
