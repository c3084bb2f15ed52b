"""Download, check, record: a file gets its final name only when it is the one that was meant."""

import errno
import hashlib
import json
import os
import shutil
import stat
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from .atomic import DiskFull, replacing, write_json
from .names import nearest

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class ChecksumError(ValueError):
    """A file is not the one that its entry, or its record from the first download, describes."""


def sha256_of(path: str | Path) -> str:
    """sha256 of a file's content, in hexadecimal; read once per process while the file stays as it is.

    Of a directory (a zarr store): sha256 over the relative name and the sha256 of every file in it, sorted by name,
    each followed by a zero byte.
    """
    if os.path.isdir(path):
        digest = hashlib.sha256()
        files = {file.relative_to(path).as_posix(): file for file in Path(path).rglob("*") if file.is_file()}
        for name in sorted(files):
            digest.update(f"{name}\0{sha256_of(files[name])}\0".encode())
        return digest.hexdigest()
    status = os.stat(path)
    return _sha256(str(path), status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int, inode: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expect_sha256(path: Path, sha256: str | None, what: str) -> None:
    """Raise ChecksumError unless `path` has `sha256` (None: not known, nothing to compare)."""
    if sha256 is not None and sha256_of(path) != sha256.lower():
        raise ChecksumError(
            f"{what}: expected {sha256.lower()}, got {sha256_of(path)} for {path}; "
            "delete that file to fetch it again, or correct the checksum"
        )


def record_path(path: Path) -> Path:
    """Where the origin and checksum of a cached file are kept: beside it."""
    return path.with_name(path.name + ".json")


def read_record(path: Path) -> dict:
    """What is recorded of a cached file; empty where nothing is."""
    record = record_path(path)
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def write_record(path: Path, file: Path, **origin: object) -> dict:
    """Record where `path` is from; its checksum is that of `file`, which may be still to be renamed."""
    record = {"archive_sha256": None, **origin, "sha256": sha256_of(file)}
    write_json(record_path(path), record)
    return record


def download(
    url: str,
    target: Path,
    *,
    label: str,
    sha256: str | None = None,
    archive_member: str | None = None,
    h5ad: bool = True,
    timeout: float | None = None,
    progress: bool = True,
) -> None:
    """Download an h5ad, a zip that holds one, or a file of a checkpoint to `target`, and its record beside it.

    Parameters
    ----------
    url : str
    target : Path
        Gets the file. A record of an earlier download must agree with the new content.
    label : str
        Names the dataset or the checkpoint in messages and on the progress bar.
    sha256 : str, optional
        Of what the address serves.
    archive_member : str, optional
        Path of the h5ad in the zip.
    h5ad : bool, default True
        Whether the content has to be HDF5.
    timeout : float, optional
        Seconds for everything; default none, but 30 s of silence end it.
    progress : bool, default True

    Raises
    ------
    OSError
        The network or the disk failed, or `timeout` passed (TimeoutError).
    ChecksumError
        The content is not what `sha256` or the record says.
    ValueError
        The content is not an h5ad, or not a zip with that member.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".download-{os.getpid()}-{threading.get_ident()}"
    part.mkdir(exist_ok=True)
    silence = 30 if timeout is None else min(30, timeout)

    def work(stop: threading.Event) -> None:
        import pooch

        file = part / "download"
        # pooch sets the total; without one, tqdm refuses to be asked whether it is there.
        bar = _Bar(total=1, desc=f"{label}: {target.name}", unit="B", unit_scale=True, disable=not progress)
        bar.stop = stop
        pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16, timeout=silence)(url, str(file), None)
        served = sha256_of(file)
        if sha256 is not None and served != sha256.lower():
            raise ChecksumError(f"{label}: sha256 of {url}: expected {sha256.lower()}, got {served}")
        if archive_member:
            file = extract(file, archive_member, part / "member")
        if h5ad:
            _expect_h5ad(file, f"{label}: {url}")
        found = sha256_of(file)
        known = read_record(target).get("sha256", found)
        if known != found:
            raise ChecksumError(
                f"{label}: {url}: expected sha256 {known}, recorded at the first download, got {found}: the file "
                f"there has changed; delete {record_path(target)} to accept it"
            )
        if stop.is_set():
            raise TimeoutError("stopped")
        # The record first, so that a file under its final name always has one.
        write_record(
            target,
            file,
            url=url,
            archive_member=archive_member,
            archive_sha256=served if archive_member else None,
            downloaded=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        with replacing(target) as temporary:
            os.replace(file, temporary)

    try:
        _limited(work, timeout)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def extract(archive: Path, member: str, target: Path) -> Path:
    """Copy one member of a zip to `target`; no name inside the zip chooses a path on this machine.

    Raises
    ------
    ValueError
        The file is not a whole, unencrypted zip, or `member` is not a file in it.
    DiskFull
        The disk has not enough space.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            names = opened.namelist()
            if member not in names:
                raise ValueError(f"{archive}: expected a zip member {member!r}; {nearest(member, names)}")
            info = opened.getinfo(member)
            if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                raise ValueError(f"{archive}: expected {member!r} to be a file, got a folder or a link")
            free = shutil.disk_usage(target.parent).free
            if info.file_size > free:
                raise DiskFull(
                    errno.ENOSPC,
                    f"No space left on device: {archive}: {member!r} needs {info.file_size} bytes, "
                    f"{target.parent} has {free}",
                )
            with opened.open(info) as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{archive}: expected a whole, unencrypted zip file, got: {error}") from error
    return target


def _expect_h5ad(file: Path, what: str) -> None:
    with open(file, "rb") as stream:
        start = stream.read(len(HDF5_SIGNATURE))
    if start != HDF5_SIGNATURE:
        raise ValueError(
            f"{what}: expected an HDF5 file (h5ad), got {os.stat(file).st_size} bytes, {start!r}..."
        )


def _limited(work: Callable[[threading.Event], None], timeout: float | None) -> None:
    """Run `work(stop)`; after `timeout` seconds set `stop` and raise TimeoutError without waiting for it.

    In a thread, since looking up a host's name can hang for longer than any timeout of a connection.
    """
    stop, outcome = threading.Event(), Future()

    def run() -> None:
        try:
            outcome.set_result(work(stop))
        except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
            outcome.set_exception(error)

    if timeout is None:
        return work(stop)
    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], timeout).done:
        stop.set()
        raise TimeoutError(f"not finished within {timeout:g} seconds")
    return outcome.result()


class _Bar(tqdm):
    """The progress bar that pooch drives; it also ends a download whose caller has given up."""

    stop: threading.Event

    def update(self, n: float | None = 1) -> bool | None:
        if self.stop.is_set():
            raise TimeoutError("stopped")
        return super().update(n)
