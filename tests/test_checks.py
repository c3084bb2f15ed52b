"""The checks of a screen together: what they find reaches the top of the page, what they do not find is said too."""

import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from perturbret.data.simulate import simulate_screen
from perturbret.report.audit import check_screen


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(n_singles=6, n_doubles=0, n_genes=60, cells_per_condition=70, effect=0.3, seed=3)


def with_counts(screen, counts, genes, **more):
    counts = csr_matrix(counts.astype(np.float32))
    totals = np.asarray(counts.sum(axis=1), float).ravel()
    return dataclasses.replace(
        screen,
        counts=counts,
        genes=np.asarray(genes),
        obs=screen.obs.assign(total=totals, **more),
        target_columns=None,
        fingerprint="",
    )


def test_a_clean_screen_has_no_warning(screen, tmp_path):
    found = check_screen(screen, outputs=str(tmp_path))
    assert found.warnings == [] and not found.suspect and not found.confounded
    text = " ".join(found.notes)
    for said in (
        "No column of the masked cells nearly names",
        "No two cells have the same counts",
        "Depth tells",
    ):
        assert said in text


def test_a_guide_column_makes_the_screen_suspect_until_it_is_accepted(screen, tmp_path):
    own = (screen.obs["condition"] == screen.conditions[0]).to_numpy()
    column = own * (np.random.default_rng(0).random(len(own)) < 0.8) * 6
    planted = with_counts(
        screen, np.column_stack([screen.counts.toarray(), column]), [*screen.genes, "capture_17"]
    )
    found = check_screen(planted, outputs=str(tmp_path / "a"))
    assert found.suspect and any("SUSPECT" in line and "capture_17" in line for line in found.warnings)
    accepted = dataclasses.replace(planted, audit={**planted.audit, "accepted_columns": ["capture_17"]})
    found = check_screen(accepted, outputs=str(tmp_path / "a"))
    assert not found.suspect and any("Accepted" in line for line in found.notes)


def test_an_embedding_that_holds_the_label_counts_where_it_is_run(screen, tmp_path):
    one_hot = (screen.obs["condition"].to_numpy(str)[:, None] == np.array(screen.conditions)).astype(
        np.float32
    )
    planted = dataclasses.replace(screen, obsm={"X_model": one_hot}, fingerprint="")
    assert not check_screen(planted, outputs=str(tmp_path), encoders=["pca"]).suspect
    assert check_screen(planted, outputs=str(tmp_path), encoders=["pca", "obsm:X_model"]).suspect


def test_wells_that_are_conditions_confound_the_screen(screen, tmp_path):
    wells = dataclasses.replace(
        screen, obs=screen.obs.assign(batch=screen.obs["condition"].astype(str)), fingerprint=""
    )
    found = check_screen(wells, outputs=str(tmp_path))
    assert found.confounded and any(line.startswith("**CONFOUNDED") for line in found.warnings)


def test_copies_are_counted(screen, tmp_path):
    counts = screen.counts.toarray()
    labels = screen.obs["condition"].to_numpy(str)
    one = np.flatnonzero(labels == screen.conditions[0])[:2]
    other = np.flatnonzero(labels == screen.conditions[1])[0]
    counts[[one[1], other]] = counts[one[0]]
    found = check_screen(with_counts(screen, counts, screen.genes), outputs=str(tmp_path))
    assert any(
        line.startswith("3 cells have the same counts") and "1 groups, 1 of them under several" in line
        for line in found.notes
    )
