"""Read what a screen needs out of an h5ad file, matrices in blocks of rows, never dense as a whole."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse, vstack

# Values in a dense block of rows: 64 MB of float32.
_BLOCK = 1 << 24
_ROWS = 8192


@dataclass(frozen=True)
class Source:
    """Parts of an AnnData object; the matrices may lie in memory or in an open file.

    Attributes
    ----------
    obs, var : pandas.DataFrame
    matrices : mapping of name to matrix
        `X`, `raw` and the layers by their own names.
    raw_var : pandas.DataFrame or None
        The genes of `raw`.
    obsm : mapping of name to array
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    matrices: Mapping[str, Any]
    raw_var: pd.DataFrame | None
    obsm: Mapping[str, Any]

    @property
    def layers(self) -> list[str]:
        """Names of the layers."""
        return sorted(set(self.matrices) - {"X", "raw"})


def from_anndata(adata: Any) -> Source:
    """The parts of an AnnData object, in memory or backed."""
    matrices = {name: adata.layers[name] for name in adata.layers}
    if adata.X is not None:
        matrices["X"] = adata.X
    raw = adata.raw
    if raw is not None:
        matrices["raw"] = raw.X
    return Source(adata.obs, adata.var, matrices, None if raw is None else raw.var, dict(adata.obsm))


@contextmanager
def open_h5ad(path: str | Path) -> Iterator[Source]:
    """Open an h5ad file for reading; the matrices stay on disk until rows of them are read.

    Raises
    ------
    FileNotFoundError
        There is no file.
    ValueError
        The file is no HDF5 file, is truncated or damaged (also when this shows only while rows are read),
        or is no h5ad.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected an h5ad file at {path}, found none")
    try:
        with h5py.File(path, "r") as file:
            if "obs" not in file or "var" not in file:
                raise ValueError(
                    f"{path}: expected an h5ad with obs and var, got an HDF5 file with {sorted(file)}"
                )
            if dict(file["obs"].attrs).get("encoding-type") == "dataframe":
                yield _source(file)
                return
        yield from_anndata(_read_legacy(path))
    except OSError as error:
        with open(path, "rb") as stream:
            start = stream.read(8)
        raise ValueError(
            f"{path}: expected a whole HDF5 file (h5ad), got {path.stat().st_size} bytes that start with "
            f"{start!r} and cannot be read: {error}"
        ) from error


def _source(file: Any) -> Source:
    from anndata.io import read_elem, sparse_dataset

    def matrix(element):
        return element if hasattr(element, "shape") else sparse_dataset(element)

    matrices = {name: matrix(file["layers"][name]) for name in file.get("layers", ())}
    if "X" in file:
        matrices["X"] = matrix(file["X"])
    raw_var = None
    if "raw" in file:
        matrices["raw"] = matrix(file["raw/X"])
        raw_var = read_elem(file["raw/var"])
    obsm = {name: read_elem(file["obsm"][name]) for name in file.get("obsm", ())}
    return Source(read_elem(file["obs"]), read_elem(file["var"]), matrices, raw_var, obsm)


def _read_legacy(path: Path) -> Any:
    """Files written before anndata 0.7 hold their tables in another form, which anndata reads as a whole."""
    import anndata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def read_rows(
    matrix: Any, keep: np.ndarray, *, name: str, check: Callable[[csr_matrix, np.ndarray], csr_matrix]
) -> csr_matrix:
    """Rows of any AnnData matrix as one CSR matrix; parameters and errors as for `row_blocks`.

    Returns
    -------
    csr_matrix, shape (keep.sum(), m)
    """
    blocks = [block for block, _ in row_blocks(matrix, keep, name=name, check=check)]
    if not blocks:
        return csr_matrix((0, matrix.shape[1]), dtype=np.float32)
    return vstack(blocks, format="csr")


def row_blocks(
    matrix: Any,
    keep: np.ndarray,
    *,
    name: str,
    check: Callable[[csr_matrix, np.ndarray], csr_matrix],
    rows: int = _ROWS,
) -> Iterator[tuple[csr_matrix, np.ndarray]]:
    """Rows of any AnnData matrix in blocks, in order; a matrix in a file is never in memory as a whole.

    Only a column-compressed matrix in a file is: its rows are scattered over all of it.

    Parameters
    ----------
    matrix : array, scipy sparse, h5py dataset or anndata's sparse dataset, shape (n, m)
    keep : bool ndarray, shape (n,)
        Rows to read.
    name : str
        What the matrix is, for messages.
    check : callable
        Gets each block as CSR, and the positions of its rows in the matrix; returns the block to keep.
    rows : int
        Most rows to read at once; fewer of a dense matrix with many columns.

    Yields
    ------
    block : csr_matrix, shape (at most rows, m)
    positions : ndarray of int
        Of the block's rows in the matrix.

    Raises
    ------
    TypeError
        The matrix is of a kind that AnnData files do not hold.
    """
    compressed_columns = getattr(matrix, "format", "csr") != "csr"
    if compressed_columns:
        # Rows of a column-compressed matrix are scattered over all of it: turn it round once.
        matrix = (matrix if issparse(matrix) else matrix.to_memory()).tocsr()
    if not hasattr(matrix, "shape") or not hasattr(matrix, "dtype") or len(matrix.shape) != 2:
        raise TypeError(f"{name}: expected a dense or sparse matrix, got {type(matrix).__name__}")
    if matrix.dtype == np.float16:
        raise TypeError(
            f"{name}: expected counts that are stored exactly, got float16, exact up to 2,048 only"
        )
    sparse = hasattr(matrix, "format")
    step = rows if sparse else max(1, min(rows, _BLOCK // max(1, matrix.shape[1])))
    for start in range(0, matrix.shape[0], step):
        chosen = np.flatnonzero(keep[start : start + step])
        if len(chosen):
            block = matrix[start : start + step]
            block = csr_matrix(block if sparse else np.asarray(block))
            positions = chosen + start
            yield check(block[chosen] if len(chosen) < block.shape[0] else block, positions), positions
