"""The grid: which runs, under which names, with which parameters; refused before anything runs."""

import json
from pathlib import Path

import pytest

from perturbret.data.sources import load_registry, make_entry
from perturbret.workflow.grid import GridError, load_grid
from perturbret.workflow.parameters import (
    ParameterError,
    check_parameters,
    declared_parameters,
    load_parameters,
)

ROOT = Path(__file__).resolve().parents[1]
CELLS = {
    "01_data_audit": "dataset = 'auto'",
    "02_vocab_coverage": "dataset = 'auto'\nvocabulary = ''\nn_hvg = 2000",
    "03_baselines": "dataset = 'auto'\nencoder = 'pca'\nmask = 'none'\nseed = 0\nsearch = {}\nrate = 0.1\nrun = ''\n"
    "outputs = ''\noverwrite = False",
    "05_retrieval_eval": "dataset = 'auto'\nencoder = 'pca'\nmask = 'own_targets'\nseed = 0\nrun = ''\nsizes = [1]",
    "06_ablation_report": "dataset = 'auto'\nruns = []\nn_resamples = 10",
}


@pytest.fixture
def entry():
    """Maker of a dataset entry with a file, and with whatever keys are given."""
    fixed = {"name": "toy", "path": "toy.h5ad", "condition_key": "c", "control_label": "ctrl"}
    return lambda **keys: make_entry({**fixed, **keys})


@pytest.fixture
def grid(tmp_path, entry):
    """Loads a grid, given as YAML, with the recipes given as name to YAML, on toy notebooks."""

    def load(text, recipes=None, which=None, **options):
        for name, source in CELLS.items():
            cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
            (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": [cell]}))
        for name, content in (recipes or {"a": "encoder: a", "b": "encoder: b"}).items():
            (tmp_path / f"{name}.yaml").write_text(content)
        (tmp_path / "grid.yaml").write_text(text)
        return load_grid(tmp_path / "grid.yaml", which or entry(), notebooks=tmp_path, **options)

    return load


def block(recipes="[a, b]", vary="{mask: [none, all_targets], seed: [0, 1]}", more=""):
    return f"runs:\n  - notebook: 03_baselines\n    recipes: {recipes}\n    vary: {vary}\n{more}"


def test_runs_are_recipes_times_what_varies(grid):
    found = grid(block())
    names = [f"{r}-{m}-seed{s}" for r in "ab" for m in ("none", "all_targets") for s in (0, 1)]
    assert [run.name for run in found.runs] == names and found.skipped == ()
    assert found.runs[3].parameters == {
        "dataset": "toy",
        "run": "a-all_targets-seed1",
        "overwrite": True,
        "encoder": "a",
        "mask": "all_targets",
        "seed": 1,
    }
    assert found.audit == found.vocab == {"dataset": "toy"}
    assert found.report == {"dataset": "toy", "runs": names}


def test_the_vocabulary_page_gets_the_parameters_that_the_grid_names(grid):
    found = grid(block(more="vocab: {vocabulary: /models/human, n_hvg: 500}"))
    assert found.vocab == {"dataset": "toy", "vocabulary": "/models/human", "n_hvg": 500}
    assert found.audit == {"dataset": "toy"}


def test_the_evaluation_gets_what_the_fit_got_and_its_own(grid):
    (run,) = grid(block("[a]", "{seed: [3]}", "evaluation: {sizes: [1, 2]}\nreport: {n_resamples: 7}")).runs
    # The default of the fit counts (mask none), not that of the evaluation (own_targets).
    assert run.evaluation == {
        "dataset": "toy",
        "run": "a-none-seed3",
        "encoder": "a",
        "mask": "none",
        "seed": 3,
        "sizes": [1, 2],
    }


def test_the_recipe_is_handed_to_notebooks_that_declare_it(grid, monkeypatch):
    monkeypatch.setitem(CELLS, "03_baselines", CELLS["03_baselines"] + "\nrecipe = ''")
    (run,) = grid(block("[b]", "{seed: [0]}")).runs
    assert run.parameters["recipe"] == "b" and "recipe" not in run.evaluation


def test_other_varied_names_enter_the_run_name(grid):
    found = grid(block("[a]", "{seed: [0], rate: [0.1, 1e-2], encoder: ['obsm:X_a']}"), {"a": "search: {}"})
    assert [run.name for run in found.runs] == [
        "a-none-seed0-rate=0.1-encoder=obsm_X_a_cd6c34",
        "a-none-seed0-rate=0.01-encoder=obsm_X_a_cd6c34",
    ]


def test_the_dataset_may_be_given_as_a_path(grid):
    found = grid(block(), dataset="/data/mine.yaml")
    assert found.audit["dataset"] == found.runs[0].parameters["dataset"] == "/data/mine.yaml"


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, ["a"]),
        ({"batch_key": "lane"}, ["a", "b"]),
        ({"batch_key": "lane", "guide_key": "g"}, ["a", "b", "c"]),
    ],
)
def test_recipes_that_do_not_apply_are_skipped_with_the_reason(grid, entry, keys, kept):
    text = block("[a, {recipe: b, needs: batch_key}, {recipe: c, needs: guide_key}]", "{seed: [0]}")
    found = grid(text, {"a": "", "b": "", "c": ""} | {k: f"encoder: {k}" for k in "abc"}, entry(**keys))
    assert [run.recipe for run in found.runs] == kept
    assert [name for name, _ in found.skipped] == [name for name in "abc" if name not in kept]
    assert all("which the dataset toy does not have" in reason for _, reason in found.skipped)


@pytest.mark.parametrize(("simulate", "kept"), [({}, "abc"), ({"n_batches": 1}, "bc")])
def test_a_simulated_screen_has_what_its_parameters_say(grid, simulate, kept):
    text = block(
        "[{recipe: a, needs: batch_key}, {recipe: b, needs: simulate}, {recipe: c, needs: guide_key}]"
    )
    which = make_entry({"name": "sim", "simulate": simulate})
    found = grid(text, {k: f"encoder: {k}" for k in "abc"}, which)
    assert sorted({run.recipe for run in found.runs}) == list(kept)


@pytest.mark.parametrize(
    ("text", "recipes", "error", "said"),
    [
        (
            block(),
            {"a": "encodr: a", "b": ""},
            ParameterError,
            "a.yaml .*unknown parameter 'encodr'; nearest: 'encoder'",
        ),
        (block(), {"a": "rate: '1e4'", "b": ""}, ParameterError, "rate: expected a number"),
        (block(vary="{sed: [0]}"), None, ParameterError, "unknown parameter 'sed'; nearest: 'seed'"),
        (block(vary="{seed: 0}"), None, GridError, "vary: seed: expected a list of values, got 0"),
        (block(vary="{seed: []}"), None, GridError, "vary: seed: expected a list"),
        (block(vary="{encoder: [x]}"), None, GridError, "'encoder' varies, but the recipe a.yaml sets it"),
        (block("[a, bb]"), None, FileNotFoundError, "recipe 'bb': found no bb.yaml; nearest: 'b'"),
        (block("[a, a]"), None, GridError, "two runs are named 'a-none-seed0'"),
        (
            block("[{recipe: a, needs: lanes}]"),
            None,
            GridError,
            "needs: expected one of batch_key, .*control_label.*got 'lanes'",
        ),
        (block("[{recipe: a, need: batch_key}]"), None, GridError, "unknown key 'need'; nearest: 'needs'"),
        (block("[{recipe: a, needs: batch_key}]"), None, GridError, "no recipe of this grid applies"),
        (block("a"), None, GridError, "recipes: a list"),
        (block(more="evaluations: {}"), None, GridError, "unknown key 'evaluations'; nearest: 'evaluation'"),
        (
            block(more="evaluation: {size: [1]}"),
            None,
            ParameterError,
            "unknown parameter 'size'; nearest: 'sizes'",
        ),
        (
            block(more="vocab: {n_hvgs: 1}"),
            None,
            ParameterError,
            "unknown parameter 'n_hvgs'; nearest: 'n_hvg'",
        ),
        (block(more="evaluation: {seed: 1}"), None, GridError, "'seed' belongs to the fit"),
        (block(more="report: {runs: [x]}"), None, ParameterError, "runs: is set by the workflow"),
        (block(), {"a": "dataset: x", "b": ""}, ParameterError, "dataset: is set by the workflow"),
        ("audit: {}", None, GridError, "runs: expected a list of blocks"),
        (block().replace("03_b", "04_b"), None, FileNotFoundError, "04_baselines.ipynb"),
    ],
)
def test_what_is_wrong_is_named(grid, text, recipes, error, said):
    with pytest.raises(error, match=said):
        grid(text, recipes)


@pytest.mark.parametrize(("name", "runs"), [("norman_subset", 101), ("thp1", 104), ("simulated", 109)])
def test_the_default_grid_fits_the_notebooks(name, runs):
    found = load_grid(ROOT / "params" / "ablation.yaml", load_registry()[name])
    assert len(found.runs) == runs
    assert {run.parameters["mask"] for run in found.runs} == {"all_targets", "own_targets", "none"}
    assert {run.parameters["seed"] for run in found.runs} == {0, 1, 2}


def test_the_shorter_grid_is_part_of_the_default_one():
    entry = load_registry()["thp1"]
    whole, short = (load_grid(ROOT / "params" / f"{name}.yaml", entry) for name in ("ablation", "short"))
    assert len(short.runs) == 57 and {run.name for run in short.runs} < {run.name for run in whole.runs}


@pytest.mark.parametrize(
    ("grid", "dataset", "tracks", "skipped"),
    [
        ("tracks", "thp1", ["in_dist", "batch_disjoint", "guide_disjoint", "unseen_gene"], []),
        (
            "tracks",
            "norman_subset",
            ["in_dist", "unseen_gene"],
            ["track batch_disjoint", "track guide_disjoint"],
        ),
        ("unseen_combo", "norman_subset", ["in_dist", "unseen_combo", "unseen_gene"], []),
    ],
)
def test_a_grid_of_tracks_leaves_out_those_that_the_dataset_does_not_have(grid, dataset, tracks, skipped):
    entry = load_registry()[dataset]
    found, default = (load_grid(ROOT / "params" / f"{name}.yaml", entry) for name in (grid, "ablation"))
    assert list(dict.fromkeys(run.varied["track"] for run in found.runs)) == tracks
    assert len(found.runs) == 3 * 18 * len(tracks) and {name for name, _ in found.skipped} == set(skipped)
    same = {run.name for run in found.runs if run.varied["track"] == "in_dist"}
    assert same < {run.name for run in default.runs}


RECIPES = [
    path
    for path in sorted((ROOT / "params").glob("*.yaml"))
    if path.stem
    not in ("datasets", "checkpoints", "references", "ablation", "short", "tracks", "unseen_combo")
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits_its_notebook(path):
    notebook = "04_finetune" if path.stem.startswith("scgpt") else "03_baselines"
    declared = declared_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
    assert check_parameters(load_parameters(path), declared, where=path.name)


def test_whatever_varies_is_in_the_names_and_two_values_are_two_runs(grid):
    values = "[0.1, -1, 1, 1e-5]"
    searches = "[{C: [0.1]}, {C: [1.0]}, {C: [1.0], penalty: [l1, l2, elasticnet, none, another, one more]}]"
    found = grid(block("[a]", f"{{mask: [none], seed: [0], rate: {values}, search: {searches}}}"))
    names = [run.name for run in found.runs]
    assert len(set(names)) == len(names) == 12 and names[0].startswith("a-none-seed0-rate=0.1-search=C_0.1_")
    assert all(len(name) < 120 and set(name).isdisjoint("/ '\"{}[]:,") for name in names)
    assert {run.recipe for run in found.runs} == {"a"}
    assert list(found.runs[0].varied) == ["mask", "seed", "rate", "search"]
    assert len({json.dumps(run.varied) for run in found.runs}) == 12
    assert [run.parameters["search"]["C"] for run in found.runs[:2]] == [[0.1], [1.0]]
