"""A common order of genes for several datasets, and where each dataset has them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from .genes import SymbolResolver, strip_version

_SHOWN = 5


class GeneSpaceError(ValueError):
    """A gene space, or a file of one, that contradicts itself or the data at hand."""


class GeneSpaceMismatch(GeneSpaceError):
    """A checkpoint and the data at hand do not have the same genes in the same order."""


@dataclass(frozen=True)
class ColumnMap:
    """Where the genes of a space are in one dataset.

    Attributes
    ----------
    columns : tuple of tuple of int
        For each gene of the space the dataset's columns, which are summed; empty where it is not measured.
    column_names : tuple of tuple of str
        What the dataset calls those columns.
    n_columns : int
        Of the dataset.
    genes_sha256 : str
        Of the names of all columns in their order; see `hash_genes`.
    n_cells : int
        Cells that the statistics are from.
    cells : str
        Which they are.
    fingerprint : str
        sha256 of their counts and totals.
    noise, mean, variance, n_detected
        See `perturbret.gene_stats.GeneStats`; tuples, None where a gene is not measured.
    """

    columns: tuple[tuple[int, ...], ...]
    column_names: tuple[tuple[str, ...], ...]
    n_columns: int
    genes_sha256: str
    n_cells: int
    cells: str
    fingerprint: str
    noise: float = field(repr=False)
    mean: tuple[float | None, ...] = field(repr=False)
    variance: tuple[float | None, ...] = field(repr=False)
    n_detected: tuple[int | None, ...] = field(repr=False)

    def check(self, where: str, n_genes: int) -> None:
        """Raise GeneSpaceError unless there is one entry per gene, in range, and no column is used twice."""
        for name in ("columns", "column_names", "mean", "variance", "n_detected"):
            if len(getattr(self, name)) != n_genes:
                raise GeneSpaceError(
                    f"{where}: {name}: expected {n_genes} entries, got {len(getattr(self, name))}"
                )
        used: dict[int, int] = {}
        for position, (columns, names) in enumerate(zip(self.columns, self.column_names, strict=True)):
            if len(columns) != len(names):
                raise GeneSpaceError(
                    f"{where}: gene {position}: expected a name for each of {len(columns)} columns, got {len(names)}"
                )
            for column in columns:
                if type(column) is not int or not 0 <= column < self.n_columns:
                    raise GeneSpaceError(
                        f"{where}: gene {position}: expected a column from 0 to {self.n_columns - 1}, got {column!r}"
                    )
                if used.setdefault(column, position) != position or columns.count(column) > 1:
                    raise GeneSpaceError(
                        f"{where}: column {column} is used twice, for gene {used[column]} and gene {position}"
                    )


@dataclass(frozen=True)
class GeneSpace:
    """Genes in their common order, and the columns that they have in each dataset.

    Attributes
    ----------
    names : tuple of str
        Unique symbols (or Ensembl ids, where a symbol stands for two).
    ensembl_ids : tuple of str or None
        None where none is known.
    maps : mapping of dataset to ColumnMap
    table : mapping of column to tuple
        See `statistics`.
    settings : mapping
        How the genes were chosen; JSON-able.
    notes : tuple of str
        What a reader must know: fewer genes than asked for, perturbed genes kept below the filter, ...
    """

    names: tuple[str, ...]
    ensembl_ids: tuple[str | None, ...]
    maps: Mapping[str, ColumnMap]
    table: Mapping[str, tuple] = field(repr=False)
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.names:
            raise GeneSpaceError("names: expected at least one gene, got none")
        if len(set(self.names)) < len(self.names):
            twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
            raise GeneSpaceError(f"names: expected unique names, got {twice!r} twice")
        for name, values in {"ensembl_ids": self.ensembl_ids, **self.table}.items():
            if len(values) != len(self.names):
                raise GeneSpaceError(f"{name}: expected {len(self.names)} entries, got {len(values)}")
        for dataset, columns in self.maps.items():
            columns.check(dataset, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """sha256 of the names in their order."""
        return hash_genes(self.names)

    @property
    def statistics(self) -> pd.DataFrame:
        """One row per gene, in the common order; the columns are those that `perturbret.align.align` describes."""
        return pd.DataFrame(
            {"gene": self.names, **{name: list(values) for name, values in self.table.items()}}
        )


def hash_genes(genes: Iterable[str]) -> str:
    """sha256 of gene names in their order."""
    return hashlib.sha256("\0".join(map(str, genes)).encode()).hexdigest()


def check_gene_space(
    checkpoint: GeneSpace | Sequence[str], data: GeneSpace | Sequence[str], *, what: str = "checkpoint"
) -> None:
    """Raise unless a checkpoint and the data's panel have the same genes in the same order; call before training.

    Raises
    ------
    GeneSpaceMismatch
        Names the first genes that differ, and whether only the order does.
    """
    expected, got = (list(map(str, g.names if isinstance(g, GeneSpace) else g)) for g in (checkpoint, data))
    if expected == got:
        return
    differing = [i for i, (one, other) in enumerate(zip(expected, got, strict=False)) if one != other]
    shown = ", ".join(f"position {i}: {expected[i]} against {got[i]}" for i in differing[:_SHOWN])
    if len(expected) != len(got):
        shorter = min(len(expected), len(got))
        longer = "the data" if len(got) > shorter else f"the {what}"
        extra = (expected if len(expected) > shorter else got)[shorter : shorter + _SHOWN]
        rest = f"from position {shorter} on only {longer} has genes: {', '.join(extra)}"
        shown = f"{shown}; {rest}" if shown else rest
    same = "; the genes are the same in another order" if sorted(expected) == sorted(got) else ""
    raise GeneSpaceMismatch(
        f"gene space: the {what} has {len(expected)} genes, the data {len(got)}, and they differ: {shown}{same}; "
        "take weights that were trained in the data's own space (notebooks 02 and 00), or remap the data into this one"
    )


def place_panel(
    space: GeneSpace, genes: Sequence[str], *, resolver: SymbolResolver | None = None
) -> list[str | None]:
    """The gene of the space that each column of a panel is, under its name there; None for columns that it leaves out.

    A panel that the space was made for is known by the names of its columns, and placed by its map. Any other must be
    the space itself: its genes in its order, each under its own name, another name that HGNC knows, or its Ensembl id.

    Parameters
    ----------
    space : GeneSpace
    genes : sequence of str
        Names of the panel's columns.
    resolver : SymbolResolver, optional
        The packaged one by default.

    Raises
    ------
    GeneSpaceMismatch
        The panel is another one: names the first genes that differ. Several of its columns are one gene.
    """
    genes = [str(gene) for gene in genes]
    made_for = hash_genes(genes)
    for dataset, columns in space.maps.items():
        if columns.genes_sha256 == made_for:
            return _placed(space, dataset, len(genes))
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    own = resolver.canonical(genes)["gene"].tolist()
    for position, name in enumerate(genes[: len(space)]):
        if _is_gene(space, position, name, own[position], resolver):
            own[position] = space.names[position]
    check_gene_space(space, own)
    return own


def _placed(space: GeneSpace, dataset: str, n_columns: int) -> list[str | None]:
    placed: list[str | None] = [None] * n_columns
    for name, columns in zip(space.names, space.maps[dataset].columns, strict=True):
        if len(columns) > 1:
            raise GeneSpaceMismatch(
                f"gene space: {len(columns)} columns of {dataset} are {name}, expected one; remap the counts first "
                "(perturbret.remap.remap)"
            )
        for column in columns:
            placed[column] = name
    return placed


def _is_gene(space: GeneSpace, position: int, name: str, approved: str, resolver: SymbolResolver) -> bool:
    own, identifier = space.names[position], space.ensembl_ids[position]
    if own in (name.strip(), approved):
        return True
    return identifier is not None and identifier in (strip_version(name), resolver.ensembl_ids.get(approved))
