"""The examples of docs/extending.md: their files are written into a copy of the package and go through every step."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = {part.splitlines()[0]: part for part in PAGE.split("\n## ")[1:]}
# Fits and judges one run of the tiny screen: encoder, settings as Python, outputs.
RUN = """
import ast, sys
import toy
from perturbret.runs.pipeline import evaluate_run
from perturbret.runs.runs import open_run
encoder, settings, track, outputs = sys.argv[1:]
run = open_run(toy.tiny_screen(), encoder=encoder, mask="all_targets", seed=0, track=track, outputs=outputs,
    settings=ast.literal_eval(settings))
evaluate_run(run, libraries=["mean"], query_sizes=[1], poolings=["scores"], n_resamples=20)
print(run.directory)
"""


def files(example):
    """Path (and, where only a line is added, after which word) -> text of every file of an example."""
    blocks = re.findall(r"^```\w+\n# (\S+?\.\w+)(?:, in (\w+))?\n(.*?)^```", example, re.M | re.S)
    return {(path, after): text for path, after, text in blocks}


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the package with the files of all examples."""
    place = tmp_path_factory.mktemp("extended")
    shutil.copytree(
        ROOT / "perturbret",
        place / "perturbret",
        ignore=shutil.ignore_patterns("__pycache__", "checkpoint_*"),
    )
    shutil.copytree(ROOT / "params", place / "params")
    shutil.copy(ROOT / "pyproject.toml", place)
    for example in EXAMPLES.values():
        for (path, after), text in files(example).items():
            if after:
                there = (place / path).read_text()
                assert there.count(f"\n{after} = {{\n") == 1
                text = there.replace(f"\n{after} = {{\n", f"\n{after} = {{\n{text}")
            else:
                assert not (place / path).exists(), f"{path} is there already"
            (place / path).write_text(text)
    return place


@pytest.fixture
def judged(extended, tmp_path):
    """Fit and judge one run with the copy; its directory."""

    def run(encoder, settings=None, plugins="", track="in_dist"):
        done = subprocess.run(
            [sys.executable, "-c", RUN, encoder, repr(settings), track, str(tmp_path)],
            cwd=extended,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(extended), str(ROOT / "tests")]),
                "PERTURBRET_PLUGINS": plugins,
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return Path(done.stdout.splitlines()[-1])

    return run


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_in_few_files(name):
    found = files(EXAMPLES[name])
    assert len(re.findall("^```", EXAMPLES[name], re.M)) == 2 * len(found), "a block without its path"
    grid = "`params/ablation.yaml`" in EXAMPLES[name]
    assert 1 <= len(found) + grid <= 3
    assert sum(bool(line.strip()) for text in found.values() for line in text.splitlines()) < 60


def test_the_method_is_chosen_saved_and_judged(judged, extended):
    directory = judged("detected")
    selection = pd.read_csv(directory / "selection.csv")
    assert selection["least"].tolist() == [1, 2, 3] and selection["chosen"].sum() == 1
    assert len(pd.read_csv(directory / "summary.csv")) and len(pd.read_csv(directory / "null_control.csv"))
    assert (extended / "params" / "detected.yaml").read_text() == "encoder: detected\n"


def test_the_metric_is_a_column_with_its_chance(judged, extended):
    directory = judged("mean_shift", plugins=str(extended / "my_metrics.py"))
    rows = pd.read_csv(directory / "summary.csv").query("metric == 'top_half'")
    assert len(rows) and rows["estimate"].between(0, 1).all() and (rows["chance"].sub(0.5).abs() < 0.1).all()
    scores = pd.read_parquet(directory / "scores.parquet")
    sure = scores[(scores["rank"] % 1 == 0)]
    assert (sure["top_half"] == (sure["rank"] <= sure["n_candidates"] // 2)).mean() > 0.95


@pytest.mark.parametrize("mode", ["frozen", "lora_head"])
def test_the_network_family_is_trained_proved_and_judged(judged, mode):
    small = {"batch_size": 16, "epochs": 2, "rank": 2, "head_dim": 8} if mode != "frozen" else {}
    directory = judged("dense", settings={"mode": mode, **small})
    assert directory.name == f"dense_{mode}-all_targets-seed0"
    assert len(pd.read_csv(directory / "summary.csv"))
    assert (directory / "history.csv").exists() == (mode != "frozen")


def test_the_track_asks_about_the_cells_it_names(judged, extended):
    directory = judged("mean_shift", plugins=str(extended / "other_depth.py"), track="other_depth")
    assert directory.name == "mean_shift-all_targets-seed0-other_depth"
    roles = pd.read_parquet(directory.parent / "splits" / "other_depth-seed0.parquet")["role"]
    assert roles.value_counts(normalize=True)["query"] == pytest.approx(0.2, abs=0.05)
    assert len(pd.read_csv(directory / "summary.csv"))
