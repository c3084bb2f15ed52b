"""Counts of a dataset -> counts in the common order of a gene space, verified by value."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from ..data.counts import EXACT_LIMIT, check_counts
from ..data.genes import SymbolResolver, is_ensembl_id, strip_version
from .gene_space import ColumnMap, GeneSpace, GeneSpaceError, hash_genes


def remap(counts, columns: ColumnMap, *, genes: Sequence[str] | None = None) -> csr_matrix:
    """Counts in the order of a gene space; columns of one gene are summed, genes not measured are empty.

    Parameters
    ----------
    counts : scipy.sparse matrix, shape (n_cells, n_columns)
        Whole numbers of any type; they are widened before anything is summed.
    columns : ColumnMap
        Of the dataset that the counts are from.
    genes : sequence of str, optional
        Names of the columns of `counts`. Give them whenever they are known: a panel of equal size in another
        order is refused by them alone.

    Returns
    -------
    csr_matrix of float32, shape (n_cells, n_genes)
        Sorted indices, no stored zeros. An all-empty column may be a gene that the dataset does not measure.

    Raises
    ------
    GeneSpaceError
        The counts are not over the columns that the map was made for, or a sum is 2**24 or more.
    CountsError
        Values that are no counts, negative ones of an overflowed int16 among them.

    Examples
    --------
    >>> from perturbret.alignment import align, chunked_screen
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=20, n_genes=30)
    >>> space = align([chunked_screen(screen)], n=10)
    >>> counts = remap(screen.counts, space.maps["simulated"], genes=screen.genes)
    >>> own = [list(screen.genes).index(name) for name in space.names]
    >>> counts.shape[1], (counts != screen.counts[:, own]).nnz
    (10, 0)
    """
    _expect_panel(counts, columns, genes)
    names = np.arange(columns.n_columns).astype(str) if genes is None else np.asarray(genes, str)
    cells = np.arange(counts.shape[0])
    checked = check_counts(csr_matrix(counts), name="counts", cells=cells, genes=names)
    summed = (checked.astype(np.float64) @ indicator(columns.columns, columns.n_columns)).tocsr()
    if summed.nnz and summed.data.max() >= EXACT_LIMIT:
        raise GeneSpaceError(
            f"counts: expected sums below 2**24 = {EXACT_LIMIT}, exact in float32, got {summed.data.max():.0f}"
        )
    summed = summed.astype(np.float32)
    summed.sort_indices()
    return summed


def _expect_panel(counts, columns: ColumnMap, genes: Sequence[str] | None) -> None:
    if not issparse(counts):
        raise GeneSpaceError(f"counts: expected a sparse matrix, got {type(counts).__name__}")
    if counts.shape[1] != columns.n_columns:
        raise GeneSpaceError(f"counts: expected {columns.n_columns} columns, got {counts.shape[1]}")
    if genes is not None and hash_genes(genes) != columns.genes_sha256:
        raise GeneSpaceError(
            f"genes: expected the {columns.n_columns} columns that the map was made for, in their order, got "
            f"others: {', '.join(map(str, list(genes)[:3]))}, ...; make the map for this panel"
        )
    columns.check("map", len(columns.columns))


def indicator(columns: Sequence[Sequence[int]], n_columns: int) -> csr_matrix:
    """Ones where a column (row) belongs to a gene (column): float64, shape (n_columns, len(columns))."""
    sizes = [len(found) for found in columns]
    flat = np.array([column for found in columns for column in found], dtype=np.int64)
    places = np.repeat(np.arange(len(columns)), sizes)
    return csr_matrix((np.ones(len(flat)), (flat, places)), shape=(n_columns, len(columns)))


def verify_alignment(
    space: GeneSpace, data: Mapping[str, tuple], *, resolver: SymbolResolver | None = None
) -> pd.DataFrame:
    """Compare values, gene by gene and dataset by dataset, as found by position and as found by name.

    By position: column i of the remapped counts. By name: the sum of the columns of the dataset at hand that bear
    the names which the space gives gene i, looked up in the dataset's own list of names. The names must stand for
    gene i: by Ensembl id where genes were matched by it, else by approved symbol. So column i is the same gene in every
    dataset given.

    Parameters
    ----------
    space : GeneSpace
    data : mapping of dataset to (counts, genes) or (counts, genes, ensembl_ids)
        Some cells of each dataset; sparse, with the names of their columns. Ids are needed where genes were matched by
        them and the names are not ids.
    resolver : SymbolResolver, optional
        The packaged one by default.

    Returns
    -------
    DataFrame
        One row per dataset: `dataset`, `n_cells`, `n_genes` compared, `n_counted` of them with a count in these cells,
        `n_values` that are not zero. Datasets of the space that were not given have 0 everywhere.

    Raises
    ------
    GeneSpaceError
        Names the dataset, the gene and the first cell and values that differ. There is nothing to compare: no dataset,
        cells without counts, or no Ensembl ids where genes were matched by them.

    Examples
    --------
    >>> from perturbret.alignment import align, chunked_screen
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=20, n_genes=30)
    >>> space = align([chunked_screen(screen)], n=10)
    >>> checked = verify_alignment(space, {"simulated": (screen.counts, screen.genes)})
    >>> checked[["dataset", "n_genes"]].values.tolist()
    [['simulated', 10]]
    """
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    if not data:
        raise GeneSpaceError("data: expected cells of at least one dataset, got none")
    by_id = space.settings.get("matched_by") == "ensembl"
    rows = [(dataset, 0, 0, 0, 0) for dataset in space.maps if dataset not in data]
    for dataset, (counts, genes, *ids) in data.items():
        if dataset not in space.maps:
            raise GeneSpaceError(f"{dataset}: expected one of {sorted(space.maps)}")
        columns = space.maps[dataset]
        places: dict[str, list[int]] = {}
        for column, name in enumerate(map(str, genes)):
            places.setdefault(name, []).append(column)
        by_position = remap(counts, columns).tocsc()
        by_name = csr_matrix(counts).astype(np.float64).tocsc()
        keys = _ids(dataset, ids[0] if ids and ids[0] is not None else genes) if by_id else None
        n_genes = n_counted = 0
        for position, gene in enumerate(space.names):
            names = columns.column_names[position]
            if not names:
                continue
            found = sorted({column for name in names for column in places.get(name, ())})
            if len(found) < len(set(names)):
                raise GeneSpaceError(
                    f"{dataset}: gene {position} ({gene}): expected columns {', '.join(names)}, found {len(found)}"
                )
            if by_id:
                found = _of_gene(space, dataset, position, found, keys)
            else:
                _expect_same_gene(space, dataset, position, names, resolver)
            expected = np.asarray(by_name[:, found].sum(axis=1)).ravel()
            got = by_position[:, [position]].toarray().ravel()
            differing = np.flatnonzero(expected != got)
            if len(differing):
                cell = int(differing[0])
                raise GeneSpaceError(
                    f"{dataset}: gene {position} ({gene}): by name ({', '.join(dict.fromkeys(names))}) cell {cell} has "
                    f"{expected[cell]:.0f}, by position {got[cell]:.0f} ({len(differing)} cells differ)"
                )
            n_genes += 1
            n_counted += bool(got.any())
        if not by_position.nnz:
            raise GeneSpaceError(
                f"{dataset}: expected cells with counts of the space's genes, got none in {counts.shape[0]} cells"
            )
        rows.append((dataset, counts.shape[0], n_genes, n_counted, int(by_position.nnz)))
    return pd.DataFrame(rows, columns=["dataset", "n_cells", "n_genes", "n_counted", "n_values"])


def _ids(dataset: str, names: Sequence[str]) -> list[str]:
    other = next((name for name in names if not is_ensembl_id(name)), None)
    if other is not None:
        raise GeneSpaceError(
            f"{dataset}: expected the Ensembl id of each column, which genes were matched by, got {str(other)!r}"
        )
    return [strip_version(name) for name in names]


def _of_gene(space, dataset, position, found, keys) -> list[int]:
    """Of the columns of a name those of the gene: a symbol may stand for two ids."""
    expected = space.ensembl_ids[position]
    kept = [column for column in found if keys[column] == expected]
    if not kept:
        got = ", ".join(keys[column] for column in found)
        raise GeneSpaceError(f"{dataset}: gene {position}: expected {expected}, got {got}")
    return kept


def _expect_same_gene(space, dataset, position, names, resolver) -> None:
    gene = space.names[position]
    for name in names:
        if name.strip() != gene and resolver.readings(name) != (gene,):
            meant = ", ".join(resolver.readings(name)) or "no known gene"
            raise GeneSpaceError(f"{dataset}: gene {position}: expected {gene}, got {name!r} ({meant})")
