"""Queries: single cells, or groups of cells of one condition (pseudo-bulks), the same for every encoder."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from .prepare import Prepared


@dataclass(frozen=True)
class Queries:
    """Queries of one size.

    Attributes
    ----------
    ids : ndarray of str, shape (q,)
        Cell name, or `<condition>/n<size>/<number>` for a pseudo-bulk.
    conditions : ndarray of str, shape (q,)
        True condition of each query.
    members : ndarray of int, shape (q, size)
        Positions of the cells of each query.
    size : int
        Cells per query.
    batch : ndarray of str, shape (q,), or None
        Batch of most of the query's cells (the first in name order among equals).
    """

    ids: np.ndarray
    conditions: np.ndarray
    members: np.ndarray
    size: int
    batch: np.ndarray | None = None

    def __post_init__(self):
        expected = (len(self.ids), self.size)
        if self.members.shape != expected or len(self.conditions) != len(self.ids):
            raise ValueError(
                f"members: expected shape {expected} and as many conditions, got {self.members.shape} and "
                f"{len(self.conditions)}"
            )

    def __len__(self) -> int:
        return len(self.ids)


def make_queries(
    prepared: Prepared,
    *,
    role: str = "query",
    size: int,
    seed: int,
    max_per_condition: int = 40,
    repeats: int = 5,
) -> Queries:
    """Queries of `size` cells from the cells in `role`, controls left out.

    Size 1: every cell once. Larger sizes: the cells of a condition are shuffled `repeats` times and cut into
    disjoint groups each time; equal sets of cells are kept once, and at most `max_per_condition` groups stay.
    Groups of different shuffles overlap, which is why intervals resample conditions and not queries.
    Conditions with fewer than `size` cells have no query.

    The groups depend on `seed`, on cell names and on conditions, not on the order of the cells; those of one
    condition do not depend on which other conditions there are.

    Parameters
    ----------
    prepared : Prepared
    role : str
    size : int
        Cells per query, at least 1.
    seed : int
        At least 0.
    max_per_condition, repeats : int
        At least 1.

    Returns
    -------
    Queries
        Ordered by condition; empty when no condition has `size` cells.

    Raises
    ------
    ValueError
        `size`, `max_per_condition` or `repeats` is below 1, or no cell has the role.
    """
    for name, value in (("size", size), ("max_per_condition", max_per_condition), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    index = by_name(prepared, prepared.where(role))
    if not len(index):
        raise ValueError(f"role: expected cells in role {role!r}, found none but controls")
    labels = prepared.conditions[index]
    if size == 1:
        batch = None if prepared.cells.batch is None else prepared.cells.batch[index]
        return Queries(prepared.cells.names[index], labels, index[:, None], 1, batch)
    conditions, starts = np.unique(labels, return_index=True)
    ids, repeated, members = [], [], [np.empty((0, size), int)]
    for condition, cells in zip(conditions, np.split(index, starts[1:]), strict=True):
        groups = _groups(cells, size, [seed, size, crc32(condition.encode())], max_per_condition, repeats)
        ids += [f"{condition}/n{size}/{number}" for number in range(len(groups))]
        repeated += [condition] * len(groups)
        members.append(groups)
    members = np.concatenate(members)
    return Queries(np.array(ids, str), np.array(repeated, str), members, size, _majority(prepared, members))


def by_name(prepared: Prepared, index: np.ndarray) -> np.ndarray:
    """`index` ordered by condition and cell name, so that nothing drawn or summed depends on file order."""
    return index[np.lexsort((prepared.cells.names[index], prepared.conditions[index]))]


def _groups(
    cells: np.ndarray, size: int, seed: list[int], max_per_condition: int, repeats: int
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n_groups = len(cells) // size
    kept: dict[tuple, None] = {}
    for _ in range(repeats if n_groups else 0):
        shuffled = rng.permutation(len(cells))[: n_groups * size].reshape(n_groups, size)
        kept.update(dict.fromkeys(map(tuple, np.sort(shuffled, axis=1).tolist())))
    chosen = np.array(list(kept)[:max_per_condition], int).reshape(-1, size)
    return cells[chosen]


def _majority(prepared: Prepared, members: np.ndarray) -> np.ndarray | None:
    if prepared.cells.batch is None:
        return None
    names, codes = np.unique(prepared.cells.batch, return_inverse=True)
    counts = np.zeros((len(members), len(names)), np.int32)
    for column in codes[members].T:
        counts[np.arange(len(members)), column] += 1
    return names[counts.argmax(axis=1)]
