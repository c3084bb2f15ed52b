"""Fixtures that several test files share."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings
from scipy.sparse import csr_matrix

# A busy machine is slow, not wrong.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

REAL_FILES = ("perturbench_devel.h5ad", "papalexi2021_thp1_303genes.h5ad")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Directory of the real screens; skips the test where it is not at hand."""
    value = os.environ.get("PERTURBRET_DATA")
    if not value:
        pytest.skip("PERTURBRET_DATA is not set: no real screens to test on")
    missing = [name for name in REAL_FILES if not (Path(value) / name).is_file()]
    if missing:
        pytest.skip(f"PERTURBRET_DATA={value} lacks {', '.join(missing)}")
    return Path(value)


@pytest.fixture
def small_adata():
    """Maker of a small AnnData screen: 60 cells (20 each of KLF1, BAK1 and ctrl) x 6 genes, counts in X."""
    import anndata

    def make(x=None, *, conditions=None, genes=None, cells=None, obs=None, layers=None, obsm=None, var=None):
        if conditions is None:
            conditions = np.repeat(["KLF1", "BAK1", "ctrl"], 20)
        n = len(conditions)
        genes = ["KLF1", "BAK1", "HBG1", "HBZ", "GAPDH", "ACTB"] if genes is None else genes
        if x is None:
            x = np.random.default_rng(0).poisson(2.0, (n, len(genes)))
            x[:, -1] += 1
            x = csr_matrix(x.astype(np.float32))
        cells = [f"cell{i}" for i in range(n)] if cells is None else cells
        obs = pd.DataFrame({"condition": np.asarray(conditions, object), **(obs or {})}, index=cells)
        return anndata.AnnData(x, obs, pd.DataFrame(var or {}, index=genes), layers=layers, obsm=obsm)

    return make


@pytest.fixture(scope="session")
def tiny_prepared():
    """Masked cells of a tiny simulated screen."""
    import toy

    return toy.tiny_prepared()


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_prepared, tmp_path_factory) -> Path:
    """Directory of a checkpoint of random weights whose vocabulary has all but one gene of the tiny screen."""
    import toy

    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return toy.write_tiny_checkpoint(directory, tiny_prepared.cells.genes[1:])


@pytest.fixture(scope="session")
def wide():
    """A simulated screen with singles, doubles, batches and guides."""
    from perturbret.data.simulate import simulate_screen

    return simulate_screen(
        n_singles=10, n_doubles=8, n_genes=60, cells_per_condition=40, n_control=40, n_batches=4,
        guides_per_target=3, effect=2.0, seed=1,
    )  # fmt: skip
