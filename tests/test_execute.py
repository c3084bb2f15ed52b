"""Execution of one notebook: whole or not at all, failures kept, parameters checked first."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from perturbret import __version__
from perturbret.files.atomic import DiskFull
from perturbret.workflow.execution import NotebookFailed, execute
from perturbret.workflow.html import external_requests
from perturbret.workflow.parameters import ParameterError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def toy(tmp_path):
    """Maker of a notebook in tmp_path/notebooks with these cells after its parameters."""

    def write(*sources, name="03_toy"):
        cells = [
            new_markdown_cell("# 03 · Toy"),
            new_code_cell("fail = False\nseed = 0\nnote = 'a'", metadata={"tags": ["parameters"]}),
        ]
        cells += [new_code_cell(source) for source in sources]
        # A kernel that is registered nowhere: the running interpreter is used all the same.
        metadata = {"kernelspec": {"name": "gone", "display_name": "gone", "language": "python"}}
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
        return path

    return write


def outputs(path):
    """Texts that the cells of an executed notebook printed or returned."""
    found = []
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text") or output.get("data", {}).get("text/plain"))
    return found


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def command(*words, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "perturbret", *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_the_command_line_executes_and_renders(toy, tmp_path):
    notebook = toy(
        "import os, sys, perturbret\nprint((seed, note, sys.executable, os.getcwd()))",
        # The kernel holds the file that its caller has as standard input, where a lock may sit.
        "held = [os.path.realpath(f'/dev/fd/{n}') for n in range(3, 40) if os.path.exists(f'/dev/fd/{n}')]\n"
        "any(name.endswith('.lock') for name in held) or not os.path.exists('/proc/self/fd')",
    )
    out = tmp_path / "out" / "run-{seed}" / "03_toy.ipynb"
    out.parent.mkdir(parents=True)
    (out.parent / ".03_toy.ipynb.1234abcd.tmp.ipynb").write_text("half of a notebook that was killed")
    (tmp_path / "given.yaml").write_text("seed: 1e1\nnote: from the file\n")
    (tmp_path / ".lock").touch()
    environment = {"PERTURBRET_OUTPUTS": str(tmp_path / "out"), "PERTURBRET_EVENTS": str(tmp_path / "events")}
    with open(tmp_path / ".lock") as lock, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        done = command(
            "execute", notebook, out, "-f", tmp_path / "given.yaml", "-y", '{"seed": 3}', "-p", "seed", "1e1",
            stdin=lock,
        )  # fmt: skip
    # A kernel is interrupted when it is shut down, and one that is slow to go says so.
    said = [line for line in done.stderr.splitlines() if "KeyboardInterrupt caught in kernel" not in line]
    assert (done.returncode, said) == (0, [])
    assert names(tmp_path / "out") == ["run-{seed}/03_toy.html", "run-{seed}/03_toy.ipynb"]
    here = str((tmp_path / "notebooks").resolve())
    assert outputs(out) == [f"{(10, 'from the file', sys.executable, here)}\n", "True"]
    page = out.with_suffix(".html").read_text()
    assert external_requests(page) == [] and 'href="../index.html"' in page
    assert str(tmp_path) not in json.dumps(nbformat.read(out, 4).metadata)
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [(event["event"], event["output"]) for event in events] == [
        ("start", str(out)),
        ("done", str(out)),
    ]


def test_a_failed_notebook_is_kept_until_it_succeeds(toy, tmp_path):
    notebook = toy("'before'", "assert not fail, 'told to fail\\nand more'", "'after'")
    out = tmp_path / "out" / "03_toy.ipynb"
    with pytest.raises(NotebookFailed, match="^AssertionError: told to fail$") as caught:
        execute(notebook, out, {"fail": True})
    assert names(out.parent) == ["failed/03_toy.html", "failed/03_toy.ipynb"]
    assert caught.value.kept == out.parent / "failed" / "03_toy.ipynb"
    cells = nbformat.read(caught.value.kept, 4).cells
    assert [output.output_type for cell in cells for output in cell.get("outputs", [])] == [
        "execute_result",
        "error",
    ]
    page = (out.parent / "failed" / "03_toy.html").read_text()
    assert "This notebook failed" in page and "told to fail" in page
    execute(notebook, out, {"fail": False})
    assert names(out.parent) == ["03_toy.html", "03_toy.ipynb"]
    assert outputs(out) == ["'before'", "'after'"]


def test_a_kernel_that_dies_is_a_failure(toy, tmp_path):
    notebook = toy("'before'", "import os\nos._exit(9)", "'after'")
    out = tmp_path / "out" / "03_toy.ipynb"
    done = command("execute", notebook, out)
    assert done.returncode == 1 and "the kernel died" in done.stderr and "failed/03_toy.ipynb" in done.stderr
    assert names(out.parent) == ["failed/03_toy.html", "failed/03_toy.ipynb"]
    assert outputs(out.parent / "failed" / "03_toy.ipynb") == ["'before'"]


def test_the_callers_environment_changes_no_page(toy, tmp_path, monkeypatch):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 30\ntext.usetex: True\n")
    for name, value in {
        "MPLBACKEND": "none such",
        "PYTHONOPTIMIZE": "1",
        "MATPLOTLIBRC": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    notebook = toy(
        "from perturbret.report import figures\nfigure, (axis,) = figures.new_figure()\naxis.set_title('$5 and <b> $')",
        "import matplotlib\nmatplotlib.rcParams['lines.linewidth']",
        "assert not fail",
    )
    out = tmp_path / "out" / "03_toy.ipynb"
    with pytest.raises(NotebookFailed, match="AssertionError"):
        execute(notebook, out, {"fail": True})
    execute(notebook, out)
    assert out.with_suffix(".html").read_text().count('src="data:image/png') == 1
    assert outputs(out)[-1] == "1.5"
    # By papermill alone, nothing stands between the notebook and the environment but the package.
    import papermill

    monkeypatch.setenv("MPLBACKEND", "Agg")
    done = papermill.execute_notebook(
        str(notebook), str(tmp_path / "bare.ipynb"), kernel_name="python3", progress_bar=False
    )
    images = [o for cell in done.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(images) == 1


def test_a_full_disk_is_an_event_of_its_own(toy, tmp_path, monkeypatch):
    def full(path, text):
        raise DiskFull(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("perturbret.workflow.execution.write_text", full)
    monkeypatch.setenv("PERTURBRET_EVENTS", str(tmp_path / "events"))
    with pytest.raises(DiskFull, match="No space left on device"):
        execute(toy("1"), tmp_path / "out" / "03_toy.ipynb")
    last = json.loads((tmp_path / "events").read_text().splitlines()[-1])
    assert last["event"] == "failed" and last["kept"] is None
    assert last["error"].startswith("DiskFull: [Errno 28] No space left on device: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "sed", "1"], "unknown parameter 'sed'; nearest: 'seed'"),
        (["-p", "seed", "many"], "seed: expected a whole number"),
        (["-y", "[1]"], "-y: expected a mapping"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(toy, tmp_path, words, said):
    done = command("execute", toy("1"), tmp_path / "out" / "03_toy.ipynb", *words)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_its_version_and_speaks_under_any_locale(toy, tmp_path):
    assert command("--version").stdout == f"perturbret {__version__}\n"
    # As with a locale of another encoding than UTF-8, of which no machine is sure to have one.
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ascii_only.items():
            patch.setenv(name, value)
        notebook = toy(
            "open(note, 'w').write('é')\nprint(open(note, encoding='utf-8').read(), note)", name="03_ö"
        )
        out = tmp_path / "äus" / "03_toy.ipynb"
        done = command("execute", notebook, out, "-y", f"note: {tmp_path}/ß.txt")
    assert done.returncode == 0, done.stderr
    assert outputs(out) == [f"é {tmp_path}/ß.txt\n"] and r"\xe4us" in done.stdout


def test_wrong_paths_are_refused(toy, tmp_path):
    with pytest.raises(ValueError, match="output: expected a name ending in .ipynb, got 'a.html'"):
        execute(toy("1"), tmp_path / "a.html")
    with pytest.raises(FileNotFoundError, match="04_none.ipynb"):
        execute(tmp_path / "04_none.ipynb", tmp_path / "a.ipynb")
    with pytest.raises(ParameterError, match="unknown parameter 'x'"):
        execute(toy("1"), tmp_path / "a.ipynb", {"x": 1})


def test_executing_leaves_this_process_able_to_import_everything(toy, tmp_path):
    # Imports that papermill does not need are held off while it is imported, and only then.
    code = (
        "import sys; from perturbret.workflow.execution import execute; execute(sys.argv[1], sys.argv[2]); "
        "import pyarrow.parquet; print('rfc3987_syntax' in sys.modules)"
    )
    words = [sys.executable, "-c", code, toy("1"), tmp_path / "out" / "a.ipynb"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
