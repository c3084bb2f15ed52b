"""What is said of single answers holds where the truth is known, and nothing that is chosen looks at query cells."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import toy
from scipy.special import log_softmax, softmax
from scipy.stats import mannwhitneyu

from perturbret.data.prepared import prepare
from perturbret.data.splits import make_split
from perturbret.data.tracks import TRACKS
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation import confidence as conf
from perturbret.evaluation.confidence import NONCONFORMITY, Answers, calibrate, judge_confidence

C = 12
NAMES = np.array([f"G{i:02d}" for i in range(C)])
OPTIONS = {"n_resamples": 200, "seed": 0}


def drawn(n, rng, *, scale=1.0, noise=0.0):
    """Answers to cells whose true posterior is softmax(z); the scores are scale * z, with noise a wrong posterior."""
    z = 2 * rng.standard_normal((n, C))
    labels = (rng.random((n, 1)) < softmax(z, axis=1).cumsum(axis=1)).argmax(axis=1)
    return Answers(scale * (z + noise * rng.standard_normal(z.shape)), NAMES, NAMES[labels])


def of(rows):
    return {name: (estimate, low, high, n) for name, estimate, low, high, n in rows}


@pytest.mark.parametrize("scale", [0.03, 1.0, 40.0])
def test_temperature_gives_the_true_posterior_back(scale):
    rng = np.random.default_rng(0)
    calibration = calibrate(drawn(20_000, rng, scale=scale))
    assert calibration.temperature == pytest.approx(scale, rel=0.03)
    asked = drawn(5000, rng, scale=scale)
    found = of(conf.on_queries(calibration, asked, **OPTIONS))
    truth = -log_softmax(asked.scores / scale, axis=1)[asked.own].mean()
    assert found["log_loss"][0] == pytest.approx(truth, rel=0.01)
    assert found["overconfidence"][1] < 0 < found["overconfidence"][2]
    # As calibrated as luck allows; unscaled scores are not, unless they are log-probabilities to begin with.
    assert found["ece"][0] < 1.5 * found["ece_if_calibrated"][2]
    if scale != 1:
        assert found["ece_uncalibrated"][1] > 3 * found["ece_if_calibrated"][2]
        assert found["log_loss_uncalibrated"][1] > found["log_loss"][2]
        assert found["brier_uncalibrated"][0] > found["brier"][0]


def test_a_method_that_knows_nothing_gets_equal_probabilities_and_sets_of_all():
    rng = np.random.default_rng(1)
    answers = Answers(rng.standard_normal((3000, C)), NAMES, rng.choice(NAMES, 3000))
    calibration = calibrate(answers)
    np.testing.assert_allclose(calibration.probabilities(answers.scores), 1 / C, atol=0.01)
    assert set(calibration.thresholds.values()) == {np.inf}
    flat = replace(answers, scores=np.zeros((3000, C)))
    equal = calibrate(flat)
    assert all(equal.sets(flat.scores, kind).all() for kind in NONCONFORMITY)
    found = of(conf.on_queries(equal, flat, **OPTIONS))
    assert found["conformal_lac_coverage"][0] == 1 and found["ece"][0] == pytest.approx(0, abs=0.02)
    assert found["coverage_area"][0] == pytest.approx(found["accuracy"][0]) == 1 / C


@pytest.mark.parametrize("kind", [*NONCONFORMITY])
@pytest.mark.parametrize("coverage", [0.8, 0.9])
@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_conformal_sets_hold_the_truth_as_often_as_promised(kind, coverage, noise):
    """Whether the posterior is right or wrong: over 60 draws within one point of the promise (standard error .3)."""
    rng = np.random.default_rng(2)
    held, sizes = [], []
    for _ in range(60):
        calibration = calibrate(drawn(400, rng, noise=noise), coverage=coverage)
        asked = drawn(1000, rng, noise=noise)
        sets = calibration.sets(asked.scores, kind)
        held.append((sets & asked.own).any(axis=1).mean())
        sizes.append(sets.sum(axis=1).mean())
    assert abs(np.mean(held) - coverage) < 0.01
    assert 1 < np.mean(sizes) < C - 1


def test_least_ambiguous_sets_are_smaller_and_adaptive_ones_hold_more_of_the_hard_cells():
    """Cells are easy or hard, and the classifier knows which."""
    rng = np.random.default_rng(3)

    def both(n):
        hard = rng.random(n) < 0.5
        z = np.where(hard, 0.5, 6.0)[:, None] * rng.standard_normal((n, C))
        labels = (rng.random((n, 1)) < softmax(z, axis=1).cumsum(axis=1)).argmax(axis=1)
        return Answers(z, NAMES, NAMES[labels]), hard

    calibration = calibrate(both(20_000)[0])
    asked, hard = both(20_000)
    sets = {kind: calibration.sets(asked.scores, kind) for kind in NONCONFORMITY}
    held = {kind: (each & asked.own).any(axis=1) for kind, each in sets.items()}
    assert sets["lac"].sum() < sets["aps"].sum()
    assert held["lac"][hard].mean() < 0.85 < 0.9 < held["aps"][hard].mean()
    for each in held.values():
        assert each.mean() == pytest.approx(0.9, abs=0.01)


def test_the_conformal_quantile_is_the_one_that_exchangeability_asks_for():
    values = np.arange(1.0, 10.0)
    assert conf.conformal_quantile(values, 0.9) == 9 and conf.conformal_quantile(values, 0.5) == 5
    assert conf.conformal_quantile(values[:8], 0.9) == np.inf
    assert conf.conformal_quantile(np.append(values, np.inf), 0.9) == np.inf


def test_adaptive_nonconformity_is_the_mass_of_what_is_as_probable():
    found = NONCONFORMITY["aps"](np.array([[0.1, 0.5, 0.2, 0.2], [0.25] * 4]))
    np.testing.assert_allclose(found, [[1.0, 0.5, 0.9, 0.9], [1.0] * 4])


def test_calibration_error_by_hand_and_equal_probabilities_share_a_bin():
    probability, hit = np.repeat([0.2, 0.6], 50), np.r_[np.ones(20), np.zeros(30), np.ones(25), np.zeros(25)]
    assert len(np.unique(conf.mass_bins(probability))) == 2
    assert conf.expected_calibration_error(probability, hit) == pytest.approx((0.2 + 0.1) / 2)
    order = np.random.default_rng(0).permutation(100)
    assert conf.expected_calibration_error(probability[order], hit[order]) == pytest.approx(0.15)
    assert np.bincount(conf.mass_bins(np.random.default_rng(0).random(500))).tolist() == [50] * 10


def test_a_threshold_is_where_the_answered_reach_the_accuracy():
    confidence = np.repeat([0.9, 0.7, 0.5, 0.3], 25)
    hit = np.repeat([1.0, 0.8, 0.1, 0.0], 25)
    assert conf.answer_threshold(confidence, hit, 0.9) == 0.7  # (1 + .8) / 2
    assert conf.answer_threshold(confidence, hit, 0.95) == 0.9
    assert conf.answer_threshold(confidence, hit, 0.4) == 0.3
    assert conf.answer_threshold(confidence, hit * 0.5, 0.95) == np.inf
    # Too few cells to tell.
    assert conf.answer_threshold(confidence[20:], hit[20:], 0.95) == np.inf


def test_what_is_answered_and_how_often_right_is_of_query_cells():
    rng = np.random.default_rng(4)
    calibration = calibrate(drawn(5000, rng, noise=0.5))
    asked = drawn(5000, rng, noise=0.5)
    found = of(conf.on_queries(calibration, asked, **OPTIONS))
    top = calibration.probabilities(asked.scores).max(axis=1)
    cells = top >= calibration.thresholds[0.8]
    assert 0.05 < found["answered@0.8"][0] == cells.mean() < 0.9
    assert found["accuracy@0.8"][0] == asked.hit[cells].mean() == pytest.approx(0.8, abs=0.05)
    assert found["accuracy@0.8"][3] == cells.sum()
    assert found["coverage_area"][0] > found["accuracy"][0]
    table = conf.reliability(calibration, asked, **OPTIONS)
    assert table.groupby("stage")["n"].sum().to_dict() == {"calibrated": 5000, "uncalibrated": 5000}
    part = table[table["stage"] == "calibrated"]
    assert (part["ci_low"] <= part["accuracy"]).all() and (part["accuracy"] <= part["ci_high"]).all()
    ece = (part["n"] * (part["probability"] - part["accuracy"]).abs()).sum() / part["n"].sum()
    assert ece == pytest.approx(found["ece"][0])


def test_a_condition_that_is_no_candidate_is_never_right_and_in_no_set():
    rng = np.random.default_rng(5)
    answers = drawn(600, rng)
    foreign = replace(answers, conditions=np.where(np.arange(600) % 6 == 0, "other", answers.conditions))
    calibration = calibrate(foreign)
    assert calibration.quantiles["lac"] == np.inf  # a sixth of the cells is in no set, whatever it admits
    found = of(conf.on_queries(calibration, foreign, **OPTIONS))
    assert found["conformal_lac_coverage"][0] == pytest.approx(5 / 6)
    with pytest.raises(ValueError, match="expected a cell whose condition is among the candidates"):
        calibrate(replace(answers, conditions=np.full(600, "other")))
    with pytest.raises(ValueError, match="coverage: expected a share between 0 and 1, got 90"):
        calibrate(answers, coverage=90)


def test_classes_of_probability_zero_leave_finite_losses():
    rng = np.random.default_rng(6)
    answers = drawn(400, rng)
    scores = log_softmax(answers.scores, axis=1)
    scores[np.arange(400) % 3 == 0, 0] = -np.inf
    answers = replace(answers, scores=scores)
    calibration = calibrate(answers)
    found = of(conf.on_queries(calibration, answers, **OPTIONS))
    assert 0.5 < calibration.temperature < 2 and np.isfinite(found["log_loss"][0])


def unknown(strength, rng, *, n_train=8, n_held=4, cells=30):
    """Scores of cells of held-out conditions, raised by `strength` at their own."""
    names = np.array([f"T{i}" for i in range(n_train)] + [f"U{i}" for i in range(n_held)])
    conditions = np.repeat(names[n_train:], cells)
    scores = rng.standard_normal((len(conditions), len(names)))
    scores[names == conditions[:, None]] += strength
    return Answers(scores, names, conditions), names[:n_train]


def test_an_answer_from_a_library_without_the_condition_is_told_where_there_is_something_to_tell():
    rng = np.random.default_rng(7)
    held = []
    for seed in range(60):
        answers, trained = unknown(0.0, rng)
        rows = of(conf.tell_unknown(calibrate(answers), answers, trained, n_resamples=100, seed=seed))
        held.append([low <= 0.5 <= high for _, low, high, _ in rows.values()])
    assert np.mean(held) > 0.9
    answers, trained = unknown(9.0, rng)
    rows = of(conf.tell_unknown(calibrate(answers), answers, trained, n_resamples=100, seed=0))
    assert rows["unknown_auroc_score"][0] > 0.99 and rows["unknown_auroc_margin"][0] > 0.9
    assert rows["unknown_auroc_score"][3] == 120
    assert conf.tell_unknown(calibrate(answers), answers, answers.candidates, n_resamples=100, seed=0) == []


def test_auroc_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(8)
    one, other = rng.integers(0, 9, 70), rng.integers(0, 7, 40)
    assert conf.auroc(one, other) == pytest.approx(mannwhitneyu(one, other).statistic / (70 * 40))


@pytest.mark.parametrize("name", [*TRACKS])
def test_what_is_chosen_does_not_depend_on_query_cells(wide, name):
    split = make_split(wide.obs, track=name, seed=0)
    changed = toy.with_other_queries(wide, split)
    found = []
    for screen in (wide, changed):
        prepared = prepare(screen, split, mask="all_targets")
        encoder = fit_baseline("pca", prepared, seed=0).encoder
        found.append(judge_confidence(encoder, prepared, library="mean", scoring="whitened", n_resamples=50))
    one, other = found
    assert one.calibration == other.calibration
    assert one.calibration.n_cells == len(prepared.where("val"))
    assert not np.array_equal(one.probability, other.probability)
    assert not one.table.equals(other.table)
    quantities = set(one.table["quantity"])
    held_out = TRACKS[name].candidates[0] == "observed"
    assert ("unknown_auroc_probability" in quantities) == held_out
    if held_out:
        row = one.table.set_index("quantity").loc["unknown_auroc_score"]
        assert row["estimate"] > 0.5 and row["ci_low"] < row["estimate"] < row["ci_high"]
    shares = one.table[one.table["quantity"].str.contains("coverage|accuracy|answered|ece|auroc")]
    assert shares[["ci_low", "ci_high"]].stack().between(0, 1).all()


def test_without_a_validation_cell_that_can_be_right_nothing_is_calibrated():
    roles = np.repeat(["train", "query", "val"], 10)
    labels = np.r_[np.tile(["A", "B"], 10), np.repeat("C", 10)]
    x = np.random.default_rng(0).standard_normal((30, 4))
    prepared = toy.toy_cells(labels, roles, obsm={"x": x})
    encoder = toy.ToyEncoder(prepared, toy.from_obsm())
    found = judge_confidence(encoder, prepared, library="mean", scoring="cosine", n_resamples=10)
    assert found.calibration is None and not len(found.table) and not len(found.reliability)
    assert found.probability.shape == (10,) and np.isnan(found.probability).all()


def test_one_condition_has_numbers_without_intervals():
    answers = replace(drawn(100, np.random.default_rng(0)), conditions=np.repeat(NAMES[:1], 100))
    rows = pd.DataFrame(conf.on_queries(calibrate(answers), answers, **OPTIONS)).set_index(0)
    assert rows[1].notna().all() and rows.drop("ece_if_calibrated")[[2, 3]].isna().all(axis=None)
