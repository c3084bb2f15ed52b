"""The read-out of a method: the simplest within one standard error of the best, with how often it is chosen again."""

import numpy as np
import pandas as pd
import pytest

from perturbret.evaluation.readouts import choose_readout, common_readout, primary_readout, read_validation


def validation(hits, *, seeds=1):
    """Per-cell hits (G conditions, cells) of each read-out, given as {(scoring, library): array}."""
    tables = []
    for seed in range(seeds):
        for (scoring, library), array in hits.items():
            groups, cells = np.shape(array)
            tables.append(
                pd.DataFrame(
                    {
                        "query_id": np.arange(groups * cells),
                        "condition": np.repeat([f"G{i}" for i in range(groups)], cells),
                        "library": library,
                        "scoring": scoring,
                        "exact_hit@1": np.ravel(array).astype(float),
                    }
                ).assign(seed=seed)
            )
    return pd.concat(tables, ignore_index=True)


def table_of(rates, cells=10):
    """Hits such that each condition has the given share."""
    return np.array([[i < round(rate * cells) for i in range(cells)] for rate in rates])


def test_the_best_wins_where_it_is_clearly_better():
    hits = {("cosine", "mean"): table_of([0.1] * 10), ("classifier", "none"): table_of([0.4, 0.5] * 5)}
    found = choose_readout(validation(hits))
    assert (found.scoring, found.library, found.n_readouts) == ("classifier", "none", 2)
    assert found.validation == pytest.approx(0.45) and found.stability == 1


def test_within_one_standard_error_the_simpler_wins():
    # Differences of 0.6 and -0.4 in turn: mean 0.1, standard error over 10 conditions 0.167.
    better, simple = [0.8, 0.3] * 5, [0.2, 0.7] * 5
    hits = {("cosine", "mean"): table_of(simple), ("whitened", "mean"): table_of(better)}
    found = choose_readout(validation(hits))
    assert found.scoring == "cosine" and found.validation == pytest.approx(0.45)
    assert 0.3 < found.stability < 1
    assert found.best == pytest.approx(0.55)
    assert choose_readout(validation(hits), n_errors=0).scoring == "whitened"


def test_the_standard_error_is_that_of_paired_conditions():
    # The same mean difference of 0.1, alike in every condition: no standard error to hide behind.
    hits = {
        ("cosine", "mean"): table_of([0.1, 0.8, 0.5]),
        ("whitened", "mean"): table_of([0.2, 0.9, 0.6]),
    }
    assert choose_readout(validation(hits)).scoring == "whitened"


def test_seeds_add_cells_and_no_conditions():
    rng = np.random.default_rng(0)
    hits = {
        ("cosine", "mean"): rng.random((8, 10)) < 0.30,
        ("whitened", "mean"): rng.random((8, 10)) < 0.42,
        ("classifier", "none"): rng.random((8, 10)) < 0.36,
    }
    once, thrice = (choose_readout(validation(hits, seeds=n)) for n in (1, 3))
    assert once == thrice  # three copies of the same cells tell nothing new


def test_one_condition_has_no_standard_error():
    hits = {("cosine", "mean"): table_of([0.4]), ("whitened", "mean"): table_of([0.5])}
    assert choose_readout(validation(hits)).scoring == "whitened"


def test_the_prior_corrected_variant_and_libraries_that_were_not_evaluated_are_left_out(tmp_path):
    hits = {
        ("classifier_corrected", "none"): table_of([0.9] * 5),
        ("cosine", "raw_cell"): table_of([0.8] * 5),
        ("cosine", "mean"): table_of([0.1] * 5),
    }
    validation(hits).assign(candidates="train").to_parquet(tmp_path / "validation_scores.parquet")
    read = read_validation(tmp_path, ["mean"])
    assert set(zip(read["scoring"], read["library"], strict=True)) == {("cosine", "mean")}
    assert primary_readout(tmp_path, ["mean", "raw_cell"]) == ("raw_cell", "cosine")


def test_two_methods_meet_at_the_classifier_or_else_at_whitened_means():
    both = {("classifier", "none"), ("whitened", "mean"), ("cosine", "mean")}
    headless = {("whitened", "mean"), ("cosine", "mean")}
    assert common_readout(both, both) == ("classifier", "none")
    assert common_readout(both, headless) == common_readout(headless, both) == ("whitened", "mean")
    assert common_readout(headless, {("classifier", "none")}) is None
