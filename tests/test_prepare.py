"""Labels put aside: which cells stay, which are left alone, and what the context says of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import toy

from perturbret.data.conditions import CTRL
from perturbret.data.prepared import UNLABELLED, ContextMismatch, prepare
from perturbret.data.splits import make_split
from perturbret.runs.pipeline import null_twin

SHARES = (0.001, 0.1, 0.3, 0.5, 0.9)


@pytest.fixture(scope="module")
def screen():
    return toy.tiny_screen()


@pytest.fixture(scope="module")
def split(screen):
    return make_split(screen.obs, track="in_dist", seed=0)


@pytest.fixture(scope="module")
def shared(screen, split):
    """Prepared cells by train_share."""
    return {share: prepare(screen, split, mask="all_targets", train_share=share) for share in (1.0, *SHARES)}


def kept(prepared):
    return set(prepared.cells.names[prepared.roles == "train"])


@pytest.mark.parametrize("share", SHARES)
def test_a_share_of_each_conditions_training_cells_stays(shared, share):
    whole, prepared = shared[1.0], shared[share]
    assert UNLABELLED not in whole.roles
    before, after = whole.roles == "train", prepared.roles == "train"
    np.testing.assert_array_equal(before, after | (prepared.roles == UNLABELLED))
    for condition in (*whole.candidates, CTRL):
        there = whole.conditions == condition
        assert (after & there).sum() == max(1, round(share * (before & there).sum()))


@pytest.mark.parametrize("share", SHARES)
def test_nothing_else_changes(shared, share):
    whole, prepared = shared[1.0], shared[share]
    for role in ("val", "query"):
        np.testing.assert_array_equal(prepared.roles == role, whole.roles == role)
        assert (prepared.roles == role).any()
    np.testing.assert_array_equal(prepared.conditions, whole.conditions)
    assert (prepared.cells.counts != whole.cells.counts).nnz == 0
    assert prepared.candidates == whole.candidates and prepared.columns.keys() == whole.columns.keys()


def test_smaller_shares_are_parts_of_larger_ones(shared):
    sets = [kept(shared[share]) for share in (*SHARES, 1.0)]
    for smaller, larger in zip(sets, sets[1:], strict=False):
        assert smaller < larger


def test_which_cells_stay_depends_on_names_and_the_splits_seed(screen, split, shared):
    again = prepare(screen, split, mask="own_targets", train_share=0.5)
    assert kept(again) == kept(shared[0.5])
    other = make_split(screen.obs, track="in_dist", seed=1)
    theirs = kept(prepare(screen, other, mask="all_targets", train_share=0.5))
    common = kept(prepare(screen, other, mask="all_targets")) & kept(shared[1.0])
    assert theirs & common != kept(shared[0.5]) & common


def test_the_context_says_the_share(shared):
    assert shared[0.5].context.train_share == 0.5 and shared[1.0].context.train_share == 1.0
    with pytest.raises(ContextMismatch, match="train_share: the encoder was fitted with 0.5.*has 1.0"):
        shared[0.5].context.check(shared[1.0].context)
    shared[0.5].context.check(shared[1.0].context, ablation=("train_share",))
    shared[0.5].context.check(shared[0.5].context)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(screen, split, share):
    with pytest.raises(ValueError, match="train_share: expected a share above 0 and up to 1, got"):
        prepare(screen, split, mask="all_targets", train_share=share)


def test_the_null_twin_keeps_the_share(screen, split, shared):
    prepared = shared[0.3]
    params = {"mask": "all_targets", "seed": 0}
    twin = null_twin(SimpleNamespace(prepared=prepared, screen=screen, split=split, params=params))
    assert replace(twin.context, cells_hash=prepared.context.cells_hash) == prepared.context
    assert twin.context.cells_hash != prepared.context.cells_hash and twin.candidates == prepared.candidates
    assert (twin.conditions != prepared.conditions).any()
    # As many labels of each condition, on other cells.
    for role in ("train", UNLABELLED, "val", "query"):
        assert (twin.roles == role).sum() == (prepared.roles == role).sum()
    names, numbers = np.unique(prepared.conditions[prepared.roles == "train"], return_counts=True)
    theirs = np.unique(twin.conditions[twin.roles == "train"], return_counts=True)
    np.testing.assert_array_equal(theirs[0], names)
    np.testing.assert_array_equal(theirs[1], numbers)
