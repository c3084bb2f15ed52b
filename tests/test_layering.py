"""Rooms with one-way doors: what each may import, what it may need, and that its door opens."""

import ast
import importlib
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "perturbret"

# Room -> the rooms that it may import from. Evaluation and alignment are siblings and know nothing of one another.
# Evaluation knows an encoder only by its methods and stands below: encoders choose their settings through it.
DOORS = {
    "files": "",
    "data": "files",
    "evaluation": "files data",
    "combinations": "files data evaluation",
    "alignment": "files data",
    "encoders": "files data evaluation",
    "networks": "files data evaluation",
    "scgpt": "files data evaluation alignment networks",
    "runs": "files data evaluation encoders networks",
    "pretraining": "files data alignment networks scgpt runs",
    "report": "files data evaluation combinations alignment encoders networks scgpt runs pretraining",
    "workflow": "files data runs",
}
# torch is slow to import and heavy, so that nothing else may need it.
NETWORKS = {"networks", "scgpt", "pretraining", "report.pretraining"}
PURE = {"evaluation", "combinations"}  # functions of arrays and tables
PURE_IMPORTS = {"numpy", "pandas", "scipy", "lazy_loader"}


def imports(source, name=""):
    """(own, other): modules of the package, and top-level names of others, that a module's source imports anywhere.

    name : dotted, within the package; empty for a file outside of it.
    """
    own, other = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["perturbret", *name.split(".")][: -node.level] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            names = [f"{base}.{a.name}" for a in node.names] if base == "perturbret" else [base]
        else:
            continue
        for full in names:
            first, _, rest = full.partition(".")
            if first == "perturbret":
                own.add(rest)
            elif first not in sys.stdlib_module_names:
                other.add(first)
    return own - {"", "__version__"}, other


def violations(sources):
    """Sentences on what breaks the rules among modules given as dotted name -> source."""
    found, graph = [], {}
    for name, source in sorted(sources.items()):
        own, other = imports(source, name)
        room = name.partition(".")[0]
        if room not in DOORS:
            found.append(f"{name}: in no room of tests/test_layering.py")
            continue
        graph[name] = {target for target in own if target in sources and target != name}
        for target in sorted(own):
            there = target.partition(".")[0]
            if there != room and there not in DOORS[room].split():
                found.append(f"{name} -> {target}: {room} has no door to {there}")
        if room in PURE and other - PURE_IMPORTS:
            found.append(f"{name}: {room} imports {', '.join(sorted(other - PURE_IMPORTS))}")
        if "torch" in other and not {room, name} & NETWORKS:
            found.append(f"{name}: imports torch, and {room} holds no network")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


@pytest.fixture(scope="module")
def sources():
    names = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.glob("*/*.py")}
    return {".".join(parts): path.read_text() for path, parts in names.items()}


def test_imports_point_one_way(sources):
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"data.a": "from ..encoders.base import load_encoder"}, "data.a -> encoders.base: data has no door"),
        ({"data.a": "def f():\n    from perturbret import report"}, "data.a -> report: data has no door"),
        ({"evaluation.a": "from ..alignment import align"}, "evaluation.a -> alignment: evaluation has no"),
        ({"alignment.a": "import perturbret.evaluation.stats"}, "alignment.a -> evaluation.stats: alignment"),
        (
            {"workflow.a": "from ..encoders import fit_baseline"},
            "workflow.a -> encoders: workflow has no door",
        ),
        (
            {"evaluation.a": "def f():\n    from sklearn.metrics import ndcg_score"},
            "evaluation.a: evaluation imports sklearn",
        ),
        ({"encoders.a": "import torch.nn as nn"}, "encoders.a: imports torch, and encoders holds no network"),
        ({"runs.a": "from .b import c", "runs.b": "from .a import d"}, "cycle: "),
        ({"helpers.a": "import os"}, "helpers.a: in no room"),
    ],
)
def test_each_violation_is_seen(extra, said):
    found = violations(extra)
    assert len(found) == 1 and found[0].startswith(said)


@pytest.mark.parametrize("room", DOORS)
def test_every_door_says_what_lives_there_and_opens(room):
    """A name behind a door must not be a module's: which of the two one got would hang on what was imported before."""
    door = importlib.import_module(f"perturbret.{room}")
    assert 3 <= len(door.__doc__.strip().splitlines()) <= 7 and door.__all__
    modules = {path.stem for path in (PACKAGE / room).glob("*.py")}
    assert not modules & set(door.__all__)
    for name in door.__all__:
        assert getattr(door, name) is not None


def test_modules_live_in_rooms(sources):
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in PACKAGE.rglob("*.py")} == {*DOORS, PACKAGE.name}
    names = {name.rpartition(".")[2] for name in sources}
    assert {"utils", "util", "helpers", "common", "misc", "core", "manager"} & names == set()


def undeclared(files, requirements):
    """Imported distributions that no requirement names, by file."""
    declared = {canonicalize_name(Requirement(line).name) for line in requirements}
    distributions = packages_distributions()
    local = {path.stem for path in files} | {"perturbret"}
    found = {}
    for path in files:
        name = ".".join(path.parts[-2:]) if PACKAGE in path.parents else ""
        for imported in imports(path.read_text(), name)[1] - local:
            if not {canonicalize_name(d) for d in distributions.get(imported, [imported])} & declared:
                found.setdefault(path.name, set()).add(imported)
    return found


def test_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    assert undeclared(list(PACKAGE.rglob("*.py")), project["dependencies"]) == {}
    every = [*project["dependencies"], *groups["test"], *groups["dev"]]
    outside = [
        p for folder in ("tests", "benchmarks", "notebooks", "docs") for p in ROOT.glob(f"{folder}/*.py")
    ]
    assert undeclared(outside, every) == {}
    assert undeclared([PACKAGE / "evaluation" / "stats.py"], ["pandas"]) == {"stats.py": {"numpy", "scipy"}}
