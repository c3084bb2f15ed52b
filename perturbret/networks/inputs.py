"""Cells on their way into a network: packed into blocks of like length, or as what was computed of them before."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .backbone import Inputs

BATCH_TOKENS = 16384


def like_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Positions of all cells in batches of like length, the longest first.

    A batch has at most `batch_tokens` tokens, padding included, or one cell; and where its cells have 1,024 tokens
    or more, none is shorter than 9/10 of the longest: in a small set, padding would be much of the work.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        like = np.searchsorted(-lengths[order[start:]], -0.9 * longest, side="right")
        size = max(1, min(batch_tokens // longest, max(like, 1024 // longest)))
        yield order[start : start + size]
        start += size


def block_positions(indptr: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (cells, longest) of the cells' tokens, and where there is none: there stands a cell's first."""
    starts, lengths = indptr[index], indptr[np.asarray(index) + 1] - indptr[index]
    steps = np.arange(lengths.max(initial=0))
    padding = steps >= lengths[:, None]
    return starts[:, None] + np.where(padding, 0, steps), padding


@dataclass(frozen=True)
class Hidden:
    """What a network's frozen lower layers give, sequence by sequence, end to end.

    Attributes
    ----------
    values : ndarray of float32, shape (n, d)
    indptr : ndarray of int64, shape (n_cells + 1,)
        Cell i is the slice from indptr[i] to before indptr[i + 1].
    """

    values: np.ndarray
    indptr: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.indptr)

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, None, np.ndarray | None]:
        """The cells at `index` as a block (cells, longest, d), no values, and padding (None where none is)."""
        # Padding holds copies of the first token: attention leaves them out, whatever they are.
        at, padding = block_positions(self.indptr, index)
        return self.values[at], None, padding if padding.any() else None


@dataclass(frozen=True)
class Rows:
    """One row per cell: what a network without sequences reads, or what was computed once, embeddings or hidden layers.

    Attributes
    ----------
    values : ndarray of float32, shape (n_cells, d)

    Examples
    --------
    >>> rows = Rows(np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    >>> rows.padded(np.array([2, 0]))[0].tolist()
    [[5.0, 6.0], [1.0, 2.0]]
    >>> rows.lengths.tolist()
    [1, 1, 1]
    """

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def lengths(self) -> np.ndarray:
        return np.ones(len(self.values), int)

    @property
    def hash(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.values).data).hexdigest()

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, None, None]:
        """The cells at `index`, no values, no padding."""
        return self.values[index], None, None


def blocks(source: Inputs, index: np.ndarray, device, *, batch_tokens: int = BATCH_TOKENS) -> Iterator:
    """The cells at `index` in blocks of like length: positions in `index`, and what `HeadedNetwork` is called with."""
    index = np.asarray(index)
    for chosen in like_batches(source.lengths[index], batch_tokens):
        yield chosen, to_device(source.padded(index[chosen]), device)


def to_device(block: tuple, device) -> tuple[Tensor | None, ...]:
    """A padded block as tensors."""
    return tuple(None if array is None else torch.from_numpy(array).to(device) for array in block)
