"""A wheel carries all that a default run needs: registries, gene table, the small checkpoint."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
USE = """
import socket
from pathlib import Path

def refuse(*given, **named):
    raise AssertionError("a default run asked the network")

socket.socket.connect = socket.create_connection = refuse
import perturbret
from perturbret.data.datasets import load_screen
from perturbret.scgpt.backbone import fit_scgpt
from perturbret.data.prepared import prepare
from perturbret.alignment.reference_cells import read_references
from perturbret.data.splits import make_split

assert "unpacked" in perturbret.__file__, perturbret.__file__
assert read_references()
screen = load_screen("simulated")
prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
fitted = fit_scgpt(prepared, seed=0, settings={"mode": "frozen"}, report=lambda line: None)
print(fitted.encoder.settings["chosen"]["checkpoint"], fitted.encoder.embed(prepared.cells.take(range(300))).shape)
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The directory that a wheel of the checkout unpacks to."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "unpacked")
    return directory / "unpacked"


def test_it_holds_every_file_of_the_package_and_the_registries(unpacked):
    packed = {
        path.relative_to(unpacked).as_posix()
        for path in (unpacked / "perturbret").rglob("*")
        if path.is_file()
    }
    files = (path for path in (ROOT / "perturbret").rglob("*") if path.is_file())
    own = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    registries = ("checkpoints", "datasets", "references")
    assert packed == own | {f"perturbret/resources/{name}.yaml" for name in registries}
    for name in registries:
        copy = unpacked / "perturbret" / "resources" / f"{name}.yaml"
        assert copy.read_bytes() == (ROOT / "params" / copy.name).read_bytes()


def test_init_pretrained_works_from_it_without_network(unpacked, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERTURBRET_")}
    used = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env={**kept, "PYTHONPATH": str(unpacked)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert used.returncode == 0, used.stderr[-2000:]
    assert used.stdout.startswith("small (300, ")
