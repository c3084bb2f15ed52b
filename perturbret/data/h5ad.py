"""Read what a screen needs out of an h5ad, h5mu or zarr store, matrices in blocks of rows, never dense as a whole."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    unreadable : mapping of key to reason
        Parts of the file that cannot be read (`obs/new`, `obsm/X_umap`, `layers/spliced`, `raw`), which hinder
        nothing but their own use.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    matrices: Mapping[str, Any]
    raw_var: pd.DataFrame | None
    obsm: Mapping[str, Any]
    unreadable: Mapping[str, str] = field(default_factory=dict)

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
def open_source(path: str | Path, *, modality: str | None = None) -> Iterator[Source]:
    """Open an h5ad, an h5mu or a zarr store for reading; the matrices stay on disk until rows of them are read.

    Parameters
    ----------
    path : path
        Of a file (h5ad, h5mu) or a directory (zarr). What it is, its content tells, not its name.
    modality : str, optional
        Of an h5mu. By default `rna` or `gex`, or the only one that there is.

    Raises
    ------
    FileNotFoundError
        There is nothing.
    ValueError
        Neither HDF5 nor zarr, truncated or damaged (also when this shows only while rows are read), no AnnData,
        no such modality; names the file and the part.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected an h5ad, h5mu or zarr at {path}, found none")
    if path.is_dir():
        store = _zarr(path)
        try:
            yield _source(store, path, modality)
        except OSError as error:
            raise ValueError(f"{path}: expected a whole zarr store, which cannot be read: {error}") from error
        return
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if (
                "mod" in file
                or dict(getattr(file.get("obs"), "attrs", {})).get("encoding-type") == "dataframe"
            ):
                yield _source(file, path, modality)
                return
            if "obs" not in file or "var" not in file:
                raise ValueError(
                    f"{path}: expected an h5ad with obs and var, got an HDF5 file with {sorted(file)}"
                )
        yield from_anndata(_read_legacy(path))
    except OSError as error:
        with open(path, "rb") as stream:
            start = stream.read(8)
        raise ValueError(
            f"{path}: expected a whole HDF5 file (h5ad), got {path.stat().st_size} bytes that start with "
            f"{start!r} and cannot be read: {error}"
        ) from error


def _zarr(path: Path) -> Any:
    """The group at the root of a zarr store."""
    import zarr

    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:
        held = sorted(item.name for item in path.iterdir())
        shown = ", ".join(held[:5]) + (" ..." if len(held) > 5 else "")
        raise ValueError(
            f"{path}: expected an h5ad file, or a directory that is a zarr store (AnnData.write_zarr), got "
            f"{'a directory with ' + shown if held else 'an empty directory'}"
        ) from error


def _source(root: Any, path: Path, modality: str | None) -> Source:
    """The parts of an open file or store, or of one modality of it, as far as they can be read."""
    file, place = root, path
    if "mod" in root:
        modality = _modality(sorted(root["mod"]), modality, path)
        file, place = root["mod"][modality], path / "mod" / modality
    elif modality is not None:
        raise ValueError(f"{path}: modality: expected a file with modalities (h5mu), got one without")
    if "obs" not in file or "var" not in file:
        raise ValueError(f"{place}: expected obs and var, got {sorted(file)}")
    unreadable: dict[str, str] = {}
    obs = _table(file, "obs", place, unreadable)
    if file is not root and "obs" in root:
        # What is said of the cells of all modalities is said of those of this one, too.
        shared = _table(root, "obs", path, unreadable)
        shared = shared[~shared.index.duplicated()].reindex(obs.index)
        obs = pd.concat([obs, shared[[name for name in shared if name not in obs]]], axis=1)
    matrices = {name: _part(file, f"layers/{name}", unreadable) for name in _names(file, "layers")}
    matrices["X"] = _part(file, "X", unreadable)
    raw_var = None
    if hasattr(file.get("raw"), "keys"):
        matrices["raw"] = _part(file, "raw/X", unreadable)
        try:
            raw_var = _table(file, "raw/var", place, unreadable)
        except ValueError as error:
            matrices["raw"], unreadable["raw"] = None, str(error)
    obsm = {name: _part(file, f"obsm/{name}", unreadable, whole=True) for name in _names(file, "obsm")}
    return Source(
        obs,
        _table(file, "var", place, unreadable),
        {name: matrix for name, matrix in matrices.items() if matrix is not None},
        raw_var,
        {name: array for name, array in obsm.items() if array is not None},
        unreadable,
    )


def _modality(known: list[str], asked: str | None, path: Path) -> str:
    usual = [name for name in known if name.lower() in ("rna", "gex")]
    chosen = [asked] if asked is not None else (usual if len(usual) == 1 else known)
    if len(chosen) == 1 and chosen[0] in known:
        return chosen[0]
    got = "none named" if asked is None else repr(asked)
    raise ValueError(f"{path}: modality: expected one of {', '.join(map(repr, known)) or 'none'}, got {got}")


def _names(file: Any, group: str) -> list[str]:
    return list(file[group]) if hasattr(file.get(group), "keys") else []


def _part(file: Any, key: str, unreadable: dict[str, str], *, whole: bool = False) -> Any:
    """A matrix, left on disk unless `whole`; None where it is missing or unreadable, which is noted."""
    from anndata.io import read_elem, sparse_dataset

    try:
        element = file.get(key)
        if element is None or element.attrs.get("encoding-type") == "null":
            return None
        if whole:
            return read_elem(element)
        return element if hasattr(element, "shape") else sparse_dataset(element)
    except Exception as error:  # noqa: BLE001 (whatever is wrong with it, somebody may not need it)
        unreadable[key] = _reason(error)
        return None


def _table(file: Any, key: str, path: Path, unreadable: dict[str, str]) -> pd.DataFrame:
    """A table of obs or var with the columns that can be read; a name that is listed twice is one column.

    Raises
    ------
    ValueError
        It is no table, or its index cannot be read.
    """
    from anndata.io import read_elem

    try:
        group = file[key]
        index = pd.Index(read_elem(group[group.attrs["_index"]]))
        names = [str(name) for name in group.attrs["column-order"]]
    except Exception as error:
        raise ValueError(
            f"{path}: {key}: expected a table, which cannot be read: {_reason(error)}"
        ) from error
    columns = {}
    for name in names:
        try:
            values = read_elem(group[name])
            columns[name] = pd.Series(values, index=index)
        except Exception as error:  # noqa: BLE001 (as above)
            unreadable[f"{key}/{name}"] = _reason(error)
    return pd.DataFrame(columns, index=index)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
            try:
                block = matrix[start : start + step]
                block = csr_matrix(block if sparse else np.asarray(block))
            except (OSError, KeyError, ValueError, RuntimeError) as error:
                raise OSError(f"{name}, rows from {start}: {_reason(error)}") from error
            positions = chosen + start
            yield check(block[chosen] if len(chosen) < block.shape[0] else block, positions), positions
