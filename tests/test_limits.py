"""Replicates, the positive control, shares of a range, merged hits: on cells whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from perturbret.evaluation.limits import (
    dealt,
    duplicate_hits,
    merged_hits,
    replicate_hits,
    replicates,
    share_of_range,
)


def drawn(n_conditions=6, n=24, signal=1.0, d=8, seed=0):
    """Embeddings of n cells of each condition around a centre of its own."""
    rng = np.random.default_rng(seed)
    conditions = np.repeat([f"c{i}" for i in range(n_conditions)], n)
    centres = rng.normal(size=(n_conditions, d))
    return signal * np.repeat(centres, n, axis=0) + rng.normal(size=(n_conditions * n, d)), conditions


def row_of(table, name):
    return table.set_index("name").loc[name]


def test_replicates_of_clear_conditions_are_found_and_those_of_none_are_at_chance():
    found = row_of(replicates(*drawn(signal=5.0)), "halves")
    assert found["estimate"] == 1 and found["chance"] == pytest.approx(1 / 6)
    assert (found["n_cells"], found["n_queries"], found["n_conditions"]) == (12, 12, 6)
    none = [row_of(replicates(*drawn(signal=0.0, seed=seed)), "halves")["estimate"] for seed in range(8)]
    assert np.mean(none) == pytest.approx(1 / 6, abs=0.07)
    assert list(replicates(*drawn())["name"]) == ["halves"]


def test_no_cell_is_on_both_sides():
    """A prototype that held the query's own cells would be found by these alone."""
    embeddings, conditions = drawn(signal=0.0, n=2, d=400, n_conditions=20)
    code = np.unique(conditions, return_inverse=True)[1]
    assert replicate_hits(embeddings, code, np.arange(40) % 2)["hit"].mean() < 0.4
    assert replicate_hits(embeddings, code, np.arange(40))["hit"].mean() < 0.4


def test_replicate_hits_as_written_out():
    embeddings, conditions = drawn(n=5, signal=0.7)
    groups, code = np.random.default_rng(1).integers(0, 3, 30), np.repeat(np.arange(6), 5)
    found = replicate_hits(embeddings, code, groups)

    def unit(x):
        return x / np.linalg.norm(x)

    expected = []
    for group in range(3):
        rest = {c: embeddings[(code == c) & (groups != group)] for c in range(6)}
        prototypes = {c: unit(cells.mean(axis=0)) for c, cells in rest.items() if len(cells)}
        for c in prototypes:
            cells = embeddings[(code == c) & (groups == group)]
            if len(cells):
                scores = {other: unit(cells.mean(axis=0)) @ p for other, p in prototypes.items()}
                expected.append((c, len(cells), len(prototypes), float(max(scores, key=scores.get) == c)))
    columns = ["condition", "n_cells", "n_candidates", "hit"]
    assert sorted(found[columns].itertuples(index=False, name=None)) == sorted(expected)
    assert not found["hit"].all() and found["hit"].any()


def test_batches_cost_what_they_shift_and_the_dealt_out_ones_do_not():
    embeddings, conditions = drawn(n=40, signal=1.0)
    batch = np.random.default_rng(2).integers(0, 4, len(conditions)).astype(str)
    # Each condition lies elsewhere in every batch.
    for b in np.unique(batch):
        for c in np.unique(conditions):
            embeddings[(batch == b) & (conditions == c)] += 3 * np.random.default_rng(hash_of(b, c)).normal(
                size=8
            )
    found = replicates(embeddings, conditions, batch=batch)
    assert list(found["name"]) == ["halves", "halves of batches", "halves of batches, dealt out"]
    whole, random = (row_of(found, name)["estimate"] for name in found["name"][1:])
    assert random > whole + 0.2
    assert list(replicates(embeddings, conditions, batch=np.full(len(batch), "x"))["name"]) == ["halves"]


def hash_of(b, c):
    return [int(b), int(c[1:])]


def test_guides_of_the_same_name_belong_to_their_own_condition():
    embeddings, conditions = drawn(n=20, signal=2.0)
    shared = np.tile(["g1", "g2"], 60)
    named = np.char.add(conditions, shared)
    one, other = (replicates(embeddings, conditions, guide=guide) for guide in (shared, named))
    pd.testing.assert_frame_equal(one, other)
    assert row_of(one, "guides")[["n_cells", "n_queries", "n_conditions"]].tolist() == [10, 12, 6]
    # Conditions of one guide have no other to be compared with.
    only = np.where(conditions == "c0", "g1", shared)
    assert row_of(replicates(embeddings, conditions, guide=only), "guides")["n_conditions"] == 5
    assert "guides" not in set(replicates(embeddings, conditions, guide=np.full(120, "g"))["name"])


def test_dealt_keeps_sizes_within():
    groups, within = np.array([0, 0, 1, 1, 1, 2]), np.array(["a", "b", "a", "b", "b", "a"])
    found = dealt(groups, within, np.random.default_rng(0))
    for name in ("a", "b"):
        assert sorted(found[within == name]) == sorted(groups[within == name])
    assert any((dealt(groups, within, np.random.default_rng(i)) != groups).any() for i in range(5))


def test_a_collapsed_embedding_is_at_chance():
    conditions = np.repeat([f"c{i}" for i in range(5)], 10)
    found = row_of(replicates(np.ones((50, 3)), conditions), "halves")
    assert found["estimate"] == pytest.approx(0.2) == found["chance"]
    hits = duplicate_hits(np.ones((50, 3)), conditions, np.ones((50, 3)), conditions, share=1.0)
    assert hits.mean() == pytest.approx(0.2)


def test_a_duplicate_is_found_and_half_a_one_more_often_than_the_query():
    embeddings, conditions = drawn(signal=0.3)
    cells, labels = drawn(signal=0.3, seed=1)
    order = np.random.default_rng(0).permutation(len(cells))
    asked = {"cells": cells[order], "labels": labels[order]}
    none, half, whole = (
        duplicate_hits(embeddings, conditions, **asked, share=w).mean() for w in (0.0, 0.5, 1.0)
    )
    assert whole == 1 and none < half < 1
    # Conditions without a library cell are not asked.
    known = labels[order] != "c0"
    some = duplicate_hits(embeddings, conditions, cells[order][known], labels[order][known], share=1.0)
    assert len(some) == 120 and (some == 1).all()


def test_share_of_range():
    rng, clusters = np.random.default_rng(0), np.repeat([f"c{i}" for i in range(12)], 20)
    bound = (rng.random(240) < 0.6).astype(float)
    hit = bound * (rng.random(240) < 0.7)
    found = share_of_range(hit, bound, np.full(240, 0.1), clusters)
    assert found.estimate[0] == pytest.approx((hit.mean() - 0.1) / (bound.mean() - 0.1))
    assert found.low[0] < found.estimate[0] < found.high[0] < 1
    same = share_of_range(bound, bound, np.full(240, 0.1), clusters)
    assert (same.low[0], same.estimate[0], same.high[0]) == pytest.approx((1, 1, 1))
    assert np.isnan(share_of_range(hit, np.zeros(240), np.full(240, 0.1), clusters).estimate).all()


def test_merged_hits():
    names = ["A", "B", "C"]
    alike = pd.DataFrame([[1, 1, 0], [1, 1, 0], [0, 0, 1]], names, names).astype(bool)
    scores = np.array([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [2, 1, 2]])
    found = merged_hits(scores, np.array(["A", "A", "A", "C"]), names, alike)
    assert found["merged_hit@1"].tolist() == [1, 1, 0, 0.5]
    assert found["n_merged"].tolist() == [2, 2, 2, 1]
    assert found["chance"].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 1 / 3])
