"""A common order of genes for several datasets, where each dataset has them, and the files that say so.

cross_dataset_hvg_info.json, and hvg_info.json as the Virtual Cell Challenge has it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.genes import SymbolResolver, strip_version
from ..files.atomic import write_json

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
        See `perturbret.alignment.gene_stats.GeneStats`; tuples, None where a gene is not measured.
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
        """One row per gene, in the common order; the columns are those that `align` describes."""
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

    Examples
    --------
    >>> check_gene_space(["HBG1", "KLF1"], ["HBG1", "KLF1"])
    >>> check_gene_space(["HBG1", "KLF1"], ["KLF1", "HBG1"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    perturbret.alignment.gene_space.GeneSpaceMismatch: gene space: ... position 0: HBG1 against KLF1, ...
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
                "(perturbret.alignment.remapping.remap)"
            )
        for column in columns:
            placed[column] = name
    return placed


def _is_gene(space: GeneSpace, position: int, name: str, approved: str, resolver: SymbolResolver) -> bool:
    own, identifier = space.names[position], space.ensembl_ids[position]
    if own in (name.strip(), approved):
        return True
    return identifier is not None and identifier in (strip_version(name), resolver.ensembl_ids.get(approved))


SCHEMA = "perturbret.cross_dataset_hvg_info"
SCHEMA_VERSION, SPACE_FILE = 2, "cross_dataset_hvg_info.json"
_DIGEST = "content_sha256"


def write_gene_space(space: GeneSpace, directory: str | os.PathLike) -> None:
    """Write cross_dataset_hvg_info.json, and hvg_info.json where the space has a fine-tuning screen, atomically.

    hvg_info.json has the keys of the Virtual Cell Challenge starter code: `hvg_indices` (columns of the screen,
    one per gene, in the order of `hvg_names`), `hvg_names`, `gene_to_hvg_idx` (column of the screen, as text ->
    position), `gene_name_to_hvg_idx`, `total_genes`, `n_hvgs`.

    Raises
    ------
    GeneSpaceError
        A gene has not exactly one column in the screen, which hvg_info.json cannot say: then there is only the main
        file, which can.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.alignment import align, chunked_screen
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=20, n_genes=30)
    >>> space = align([chunked_screen(screen)], n=10)
    >>> with TemporaryDirectory() as directory:
    ...     write_gene_space(space, directory)
    ...     print(read_gene_space(directory) == space)
    True
    """
    folder = Path(directory)
    write_json(folder / SPACE_FILE, to_json(space))
    (folder / "hvg_info.json").unlink(missing_ok=True)
    if space.settings.get("screen"):
        write_json(folder / "hvg_info.json", hvg_info(space, space.settings["screen"]))


def hvg_info(space: GeneSpace, dataset: str) -> dict:
    """Content of hvg_info.json for one dataset; see `write_gene_space`.

    GeneSpaceError for a gene of no column, or of several.
    """
    columns = space.maps[dataset]
    for name, found in zip(space.names, columns.columns, strict=True):
        if len(found) != 1:
            raise GeneSpaceError(
                f"hvg_info.json: {dataset}: expected one column for each gene, got {len(found)} for {name}"
            )
    indices = [found[0] for found in columns.columns]
    return {
        "schema_version": SCHEMA_VERSION,
        "hvg_indices": indices,
        "hvg_names": list(space.names),
        "gene_to_hvg_idx": {str(column): position for position, column in enumerate(indices)},
        "gene_name_to_hvg_idx": {name: position for position, name in enumerate(space.names)},
        "total_genes": columns.n_columns,
        "n_hvgs": len(space),
    }


def to_json(space: GeneSpace) -> dict:
    """Content of cross_dataset_hvg_info.json; no key of it is a number, since JSON makes those text."""
    datasets = {}
    for name, columns in space.maps.items():
        content = asdict(columns)
        for key in ("columns", "column_names"):
            content[key] = [_compact(entry) for entry in content[key]]
        datasets[name] = content
    content = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "n_hvgs": len(space),
        "hvg_names": list(space.names),
        "hvg_ensembl_ids": list(space.ensembl_ids),
        "genes_sha256": space.hash,
        "settings": dict(space.settings),
        "notes": list(space.notes),
        "statistics": {name: list(values) for name, values in space.table.items()},
        "datasets": datasets,
    }
    return {**content, _DIGEST: _digest(content)}


def read_gene_space(path: str | os.PathLike) -> GeneSpace:
    """The space of a cross_dataset_hvg_info.json, or of the directory that holds one; equal to what was written.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    GeneSpaceError
        No JSON, another schema or version, a missing key, a mapping whose keys are text where a list is due, a
        content that contradicts itself, or one that is not what was written.
    """
    file = Path(path).expanduser()
    file = file / SPACE_FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"gene space: expected cross_dataset_hvg_info.json, found none at {file}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except ValueError as error:
        raise GeneSpaceError(f"{file}: expected JSON, got {error}") from error
    found = (content.get("schema"), content.get("schema_version")) if isinstance(content, dict) else None
    if found != (SCHEMA, SCHEMA_VERSION):
        raise GeneSpaceError(f"{file}: expected schema {SCHEMA} version {SCHEMA_VERSION}, got {found}")
    try:
        maps = {name: _column_map(file, name, entry) for name, entry in content["datasets"].items()}
        space = GeneSpace(
            tuple(content["hvg_names"]),
            tuple(content["hvg_ensembl_ids"]),
            maps,
            {name: tuple(values) for name, values in content["statistics"].items()},
            content["settings"],
            tuple(content["notes"]),
        )
        expected = {"genes_sha256": content["genes_sha256"], _DIGEST: content[_DIGEST]}
    except KeyError as error:
        raise GeneSpaceError(f"{file}: expected a key {error.args[0]!r}, found none") from error
    except (AttributeError, TypeError) as error:
        raise GeneSpaceError(
            f"{file}: expected lists and mappings as they were written, got {error}"
        ) from error
    if space.hash != expected["genes_sha256"]:
        raise GeneSpaceError(f"{file}: hvg_names were changed after they were written: sha256 {space.hash}")
    found = _digest({name: value for name, value in content.items() if name != _DIGEST})
    if found != expected[_DIGEST]:
        raise GeneSpaceError(f"{file}: the content was changed after it was written: sha256 {found}")
    return space


def content_hash(space: GeneSpace) -> str:
    """sha256 of everything that the file of a space says."""
    return to_json(space)[_DIGEST]


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON")


def _column_map(file: Path, dataset: str, entry: dict) -> ColumnMap:
    values = {item.name: entry[item.name] for item in fields(ColumnMap)}
    for name in ("columns", "column_names", "mean", "variance", "n_detected"):
        value = values[name]
        if not isinstance(value, list):
            keys = f" with keys such as {next(iter(value), None)!r}" if isinstance(value, dict) else ""
            raise GeneSpaceError(
                f"{file}: {dataset}: {name}: expected a list in the order of the genes, got "
                f"{type(value).__name__}{keys}; JSON turns numbers that are keys into text"
            )
        values[name] = tuple(map(_expanded, value) if name.startswith("column") else value)
    return ColumnMap(**values)


def _expanded(entry: Any) -> tuple:
    """What `_compact` made small."""
    return () if entry is None else tuple(entry) if isinstance(entry, list) else (entry,)


def _compact(entry: Sequence) -> Any:
    """None for no column, the column itself for one, a list for several that are summed."""
    return None if not entry else entry[0] if len(entry) == 1 else list(entry)
