"""Screens of effects: read from a file, computed from cells, masked by columns, refused where cells are needed."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_effects import toy_effects, write_effects

from perturbret.data.annotations import ScreenError
from perturbret.data.datasets import load_screen
from perturbret.data.effects import Effects, effects_of, load_effects
from perturbret.data.simulate import simulate_screen
from perturbret.data.sources import EntryError, make_entry


@pytest.fixture
def entry(tmp_path):
    """Maker of an entry for a file of toy effects, which it writes."""

    def make(*, labels=None, column=None, layers=(), values=None, effects=None, **keys):
        effects = toy_effects() if effects is None else effects
        write_effects(
            effects, tmp_path / "toy.h5ad", labels=labels, column=column, layers=layers, values=values
        )
        keys = {"counts_layer": "effects", "unmeasured_targets": "accept", **keys}
        return make_entry({"name": "toy", "path": str(tmp_path / "toy.h5ad"), **keys})

    return make


def test_rows_named_by_their_condition_are_all_that_a_file_needs(entry):
    truth, found = toy_effects(), load_effects(entry())
    assert (
        found.conditions == truth.conditions
        and list(found.genes) == list(truth.genes)
        and found.halves is None
    )
    np.testing.assert_allclose(found.values, truth.values, atol=1e-6)
    assert all((found.target_columns[c] == truth.target_columns[c]).all() for c in truth.conditions)


def test_labels_in_a_column_in_any_order_with_controls_triples_and_other_delimiters(entry):
    truth = toy_effects()
    labels = ["_".join(reversed(c.split("+"))) for c in truth.conditions]
    labels[0], labels[1] = "control", "T00_T01_T02"
    found = load_effects(
        entry(
            labels=labels, column="pert", condition_key="pert", combo_delimiter="_", control_label="control"
        )
    )
    assert found.conditions == truth.conditions[2:]
    assert found.audit["rows_left_out"] == ["T00+T01+T02", "ctrl"]
    np.testing.assert_allclose(found.values, truth.values[2:], atol=1e-6)


def test_halves_and_a_named_layer_are_read(entry):
    truth = toy_effects()
    found = load_effects(entry(layers=("half1", "half2"), counts_layer="effects:half1"))
    np.testing.assert_allclose(found.halves, truth.halves)
    np.testing.assert_allclose(found.values, truth.halves[0])


def test_columns_of_one_symbol_are_averaged(entry):
    truth = toy_effects()
    genes = truth.genes.copy()
    genes[-1] = genes[-2]
    double = Effects("toy", truth.values, truth.conditions, genes, truth.target_columns, truth.halves)
    found = load_effects(entry(effects=double))
    assert found.audit["duplicate_genes"] == {str(genes[-2]): 2}
    np.testing.assert_allclose(found.values[:, -1], truth.values[:, -2:].mean(axis=1), atol=1e-6)


def changed(at, value):
    values = toy_effects().values.copy()
    values[at] = value
    return values


def unmeasured():
    effects = toy_effects()
    genes = np.array([f"X{i:03d}" for i in range(len(effects.genes))])
    return replace(effects, genes=genes, fingerprint="")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": changed((3, 5), np.nan)}, "expected finite effects, 1 values are not .*gene 'T05'"),
        ({"values": np.abs(toy_effects().values)}, "got no value below 0"),
        ({"labels": ["T01+T00", *toy_effects().conditions[1:]]}, "expected one row of effects .*'T00\\+T01'"),
        (
            {"labels": ["ctrl"] * 26, "column": "pert", "condition_key": "pert"},
            "at least two conditions, got none",
        ),
        ({"counts_layer": "effects:shrunk"}, "counts_layer: expected 'shrunk' in the file; it has X"),
        (
            {"effects": unmeasured(), "unmeasured_targets": None},
            "10 of 10 targets have no column of their own",
        ),
    ],
)
def test_what_is_no_table_of_effects_is_refused(entry, options, said):
    with pytest.raises(ScreenError, match=said):
        load_effects(entry(**options))


def test_what_needs_cells_says_what_to_use_instead(entry):
    with pytest.raises(ScreenError, match="holds effects.*no cells.*load_effects.*08_combinations"):
        load_screen(entry())
    with pytest.raises(EntryError, match="no use for batch_key, min_cells"):
        entry(batch_key="batch", min_cells=5)


def test_masks_take_columns_out_of_every_row():
    effects = toy_effects()
    masked = effects.masked("all_targets")
    assert (
        not {f"T{i:02d}" for i in range(10)} & set(masked.genes)
        and masked.values.shape[1] == len(effects.genes) - 10
    )
    assert masked.halves.shape[2] == masked.values.shape[1] and masked.fingerprint != effects.fingerprint
    assert effects.masked("none") is effects
    with pytest.raises(ValueError, match="zeros in a row's own targets would name the row"):
        effects.masked("own_targets")


def test_effects_of_cells_are_differences_of_mean_logs_and_halves_average_to_them():
    screen = simulate_screen(
        n_singles=5, n_doubles=4, cells_per_condition=30, n_genes=40, imbalance=0, seed=1
    )
    effects = effects_of(screen)
    logs = np.log1p(1e4 * screen.counts.toarray() / screen.obs["total"].to_numpy()[:, None])
    means = {c: logs[screen.obs["condition"] == c].mean(axis=0) for c in (*effects.conditions, "ctrl")}
    np.testing.assert_allclose(effects.values, [means[c] - means["ctrl"] for c in effects.conditions])
    np.testing.assert_allclose(effects.halves.mean(axis=0), effects.values, atol=1e-12)
    assert effects.simulated and effects.target_columns.keys() == set(effects.conditions)


def test_the_registered_file_of_norman():
    folder = os.environ.get("PERTURBRET_DATA")
    if not folder or not (Path(folder) / "norman2019_effects_234conditions_2000genes.h5ad").is_file():
        pytest.skip("PERTURBRET_DATA holds no norman2019_effects_234conditions_2000genes.h5ad")
    effects = load_effects("norman_effects")
    assert effects.values.shape == (234, 2000)
    measured = {c for c, columns in effects.target_columns.items() if len(columns) and "+" not in c}
    assert len(measured) >= 55
