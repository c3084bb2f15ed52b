import tracemalloc

import numpy as np
import pytest

import perturbret.evaluation.retrieval
from perturbret.evaluation.metrics import per_query
from perturbret.evaluation.retrieval import (
    build_library,
    class_scores,
    directions,
    match,
    pool_embeddings,
    pool_scores,
    score_library,
    settle,
)
from perturbret.evaluation.whitening import whitener

KINDS = ("mean", "bootstrap", "raw_cell")


@pytest.fixture
def cells():
    """Correlated embeddings of 4 classes with a large common part: 120 train cells and 30 queries in 6-d."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6)) * [3, 2, 1, 1, 0.5, 0.2]
    labels = np.array(list("ABCD"))[np.arange(150) % 4]
    centres = rng.standard_normal((4, 6))
    embeddings = 5 + centres[np.arange(150) % 4] + rng.standard_normal((150, 6)) @ mixing
    return embeddings[:120].astype(np.float32), labels[:120], embeddings[120:].astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scoring", ["cosine", "whitened"])
@pytest.mark.parametrize("block_bytes", [1, 1e9])
def test_score_is_the_best_cosine_with_the_prototypes_of_a_condition(
    cells, kind, scoring, block_bytes, monkeypatch
):
    monkeypatch.setattr(perturbret.evaluation.retrieval, "_BLOCK_BYTES", block_bytes)
    train, labels, queries = cells
    library = build_library(train, labels, kind=kind, seed=0)
    whiten = whitener(train, labels) if scoring == "whitened" else None
    mean, matrix = whiten or (np.zeros(6), np.eye(6))
    scores = score_library(queries, library, whiten)
    expected = np.full((30, 4), -2.0)
    for i, query in enumerate((queries - mean) @ matrix):
        for prototype, condition in zip(
            (library.prototypes - mean) @ matrix, library.conditions, strict=True
        ):
            cosine = query @ prototype / np.linalg.norm(query) / np.linalg.norm(prototype)
            column = library.candidates.index(condition)
            expected[i, column] = max(expected[i, column], cosine)
    np.testing.assert_allclose(scores, expected, atol=3e-6)


def test_noise_of_the_arithmetic_does_not_break_ties_and_differences_stay():
    starts = np.arange(4)
    query = np.array([[1, 0]], np.float32)
    near_one = match(
        query, np.array([[1 - 9e-7, 0], [1, 0], [1 + 2e-7, 0], [1 - 5e-6, 0]], np.float32), starts
    )
    assert (near_one[0, :3] == 1).all() and near_one[0, 3] < 1
    inside = match(
        query, np.array([[0.5, 0], [0.5 + 2e-7, 0], [0.5 - 2e-7, 0], [0.500002, 0]], np.float32), starts
    )
    assert len(set(inside[0, :3])) == 1 and inside[0, 3] > inside[0, 0]


@pytest.mark.parametrize("d", [1, 2, 50, 512, 3000])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
@pytest.mark.parametrize("scoring", ["cosine", "whitened"])
def test_a_collapsed_encoder_ties_all_candidates(d, noise, scoring):
    rng = np.random.default_rng(d)
    point = rng.exponential(size=d) * 7
    embeddings = (point * (1 + noise * rng.standard_normal((90, d)))).astype(np.float32)
    labels = np.array(list("ABCDEFGHI"))[np.arange(90) % 9]
    whiten = whitener(embeddings[:60], labels[:60]) if scoring == "whitened" else None
    for kind in KINDS:
        library = build_library(embeddings[:60], labels[:60], kind=kind, seed=0)
        scores = score_library(embeddings[60:], library, whiten)
        assert (np.ptp(np.round(scores, 9), axis=1) == 0).all()


def test_vectors_of_length_zero_score_the_same_everywhere():
    library = build_library(np.zeros((4, 3)), np.array(list("AABB")))
    assert score_library(np.array([[0, 0, 0], [1, 2, 3.0]]), library).tolist() == [[0, 0], [0, 0]]
    library = build_library(np.eye(3), np.array(list("ABC")))
    assert score_library(np.zeros((1, 3)), library).tolist() == [[0, 0, 0]]


def test_one_hot_embeddings_tie_exactly_with_raw_cells():
    batch = np.eye(3)[np.arange(12) % 3]
    library = build_library(batch, np.repeat(list("ABCD"), 3), kind="raw_cell")
    assert (score_library(batch, library) == 1).all()


def test_a_query_scores_the_same_alone_in_company_and_in_another_order(cells):
    train, labels, queries = cells
    library = build_library(train, labels, kind="raw_cell")
    for options in ({}, {"whiten": whitener(train, labels)}):
        together = score_library(queries, library, **options)
        alone = np.concatenate([score_library(query[None], library, **options) for query in queries])
        np.testing.assert_allclose(together, alone, atol=2e-6)
        np.testing.assert_allclose(
            score_library(queries[::-1], library, **options)[::-1], together, atol=2e-6
        )


def test_cosine_ignores_length_and_whitening_keeps_it_within_its_space(cells):
    train, labels, queries = cells
    library = build_library(train, labels)
    np.testing.assert_allclose(
        score_library(queries * 1000, library), score_library(queries, library), atol=2e-6
    )
    assert np.allclose(np.linalg.norm(directions(queries, whitener(train, labels)), axis=1), 1, atol=1e-6)


def test_memory_stays_far_below_the_full_query_by_prototype_matrix():
    rng = np.random.default_rng(0)
    train = rng.standard_normal((8000, 32), dtype=np.float32)
    queries = rng.standard_normal((10_000, 32), dtype=np.float32)
    library = build_library(train, np.repeat([f"G{i:02d}" for i in range(20)], 400), kind="raw_cell")
    tracemalloc.start()
    score_library(queries, library)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 8000 * 4 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embeddings": np.ones((2, 5))}, r"queries x 6 dimensions as in the library, got shape \(2, 5\)"),
        ({"embeddings": np.full((2, 6), np.nan)}, "finite numbers, row 0"),
    ],
)
def test_bad_input_is_refused(cells, options, message):
    train, labels, queries = cells
    arguments = {"embeddings": queries, "library": build_library(train, labels)} | options
    with pytest.raises(ValueError, match=message):
        score_library(**arguments)


def test_class_scores_are_those_of_the_candidates_with_or_without_the_prior():
    log_proba = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    scores = class_scores(log_proba, ("C", "A", "B"), ("A", "B"))
    np.testing.assert_allclose(scores, log_proba[:, [1, 2]], atol=3e-6)
    prior = np.log([0.5, 0.4, 0.1])
    corrected = class_scores(log_proba, ("C", "A", "B"), ("A", "B"), prior)
    np.testing.assert_allclose(corrected, np.log([[0.3 / 0.4, 2], [0.1 / 0.4, 8]]), atol=3e-6)


def test_a_classifier_that_only_knows_the_prior_ties_once_it_is_corrected():
    rng = np.random.default_rng(0)
    prior = np.log(rng.dirichlet(np.ones(40)))
    noisy = prior + 1e-9 * rng.standard_normal((20, 40))
    scores = class_scores(noisy, range(40), range(40), prior)
    hits = per_query(scores, np.tile(2 * (np.arange(40) == 7), (20, 1)))["exact_hit@1"]
    assert (hits == 1 / 40).all()


def test_class_scores_keep_impossible_classes_last():
    scores = class_scores(np.array([[-np.inf, -0.1, -2.4]]), "ABC", "ABC")
    assert scores.argsort().tolist() == [[0, 2, 1]] and scores[0, 0] == -np.inf


def test_a_candidate_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match="knows 2 classes, without 'X' and 1 other candidates"):
        class_scores(np.zeros((1, 2)), ("A", "B"), ("A", "X", "Y"))


def test_settled_scores_lose_no_more_than_half_a_step():
    scores = np.random.default_rng(0).standard_normal((50, 20)) * 1000
    scale = np.abs(scores).max(axis=1, keepdims=True)
    settled = settle(scores, scale)
    assert (np.abs(settled - scores) <= 0.51e-6 * scale).all()
    assert (settle(np.array([[1.0, 1 + 1e-7]])) == 1).all()
    assert settle(np.zeros((1, 2)), np.zeros((1, 1))).tolist() == [[0, 0]]


def test_pooling_sums_or_averages_the_members():
    values = np.arange(8.0).reshape(4, 2) ** 2
    members = np.array([[0, 3], [1, 2]])
    np.testing.assert_array_equal(
        pool_scores(values, members), [values[[0, 3]].mean(0), values[[1, 2]].mean(0)]
    )
    np.testing.assert_array_equal(
        pool_scores(values, members, total=True), [values[[0, 3]].sum(0), values[[1, 2]].sum(0)]
    )
    pooled = pool_embeddings(values.astype(np.float32), members)
    assert pooled.dtype == np.float32
    np.testing.assert_array_equal(pooled, [values[[0, 3]].mean(0), values[[1, 2]].mean(0)])
