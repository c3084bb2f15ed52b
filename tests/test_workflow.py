"""The workflow: resume after a kill, failures kept and named, nothing run before everything is checked."""

import dataclasses
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pages import external_requests, missing_anchors

from perturbret.data.sources import load_registry, make_entry
from perturbret.runs.pipeline import fitting_code
from perturbret.workflow.grid import load_grid
from perturbret.workflow.snakemake import (
    RULES,
    Progress,
    counted,
    data_stamp,
    duration,
    exclusive,
    find_profile,
    make_plan,
    notebook_code,
    planned,
)

ROOT = Path(__file__).resolve().parents[1]

# Each toy notebook notes that it ran, and writes a file that depends on its parameters and on the file before it.
HEAD = """import os, pathlib, time
folder = pathlib.Path(os.environ["PERTURBRET_OUTPUTS"]) / "toy" / (place)
with open(folder.parent / "calls.log", "a") as calls:
    calls.write(f"{folder.name}/number\\n")
"""
TOYS = {
    "01_data_audit": (
        "dataset = 'x'",
        '"audit"',
        "fds = pathlib.Path('/proc/self/fd')\n"
        "held = [os.readlink(fd) for fd in fds.iterdir() if os.path.exists(fd)] if fds.exists() else ['.lock']\n"
        "(folder / 'held.txt').write_text(str(any(name.endswith('.lock') for name in held)))",
    ),
    "02_vocab_coverage": ("dataset = 'x'", '"vocab"', "(folder / 'dataset.txt').write_text(dataset)"),
    "03_baselines": (
        "dataset = 'x'\nencoder = 'a'\nmask = 'none'\nseed = 0\nrun = ''",
        "run",
        "time.sleep(0.3)\nassert encoder != 'bad', 'told to fail'\n"
        "(folder / 'model.txt').write_text(f'{encoder} {seed}')",
    ),
    "05_retrieval_eval": (
        "dataset = 'x'\nencoder = 'a'\nmask = 'none'\nseed = 0\ntimes = 2\nrun = ''",
        "run",
        "(folder / 'scores.txt').write_text((folder / 'model.txt').read_text() * times)",
    ),
    "06_ablation_report": (
        "dataset = 'x'\nruns = []\nfailed = []",
        '"report"',
        "scores = {run: folder.parent / run / 'scores.txt' for run in runs if run not in failed}\n"
        "lines = [f'{run}: {path.read_text()}' for run, path in scores.items()]\n"
        "(folder / 'comparison.csv').write_text('\\n'.join([*lines, f'failed: {failed}']))",
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with toy notebooks and a grid of two runs that work and one that fails."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    for name, (parameters, place, body) in TOYS.items():
        code = HEAD.replace("(place)", place).replace("number", name[:2]) + body
        cells = [new_markdown_cell(f"# {name}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        nbformat.write(
            new_notebook(cells=[*cells, new_code_cell(code)]), folder / "notebooks" / f"{name}.ipynb"
        )
    blocks = ["recipes: [good]\n    vary: {seed: [0, 1]}", "recipes: [bad]\n    vary: {seed: [0]}"]
    (folder / "grid.yaml").write_text(
        "runs:\n" + "".join(f"  - notebook: 03_baselines\n    {b}\n" for b in blocks)
    )
    (folder / "good.grid.yaml").write_text(
        "runs:\n  - {notebook: 03_baselines, recipes: [good], vary: {seed: [0]}}\n"
    )
    (folder / "good.yaml").write_text("encoder: good\n")
    (folder / "bad.yaml").write_text("encoder: bad\n")
    (folder / "toy.yaml").write_text("name: toy\nsimulate: {seed: 0}\n")
    return folder


def start(project, outputs, *words, grid="grid.yaml"):
    """The report command on the toy project, as a process group of its own."""
    command = [
        sys.executable,
        "-m",
        "perturbret",
        "report",
        "--dataset",
        "toy.yaml",
        "--grid",
        grid,
        "--cores",
        "2",
    ]
    command += ["--outputs", outputs, "--notebooks", "notebooks", *words]
    return subprocess.Popen(
        command,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def calls(outputs):
    path = outputs / "toy" / "calls.log"
    return sorted(path.read_text().split()) if path.exists() else []


def results(outputs):
    """Content of everything that the notebooks wrote, and what else is there by name."""
    files = [path for path in outputs.rglob("*") if path.is_file() and ".snakemake" not in path.parts]
    names = {path.relative_to(outputs).as_posix() for path in files} - {"toy/calls.log"}
    return names, {
        path.relative_to(outputs): path.read_text() for path in files if path.suffix in (".txt", ".csv")
    }


@pytest.fixture(scope="module")
def undisturbed(project):
    """Outputs, exit status and words of a report that nothing disturbed."""
    return project / "calm", *finish(start(project, "calm"))


ALL = ["audit/01", "bad-none-seed0/03", "good-none-seed0/03", "good-none-seed0/05"]
ALL = sorted([*ALL, "good-none-seed1/03", "good-none-seed1/05", "report/06", "vocab/02"])


def test_a_failure_is_kept_and_named_and_the_others_finish(project, undisturbed):
    outputs, code, said = undisturbed
    assert code == 1, said
    assert calls(outputs) == ALL
    assert (outputs / "toy" / "vocab" / "dataset.txt").read_text() == str((project / "toy.yaml").resolve())
    kept = outputs / "toy" / "bad-none-seed0" / "failed" / "03_baselines.ipynb"
    assert "told to fail" in kept.read_text() and kept.with_suffix(".html").exists()
    assert [path.name for path in kept.parents[1].iterdir()] == ["failed"]
    last = said.splitlines()[-2:]
    where = kept.relative_to(outputs.parent)
    assert last[0] == f"FAILED bad-none-seed0 03_baselines: AssertionError: told to fail; kept: {where}"
    assert re.fullmatch(r"1 notebook failed after .*: calm/index.html", last[1])
    report = (outputs / "toy" / "report" / "comparison.csv").read_text().splitlines()
    assert report == [f"good-none-seed{n}: good {n}good {n}" for n in (0, 1)] + ["failed: ['bad-none-seed0']"]


def test_every_notebook_at_work_holds_the_lock(undisturbed):
    assert (undisturbed[0] / "toy" / "audit" / "held.txt").read_text() == "True"


def test_progress_is_visible(undisturbed):
    said = undisturbed[2]
    assert "8 notebooks to execute, 2 at a time" in said
    assert re.search(
        r"^\[\d/8\] good-none-seed1 03_baselines \d+ \w+; about \d+ \w+ left$", said, re.MULTILINE
    )
    assert re.search(r"^\[\d/8\] FAILED bad-none-seed0 03_baselines: AssertionError", said, re.MULTILINE)
    assert re.search(r"^\[1/1\] report 06_ablation_report \d+ \w+$", said, re.MULTILINE)


def test_pages_are_whole_and_request_nothing(undisturbed):
    outputs = undisturbed[0]
    pages = sorted(outputs.rglob("*.html"))
    assert len(pages) == len(ALL) + 1
    for page in pages:
        text = page.read_text()
        assert external_requests(text) == [] and missing_anchors(text) == [] and text.endswith("</html>\n")
        for link in re.findall(r'href="([^#"]+)"', text):
            assert (page.parent / link).is_file(), f"{page.name} -> {link}"
    assert "bad-none-seed0/failed/03_baselines.html" in (outputs / "index.html").read_text()


def finished(log):
    """Outputs of the jobs that Snakemake's log calls finished."""
    jobs = dict(re.findall(r"output: (\S+?)\.ipynb, .*\n +jobid: (\d+)", log))
    ended = set(re.findall(r"Finished jobid: (\d+)", log))
    return {output[: output.index("/") + 3] for output, job in jobs.items() if job in ended}


def test_after_a_kill_at_any_moment_only_unfinished_runs_are_redone(project, undisturbed):
    outputs = project / "killed"
    process = start(project, "killed")
    events, log = (outputs / "toy" / "report" / name for name in ("events.jsonl", "workflow.log"))
    deadline = time.time() + 300
    while not (events.exists() and '"done"' in events.read_text()):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    wait = random.uniform(0, 4)
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished(log.read_text())
    for notebook in outputs.glob("toy/*/[0-9]*.ipynb"):
        assert nbformat.read(notebook, 4).metadata.papermill.exception is None
        assert notebook.with_suffix(".html").read_text().endswith("</html>\n")
    called = calls(outputs)
    code, said = finish(start(project, "killed"))
    assert code == 1, said
    again = calls(outputs)
    for call in called:
        again.remove(call)
    context = f"killed {wait:.2f} s after the first notebook; finished: {sorted(before)}; redone: {again}"
    assert before.isdisjoint(again), context
    assert set(again) | set(called) == set(ALL), context
    assert results(outputs) == results(undisturbed[0]), context
    assert list(outputs.rglob(".*.tmp*")) == [], context


def test_a_corrected_recipe_redoes_its_run_and_nothing_else(project, undisturbed):
    outputs, before = undisturbed[0], calls(undisturbed[0])
    (project / "bad.yaml").write_text("encoder: better\n")
    # A new time stamp on unchanged content is no change.
    (project / "notebooks" / "01_data_audit.ipynb").touch()
    code, said = finish(start(project, "calm"))
    assert code == 0, said
    again = calls(outputs)
    for call in before:
        again.remove(call)
    assert again == ["bad-none-seed0/03", "bad-none-seed0/05", "report/06"]
    assert not (outputs / "toy" / "bad-none-seed0" / "failed").exists()
    assert "failed: []" in (outputs / "toy" / "report" / "comparison.csv").read_text()
    assert "failed" not in (outputs / "index.html").read_text().partition("<main>")[2]


def index_links(outputs):
    return set(re.findall(r'href="([^#"]+)"', (outputs / "index.html").read_text()))


def test_a_profile_of_the_users_own_is_not_applied_and_a_dry_run_is_not_finished(project):
    (project / "dry").mkdir()
    text = (ROOT / "workflow" / "profiles" / "default" / "config.yaml").read_text()
    (project / "dry" / "config.yaml").write_text(text + "dry-run: true\n")
    code, said = finish(start(project, "dried", "--profile", str(project / "dry"), grid="good.grid.yaml"))
    assert code == 1 and "NOT finished after" in said and not re.search(r"^finished", said, re.MULTILINE)
    assert "0 of 1 run are evaluated" in said and "dry run" in said and calls(project / "dried") == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAKEMAKE_PROFILE", str(project / "dry"))
        code, said = finish(start(project, "dried", grid="good.grid.yaml"))
    assert code == 0 and re.search(r"^finished after", said, re.MULTILINE), said
    # Nothing is left to do now, and that is no failure.
    assert finish(start(project, "dried", grid="good.grid.yaml"))[0] == 0


def test_results_of_other_data_are_moved_aside_and_made_anew(project):
    entry, outputs = project / "toy.yaml", project / "corrected"
    assert finish(start(project, "corrected", grid="good.grid.yaml"))[0] == 0
    before, links = calls(outputs), index_links(outputs)
    entry.write_text("name: toy\nsimulate: {seed: 1}\n")
    try:
        code, said = finish(start(project, "corrected", grid="good.grid.yaml"))
    finally:
        entry.write_text("name: toy\nsimulate: {seed: 0}\n")
    assert code == 0 and "the data, or what its entry says of them, have changed (fingerprint " in said, said
    assert calls(outputs) == sorted(before * 2) and index_links(outputs) == links
    (old,) = (outputs / "toy" / "superseded").iterdir()
    assert {path.name for path in old.iterdir()} == {"audit", "good-none-seed0", "report", "vocab"}
    assert (old / "good-none-seed0" / "05_retrieval_eval.html").exists()


@pytest.mark.parametrize(
    ("grid", "words", "said"),
    [
        ("recipes: [typo]", [], "unknown parameter 'encodr'; nearest: 'encoder'"),
        ("recipes: [good]", ["--dataset", "tyo"], "dataset 'tyo' is unknown"),
        ("recipes: [good]", ["--profile", "slrum"], "expected a directory with a config.yaml, or one of"),
        ("recipes: [good]", ["--cores", "0"], "cores: expected at least 1, got 0"),
    ],
)
def test_nothing_runs_before_everything_is_checked(project, grid, words, said):
    (project / "typo.yaml").write_text("encodr: good\n")
    (project / "other.yaml").write_text(f"runs:\n  - notebook: 03_baselines\n    {grid}\n")
    code, heard = finish(start(project, "none", *words, grid="other.yaml"))
    assert code == 2 and said in heard and "Traceback" not in heard
    assert not (project / "none").exists()


def test_the_lock_is_held_by_jobs_that_outlive_a_killed_driver(tmp_path, capsys):
    code = (
        "import subprocess, sys, time; from pathlib import Path; from perturbret.workflow.snakemake import exclusive\n"
        "job = 'until [ -e go ]; do sleep 0.05; done; echo over > over'\n"
        "with exclusive(Path(sys.argv[1])) as lock:\n"
        "    subprocess.Popen(['sh', '-c', job], stdin=lock, stdout=subprocess.DEVNULL, cwd=sys.argv[1])\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, cwd=ROOT)
    assert driver.stdout.readline() == b"ready\n"
    driver.kill()
    driver.communicate()
    with open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    letting_go = threading.Timer(0.3, (tmp_path / "go").touch)
    letting_go.start()
    with exclusive(tmp_path):
        assert (tmp_path / "over").exists()
        assert f"waiting: process {driver.pid}" in capsys.readouterr().out
    letting_go.join()


def test_a_notebook_is_known_by_the_code_that_it_runs(tmp_path):
    def code(source, kind="code"):
        cell = {"cell_type": kind, "metadata": {}, "source": source}
        (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
        return notebook_code(tmp_path / "a.ipynb")

    source = "from perturbret.data.splits import make_split\nmake_split()"
    assert code(source) == code(f"%matplotlib inline\n{source}") == code(f"# why\n{source}")
    assert len({code(source), code(f"{source}\n1"), code("pass"), code("pass", "markdown")}) == 4


def test_a_run_is_known_by_the_code_that_fits_its_method(tmp_path):
    entry = load_registry()["simulated"]
    grid = load_grid(ROOT / "params" / "ablation.yaml", entry)
    plan = make_plan(entry, grid, file=None, workdir=tmp_path, notebooks=ROOT / "notebooks")
    codes = {run["recipe"]: run["fitting_code"] for run in plan["runs"].values()}
    assert codes["pca"] == fitting_code("pca") != codes["mlp"] == fitting_code("mlp")
    assert codes["scgpt_head"] == codes["scgpt_full"] == fitting_code("scgpt")
    unknown = dataclasses.replace(grid.runs[0], parameters={"encoder": "good"})
    grid = dataclasses.replace(grid, runs=(unknown,))
    plan = make_plan(entry, grid, file=None, workdir=tmp_path, notebooks=ROOT / "notebooks")
    assert [run["fitting_code"] for run in plan["runs"].values()] == [""]


def test_the_stamp_follows_the_data_not_the_place(tmp_path):
    keys = {"name": "toy", "path": "toy.h5ad", "condition_key": "c", "control_label": "ctrl"}
    file, moved = tmp_path / "a.h5ad", tmp_path / "b.h5ad"
    file.write_bytes(b"cells")
    moved.write_bytes(b"cells")
    stamp = data_stamp(make_entry(keys), file)
    assert stamp == data_stamp(
        make_entry({**keys, "path": "/other/b.h5ad", "citation": "me", "license": "MIT"}), moved
    )
    assert stamp != data_stamp(make_entry({**keys, "min_cells": 7}), file)
    moved.write_bytes(b"cells!")
    assert stamp != data_stamp(make_entry(keys), moved)


def test_profiles_are_found_by_name_or_path(tmp_path):
    assert find_profile("slurm") == ROOT / "workflow" / "profiles" / "slurm"
    (tmp_path / "config.yaml").write_text("keep-going: true\n")
    assert find_profile(str(tmp_path)) == tmp_path.resolve()


TABLE = """Job stats:
job          count
---------  -------
all              1
audit            1
baselines        3
evaluate         4
total            9
"""


@pytest.fixture
def progress(tmp_path):
    """A Progress of 8 notebooks on 2 cores, what it said, and a way to feed it events."""
    said = []
    (tmp_path / "log").write_text(TABLE)
    follower = Progress(tmp_path / "events", tmp_path / "log", RULES, cores=2, say=said.append)

    def feed(run, name, event, **details):
        line = {"output": f"/x/{run}/{name}.ipynb", "event": event, "time": time.time(), **details}
        with open(tmp_path / "events", "a") as file:
            file.write(json.dumps(line) + "\n")
        follower.update()

    return follower, said, feed


def test_the_time_left_follows_what_was_measured(progress):
    follower, said, feed = progress
    feed("a", "03_baselines", "done", seconds=10)
    # 2 more fits at 10 s, 5 others not measured yet, taken for average: 70 s on 2 cores.
    assert said == ["8 notebooks to execute, 2 at a time", "[1/8] a 03_baselines 10 s; about 35 s left"]
    feed("a", "05_retrieval_eval", "done", seconds=40)
    assert said[-1] == "[2/8] a 05_retrieval_eval 40 s; about 82 s left"
    feed("b", "03_baselines", "failed", error="ValueError: no", kept="/x/b/failed/03_baselines.ipynb")
    assert said[-1] == "[3/8] FAILED b 03_baselines: ValueError: no"
    assert follower.failed == {("b", "03_baselines"): ("ValueError: no", "/x/b/failed/03_baselines.ipynb")}


def test_what_was_planned_and_never_ended_is_undone(progress):
    follower, said, feed = progress
    feed("a", "03_baselines", "done", seconds=1)
    feed("b", "03_baselines", "failed", error="no", kept=None)
    assert follower.undone() == 6
    with open(follower.log, "a") as log:
        log.write("8 of 8 steps (100%) done\n")
    assert follower.undone() == 0


def test_on_a_full_disk_a_killed_notebook_is_laid_to_that(progress, monkeypatch):
    follower, said, feed = progress
    feed("a", "03_baselines", "start")
    monkeypatch.setattr(
        "perturbret.workflow.snakemake.no_space", lambda path: "no space left on device: 0 bytes"
    )
    follower.finish()
    assert follower.failed["a", "03_baselines"] == ("no space left on device: 0 bytes", None)


def test_a_notebook_that_never_ended_was_killed(progress):
    follower, said, feed = progress
    feed("a", "03_baselines", "start")
    feed("b", "03_baselines", "start")
    feed("b", "03_baselines", "done", seconds=1)
    follower.finish()
    assert follower.failed == {("a", "03_baselines"): ("was killed (out of memory, or from outside)", None)}
    assert said[-1].startswith("FAILED a 03_baselines: was killed")


def test_half_a_line_of_an_event_waits_for_the_rest(progress, tmp_path):
    follower, said, feed = progress
    line = json.dumps({"output": "/x/a/03_baselines.ipynb", "event": "done", "time": 0, "seconds": 1}) + "\n"
    (tmp_path / "events").write_text(line[:20])
    follower.update()
    assert follower.seconds == {}
    with open(tmp_path / "events", "a") as file:
        file.write(line[20:])
    follower.update()
    assert follower.seconds == {"03_baselines": [1]}


def test_the_number_of_jobs_is_read_when_its_table_is_whole():
    assert planned(TABLE, RULES) == {"01_data_audit": 1, "03_baselines": 3, "05_retrieval_eval": 4}
    assert planned(TABLE[:-15], RULES) == {} and planned("Nothing to be done", RULES) == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (7300, "2 h 2 min")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_counts_read_well():
    assert (counted(1, "run"), counted(2, "run"), counted(0, "run")) == ("1 run", "2 runs", "0 runs")
