"""Scripts of docs/experiments at toy size: what they measure is measured on the right cells."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import toy

from perturbret.data.splits import make_split
from perturbret.scgpt.checkpoint import load_checkpoint
from perturbret.scgpt.pretraining import Plan

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alignment():
    return load("alignment")


@pytest.fixture
def pretraining(tiny_checkpoint, tmp_path, monkeypatch):
    """The script on a tiny screen, its networks tiny ones."""
    module = load("pretraining")
    tiny = {"checkpoint": str(tiny_checkpoint), "epochs": 1, "rank": 2, "head_dim": 8}
    starts = {
        "random": {"init": "random"},
        "shipped": {},
        "shipped + mlm": {"adapt": "mlm", "adapt_steps": 2},
    }
    monkeypatch.setattr(module, "STARTS", {name: tiny | start for name, start in starts.items()})
    monkeypatch.setattr(module, "load", lambda dataset: toy.tiny_screen())
    monkeypatch.setenv("PERTURBRET_OUTPUTS", str(tmp_path))
    return module


@pytest.fixture(scope="module")
def design(alignment):
    plan = Plan(
        d_model=8, n_heads=2, d_hid=8, n_layers=1, steps=4, batch_cells=16, max_length=20, check_every=4
    )
    return alignment.Design(n_conditions=4, n_train=4, n_val=4, n_query=6, n_reference=80, plan=plan)


def test_reference_and_screen_share_programs_and_nothing_else(alignment, design):
    """Genes that go together in the reference, found by name, are those that conditions move together."""
    large = dataclasses.replace(design, n_reference=2000, n_conditions=30, effect=1.0)
    prepared, reference, _ = alignment.draw(large, 0)
    ((counts, totals),) = reference.chunks()
    names, genes = list(reference.genes), prepared.cells.genes
    assert sorted(names) == sorted(genes) and (reference.genes != genes).mean() > 0.8
    values = np.log1p(counts.toarray() / totals[:, None] * 1e4)
    theirs = np.corrcoef(values[:, [names.index(gene) for gene in genes]].T)
    ours = np.corrcoef(prepared.truth.log_fold_changes[:, 0].T)
    upper = np.triu_indices(len(genes), 1)
    by_column = np.corrcoef(values.T)[upper]
    assert np.corrcoef(theirs[upper], ours[upper])[0, 1] > 0.6
    assert abs(np.corrcoef(by_column, ours[upper])[0, 1]) < 0.2
    found = dict(zip(*np.unique(prepared.roles, return_counts=True), strict=True))
    assert found == {"train": 120, "val": 120, "query": 180}


def test_arms_differ_in_whose_row_a_gene_reads_alone(alignment, design, tmp_path):
    prepared, reference, space = alignment.draw(design, 1)
    alignment.write_checkpoints(design, 1, prepared.cells.genes, reference, space, tmp_path)
    right, wrong = (
        load_checkpoint(tmp_path / arm, report=lambda text: None) for arm in ("aligned", "shuffled")
    )
    for name, tensor in right.network.state_dict().items():
        assert (tensor == wrong.network.state_dict()[name]).all()
    assert sorted(space.names) == sorted(prepared.cells.genes)
    for column, gene in enumerate(prepared.cells.genes):
        assert right.vocabulary.ids[reference.genes[column]] == wrong.vocabulary.ids[gene]


def test_page_and_figure_come_from_the_table(alignment, design, tmp_path, monkeypatch):
    monkeypatch.setattr(alignment, "MODES", {"frozen": ({}, {}), "head": ({"epochs": 1}, {})})
    monkeypatch.setenv("PERTURBRET_OUTPUTS", str(tmp_path))
    table = alignment.measure(design, [0, 1])
    assert set(table["method"]) == set(alignment.methods()) and (table["queries"] == 6).all()
    monkeypatch.setattr(alignment, "measure_seed", lambda *given, **named: pytest.fail("measured again"))
    again = alignment.measure(design, [0, 1])
    pd.testing.assert_frame_equal(again, table)
    monkeypatch.setattr(alignment, "code_hash", lambda *modules: "other code")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        alignment.measure(design, [0])
    expected = table.groupby("method")["hits"].sum() / table.groupby("method")["queries"].sum()
    for method, hit in expected.items():
        mean, low, high = alignment.level(again, method)
        assert low <= mean <= high and mean == pytest.approx(hit)
    assert alignment.chance(again) == 1 / 4
    value, _, _ = alignment.difference(again, "frozen aligned", "frozen random")
    assert value == pytest.approx(expected["frozen aligned"] - expected["frozen random"])
    assert alignment.by_seed(again, "frozen aligned", "frozen random").mean() == pytest.approx(value)
    alignment.plot(again, tmp_path / "alignment.svg")
    text = alignment.page(again, design)
    assert "SIMULATED" in text and "SIMULATED" in (tmp_path / "alignment.svg").read_text()
    assert f"frozen, aligned against random: {value:+.3f}" in text


def test_a_share_of_labels_trains_and_all_query_cells_are_asked(pretraining, tmp_path, monkeypatch):
    """Every method answers the same queries; a share takes training labels away, and nothing else."""
    fitted = []
    fit = pretraining.fit

    def counting(method, prepared, seed, directory):
        fitted.append((method, seed, int((prepared.roles == "train").sum())))
        return fit(method, prepared, seed, directory)

    monkeypatch.setattr(pretraining, "fit", counting)
    methods = ["logreg", "frozen random", "frozen shipped", "head shipped + mlm", "lora_head shipped"]
    table = pretraining.measure_all("tiny", [0, 1], [0.5, 1.0], methods)
    queries = table.groupby(["seed", "share", "method"])["query_id"].agg(lambda found: tuple(sorted(found)))
    assert len(queries) == 2 * 2 * len(methods)
    assert (queries.groupby("seed").nunique() == 1).all()
    screen = toy.tiny_screen()
    for seed in (0, 1):
        roles = make_split(screen.obs, seed=seed).roles
        assert set(queries[seed].iloc[0]) <= set(roles.index[roles == "query"])
    sizes = pd.DataFrame(fitted, columns=["method", "seed", "cells"]).groupby("seed")["cells"]
    assert (sizes.nunique() == 2).all() and (sizes.min() < sizes.max()).all()

    monkeypatch.setattr(pretraining, "fit", lambda *given: pytest.fail("fitted again"))
    again = pretraining.measure_all("tiny", [0, 1], [0.5, 1.0], methods)
    pd.testing.assert_frame_equal(again, table)
    monkeypatch.setattr(pretraining, "code_hash", lambda *modules: "other code")
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        pretraining.measure_all("tiny", [0], [1.0], ["logreg"])


def test_page_of_starts_says_what_its_table_says(pretraining, tmp_path):
    rng = np.random.default_rng(0)
    tables = []
    for seed in (0, 1):
        for share in (0.1, 1.0):
            for method in ("logreg", "pca", "head random", "head shipped"):
                hits = rng.random(60) < (0.9 if method == "head shipped" and share < 1 else 0.1)
                found = {"query_id": np.arange(60), "condition": np.repeat(list("ABCDEF"), 10)}
                found |= {
                    "exact_hit@1": hits,
                    "mrr": hits,
                    "validation": hits.mean(),
                    "readout": "classifier",
                }
                tables.append(pd.DataFrame(found).assign(seed=seed, share=share, method=method))
    table = pd.concat(tables)
    text = pretraining.report(table, "tiny")
    value, low, _ = pretraining.difference(table, "head shipped", "head random", 0.1)
    assert low > 0.6
    assert f"Pretraining, head, 10% of labels: {value:+.3f}" in text and "lora_head" not in text
    assert "10% of labels: the best of these on validation cells, head shipped" in text
    assert "Pretraining, head: clearly more hits at 1 of 2 shares of labels, clearly fewer at 0" in text
    assert "It pays more with 10% of labels than with 100%, head: difference of the differences +0." in text
    assert "clearly better at 1 of 2 shares and clearly worse at 0" in text
    assert "--dataset tiny --seeds 0 1 --shares 0.1 1.0 --modes head --starts 'random' 'shipped'`" in text
    pretraining.draw(table, tmp_path / "curves.svg")
    assert "head" in (tmp_path / "curves.svg").read_text()
