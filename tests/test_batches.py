"""Batches are what the sampler says, the same in every process."""

from collections import Counter

import numpy as np
import pytest

from perturbret.networks.training import plan_batches, share

LABELS = np.repeat(np.arange(6), [40, 20, 12, 9, 5, 2])


def plan(labels=LABELS, sampler="balanced", batch_size=16, cells_per_condition=4, seed=0, epoch=0):
    return plan_batches(
        labels,
        sampler=sampler,
        batch_size=batch_size,
        cells_per_condition=cells_per_condition,
        seed=seed,
        epoch=epoch,
    )


def test_random_has_each_cell_once_and_leaves_the_rest_out():
    batches = plan(sampler="random")
    assert [len(batch) for batch in batches] == [16] * 5
    assert len(set(np.concatenate(batches))) == 80
    assert len(plan(sampler="random", batch_size=500)[0]) == len(LABELS)


@pytest.mark.parametrize("sampler", ["random", "balanced"])
def test_a_plan_depends_on_seed_and_epoch_alone(sampler):
    first = np.stack(plan(sampler=sampler))
    np.testing.assert_array_equal(np.stack(plan(sampler=sampler)), first)
    for other in (plan(sampler=sampler, seed=1), plan(sampler=sampler, epoch=1)):
        assert (np.stack(other) != first).any()


def test_balanced_has_as_many_cells_of_each_of_some_conditions():
    batches = [batch for epoch in range(20) for batch in plan(epoch=epoch)]
    for batch in batches:
        assert sorted(Counter(LABELS[batch]).values()) == [4, 4, 4, 4]
    uses = Counter(label for batch in batches for label in set(LABELS[batch]))
    assert set(uses) == set(range(6))
    assert max(uses.values()) / min(uses.values()) < 1.3  # classes of 40 and of 2 cells alike


def test_balanced_conditions_take_turns():
    labels = np.repeat(np.arange(6), 10)
    seen = Counter(label for batch in plan(labels, batch_size=12) for label in set(labels[batch]))
    # 5 batches of 3 of 6 conditions: each came twice before any came a third time.
    assert min(seen.values()) == 2 and max(seen.values()) == 3


def test_no_cell_is_twice_in_a_batch_unless_its_condition_is_too_small():
    for epoch in range(30):
        for batch in plan(epoch=epoch):
            counts = Counter(batch.tolist())
            assert all(n == (2 if LABELS[cell] == 5 else 1) for cell, n in counts.items())


def test_balanced_cells_of_a_condition_take_turns():
    labels = np.repeat(np.arange(2), [12, 4])
    for epoch in range(5):
        cells = np.concatenate(plan(labels, batch_size=8, epoch=epoch))
        uses = Counter(cells.tolist())
        assert len(cells) == 16 and all(uses[cell] == 2 for cell in range(12, 16))
        assert max(uses[cell] for cell in range(12)) == 1


def test_few_conditions_make_smaller_batches():
    labels = np.repeat(np.arange(3), 20)
    assert {len(batch) for batch in plan(labels, batch_size=64)} == {12}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampler": "even"}, "sampler: expected one of random, balanced, got 'even'"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        (
            {"labels": np.empty(0, int)},
            "batch_size: expected 1 or more for cells to train on, got 16, 0 cells",
        ),
        (
            {"batch_size": 18},
            "cells_per_condition: expected 2 or more and a divisor of batch_size, got 4 for 18",
        ),
        ({"cells_per_condition": 1}, "cells_per_condition: expected 2 or more"),
        (
            {"labels": np.zeros(40, int)},
            "batch_size: expected room for 2 conditions.* got 16 and 1 conditions",
        ),
        ({"batch_size": 4}, "batch_size: expected room for 2 conditions"),
    ],
)
def test_errors(given, said):
    with pytest.raises(ValueError, match=said):
        plan(**given)


def test_shares_are_the_batch_cut_into_equal_parts():
    batch = np.arange(12)
    np.testing.assert_array_equal(np.concatenate([share(batch, rank, 3) for rank in range(3)]), batch)
    assert [len(share(np.arange(11), rank, 3)) for rank in range(3)] == [3, 3, 3]
    with pytest.raises(ValueError, match="batch: expected a cell for each of 3 processes, got 2 cells"):
        share(np.arange(2), 0, 3)
