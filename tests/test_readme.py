"""What README.md says can be done and found: commands are run somewhere, examples load, files are there."""

import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from perturbret.data.sources import read_entry
from perturbret.workflow.grid import load_grid

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CI = ".github/workflows/ci.yml"

# Command, or how it begins -> where it is run, and the words that run it there.
COVERED = {
    "make report": (CI, "run: make report DATASET=simulated"),
    "make test": (CI, "run: make test"),
    "make lint": (CI, "run: make lint"),
    "make env ENV=active": (CI, "run: make env ENV=active"),
    "make help": ("tests/test_environment.py", 'make("help")'),
    "make lab": ("tests/test_environment.py", "def test_make_lab"),
    "make format": ("tests/test_environment.py", "def test_make_format"),
    "make bench": ("tests/test_environment.py", "def test_make_bench"),
    "conda env create -f environment.yml": (CI, "environment-file: environment.yml"),
    "conda activate perturbret": (CI, "activate-environment: perturbret"),
    "cd notebooks": ("tests/test_readme.py", 'cwd=ROOT / "notebooks"'),
    "papermill": ("tests/test_readme.py", "def test_notebook_runs_by_itself"),
    "source .venv/bin/activate": ("tests/test_environment.py", '"VIRTUAL_ENV": str(active)'),
}
SHORTER = {"04_finetune.ipynb": ("-y", "settings: {epochs: 1}")}
# Paths that README names and that are not in git: results, and a reader's own files.
NEW_ON_THE_PAGE = {
    f"perturbret/{name}.py" for name in ("encoders/detected", "networks/dense", "networks/dense_settings")
}
NOT_IN_GIT = ("outputs/", "my_", ".venv", "out.ipynb")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    """Every command: lines of bash blocks, and spans in backticks that begin with a known program."""
    lines = [line.split(" #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    spans = re.findall(r"`((?:make|conda|papermill|source|python|pip) [^`]+)`", README.replace("\n", " "))
    return sorted({line for line in [*lines, *spans] if line and not line.startswith("#")})


def makefile_variables():
    return set(re.findall(r"^([A-Z]+) *[?:]?=", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_two_commands_are_there():
    assert {"make report", "make test"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_command_is_run_by_a_test_or_by_ci(command):
    begins = [start for start in COVERED if command == start or command.startswith(start + " ")]
    assert begins, f"README says {command!r}; nothing in COVERED runs it"
    file, words = COVERED[max(begins, key=len)]
    assert words in (ROOT / file).read_text()


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_make_command_names_a_target_and_variables_that_exist(command):
    target, *assignments = shlex.split(command)[1:]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word.split("=")[0] for word in assignments} <= makefile_variables()
    assert all("=" in word for word in assignments)


def test_make_report_uses_options_that_the_command_line_knows():
    recipe = re.search(r"-m perturbret report (.*)", (ROOT / "Makefile").read_text())[1]
    ask = [sys.executable, "-m", "perturbret", "report", "--help"]
    known = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    options = re.findall(r"--\w+", recipe)
    assert len(options) == 4
    assert [option for option in options if option not in known] == []


def test_examples_of_a_screen_and_a_grid_can_be_used(tmp_path):
    screen, recipe, grid = blocks("yaml")
    for name, text in (("my_screen", screen), ("my_model", recipe), ("my_grid", grid)):
        assert f"`{name}.yaml`" in README
        (tmp_path / f"{name}.yaml").write_text(text)
    entry = read_entry(tmp_path / "my_screen.yaml")
    assert entry.name == "my_screen"
    runs = {run.name: run for run in load_grid(tmp_path / "my_grid.yaml", entry).runs}
    assert runs["my_model-all_targets-seed0"].parameters["encoder"] == "obsm:X_mymodel"
    assert len(runs) == 5 * 3 * 3


def test_notebook_runs_by_itself(tmp_path):
    """All commands, 04 shortened by a parameter: training for as long as README's runs in the notebook's own test."""
    alone = [line for line in commands() if line.startswith("papermill")]
    assert "cd notebooks" in commands() and len(alone) == 3
    fit, tune, judge = (run_alone(command, tmp_path) for command in alone)
    (encoder,) = fit.glob("*/logreg-*-seed7/encoder")
    assert (encoder / "weights.safetensors").exists()
    (encoder,) = tune.glob("*/scgpt_lora_head-*-seed7/encoder")
    assert (encoder / "member0.safetensors").exists()
    assert judge == tune and (encoder.parent / "summary.csv").exists()


def run_alone(command, tmp_path):
    """Run a papermill command in notebooks/; the outputs that it wrote to."""
    words = [str(tmp_path / word) if word == "out.ipynb" else word for word in shlex.split(command)[1:]]
    done = subprocess.run(
        [sys.executable, "-m", "papermill", *words, *SHORTER.get(words[0], ())],
        cwd=ROOT / "notebooks",
        env={**os.environ, "PERTURBRET_OUTPUTS": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / "outputs"


def test_named_files_exist():
    spans = {word for span in re.findall(r"`([^`\n]+)`", README) for word in span.split() if "/" in word}
    paths = {word.split("=")[-1] for word in spans if re.fullmatch(r"[\w=.<>*/-]+", word)}
    missing = [path for path in paths if not path.startswith(NOT_IN_GIT) and not (ROOT / path).exists()]
    assert len(paths) > 3 and missing == []


def tree():
    """Paths of README's tree, taken from its indentation; directories end with a slash."""
    section = README.split("## What is where")[1].split("##")[0]
    found, folders = set(), []
    for line in re.findall(r"^    ( *\S.*)$", section, re.MULTILINE):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = folders[:depth]
        found.add("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return found


def test_tree_has_a_line_for_each_file():
    listed = tree()
    patterns = (
        "perturbret/*.py",
        "perturbret/[a-z]*/",
        "notebooks/*.ipynb",
        "workflow/*.py",
        "workflow/Snakefile",
        "params/*",
        "docs/*.md",
    )
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    files = {path.relative_to(ROOT).as_posix() + "/" * path.is_dir() for path in found}
    assert files - {"perturbret/__init__.py"} - listed == set()
    assert {path for path in listed if path != "outputs/" and not (ROOT / path).exists()} == set()


def test_design_names_the_files_of_every_room_and_no_others():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    named = {room: sorted(re.findall(r"\w+", text.replace("the opponents:", ""))) for room, text in rows}
    rooms = {path.parent for path in (ROOT / "perturbret").glob("*/__init__.py")}
    there = {room.name: sorted(p.stem for p in room.glob("*.py") if p.stem != "__init__") for room in rooms}
    assert {room: files for room, files in named.items() if room in there} == there


PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_module_and_function_that_a_page_names_is_there(page):
    for name in set(re.findall(r"\bperturbret(?:\.[A-Za-z_]\w*)+", page.read_text())):
        assert pkgutil.resolve_name(name) is not None
    for path in set(re.findall(r"\bperturbret/[\w/]+\.py", page.read_text())) - NEW_ON_THE_PAGE:
        assert (ROOT / path).is_file(), path


def test_tree_says_what_each_file_is():
    section = README.split("## What is where")[1].split("##")[0]
    bare = [line.strip() for line in re.findall(r"^    ( *\S+)$", section, re.MULTILINE)]
    assert [line for line in bare if not line.endswith("/")] == []


def test_index_of_decisions_is_complete():
    folder = ROOT / "docs" / "decisions"
    pages = {path.name for path in folder.glob("[0-9]*.md")}
    assert pages == set(re.findall(r"\]\(([^)]+\.md)\)", (folder / "README.md").read_text()))
    assert len({name[:4] for name in pages}) == len(pages)
