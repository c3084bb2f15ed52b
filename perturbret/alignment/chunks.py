"""Counts of a dataset in chunks of cells, from memory or from a file larger than memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ..data.counts import check_counts
from ..data.genes import is_ensembl_id
from ..data.h5ad import open_source, row_blocks
from ..data.screen import Screen
from ..data.splits import Split, cells_of_role
from .gene_space import GeneSpace, GeneSpaceError
from .remapping import remap

CHUNK_CELLS = 4096


@dataclass(frozen=True, eq=False)
class ChunkedCounts:
    """A dataset whose cells are read when they are needed, any number of times.

    Attributes
    ----------
    name : str
    genes : ndarray of str, shape (n_genes,)
        Names of the columns, as the dataset has them; not necessarily unique.
    ensembl_ids : ndarray of str, shape (n_genes,), or None
        Where every column has one.
    n_cells : int
    read : callable
        Gets the most cells per chunk; see `chunks`.
    cells : str
        Which cells of the dataset these are, for the record.
    """

    name: str
    genes: np.ndarray
    ensembl_ids: np.ndarray | None
    n_cells: int
    read: Callable[[int], Iterator[tuple[csr_matrix, np.ndarray | None]]]
    cells: str = "all"

    def __post_init__(self):
        if self.ensembl_ids is not None and len(self.ensembl_ids) != len(self.genes):
            raise ValueError(
                f"{self.name}: expected an Ensembl id for each of {len(self.genes)} genes, got "
                f"{len(self.ensembl_ids)}"
            )

    def chunks(self, n_cells: int = CHUNK_CELLS) -> Iterator[tuple[csr_matrix, np.ndarray | None]]:
        """Counts (csr_matrix of float32) and totals (None: not known beyond these genes) of consecutive cells.

        Raises
        ------
        ValueError
            `n_cells` is below 1; values that are not counts (CountsError); a damaged file.
        """
        if n_cells < 1:
            raise ValueError(f"n_cells: expected at least 1 cell per chunk, got {n_cells}")
        return self.read(n_cells)


def chunked_screen(screen: Screen, split: Split | None = None, *, role: str = "train") -> ChunkedCounts:
    """Cells of a screen: those in one role where it is split, so that no other cell has influence; else all.

    Raises
    ------
    ValueError
        The split lacks cells of the screen, or none are in the role.

    Examples
    --------
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=20, n_genes=30)
    >>> counts = chunked_screen(screen)
    >>> sizes = [chunk.shape[0] for chunk, totals in counts.chunks(n_cells=32)]
    >>> sizes[0], sum(sizes) == counts.n_cells == screen.n_cells
    (32, True)
    """
    chosen, cells = np.arange(screen.n_cells), "all"
    if split is not None:
        roles = split.roles.reindex(screen.obs.index)
        if roles.isna().any():
            raise ValueError(
                f"split {split.id}: expected a role for all {screen.n_cells} cells of {screen.name}, "
                f"{int(roles.isna().sum())} have none (first: {screen.obs.index[roles.isna()][0]!r})"
            )
        chosen = np.flatnonzero(roles.to_numpy(str) == role)
        cells = cells_of_role(role, split.id, split.hash)
        if not len(chosen):
            raise ValueError(f"{screen.name}: expected cells in role {role!r} of {split.id}, got none")
    totals = screen.obs["total"].to_numpy(np.float64)

    def read(n_cells):
        for start in range(0, len(chosen), n_cells):
            rows = chosen[start : start + n_cells]
            yield screen.counts[rows], totals[rows]

    ids = _ensembl_ids(screen.genes, None)
    return ChunkedCounts(screen.name, np.asarray(screen.genes, str), ids, len(chosen), read, cells)


def chunked_h5ad(
    path: str | Path,
    *,
    name: str = "",
    matrix: str = "X",
    symbol_key: str | None = None,
    ensembl_key: str | None = None,
    total_key: str | None = None,
) -> ChunkedCounts:
    """Cells of an h5ad file, which is opened for each pass.

    Parameters
    ----------
    path : path
    name : str
        Empty for that of the file.
    matrix : str
        `X`, `raw` or a layer, which holds counts.
    symbol_key : str, optional
        Column of var with gene symbols; by default the names of var.
    ensembl_key : str, optional
        Column of var with Ensembl ids; by default the names of var where all of them are.
    total_key : str, optional
        Column of obs with the UMIs of each cell over the whole transcriptome. Give it where the file holds a
        panel only: without it cells are scaled by the sum over the panel, and their values are not in the unit
        of whole transcriptomes.

    Raises
    ------
    FileNotFoundError, ValueError
        As `perturbret.data.h5ad.open_source`; there is no such matrix or column; a value of `ensembl_key` is no id.
    """
    name = name or Path(path).stem
    with open_source(path) as source:
        if matrix not in source.matrices:
            raise ValueError(f"{name}: matrix: expected one of {sorted(source.matrices)}, got {matrix!r}")
        var = source.raw_var if matrix == "raw" else source.var
        genes = var.index if symbol_key is None else _column(var, symbol_key, f"{name}: symbol_key", "var")
        ids = None if ensembl_key is None else _column(var, ensembl_key, f"{name}: ensembl_key", "var")
        totals = None
        if total_key is not None:
            totals = _column(source.obs, total_key, f"{name}: total_key", "obs").to_numpy(np.float64)
        cell_names = source.obs.index.to_numpy(str)
    genes = np.asarray(genes, str)

    def read(n_cells):
        def check(block, rows):
            return check_counts(block, name=f"{name}: {matrix}", cells=cell_names[rows], genes=genes)

        with open_source(path) as source:
            everything = np.ones(len(cell_names), bool)
            blocks = row_blocks(source.matrices[matrix], everything, name=name, check=check, rows=n_cells)
            for block, rows in blocks:
                yield block, None if totals is None else totals[rows]

    return ChunkedCounts(name, genes, _ensembl_ids(genes, ids, name), len(cell_names), read)


def chunked_in_space(dataset: ChunkedCounts, space: GeneSpace) -> ChunkedCounts:
    """The same cells over those genes of a space that the dataset measures, in its order and under its names.

    Totals stay those of all columns.

    Raises
    ------
    GeneSpaceError
        The space has no map for the dataset, or one that was made for other columns.
    """
    if dataset.name not in space.maps:
        raise GeneSpaceError(
            f"{dataset.name}: expected one of the gene space's datasets, {', '.join(space.maps)}"
        )
    columns = space.maps[dataset.name]
    measured = [position for position, found in enumerate(columns.columns) if found]

    def read(n_cells):
        for counts, totals in dataset.chunks(n_cells):
            totals = np.asarray(counts.sum(axis=1), np.float64).ravel() if totals is None else totals
            yield remap(counts, columns, genes=dataset.genes)[:, measured], totals

    genes = np.array(space.names, str)[measured]
    return ChunkedCounts(dataset.name, genes, None, dataset.n_cells, read, dataset.cells)


def _column(table: pd.DataFrame, key: str, what: str, where: str) -> pd.Series:
    if key not in table:
        raise ValueError(f"{what}: expected a column {key!r} in {where}, got {list(table.columns)[:20]}")
    return table[key]


def _ensembl_ids(genes: np.ndarray, ids, name: str = "") -> np.ndarray | None:
    """The given ids, checked; without them the names of genes, where all are ids."""
    if ids is not None:
        ids = np.asarray(ids, str)
        bad = [identifier for identifier in ids if not is_ensembl_id(identifier)]
        if bad:
            raise ValueError(
                f"{name}: ensembl_key: expected an Ensembl gene id for every gene, got {str(bad[0])!r} "
                f"({len(bad)} of {len(ids)}); leave the key out to match by symbol"
            )
        return ids
    return np.asarray(genes, str) if len(genes) and all(map(is_ensembl_id, genes)) else None
