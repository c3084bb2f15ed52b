"""What is told apart: valid p-values, power, batches, merging."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from perturbret.data.conditions import CTRL
from perturbret.evaluation import resolvability
from perturbret.evaluation.resolvability import apart_by_condition, apart_by_size, merge_alike, tell_apart


def cells(shifts, n=40, d=3, seed=0, controls=60):
    """Normal points: conditions A, B, ... moved by `shifts` along the first axis, and controls at 0."""
    rng = np.random.default_rng(seed)
    names = [*"ABCDEFGHIJ"[: len(shifts)], CTRL]
    conditions = np.repeat(names, [n] * len(shifts) + [controls])
    points = rng.normal(size=(len(conditions), d))
    points[:, 0] += np.repeat([*shifts, 0.0], [n] * len(shifts) + [controls])
    return points, conditions


def test_energy_distance_and_p_value_as_written_out():
    points, conditions = cells([0.4, 0.0], n=8, controls=0)
    found = tell_apart(points, conditions, sizes=(8,), n_permutations=20_000).iloc[0]

    def energy(x, y):
        return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()

    observed = energy(points[:8], points[8:])
    assert found["distance"] == pytest.approx(observed, rel=1e-5)
    rng, more = np.random.default_rng(1), 0
    for _ in range(2000):
        order = rng.permutation(16)
        more += energy(points[order[:8]], points[order[8:]]) >= observed
    assert found["p_value"] == pytest.approx(more / 2000, abs=0.04)


def test_p_values_are_uniform_where_there_is_no_difference_far_into_the_tail():
    points = np.random.default_rng(0).exponential(size=(2000, 30, 2))
    parts = np.arange(15), np.arange(15, 30)
    p = [resolvability._energy_test(each, np.zeros(30, int), *parts, 499, 0)[1] for each in points]
    for level, low, high in ((0.5, 0.45, 0.55), (0.05, 0.035, 0.065), (0.01, 0.005, 0.017)):
        assert low < np.mean(np.array(p) <= level) < high


def test_the_fitted_tail_continues_what_permutations_count():
    rng = np.random.default_rng(0)
    for draw in (rng.gamma(2, size=500), -rng.gamma(2, size=500), rng.normal(size=500)):
        more = np.quantile(draw, 0.96)
        assert resolvability._pearson_tail(more, draw) == pytest.approx(0.04, abs=0.02)
        far = [resolvability._pearson_tail(more + step * draw.std(), draw) for step in (0, 1, 3)]
        assert far[0] > far[1] >= far[2] > 0
    assert resolvability._pearson_tail(1.0, np.ones(500)) == 1.0


def test_effects_are_found_and_more_of_them_with_more_cells():
    points, conditions = cells([0, 0, 0.7, 3.0], n=60)
    tests = tell_apart(points, conditions, sizes=(4, 60))
    assert set(tests["n_cells"]) == {4, 60}
    sizes = apart_by_size(tests).set_index("n_cells")
    assert sizes.loc[4, "from_controls"] == 1 and sizes.loc[60, "from_controls"] == 2
    assert sizes.loc[4, "pairs"] < sizes.loc[60, "pairs"] == pytest.approx(5 / 6)
    table = apart_by_condition(tests).set_index("condition")
    assert table.loc["D", "cells_from_controls"] == 4 and table.loc["C", "cells_from_controls"] == 60
    assert np.isnan(table.loc["A", "cells_from_controls"]) and table.loc["A", "alike"] == "B"
    assert table["n_alike"].tolist() == [1, 1, 0, 0] and (table["n_cells"] == 60).all()


def test_false_discoveries_are_controlled_without_any_effect():
    found = [tell_apart(*cells([0] * 6, n=20, seed=seed), sizes=(20,))["apart"].any() for seed in range(40)]
    assert np.mean(found) <= 0.125  # 5% of each of two families; 1 in 1000 by luck


def test_conditions_of_one_batch_each_are_not_told_apart():
    points, conditions = cells([5.0, -5.0], n=30, controls=0)
    batch = np.where(conditions == "A", "x", "y")
    apart, alone = (tell_apart(points, conditions, batch=b, sizes=(30,)).iloc[0] for b in (None, batch))
    assert apart["apart"] and not alone["apart"] and alone["p_value"] == 1


def test_a_difference_between_batches_is_none_between_conditions():
    """Batches of unequal shares: without strata the conditions would seem to differ."""
    points, conditions = cells([0.0, 0.0], n=80, controls=0)
    rng = np.random.default_rng(0)
    batch = np.where(rng.random(160) < np.where(conditions == "A", 0.3, 0.7), "x", "y")
    points[batch == "x", 1] += 3
    with_batch, without = (
        tell_apart(points, conditions, batch=b, sizes=(80,)).iloc[0] for b in (batch, None)
    )
    assert without["p_value"] < 0.01 < with_batch["p_value"]


def test_smaller_sizes_are_part_of_larger_ones_and_other_conditions_change_nothing():
    points, conditions = cells([0.5, 1.0, 2.0], n=30)
    whole = tell_apart(points, conditions, sizes=(10, 30))
    kept = np.isin(conditions, ["A", "B", CTRL])
    part = tell_apart(points[kept], conditions[kept], sizes=(10, 30))
    key = ["n_cells", "condition", "other"]
    both = part.merge(whole, on=key)
    assert len(both) == len(part) and np.allclose(both["p_value_x"], both["p_value_y"])


def test_small_conditions_give_all_their_cells():
    points, conditions = cells([0, 0], n=30)
    kept = (conditions != "A") | (np.arange(len(conditions)) < 12)
    tests = tell_apart(points[kept], conditions[kept], sizes=(10, 100))
    assert set(tests["n_cells"]) == {10, 30}
    used = tests[tests["n_cells"] == 30].set_index(["condition", "other"])
    assert used.loc[("A", CTRL), ["n_condition", "n_other"]].tolist() == [12, 60]
    assert apart_by_condition(tests)["n_cells"].tolist() == [12, 30]


def test_merging_is_by_tests_of_pairs_and_not_transitive():
    rows = [("A", "B", False), ("B", "C", False), ("A", "C", True), ("A", CTRL, False), ("C", CTRL, False)]
    tests = pd.DataFrame(rows, columns=["condition", "other", "apart"]).assign(n_cells=10)
    found = merge_alike(tests, ["A", "B", "C", "D"])
    assert found.loc["A"].tolist() == [True, True, False, False]
    assert found.loc["B"].tolist() == [True, True, True, False]
    assert (found.to_numpy() == found.to_numpy().T).all()
    # Where pairs were too many to be tested.
    controls = tests[tests["other"] == CTRL]
    assert merge_alike(controls, ["A", "B", "C"]).loc["A"].tolist() == [True, False, True]


def test_pairs_are_left_out_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(resolvability, "MAX_PAIRS", 5)
    tests = tell_apart(*cells([0, 0, 0, 5]), sizes=(20,))
    assert (tests["other"] == CTRL).all() and len(tests) == 4
    row = apart_by_size(tests).iloc[0]
    assert row["from_controls"] == 1 and np.isnan(row["pairs"]) and np.isnan(row["alike"])
    assert merge_alike(tests, list("ABCD")).loc["A"].tolist() == [True, True, True, False]


def test_without_controls_there_are_pairs_only():
    tests = tell_apart(*cells([0, 5], controls=0), sizes=(20,))
    assert tests["other"].tolist() == ["B"]
    assert np.isnan(apart_by_size(tests)["from_controls"].iloc[0])
    assert "q_value" not in apart_by_condition(tests)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conditions": np.array(["A"] * 140)}, "expected two or more, got"),
        ({"conditions": np.array(["A"] * 3)}, "expected a row for each of 3 cells"),
        ({"sizes": (1,)}, "sizes from 2"),
        ({"n_permutations": 50}, "100 permutations"),
    ],
)
def test_what_cannot_be_tested_is_an_error(change, said):
    points, conditions = cells([0, 1])
    with pytest.raises(ValueError, match=said):
        tell_apart(**{"points": points, "conditions": conditions, **change})
