import itertools

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from perturbret import stats
from perturbret.stats import cluster_bootstrap, holm, paired_difference, paired_permutation_p, query_bootstrap


@pytest.fixture
def hits():
    """Hits of 300 queries in 12 conditions of unequal size and difficulty."""
    rng = np.random.default_rng(0)
    clusters = np.array([f"G{i}" for i in rng.choice(12, size=300, p=np.arange(1, 13) / 78)])
    difficulty = {name: rng.beta(1, 2) for name in np.unique(clusters)}
    return (rng.random(300) < [difficulty[name] for name in clusters]).astype(float), clusters


def by_hand(values, clusters, average, n_resamples, seed):
    """The bootstrap as it is described: draw conditions, put their queries together, average."""
    rng = np.random.default_rng(seed)
    names = np.unique(clusters)
    means = []
    for _ in range(n_resamples):
        parts = [values[clusters == name] for name in rng.choice(names, size=len(names))]
        means.append(
            np.concatenate(parts).mean() if average == "micro" else np.mean([p.mean() for p in parts])
        )
    return np.array(means)


def test_estimates_worked_by_hand():
    values, clusters = [1, 1, 1, 0, 0], ["A", "A", "A", "A", "B"]
    assert cluster_bootstrap(values, clusters, average="micro", seed=0).estimate == [3 / 5]
    assert cluster_bootstrap(values, clusters, average="macro", seed=0).estimate == [3 / 8]
    # two conditions: a resample holds both, or one of them twice
    micro = cluster_bootstrap(values, clusters, average="micro", seed=0)
    assert (micro.low, micro.high) == ([0], [3 / 4])


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_intervals_are_those_of_resampling_conditions(hits, average):
    values, clusters = hits
    found = cluster_bootstrap(values, clusters, average=average, n_resamples=20_000, level=0.9, seed=1)
    expected = by_hand(values, clusters, average, 4000, seed=2)
    low, high = np.quantile(expected, [0.05, 0.95])
    assert found.low[0] == pytest.approx(low, abs=0.01) and found.high[0] == pytest.approx(high, abs=0.01)
    assert found.low[0] < found.estimate[0] < found.high[0]


def test_one_query_per_condition_is_scipys_bootstrap():
    values = np.random.default_rng(3).exponential(size=40)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=4
    ).confidence_interval
    for average in ("micro", "macro"):
        found = cluster_bootstrap(values, np.arange(40), average=average, n_resamples=20_000, seed=5)
        assert found.low[0] == pytest.approx(expected.low, abs=0.02)
        assert found.high[0] == pytest.approx(expected.high, abs=0.02)
    found = query_bootstrap(values, n_resamples=20_000, seed=5)
    assert found.low[0] == pytest.approx(expected.low, abs=0.02)
    assert found.high[0] == pytest.approx(expected.high, abs=0.02)


def test_columns_share_resamples_and_do_not_mix(hits):
    values, clusters = hits
    both = np.stack([values, 1 - values, np.full(300, 0.25)], axis=1)
    found = cluster_bootstrap(both, clusters, seed=6)
    alone = cluster_bootstrap(values, clusters, seed=6)
    assert found.low[0] == alone.low[0] and found.high[0] == alone.high[0]
    assert found.low[1] == pytest.approx(1 - found.high[0]) and found.high[1] == pytest.approx(
        1 - found.low[0]
    )
    assert found.low[2] == found.estimate[2] == found.high[2] == 0.25


def test_the_order_of_queries_and_the_chunks_change_nothing(hits, monkeypatch):
    values, clusters = hits
    expected = cluster_bootstrap(values, clusters, seed=7)
    order = np.random.default_rng(8).permutation(300)
    monkeypatch.setattr(stats, "_CHUNK", 100)
    found = cluster_bootstrap(values[order], clusters[order], seed=7)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    other = cluster_bootstrap(values, clusters, seed=8)
    assert other.low != expected.low


def test_one_condition_has_no_known_interval():
    found = cluster_bootstrap([1.0, 0.0], ["A", "A"], seed=0)
    assert found.estimate == [0.5] and np.isnan(found.low).all() and np.isnan(found.high).all()
    assert np.isnan(query_bootstrap([1.0], seed=0).low).all()


def test_intervals_cover_the_truth_where_cells_of_a_condition_agree():
    rng = np.random.default_rng(9)
    n_simulations, n_clusters = 300, 40
    covered = {"micro": 0, "macro": 0, "queries": 0}
    for simulation in range(n_simulations):
        rate = rng.beta(0.6, 1.8, size=n_clusters)  # mean 0.25
        clusters = np.repeat(np.arange(n_clusters), rng.integers(5, 40, size=n_clusters))
        values = (rng.random(len(clusters)) < rate[clusters]).astype(float)
        intervals = {
            average: cluster_bootstrap(values, clusters, average=average, n_resamples=400, seed=simulation)
            for average in ("micro", "macro")
        }
        intervals["queries"] = query_bootstrap(values, n_resamples=400, seed=simulation)
        for name, found in intervals.items():
            covered[name] += found.low[0] <= 0.25 <= found.high[0]
    share = {name: n / n_simulations for name, n in covered.items()}
    assert 0.88 <= share["micro"] <= 0.99 and 0.88 <= share["macro"] <= 0.99
    # what resampling queries would claim instead
    assert share["queries"] < 0.75


def test_query_intervals_cover_the_truth_where_queries_are_exchangeable():
    values = np.random.default_rng(10).random((300, 400)) < 0.1
    found = query_bootstrap(values.T.astype(float), n_resamples=400, seed=11)
    covered = (found.low <= 0.1) & (found.high >= 0.1)
    assert 0.88 <= covered.mean() <= 0.99


def test_equal_rows_drawn_together_are_rows_drawn_one_by_one():
    rng = np.random.default_rng(12)
    values = rng.choice([0.0, 0.25, 1.0], size=(200, 2))
    found = query_bootstrap(values, n_resamples=10_000, seed=13)
    drawn = values[rng.integers(200, size=(10_000, 200))].mean(axis=1)
    np.testing.assert_allclose(found.estimate, values.mean(axis=0))
    np.testing.assert_allclose(
        [found.low, found.high], np.quantile(drawn, [0.025, 0.975], axis=0), atol=0.005
    )


def test_differences_are_paired(hits):
    better, clusters = hits
    worse = better.copy()
    worse[np.flatnonzero(better)[::10]] = 0
    found = paired_difference(better, worse, clusters, seed=14)
    assert found.estimate[0] == pytest.approx(better.mean() - worse.mean())
    single = cluster_bootstrap(better, clusters, seed=14)
    assert found.low[0] > 0
    # unpaired, the spread between conditions would drown it
    assert found.high[0] - found.low[0] < (single.high[0] - single.low[0]) / 3
    reverse = paired_difference(worse, better, clusters, seed=14)
    assert reverse.low[0] == pytest.approx(-found.high[0])


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_permutation_p_is_the_enumeration_of_swaps(average):
    rng = np.random.default_rng(15)
    clusters = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    a, b = rng.random((2, 21)) + np.array([[0.15], [0]])

    def mean(swapped):
        swap = np.array(swapped)[clusters]
        difference = np.where(swap, b - a, a - b)
        if average == "micro":
            return abs(difference.mean())
        return abs(np.mean([difference[clusters == name].mean() for name in range(6)]))

    swapped = [mean(pattern) for pattern in itertools.product([False, True], repeat=6)]
    expected = np.mean(np.array(swapped) >= swapped[0] - 1e-12)
    assert paired_permutation_p(a, b, clusters, average=average, seed=0) == expected
    assert 0 < expected < 1
    random = paired_permutation_p(a, b, clusters, average=average, n_permutations=63, seed=0)
    assert random != expected and abs(random - expected) < 0.25


def test_one_query_per_condition_is_scipys_permutation_test():
    rng = np.random.default_rng(16)
    a, b = rng.random((2, 10)) + np.array([[0.2], [0]])

    def mean_difference(x, y, axis):
        return np.mean(x - y, axis=axis)

    expected = scipy.stats.permutation_test(
        (a, b), mean_difference, permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue
    assert paired_permutation_p(a, b, np.arange(10), seed=0) == pytest.approx(expected)


def test_many_conditions_are_permuted_at_random():
    rng = np.random.default_rng(17)
    a, b = rng.random((2, 30)) + np.array([[0.12], [0]])
    expected = scipy.stats.ttest_rel(a, b).pvalue
    found = paired_permutation_p(a, b, np.arange(30), n_permutations=20_000, seed=0)
    assert found == pytest.approx(expected, rel=0.3)
    assert found == paired_permutation_p(a, b, np.arange(30), n_permutations=20_000, seed=0)


def test_p_values_are_never_zero_and_one_without_a_difference():
    clusters = np.repeat(np.arange(40), 3)
    ones, zeros = np.ones(120), np.zeros(120)
    assert paired_permutation_p(ones, zeros, clusters, n_permutations=999, seed=0) == 1 / 1000
    assert paired_permutation_p(ones, ones, clusters, seed=0) == 1
    assert paired_permutation_p(ones, ones + 1e-16 * clusters, clusters, seed=0) == 1
    assert paired_permutation_p([1.0, 0.0], [0.0, 1.0], ["A", "B"], seed=0) == 1


def test_p_values_of_equal_methods_are_uniform():
    rng = np.random.default_rng(18)
    clusters = np.repeat(np.arange(12), 4)
    found = []
    for _ in range(300):
        strength = rng.normal(size=(12, 2))[clusters]
        a, b = (strength + rng.normal(size=(48, 2))).T
        found.append(paired_permutation_p(a, b, clusters, seed=0))
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001
    assert np.mean(np.array(found) <= 0.05) < 0.1


def test_holm_is_statsmodels_and_worked_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    p = np.random.default_rng(19).random(30) ** 3
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])
    assert holm([0.6, 0.7]).tolist() == [1, 1] and holm([]).tolist() == []


def test_bad_input_is_named():
    good, clusters = [0.0, 1.0], ["A", "B"]
    with pytest.raises(ValueError, match="NaN in 1 of 2 queries"):
        cluster_bootstrap([np.nan, 1.0], clusters, seed=0)
    with pytest.raises(ValueError, match="one per query, 2, got 3"):
        cluster_bootstrap(good, ["A", "B", "B"], seed=0)
    with pytest.raises(ValueError, match="average: expected one of .*, got 'mean'"):
        cluster_bootstrap(good, clusters, average="mean", seed=0)
    with pytest.raises(ValueError, match="between 0 and 1, got 95"):
        cluster_bootstrap(good, clusters, level=95, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        query_bootstrap(good, n_resamples=0, seed=0)
    with pytest.raises(ValueError, match=r"at least one row per query, got shape \(0, 1\)"):
        query_bootstrap([], seed=0)
    with pytest.raises(ValueError, match=r"same queries in both, got shapes \(2,\) and \(1,\)"):
        paired_difference(good, [1.0], clusters, seed=0)
    with pytest.raises(ValueError, match="NaN in 1 of 2 queries"):
        paired_permutation_p(good, [np.nan, 1.0], clusters, seed=0)
    with pytest.raises(ValueError, match="one value per query, got 2 columns"):
        paired_permutation_p(np.zeros((2, 2)), np.ones((2, 2)), clusters, seed=0)
    for p in ([0.5, np.nan], [1.2], [-0.1], [[0.5]]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            holm(p)
