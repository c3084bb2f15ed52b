"""Are these values UMI counts? And if they are log1p-normalised counts: which counts were they?"""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

# float32 holds every whole number up to here; beyond it, neighbouring counts become equal.
EXACT_LIMIT = 2**24

# Rows per block: a block of 8,192 cells with 5,000 expressed genes each needs 0.5 GB of temporaries.
_ROWS = 8192

# Fewer cells tell nothing about how counts are spread.
_FEW_CELLS = 20

# Largest count tried for the smallest nonzero value of a cell.
_MAX_SMALLEST = 64


class CountsError(ValueError):
    """Values that are not UMI counts, or from which counts cannot be recovered."""


def check_counts(matrix: csr_matrix, *, name: str, cells: np.ndarray, genes: np.ndarray) -> csr_matrix:
    """Validate the stored values of a sparse matrix as counts.

    Parameters
    ----------
    matrix : csr_matrix, shape (n_cells, n_genes)
        Any numeric type.
    name : str
        What the values are, for messages (`layers['counts']`).
    cells, genes : ndarray of str
        Names, for messages.

    Returns
    -------
    csr_matrix of float32
        The same values; no explicit zeros, sorted column indices.

    Raises
    ------
    CountsError
        A value is NaN, infinite, negative, no whole number, or 2**24 or more; values of an 8- or 16-bit type
        reach its limit. Names the first such value, its cell and gene, and how many there are.
    """
    data = matrix.data
    kind = data.dtype.kind
    if kind not in "iuf":
        raise CountsError(f"{name}: expected numbers, got values of type {data.dtype}")
    small = kind in "iu" and data.dtype.itemsize <= 2
    overflow = (
        f"; counts above {np.iinfo(data.dtype).max} do not fit {data.dtype} and wrap around" if small else ""
    )

    def refuse(bad: np.ndarray, expected: str, hint: str = "") -> None:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            row = int(np.searchsorted(matrix.indptr, first, side="right")) - 1
            raise CountsError(
                f"{name}: expected {expected}, got {data[first]!s} in cell {str(cells[row])!r}, gene "
                f"{str(genes[matrix.indices[first]])!r} ({int(bad.sum())} of the {len(data)} values checked){hint}"
            )

    if kind == "f":
        refuse(np.isnan(data), "counts", "; NaN is not a count")
        refuse(np.isinf(data), "finite counts")
    if kind != "u":
        refuse(data < 0, "counts of at least 0", overflow or "; scaled or centred values are not counts")
    if kind == "f":
        log = "; these look like log1p-normalised values" if len(data) and data.max() < 20 else ""
        refuse(data != np.rint(data), "whole numbers", log)
    if small:
        refuse(data == np.iinfo(data.dtype).max, f"counts below the limit of {data.dtype}", overflow)
    refuse(data >= EXACT_LIMIT, f"counts below 2**24 = {EXACT_LIMIT}", "; float32 does not hold them exactly")
    checked = csr_matrix((data.astype(np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)
    # What follows works in place, and indices are the caller's.
    if not checked.has_canonical_format or (data == 0).any():
        checked = checked.copy()
    checked.sum_duplicates()
    checked.eliminate_zeros()
    return checked


def scaled_counts(counts: csr_matrix) -> str:
    """Why whole numbers look like normalised counts that were rounded; '' where they look like counts.

    Two traces are looked for. Cells whose counts were multiplied by 1.5 or more lack whole numbers between the
    multiples: the one above their smallest value never occurs. And cells that were brought to one total differ less
    in it than cells do: by less than chance alone allows, or by little although they differ much otherwise. The
    totals of cells in droplets are spread by 30% and more, those of rounded values by 0.2 to 10% (measured on six
    public data sets). Totals that are equal in most cells are those of counts drawn down to one depth, which stay
    counts.

    Parameters
    ----------
    counts : csr_matrix, shape (n_cells, n_genes)
        Whole numbers, no explicit zeros.
    """
    filled = np.flatnonzero(np.diff(counts.indptr))
    if len(filled) < _FEW_CELLS:
        return ""
    starts, sizes = counts.indptr[filled], np.diff(counts.indptr)[filled]
    smallest = np.minimum.reduceat(counts.data, starts)
    least = np.repeat(smallest, sizes)
    at_smallest = np.add.reduceat((counts.data == least).astype(int), starts)
    above = np.add.reduceat((counts.data == least + 1).astype(int), starts)
    telling = at_smallest >= 3
    gaps = telling & (smallest > 1) & (above == 0)
    if telling.sum() >= _FEW_CELLS and gaps.sum() > 0.2 * telling.sum():
        return (
            f"in {int(gaps.sum())} of {int(telling.sum())} cells the smallest value is 2 or more and the next whole "
            "number never occurs, as in multiples of a scale"
        )
    sums = np.add.reduceat(counts.data, starts, dtype=np.float64)
    middle = np.median(sums)
    # Of the middle half, so that a few odd cells do not hide the others; 1.349 standard deviations of a normal.
    spread = (np.quantile(sums, 0.75) - np.quantile(sums, 0.25)) / 1.349
    if middle < 100 or np.mean(sums == middle) > 0.5 or spread > 0.12 * middle:
        return ""
    ones = np.add.reduceat((counts.data == 1).astype(int), starts) / sizes
    # In counts of one depth, the share of ones differs between cells by chance alone: at most by 0.11 of 20 genes.
    uneven = np.std(ones[sizes >= 20]) > 0.15 if (sizes >= 20).sum() >= _FEW_CELLS else False
    by_chance = np.sqrt(middle)
    # The spread of n cells is known within 1.2 / sqrt(n) of itself.
    if (
        spread < (1 - 4 / np.sqrt(len(sums))) * by_chance
        or uneven
        or (middle >= 2000 and spread > 4.5 * by_chance)
    ):
        return (
            f"cells have nearly the same total, {middle:g} with a spread of {spread / middle:.1%}; cells differ by 30% "
            "and more unless they are scaled to one total"
        )
    return ""


@dataclass(frozen=True)
class Recovered:
    """Counts rebuilt from log1p-normalised values.

    Attributes
    ----------
    counts : csr_matrix of float32, shape (n_cells, n_genes)
    scale : ndarray, shape (n_cells,)
        expm1 of a value is `scale` * count; 0 for empty cells.
    evidence : dict
        JSON-able: method, residuals, tolerance, agreement with known totals.
    """

    counts: csr_matrix
    scale: np.ndarray
    evidence: dict


def recover(values: csr_matrix, *, totals: np.ndarray | None = None, name: str = "X") -> Recovered:
    """Integer counts k of log1p-normalised values x = log1p(s k), with one scale s per cell.

    The smallest nonzero value of a cell is taken as 1, 2, 3, ... counts, until all its values are whole
    multiples of one scale, within the precision that the values are stored with. A multiple of these counts
    would fit as well: known `totals` settle which one, since s * total is nearly the same in all cells.
    Without them the smallest whole numbers are taken, and a cell with one distinct value, where any scale
    fits, is refused.

    Parameters
    ----------
    values : csr_matrix of float, shape (n_cells, n_genes)
        Natural logarithm of 1 + scaled counts.
    totals : ndarray, shape (n_cells,), optional
        UMIs of each cell over the whole transcriptome.
    name : str
        What the values are, for messages.

    Returns
    -------
    Recovered
        `evidence["residual_log"]` is the largest |x - log1p(s k)|; it is at most `evidence["tolerance_log"]`.

    Raises
    ------
    CountsError
        The values are not log1p-normalised counts, or are stored too coarsely to tell the counts.
    """
    if not isinstance(values, csr_matrix):
        values = csr_matrix(values)
    _check_log_values(values.data, name)
    decimals = _stored_decimals(values.data)
    # Values that passed through float32 arithmetic are off by a few of its units, however they are stored.
    tolerance = 8 * float(np.finfo(np.float32).eps) * max(1.0, float(values.data.max(initial=0)))
    if decimals is not None:
        tolerance = max(tolerance, 0.51 * 10.0**-decimals)

    counts = np.zeros(values.nnz)
    scale = np.zeros(values.shape[0])
    start = 0
    while start < values.shape[0]:
        # A small first block, so that values of another kind are refused at once.
        rows = slice(start, min(start + (_ROWS if start else _ROWS // 32 or 1), values.shape[0]))
        entries = slice(values.indptr[rows.start], values.indptr[rows.stop])
        indptr = values.indptr[rows.start : rows.stop + 1] - entries.start
        x = values.data[entries].astype(np.float64)
        counts[entries], scale[rows] = _smallest_counts(x, indptr, tolerance)
        _refuse_failures(x, indptr, scale[rows], start, tolerance, name)
        start = rows.stop

    settled = _settle_multiples(counts, scale, values.indptr, totals)
    filled = np.diff(values.indptr) > 0
    per_value = np.repeat(scale, np.diff(values.indptr))
    exact = values.data.astype(np.float64)
    residual = float(np.abs(exact - np.log1p(per_value * counts)).max(initial=0))
    off = float(np.abs(np.expm1(exact) / np.where(per_value > 0, per_value, 1) - counts).max(initial=0))
    evidence = {
        "method": "smallest whole numbers per cell" + (", multiple settled by totals" if settled else ""),
        "n_cells": int(filled.sum()),
        "n_values": int(values.nnz),
        "stored_decimals": decimals,
        "tolerance_log": tolerance,
        "residual_log": residual,
        "residual_counts": off,
        "largest_count": float(counts.max(initial=0)),
        **settled,
    }
    rebuilt = csr_matrix((counts.astype(np.float32), values.indices, values.indptr), shape=values.shape)
    return Recovered(rebuilt, scale, evidence)


def _check_log_values(data: np.ndarray, name: str) -> None:
    if data.dtype.kind != "f":
        raise CountsError(
            f"{name}: expected log1p-normalised values, got type {data.dtype}: are they counts?"
        )
    if not np.isfinite(data).all():
        raise CountsError(
            f"{name}: expected finite values, got {int((~np.isfinite(data)).sum())} NaN or infinite ones"
        )
    if (data < 0).any():
        raise CountsError(
            f"{name}: expected log1p-normalised values, got {int((data < 0).sum())} negative ones "
            f"(smallest {data.min():g}): scaled or centred values do not tell counts"
        )
    if len(data) and (data == np.rint(data)).all():
        raise CountsError(f"{name}: expected log1p-normalised values, got whole numbers: read them as counts")


def _stored_decimals(data: np.ndarray) -> int | None:
    """Decimals that all values are rounded to (2 to 5), or None where they are not rounded."""
    for decimals in range(2, 6):
        noise = 4 * np.finfo(np.float32).eps * max(1.0, float(data.max(initial=0)))
        if np.abs(data - np.round(data.astype(np.float64), decimals)).max(initial=0) <= noise:
            return decimals
    return None


def _smallest_counts(x: np.ndarray, indptr: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts per value and scale per row; scale 0 where no scale makes a row's values whole multiples."""
    sizes = np.diff(indptr)
    filled = np.flatnonzero(sizes)
    counts, scale = np.zeros(len(x)), np.zeros(len(sizes))
    if not len(filled):
        return counts, scale
    least, most = np.expm1(x - tolerance), np.expm1(x + tolerance)
    starts = indptr[filled].astype(np.int64)
    smallest_least, smallest_most = np.minimum.reduceat(least, starts), np.minimum.reduceat(most, starts)
    open_rows = np.arange(len(filled))
    for multiple in range(1, _MAX_SMALLEST + 1):
        size = sizes[filled[open_rows]]
        first = np.cumsum(size) - size
        flat = np.repeat(starts[open_rows] - first, size) + np.arange(size.sum())
        low, high = smallest_least[open_rows] / multiple, smallest_most[open_rows] / multiple
        k, good, low, high = _narrow(least[flat], most[flat], first, size, low, high)
        s = (low + high) / 2
        # A value passes for a multiple by chance the more easily, the coarser it is stored for its count.
        fine = (tolerance * (k + 1 / np.repeat(s, size)) < 0.25) & (k < EXACT_LIMIT)
        good &= np.logical_and.reduceat(fine, first)
        rows = open_rows[good]
        scale[filled[rows]] = s[good]
        counts[flat[np.repeat(good, size)]] = k[np.repeat(good, size)]
        open_rows = open_rows[~good]
        if not len(open_rows):
            break
    return counts, scale


def _narrow(least, most, first, size, low, high):
    """Narrow each row's bounds on its scale by every value that only one count fits, until nothing changes.

    `least` and `most` bound scale * count of each value; the values of row i are `size[i]` from `first[i]` on.
    Returns the counts, whether each row has one count per value, and the bounds.
    """
    while True:
        fewest = np.maximum(np.ceil(least / np.repeat(high, size)), 1)
        k = np.floor(most / np.repeat(low, size))
        single = k == fewest
        lower = np.maximum(low, np.maximum.reduceat(np.where(single, least / k, 0), first))
        higher = np.minimum(high, np.minimum.reduceat(np.where(single, most / k, np.inf), first))
        contradicted = np.logical_or.reduceat(k < fewest, first) | (lower > higher)
        # Contradicted rows keep their bounds, so that they do not go on narrowing.
        lower, higher = np.where(contradicted, low, lower), np.where(contradicted, high, higher)
        if not ((lower > low) | (higher < high)).any():
            return k, np.logical_and.reduceat(single, first) & ~contradicted, low, high
        low, high = lower, higher


def _refuse_failures(
    x: np.ndarray, indptr: np.ndarray, scale: np.ndarray, start: int, tolerance, name
) -> None:
    failed = np.flatnonzero((np.diff(indptr) > 0) & (scale == 0))
    if len(failed):
        values = np.sort(x[indptr[failed[0]] : indptr[failed[0] + 1]])
        shown = ", ".join(f"{ratio:.4g}" for ratio in np.unique(np.expm1(values) / np.expm1(values[0]))[:6])
        raise CountsError(
            f"{name}: expected log1p-normalised counts, but no scale makes expm1(x) whole within {tolerance:.2g} of "
            f"x in {len(failed)} of the {len(scale)} cells from row {start} on (first in row {start + failed[0]}, "
            f"relative to its smallest value: {shown}, ...); counts cannot be recovered exactly"
        )


def _settle_multiples(
    counts: np.ndarray, scale: np.ndarray, indptr: np.ndarray, totals: np.ndarray | None
) -> dict:
    """Multiply cells whose smallest counts contradict their known totals, in place; returns the evidence."""
    sizes = np.diff(indptr)
    filled = np.flatnonzero(sizes)
    if not len(filled):
        return {}
    starts = indptr[filled]
    single = np.maximum.reduceat(counts, starts) == np.minimum.reduceat(counts, starts)
    if totals is None:
        if single.any():
            raise CountsError(
                f"counts cannot be recovered: {int(single.sum())} of {len(filled)} cells have one distinct "
                "nonzero value, which fits any scale; give total_key, the column with each cell's UMIs"
            )
        return {}
    ratio = np.asarray(totals, np.float64)[filled] * scale[filled]
    ratio /= np.median(ratio[~single]) if (~single).any() else np.median(ratio)
    multiple = np.maximum(np.rint(ratio), 1)
    spread = np.abs(ratio / multiple - 1)
    # Half-way between two multiples nothing is settled: far enough from it, or it does not matter.
    if (spread > 0.5 / (multiple + 1)).any():
        worst = float(ratio[np.argmax(spread * (multiple + 1))])
        raise CountsError(
            "the known totals contradict the recovered counts: total x scale is expected to be nearly equal "
            f"in all cells, got {worst:.3g} times its median in one; check total_key, or leave it out"
        )
    counts *= np.repeat(multiple, sizes[filled])
    scale[filled] /= multiple
    return {
        "n_cells_settled_by_totals": int((multiple > 1).sum()),
        "total_times_scale_median": float(np.median(scale[filled] * np.asarray(totals)[filled])),
        "total_times_scale_spread": float(spread.max()),
    }
