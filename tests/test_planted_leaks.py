"""Leaks of every kind, planted: each is marked, kept apart or refused, and none passes for free of leaks."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from perturbret.data.prepared import prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import get_split
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation.column_guard import guard_columns, guard_findings, suspect
from perturbret.evaluation.judge import evaluate, null_control
from perturbret.evaluation.nulls import permute_conditions


@pytest.fixture(scope="module")
def clean():
    return simulate_screen(n_singles=6, n_doubles=2, n_genes=60, cells_per_condition=70, effect=0.3, seed=3)


def changed(screen, counts, genes=None, obsm=None):
    counts = csr_matrix(np.asarray(counts, np.float32))
    extra = np.asarray(counts.sum(axis=1)).ravel() - np.asarray(screen.counts.sum(axis=1)).ravel()
    return dataclasses.replace(
        screen,
        counts=counts,
        genes=screen.genes if genes is None else np.asarray(genes),
        obs=screen.obs.assign(total=screen.obs["total"] + extra),
        obsm=obsm or {},
        target_columns=None,
        fingerprint="",
    )


def guide_column(screen):
    """A guide capture of one condition, counted in four fifths of its cells."""
    own = (screen.obs["condition"] == screen.conditions[0]).to_numpy()
    values = own * (np.random.default_rng(0).random(len(own)) < 0.8) * 6
    return changed(screen, np.column_stack([screen.counts.toarray(), values]), [*screen.genes, "capture_17"])


def antisense(screen):
    """The strand opposite to a target is transcribed with it, under a name of its own."""
    own = (screen.obs["condition"] == screen.conditions[1]).to_numpy()
    values = np.random.default_rng(0).poisson(np.where(own, 9, 0.05))
    return changed(screen, np.column_stack([screen.counts.toarray(), values]), [*screen.genes, "SOME-AS1"])


def activated_target(screen):
    """A measured target with twenty times its counts whose name no rule of spelling reaches."""
    own = (screen.obs["condition"] == screen.conditions[2]).to_numpy()
    values = np.random.default_rng(0).poisson(np.where(own, 60, 3))
    return changed(
        screen, np.column_stack([screen.counts.toarray(), values]), [*screen.genes, "oddly.spelled~7"]
    )


def knocked_out_target(screen):
    own = (screen.obs["condition"] == screen.conditions[2]).to_numpy()
    values = np.random.default_rng(0).poisson(np.where(own, 0.05, 15))
    return changed(
        screen, np.column_stack([screen.counts.toarray(), values]), [*screen.genes, "oddly.spelled~7"]
    )


def prepared(screen, tmp_path, conditions=None):
    split = get_split(screen, track="in_dist", seed=0, directory=tmp_path)
    return prepare(screen, split, mask="all_targets", conditions=conditions)


@pytest.mark.parametrize("plant", [guide_column, antisense, activated_target, knocked_out_target])
def test_a_telling_column_marks_the_run_suspect(clean, tmp_path, plant):
    name = plant(clean).genes[-1]
    before = guard_columns(prepared(clean, tmp_path / "clean"))
    table = guard_columns(prepared(plant(clean), tmp_path / "planted"))
    assert suspect(before) == [] and suspect(table) == [name]
    assert guard_findings(table)[0].startswith("**SUSPECT") and f"`{name}`" in guard_findings(table)[0]


def test_a_label_in_an_embedding_marks_its_runs_suspect_and_no_others(clean, tmp_path):
    one_hot = pd.get_dummies(clean.obs["condition"]).to_numpy(np.float32)
    table = guard_columns(
        prepared(changed(clean, clean.counts.toarray(), obsm={"X_label": one_hot}), tmp_path)
    )
    assert suspect(table, "obsm:X_label") and suspect(table, "logreg") == []


def test_copies_of_cells_lie_in_one_role_and_their_nearest_neighbour_is_no_copy(tmp_path):
    """Half of the cells of a screen without effects, twice: a copy in training would name its query's condition."""
    null = simulate_screen(n_singles=6, n_doubles=0, n_genes=60, cells_per_condition=150, null=True, seed=0)
    again = np.random.default_rng(0).choice(null.n_cells, null.n_cells // 2, replace=False)
    rows = np.concatenate([np.arange(null.n_cells), again])
    obs = null.obs.iloc[rows].set_axis([f"cell{i}" for i in range(len(rows))])
    copied = dataclasses.replace(
        null, counts=null.counts[rows], obs=obs, target_columns=None, truth=None, fingerprint=""
    )
    cells = prepared(copied, tmp_path)
    assert (cells.roles[null.n_cells :] == cells.roles[again]).all()
    train, query = cells.where("train"), cells.where("query")
    assert np.isin(query, again).sum() >= 5
    x = cells.cells.counts.toarray()
    distance = (x[train] ** 2).sum(axis=1) - 2 * x[query] @ x[train].T
    hits = cells.conditions[train[distance.argmin(axis=1)]] == cells.conditions[query]
    assert hits.mean() < 0.3, "chance is 0.17"
    assert hits[np.isin(query, again)].mean() < 0.5


@pytest.mark.parametrize("follows", ["permuted labels", "true labels"])
def test_the_null_control_sees_a_planted_column_only_where_it_follows_permuted_labels(
    clean, tmp_path, follows
):
    """A column on in a share of one class's cells: its size against what the control says that it detects."""
    split = get_split(clean, track="in_dist", seed=0, directory=tmp_path)
    roles = split.roles.reindex(clean.obs.index).to_numpy(str)
    true = clean.obs["condition"].to_numpy(str)
    permuted = permute_conditions(true, roles, clean.obs["batch"].to_numpy(str), seed=0)
    labels = permuted if follows == "permuted labels" else true
    # Every condition has its own column, on in three quarters of its cells.
    rng = np.random.default_rng(0)
    on = (labels[:, None] == np.array(clean.conditions)) & (rng.random((len(labels), 1)) < 0.75)
    planted = changed(
        clean,
        np.column_stack([clean.counts.toarray(), 30 * on]),
        [*clean.genes, *(f"g{i}" for i in range(on.shape[1]))],
    )
    twin = prepare(planted, split, mask="all_targets", conditions=permuted)
    encoder = fit_baseline("logreg", twin, seed=0, search={"C": [1.0]}).encoder
    row = null_control(encoder, twin, libraries=("mean",), scorings=("classifier",), seed=0).iloc[0]
    assert row["detectable@0.01"] < 0.3
    assert (row["p_value"] < 0.01) == (follows == "permuted labels")
    if follows == "true labels":
        honest = prepare(planted, split, mask="all_targets")
        fitted = fit_baseline("logreg", honest, seed=0, search={"C": [1.0]}).encoder
        scores = evaluate(fitted, honest, query_sizes=(1,), libraries=("mean",), scorings=("classifier",))
        assert scores["exact_hit@1"].mean() > 0.4, "the leak is there, and the null control has no part in it"
        assert len(suspect(guard_columns(honest))) == len(clean.conditions)
