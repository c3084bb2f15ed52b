"""Halves against halves, and what explains that a double is found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_effects import toy_effects

from perturbret.combinations.ceiling import by_quarter, detectability, half_against_half, read_distances
from perturbret.combinations.composers import OPPONENTS
from perturbret.combinations.judge import judge
from perturbret.combinations.task import make_task


def scored(task):
    everyone = np.arange(len(task.queries))
    return judge(task, OPPONENTS[0].score(task, everyone[:0], everyone)).query("candidates == 'pairs'")


def test_measured_halves_find_what_no_sum_could():
    effects = toy_effects(n_doubles=12, noise=0.02)
    # Every double becomes something else than the sum of its singles.
    rng = np.random.default_rng(3)
    other = np.where(
        np.array(["+" in c for c in effects.conditions])[:, None],
        2 * rng.normal(size=effects.values.shape),
        0,
    )
    task = make_task(
        replace(effects, values=effects.values + other, halves=effects.halves + other, fingerprint="")
    )
    found = half_against_half(task).query("candidates == 'pairs'").groupby("way")["exact_hit@1"].mean()
    assert found["measured"] == 1 and found["composed"] < 0.5


def test_without_halves_there_is_no_ceiling():
    assert half_against_half(make_task(replace(toy_effects(), halves=None, fingerprint=""))).empty


def write(path, names, values):
    pd.DataFrame(values, names, names).to_csv(path)
    return path


def test_distances_are_read_by_canonical_names(tmp_path):
    values = np.arange(9.0).reshape(3, 3)
    table = read_distances(write(tmp_path / "d.csv", ["T01_T00", "control", "T02"], values))
    assert table.loc["T00+T01", "ctrl"] == 1 and table.loc["ctrl", "T00+T01"] == 3
    with pytest.raises(ValueError, match="each condition once"):
        read_distances(write(tmp_path / "d.csv", ["T01_T00", "T00_T01", "T02"], values))


def test_detectability_says_what_a_wrong_answer_was_near_to(tmp_path):
    task = make_task(toy_effects())
    names = ["control", *(query.replace("+", "_") for query in task.queries)]
    points = np.arange(len(names), dtype=float)
    distances = read_distances(write(tmp_path / "d.csv", names, np.abs(points[:, None] - points)))
    table = scored(task).copy()
    table.loc[table["query"] == task.queries[4], ["exact_hit@1", "first"]] = (0.0, task.queries[6])
    found = detectability(task, table, distances)
    np.testing.assert_allclose(found["distance"], np.arange(1, len(names)))
    wrong = found.loc[task.queries[4]]
    # At 5 stands the query, at 7 the answer; nearer are those at 4 and 6, of 14 others.
    assert wrong["to_first"] == 2 and wrong["nearer"] == pytest.approx(2 / 14)
    assert found.drop(task.queries[4])["nearer"].isna().all()
    np.testing.assert_allclose(found["size"], np.linalg.norm(task.values, axis=1))
    quarters = by_quarter(found, "distance")
    assert quarters["doubles"].tolist() == [4, 4, 4, 4] and quarters["exact_hit@1"].tolist() == [
        1,
        0.75,
        1,
        1,
    ]
