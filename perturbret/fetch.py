"""Find a dataset's file: in PERTURBRET_DATA, then in the cache, then by download."""

import importlib.util
import os
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .atomic import disk_full, replacing, reporting_full, write_json
from .download import ChecksumError, download, expect_sha256, extract, read_record, record_path, sha256_of
from .registry import Entry


class DataNotFound(FileNotFoundError):
    """A dataset's file is not on this machine and cannot be downloaded."""


def cache_directory(cache: str | Path | None = None) -> Path:
    """`cache`, else PERTURBRET_CACHE, else the operating system's cache folder for perturbret."""
    chosen = cache or os.environ.get("PERTURBRET_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("perturbret")


def data_directory() -> Path | None:
    """The directory that PERTURBRET_DATA names, or None where it is unset or empty.

    Raises
    ------
    NotADirectoryError
        The variable names something else.
    """
    value = os.environ.get("PERTURBRET_DATA")
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_dir():
        raise NotADirectoryError(f"PERTURBRET_DATA: expected a directory, got {value!r}, which is none")
    return path


def locate(entry: Entry, *, cache: str | Path | None = None) -> Path | None:
    """The entry's file, or directory, where it is on this machine already, its checksum verified; else None.

    Raises
    ------
    ChecksumError
        A file of the right name has other contents.
    ValueError
        A zip on this machine is damaged or lacks the member.
    NotADirectoryError
        PERTURBRET_DATA is no directory.
    """
    if entry.package_file:
        return _package_file(entry)
    local = None if entry.path is None else Path(entry.path).expanduser()
    if local is not None and local.is_absolute():
        places = [local]
    else:
        data = data_directory()
        places = [] if data is None else [data / name for name in _names(entry)]
    for place in places:
        if place.exists():
            return _own(entry, place, cache)
    cached = _cached_path(entry, cache)
    return _verified(entry, cached) if cached.is_file() else None


def fetch(
    entry: Entry, *, cache: str | Path | None = None, timeout: float | None = None, progress: bool = True
) -> Path:
    """The entry's file, downloaded where it is not on this machine.

    Parameters
    ----------
    entry : Entry
    cache : path, optional
        In place of `cache_directory()`.
    timeout : float, optional
        Seconds for the whole download; none by default (30 s of silence end it).
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Path
        Of an h5ad or h5mu, or of a zarr store, which is a directory; its content is what the
        entry, or the record of the first download, says.

    Raises
    ------
    DataNotFound
        Not on this machine, and not to be had from the network.
    DiskFull
        There is no space for it in the cache.
    ChecksumError
        The file on this machine, or the downloaded one, is not the described one.
    ValueError
        What was downloaded is no h5ad, or no zip with `archive_member` in it.
    """
    found = locate(entry, cache=cache)
    if found is not None:
        return found
    if entry.url is None:
        raise DataNotFound(_not_found(entry, cache, "it has no address to download it from"))
    target = _cached_path(entry, cache)
    try:
        with reporting_full(target):
            download(
                entry.url,
                target,
                label=entry.name,
                sha256=entry.sha256,
                archive_member=entry.archive_member,
                timeout=timeout,
                progress=progress,
            )
    except OSError as error:
        if disk_full(error):
            raise
        reason = f"{entry.url} could not be downloaded ({type(error).__name__}: {error})"
        raise DataNotFound(_not_found(entry, cache, reason)) from error
    return target


def _names(entry: Entry) -> list[str]:
    """Names under which the entry's file may lie in a data directory."""
    names = [entry.path or unquote(Path(urlsplit(entry.url).path).name)]
    # A bare member name (`perturb_processed.h5ad`) is common to many zips; with its folder it is not.
    if entry.archive_member and "/" in entry.archive_member:
        names.append(entry.archive_member)
    return names


def _cached_path(entry: Entry, cache: str | Path | None) -> Path:
    name = Path(_names(entry)[0]).name
    if entry.archive_member and not name.endswith(".h5ad"):
        name = Path(entry.archive_member).name
    return cache_directory(cache) / entry.name / name


def _own(entry: Entry, path: Path, cache: str | Path | None) -> Path:
    """The user's own file; where it is a zip, the member, extracted into the cache."""
    zipped = entry.archive_member is not None and path.is_file() and zipfile.is_zipfile(path)
    if zipped or entry.archive_member is None:
        expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
    if not zipped:
        return path
    target = _cached_path(entry, cache)
    if target.is_file() and read_record(target).get("archive_sha256") == sha256_of(path):
        return _verified(entry, target)
    with replacing(target) as temporary:
        extract(path, entry.archive_member, temporary)
        record = {
            "archive": str(path),
            "archive_member": entry.archive_member,
            "archive_sha256": sha256_of(path),
            "sha256": sha256_of(temporary),
        }
        write_json(record_path(target), record)
    return target


def _verified(entry: Entry, path: Path) -> Path:
    """A cached file that is what its record says; one that somebody put there is recorded as it is now."""
    record = read_record(path)
    if not record:
        record = {"url": entry.url, "sha256": sha256_of(path), "archive_sha256": None}
        write_json(record_path(path), record)
    expect_sha256(path, record["sha256"], f"{entry.name}: sha256 recorded when it was first fetched")
    if entry.archive_member is None:
        expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
    elif entry.sha256 and record["archive_sha256"] not in (None, entry.sha256.lower()):
        raise ChecksumError(
            f"{entry.name}: sha256 of the zip: expected {entry.sha256.lower()}, got "
            f"{record['archive_sha256']} when {path} was extracted; delete that file and "
            f"{record_path(path).name} to fetch it again"
        )
    return path


def _package_file(entry: Entry) -> Path:
    package, _, inside = entry.package_file.partition("/")
    # find_spec does not run the package (importing scanpy takes seconds).
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for path in (Path(folder) / inside for folder in folders):
        if path.is_file():
            expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
            return path
    found = "is not installed" if spec is None else f"does not ship it (looked in {', '.join(folders)})"
    raise DataNotFound(f"dataset {entry.name!r}: expected the file {entry.package_file!r}; {package} {found}")


def _not_found(entry: Entry, cache: str | Path | None, reason: str) -> str:
    names = _names(entry)
    if Path(names[0]).is_absolute():
        return f"dataset {entry.name!r}: expected a file at {names[0]}, found none, and {reason}"
    data = os.environ.get("PERTURBRET_DATA") or "unset"
    address = f" (its address: {entry.url})" if entry.url else ""
    return (
        f"dataset {entry.name!r}: the file {' or '.join(map(repr, names))} is neither in PERTURBRET_DATA "
        f"({data}) nor in the cache ({_cached_path(entry, cache).parent}), and {reason}. Two ways out: put "
        f"{names[0]!r} into a directory and set PERTURBRET_DATA to it{address}, or use simulated cells: "
        "DATASET=simulated"
    )
