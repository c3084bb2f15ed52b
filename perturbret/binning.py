"""Bins of expression values by the quantiles of their own cell, as scGPT makes them.

Source: scgpt 0.2.4, `scgpt.preprocess.binning`, which tests compare with; docs/method.md says what differs.
"""

import numpy as np


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
    keys = _keys(rows, values)
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
    at_or_below = np.searchsorted(_keys(owners, above), keys, side="right") - before
    strictly_below = np.searchsorted(_keys(owners, under), keys, side="left") - before
    return (at_or_below + strictly_below + 1) // 2


def _keys(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Integers that sort like (row, value): the bits of positive float32 sort like the numbers."""
    return (rows << 32) | values.view(np.uint32).astype(np.int64)
