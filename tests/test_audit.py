"""The audit's tables and sentences say what the screen holds."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from perturbret.data.conditions import CTRL
from perturbret.data.screen import Screen
from perturbret.data.simulate import simulate_screen
from perturbret.report import audit

GENES = np.array(["KLF1", "GATA1", "ACTB"])


def make_screen(batches=None):
    """Four cells each of KLF1, KLF1+MYC and controls; KLF1 is measured, MYC is not."""
    labels = ["KLF1"] * 4 + ["KLF1+MYC"] * 4 + [CTRL] * 4
    counts = np.array([[8, 1, 0]] * 4 + [[4, 1, 2]] * 4 + [[2, 0, 1]] * 4, np.float32)
    obs = pd.DataFrame({"condition": labels, "total": counts.sum(1)}, index=[f"c{i}" for i in range(12)])
    if batches is not None:
        obs["batch"] = batches
    return Screen("toy", csr_matrix(counts), GENES, obs)


def test_overview_counts_by_hand():
    table = audit.overview(make_screen())["value"]
    assert table["cells"] == "12" and table["control cells"] == "4"
    assert table["conditions, controls left out"] == "2"
    assert table["values are whole numbers of at least 0"] == "yes"
    assert table["largest count"] == "8"
    assert table["share of nonzero counts that are 1"] == "42.9%"  # 12 of 28
    assert table["share of zeros"] == "22.2%"  # 8 of 36


def test_targets_measured_and_their_umis():
    table = audit.target_table(make_screen()).set_index("condition")
    assert table.loc["KLF1", "measured"] == "KLF1" and table.loc["KLF1", "not_measured"] == ""
    assert table.loc["KLF1+MYC", "measured"] == "KLF1" and table.loc["KLF1+MYC", "not_measured"] == "MYC"
    assert table.loc["KLF1", ["umis_own_cells", "umis_controls"]].tolist() == [8.0, 2.0]
    assert table.loc["KLF1+MYC", "umis_own_cells"] == 4.0


def test_a_batch_that_is_the_condition_is_warned_about():
    confounded = make_screen(["a"] * 4 + ["b"] * 4 + ["a"] * 4)
    assert "**Warning:**" in audit.findings(confounded) and "right for 100.0%" in audit.findings(confounded)
    balanced = make_screen(["a", "a", "b", "b"] * 3)
    assert "**Warning:**" not in audit.findings(balanced)
    assert "names no batch column" in audit.findings(make_screen())


def test_batch_table_rows_sum_to_one():
    table = audit.batch_table(make_screen(["a", "b", "b", "b"] * 3))
    assert table.loc["KLF1"].tolist() == [0.25, 0.75]
    assert audit.batch_table(make_screen()) is None


def test_findings_name_prior_chance_and_measured_targets():
    text = audit.findings(make_screen())
    assert "right for 50.0%, chance is 50.0%" in text
    assert "2 of 2 conditions have a measured target" in text


def test_merged_labels_are_shown():
    screen = make_screen()
    merged = [{"raw": "ctrl+KLF1", "condition": "KLF1"}]
    notes = {
        "merged_labels": merged,
        "n_classes_without_merging": 5,
        "empty_cells": 0,
        "dropped_conditions": {},
    }
    notes["counts"] = {"recovered": True, "residual": 1e-8}
    noted = Screen(screen.name, screen.counts, screen.genes, screen.obs, audit=notes)
    assert list(audit.label_tables(noted)) == ["merged labels"]
    assert "5 classes instead of 3" in audit.findings(noted)
    shown = audit.loading_notes(noted)["value"].to_dict()
    assert shown["empty cells"] == "0" and shown["dropped conditions"] == "none"
    assert shown["counts: recovered"] == "True" and shown["counts: residual"] == "1e-08"


@pytest.mark.parametrize("null", [False, True])
def test_a_simulated_screen_can_be_audited(null):
    screen = simulate_screen(n_singles=4, n_doubles=1, cells_per_condition=20, n_genes=40, null=null, seed=0)
    assert len(audit.target_table(screen)) == 5 and audit.findings(screen).count("\n") >= 2
