import numpy as np
import pytest

from perturbret.evaluation.retrieval import Library, build_library

CONDITIONS = np.array(["B", "A", "B", "A", "B", "C"])
EMBEDDINGS = np.arange(12.0).reshape(6, 2) ** 2


def test_mean_library_holds_the_mean_of_each_condition():
    library = build_library(EMBEDDINGS, CONDITIONS, kind="mean")
    assert library.candidates == ("A", "B", "C")
    expected = [EMBEDDINGS[CONDITIONS == condition].mean(axis=0) for condition in "ABC"]
    np.testing.assert_allclose(library.prototypes, expected)
    assert library.starts.tolist() == [0, 1, 2]


def test_raw_cell_library_holds_every_cell():
    library = build_library(EMBEDDINGS, CONDITIONS, kind="raw_cell")
    assert library.conditions.tolist() == ["A", "A", "B", "B", "B", "C"]
    np.testing.assert_array_equal(library.prototypes, EMBEDDINGS[[1, 3, 0, 2, 4, 5]])
    assert library.starts.tolist() == [0, 2, 5]


def test_bootstrap_library_holds_k_means_of_m_cells_per_condition():
    rng = np.random.default_rng(0)
    cells = rng.standard_normal((400, 3)) * [1.0, 2.0, 5.0]
    library = build_library(cells, np.repeat(["A", "B"], 200), kind="bootstrap", k=300, m=50, seed=0)
    assert np.unique(library.conditions, return_counts=True)[1].tolist() == [300, 300]
    for condition, part in (("A", cells[:200]), ("B", cells[200:])):
        means = library.prototypes[library.conditions == condition]
        spread = part.std(axis=0) / np.sqrt(50)
        np.testing.assert_allclose(
            means.mean(axis=0), part.mean(axis=0), atol=4 * spread.max() / np.sqrt(300)
        )
        np.testing.assert_allclose(means.std(axis=0), spread, rtol=0.15)


def test_bootstrap_draws_whole_cells():
    library = build_library(np.eye(4), ["A"] * 4, kind="bootstrap", k=7, m=5, seed=0)
    drawn = library.prototypes * 5
    np.testing.assert_allclose(drawn, np.round(drawn), atol=1e-5)
    np.testing.assert_allclose(drawn.sum(axis=1), 5, rtol=1e-6)


def test_bootstrap_depends_on_the_seed_and_not_on_other_conditions():
    both = build_library(EMBEDDINGS, CONDITIONS, kind="bootstrap", seed=3)
    some = build_library(EMBEDDINGS[CONDITIONS == "B"], ["B"] * 3, kind="bootstrap", seed=3)
    np.testing.assert_array_equal(both.prototypes[both.conditions == "B"], some.prototypes)
    other = build_library(EMBEDDINGS, CONDITIONS, kind="bootstrap", seed=4)
    assert not np.array_equal(both.prototypes, other.prototypes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "median"}, "kind: expected one of mean, bootstrap, raw_cell, got 'median'"),
        ({"k": 0}, "k, m: expected at least 1, got 0 and 50"),
        ({"embeddings": EMBEDDINGS[:5]}, r"for 6 conditions, got shape \(5, 2\)"),
        (
            {"embeddings": np.where(EMBEDDINGS == 4, np.nan, EMBEDDINGS)},
            r"1 cells have others \(first row 1\)",
        ),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"embeddings": EMBEDDINGS, "conditions": CONDITIONS, "kind": "mean"} | change
    with pytest.raises(ValueError, match=message):
        build_library(**arguments)


def test_a_library_checks_its_shape_and_order():
    prototypes = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="ascending order"):
        Library("mean", prototypes, np.array(["B", "A"]))
    with pytest.raises(ValueError, match=r"one per prototype \(2\), got 1"):
        Library("mean", prototypes, np.array(["B"]))
    with pytest.raises(ValueError, match="at least one"):
        Library("mean", prototypes[:0], np.array([], str))
