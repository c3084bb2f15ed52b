"""Held-out combinations as their genes alone predict them."""

import numpy as np
import pytest
import toy

from perturbret.data.prepared import prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation.composition import COMPOSITIONS, composable, compose
from perturbret.evaluation.judge import evaluate
from perturbret.evaluation.scoring import candidate_names


def planted(double, *, roles=("train", "train", "train", "gallery", "query"), ctrl=(1.0, 1.0)):
    """Two genes, their combination and controls with embeddings of two dimensions that are known."""
    labels = ["ctrl", "A", "B", "A+B", "A+B"]
    x = np.array([ctrl, (3.0, 1.0), (1.0, 4.0), double, double])
    return toy.toy_cells(labels, roles, obsm={"x": x})


def test_prototypes_are_the_sum_of_the_shifts():
    prepared = planted((3.0, 4.0))
    encoder = toy.ToyEncoder(prepared, toy.from_obsm())
    encoder.kind = "obsm:x"
    found = compose(encoder, prepared, ("A+B",))
    assert set(found) == {"added", "scaled"} and found["added"].tolist() == [[3.0, 4.0]]
    # No combination is trained on: there is nothing to scale by.
    assert found["scaled"].tolist() == [[3.0, 4.0]]


def test_the_scale_is_what_fits_the_combinations_in_training():
    labels = ["ctrl", "A", "B", "C", "A+B", "A+C", "A+C"]
    x = np.array([(0.0, 0), (2.0, 0), (0, 2.0), (0, 4.0), (1.0, 1.0), (9, 9), (9, 9)])
    prepared = toy.toy_cells(labels, ["train"] * 5 + ["gallery", "query"], obsm={"x": x})
    encoder = toy.ToyEncoder(prepared, toy.from_obsm())
    encoder.kind = "obsm:x"
    found = compose(encoder, prepared, ("A+C",))
    assert found["added"].tolist() == [[2.0, 4.0]] and found["scaled"].tolist() == [[1.0, 2.0]]


def test_no_cell_of_the_combination_is_looked_at():
    one, other = planted((3.0, 4.0)), planted((-50.0, 70.0))
    made = []
    for prepared in (one, other):
        encoder = toy.ToyEncoder(prepared, toy.from_obsm())
        encoder.kind = "obsm:x"
        made.append(compose(encoder, prepared, ("A+B",))["scaled"])
    assert np.array_equal(*made)


def test_what_cannot_be_composed_is_no_candidate():
    labels = ["ctrl", "A", "A+B", "A+B", "A+C", "A+C", "B"]
    prepared = toy.toy_cells(labels, ["train", "train", "gallery", "query", "gallery", "query", "gallery"])
    assert composable(prepared, "query") == ("A+B",)  # C has no cells by itself; B has them in the gallery
    assert candidate_names(prepared, "predicted", "query") == ("A", "A+B")


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(
        n_singles=12, n_doubles=14, n_genes=80, cells_per_condition=60, n_control=80, n_batches=1, effect=2.5,
        unresponsive=0.0, dispersion=0.1, seed=3,
    )  # fmt: skip


def test_additive_combinations_are_found_without_a_cell_of_theirs(screen):
    prepared = prepare(screen, make_split(screen.obs, track="unseen_combo", seed=0), mask="all_targets")
    encoder = fit_baseline("pca", prepared, seed=0).encoder
    scores = evaluate(encoder, prepared, candidates="predicted", query_sizes=(10,), poolings=("expression",))
    assert set(scores["library"]) == set(COMPOSITIONS)
    known = scores[scores["rank"].notna()]
    assert set(known["condition"]) == set(composable(prepared, "query")) & set(scores["condition"])
    hit = known.query("scoring == 'whitened'").groupby("library")["exact_hit@1"].mean()
    assert (hit > 5 / known["n_candidates"].iloc[0]).all()
