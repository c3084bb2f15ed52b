"""Write files so that a reader sees the old one or the whole new one, never a part."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    """
    path = Path(path)
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
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON to `path` atomically.

    Raises
    ------
    ValueError
        `content` holds a NaN or an infinity, which JSON cannot carry.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
