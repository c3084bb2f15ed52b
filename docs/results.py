"""README's tables and findings, from the files of finished reports.

    python docs/results.py take outputs/norman_subset   # copy the report's tables, with provenance, here
    python docs/results.py write                        # write README's blocks from them
    python docs/results.py check                        # does README say what the files say?
    python docs/results.py check --today                # and would today's code fit the same encoders?

A block of README.md begins with `<!-- results: DATASET TABLE -->` and ends with `<!-- end of results -->`.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

import pandas as pd

from perturbret.files.atomic import replacing, write_json, write_text
from perturbret.report.compare import ARENA
from perturbret.runs.pipeline import fit_code
from perturbret.runs.runs import read_manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS, README = ROOT / "docs" / "results", ROOT / "README.md"
# Of outputs/<dataset>/report/: what is kept, and under which name figures go to docs/figures/.
KEPT = ("headline.csv", "contrasts.csv", "headline.md")
FIGURES = {"ladder.png": "{}_ladder.png", "adaptation.png": "{}_adaptation.png"}
BLOCK = re.compile(r"(<!-- results: (\S+) (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def take(outputs: Path, results: Path = RESULTS, figures: Path = ROOT / "docs" / "figures") -> Path:
    """Copy the tables of one dataset's report, and note which commits and code its runs were made by.

    Raises
    ------
    FileNotFoundError
        The report is not finished.
    ValueError
        Its runs were made from a checkout with changes that no commit holds, or by several commits' code.
    """
    report, plan = outputs / "report", outputs / "report" / "plan.json"
    missing = [name for name in (*KEPT, "plan.json") if not (report / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{report}: expected a finished report, found no {', '.join(missing)}")
    manifests = {run: read_manifest(outputs / run) for run in json.loads(plan.read_text())["runs"]}
    unfinished = [run for run, manifest in manifests.items() if "evaluation" not in manifest]
    if unfinished:
        raise ValueError(f"{outputs}: expected every run to be evaluated, {unfinished[0]} is not")
    dirty = [run for run, manifest in manifests.items() if manifest["environment"]["git_dirty"]]
    if dirty:
        raise ValueError(
            f"{outputs}: expected runs of a commit, {dirty[0]} was made from uncommitted changes"
        )
    made = {
        "dataset": outputs.name,
        "n_runs": len(manifests),
        "fingerprint": _one(outputs, {m["fit"]["context"]["fingerprint"] for m in manifests.values()}),
        "commits": sorted({m["environment"]["git_commit"] for m in manifests.values()}),
        "code": {
            encoder: _one(outputs, {m["fit"]["code"] for m in manifests.values() if _encoder(m) == encoder})
            for encoder in sorted({_encoder(m) for m in manifests.values()})
        },
        "sha256": {name: hashlib.sha256((report / name).read_bytes()).hexdigest() for name in KEPT},
    }
    target = results / outputs.name
    target.mkdir(parents=True, exist_ok=True)
    pairs = [(report / name, target / name) for name in KEPT]
    pairs += [(report / name, figures / as_.format(outputs.name)) for name, as_ in FIGURES.items()]
    for source, place in pairs:
        if source.is_file():
            with replacing(place) as temporary:
                Path(temporary).write_bytes(source.read_bytes())
    write_json(target / "made.json", made)
    return target


def render(readme: str, results: Path = RESULTS) -> str:
    """README's text with every block written from its file.

    Raises
    ------
    ValueError
        A block names a table that is not there, or a file is not the one that the report wrote.
    """

    def block(match: re.Match) -> str:
        begin, dataset, name, end = match.groups()
        made = json.loads((results / dataset / "made.json").read_text())
        file = next(
            (
                results / dataset / kept
                for kept in KEPT
                if Path(kept).stem == name.removesuffix("-text")
                and kept.endswith(".md") == name.endswith("-text")
            ),
            None,
        )
        if file is None or not file.is_file():
            raise ValueError(f"README.md: expected one of {', '.join(KEPT)} of {dataset}, got {name!r}")
        if hashlib.sha256(file.read_bytes()).hexdigest() != made["sha256"][file.name]:
            raise ValueError(f"{file}: was changed after the report wrote it")
        if file.suffix == ".md":
            return begin + file.read_text().strip() + "\n" + end
        return begin + _markdown(pd.read_csv(file, dtype=str, keep_default_na=False)) + "\n" + end

    return BLOCK.sub(block, readme)


def stale(results: Path = RESULTS) -> list[str]:
    """Data sets whose tables today's code would not make again, with the kind of encoder that it would refit."""
    return [
        f"{path.parent.name}: {encoder}"
        for path in sorted(results.glob("*/made.json"))
        for encoder, code in json.loads(path.read_text())["code"].items()
        if _today(encoder) != code
    ]


def _today(encoder: str) -> str:
    """Hash of the code that fits encoders of a kind today; empty for a kind that there is no longer."""
    try:
        return fit_code({"encoder": encoder, "search": {}})
    except ValueError:
        return ""


def _encoder(manifest: dict) -> str:
    return manifest["fit"]["params"]["encoder"]


def _one(outputs: Path, values: set) -> str:
    if len(values) != 1:
        raise ValueError(f"{outputs}: expected one value for all runs, got {sorted(values)}")
    return values.pop()


def _markdown(table: pd.DataFrame) -> str:
    # Where one track and one share of labels was run, every row says the same of them.
    table = table.drop(columns=[name for name in ARENA if name in table and table[name].nunique() < 2])
    rows = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("take").add_argument("outputs", type=Path)
    commands.add_parser("write")
    commands.add_parser("check").add_argument("--today", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.command == "take":
        print(take(asked.outputs.resolve()))
        return 0
    text = README.read_text(encoding="utf-8")
    wanted = render(text)
    if asked.command == "write":
        write_text(README, wanted)
        return 0
    problems = (
        []
        if text == wanted
        else ["README.md does not say what docs/results says: python docs/results.py write"]
    )
    if asked.today:
        problems += [f"fitted by other code than today's: {run}" for run in stale()]
    print("\n".join(problems) or "README.md says what docs/results says")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
