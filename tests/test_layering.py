"""Imports of the package point one way: pure functions, data, evaluation, encoders, bookkeeping."""

import ast
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

# From the bottom up; a module imports from its own layer and those before it. Evaluation knows an encoder only by its
# methods and stands below: encoders choose their settings through it.
LAYERS = {
    "pure": (
        "atomic binning column_guard conditions confounding counts gene_columns gene_matching gene_space "
        "gene_space_file gene_stats genes hashing labels library masking metrics nulls prepare queries remap retrieval "
        "screen spelling splits stats target_matching whitening"
    ),
    "data": (
        "align annotations chunks datasets download fetch h5ad ingest pretrained reference_cells registry simulate "
        "vocabulary"
    ),
    "evaluation": "evaluate scoring",
    "encoders": (
        "adapt adapters average baselines batches bayes checkpoint corpus decoders dropout embeddings encoders "
        "features finetune heads linear logistic losses masked_values methods mlp model modes monitor naive_bayes "
        "neighbours network optimise pretraining proofs references scgpt settings spectrum tokens training trees "
        "trunk validation"
    ),
    "bookkeeping": (
        "__main__ audit checks compare contenders contrasts coverage execute figures grid html index parameters "
        "pipeline pretraining_report pretraining_run progress provenance readouts report runs sentences shown "
        "superseded tables training_report wording workflow"
    ),
}
PURE_IMPORTS = {"numpy", "pandas", "scipy", "pyarrow"}
# Modules that hold a network; torch is slow to import and heavy, so that no other may need it.
NETWORKS = {
    "adapters",
    "checkpoint",
    "decoders",
    "dropout",
    "finetune",
    "heads",
    "losses",
    "masked_values",
    "model",
    "modes",
    "monitor",
    "network",
    "optimise",
    "pretraining",
    "pretraining_report",
    "proofs",
    "scgpt",
    "trunk",
}


def imports(source):
    """Modules of the package, and top-level names of others, that a module's source imports anywhere."""
    own, other = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = (
                [f"perturbret.{node.module}"] if node.module else [f"perturbret.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.ImportFrom) and node.module == "perturbret":
            names = [f"perturbret.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "perturbret":
                own.add(rest.split(".")[0] or "__init__")
            elif first not in sys.stdlib_module_names:
                other.add(first)
    return own - {"__version__", "__init__"}, other


def violations(sources):
    """Sentences on what breaks the layering among modules given as name -> source."""
    level = {name: i for i, names in enumerate(LAYERS.values()) for name in names.split()}
    layer_names = list(LAYERS)
    found = [
        f"{name}: in no layer of tests/test_layering.py" for name in sorted(sources) if name not in level
    ]
    graph = {}
    for name, source in sorted(sources.items()):
        own, other = imports(source)
        graph[name] = own
        mine = level.get(name, len(layer_names) - 1)
        for target in sorted(own):
            if level.get(target, mine) > mine:
                layers = f"{layer_names[mine]} module imports from {layer_names[level[target]]}"
                found.append(f"{name} -> {target}: {layers}")
        if mine == 0 and other - PURE_IMPORTS:
            found.append(f"{name}: pure module imports {', '.join(sorted(other - PURE_IMPORTS))}")
        if "torch" in other and name not in NETWORKS:
            found.append(f"{name}: imports torch and holds no network")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"cycle: {' -> '.join(error.args[1])}")
    return found


@pytest.fixture(scope="module")
def sources():
    return {path.stem: path.read_text() for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_imports_point_one_way(sources):
    assert violations(sources) == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (
            {"masking": "from .encoders import load_encoder"},
            "masking -> encoders: pure module imports from encoders",
        ),
        ({"masking": "def f():\n    from perturbret import report"}, "masking -> report: pure module"),
        (
            {"encoders": "import perturbret.runs"},
            "encoders -> runs: encoders module imports from bookkeeping",
        ),
        (
            {"metrics": "def f():\n    from sklearn.metrics import ndcg_score"},
            "metrics: pure module imports sklearn",
        ),
        ({"evaluate": "import torch.nn as nn"}, "evaluate: imports torch and holds no network"),
        ({"runs": "from .report import a", "report": "from . import runs"}, "cycle: "),
        ({"helpers": "import os"}, "helpers: in no layer"),
    ],
)
def test_each_violation_is_seen(extra, said):
    found = violations(extra)
    assert len(found) == 1 and found[0].startswith(said)


def test_layers_name_no_module_twice():
    names = " ".join(LAYERS.values()).split()
    assert len(names) == len(set(names))


def test_package_is_flat():
    assert [
        path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()
    ] == []


def test_no_module_is_named_after_nothing(sources):
    assert {"utils", "util", "helpers", "common", "misc", "core", "manager"} & set(sources) == set()


def undeclared(files, requirements):
    """Imported distributions that no requirement names, by file."""
    declared = {canonicalize_name(Requirement(line).name) for line in requirements}
    distributions = packages_distributions()
    local = {path.stem for path in files} | {"perturbret"}
    found = {}
    for path in files:
        for name in imports(path.read_text())[1] - local:
            if not {canonicalize_name(d) for d in distributions.get(name, [name])} & declared:
                found.setdefault(path.name, set()).add(name)
    return found


def test_imported_packages_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    assert undeclared(list(PACKAGE.glob("*.py")), project["dependencies"]) == {}
    every = [*project["dependencies"], *groups["test"], *groups["dev"]]
    assert (
        undeclared(
            [
                path
                for folder in ("tests", "benchmarks", "notebooks", "docs")
                for path in ROOT.glob(f"{folder}/*.py")
            ],
            every,
        )
        == {}
    )
    assert undeclared([PACKAGE / "stats.py"], ["pandas"]) == {"stats.py": {"numpy", "scipy"}}
