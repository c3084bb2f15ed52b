"""The files of a gene space: cross_dataset_hvg_info.json, and hvg_info.json as the Virtual Cell Challenge has it."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .atomic import write_json
from .gene_space import ColumnMap, GeneSpace, GeneSpaceError

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
    values = {}
    for name in (item.name for item in fields(ColumnMap)):
        value = entry[name]
        if name in ("columns", "column_names", "mean", "variance", "n_detected"):
            if not isinstance(value, list):
                keys = f" with keys such as {next(iter(value), None)!r}" if isinstance(value, dict) else ""
                raise GeneSpaceError(
                    f"{file}: {dataset}: {name}: expected a list in the order of the genes, got "
                    f"{type(value).__name__}{keys}; JSON turns numbers that are keys into text"
                )
            if name in ("columns", "column_names"):
                value = [() if item is None else item if isinstance(item, list) else [item] for item in value]
                value = [tuple(item) for item in value]
            value = tuple(value)
        values[name] = value
    return ColumnMap(**values)


def _compact(entry: Sequence) -> Any:
    """None for no column, the column itself for one, a list for several that are summed."""
    return None if not entry else entry[0] if len(entry) == 1 else list(entry)
