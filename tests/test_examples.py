"""Examples in docstrings are true: each is run, with numpy as np, pandas as pd and what its own module defines."""

import ast
import doctest
import importlib
import os
import socket
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from perturbret.data import TRACKS
from perturbret.encoders.baselines import METHODS  # with all methods registered
from perturbret.evaluation import METRICS

PACKAGE = Path(__file__).resolve().parents[1] / "perturbret"
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef


def examples():
    """Module, name and docstring of all that shows an example.

    Read from the source: DocTestFinder takes a function under @contextmanager for one of another module.
    """
    for path in sorted(PACKAGE.glob("**/*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and ">>>" in text:
                yield module, getattr(node, "name", ""), text


EXAMPLES = list(examples())


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_shows_an_example(room):
    assert any(module.split(".")[1] == room for module, _, _ in EXAMPLES)


@pytest.mark.parametrize(
    ("module", "name", "text"), EXAMPLES, ids=[f"{module}:{name}" for module, name, _ in EXAMPLES]
)
def test_example_is_true(module, name, text, tmp_path, monkeypatch):
    """Whatever it registers is forgotten; it reads no data of a user, needs no network and leaves no file behind."""

    def refuse(*arguments):
        raise OSError("an example needs no network")

    monkeypatch.delenv("PERTURBRET_DATA", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = vars(importlib.import_module(module)).items()
    own = {key: value for key, value in found if getattr(value, "__module__", module) == module}
    known, said = {"np": np, "pd": pd, **own}, []
    example = doctest.DocTestParser().get_doctest(text, known, f"{module}:{name}", None, None)
    with patch.dict(TRACKS), patch.dict(METHODS), patch.dict(METRICS):
        result = doctest.DocTestRunner().run(example, out=said.append)
    assert result.attempted and not result.failed, "".join(said)
    assert os.listdir(tmp_path) == []
