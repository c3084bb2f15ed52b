"""Features of masked cells that encoders start from: normalised expression, depth, batch, given embeddings."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_matrix, hstack

from .prepare import Cells

NAMES = ("constant", "log1p", "log1p_depth", "counts", "depth", "batch", "obsm:<key>")


def compute_features(name: str, cells: Cells, settings: Mapping) -> csr_matrix | np.ndarray:
    """Features `name` of every cell, one row per cell, each row a function of that cell alone.

    Parameters
    ----------
    name : str
        `constant`: one column of ones. `log1p`, `depth`: see the functions of that name; `log1p` takes `target_sum`
        from `settings`, and `columns` where only some genes are to be used. `log1p_depth`: the same, then the two
        columns of `depth`. `counts`: UMIs, of `columns` where given, then the cell's total. `batch`: one column per
        batch in `settings["batches"]`, 1 for the cell's own. `obsm:<key>`: the given embedding.
    cells : Cells
    settings : mapping

    Returns
    -------
    csr_matrix (for log1p, log1p_depth and counts) or ndarray, float32, shape (n, p)

    Raises
    ------
    ValueError
        Unknown name, or the cells have no such embedding.
    """
    if name == "constant":
        return np.ones((len(cells), 1), np.float32)
    if name in ("log1p", "log1p_depth", "counts"):
        values = cells.counts if name == "counts" else log1p(cells, settings["target_sum"])
        values = values if settings.get("columns") is None else values[:, settings["columns"]]
        if name == "log1p":
            return values
        more = depth(cells) if name == "log1p_depth" else cells.totals[:, None].astype(np.float32)
        return hstack([values, csr_matrix(more)], format="csr")
    if name == "depth":
        return depth(cells)
    if name == "batch":
        return one_hot(cells, settings["batches"])
    if name.startswith("obsm:"):
        key = name.removeprefix("obsm:")
        if key not in cells.obsm:
            raise ValueError(f"obsm: expected one of {sorted(cells.obsm)}, got {key!r}")
        values = np.asarray(cells.obsm[key], np.float32)
        return values.reshape(len(cells), -1)
    raise ValueError(f"features: expected one of {NAMES}, got {name!r}")


def log1p(cells: Cells, target_sum: float) -> csr_matrix:
    """log(1 + counts / total * target_sum), the total being that of the whole transcriptome where it is known.

    On a panel of few genes the panel's own sum is a poor size factor: it cost 3 points of exact_hit@1 on real
    cells with 15 detected genes of 500 (docs/log.md).
    """
    scale = target_sum / np.where(cells.totals > 0, cells.totals, 1.0)
    values = np.log1p(cells.counts.data * np.repeat(scale, np.diff(cells.counts.indptr)))
    return csr_matrix(
        (values.astype(np.float32), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape
    )


def depth(cells: Cells) -> np.ndarray:
    """log(1 + total) and log(1 + number of detected genes): all that shows of a cell but its expression."""
    detected = np.diff(cells.counts.indptr)
    return np.log1p(np.column_stack([cells.totals, detected])).astype(np.float32)


def one_hot(cells: Cells, batches: Sequence[str]) -> np.ndarray:
    """A row of zeros for a batch that is not listed; one column of ones where the screen has no batches."""
    if cells.batch is None or not len(batches):
        return np.ones((len(cells), 1), np.float32)
    return (cells.batch[:, None] == np.asarray(batches, str)).astype(np.float32)
