"""Which training cells share a step: drawn at random, or the same number of cells from each of some conditions.

A plan depends on labels, settings, seed and epoch alone: every process of a run makes the same and takes its share.
"""

from collections.abc import Iterator

import numpy as np

SAMPLERS = ("random", "balanced")


def plan_batches(
    labels: np.ndarray, *, sampler: str, batch_size: int, cells_per_condition: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of one epoch, as positions in `labels`.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        Class of each training cell.
    sampler : str
        `random`: each cell once, in random order; large classes fill more of each batch. `balanced`: every batch
        has `cells_per_condition` cells of each of `batch_size / cells_per_condition` conditions, and conditions take
        turns; cells of a condition take turns too, so that those of a rare one come several times in an epoch. No cell
        is twice in a batch, unless its condition has fewer than `cells_per_condition`.
    batch_size : int
        Cells in a batch; all cells make one batch where there are fewer. What is left over at the end of an epoch is
        left out of it, so that all batches weigh the same.
    cells_per_condition : int
    seed, epoch : int
        Another epoch has another plan.

    Raises
    ------
    ValueError
        A setting is out of range, or fewer conditions are there than a balanced batch needs.
    """
    labels = np.asarray(labels)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not 1 <= batch_size or not len(labels):
        raise ValueError(
            f"batch_size: expected 1 or more for cells to train on, got {batch_size}, {len(labels)} cells"
        )
    rng = np.random.default_rng([seed, epoch])
    if sampler == "random":
        order = rng.permutation(len(labels))
        size = min(batch_size, len(labels))
        return [order[start : start + size] for start in range(0, len(labels) - size + 1, size)]
    classes = np.unique(labels)
    if cells_per_condition < 2 or batch_size % cells_per_condition:
        raise ValueError(
            f"cells_per_condition: expected 2 or more and a divisor of batch_size, got {cells_per_condition} for "
            f"{batch_size}"
        )
    # No more conditions than there are: a small screen gets smaller batches rather than a condition twice.
    n_conditions = min(batch_size // cells_per_condition, len(classes))
    if n_conditions < 2:
        raise ValueError(
            f"batch_size: expected room for 2 conditions of {cells_per_condition} cells in a balanced batch, got "
            f"{batch_size} and {len(classes)} conditions"
        )
    turns = _turns(classes, rng, n_conditions)
    cells = {}
    for label in classes:
        own = np.flatnonzero(labels == label)
        cells[label] = _turns(own, rng, min(cells_per_condition, len(own)))
    n_batches = max(1, len(labels) // (n_conditions * cells_per_condition))
    return [
        np.concatenate([np.resize(next(cells[label]), cells_per_condition) for label in next(turns)])
        for _ in range(n_batches)
    ]


def share(batch: np.ndarray, rank: int, n_processes: int) -> np.ndarray:
    """The part of a batch that one of several processes computes; all parts are of one size, and what is left over
    is left out.

    Raises
    ------
    ValueError
        The batch has fewer cells than there are processes.
    """
    size = len(batch) // n_processes
    if not size:
        raise ValueError(
            f"batch: expected a cell for each of {n_processes} processes, got {len(batch)} cells"
        )
    return batch[rank * size : (rank + 1) * size]


def _turns(values: np.ndarray, rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    """Groups of `size` distinct values without end: all are used before one comes again, apart from what a group
    needs to be full."""
    deck = rng.permutation(values)
    while True:
        if len(deck) < size:
            rest = rng.permutation(np.setdiff1d(values, deck))
            used, rest = rest[: size - len(deck)], rest[size - len(deck) :]
            group, deck = np.concatenate([deck, used]), rng.permutation(np.concatenate([rest, deck]))
        else:
            group, deck = deck[:size], deck[size:]
            if not len(deck):
                deck = rng.permutation(values)
        yield group
