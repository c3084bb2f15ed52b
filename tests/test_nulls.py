from collections import Counter
from itertools import permutations

import numpy as np
import pandas as pd
import pytest

from perturbret.evaluation.nulls import (
    ALPHAS,
    _LuckMoments,
    detectable_in_family,
    detectable_leak,
    luck,
    luck_p_values,
    null_limits,
    permute_conditions,
)


def one_hot(columns, c):
    return np.eye(c)[np.asarray(columns)]


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    return {
        "conditions": rng.choice(["A", "B", "C", "ctrl"], 400),
        "roles": rng.choice(["train", "query"], 400),
        "batch": rng.choice(["b1", "b2", "b3"], 400),
    }


def test_permuting_keeps_class_counts_per_role_and_batch_and_leaves_controls_alone(labels):
    permuted = permute_conditions(**labels, seed=0)
    strata = list(zip(labels["roles"], labels["batch"], strict=True))
    assert Counter(zip(strata, permuted, strict=True)) == Counter(
        zip(strata, labels["conditions"], strict=True)
    )
    controls = labels["conditions"] == "ctrl"
    assert (permuted[controls] == "ctrl").all()
    agreement = (permuted == labels["conditions"])[~controls].mean()
    assert agreement == pytest.approx(1 / 3, abs=0.1)


def test_permuting_depends_on_the_seed_and_leaves_its_input_alone(labels):
    before = labels["conditions"].copy()
    a, b, c = (permute_conditions(**labels, seed=seed) for seed in (0, 0, 1))
    assert (a == b).all() and (a != c).any()
    assert (labels["conditions"] == before).all()


def test_without_batches_labels_cross_them(labels):
    permuted = permute_conditions(labels["conditions"], labels["roles"], seed=0)
    assert Counter(zip(labels["batch"], permuted, strict=True)) != Counter(
        zip(labels["batch"], labels["conditions"], strict=True)
    )
    assert Counter(zip(labels["roles"], permuted, strict=True)) == Counter(
        zip(labels["roles"], labels["conditions"], strict=True)
    )


def test_lengths_must_agree(labels):
    with pytest.raises(ValueError, match=r"one entry per cell \(400\), got 399"):
        permute_conditions(labels["conditions"], labels["roles"][1:], seed=0)
    with pytest.raises(ValueError, match="one label per query, got 3"):
        luck_p_values([one_hot([0, 1], 2)], np.array([0, 1, 1]), seed=0)


def test_luck_is_the_mean_hit_rate_over_all_permutations_within_batch():
    rng = np.random.default_rng(0)
    top = rng.dirichlet(np.ones(3), size=7)
    true = np.array([0, 1, 2, 0, 0, -1, 2])
    batch = np.array(list("xxxxyyy"))
    rates = []
    for first in permutations(range(4)):
        for second in permutations(range(4, 7)):
            shuffled = true[[*first, *second]]
            rates.append(np.where(shuffled >= 0, top[np.arange(7), shuffled], 0).mean())
    assert luck(top, true, batch) == pytest.approx(np.mean(rates), abs=1e-12)


def test_luck_of_a_constant_prediction_is_the_share_of_its_class_and_of_ties_chance():
    true = np.array([0] * 6 + [1] * 3 + [2])
    assert luck(one_hot([0] * 10, 3), true) == pytest.approx(0.6)
    assert luck(np.full((10, 3), 1 / 3), true) == pytest.approx(1 / 3)


def test_luck_of_knowing_the_batch_counts_what_the_batch_gives_away():
    true = np.array([0] * 10 + [1] * 10)
    assert luck(one_hot(true, 2), true, true.astype(str)) == 1
    assert luck(one_hot(true, 2), true) == 0.5


def test_p_values_equal_those_of_all_permutations():
    top = one_hot([0, 1, 2, 0, 1, 2], 4)
    top[4:] = [0, 0, 0.5, 0.5]
    true = np.array([0, 1, -1, -1, 3, 2])
    padded = np.pad(top, ((0, 0), (0, 1)))
    every = [padded[np.arange(6), true[list(order)]].sum() for order in permutations(range(6))]
    exact = np.mean(np.array(every) >= padded[np.arange(6), true].sum() - 1e-9)
    assert 0.005 < exact < 0.1
    (p,) = luck_p_values([top], true, n_permutations=20_000, seed=0)
    assert p == pytest.approx(exact, rel=0.15)


def test_true_predictions_get_the_smallest_p_value_and_those_of_luck_a_uniform_one():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 200)
    lucky = [one_hot(rng.permutation(true), 4) for _ in range(60)]
    p = luck_p_values([one_hot(true, 4), *lucky], true, n_permutations=499, seed=1)
    assert p[0] == 1 / 500
    assert 0.35 < p[1:].mean() < 0.65 and p[1:].min() < 0.1


def test_knowing_only_the_batch_is_luck_within_batches():
    rng = np.random.default_rng(0)
    batch = rng.integers(0, 2, 300)
    true = np.where(rng.random(300) < 0.9, batch, 1 - batch)
    top = [one_hot(batch, 2)]
    assert luck_p_values(top, true, batch.astype(str), n_permutations=199, seed=0)[0] == 1
    assert luck_p_values(top, true, n_permutations=199, seed=0)[0] == 1 / 200


def test_ties_everywhere_and_labels_outside_the_candidates_are_no_evidence():
    true = np.array([0, 1, 2, 1, -1, -1])
    p = luck_p_values(
        [np.full((6, 3), 1 / 3), one_hot([0, 1, 2, 1, 0, 0], 3)], true, n_permutations=999, seed=0
    )
    assert p[0] == 1
    assert p[1] == pytest.approx(2 * 2 / 720, abs=0.01)


def test_blocks_of_permutations_do_not_show(monkeypatch):
    import perturbret.evaluation.nulls

    true = np.random.default_rng(0).integers(0, 4, 50)
    top = [one_hot(np.random.default_rng(1).integers(0, 4, 50), 4)]
    whole = luck_p_values(top, true, n_permutations=5000, seed=0)[0]
    monkeypatch.setattr(perturbret.evaluation.nulls, "_CHUNK", 120)
    assert luck_p_values(top, true, n_permutations=5000, seed=0)[0] == pytest.approx(whole, abs=0.03)


def test_at_least_one_permutation():
    with pytest.raises(ValueError, match="n_permutations: expected at least 1, got 0"):
        luck_p_values([one_hot([0], 2)], np.array([0]), n_permutations=0, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_moments_are_those_of_all_permutations_within_batch(share):
    rng = np.random.default_rng(0)
    true = np.array([0, 1, 2, 0, 0, -1, 2])
    top = (
        rng.dirichlet(np.ones(3), size=7) if share == 0 else np.where(true[:, None] == np.arange(3), 1.0, 0.0)
    )
    batch = np.array(list("xxxxyyy"))
    hits = []
    for first in permutations(range(4)):
        for second in permutations(range(4, 7)):
            shuffled = true[[*first, *second]]
            hits.append(np.where(shuffled >= 0, top[np.arange(7), shuffled], 0).sum())
    mean, variance = _LuckMoments.of(top, true, batch).at(share)
    assert mean == pytest.approx(np.mean(hits), abs=1e-12)
    assert variance == pytest.approx(np.var(hits), abs=1e-12)


def simulated_null(seed, n, c, kind):
    """Labels, batches, and predictions that know nothing of them."""
    rng = np.random.default_rng(seed)
    prior = rng.dirichlet(np.full(c, 3.0))
    batch = rng.choice(["x", "y"], n)
    true = rng.choice(c, n, p=prior)
    if kind == "leaning":
        return one_hot(rng.choice(c, n, p=prior**2 / (prior**2).sum()), c), true, batch
    if kind == "constant":
        return one_hot(np.full(n, prior.argmax()), c), true, batch
    return rng.dirichlet(np.full(c, 0.02), n), true, batch  # most sure, some tied


@pytest.mark.parametrize("kind", ["leaning", "constant", "tied"])
@pytest.mark.parametrize(("n", "c", "alpha"), [(300, 8, 0.01), (300, 8, 0.002), (1000, 33, 0.01)])
def test_planted_leaks_of_the_detectable_size_are_found_four_times_in_five(kind, n, c, alpha):
    sizes, found, smaller = [], [], []
    for seed in range(40):
        top, true, batch = simulated_null(seed, n, c, kind)
        size = detectable_leak(top, true, batch, alpha=alpha, n_permutations=999)
        rng = np.random.default_rng(seed)
        tops = []
        for share in (size, size / 3):
            given = rng.choice(n, round(share * n), replace=False)
            planted = top.copy()
            planted[given] = one_hot(true[given], c)
            tops.append(planted)
        p = luck_p_values(tops, true, batch, n_permutations=999, seed=seed)
        sizes.append(size)
        found.append(p[0] < alpha)
        smaller.append(p[1] < alpha)
    # Binomial of 40 at .8: .63 or more in 99%; where a few hits decide, whole numbers make it more.
    assert np.mean(found) >= 0.63, (np.mean(found), np.mean(sizes))
    assert np.mean(smaller) < 0.6, (np.mean(smaller), np.mean(sizes))


def test_detectable_leaks_shrink_with_queries_and_grow_with_the_level():
    few, many = (simulated_null(0, n, 20, "leaning") for n in (400, 6400))
    assert detectable_leak(*many, alpha=0.01) < 0.4 * detectable_leak(*few, alpha=0.01)
    sizes = [detectable_leak(*few, alpha=alpha) for alpha in ALPHAS]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert (
        detectable_leak(*few, alpha=0.01, power=0.5)
        < sizes[1]
        < detectable_leak(*few, alpha=0.01, power=0.99)
    )


def test_what_no_leak_can_reach_is_not_a_number():
    top, true, batch = simulated_null(0, 400, 20, "leaning")
    assert np.isnan(detectable_leak(top, true, batch, alpha=0.001, n_permutations=999))
    assert np.isfinite(detectable_leak(top, true, batch, alpha=0.0011, n_permutations=999))
    # The batch is the condition: permuting within it changes nothing.
    assert np.isnan(detectable_leak(top, true, true.astype(str), alpha=0.01))
    with pytest.raises(ValueError, match="power: expected a number between 0 and 1, got 1"):
        detectable_leak(top, true, batch, alpha=0.01, power=1)


@pytest.mark.parametrize("m", [1, 3, 5, 20, 50, 130, 250])
def test_the_leak_of_a_family_is_that_of_its_smallest_level(m):
    top, true, batch = simulated_null(0, 2000, 33, "leaning")
    row = pd.Series(
        {f"detectable@{alpha}": detectable_leak(top, true, batch, alpha=alpha) for alpha in ALPHAS}
    )
    assert detectable_in_family(row, m) == pytest.approx(
        detectable_leak(top, true, batch, alpha=0.05 / m), abs=0.002
    )


def test_limits_are_said_in_one_sentence():
    row = pd.Series(
        {f"detectable@{alpha}": 0.02 * (i + 1) for i, alpha in enumerate(ALPHAS)} | {"n_queries": 1234}
    )
    assert "on these 1,234 queries with 80% power (at p < 0.01) it finds a leak" in null_limits(row)
    assert "label of 4.0% of the cells" in null_limits(row)
    assert "label of 6.0% of the cells" in null_limits(row, m=50) and "among 50 runs" in null_limits(
        row, m=50
    )
    assert "no leak, however large" in null_limits(row, m=251)
    with pytest.raises(ValueError, match="m: expected at least one run, got 0"):
        detectable_in_family(row, 0)
