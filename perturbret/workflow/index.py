"""outputs/index.html: links to every report and every run that is there."""

import json
from pathlib import Path
from urllib.parse import quote

from ..files.atomic import write_text
from ..runs.runs import Identity, read_manifest
from .grid import AUDIT, COMBINATIONS, REPORT, VOCAB
from .html import BANNERED, index_page
from .superseded import Made, fingerprint_of, other_data, read_record

PAGES = "[0-9][0-9]_*.html"
# Directories of a dataset that hold no run.
OTHERS = ("report", "audit", "vocab", "combinations")


def write_index(outputs: str | Path) -> Path:
    """Write index.html, atomically, from what lies in the outputs directory; the newest report comes first.

    Returns
    -------
    Path
        Of the page.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as outputs:
    ...     page = write_index(outputs)
    ...     print(page.name, page.exists())
    index.html True
    """
    outputs = Path(outputs)
    folders = {page.parent.parent for page in outputs.glob(f"*/*/{PAGES}")}
    folders |= {page.parent.parent.parent for page in outputs.glob(f"*/*/failed/{PAGES}")}
    newest = sorted(folders, key=lambda folder: (-_time(folder / "report" / f"{REPORT}.html"), folder.name))
    page = outputs / "index.html"
    write_text(page, index_page([_dataset(folder, outputs) for folder in newest]))
    return page


def _dataset(folder: Path, outputs: Path) -> dict:
    plan = _read(folder / "report" / "plan.json")
    other = {made.path.name for made in _of_other_data(folder) if made.path.is_dir()}
    report, audit = folder / "report" / f"{REPORT}.html", folder / "audit" / f"{AUDIT}.html"
    others = [("what is in the data", audit), ("which genes scGPT knows", folder / "vocab" / f"{VOCAB}.html")]
    others.append(("which two genes a combination is of", folder / "combinations" / f"{COMBINATIONS}.html"))
    others += [(name, folder / "report" / name) for name in ("comparison.csv", "workflow.log")]
    runs = {page.parent.name for page in folder.glob(f"*/{PAGES}")}
    runs |= {page.parent.parent.name for page in folder.glob(f"*/failed/{PAGES}")}
    planned = plan.get("runs", {})
    runs -= other
    older = sorted(runs - set(planned) - set(OTHERS))
    columns, rows = _table(folder, [name for name in planned if name in runs], outputs, planned)
    old_columns, old_rows = _table(folder, older, outputs, {})
    return {
        "name": folder.name,
        "simulated": plan.get("simulated") or any(_bannered(page) for page in (report, audit)),
        "report": _address(report, outputs) if report.exists() and "report" not in other else None,
        "others": [
            (text, _address(path, outputs))
            for text, path in others
            if path.exists() and path.parent.name not in other
        ],
        "other_data": sorted(other),
        "failed": [
            (f"{page.parent.parent.name} {page.stem}", _address(page, outputs), _reason(page))
            for page in sorted(folder.glob(f"*/failed/{PAGES}"))
            if page.parent.parent.name not in other
        ],
        "tables": [
            (title, columns, rows)
            for title, columns, rows in (
                ("Runs", columns, rows),
                ("Other runs, not part of the last report", old_columns, old_rows),
            )
            if rows
        ],
    }


def _of_other_data(folder: Path) -> list[Made]:
    """What was made from other data than the dataset's own of today, as far as its results tell (see `superseded`)."""
    recorded = read_record(folder).get("fingerprint")
    if recorded is None:  # never a workflow's: the data of the newest run count
        newest = max(folder.glob("*/manifest.json"), key=_time, default=None)
        recorded = newest and fingerprint_of(newest.parent)
    return [] if recorded is None else other_data(folder, recorded, recorded)


def _table(folder: Path, runs: list[str], outputs: Path, planned: dict) -> tuple[list[str], list[dict]]:
    """Recipes down, masks across, seeds within a cell; runs of which nothing is known get a row of their own."""
    rows: dict[str, dict[str, list]] = {}
    for run in runs:
        name, column, label = _place(folder / run, planned.get(run, {}))
        pages = [*(folder / run).glob(PAGES), *(folder / run).glob(f"failed/{PAGES}")]
        links = []
        for page in sorted(pages, key=lambda page: page.name):
            failed = page.parent.name == "failed"
            links.append((page.stem[:2] + (" failed" if failed else ""), _address(page, outputs), failed))
        rows.setdefault(name, {}).setdefault(column, []).append((label, links))
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return columns, [
        {"name": name, "cells": [cells.get(column, []) for column in columns]} for name, cells in rows.items()
    ]


def _place(directory: Path, planned: dict) -> tuple[str, str, str]:
    """Row, column and label of a run: as the plan says, else as its manifest does."""
    manifest = read_manifest(directory)
    if "recipe" in planned and "varied" in planned:
        recipe, varied = planned["recipe"], dict(planned["varied"])
    elif "params" in manifest.get("fit", {}):
        identity = Identity.read(manifest)
        recipe, varied = identity.method, {"mask": identity.mask, "seed": identity.seed}
        varied |= {"train_share": identity.train_share} if identity.train_share != 1 else {}
    else:
        return directory.name, "", ""
    column = str(varied.pop("mask", ""))
    texts = [f"seed {varied.pop('seed')}"] if "seed" in varied else []
    return recipe, column, ", ".join([*texts, *(f"{key} = {value}" for key, value in varied.items())])


def _address(path: Path, outputs: Path) -> str:
    return quote(path.relative_to(outputs).as_posix())


def _reason(page: Path) -> str:
    """What stopped a failed notebook: its last traceback's last line."""
    cells = _read(page.with_suffix(".ipynb")).get("cells", [])
    errors = [
        output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"
    ]
    return f"{errors[-1]['ename']}: {errors[-1]['evalue']}".partition("\n")[0] if errors else ""


def _bannered(page: Path) -> bool:
    return page.exists() and BANNERED in page.read_text(encoding="utf-8")


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0
