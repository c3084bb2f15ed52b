"""One cache for whatever takes long: a folder per result, named by a hash of all that it depends on, and made once."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .atomic import replacing

_RECORD = "record.json"


def cached(
    directory: str | os.PathLike,
    name: str,
    key: object,
    make: Callable[[Path], None],
    *,
    verify: bool = False,
) -> Path:
    """The folder of a result, made where it is not there yet; several processes may ask at once.

    Parameters
    ----------
    directory : path
        Gets the folder `<name>-<hash of key>`.
    name : str
    key : JSON-able
        Everything that the result depends on, code included.
    make : callable
        Writes the result's files into the folder that it is given.
    verify : bool
        Read the files and compare checksums before they are used: what is damaged is made anew. Not for files that
        are mapped into memory because they are large.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    OSError
        The directory cannot be written to.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> def make(folder):
    ...     print("made")
    ...     (folder / "sum.txt").write_text("3")
    >>> with TemporaryDirectory() as directory:
    ...     first, again = (cached(directory, "sum", {"of": [1, 2]}, make) for _ in range(2))
    made
    >>> first == again
    True
    """
    key = json.loads(json.dumps(key))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(directory) / f"{name}-{digest[:16]}"
    if path.exists():
        if _intact(path, key, verify):
            return path
        shutil.rmtree(path, ignore_errors=True)
    with replacing(path, keep=True) as temporary:
        temporary.mkdir()
        make(temporary)
        record = {"key": key, "sha256": _checksums(temporary) if verify else None}
        (temporary / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def _intact(path: Path, key: object, verify: bool) -> bool:
    """Whether the folder holds the result of this key and, where it is asked, the bytes that were written."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(record, dict) or record.get("key") != key:
        return False
    return not verify or record.get("sha256") == _checksums(path)


def _checksums(path: Path) -> dict[str, str]:
    files = (file for file in sorted(path.iterdir()) if file.name != _RECORD)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
