"""What is shown of a pretraining: cells with known types, scores known by hand, and sentences that say what is so."""

from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbret.report import pretraining as pretraining_report
from perturbret.report.pretraining import (
    NEIGHBOURS,
    _scores,
    conclusion,
    corpus_table,
    curves,
    labelled_cells,
)
from perturbret.scgpt.corpus import Part


def test_labelled_cells_are_counts():
    cells, types = labelled_cells()
    assert cells.counts.shape[0] == len(types) == len(cells.totals) == 700
    assert len(cells.genes) == cells.counts.shape[1] and len(set(types)) == 10
    values = cells.counts.data
    assert (values == np.round(values)).all() and (values >= 1).all()
    sums = np.asarray(cells.counts.sum(axis=1)).ravel()
    assert (sums > 0).all() and (sums <= cells.totals).all()


def test_two_tight_clusters_are_told_apart_and_chance_is_not():
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b"], 2 * NEIGHBOURS)
    centres = np.where(types == "a", 1.0, -1.0)[:, None] * np.array([1.0, 2.0, 3.0])
    tight = (centres + rng.normal(0, 0.01, (len(types), 3))).astype(np.float32)
    found = _scores(tight, types)
    assert found["kNN accuracy"] == 1 and found["silhouette"] > 0.99 and found["dimensions"] == 3
    # The same cells with types that have nothing to do with them.
    mixed = _scores(tight, np.tile(["a", "b"], 2 * NEIGHBOURS))
    assert mixed["kNN accuracy"] < 0.8 and mixed["silhouette"] < 0.1


def test_a_cell_does_not_vote_for_itself(monkeypatch):
    """Pairs of two types: with one neighbour each, every cell is taken for the other's type."""
    monkeypatch.setattr(pretraining_report, "NEIGHBOURS", 1)
    places = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    values = np.concatenate([places, places + 0.01])
    assert _scores(values, np.repeat(["a", "b"], 4))["kNN accuracy"] == 0
    assert _scores(values, np.tile(["a", "b", "c", "d"], 2))["kNN accuracy"] == 1


def made(gene, mean):
    rows = {
        "step": [1, 2],
        "loss": [3.0, 2.0],
        "gene": [9.0, gene],
        "cell": [9.0, 0.39],
        "absent": [1.0, 1.0],
    }
    return SimpleNamespace(history=pd.DataFrame({**rows, "mean": [mean, mean]}))


RUN = SimpleNamespace(directory=Path("outputs/pretrain/tiny-seed0"))


@pytest.mark.parametrize(
    ("gene", "said"),
    [
        (0.15, "**0.150**, 50% less than by the gene's mean (0.300)"),
        (0.36, "**0.360**, 20% more than by the gene's mean (0.300)"),
    ],
)
def test_the_conclusion_says_less_or_more(gene, said):
    text = conclusion(RUN, made(gene, 0.3), pd.DataFrame())
    assert said in text and "Cell types are not compared: tokens stand for fewer than 50 genes" in text
    assert "from the cell's embedding alone with 0.390, 30% more." in text
    assert "`tiny-seed0/checkpoint/`" in text and "not the scGPT whole-human checkpoint" in text


def test_the_conclusion_names_each_embeddings_accuracy():
    table = pd.DataFrame({"kNN accuracy": {"PCA": 0.8, "random": 0.5, "pretrained": 0.7}})
    text = conclusion(RUN, made(0.1, 0.3), table)
    assert "kNN accuracy 0.700 after pretraining, 0.500 before, 0.800 by principal components" in text


def test_curves_and_the_table_of_the_corpus():
    figure = curves(made(0.1, 0.3).history)
    assert [len(axis.lines) for axis in figure.axes] == [1, 4]
    plt.close(figure)
    held_out = np.array([True, False, False])
    part = Part("ref", np.zeros(9), np.zeros(9), np.array([0, 2, 5, 9]), np.arange(7), held_out, "")
    table = corpus_table(SimpleNamespace(corpus=[part]))
    assert table.loc["ref"].tolist() == [3, 1, 7, 3]


def test_too_few_known_genes_give_no_scores(monkeypatch):
    monkeypatch.setattr(pretraining_report, "_views", lambda run, made: ({}, np.array([])))
    assert len(pretraining_report.separation(RUN, None)) == 0
    assert pretraining_report.embedding_map(RUN, None) is None
