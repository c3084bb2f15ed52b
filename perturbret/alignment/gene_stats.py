"""Mean, variance and detection of each gene over cells that come in chunks, exact and in bounded memory."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from ..data.counts import CountsError, check_counts

# UMIs that every cell is scaled to.
TARGET_SUM = 1e4


@dataclass(frozen=True, eq=False)
class GeneStats:
    """Moments of normalised counts, in counts per 10,000 UMIs of the cell (CP10k), no logarithm taken.

    Attributes
    ----------
    n_cells : int
    mean : ndarray of float64, shape (n_genes,)
        CP10k.
    variance : ndarray of float64, shape (n_genes,)
        CP10k squared; of the population (divided by n_cells, not n_cells - 1), so that the law of total variance
        holds exactly between datasets.
    n_detected : ndarray of int64, shape (n_genes,)
        Cells with at least one count.
    noise : float
        CP10k. Variance over mean that counting alone gives every gene: the mean over cells of 10,000 / total.
    fingerprint : str
        sha256 of the counts and totals of all columns that were read; the size of chunks does not matter.
    """

    n_cells: int
    mean: np.ndarray
    variance: np.ndarray
    n_detected: np.ndarray
    noise: float
    fingerprint: str


def stream_stats(
    chunks: Iterable[tuple[csr_matrix, np.ndarray | None]],
    n_columns: int,
    *,
    collapse: csr_matrix | None = None,
    name: str = "counts",
) -> GeneStats:
    """Moments of genes over cells in one pass.

    Within a chunk the mean is taken first and the squared deviations from it second; chunks are merged by the
    update of Chan, Golub and LeVeque (1983), so that nothing cancels however large the mean is. Everything is
    float64, and memory is that of one chunk and a few numbers per gene.

    Parameters
    ----------
    chunks : iterable of (matrix of shape (n, n_columns), array of shape (n,) or None)
        Counts, sparse or dense and of any numeric type, as `canonical_counts` reads them; and UMIs of the cells over
        the whole transcriptome, None for the sums over the columns.
    n_columns : int
    collapse : csr_matrix, shape (n_columns, n_genes), optional
        Ones where a column belongs to a gene: columns of one gene are summed before anything is computed, and
        columns of none are read for the totals only. None: each column is a gene.
    name : str
        What the counts are, for messages.

    Raises
    ------
    ValueError
        No cells; a chunk with another number of columns; values that are no counts (CountsError); a cell with counts
        and no positive, finite total.
    """
    n_genes = n_columns if collapse is None else collapse.shape[1]
    collapse = None if collapse is None else collapse.astype(np.float64)
    n_cells, inverse_totals = 0, 0.0
    mean, squares = np.zeros(n_genes), np.zeros(n_genes)
    n_detected = np.zeros(n_genes, np.int64)
    # One digest for each array, so that the boundaries of chunks leave no trace.
    digests = [hashlib.sha256() for _ in range(4)]
    for counts, totals in chunks:
        counts = canonical_counts(counts, name=name, start=n_cells)
        if counts.shape[1] != n_columns:
            raise ValueError(f"{name}: expected chunks of {n_columns} columns, got {counts.shape[1]}")
        if not counts.shape[0]:
            continue
        scale, totals = _scale(counts, totals, name, n_cells)
        _update(digests, counts, totals)
        inverse_totals += float(scale.sum())
        merged = counts.astype(np.float64) if collapse is None else (counts @ collapse).tocsr()
        columns, n = merged.indices, counts.shape[0]
        values = merged.data * np.repeat(scale, np.diff(merged.indptr))
        chunk_detected = np.bincount(columns, minlength=n_genes)
        chunk_mean = np.bincount(columns, values, minlength=n_genes) / n
        deviations = values - chunk_mean[columns]
        # Not in place: bincount of nothing is of whole numbers, weights or not.
        chunk_squares = np.bincount(columns, deviations * deviations, minlength=n_genes)
        chunk_squares = chunk_squares + (n - chunk_detected) * chunk_mean**2
        total = n_cells + n
        difference = chunk_mean - mean
        mean += difference * (n / total)
        squares += chunk_squares + difference**2 * (n_cells * n / total)
        n_detected += chunk_detected
        n_cells = total
    if not n_cells:
        raise ValueError(f"{name}: expected at least one cell, got none")
    fingerprint = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    return GeneStats(n_cells, mean, squares / n_cells, n_detected, inverse_totals / n_cells, fingerprint)


def pool_stats(
    where: Mapping[str, Sequence[Sequence[int]]],
    stats: Mapping[str, GeneStats],
    *,
    weights: str = "cells",
    between: bool = False,
    subtract_noise: bool = True,
) -> pd.DataFrame:
    """Statistics of genes over datasets; the formulas are those of `perturbret.alignment.panels.align`.

    Parameters
    ----------
    where : mapping of dataset to columns of each gene
        Empty where the dataset does not measure it: it then has no weight for that gene.
    stats : mapping of dataset to GeneStats
    weights, between, subtract_noise
        As for `align`.

    Returns
    -------
    DataFrame
        One row per gene: `mean`, `variance_within`, `variance_between`, `dispersion` (0 where the mean is),
        `percent_cells`, `n_datasets`.
    """
    names = list(where)
    measured = np.array([[len(found) > 0 for found in where[name]] for name in names])
    per_dataset = np.array([stats[name].n_cells if weights == "cells" else 1.0 for name in names])
    share = measured * per_dataset[:, None]
    share = share / share.sum(axis=0)
    mean, variance = (
        np.stack([getattr(stats[name], part) for name in names]) for part in ("mean", "variance")
    )
    noise = np.array([stats[name].noise for name in names])[:, None]
    rate = np.stack([stats[name].n_detected / stats[name].n_cells for name in names])
    pooled = (share * mean).sum(axis=0)
    within = (share * variance).sum(axis=0)
    spread = (share * (mean - pooled) ** 2).sum(axis=0)
    above = within + spread * between - (share * mean * noise).sum(axis=0) * subtract_noise
    return pd.DataFrame(
        {
            "mean": pooled,
            "variance_within": within,
            "variance_between": spread,
            "dispersion": np.divide(above, pooled, out=np.zeros_like(above), where=pooled > 0),
            "percent_cells": 100 * (share * rate).sum(axis=0),
            "n_datasets": measured.sum(axis=0),
        }
    )


def canonical_counts(counts, *, name: str, start: int = 0) -> csr_matrix:
    """The same counts with sorted, unique indices and no stored zeros; the argument is not changed.

    Parameters
    ----------
    counts : scipy.sparse matrix or array, or ndarray, shape (n_cells, n_genes)
        Whole numbers of any type; duplicate entries are summed in float64.
    name : str
        What the counts are, for messages.
    start : int
        Number of the first row, for messages.

    Raises
    ------
    CountsError
        No numbers in two dimensions; a value is not finite, negative or no whole number.
    """
    counts = counts if issparse(counts) else np.asarray(counts)
    if counts.ndim != 2 or counts.dtype.kind not in "biuf":
        raise CountsError(
            f"{name}: expected numbers of shape (cells, genes), got {counts.dtype} of shape {counts.shape}"
        )
    # Wide before anything is summed: duplicate entries of int16 wrap around.
    if not isinstance(counts, csr_matrix):
        counts = csr_matrix(counts.astype(np.float64))
    data = counts.data
    # NaN fails the first comparison, since the smallest of numbers with NaN is NaN.
    plain = data.min(initial=0) >= 0 and data.max(initial=0) < np.inf
    if not plain or (data.dtype.kind == "f" and (np.rint(data) != data).any()):
        rows = np.array([f"row {start + i}" for i in range(counts.shape[0])])
        columns = np.array([f"column {i}" for i in range(counts.shape[1])])
        check_counts(counts, name=name, cells=rows, genes=columns)  # raises, and says where
    if not counts.has_canonical_format:
        counts = counts.astype(np.float64)
        counts.sum_duplicates()
    if (counts.data == 0).any():
        counts = counts.copy()
        counts.eliminate_zeros()
    return counts


def _scale(counts: csr_matrix, totals, name: str, start: int) -> tuple[np.ndarray, np.ndarray]:
    """10,000 / total of each cell, 0 for cells without counts; and the totals."""
    sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    totals = sums if totals is None else np.asarray(totals, np.float64)
    bad = (sums > 0) & ~((totals > 0) & np.isfinite(totals))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{name}: expected a positive total of every cell with counts, got {totals[row]} in row {start + row}"
        )
    usable = (totals > 0) & np.isfinite(totals)
    return np.where(usable, TARGET_SUM / np.where(usable, totals, 1.0), 0.0), totals


def _update(digests: list, counts: csr_matrix, totals: np.ndarray) -> None:
    for digest, array, kind in zip(
        digests,
        (np.diff(counts.indptr), counts.indices, counts.data, totals),
        (np.int64, np.int64, np.float64, np.float64),
        strict=True,
    ):
        digest.update(np.ascontiguousarray(array, dtype=kind).data)
