"""Take the counts of perturbed genes out of cells, before anything is normalised or fitted.

Whether a gene that was targeted is low or high tells the condition without any biology. Three policies:

- `none`: counts as measured.
- `own_targets`: each cell loses the genes that its own condition targets. Which genes are empty then tells
  the condition, so a score under this policy may be leak alone; it is here to show that, and is in `UNSAFE`.
- `all_targets`: every cell, controls too, loses the targets of all conditions. The default.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from .conditions import CTRL
from .targets import match_targets

POLICIES = ("none", "own_targets", "all_targets")
UNSAFE = ("own_targets",)


def target_columns(
    conditions: Sequence[str], genes: Sequence[str], *, resolver=None, extra: Mapping | None = None
) -> dict[str, np.ndarray]:
    """Measured columns that each condition targets; see `perturbret.data.targets.match_targets`.

    Parameters
    ----------
    conditions : sequence of str
        Canonical. Controls get no columns.
    genes : sequence of str, length n_genes
    resolver : perturbret.data.genes.SymbolResolver, optional
        None: exact names only.
    extra : mapping of condition to gene symbols, optional
        Masked as if they were targets too. Entries of other conditions are left out.

    Returns
    -------
    dict of str to ndarray of int
        Sorted unique columns; empty where no target is measured. One key per distinct condition.

    Examples
    --------
    >>> columns = target_columns(["KLF1", "BAK1+KLF1", "ctrl"], ["HBG1", "KLF1", "BAK1"])
    >>> {condition: hit.tolist() for condition, hit in columns.items()}
    {'BAK1+KLF1': [1, 2], 'KLF1': [1]}
    """
    return match_targets(conditions, genes, resolver=resolver, extra=extra).columns


def mask_counts(counts: csr_matrix, conditions: Sequence[str], columns: Mapping, policy: str) -> csr_matrix:
    """A copy of `counts` without the entries that `policy` takes out.

    Parameters
    ----------
    counts : csr_matrix, shape (n_cells, n_genes)
        Raw counts; not changed.
    conditions : sequence of str, length n_cells
        Canonical, real or permuted: `own_targets` masks each cell by the condition given here.
    columns : mapping of condition to array of int
        From `target_columns`. `all_targets` masks the union over all of them.
    policy : str
        One of `POLICIES`.

    Returns
    -------
    csr_matrix, shape (n_cells, n_genes)
        Same dtype; masked entries are absent, and no zeros are stored.

    Raises
    ------
    ValueError
        `policy` is unknown; `conditions` does not fit `counts`; a condition other than `ctrl` is not in
        `columns` (under `none` nothing is looked up).

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> counts = csr_matrix(np.array([[5, 1, 2], [3, 4, 6]], np.float32))
    >>> conditions, columns = ["KLF1", "BAK1"], {"KLF1": np.array([0]), "BAK1": np.array([1])}
    >>> mask_counts(counts, conditions, columns, "all_targets").toarray()
    array([[0., 0., 2.],
           [0., 0., 6.]], dtype=float32)
    >>> mask_counts(counts, conditions, columns, "own_targets").toarray()
    array([[0., 1., 2.],
           [3., 0., 6.]], dtype=float32)
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {POLICIES}, got {policy!r}")
    n_cells, n_genes = counts.shape
    if len(conditions) != n_cells:
        raise ValueError(f"conditions: expected {n_cells}, one per cell, got {len(conditions)}")
    drop = counts.data == 0
    if policy != "none":
        codes, names = pd.factorize(np.asarray(conditions, dtype=object))
        unknown = sorted(str(name) for name in names if name != CTRL and name not in columns)
        if unknown:
            raise ValueError(
                f"conditions: expected only those of `columns` and {CTRL!r}, got {len(unknown)} others "
                f"(first: {unknown[0]!r})"
            )
        union = np.zeros(n_genes, dtype=bool)
        for hit in columns.values():
            union[hit] = True
        in_union = union[counts.indices]
        if policy == "all_targets":
            drop |= in_union
        else:
            own = [
                code * n_genes + np.asarray(columns.get(name, ()), np.int64)
                for code, name in enumerate(names)
            ]
            # Only entries in the union can be a cell's own target: look up those few by (condition, column).
            entries = np.flatnonzero(in_union)
            rows = np.searchsorted(counts.indptr, entries, side="right") - 1
            keys = codes[rows].astype(np.int64) * n_genes + counts.indices[entries]
            drop[entries[_in_sorted(keys, np.sort(np.concatenate([*own, np.empty(0, np.int64)])))]] = True
    return _without(counts, drop)


def mask_totals(totals: np.ndarray, counts: csr_matrix, masked: csr_matrix) -> np.ndarray:
    """Totals of cells without the masked counts, so that the size factor does not tell what was taken out.

    Parameters
    ----------
    totals : array, shape (n_cells,)
        UMIs per cell, over at least the columns of `counts`.
    counts, masked : csr_matrix, shape (n_cells, n_genes)
        Before and after `mask_counts`.

    Returns
    -------
    ndarray of float64, shape (n_cells,)
        totals - (row sums of counts - row sums of masked)

    Raises
    ------
    ValueError
        More counts were masked than a cell's total holds: the totals are not of these counts.
    """
    totals = np.asarray(totals, dtype=np.float64)
    removed = _row_sums(counts) - _row_sums(masked)
    short = np.flatnonzero(totals < removed)
    if len(short):
        first = short[0]
        raise ValueError(
            f"totals: expected at least the masked counts of each cell, got less for {len(short)} cells "
            f"(first: cell {first}, total {totals[first]:g}, masked {removed[first]:g})"
        )
    return totals - removed


def _in_sorted(values: np.ndarray, sorted_set: np.ndarray) -> np.ndarray:
    """As np.isin, without sorting `values`: four times as fast for millions of them in a set of hundreds."""
    if not len(sorted_set):
        return np.zeros(len(values), dtype=bool)
    places = np.searchsorted(sorted_set, values)
    return sorted_set[np.minimum(places, len(sorted_set) - 1)] == values


def _without(counts: csr_matrix, drop: np.ndarray) -> csr_matrix:
    dropped = np.flatnonzero(drop)
    if len(dropped) == 0:
        return counts.copy()
    indptr = counts.indptr - np.searchsorted(dropped, counts.indptr).astype(counts.indptr.dtype)
    keep = ~drop
    result = csr_matrix((counts.data[keep], counts.indices[keep], indptr), shape=counts.shape)
    result.has_sorted_indices = counts.has_sorted_indices
    return result


def _row_sums(counts: csr_matrix) -> np.ndarray:
    sums = np.zeros(counts.shape[0])
    filled = np.flatnonzero(np.diff(counts.indptr))
    if len(filled):
        # reduceat gives an entry of the next row for an empty one, hence only rows that hold something.
        sums[filled] = np.add.reduceat(counts.data, counts.indptr[filled], dtype=np.float64)
    return sums
