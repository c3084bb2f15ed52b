"""Datasets of unperturbed cells to align with or to pretrain on: params/references.yaml -> counts in chunks."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..data.sources import (
    DataNotFound,
    EntryError,
    Sha256,
    Text,
    checked_entry,
    data_directory,
    default_registry,
    local_places,
    read_registry,
)
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
    file: Text
    sha256: Sha256
    source: Text
    citation: Text = "see source"
    licence: Text = "see source"
    matrix: Text = "X"
    symbol_key: Text = None
    ensembl_key: Text = None
    total_key: Text = None
    perturbation_screen: Annotated[bool, Field(strict=True, description="true or false")] = False


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
        As `perturbret.data.sources.read_registry`; a malformed entry.
    """
    file = Path(path).expanduser() if os.fspath(path) else default_registry("references.yaml")
    return read_registry(file, partial(checked_entry, Reference))


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
    found = []
    for entry in chosen:
        file = next((place for place in local_places(entry.file) if place.is_file()), None)
        if file is None:
            if required:
                raise DataNotFound(
                    f"reference {entry.name}: expected {entry.file} in PERTURBRET_DATA ({data_directory()}), found "
                    f"none; it is from {entry.source}"
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
