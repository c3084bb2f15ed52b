"""Verdicts of paired differences: what they take, what they are kept from, and what is compared with what."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbret.evaluation.stats import holm, repeated_difference
from perturbret.report import ablation, sentences
from perturbret.report.compare import contrasts, first_of, role_of, verdict

BOTH = {("classifier", "none"), ("whitened", "mean")}


def method(encoder, role, validation, **changes):
    row = {"encoder": encoder, "mask": "all_targets", "role": role, "best": validation}
    row |= {"scoring": "classifier", "library": "none", "available": BOTH, "request": {}}
    return row | {"mode": "", "init": "", "members": ""} | changes


def hits(
    encoder, rates, *, mask="all_targets", seeds=(0, 1, 2), readouts=(("classifier", "none"),), noise=0.0
):
    """Per-query scores: 20 cells of each condition, every read-out with the same hits but for a shift by its place."""
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for place, (scoring, library) in enumerate(readouts):
            for i, rate in enumerate(rates):
                share = np.clip(rate + 0.1 * place + noise * (seed - 1) + 0.02 * rng.standard_normal(), 0, 1)
                for cell in range(20):
                    hit = float(cell < round(20 * share))
                    rows.append(
                        (
                            encoder,
                            mask,
                            seed,
                            scoring,
                            library,
                            1,
                            f"q{i:02d}-{cell:02d}",
                            f"G{i:02d}",
                            hit,
                            hit,
                        )
                    )
    columns = "encoder mask seed scoring library query_size query_id condition exact_hit@1 mrr".split()
    return pd.DataFrame(rows, columns=columns)


RATES = np.linspace(0.2, 0.6, 12)


def test_a_verdict_takes_p_interval_and_three_repeats():
    assert verdict(3, 0.01, 0.02, 0.05) == "better" and verdict(3, 0.01, -0.05, -0.02) == "worse"
    assert verdict(3, 0.06, 0.02, 0.05) == "no clear difference"
    assert verdict(3, 0.01, -0.01, 0.05) == "no clear difference"
    assert verdict(3, 0.01, np.nan, np.nan) == "no clear difference"
    assert verdict(2, 0.001, 0.02, 0.05) == "not judged: 2 repeats"
    assert verdict(1, np.nan, 0.02, 0.05) == "not judged: 1 repeat"


def test_only_what_reads_expression_under_the_mask_can_be_first():
    assert [role_of(name, "all_targets") for name in ("batch", "library_size", "prior", "lda")] == [
        *["nuisance"] * 3, "simple"
    ]  # fmt: skip
    assert (role_of("obsm:X", "all_targets"), role_of("obsm:X", "none")) == ("precomputed", "simple")
    roles = {"batch": "nuisance", "scgpt_head": "tuned", "lda": "simple", "bayes_ceiling": "ceiling"}
    readouts = pd.DataFrame(
        [method(name, role, hit) for (name, role), hit in zip(roles.items(), (0.9, 0.5, 0.4, 1), strict=True)]
    )
    assert first_of(readouts, "all_targets", "simple", "tuned") == "scgpt_head"
    assert first_of(readouts, "all_targets", "simple") == "lda"
    assert first_of(readouts, "none", "simple") is None


def test_the_baseline_contrast_is_the_paired_difference_of_the_repeats():
    readouts = pd.DataFrame([method("a", "simple", 0.3), method("b", "simple", 0.4)])
    scores = pd.concat([hits("a", RATES - 0.15), hits("b", RATES)])
    (row,) = contrasts(scores, readouts).itertuples()
    assert (row.question, row.encoder, row.against, row.verdict) == ("baseline", "a", "b", "worse")
    wide = [
        part.sort_values(["query_id", "seed"])["exact_hit@1"].to_numpy().reshape(-1, 3)
        for _, part in scores.groupby("encoder")
    ]
    clusters = np.repeat([f"G{i:02d}" for i in range(12)], 20)
    found = repeated_difference(*wide, clusters, seed=0)
    assert row.difference == pytest.approx(found.estimate) and row.spread == pytest.approx(found.spread)
    assert (row.low, row.high) == pytest.approx((found.low, found.high))
    assert row.other - row.estimate == pytest.approx(-row.difference)


def test_repeats_that_disagree_take_the_verdict_away():
    readouts = pd.DataFrame([method("a", "simple", 0.3), method("b", "simple", 0.4)])
    steady, shaky = (
        contrasts(pd.concat([hits("a", RATES - 0.15, noise=noise), hits("b", RATES)]), readouts).iloc[0]
        for noise in (0.0, 0.12)
    )
    assert steady.verdict == "worse" and shaky.verdict == "no clear difference"
    assert shaky.p_holm < 0.05, "the test alone would have judged"


def test_two_repeats_are_not_judged_and_stay_out_of_the_family():
    readouts = pd.DataFrame(
        [method(name, "simple", value) for name, value in (("a", 0.3), ("b", 0.4), ("c", 0.2))]
    )
    scores = pd.concat([hits("a", RATES - 0.15), hits("b", RATES), hits("c", RATES - 0.15, seeds=(0, 1))])
    table = contrasts(scores, readouts).set_index("encoder")
    assert table.loc["c", "verdict"] == "not judged: 2 repeats" and np.isnan(table.loc["c", "p_holm"])
    assert table.loc["a", "p_holm"] == table.loc["a", "p_value"]


def test_all_questions_about_methods_are_one_family():
    tuned = {"init": "pretrained", "members": 1}
    readouts = pd.DataFrame(
        [
            method("b", "simple", 0.4),
            method("frozen", "tuned", 0.1, mode="frozen", **tuned),
            method("head", "tuned", 0.2, mode="head", **tuned),
            method("head_random", "tuned", 0.2, mode="head", init="random", members=1),
        ]
    )
    scores = pd.concat(
        [hits(name, RATES - 0.1) for name in ("frozen", "head", "head_random")] + [hits("b", RATES)]
    )
    table = contrasts(scores, readouts)
    asked = {(row.question, row.encoder, row.against) for row in table.itertuples()}
    assert asked == {
        ("baseline", "frozen", "b"), ("baseline", "head", "b"), ("baseline", "head_random", "b"),
        ("adapting", "head", "frozen"), ("pretraining", "head", "head_random"),
    }  # fmt: skip
    np.testing.assert_allclose(table["p_holm"], holm(table["p_value"]))


def test_both_sides_stand_at_the_same_readout_whatever_was_chosen_for_them():
    readouts = pd.DataFrame(
        [
            method("b", "simple", 0.4),
            method(
                "headless",
                "simple",
                0.3,
                available={("whitened", "mean")},
                scoring="whitened",
                library="mean",
            ),
        ]
    )
    sides = (("classifier", "none"), ("whitened", "mean"))
    scores = pd.concat([hits("b", RATES, readouts=sides), hits("headless", RATES, readouts=sides[1:])])
    (row,) = contrasts(scores, readouts).itertuples()
    assert (row.scoring, row.library) == ("whitened", "mean")
    assert row.other == pytest.approx(
        scores.query("encoder == 'b' and scoring == 'whitened'")["exact_hit@1"].mean()
    )


def test_nuisance_is_no_baseline_and_what_exceeds_it_gets_an_interval_and_no_verdict():
    readouts = pd.DataFrame(
        [method("batch", "nuisance", 0.9), method("prior", "nuisance", 0.1), method("a", "simple", 0.3)]
    )
    whitened = {"scoring": "whitened", "library": "mean"}
    readouts.loc[0, list(whitened)] = list(whitened.values())  # each side at its own
    batch = hits("batch", RATES + 0.3, readouts=(("classifier", "none"), ("whitened", "mean")))
    scores = pd.concat([batch, hits("prior", RATES * 0), hits("a", RATES)])
    table = contrasts(scores, readouts)
    assert set(table["question"]) == {"nuisance"} and set(table["against"]) == {"batch"}
    row = table.set_index("encoder").loc["a"]
    at_best = batch.query("scoring == 'whitened'")["exact_hit@1"].mean()
    assert row.other == pytest.approx(at_best) and row.low < row.difference < row.high
    assert row.verdict == "" and np.isnan(row.p_holm)


def test_masks_are_a_family_of_their_own_at_one_readout():
    readouts = pd.DataFrame(
        [
            method("a", "simple", 0.4),
            method("a", "simple", 0.5, mask="own_targets", scoring="whitened", library="mean"),
        ]
    )
    both = (("classifier", "none"), ("whitened", "mean"))
    scores = pd.concat(
        [hits("a", RATES, readouts=both), hits("a", RATES + 0.2, mask="own_targets", readouts=both)]
    )
    (row,) = contrasts(scores, readouts).itertuples()
    assert (row.question, row.mask, row.against) == ("mask", "own_targets", "all_targets")
    assert row.scoring == "classifier" and row.verdict == "better" and row.p_holm == row.p_value


def test_the_opponent_of_an_adapted_mode_is_the_one_asked_for_most_alike():
    tuned = {"role": "tuned", "validation": 0.1, "init": "pretrained", "members": 1}
    readouts = pd.DataFrame(
        [
            method("a_frozen", mode="frozen", request={"pooling": "cls"}, **tuned),
            method("b_frozen", mode="frozen", request={"pooling": "mean"}, **tuned),
            method("head", mode="head", request={"pooling": "mean"}, **tuned),
        ]
    )
    scores = pd.concat([hits(name, RATES) for name in readouts["encoder"]])
    table = contrasts(scores, readouts)
    assert table.query("question == 'adapting'")["against"].tolist() == ["b_frozen"]


def test_where_nothing_may_be_concluded_nothing_is():
    readouts = pd.DataFrame([method("a", "simple", 0.3), method("b", "simple", 0.4)])
    scores = pd.concat([hits("a", RATES - 0.15), hits("b", RATES)])
    table = contrasts(scores, readouts, no_verdict="not judged: suspect")
    assert set(table["verdict"]) == {"not judged: suspect"}


def test_other_query_cells_are_refused():
    readouts = pd.DataFrame([method("a", "simple", 0.3), method("b", "simple", 0.4)])
    other = hits("b", RATES).assign(query_id=lambda table: "x" + table["query_id"])
    with pytest.raises(ValueError, match="a and b: expected the same query cells"):
        contrasts(pd.concat([hits("a", RATES), other]), readouts)
    moved = hits("a", RATES)
    moved.loc[moved["seed"] == 2, "query_id"] = "x" + moved["query_id"]
    with pytest.raises(ValueError, match="expected the same query cells in seeds 0, 1, 2"):
        contrasts(pd.concat([moved, hits("b", RATES)]), readouts)


@pytest.mark.parametrize(
    ("difference", "low", "high", "verdict", "told"),
    [
        (0.06, 0.03, 0.09, "better", ["scgpt_full", "+6.0%", "at least 2.0% for sure"]),
        (0.03, 0.01, 0.05, "better", ["logreg", "up to +5.0% is left open for scgpt_full"]),
        (-0.01, -0.03, 0.01, "no clear difference", ["logreg", "gains of 2.0% or more are excluded"]),
    ],
)
def test_the_method_to_use_takes_a_material_difference(difference, low, high, verdict, told):
    readouts = pd.DataFrame(
        [
            method("logreg", "simple", 0.2),
            method("scgpt_full", "tuned", 0.3),
            method("scgpt_head", "tuned", 0.1),
        ]
    )
    rows = [("scgpt_full", difference, low, high, verdict), ("scgpt_head", -0.1, -0.2, 0.0, "worse")]
    contrasts = pd.DataFrame(rows, columns=["encoder", "difference", "low", "high", "verdict"])
    contrasts = contrasts.assign(question="baseline", mask="all_targets")

    def part(track, candidates, **changes):
        empty = pd.DataFrame()
        return ablation.Report(
            Path(),
            track,
            1.0,
            candidates,
            readouts,
            empty,
            empty,
            empty,
            contrasts,
            empty,
            {},
            0.1,
            **changes,
        )

    (line,) = sentences.decision(part("in_dist", "train"), 0.02)
    assert all(text in line for text in told) and line.startswith(
        f"**Which method to use (`in_dist, train`): {told[0]}**"
    )
    further = part("in_dist", "train", others=[part("unseen_gene", "observed")])
    assert sentences.decision(further, 0.02)[1].startswith(
        f"**Where more is held out:** `unseen_gene, observed`: {told[0]}"
    )
    assert sentences.decision(part("in_dist", "train", confounded=True), 0.02) == []


def compared(one, other):
    """A report of two methods with these (condition, ranked first) for each query cell."""
    rows = []
    for name, answers in (("new", one), ("old", other)):
        for number, (condition, first) in enumerate(answers):
            rows.append((name, f"q{number}", condition, f"{first}|x", float(condition == first)))
    scores = pd.DataFrame(rows, columns=["encoder", "query_id", "condition", "top10", "exact_hit@1"])
    scores = scores.assign(mask="all_targets", query_size=1, scoring="classifier", library="none", seed=0)
    readouts = pd.DataFrame([method("old", "simple", 0.2), method("new", "tuned", 0.3)])
    empty = pd.DataFrame()
    return ablation.Report(
        Path(), "in_dist", 1.0, "train", readouts, scores, empty, empty, empty, empty, {}, 0.1
    )


def test_gains_and_confusions_of_two_methods_by_hand():
    truth = ["A", "A", "A+B", "A+B", "C"]
    report = compared(
        list(zip(truth, ["A", "A", "A+B", "C", "C"], strict=True)),
        list(zip(truth, ["A", "A+B", "C", "C", "C"], strict=True)),
    )
    found = ablation.gains(report, "new", "old").set_index("condition")
    assert found["gain"].to_dict() == {"A": 0.5, "A+B": 0.5, "C": 0.0} and found.loc["A+B", "n_cells"] == 2
    assert found.loc["A", "ci_low"] < 0 < found.loc["A", "ci_high"]
    table = ablation.changed_confusions(report, "new", "old")
    assert table.to_numpy().tolist() == [
        ["A", "A+B", "shares a target", 0.5, 0.0, -0.5],
        ["A+B", "C", "", 1.0, 0.5, -0.5],
    ]


def test_methods_without_a_readout_in_common_are_not_compared():
    report = compared([("A", "A")], [("A", "A")])
    report.readouts["available"] = [{("classifier", "none")}, {("whitened", "mean")}]
    assert (
        ablation.gains(report, "new", "old").empty and ablation.changed_confusions(report, "new", "old").empty
    )
