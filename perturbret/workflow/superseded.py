"""Move aside what was made from other data than today's, so that the workflow makes it anew."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..data.sources import Entry
from ..data.splits import recorded_fingerprint
from ..files.atomic import write_json
from ..files.provenance import code_hash
from ..runs.runs import read_manifest

# Of a dataset: which data its pages and results belong to.
RECORD = "data.json"
FOLDER = "superseded"
# Not made from one state of the data (`cache` is found by content), or not results.
_KEPT = (FOLDER, "cache", "splits")


@dataclass(frozen=True)
class Made:
    """Something that was made from data.

    Attributes
    ----------
    path : pathlib.Path
        A run's directory, another directory of pages, or a split's file.
    fingerprint : str or None
        Of the data; None where nothing says.
    """

    path: Path
    fingerprint: str | None


def supersede(entry: Entry, stamp: str, workdir: Path, *, say: Callable[[str], None]) -> list[Path]:
    """Move results of other data to `superseded/<fingerprint>/`; write down whose results the others are.

    Each is moved in one step, and the record is written last: after a kill at any moment, the next call goes on, and
    nothing is lost or taken for a result of today's data.

    Parameters
    ----------
    entry : Entry
    stamp : str
        Changes with the file and with what the entry says of it; the data are loaded only where it has changed, or the
        code that loads.
    workdir : pathlib.Path
        outputs/<dataset>/
    say : callable
        Told what will be moved, before.

    Returns
    -------
    list of pathlib.Path
        Where things were moved to.

    Raises
    ------
    ScreenError, CountsError, ValueError
        The data cannot be loaded; nothing was moved.
    """
    from ..data.datasets import load_screen

    record, code = read_record(workdir), code_hash("data.datasets:load_screen")
    known = record.get("stamp") == stamp and record.get("code") == code
    fingerprint = record["fingerprint"] if known else load_screen(entry).fingerprint
    others = other_data(workdir, fingerprint, record.get("fingerprint"))
    if others:
        splits = sum(made.path.parent.name == "splits" for made in others)
        was = ", ".join(sorted({_short_fingerprint(made) for made in others}))
        say(
            f"{entry.name}: the data, or what its entry says of them, have changed (fingerprint {was}, now "
            f"{fingerprint[:12]}): moving {len(others) - splits} folders of runs and pages and {splits} split files, "
            f"which were made from the others, to {workdir / FOLDER}"
        )
    moved = [_move(made, workdir) for made in others]
    if not known:
        write_json(workdir / RECORD, {"stamp": stamp, "code": code, "fingerprint": fingerprint})
    return moved


def read_record(workdir: Path) -> dict:
    """`stamp`, `code` and `fingerprint` of the data that the results of a dataset belong to; empty where not known."""
    path = workdir / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def other_data(workdir: Path, fingerprint: str, recorded: str | None) -> list[Made]:
    """What in outputs/<dataset>/ was made from data with another fingerprint; splits last.

    recorded : the fingerprint in the record. Of what says nothing itself (pages of notebooks 01, 02 and 06, runs that
    were begun) it is known by that, and without a record by the company of what says something.
    """
    folders = [path for path in sorted(workdir.glob("[!.]*")) if path.is_dir() and path.name not in _KEPT]
    made = [Made(path, fingerprint_of(path)) for path in folders]
    made += [
        Made(path, recorded_fingerprint(path)) for path in sorted((workdir / "splits").glob("*.parquet"))
    ]
    told = [each for each in made if each.fingerprint not in (None, fingerprint)]
    default = recorded or (told[0].fingerprint if told else fingerprint)
    others = [Made(each.path, each.fingerprint or default) for each in made]
    return [each for each in others if each.fingerprint != fingerprint]


def fingerprint_of(directory: Path) -> str | None:
    """Of the data that a run was made from; None where its manifest does not say, or there is none."""
    return read_manifest(directory).get("fit", {}).get("context", {}).get("fingerprint")


def _move(made: Made, workdir: Path) -> Path:
    inside = made.path.relative_to(workdir)
    number = 1
    while (target := workdir / FOLDER / _place(made, number) / inside).exists():
        number += 1
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(made.path, target)
    return target


def _place(made: Made, number: int) -> str:
    return _short_fingerprint(made) + (f"-{number}" if number > 1 else "")


def _short_fingerprint(made: Made) -> str:
    return made.fingerprint[:12]
