"""The lock, the package metadata, the conda file and the Makefile's installation agree with one another."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Installed without its own dependencies, so that they are not followed (docs/decisions/0006-dependencies-and-lock.md).
WITHOUT_DEPENDENCIES = {"scgpt"}
MAKE_VARIABLES = (
    "DATASET GRID CORES OUTPUTS PYTHON TORCH ENV MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES".split()
)


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_environment = load_script(ROOT / "workflow" / "check_environment.py")


@pytest.fixture(scope="module")
def lock():
    return {canonicalize_name(name): version for name, version in check_environment.read_lock().items()}


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def declared(project):
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


# ---- lock --------------------------------------------------------------------------------------------------


def test_lock_is_sorted_without_duplicates():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    names = [canonicalize_name(re.split("==", line)[0]) for line in lines]
    assert names == sorted(names)
    assert len(set(names)) == len(names)


def test_every_package_of_the_lock_runs_on_any_python_311(lock):
    asked = {canonicalize_name(d.metadata["Name"]): d.metadata["Requires-Python"] for d in distributions()}
    assert [name for name in lock if not SpecifierSet(asked.get(name) or "").contains("3.11.0")] == []


def test_lock_meets_every_declared_range(declared, lock):
    unmet = [str(r) for r in declared if lock.get(canonicalize_name(r.name), "0") not in r.specifier]
    assert unmet == []


def closure(requirements, platform):
    """Names of everything that `requirements` need on a platform, read from installed metadata, and unmet ranges."""
    system = {"linux": "Linux", "darwin": "Darwin"}[platform]
    marks = {"sys_platform": platform, "platform_system": system}
    lock = {canonicalize_name(n): v for n, v in check_environment.read_lock(platform=platform).items()}
    reached, unmet, todo = set(), set(), list(requirements)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if lock.get(name, "0") not in requirement.specifier:
            unmet.add(str(requirement))
        for extra in ("", *requirement.extras):
            if (name, extra) in reached:
                continue
            reached.add((name, extra))
            try:
                needs = [] if name in WITHOUT_DEPENDENCIES else requires(name) or []
            except PackageNotFoundError:  # a package of the other platform
                continue
            parsed = [Requirement(line) for line in needs]
            todo += [r for r in parsed if not r.marker or r.marker.evaluate({"extra": extra, **marks})]
    return {name for name, _ in reached}, unmet, set(lock)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_lock_holds_what_the_project_needs_and_nothing_else(declared, platform):
    missing, other = check_environment.compare(check_environment.read_lock())
    if other:
        pytest.skip(f"this environment differs from the lock: {other}")
    reached, unmet, locked = closure(declared, platform)
    # torch's CUDA libraries come with a CUDA build of torch, at the versions that it names itself.
    cuda = {name for name in reached if re.match(r"nvidia-|cuda-|triton$", name)}
    assert unmet - {str(r) for r in unmet if canonicalize_name(Requirement(r).name) in cuda} == set()
    assert reached - cuda == locked
    assert missing == []


def test_lock_reader_refuses_a_line_that_pins_nothing(tmp_path):
    path = tmp_path / "requirements.lock"
    path.write_text("# comment\n\nnumpy==2.4.6\nscipy>=1\n")
    with pytest.raises(ValueError, match=r"line 4: expected name==version, got 'scipy>=1'"):
        check_environment.read_lock(path)


def test_lock_reader_keeps_to_the_platform(tmp_path):
    path = tmp_path / "requirements.lock"
    path.write_text('appnope==0.1.4; sys_platform == "darwin"\nnumpy==2.4.6\n')
    assert check_environment.read_lock(path, platform="linux") == {"numpy": "2.4.6"}
    assert check_environment.read_lock(path, platform="darwin") == {"appnope": "0.1.4", "numpy": "2.4.6"}


def test_environment_check_tells_missing_from_other(monkeypatch, capsys):
    pins = {"pytest": "0.1", "no-such-package-here": "1.0"}
    assert check_environment.compare(pins)[0] == ["no-such-package-here"]
    assert check_environment.compare(pins)[1][0].endswith("(lock: 0.1)")
    monkeypatch.setattr(check_environment, "read_lock", lambda: pins)
    assert check_environment.main() == 1
    said = capsys.readouterr().err
    assert "missing no-such-package-here; install them" in said and "make env ENV=active" in said
    monkeypatch.setattr(check_environment, "read_lock", lambda: {"pytest": "0.1"})
    assert check_environment.main() == 0
    assert "warning: 1 packages differ" in capsys.readouterr().err


def test_environment_check_ignores_the_build_tag(monkeypatch):
    monkeypatch.setattr(check_environment, "version", lambda name: "2.13.0+cpu")
    assert check_environment.compare({"torch": "2.13.0"}) == ([], [])


# ---- package -----------------------------------------------------------------------------------------------


def test_pre_commit_uses_the_locked_versions(lock):
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    revisions = {Path(repo["repo"]).name.removesuffix("-pre-commit"): repo["rev"] for repo in config["repos"]}
    assert {name: rev.removeprefix("v") for name, rev in revisions.items()} == {
        name: lock[name] for name in ("ruff", "nbstripout")
    }


# ---- conda -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_conda_gives_python_and_pip_only(conda, project):
    plain = [line for line in conda["dependencies"] if isinstance(line, str)]
    assert conda["name"] == project["name"]
    assert conda["channels"][0] == "conda-forge"
    assert {"python=3.11", "pip", "make", "git"} == set(plain)
    assert project["requires-python"] == ">=3.11"


def test_conda_pip_section_installs_this_project_at_the_locked_versions(conda, project):
    (section,) = [line["pip"] for line in conda["dependencies"] if isinstance(line, dict)]
    constraint, editable = (line.split(" ", 1) for line in section)
    assert constraint == ["--constraint", "requirements.lock"]
    assert editable[0] == "--editable"
    extras = set(re.fullmatch(r"\.\[(.*)\]", editable[1])[1].split(","))
    assert extras == set(project["optional-dependencies"]) - WITHOUT_DEPENDENCIES


def test_pip_accepts_the_conda_section_as_conda_hands_it_over(conda, tmp_path):
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "perturbret").mkdir()
    shutil.copy(ROOT / "perturbret" / "__init__.py", tmp_path / "perturbret")
    (section,) = [line["pip"] for line in conda["dependencies"] if isinstance(line, dict)]
    (tmp_path / "condaenv.requirements.txt").write_text("\n".join(section))
    offline = ["--dry-run", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "install", *offline, "-r", "condaenv.requirements.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install perturbret-" in done.stdout


# ---- Makefile ----------------------------------------------------------------------------------------------

FAKE_PYTHON = """#!/bin/sh
# Stands for a Python: notes what pip is asked, makes a .venv that holds itself.
here=$(dirname "$0")
case "$1 $2" in
  "-c import"*) exit {too_old} ;;
  "--version "*) echo "Python 3.11.0" ;;
  "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >> calls ;;
  "-m pip") case "$*" in
      *--version) ;;
      *) echo "$*" >> calls
         if [ -e fail ] && [ "$(cat fail)" = "$(grep -c pip calls)" ]; then exit 1; fi ;;
    esac ;;
  *) echo "$*" >> calls ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def make(checkout):
    """Run make in a small checkout whose Python is a stand-in; returns the finished process."""
    python = checkout / "fakepython"
    python.write_text(FAKE_PYTHON.replace("{too_old}", "0"))
    python.chmod(0o755)
    hidden = {*MAKE_VARIABLES, "VIRTUAL_ENV", "CONDA_PREFIX"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}

    def run(*words, **extra):
        return subprocess.run(
            ["make", f"PYTHON={python}", *words],
            cwd=checkout,
            env={**environment, **extra},
            capture_output=True,
            text=True,
        )

    return run


def calls(checkout):
    path = checkout / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.replace("-m pip --disable-pip-version-check install", "pip").strip() for line in lines]


FULL = [
    "venv",
    "pip --constraint requirements.lock torch",
    "pip --no-deps --requirement requirements.lock",
    "pip --no-deps --no-build-isolation --editable .",
]


def test_make_installs_once(make, checkout):
    assert make("test").returncode == 0
    assert calls(checkout) == [*FULL, "-m pytest"]
    assert make("test").returncode == 0
    assert calls(checkout) == ["-m pytest"]


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_make_installs_into_the_same_venv_after_a_change(make, checkout, name):
    make("env")
    calls(checkout)
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert make("env").returncode == 0
    assert calls(checkout) == FULL[1:]
    assert len(list(checkout.glob(".venv/.installed-*"))) == 1


@pytest.mark.parametrize("step", [1, 2, 3])
def test_make_starts_afresh_after_an_interrupted_installation(make, checkout, step):
    (checkout / "fail").write_text(str(step))
    assert make("test").returncode != 0
    assert calls(checkout) == FULL[: step + 1]
    (checkout / ".venv" / "half").touch()
    (checkout / "fail").unlink()
    again = make("test")
    assert again.returncode == 0 and "was interrupted" in again.stdout
    assert calls(checkout) == [*FULL, "-m pytest"]
    assert not (checkout / ".venv" / "half").exists()
    assert not (checkout / ".venv.partial").exists()


def test_make_leaves_a_running_installation_alone(make, checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv.partial").write_text(f"{os.getpid()}\n")
    second = make("test")
    assert second.returncode != 0 and f"process {os.getpid()} is installing" in second.stderr
    assert (checkout / ".venv").exists() and calls(checkout) == []


def test_make_refuses_an_old_python(make, checkout):
    (checkout / "fakepython").write_text(FAKE_PYTHON.replace("{too_old}", "1"))
    old = make("test")
    assert old.returncode != 0 and "no Python 3.11 or newer among" in old.stderr
    assert calls(checkout) == [] and not (checkout / ".venv.partial").exists()


def test_make_takes_the_cpu_build_when_asked(make, checkout):
    assert make("env", "TORCH=cpu").returncode == 0
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in calls(checkout)[1]
    assert make("test").returncode == 0
    assert calls(checkout) == ["-m pytest"]


@pytest.mark.parametrize("word", ["TORCH=gpu", "ENV=conda"])
def test_make_refuses_unknown_values(make, checkout, word):
    refused = make("test", word)
    assert refused.returncode != 0 and f"got '{word.split('=')[1]}'" in refused.stderr
    assert calls(checkout) == []


def test_make_report_hands_its_variables_on(make, checkout):
    words = ["DATASET=my screen.yaml", "GRID=params/small.yaml", "CORES=3", "OUTPUTS=elsewhere"]
    assert make("report", *words).returncode == 0
    expected = "--dataset my screen.yaml --grid params/small.yaml --cores 3 --outputs elsewhere"
    assert calls(checkout)[-1] == f"-m perturbret report {expected}"
    assert make("report").returncode == 0
    defaults = f"--dataset auto --grid params/ablation.yaml --cores {os.cpu_count()} --outputs outputs"
    assert calls(checkout)[-1] == f"-m perturbret report {defaults}"


def test_make_does_not_mistake_the_shells_env_for_its_own(make, checkout):
    assert make("test", ENV="/home/someone/.shinit").returncode == 0
    assert calls(checkout) == [*FULL, "-m pytest"]


def test_make_active_needs_an_active_environment(make, checkout):
    refused = make("test", "ENV=active")
    assert refused.returncode != 0 and "expected an activated conda or venv environment" in refused.stderr


def test_make_active_uses_and_fills_the_active_environment(make, checkout):
    active = checkout / "mine"
    (active / "bin").mkdir(parents=True)
    shutil.copy(checkout / "fakepython", active / "bin" / "python")
    environment = {"VIRTUAL_ENV": str(active), "PATH": f"{active / 'bin'}:{os.environ['PATH']}"}
    assert make("test", "ENV=active", **environment).returncode == 0
    assert calls(checkout) == ["workflow/check_environment.py", "-m pytest"]
    assert make("env", "ENV=active", **environment).returncode == 0
    assert calls(checkout) == FULL[1:]
    assert not (checkout / ".venv").exists()


def test_make_help_names_every_target(make):
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    listed = re.findall(r"^  (\w+)\t", make("help").stdout, re.MULTILINE)
    assert set(listed) == set(phony) - {"active", "activated"}
    assert make().stdout == make("help").stdout


def test_ci_runs_what_the_readme_says():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make test", "make lint", "make report DATASET=simulated"} <= set(steps)
    assert workflow["jobs"]["test"]["env"]["TORCH"] == "cpu"
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("exec make test") and "PERTURBRET_DATA" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_lab_registers_the_kernel_and_opens_the_notebooks(make, checkout):
    assert make("lab").returncode == 0
    kernel, lab = calls(checkout)[-2:]
    assert kernel == "-m ipykernel install --sys-prefix --name perturbret --display-name perturbret"
    assert lab == "-m jupyterlab --ServerApp.root_dir=notebooks"


def test_make_format_repairs_what_make_lint_checks(make, checkout):
    (checkout / "notebooks").mkdir()
    (checkout / "notebooks" / "01.ipynb").touch()
    make("env")
    calls(checkout)
    assert make("lint").returncode == 0
    assert calls(checkout) == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m nbstripout --verify notebooks/01.ipynb",
    ]
    assert make("format").returncode == 0
    assert calls(checkout) == [
        "-m nbstripout notebooks/01.ipynb",
        "-m ruff check --fix .",
        "-m ruff format .",
    ]


def test_make_bench_runs_every_script(make, checkout):
    (checkout / "benchmarks").mkdir()
    for name in ("a", "b"):
        (checkout / "benchmarks" / f"{name}.py").touch()
    make("env")
    calls(checkout)
    assert make("bench").returncode == 0
    assert calls(checkout) == ["benchmarks/a.py", "benchmarks/b.py"]


def test_make_clean_leaves_results(make, checkout):
    for name in ("outputs", "perturbret", "tests", "benchmarks", "notebooks"):
        (checkout / name).mkdir()
    (checkout / "perturbret" / "__pycache__").mkdir()
    make("env")
    assert make("clean").returncode == 0
    assert not (checkout / ".venv").exists() and not (checkout / "perturbret" / "__pycache__").exists()
    assert (checkout / "outputs").exists()
