"""Libraries: the prototypes of every candidate condition that a query is compared with."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np

KINDS = ("mean", "bootstrap", "raw_cell")


@dataclass(frozen=True)
class Library:
    """Prototypes in embedding space, ordered by condition.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    prototypes : ndarray of float32, shape (p, d)
    conditions : ndarray of str, shape (p,)
        Condition of each prototype, in ascending order.
    """

    kind: str
    prototypes: np.ndarray
    conditions: np.ndarray

    def __post_init__(self):
        if self.prototypes.ndim != 2 or not len(self.prototypes):
            raise ValueError(f"prototypes: expected at least one, as rows, got shape {self.prototypes.shape}")
        if len(self.conditions) != len(self.prototypes):
            raise ValueError(
                f"conditions: expected one per prototype ({len(self.prototypes)}), got {len(self.conditions)}"
            )
        if (self.conditions[1:] < self.conditions[:-1]).any():
            raise ValueError("conditions: expected prototypes in ascending order of condition")

    @property
    def candidates(self) -> tuple[str, ...]:
        """The conditions that can be retrieved, sorted."""
        return tuple(np.unique(self.conditions).tolist())

    @property
    def starts(self) -> np.ndarray:
        """Row of the first prototype of each candidate, int (c,)."""
        return np.unique(self.conditions, return_index=True)[1]


def build_library(
    embeddings: np.ndarray,
    conditions: np.ndarray,
    *,
    kind: str = "mean",
    k: int = 30,
    m: int = 50,
    seed: int = 0,
) -> Library:
    """Prototypes from the embeddings of library cells (train, or gallery where the track says so).

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
    conditions : ndarray of str, shape (n,)
    kind : {'mean', 'bootstrap', 'raw_cell'}
        One mean per condition; `k` means of `m` cells drawn with replacement; every cell.
    k, m : int
        Of the bootstrap library.
    seed : int
        Of the bootstrap library. The draws of a condition depend on its name and on the order of its cells,
        not on the other conditions.

    Returns
    -------
    Library

    Raises
    ------
    ValueError
        Unknown `kind`; no cells; lengths differ; `k` or `m` is below 1; an embedding is not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if k < 1 or m < 1:
        raise ValueError(f"k, m: expected at least 1, got {k} and {m}")
    embeddings, conditions = np.asarray(embeddings), np.asarray(conditions, str)
    if embeddings.ndim != 2 or len(embeddings) != len(conditions) or not len(conditions):
        raise ValueError(
            f"embeddings: expected cells x dimensions for {len(conditions)} conditions, got shape "
            f"{embeddings.shape}"
        )
    if not np.isfinite(embeddings).all():
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(
            f"embeddings: expected finite numbers, {len(bad)} cells have others (first row {bad[0]})"
        )
    order = np.argsort(conditions, kind="stable")
    names, starts = np.unique(conditions[order], return_index=True)
    if kind == "raw_cell":
        return Library(kind, embeddings[order].astype(np.float32, copy=False), conditions[order])
    prototypes = []
    for name, rows in zip(names, np.split(order, starts[1:]), strict=True):
        cells = embeddings[rows].astype(np.float64)
        if kind == "mean":
            prototypes.append(cells.mean(axis=0, keepdims=True))
        else:
            # How often each cell is drawn is all that a mean needs: k x n weights, not k x m x d copies.
            rng = np.random.default_rng([seed, crc32(name.encode())])
            drawn = rng.multinomial(m, np.full(len(rows), 1 / len(rows)), size=k)
            prototypes.append((drawn / m) @ cells)
    repeated = np.repeat(names, [len(part) for part in prototypes])
    return Library(kind, np.concatenate(prototypes).astype(np.float32), repeated)
