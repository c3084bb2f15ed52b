"""Cells that a query needs: interpolation, intervals by inversion, what is not reached."""

import numpy as np
import pandas as pd
import pytest

from perturbret.evaluation.query_sizes import cells_needed, cells_needed_by_condition


def summary(estimates, half=0.1, sizes=(1, 10, 100), **more):
    """Rows of a summary: single cells, then pools."""
    estimates = np.array(estimates, float)
    table = pd.DataFrame(
        {"query_size": sizes, "estimate": estimates, "ci_low": estimates - half, "ci_high": estimates + half}
    )
    table["pooling"] = ["single", *["scores"] * (len(sizes) - 1)]
    fixed = {
        "library": "mean",
        "scoring": "cosine",
        "metric": "exact_hit@1",
        "average": "macro",
        "n_conditions": 5,
    }
    return table.assign(**{**fixed, **more})


def test_a_crossing_is_interpolated_over_the_logarithm_of_the_size():
    half, most = cells_needed(summary([0.2, 0.6, 1.0])).itertuples()
    assert half.level == 0.5 and half.cells == pytest.approx(10**0.75)
    assert half.low == pytest.approx(10**0.5) and half.high == pytest.approx(
        10.0
    )  # where 0.6 and 0.4 are reached
    assert most.cells == pytest.approx(10**1.5) and (most.largest, most.n_conditions) == (100, 5)


def test_what_no_size_reaches_is_infinite_and_so_may_be_an_end_of_the_interval():
    row = cells_needed(summary([0.2, 0.3, 0.45]), levels=(0.5,)).iloc[0]
    assert row["cells"] == row["high"] == np.inf and row["low"] == pytest.approx(
        100 ** (1 / 1.5 * 0) * 10 ** (1 + 0.1 / 0.15)
    )


def test_a_level_that_single_cells_reach_needs_one():
    assert cells_needed(summary([0.9, 0.95, 1.0]))["cells"].tolist() == [1, 1]


def test_readouts_and_poolings_are_apart_and_micro_is_not_looked_at():
    other = summary([0.2, 0.9, 1.0], scoring="whitened")
    embeddings = summary([0.2, 0.4, 0.6])[1:].assign(pooling="embeddings")
    micro = summary([1, 1, 1], average="micro")
    found = cells_needed(pd.concat([summary([0.2, 0.6, 1.0]), other, embeddings, micro]), levels=(0.5,))
    assert found[["scoring", "pooling"]].to_numpy().tolist() == [
        ["cosine", "embeddings"],
        ["cosine", "scores"],
        ["whitened", "scores"],
    ]
    assert found["cells"].tolist() == pytest.approx([10**1.5, 10**0.75, 10 ** (0.3 / 0.7)])
    assert len(cells_needed(summary([0.2], sizes=(1,)))) == 0


def test_by_condition():
    rows = [("A", 1, 0.0), ("A", 1, 1.0), ("A", 10, 1.0), ("B", 1, 0.0), ("B", 1, 0.0), ("B", 1, 0.0)]
    scores = pd.DataFrame(rows, columns=["condition", "query_size", "exact_hit@1"])
    table = cells_needed_by_condition(scores).set_index("condition")
    assert table["n_cells"].tolist() == [2, 3]
    assert table["1 cells"].tolist() == [0.5, 0] and np.isnan(table.loc["B", "10 cells"])
    assert table["cells for 50%"].tolist() == [1, np.inf]
    assert table.loc["A", "cells for 80%"] == pytest.approx(10**0.6)


def test_the_interval_holds_the_true_size_on_simulated_screens():
    """Conditions drawn from a population of known mean hit rates: the inverted interval covers the true crossing."""
    from perturbret.evaluation.judge import summarise

    rng, sizes, covered = np.random.default_rng(0), (1, 4, 16), 0
    mean = np.array([0.25, 0.45, 0.65])
    truth = 4 * 4 ** (0.05 / 0.2)
    for _ in range(40):
        tables = []
        shift = rng.uniform(-0.2, 0.2, 20)
        for size, rate in zip(sizes, mean, strict=True):
            hits = rng.random((20, 15)) < (rate + shift)[:, None]
            table = {
                "condition": np.repeat([f"c{i:02d}" for i in range(20)], 15),
                "exact_hit@1": hits.ravel() * 1.0,
            }
            tables.append(
                pd.DataFrame(table).assign(query_size=size, pooling="single" if size == 1 else "scores")
            )
        scores = pd.concat(tables, ignore_index=True)
        scores = scores.assign(
            library="mean", scoring="cosine", candidates="train", rank=1.0, n_candidates=20, n_relevant=1
        )
        row = cells_needed(summarise(scores, n_resamples=200), levels=(0.5,)).iloc[0]
        covered += row["low"] <= truth <= row["high"]
    assert covered >= 34  # 95% of 40, less what luck takes
