"""Notebooks as tests (nbval): all write into one temporary directory, and `outputs/` of the checkout is not touched."""

import os
import tempfile
from functools import cache
from unittest.mock import patch

import pytest


@cache
def outputs():
    """A directory that lives as long as this process."""
    return tempfile.TemporaryDirectory(prefix="perturbret-")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """The kernel starts within the set-up of a notebook's first cell and takes the environment of that moment."""
    with patch.dict(os.environ, PERTURBRET_OUTPUTS=outputs().name):
        return (yield)
