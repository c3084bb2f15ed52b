"""Masked counts -> the gene tokens and binned values that scGPT reads, one sequence per cell.

A cell's tokens depend on its own counts and name alone: not on the cells beside it, their order, the order of
genes where some are left out, or a random generator.

Source: Cui et al., scGPT, Nature Methods 2024; scgpt 0.2.4, `scgpt.preprocess` and `scgpt.data_collator`, which tests
compare with. What differs is in docs/method.md.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from scipy.sparse import csr_matrix

from ..data.prepared import Cells
from ..files.cache import cached
from ..files.hashing import mix, name_seeds
from ..files.provenance import code_hash
from ..networks.inputs import block_positions
from .vocabulary import CLS, NO_TOKEN, PAD, Vocabulary


def bin_values(values: np.ndarray, indptr: np.ndarray, n_bins: int = 51) -> np.ndarray:
    """Bin of each value among its cell's values, 1 to n_bins - 1.

    The n_bins - 1 edges are the cell's quantiles from 0 to 1. A value has passed every edge at or below it: untied,
    the number of those is its bin. Tied values, such as the many counts of 1 in a shallow cell, lie on several edges
    at once; upstream then draws one of these bins at random for each value, here each gets their middle.

    Parameters
    ----------
    values : ndarray of float32, shape (n,)
        Positive. All that counts is their order within a cell.
    indptr : ndarray of int64, shape (n_cells + 1,)

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    values = np.ascontiguousarray(values, np.float32)
    n_edges, sizes = n_bins - 1, np.diff(indptr)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    keys = _sort_keys(rows, values)
    ordered = (np.sort(keys) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    # numpy.quantile's own arithmetic, so that an edge that meets a value is rounded as upstream's is.
    filled = np.flatnonzero(sizes)
    last = sizes[filled, None] - 1
    position = last * np.linspace(0, 1, n_edges)
    below = np.minimum(np.floor(position).astype(np.int64), last)
    share = position - below
    start = indptr[filled, None]
    low, high = ordered[start + below], ordered[start + np.minimum(below + 1, last)]
    edges = np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share)).ravel()
    # The nearest float32 at or above (below) an edge stands for it: no float32 value lies between them.
    near = edges.astype(np.float32)
    above = np.where(near < edges, np.nextafter(near, np.float32(np.inf)), near)
    under = np.where(near > edges, np.nextafter(near, np.float32(0)), near)
    # Rows without values have no edges, so that those before row r are counted among the filled.
    before = (np.cumsum(sizes > 0) - 1)[rows] * n_edges
    owners = np.repeat(filled, n_edges)
    at_or_below = np.searchsorted(_sort_keys(owners, above), keys, side="right") - before
    strictly_below = np.searchsorted(_sort_keys(owners, under), keys, side="left") - before
    return (at_or_below + strictly_below + 1) // 2


def _sort_keys(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Integers that sort like (row, value): the bits of positive float32 sort like the numbers."""
    return (rows << 32) | values.view(np.uint32).astype(np.int64)


VALUES = ("bins", "log1p")
_CHUNK = 4_000_000  # numbers in an array at a time
_ARRAYS = ("genes", "values", "indptr")


@dataclass(frozen=True)
class Tokens:
    """Sequences of tokens, end to end.

    Attributes
    ----------
    genes : ndarray of int32, shape (n,)
        Token ids. Each cell begins with `<cls>`; its genes follow in the order of columns.
    values : ndarray of int8 (bins) or float32 (log1p), shape (n,)
        `pad_value` for `<cls>`.
    indptr : ndarray of int64, shape (n_cells + 1,)
        Cell i is the slice from indptr[i] to before indptr[i + 1].
    n_tokens, pad_id, pad_value : int
        Size of the vocabulary; what padding is filled with.
    """

    genes: np.ndarray
    values: np.ndarray
    indptr: np.ndarray
    n_tokens: int
    pad_id: int
    pad_value: int

    def __post_init__(self):
        n = self.indptr[-1]
        if self.genes.shape != (n,) or self.values.shape != (n,):
            raise ValueError(
                f"tokens: expected {n} genes and values, got {self.genes.shape}, {self.values.shape}"
            )

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, `<cls>` included."""
        return np.diff(self.indptr)

    @property
    def hash(self) -> str:
        """sha256 of the content; in memory or memory-mapped, the same. Not kept: arrays can be written to."""
        digest = hashlib.sha256(json.dumps([self.n_tokens, self.pad_id, self.pad_value]).encode())
        for array in (getattr(self, name) for name in _ARRAYS):
            digest.update(f"{array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def without_cls(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Genes, values and indptr of the same cells with the first token of each, `<cls>`, left out."""
        is_gene = np.ones(len(self.genes), bool)
        is_gene[self.indptr[:-1]] = False
        return self.genes[is_gene], self.values[is_gene], self.indptr - np.arange(len(self.indptr))

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The cells at `index` as a block: genes (int64), values (float32) and padding (bool, True where none is).

        Each is (len(index), longest of these cells); padding is None where all are of one length.
        """
        at, padding = block_positions(self.indptr, index)
        genes = np.where(padding, self.pad_id, self.genes[at]).astype(np.int64)
        values = np.where(padding, self.pad_value, self.values[at]).astype(np.float32)
        return genes, values, padding if padding.any() else None


def tokenize(
    cells: Cells,
    token_ids: np.ndarray,
    vocabulary: Vocabulary,
    *,
    directory: str | os.PathLike | None = None,
    values: str = "bins",
    n_bins: int = 51,
    max_seq_len: int = 1200,
    pad_value: int = -2,
    target_sum: float = 1e4,
) -> Tokens:
    """Tokens of masked cells.

    Parameters
    ----------
    cells : Cells
    token_ids : ndarray of int, shape (n_genes,)
        Token of each gene, as `perturbret.scgpt.vocabulary.map_genes` finds them; -1 for a gene without one, which is
        left out.
    vocabulary : Vocabulary
    directory : path, optional
        Where to keep the tokens, memory-mapped: in a folder named by a hash of all that they depend on, this code
        included, and made once. By default they are in memory.
    values : str
        `bins`: 1 to n_bins - 1 by the cell's own quantiles; `log1p`: log(1 + count / total x target_sum).
    n_bins : int
        Bins, counting that of zero.
    max_seq_len : int
        Longest sequence, `<cls>` included. Of a cell with more genes, those with the smallest hash of cell name and
        token stay: a random choice that is the same whenever it is made.
    pad_value : int
        Value of `<cls>` and of padding.
    target_sum : float
        Total that counts are scaled to.

    Raises
    ------
    ValueError
        A setting is out of range; `token_ids` does not fit the cells, or holds a token twice, a special one, or one
        outside the vocabulary; a cell has counts and a total of 0.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from perturbret.data import Cells
    >>> from perturbret.scgpt import Vocabulary
    >>> vocabulary = Vocabulary(("HBG1", "KLF1", "<pad>", "<cls>", "<eoc>"), "two genes")
    >>> counts = csr_matrix(np.array([[1, 3], [0, 2]], np.float32))
    >>> cells = Cells(counts, np.array([4.0, 2.0]), np.array(["HBG1", "KLF1"]), np.array(["a", "b"]))
    >>> tokens = tokenize(cells, np.array([0, 1]), vocabulary)
    >>> [[vocabulary.tokens[i] for i in row] for row in tokens.padded(np.array([0, 1]))[0]]
    [['<cls>', 'HBG1', 'KLF1'], ['<cls>', 'KLF1', '<pad>']]
    """
    settings = _settings(values, n_bins, max_seq_len, pad_value, target_sum)
    token_ids = _check_token_ids(token_ids, cells, vocabulary)
    if directory is None:
        return _tokenize(cells, token_ids, vocabulary, settings, lambda name, n, dtype: np.empty(n, dtype))

    def make(folder: Path) -> None:
        def array(name, n, dtype):
            return open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(n,))

        np.save(folder / "indptr.npy", _tokenize(cells, token_ids, vocabulary, settings, array).indptr)

    key = {
        "code": code_hash("scgpt.tokens:_tokenize"),
        "cells": _content_hash(cells, token_ids),
        "vocabulary": vocabulary.hash,
        **settings,
    }
    folder = cached(directory, "tokens", key, make)
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
    return Tokens(*arrays, len(vocabulary), vocabulary.ids[PAD], pad_value)


def _tokenize(
    cells: Cells, token_ids: np.ndarray, vocabulary: Vocabulary, settings: Mapping, make: Callable
) -> Tokens:
    """Tokens in the arrays that make(name, size, dtype) gives; memory for a part of the cells at a time."""
    counts = cells.counts if cells.counts.has_sorted_indices else cells.counts.sorted_indices()
    known, room = token_ids != NO_TOKEN, settings["max_seq_len"] - 1
    present = csr_matrix((counts.data > 0, counts.indices, counts.indptr), counts.shape)
    sizes = present @ known.astype(np.int64)
    if (cells.totals[sizes > 0] <= 0).any():
        raise ValueError("totals: expected more than 0 for every cell with counts")
    indptr = np.concatenate([[0], np.cumsum(np.minimum(sizes, room) + 1)]).astype(np.int64)
    gene_seeds = np.zeros(len(vocabulary) if (sizes > room).any() else 0, np.uint64)
    if len(gene_seeds):
        gene_seeds[token_ids[known]] = name_seeds(vocabulary.tokens[i] for i in token_ids[known])
    genes = make("genes", int(indptr[-1]), np.int32)
    values = make("values", int(indptr[-1]), np.int8 if settings["values"] == "bins" else np.float32)
    for first, last in _chunks(counts.indptr):
        chunk = np.s_[counts.indptr[first] : counts.indptr[last]]
        kept = known[counts.indices[chunk]] & (counts.data[chunk] > 0)
        ids = token_ids[counts.indices[chunk][kept]]
        offsets = np.concatenate([[0], np.cumsum(sizes[first:last])])
        rows = np.repeat(np.arange(last - first), sizes[first:last])
        scale = (cells.totals[first:last] / settings["target_sum"]).astype(np.float32)
        found = np.log1p(counts.data[chunk][kept].astype(np.float32) / scale[rows])
        if settings["values"] == "bins":
            found = bin_values(found, offsets, settings["n_bins"])
        if (sizes[first:last] > room).any():
            chosen = _choose(cells.names[first:last], gene_seeds[ids], rows, offsets, room)
            ids, found = ids[chosen], found[chosen]
        begin, end = indptr[first], indptr[last]
        is_gene = np.ones(end - begin, bool)
        is_gene[indptr[first:last] - begin] = False
        _fill(genes[begin:end], is_gene, ids, vocabulary.ids[CLS])
        _fill(values[begin:end], is_gene, found, settings["pad_value"])
    return Tokens(genes, values, indptr, len(vocabulary), vocabulary.ids[PAD], settings["pad_value"])


def _fill(block: np.ndarray, is_gene: np.ndarray, tail: np.ndarray, head: int) -> None:
    block[is_gene] = tail
    block[~is_gene] = head


def _choose(names, gene_seeds, rows, offsets, room) -> np.ndarray:
    """True for the `room` genes of each cell whose hash of cell name and token name is smallest.

    Names, since a vocabulary cut down to a panel numbers the same tokens otherwise.
    """
    hashes = mix(gene_seeds ^ name_seeds(names)[rows])
    rank = np.empty(len(rows), np.int64)
    rank[np.lexsort((hashes, rows))] = np.arange(len(rows))
    return rank - offsets[rows] < room


def _chunks(indptr: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of cells, each of at least one, that need about the same memory."""
    load = indptr + 64 * np.arange(len(indptr))  # counts, and the edges of bins
    first = 0
    while first < len(indptr) - 1:
        last = max(int(np.searchsorted(load, load[first] + _CHUNK, side="right")) - 1, first + 1)
        yield first, last
        first = last


def _settings(values, n_bins, max_seq_len, pad_value, target_sum) -> dict:
    if values not in VALUES:
        raise ValueError(f"values: expected one of {', '.join(VALUES)}, got {values!r}")
    if not 3 <= n_bins <= 128:
        raise ValueError(f"n_bins: expected 3 to 128, got {n_bins!r}")
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len: expected 2 or more, got {max_seq_len!r}")
    if not -128 <= pad_value <= 0:
        raise ValueError(f"pad_value: expected -128 to 0, got {pad_value!r}")
    if not target_sum > 0:
        raise ValueError(f"target_sum: expected a positive number, got {target_sum!r}")
    return {
        "values": values,
        "n_bins": int(n_bins),
        "max_seq_len": int(max_seq_len),
        "pad_value": int(pad_value),
        "target_sum": float(target_sum),
    }


def _check_token_ids(token_ids, cells: Cells, vocabulary: Vocabulary) -> np.ndarray:
    token_ids = np.asarray(token_ids)
    if token_ids.shape != (cells.counts.shape[1],) or token_ids.dtype.kind not in "iu":
        raise ValueError(
            f"token_ids: expected an integer for each of {cells.counts.shape[1]} genes, got shape {token_ids.shape} "
            f"of {token_ids.dtype}"
        )
    known = token_ids[token_ids != NO_TOKEN]
    if known.min(initial=0) < 0 or known.max(initial=0) >= len(vocabulary):
        raise ValueError(
            f"token_ids: expected -1 to {len(vocabulary) - 1}, got {known.min()} to {known.max()}"
        )
    if np.isin([vocabulary.ids[PAD], vocabulary.ids[CLS]], known).any():
        raise ValueError(f"token_ids: expected tokens of genes, got that of {PAD} or {CLS}")
    ids, uses = np.unique(known, return_counts=True)
    if (uses > 1).any():
        raise ValueError(
            f"token_ids: expected each token once, token {ids[uses > 1][0]} belongs to several genes"
        )
    return token_ids.astype(np.int64)


def _content_hash(cells: Cells, token_ids: np.ndarray) -> str:
    """sha256 over what tokens are made from: names, counts, totals, and the genes' tokens."""
    digest = hashlib.sha256("\0".join(map(str, cells.names)).encode())
    counts = cells.counts
    for array in (counts.indptr.astype(np.int64), counts.indices, counts.data, cells.totals, token_ids):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
