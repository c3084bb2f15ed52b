"""Figures draw what the tables say."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbret.report import figures


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def methods(**columns):
    table = pd.DataFrame(
        {
            "encoder": ["pca", "logreg", "bayes_ceiling"],
            "mask": "all_targets",
            "estimate": [0.15, 0.18, 0.4],
            "ci_low": [0.1, 0.12, 0.3],
            "ci_high": [0.2, 0.25, 0.5],
        }
    )
    return table.assign(**columns)


def labels(axis):
    return [text.get_text() for text in axis.get_yticklabels()]


def test_ladder_has_the_best_on_top_and_draws_its_interval():
    roles = {"pca": "nuisance", "logreg": "simple", "bayes_ceiling": "ceiling"}
    axis = figures.method_ladder(methods(), roles, chance=0.03, prior=0.05).axes[0]
    assert labels(axis) == ["pca", "logreg", "Bayes ceiling"]
    assert [line.get_mfc() for line in axis.lines if line.get_marker() == "o"] == ["white", "#1b6ca8"]
    bars = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2]
    assert [0.12, 0.25] in bars
    assert {text.get_text() for text in axis.texts} == {"chance", "class prior", "Bayes ceiling"}


def test_masking_figure_puts_the_luck_level_beside_the_null_control():
    table = pd.concat([methods(), methods(mask="own_targets", estimate=[0.3, 0.4, 0.5])])
    verdicts = table.assign(luck=0.04)
    figure = figures.masking_effect(table, verdicts)
    ticks = [line.get_xdata() for line in figure.axes[1].lines if line.get_marker() == "|"]
    assert len(ticks) == 2 and np.allclose(np.concatenate(ticks), 0.04)


def test_top_k_curves_pass_through_the_estimates():
    rows = [
        {"encoder": "pca", "metric": f"{kind}@{k}", "estimate": k / 20}
        for kind in ("exact_hit", "relevant_hit")
        for k in (1, 5, 10)
    ]
    chance = {f"{kind}@{k}": 0.01 * k for kind in ("exact_hit", "relevant_hit") for k in (1, 5, 10)}
    axis = figures.top_k_curves(pd.DataFrame(rows), chance).axes[0]
    assert list(axis.lines[0].get_ydata()) == [0.05, 0.25, 0.5]
    assert list(axis.lines[1].get_ydata()) == pytest.approx([0.01, 0.05, 0.1])


def test_query_size_curves_start_at_single_cells_in_every_panel():
    rows = [("single", 1, 0.2), ("scores", 5, 0.4), ("embeddings", 5, 0.3)]
    table = pd.DataFrame(rows, columns=["pooling", "query_size", "estimate"])
    table = table.assign(encoder="pca", ci_low=table["estimate"] - 0.1, ci_high=table["estimate"] + 0.1)
    figure = figures.query_size_curves(table, 0.03)
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["pooled scores", "pooled embeddings"]
    assert [list(axis.lines[0].get_ydata()) for axis in figure.axes] == [[0.2, 0.4], [0.2, 0.3]]


def test_reliability_diagram_draws_both_stages_and_the_line_of_kept_words():
    rows = [
        ("uncalibrated", 0.7, 0.2),
        ("uncalibrated", 0.9, 0.4),
        ("calibrated", 0.2, 0.2),
        ("calibrated", 0.4, 0.4),
    ]
    table = pd.DataFrame(rows, columns=["stage", "probability", "accuracy"])
    table = table.assign(ci_low=table["accuracy"] - 0.1, ci_high=table["accuracy"] + 0.1, n=50)
    (axis,) = figures.reliability_diagram(table).axes
    assert [line.get_label() for line in axis.lines] == ["perfectly calibrated", "uncalibrated", "calibrated"]
    assert list(axis.lines[1].get_xdata()) == [0.7, 0.9] and axis.get_xlim() == axis.get_ylim()
    (bars,) = axis.collections
    assert np.allclose([bar[:, 1] for bar in bars.get_segments()], [[0.1, 0.3], [0.3, 0.5]])
    assert len(figures.reliability_diagram(table.iloc[:0]).axes[0].lines) == 1


def test_names_with_dollars_are_no_mathematics():
    table = pd.DataFrame(
        {"condition": ["A$B^{$", "C$_$"], "estimate": [0.1, 0.2], "ci_low": 0.0, "ci_high": 1.0}
    )
    figure = figures.condition_hits(table, 0.02, "title of $A^{$")
    figure.canvas.draw()
    figures.confusion_heatmap(pd.DataFrame([[1.0]], index=["A$^{$"], columns=["A$^{$"]), "t").canvas.draw()


def test_only_the_extreme_conditions_of_many_are_drawn():
    table = pd.DataFrame({"condition": [f"G{i:02d}" for i in range(60)], "estimate": np.linspace(0, 1, 60)})
    axis = figures.condition_hits(table.assign(ci_low=0.0, ci_high=1.0), 0.02, "title").axes[0]
    assert len(labels(axis)) == 40 and labels(axis)[0] == "G00" and labels(axis)[-1] == "G59"


def test_paired_differences_name_the_opponent_and_keep_their_ticks_apart():
    methods = [f"method_{i}_with_a_long_name" for i in range(8)]
    rows = [(method, "mlp", "baseline") for method in methods] + [(methods[0], "c", "adapting")]
    rows += [(methods[0], "c", "pretraining")]
    table = pd.DataFrame(rows, columns=["encoder", "against", "question"])
    table["difference"] = [-0.0875, *np.linspace(-0.08, -0.0155, 7), 0.04, 0.02]
    table["low"], table["high"] = table["difference"] - 0.045, table["difference"] + 0.04
    table["verdict"] = ["worse", *["no clear difference"] * 8, "better"]
    figure = figures.paired_differences(table)
    figure.canvas.draw()
    left, middle, _ = figure.axes
    titles = [axis.get_title(loc="left") for axis in (left, middle)]
    assert titles == ["against the best\nsimple opponent (mlp)", "adapted\nagainst frozen"]
    assert labels(left) == methods  # the best on top
    assert [line.get_mfc() != "white" for line in left.lines if line.get_marker() == "o"] == [
        True,
        *[False] * 7,
    ]
    for axis in figure.axes:
        boxes = [tick.get_window_extent() for tick in axis.get_xticklabels() if tick.get_text()]
        assert all(one.x1 < other.x0 for one, other in zip(boxes[:-1], boxes[1:], strict=True))
