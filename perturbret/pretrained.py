"""Find a pretrained checkpoint by name: in local directories, in an installed package, then by download.

A name stands for one checkpoint. Where its files are named with checksums, others are an error; where it is not to be
had, so is that: no other checkpoint is taken in its place.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .atomic import disk_full
from .download import download, expect_sha256
from .fetch import cache_directory, data_directory
from .registry import EntryError, default_registry, nearest, read_yaml


class CheckpointNotFound(FileNotFoundError):
    """A checkpoint is not on this machine and cannot be downloaded."""


@dataclass(frozen=True)
class Pretrained:
    """One checkpoint, as its YAML entry describes it.

    Attributes
    ----------
    name : str
        Letters, digits, `_`, `-`, `.`; also the name of its local directory.
    files : mapping of str to str or None
        Names of the files that its directory has to hold, with their sha256 (None: not known).
    published : str or None
        Where its authors give it to people.
    url : str or None
        Address that serves each file under its name, at a pinned revision.
    package : str or None
        Directory within an installed package, as `package/folder/folder`.
    citation, license : str or None
    """

    name: str
    files: Mapping[str, str | None] = field(default_factory=dict)
    published: str | None = None
    url: str | None = None
    package: str | None = None
    citation: str | None = None
    license: str | None = None


def load_checkpoint_registry(path: str | os.PathLike | None = None) -> dict[str, Pretrained]:
    """All entries of a registry file (a YAML list of entries), by name; `params/checkpoints.yaml` by default.

    Raises
    ------
    EntryError
        The file is no such list, an entry is malformed, or two share a name.
    """
    path = default_registry("checkpoints.yaml") if path is None else Path(path)
    content = read_yaml(path)
    if not isinstance(content, list):
        raise EntryError(f"{path}: expected a list of entries, got {type(content).__name__}")
    entries: dict[str, Pretrained] = {}
    for item in content:
        entry = _entry(item, str(path))
        if entry.name in entries:
            raise EntryError(f"{path}: two entries are named {entry.name!r}")
        entries[entry.name] = entry
    return entries


def find_checkpoint(
    name_or_path: str | os.PathLike,
    *,
    registry: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    timeout: float | None = None,
    progress: bool = True,
    fetch: bool = True,
) -> Path:
    """Directory of a checkpoint, for `perturbret.checkpoint.load_checkpoint`.

    A name of the registry is looked for in `$PERTURBRET_CHECKPOINTS/<name>`, then in
    `$PERTURBRET_DATA/checkpoints/<name>`, then in the package that its entry names; the first of these directories that
    exists is it, and has to be whole. Without any, it is downloaded once into the cache, where its entry has an
    address.

    Parameters
    ----------
    name_or_path : str or path
        A name of the registry, or an existing directory, which is taken as it is. A directory that has the name of an
        entry is given with its folder, as in `./whole-human`.
    registry : path, optional
        In place of `params/checkpoints.yaml`.
    cache : path, optional
        In place of `perturbret.fetch.cache_directory()`.
    timeout : float, optional
        Seconds for each file; none by default (30 s of silence end it).
    progress : bool, default True
        Show a progress bar.
    fetch : bool, default True
        Download what is not on this machine.

    Raises
    ------
    CheckpointNotFound
        There is no such directory or name; or the named checkpoint is neither on this machine nor to be downloaded; or
        its directory lacks a file.
    ChecksumError
        A file is not the one that the entry describes.
    NotADirectoryError
        PERTURBRET_CHECKPOINTS or PERTURBRET_DATA is set and no directory.
    """
    entries = load_checkpoint_registry(registry)
    asked = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or asked not in entries:
        path = Path(asked).expanduser()
        if path.is_dir():
            return path
        raise CheckpointNotFound(
            f"checkpoint {asked!r}: expected a directory or a name of the registry, found neither; "
            f"{nearest(asked, list(entries))}"
        )
    entry = entries[asked]
    cached = cache_directory(cache) / "checkpoints" / entry.name
    places = _places(entry)
    for place in [place for place in places if place.is_dir()]:
        return _checked(entry, place)
    if entry.url is None:
        raise CheckpointNotFound(_not_found(entry, places, "its entry has no address to download it from"))
    if not fetch and not cached.is_dir():
        raise CheckpointNotFound(_not_found(entry, [*places, cached], "it was not to be downloaded"))
    for file, sha256 in entry.files.items() if fetch else ():
        if not (cached / file).is_file():
            address = f"{entry.url.rstrip('/')}/{file}"
            try:
                download(
                    address,
                    cached / file,
                    label=entry.name,
                    sha256=sha256,
                    h5ad=False,
                    timeout=timeout,
                    progress=progress,
                )
            except OSError as error:
                if disk_full(error):
                    raise
                reason = f"{address} could not be downloaded ({type(error).__name__}: {error})"
                raise CheckpointNotFound(_not_found(entry, [*places, cached], reason)) from error
    return _checked(entry, cached)


def _places(entry: Pretrained) -> list[Path]:
    """Where the entry's directory may be on this machine, the first first; the cache left out."""
    places = []
    value = os.environ.get("PERTURBRET_CHECKPOINTS")
    if value:
        own = Path(value).expanduser()
        if not own.is_dir():
            raise NotADirectoryError(
                f"PERTURBRET_CHECKPOINTS: expected a directory, got {value!r}, which is none"
            )
        places.append(own / entry.name)
    data = data_directory()
    if data is not None:
        places.append(data / "checkpoints" / entry.name)
    if entry.package:
        package, _, inside = entry.package.partition("/")
        # find_spec does not run the package.
        spec = importlib.util.find_spec(package)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        places += [Path(folder) / inside for folder in folders]
    return places


def _checked(entry: Pretrained, directory: Path) -> Path:
    """The directory, with every file of the entry in it."""
    for file, sha256 in entry.files.items():
        if not (directory / file).is_file():
            raise CheckpointNotFound(
                f"checkpoint {entry.name!r}: expected {', '.join(entry.files)} in {directory}, found no {file}; "
                f"{_sources(entry)}. No other checkpoint is taken in its place: give the path of a directory to use "
                "that one"
            )
        expect_sha256(directory / file, sha256, f"checkpoint {entry.name!r}: sha256 of {file}")
    return directory


def _not_found(entry: Pretrained, places: list[Path], reason: str) -> str:
    listed = ", ".join(map(str, places)) or "nowhere: PERTURBRET_CHECKPOINTS and PERTURBRET_DATA are unset"
    return (
        f"checkpoint {entry.name!r}: expected a directory with {', '.join(entry.files) or 'its files'}, found none "
        f"(looked in: {listed}), and {reason}. {_sources(entry)}; put the files into <folder>/{entry.name} and set "
        "PERTURBRET_CHECKPOINTS to <folder>. No other checkpoint is taken in its place"
    )


def _sources(entry: Pretrained) -> str:
    known = [address for address in (entry.published, entry.url, entry.package) if address]
    return (
        f"it can be had from {' or '.join(known)}" if known else "its entry does not say where it can be had"
    )


def _entry(content: Any, where: str) -> Pretrained:
    """Check one entry as it comes out of YAML."""
    if not isinstance(content, Mapping):
        raise EntryError(f"{where}: expected a mapping of keys to values, got {type(content).__name__}")
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise EntryError(f"{where}: name: expected letters, digits, _ - . , got {name!r}")
    where = f"{where}: entry {name!r}"
    known = [key.name for key in fields(Pretrained)]
    for key, value in content.items():
        if key not in known:
            raise EntryError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
        if key != "files" and (not isinstance(value, str) or not value.strip()):
            raise EntryError(f"{where}: {key}: expected text, got {value!r}")
    files = content.get("files", {})
    if not isinstance(files, Mapping):
        raise EntryError(f"{where}: files: expected a mapping of file names to sha256, got {files!r}")
    for file, sha256 in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", file):
            raise EntryError(f"{where}: files: expected the bare name of a file, got {file!r}")
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(sha256)):
            raise EntryError(
                f"{where}: files: {file}: sha256: expected 64 hexadecimal digits, got {sha256!r}"
            )
    url, package = content.get("url"), content.get("package")
    if url is not None and not re.match(r"https?://[^/\s]+/", url):
        raise EntryError(f"{where}: url: expected http(s)://host/..., got {url!r}")
    # What is downloaded unseen has to be known; a directory that a person placed may be taken on trust.
    if url is not None and (not files or None in files.values()):
        raise EntryError(f"{where}: url: expected a sha256 for each of its files, got {dict(files)}")
    if package is not None and (".." in package.split("/") or not re.match(r"\w+/.", package)):
        raise EntryError(f"{where}: package: expected package/folder, got {package!r}")
    return Pretrained(**content)
