"""Write files so that a reader sees the old one or the whole new one, never a part."""

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = re.compile("no space left on device|disk quota exceeded|disk is full", re.IGNORECASE)
# Bytes: no notebook could be written into less.
_AS_GOOD_AS_FULL = 1 << 16


class DiskFull(OSError):
    """No space is left on a device, or within the user's quota; `filename` is what could not be written."""


def disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from or in the course of, says that no space is left.

    Not all that write raise an OSError with its number: safetensors and HDF5 have errors of their own, with the
    system's words in their message.
    """
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def no_space(path: str | os.PathLike) -> str | None:
    """`no space left on device: ...` where the file system of `path` is as good as full, else None."""
    place = Path(path)
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free >= _AS_GOOD_AS_FULL and (status.f_favail or not status.f_files):
        return None
    return f"no space left on device: {free:,} bytes and {status.f_favail:,} files free in {place}"


@contextmanager
def reporting_full(path: str | os.PathLike) -> Iterator[None]:
    """Within the block, an error that comes of a full disk is raised as DiskFull, which names `path`."""
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        raise DiskFull(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from error


@contextmanager
def replacing(path: str | os.PathLike, *, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` when the block ends well.

    Works for a file or a directory that the block makes at the temporary path. A directory replaces an
    existing directory; whatever stood at `path` is gone only after the new one is complete on disk. When
    the block raises, the temporary is removed and `path` is as it was.

    keep : when the block ends, what another process has put at `path` meanwhile stays, and the temporary goes: for
    places named by their content, which somebody may be reading.

    Raises
    ------
    FileNotFoundError
        The block made nothing at the temporary path.
    DiskFull
        There was no space for what the block writes.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     with replacing(Path(directory) / "result.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     print([file.name for file in Path(directory).iterdir()])
    ['result.txt']
    """
    with reporting_full(path), _replacing(Path(path), keep) as temporary:
        yield temporary


@contextmanager
def _replacing(path: Path, keep: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}"
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written to {temporary.name}, which was to become {path}")
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            _fsync(file)
        if keep:
            _move_unless_there(temporary, path)
        elif temporary.is_dir() and path.is_dir():
            retired = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _move_unless_there(temporary: Path, path: Path) -> None:
    if path.exists():
        return
    try:
        os.replace(temporary, path)
    except OSError:
        if not path.exists():  # else another process was first, since the look above
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     write_text(f"{directory}/note.txt", "β-globin")
    ...     print(Path(directory, "note.txt").read_text(encoding="utf-8"))
    β-globin
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON to `path` atomically.

    Raises
    ------
    ValueError
        `content` holds a NaN or an infinity, which JSON cannot carry.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     write_json(f"{directory}/result.json", {"mask": "all_targets"})
    ...     print(Path(directory, "result.json").read_text(encoding="utf-8"), end="")
    {
      "mask": "all_targets"
    }
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
