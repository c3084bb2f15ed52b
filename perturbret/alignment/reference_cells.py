"""Datasets of unperturbed cells to align with or to pretrain on: params/references.yaml -> counts in chunks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..data.sources import DataNotFound, EntryError, data_directory, default_registry, read_yaml
from ..files.downloads import expect_sha256
from ..files.names import nearest
from .chunks import ChunkedCounts, chunked_h5ad


@dataclass(frozen=True)
class Reference:
    """One entry of references.yaml.

    Attributes
    ----------
    name : str
    file : str
        h5ad, relative to PERTURBRET_DATA, or absolute.
    sha256 : str
    source, citation, licence : str
        For people.
    matrix : str
        Where the counts are: `X`, `raw` or a layer.
    symbol_key, ensembl_key, total_key : str or None
        See `perturbret.alignment.chunks.chunked_h5ad`.
    perturbation_screen : bool
        Its cells are perturbed, so they are left out unless asked for.
    """

    name: str
    file: str
    sha256: str
    source: str
    citation: str = "see source"
    licence: str = "see source"
    matrix: str = "X"
    symbol_key: str | None = None
    ensembl_key: str | None = None
    total_key: str | None = None
    perturbation_screen: bool = False


def read_references(path: str | os.PathLike = "") -> dict[str, Reference]:
    """Name -> entry of a YAML file; reads no cells.

    Parameters
    ----------
    path : path
        Empty for `params/references.yaml`.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    EntryError
        It is no list of entries, a key is unknown or missing, a value is of another type, a name comes twice.
    """
    file = Path(path).expanduser() if os.fspath(path) else default_registry("references.yaml")
    if not file.is_file():
        raise FileNotFoundError(f"references: expected a YAML file at {file}, found none")
    content = read_yaml(file)
    if not isinstance(content, list) or not content:
        raise EntryError(f"{file}: expected a list of entries, got {type(content).__name__}")
    entries: dict[str, Reference] = {}
    for number, values in enumerate(content, start=1):
        entry = _entry(values, f"{file.name}: entry {number}")
        if entry.name in entries:
            raise EntryError(f"{file.name}: entry {number}: name {entry.name!r} is given twice")
        entries[entry.name] = entry
    return entries


def load_references(
    path: str | os.PathLike = "",
    *,
    names: Sequence[str] = (),
    perturbation_screens: bool = False,
    required: bool = False,
) -> list[ChunkedCounts]:
    """The datasets of a YAML file that are on this machine, checked, in its order; no counts are read yet.

    Each gives `name`, `genes`, `ensembl_ids`, `n_cells` and `chunks()`, which reads the file anew for each pass and
    holds one chunk of cells in memory.

    Parameters
    ----------
    path : path
        As for `read_references`.
    names : sequence of str
        Only these, perturbation screens or not; all by default.
    perturbation_screens : bool
        Also those marked as such.
    required : bool
        A file that is not there is an error; else it is left out.

    Raises
    ------
    DataNotFound
        A file is not there and `required`.
    ChecksumError
        A file of the right name has other contents.
    EntryError, FileNotFoundError
        As `read_references`; a name that no entry has.
    """
    entries = read_references(path)
    for name in names:
        if name not in entries:
            raise EntryError(f"references: no entry {name!r}; {nearest(name, list(entries))}")
    chosen = [
        entry
        for entry in entries.values()
        if (entry.name in names if names else perturbation_screens or not entry.perturbation_screen)
    ]
    folder = data_directory()
    found = []
    for entry in chosen:
        file = (folder or Path()) / Path(entry.file).expanduser()
        if not file.is_absolute() or not file.is_file():
            if required:
                raise DataNotFound(
                    f"reference {entry.name}: expected {entry.file} in PERTURBRET_DATA ({folder}), found none; "
                    f"it is from {entry.source}"
                )
            continue
        expect_sha256(file, entry.sha256, f"reference {entry.name}: sha256")
        found.append(
            chunked_h5ad(
                file,
                name=entry.name,
                matrix=entry.matrix,
                symbol_key=entry.symbol_key,
                ensembl_key=entry.ensembl_key,
                total_key=entry.total_key,
            )
        )
    return found


def _entry(values: Any, where: str) -> Reference:
    if not isinstance(values, Mapping):
        raise EntryError(f"{where}: expected keys with values, got {values!r}")
    known = [item.name for item in fields(Reference)]
    for key, value in values.items():
        if key not in known:
            raise EntryError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
        kind = bool if key == "perturbation_screen" else str
        if not isinstance(value, kind):
            raise EntryError(f"{where}: {key}: expected {kind.__name__}, got {value!r}")
    missing = [key for key in ("name", "file", "sha256", "source") if not values.get(key)]
    if missing:
        raise EntryError(f"{where}: expected the keys {', '.join(missing)}")
    return Reference(**values)
