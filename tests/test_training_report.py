"""What is shown of a training: the epoch that was kept, curves, and a proof that can be read."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from perturbret.networks.training import _better
from perturbret.report.training import best_epoch, gradient_table, proof_table, training_curves


def history(hits, losses, member=0):
    n = len(hits)
    return pd.DataFrame(
        {
            "epoch": np.arange(1, n + 1),
            "loss": np.linspace(2, 1, n),
            "val_loss": losses,
            "val_exact_hit@1": hits,
            "grad_backbone": np.nan,
            "grad_head": 0.5,
            "member": member,
        }
    )


def kept_by_training(table):
    """The epoch whose weights `perturbret.networks.training.train` keeps."""
    rows = table.to_dict("records")
    best = rows[0]
    for row in rows[1:]:
        if _better(row, best):
            best = row
    return best["epoch"]


@pytest.mark.parametrize(
    ("hits", "losses", "kept"),
    [
        ([0.1, 0.4, 0.2], [1.0, 2.0, 0.5], 2),
        ([0.4, 0.4, 0.2], [1.0, 0.9, 0.5], 2),
        ([0.4, 0.4, 0.4], [0.9, 0.9, 1.0], 1),
        # Sums of the same hits in another order.
        ([0.3, 0.1 + 0.2, 0.2], [0.8, 0.9, 0.1], 1),
    ],
)
def test_the_best_epoch_is_the_one_that_training_kept(hits, losses, kept):
    table = history(hits, losses)
    assert best_epoch(table)["epoch"] == kept == kept_by_training(table)
    assert list(best_epoch(table).index) == list(table)


def test_curves_have_a_line_per_member_and_mark_the_kept_epoch():
    table = pd.concat([history([0.1, 0.4, 0.2], [3.0, 2.0, 1.0]), history([0.5, 0.3], [3.0, 2.0], member=1)])
    figure = training_curves(table.reset_index(drop=True), chance=0.2)
    left, middle, right = figure.axes
    assert len(left.lines) == 4 and len(right.lines) == 2  # no gradient in the network: no line
    dots = [line.get_xydata().tolist() for line in middle.lines if line.get_marker() == "o"]
    assert dots == [[[2, 0.4]], [[1, 0.5]]]
    assert [0.2, 0.2] in [list(line.get_ydata()) for line in middle.lines]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["training", "validation"]
    plt.close(figure)


def run_with(**checks):
    return SimpleNamespace(
        manifest={"fit": {"checks": {"network_sha256": "0", "reloaded_equal": True, **checks}}}
    )


MEMBER = {
    "gradient_norms": {
        "network.transformer_encoder.layers.0.linear1.lora_A.default.weight": 0.25,
        "head.classifier.weight": 1e-3,
    },
    "embedding_change": 0.123,
    "merged_difference": 2e-7,
    "frozen_unchanged": 1033,
}


def test_the_proof_has_a_column_per_member_and_a_row_per_check():
    other = {**MEMBER, "merged_difference": None, "gradient_norms": {"head.classifier.weight": 0.0}}
    run = run_with(member0=MEMBER, member1=other)
    table = proof_table(run)
    assert list(table) == ["member0", "member1"]
    assert table["member0"].tolist() == ["2", "2", "1.0e-03", "12.3%", "2e-07", "1,033", "yes"]
    assert table["member1"].tolist() == ["1", "0", "0.0e+00", "12.3%", "no adapters", "1,033", "yes"]
    gradients = gradient_table(run)
    assert gradients.index.tolist() == ["layers.0.linear1.lora_A.weight", "head.classifier.weight"]
    assert gradients["member0"].tolist() == [0.25, 1e-3]


def test_a_mode_that_trains_nothing_has_a_proof_too():
    run = run_with()
    assert proof_table(run).loc["saved and loaded again: equal bit for bit"].tolist() == ["yes"]
    assert len(gradient_table(run)) == 0
