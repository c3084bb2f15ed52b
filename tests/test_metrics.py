import itertools

import ir_measures
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, Success, nDCG
from sklearn.metrics import ndcg_score, top_k_accuracy_score

from perturbret.evaluation import metrics
from perturbret.evaluation.metrics import (
    chance,
    coverage_accuracy,
    coverage_area,
    per_query,
    rank_top,
    relevance,
    top_conditions,
)

KS = (1, 2, 3, 5, 8, 10)


def random_relevance(rng, n, c):
    levels = rng.choice([0, 1], size=(n, c), p=[0.8, 0.2])
    levels[np.arange(n), rng.integers(c, size=n)] = 2
    return levels


def by_definition(order):
    """Metrics of one strict ranking, `order` = relevances from rank 1 on, straight from the definitions."""
    order = np.asarray(order)
    found = {}
    ranks = np.flatnonzero(order == 2) + 1
    found["rank"] = float(ranks[0]) if len(ranks) else np.nan
    found["mrr"] = 1 / ranks[0] if len(ranks) else 0.0
    found["mrr@10"] = 1 / ranks[0] if len(ranks) and ranks[0] <= 10 else 0.0
    relevant = np.flatnonzero(order > 0) + 1
    found["ap"] = np.mean([(order[:r] > 0).sum() / r for r in relevant]) if len(relevant) else 0.0
    for k in KS:
        found[f"exact_hit@{k}"] = float((order[:k] == 2).any())
        found[f"relevant_hit@{k}"] = float((order[:k] > 0).any())
        for name, gains in (("ndcg", 2.0**order - 1), ("ndcg_binary", (order == 2) * 1.0)):
            weights = 1 / np.log2(np.arange(2, k + 2))[: len(order)]
            ideal = (np.sort(gains)[::-1][:k] * weights).sum()
            found[f"{name}@{k}"] = (gains[:k] * weights).sum() / ideal if ideal else 0.0
    return found


def by_enumeration(scores, levels):
    """Mean of `by_definition` over every order that the scores allow, each as often as any other."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return pd.DataFrame([by_definition(np.asarray(levels)[list(order)]) for order in orders]).mean()


def assert_same(found, expected):
    expected = expected[[column for column in found if column != "margin"]]
    pd.testing.assert_frame_equal(
        found.drop(columns="margin").reset_index(drop=True), expected.reset_index(drop=True), atol=1e-12
    )


def test_relevance_of_singles_and_doubles():
    candidates = ["BAK1", "BAK1+KLF1", "CEBPA+KLF1", "KLF10"]
    found = relevance(["KLF1", "BAK1+KLF1", "BAK1", "KLF10"], candidates)
    assert found.tolist() == [[0, 1, 1, 0], [1, 2, 1, 0], [2, 1, 0, 0], [0, 0, 0, 2]]
    assert found.dtype == np.int8


def test_relevance_follows_the_order_given_and_refuses_repeats():
    names = np.array(["B", "A+B", "C", "A"])
    found = relevance(names[::-1], names)
    assert (found[:, ::-1] == found[:, ::-1].T).all() and (np.diag(found[:, ::-1]) == 2).all()
    with pytest.raises(ValueError, match="'A' more than once"):
        relevance(["A"], ["A", "B", "A"])


def test_controls_share_no_target():
    assert relevance(["ctrl"], ["A", "B"]).tolist() == [[0, 0]]


def test_a_ranking_worked_by_hand():
    # ranks: relevance 0, 1, 2, 1, 0
    found = per_query([[0.9, 0.7, 0.5, 0.3, 0.1]], [[0, 1, 2, 1, 0]], ks=(1, 3, 5)).iloc[0]
    assert found["rank"] == 3
    assert found["mrr"] == pytest.approx(1 / 3)
    assert (found[["exact_hit@1", "exact_hit@3", "relevant_hit@1", "relevant_hit@3"]] == [0, 1, 0, 1]).all()
    assert found["ap"] == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    log = np.log2
    gained, ideal = 1 / log(3) + 3 / log(4), 3 / log(2) + 1 / log(3) + 1 / log(4)
    assert found["ndcg@3"] == pytest.approx(gained / ideal)
    assert found["ndcg@5"] == pytest.approx((gained + 1 / log(5)) / ideal)
    assert found["ndcg_binary@3"] == pytest.approx(1 / 2)
    assert found["margin"] == pytest.approx(0.2)


def test_a_tie_worked_by_hand():
    # one better candidate, then four tied ones: the true one, one that shares a target, two others
    found = per_query([[2.0, 1.0, 1.0, 1.0, 1.0, 0.0]], [[0, 2, 1, 0, 0, 0]], ks=(1, 2, 3, 5)).iloc[0]
    assert found["rank"] == 3.5
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert found[["exact_hit@1", "exact_hit@2", "exact_hit@3", "exact_hit@5"]].tolist() == [0, 0.25, 0.5, 1]
    # two of the four places lie within rank 3: both irrelevant with probability C(2, 2) / C(4, 2) = 1/6
    assert found["relevant_hit@2"] == pytest.approx(0.5)
    assert found["relevant_hit@3"] == pytest.approx(5 / 6)
    assert found["relevant_hit@5"] == 1


@given(
    st.integers(2, 6).flatmap(
        lambda c: st.tuples(
            st.lists(st.integers(0, 3), min_size=c, max_size=c),
            st.lists(st.integers(0, 1), min_size=c, max_size=c),
            st.integers(-1, c - 1),
        )
    )
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_ties_equal_the_mean_over_all_orders(case):
    scores, levels, true = case
    if true >= 0:
        levels[true] = 2
    found = per_query([scores], [levels], KS)
    assert_same(found, by_enumeration(scores, levels).to_frame().T)


def test_ties_at_the_cut_equal_simulated_tie_breaking():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, size=(3, 30)).astype(float)
    levels = random_relevance(rng, 3, 30)
    found = per_query(scores, levels, KS)
    for i in range(3):
        noise = rng.random((4000, 30)) * 0.5
        broken = per_query(scores[i] + noise, np.repeat(levels[i : i + 1], 4000, axis=0), KS)
        error = broken.std() / np.sqrt(4000) + 1e-9
        assert (np.abs(broken.mean() - found.iloc[i]) / error).drop("margin").max() < 5


def test_equal_scores_are_chance_and_chance_is_known():
    levels = np.array([[2, 1, 1, 0, 0, 0, 0, 0]])
    found = chance(levels, ks=(1, 3)).iloc[0]
    assert found["rank"] == 4.5
    assert found["exact_hit@1"] == 1 / 8 and found["exact_hit@3"] == 3 / 8
    assert found["relevant_hit@1"] == pytest.approx(3 / 8)
    assert found["relevant_hit@3"] == pytest.approx(1 - (5 * 4 * 3) / (8 * 7 * 6))
    assert found["mrr"] == pytest.approx(sum(1 / rank for rank in range(1, 9)) / 8)
    assert found["margin"] == 0
    collapsed = per_query(np.full((1, 8), 0.73), levels, ks=(1, 3))
    pd.testing.assert_frame_equal(collapsed, chance(levels, ks=(1, 3)))


def test_random_rankings_score_chance_on_average():
    rng = np.random.default_rng(1)
    levels = np.repeat(random_relevance(rng, 1, 40), 4000, axis=0)
    drawn = per_query(rng.random(levels.shape), levels, KS)
    error = drawn.std() / np.sqrt(len(drawn))
    expected = chance(levels[:1], KS).iloc[0]
    assert ((drawn.mean() - expected).abs() / error).drop("margin").max() < 5


def test_a_perfect_encoder_scores_one():
    rng = np.random.default_rng(2)
    levels = random_relevance(rng, 50, 20)
    found = per_query(levels + rng.random(levels.shape) * 0.5, levels).drop(columns="margin")
    assert np.allclose(found, 1)


def test_noise_of_the_arithmetic_does_not_break_ties():
    rng = np.random.default_rng(3)
    levels = random_relevance(rng, 20, 30)
    noise = rng.uniform(-1, 1, levels.shape)
    expected = chance(levels)
    pd.testing.assert_frame_equal(per_query(1 + 1e-14 * noise, levels), expected)
    pd.testing.assert_frame_equal(per_query((1 + 1e-7 * noise).astype(np.float32), levels), expected)
    # small but real differences count
    assert not per_query(1 + 1e-6 * noise, levels)["rank"].equals(expected["rank"])


def test_ranking_is_sklearns_and_ir_measures_without_ties():
    rng = np.random.default_rng(4)
    n, c = 60, 25
    levels = random_relevance(rng, n, c)
    scores = rng.random((n, c))
    found = per_query(scores, levels, KS)
    true = levels.argmax(axis=1)
    gains = 2.0**levels - 1
    run = [ir_measures.ScoredDoc(f"q{i}", f"d{j}", scores[i, j]) for i in range(n) for j in range(c)]

    def oracle(measures, judged):
        qrels = [ir_measures.Qrel(f"q{i}", f"d{j}", int(judged[i, j])) for i in range(n) for j in range(c)]
        values = ir_measures.iter_calc(measures, qrels, run)
        table = pd.DataFrame([(m.query_id, str(m.measure), m.value) for m in values])
        return table.pivot(index=0, columns=1, values=2).loc[[f"q{i}" for i in range(n)]]

    relevant = oracle([AP, Success @ 1, Success @ 5], levels > 0)
    np.testing.assert_allclose(found["ap"], relevant["AP"], atol=1e-9)
    np.testing.assert_allclose(found["relevant_hit@1"], relevant["Success@1"])
    np.testing.assert_allclose(found["relevant_hit@5"], relevant["Success@5"])
    exact = oracle([RR, RR @ 10, nDCG @ 5, Success @ 8], levels == 2)
    np.testing.assert_allclose(found["mrr"], exact["RR"], atol=1e-9)
    np.testing.assert_allclose(found["mrr@10"], exact["RR@10"], atol=1e-9)
    np.testing.assert_allclose(found["ndcg_binary@5"], exact["nDCG@5"], atol=1e-9)
    np.testing.assert_allclose(found["exact_hit@8"], exact["Success@8"])
    graded = oracle([nDCG @ 5, nDCG @ 10], gains)
    np.testing.assert_allclose(found["ndcg@5"], graded["nDCG@5"], atol=1e-9)
    for k in KS:
        assert found[f"ndcg@{k}"].mean() == pytest.approx(ndcg_score(gains, scores, k=k))
        accuracy = top_k_accuracy_score(true, scores, k=k, labels=np.arange(c))
        assert found[f"exact_hit@{k}"].mean() == pytest.approx(accuracy)


def test_tied_ndcg_is_sklearns():
    rng = np.random.default_rng(5)
    levels = random_relevance(rng, 40, 15)
    scores = rng.integers(0, 4, levels.shape).astype(float)
    found = per_query(scores, levels, KS)
    for k in KS:
        expected = [
            ndcg_score([gain], [score], k=k) for gain, score in zip(2.0**levels - 1, scores, strict=True)
        ]
        np.testing.assert_allclose(found[f"ndcg@{k}"], expected)


def test_truth_outside_the_candidates_is_never_found():
    found = per_query([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], [[1, 0, 0], [0, 0, 0]], ks=(1, 2))
    assert found["rank"].isna().all()
    assert (found[["mrr", "mrr@10", "exact_hit@1", "exact_hit@2", "ndcg_binary@2"]] == 0).all(axis=None)
    assert found["relevant_hit@1"].tolist() == [1, 0]
    assert found["ap"].tolist() == [1, 0] and found["ndcg@2"].tolist() == [1, 0]
    assert found["margin"].tolist() == [1, 1]


def test_queries_do_not_depend_on_each_other(monkeypatch):
    rng = np.random.default_rng(6)
    levels = random_relevance(rng, 23, 9)
    scores = rng.integers(0, 5, levels.shape).astype(float)
    whole = per_query(scores, levels)
    monkeypatch.setattr(metrics, "_CHUNK", 30)
    pd.testing.assert_frame_equal(per_query(scores, levels), whole)
    reverse = per_query(scores[::-1], levels[::-1]).iloc[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(reverse, whole)
    columns = rng.permutation(9)
    pd.testing.assert_frame_equal(per_query(scores[:, columns], levels[:, columns]), whole)
    assert len(per_query(scores[:0], levels[:0])) == 0


def test_cutoffs_beyond_the_candidates_take_all_of_them():
    found = per_query([[1.0, 2.0, 3.0]], [[2, 0, 1]], ks=(3, 50)).iloc[0]
    for name in ("exact_hit", "relevant_hit", "ndcg", "ndcg_binary"):
        assert found[f"{name}@50"] == found[f"{name}@3"]
    assert found["exact_hit@50"] == 1


def test_minus_infinity_ranks_last():
    found = per_query([[0.0, -np.inf, -np.inf], [-np.inf] * 3], [[0, 2, 1], [2, 0, 0]])
    assert found["rank"].tolist() == [2.5, 2]
    assert found["margin"].tolist() == [np.inf, 0]


@pytest.mark.parametrize(
    ("scores", "levels", "ks", "message"),
    [
        ([[0.1, np.nan], [0.1, 0.2]], [[2, 0], [2, 0]], (1,), "NaN in 1 of 2 queries"),
        ([[0.1, 0.2]], [[2, 0, 0]], (1,), r"expected the shape of scores \(1, 2\), got \(1, 3\)"),
        ([[0.1, 0.2]], [[2, 2]], (1,), "at most one 2 in a row"),
        ([[0.1, 0.2]], [[3, 0]], (1,), "expected 0, 1 or 2, got 3"),
        ([[0.1, 0.2]], [[2, 0]], (1, 0), "at least 1, got 0"),
        ([[0.1]], [[2]], (1,), r"at least 2 candidates, got shape \(1, 1\)"),
        (np.array([[0.1, 0.2]], np.float16), [[2, 0]], (1,), "float64 or float32, got float16"),
    ],
)
def test_bad_input_is_named(scores, levels, ks, message):
    with pytest.raises(ValueError, match=message):
        per_query(scores, levels, ks)


def test_first_place_is_shared_among_ties():
    found = rank_top([[1.0, 3.0, 3.0, 2.99999], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 3.0 + 1e-12]])
    assert found.tolist() == [[0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 0.5, 0.5]]


def test_first_place_agrees_with_the_hits():
    rng = np.random.default_rng(7)
    levels = random_relevance(rng, 30, 8)
    scores = rng.integers(0, 3, levels.shape).astype(float)
    hits = (rank_top(scores) * (levels == 2)).sum(axis=1)
    np.testing.assert_allclose(hits, per_query(scores, levels)["exact_hit@1"])


def test_top_conditions_are_named_best_first():
    found = top_conditions([[0.1, 0.9, 0.5], [0.5, 0.1, 0.5]], ["A", "B", "C"], k=2)
    assert found.tolist() == [["B", "C"], ["A", "C"]]
    assert top_conditions([[0.1, 0.9, 0.5]], ["A", "B", "C"]).tolist() == [["B", "C", "A"]]
    with pytest.raises(ValueError, match="expected 3 names, got 2"):
        top_conditions([[0.1, 0.9, 0.5]], ["A", "B"])


def test_coverage_answers_the_surest_queries_first():
    curve = coverage_accuracy([0.1, 0.9, 0.5, 0.5], [0, 1, 1, 0])
    assert curve["coverage"].tolist() == [0.25, 0.5, 0.75, 1]
    # second and third share a margin: each is right half of the time
    assert curve["accuracy"].tolist() == pytest.approx([1, 1.5 / 2, 2 / 3, 2 / 4])
    assert coverage_area([0.1, 0.9, 0.5, 0.5], [0, 1, 1, 0]) == pytest.approx(curve["accuracy"].mean())


def test_an_uninformative_margin_has_the_area_of_its_accuracy():
    hits = np.array([1, 0, 0, 1, 1, 0.5])
    assert coverage_area(np.zeros(6), hits) == pytest.approx(hits.mean())
    areas = [coverage_area(order, hits) for order in itertools.permutations(range(6))]
    assert np.mean(areas) == pytest.approx(hits.mean())
    assert max(areas) == pytest.approx(coverage_area(hits + np.arange(6) * 1e-9, hits))


@pytest.mark.parametrize(("margin", "hit"), [([0.1], [1, 0]), ([], []), ([np.nan], [1]), ([0.1], [np.nan])])
def test_coverage_needs_a_number_for_every_query(margin, hit):
    with pytest.raises(ValueError, match="margin, hit: expected numbers, one per query"):
        coverage_accuracy(margin, hit)
