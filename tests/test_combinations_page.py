"""Sentences, tables and figures of notebook 08 say what the tables hold."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from toy_effects import toy_effects

from perturbret.combinations.ceiling import detectability, half_against_half
from perturbret.combinations.compare import by_shared_genes, compare, differences, summarise
from perturbret.combinations.composers import LEARNED, OPPONENTS
from perturbret.combinations.task import make_task
from perturbret.report import combinations as page


@pytest.fixture(scope="module")
def results():
    task = make_task(toy_effects())
    table, chosen = compare(task, (OPPONENTS[0], LEARNED), seeds=(0,))
    return task, table, chosen, summarise(task, table), differences(task, table)


def test_the_answer_and_the_table_hold_the_numbers(results):
    task, table, chosen, summary, gains = results
    text = page.answer(task, summary, gains, LEARNED.name)
    assert "16 measured doubles of toy" in text and "all 45 pairs of its 10 singles" in text
    rows = page.method_table(summary, gains, "pairs").set_index("method")
    estimate = summary.query("candidates == 'pairs' and metric == 'exact_hit@1'").set_index("method")[
        "estimate"
    ]
    assert rows.loc["additive", "exact_hit@1"].startswith(f"{estimate['additive']:.3f} [")
    assert rows.index[-1] == "chance"


def test_the_setting_most_chosen_is_named(results):
    chosen = results[2].copy()
    chosen.loc[chosen["setting"] == "ridge 1.0, doubles 1.0", "doubles"] = 0
    chosen.loc[len(chosen)] = (LEARNED.name, "ridge 0.1, doubles 3.0", 1000)
    assert (
        LEARNED.settings[page.most_chosen(chosen.drop_duplicates("setting", keep="last"), LEARNED)]["ridge"]
        == 0.1
    )


def test_figures_have_ticks_that_are_numbers(results):
    task, table, _, summary, _ = results
    judged = table[(table["method"] == LEARNED.name) & (table["candidates"] == "pairs")]
    found = detectability(task, judged)
    for figure in (page.ladder(summary, half_against_half(task)), page.found_and_missed(found, "size")):
        figure.canvas.draw()
        labels = [label.get_text() for axis in figure.axes for label in axis.get_yticklabels(which="both")]
        assert not any("mathdefault" in label for label in labels)
        plt.close(figure)
    assert "no ceiling" not in page.limits(task, found, None)


def test_shared_genes_have_a_row_each(results):
    task = results[0]
    shared = by_shared_genes(task, LEARNED, LEARNED.settings[0])
    rows = page.shared_table(task, shared)
    assert rows["shared"].tolist() == [0, 1, 2] and np.unique(rows["doubles"]).size == 1
