import numpy as np
import pytest
from toy import toy_cells

from perturbret.data.datasets import load_screen
from perturbret.data.prepared import prepare
from perturbret.data.splits import make_split
from perturbret.evaluation.confounders import LIFT, confounding


def cells(n_conditions, n_cells, batch_of, *, depth=lambda labels, rng: np.full(len(labels), 20), seed=0):
    """Counts without effects; each cell's batch is `batch_of(condition number, rng)`, its mean count from `depth`."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.arange(n_cells) % n_conditions)
    labels = np.char.add("G", codes.astype(str))
    roles = rng.choice(["train", "query"], n_cells, p=[0.8, 0.2])
    counts = rng.poisson(depth(codes, rng)[:, None] / 10, (n_cells, 10))
    batch = None if batch_of is None else batch_of(codes, rng)
    return toy_cells(labels, roles, counts=counts, batch=batch)


def test_wells_that_are_conditions_are_confounded_and_nothing_can_be_separated():
    found = confounding(cells(40, 7500, lambda codes, rng: codes), n_permutations=199)
    assert found.confounded and found.by_batch and not found.by_depth
    assert found.condition_from_batch.hit_rate == 1 and found.condition_from_batch.share == 1
    assert found.condition_from_batch.shuffled < 0.04 and found.condition_from_batch.p_value == 1 / 200
    assert (found.n_batches, found.n_shared_batches, found.n_confined, found.n_conditions) == (40, 0, 40, 40)
    banner, batch, _ = found.findings()
    assert banner.startswith("**CONFOUNDED: a cell's batch alone") and "cannot be separated" in banner
    assert "40 of 40 conditions lie in one batch only; 0 of 40 batches" in batch


def test_balanced_batches_are_not_confounded():
    found = confounding(cells(20, 4000, lambda codes, rng: rng.integers(0, 4, len(codes))))
    assert not found.confounded and found.n_shared_batches == 4 and found.n_confined == 0
    assert not any("CONFOUNDED" in line for line in found.findings())
    assert list(found.table()["guess"]) == [
        "condition from batch",
        "batch from condition",
        "condition from depth",
    ]


def test_conditions_halved_between_two_batches_are_confounded_and_judged_within_batch():
    found = confounding(cells(20, 4000, lambda codes, rng: codes % 2))
    assert found.by_batch and found.batch_from_condition.hit_rate == 1
    assert "2 of 2 batches hold two or more conditions: only rankings" in found.findings()[0]


def test_a_true_but_tiny_imbalance_is_not_confounding():
    """Of 20,000 cells a seventh more of a batch's favourites: certain, and worth next to nothing."""

    def favoured(codes, rng):
        return np.where(rng.random(len(codes)) < 0.57, codes % 2, 1 - codes % 2)

    found = confounding(cells(20, 20_000, favoured), n_permutations=199)
    guess = found.condition_from_batch
    assert guess.significant and 1 < guess.hit_rate / guess.chance < LIFT
    assert not found.confounded


def test_depth_that_tells_the_condition_is_confounding():
    found = confounding(cells(5, 3000, None, depth=lambda codes, rng: 40.0 * 2**codes), n_permutations=199)
    assert found.by_depth and found.confounded and found.condition_from_batch is None
    assert "library_size" in found.findings()[0] and "names no batch column" in found.findings()[1]
    weak = confounding(cells(5, 3000, None, depth=lambda codes, rng: 40 + 2.0 * codes), n_permutations=199)
    assert weak.condition_from_depth.significant and not weak.confounded
    assert weak.findings()[-1].startswith("Depth tells something")


def test_always_naming_the_most_common_condition_is_no_confounding():
    """Four fifths are one condition: batches cannot but name it."""

    def common(n, rng):
        return np.where(rng.random(n) < 0.8, 0, rng.integers(1, 10, n))

    rng = np.random.default_rng(0)
    labels = np.char.add("G", common(3000, rng).astype(str))
    prepared = toy_cells(
        labels, ["train"] * 3000, counts=rng.poisson(5, (3000, 3)), batch=rng.integers(0, 500, 3000)
    )
    found = confounding(prepared, n_permutations=99)
    assert found.condition_from_batch.prior == pytest.approx(0.8, abs=0.03) and not found.confounded


def test_p_values_of_unrelated_batches_are_uniform():
    p = [
        confounding(
            cells(5, 300, lambda codes, rng: rng.integers(0, 3, len(codes)), seed=seed), n_permutations=99
        ).condition_from_batch.p_value
        for seed in range(40)
    ]
    assert 0.35 < np.mean(p) < 0.65 and np.mean(np.array(p) <= 0.05) < 0.2


def test_only_training_cells_are_read_and_controls_are_not():
    prepared = cells(4, 800, lambda codes, rng: rng.integers(0, 2, len(codes)))
    before = confounding(prepared, n_permutations=19)
    prepared.cells.batch[prepared.roles == "query"] = "elsewhere"
    assert confounding(prepared, n_permutations=19) == before
    prepared.conditions[prepared.conditions == "G3"] = "ctrl"
    assert confounding(prepared, n_permutations=19).n_conditions == 3


def test_one_batch_or_none_is_said():
    one = confounding(cells(4, 400, lambda codes, rng: np.zeros(len(codes), int)), n_permutations=19)
    assert one.findings()[0] == "All training cells are of one batch." and one.n_confined == 0
    with pytest.raises(ValueError, match="conditions: expected two or more with training cells, got"):
        confounding(cells(1, 40, None))
    with pytest.raises(ValueError, match="n_permutations: expected at least 1, got 0"):
        confounding(cells(4, 400, None), n_permutations=0)


def test_replicates_of_a_real_screen_do_not_confound(real_data):
    screen = load_screen("thp1")
    prepared = prepare(screen, make_split(screen.obs, track="in_dist", seed=0), mask="all_targets")
    found = confounding(prepared, n_permutations=99)
    assert not found.confounded and (found.n_batches, found.n_shared_batches) == (3, 3)
