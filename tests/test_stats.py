import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.stats.multitest import multipletests

from perturbret.evaluation import stats
from perturbret.evaluation.stats import (
    cluster_bootstrap,
    holm,
    paired_permutation_p,
    query_bootstrap,
    repeated_difference,
    repeated_mean,
)


@pytest.fixture
def hits():
    """Hits of 300 queries in 12 conditions of unequal size and difficulty."""
    rng = np.random.default_rng(0)
    clusters = np.array([f"G{i}" for i in rng.choice(12, size=300, p=np.arange(1, 13) / 78)])
    difficulty = {name: rng.beta(1, 2) for name in np.unique(clusters)}
    return (rng.random(300) < [difficulty[name] for name in clusters]).astype(float), clusters


def bootstrap_t_by_hand(values, clusters, average, n_resamples, seed):
    """Draw conditions, put their queries together, studentise; quantiles times the error of the estimate."""
    rng = np.random.default_rng(seed)
    parts = [values[clusters == name] for name in np.unique(clusters)]
    if average == "macro":
        parts = [part.mean(keepdims=True) for part in parts]

    def mean_and_error(parts):
        n = sum(map(len, parts))
        mean = sum(part.sum() for part in parts) / n
        squares = sum((part.sum() - mean * len(part)) ** 2 for part in parts)
        return mean, np.sqrt(squares) / n

    mean, error = mean_and_error(parts)
    ratios = []
    for _ in range(n_resamples):
        drawn, spread = mean_and_error([parts[i] for i in rng.integers(len(parts), size=len(parts))])
        ratios.append((drawn - mean) / spread)
    low, high = np.quantile(ratios, [0.05, 0.95])
    return mean - high * error, mean - low * error


def test_estimates_worked_by_hand():
    values, clusters = [1, 1, 1, 0, 0], ["A", "A", "A", "A", "B"]
    micro = cluster_bootstrap(values, clusters, average="micro", bounds=(0, 1), seed=0)
    macro = cluster_bootstrap(values, clusters, average="macro", seed=0)
    assert micro.estimate == [3 / 5] and macro.estimate == [3 / 8]
    assert (micro.low, micro.high) == ([0], [1])
    # two conditions: the jackknife's, with one degree of freedom; each resample is both of them or has no spread
    half = scipy.stats.t.ppf(0.975, 1) * 3 / 8
    assert (macro.low, macro.high) == (pytest.approx(3 / 8 - half), pytest.approx(3 / 8 + half))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_intervals_are_the_wider_of_jackknife_and_bootstrap_t(hits, average):
    values, clusters = hits
    found = cluster_bootstrap(values, clusters, average=average, n_resamples=20_000, level=0.9, seed=1)
    expected = bootstrap_t_by_hand(values, clusters, average, 4000, seed=2)
    names = np.unique(clusters)
    if average == "micro":
        without = [values[clusters != name].mean() for name in names]
        # Satterthwaite's degrees of freedom from drawing independent condition means of equal variance
        sizes = np.array([(clusters == name).sum() for name in names])
        shares = sizes / sizes.sum()
        means = np.random.default_rng(3).normal(size=(200_000, len(names)))
        residual = (means - (means @ shares)[:, None]) * shares / (1 - shares)
        squares = (residual**2).sum(axis=1)
        freedom = 2 * squares.mean() ** 2 / squares.var()
        assert freedom < len(names) - 2
    else:
        means = np.array([values[clusters == name].mean() for name in names])
        without = [np.delete(means, i).mean() for i in range(len(names))]
        freedom = len(names) - 1
    variance = np.var(without) * (len(names) - 1)
    half = scipy.stats.t.ppf(0.95, freedom) * np.sqrt(variance)
    assert found.low[0] == pytest.approx(min(expected[0], found.estimate[0] - half), abs=0.008)
    assert found.high[0] == pytest.approx(max(expected[1], found.estimate[0] + half), abs=0.008)


def test_equal_conditions_have_at_least_students_t_interval():
    values = np.random.default_rng(3).exponential(size=40)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    for average in ("micro", "macro"):
        found = cluster_bootstrap(values, np.arange(40), average=average, seed=5)
        # skewed to the right: the bootstrap-t reaches further there, the jackknife on the left
        assert found.low[0] == pytest.approx(expected.low) and found.high[0] > expected.high + 0.02


def test_query_bootstrap_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).exponential(size=40)
    expected = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=4
    ).confidence_interval
    found = query_bootstrap(values, n_resamples=20_000, seed=5)
    assert found.low[0] == pytest.approx(expected.low, abs=0.02)
    assert found.high[0] == pytest.approx(expected.high, abs=0.02)


def test_bounds_end_intervals_and_leave_room_where_nothing_varies():
    clusters = np.repeat(np.arange(8), 5)
    once = (clusters == 3).astype(float)
    open_, closed = (cluster_bootstrap(once, clusters, bounds=b, seed=0) for b in (None, (0, 1)))
    assert open_.low[0] < 0 == closed.low[0] and closed.high[0] == open_.high[0] < 1
    # eight conditions without a hit: Clopper & Pearson's interval of 0 of 8
    both = np.stack([0 * once, 0 * once + 1], axis=1)
    exact = scipy.stats.binomtest(0, 8).proportion_ci().high
    found = cluster_bootstrap(both, clusters, bounds=(0, 1), seed=0)
    np.testing.assert_allclose([found.low, found.high], [[0, 1 - exact], [exact, 1]])
    ranks = cluster_bootstrap(both + 1, clusters, bounds=([1, 1], [np.inf, np.inf]), seed=0)
    assert ranks.low.tolist() == [1, 2] and ranks.high[0] == np.inf
    with pytest.raises(ValueError, match="values: expected 0 to 1, got others"):
        cluster_bootstrap(both + 1, clusters, bounds=(0, 1), seed=0)


def test_columns_share_resamples_and_do_not_mix(hits):
    values, clusters = hits
    both = np.stack([values, 1 - values, np.full(300, 0.25)], axis=1)
    found = cluster_bootstrap(both, clusters, seed=6)
    alone = cluster_bootstrap(values, clusters, seed=6)
    assert found.low[0] == alone.low[0] and found.high[0] == alone.high[0]
    assert found.low[1] == pytest.approx(1 - found.high[0]) and found.high[1] == pytest.approx(
        1 - found.low[0]
    )
    assert (found.low[2], found.high[2]) == (pytest.approx(0.25), pytest.approx(0.25))


def test_the_order_of_queries_and_the_chunks_change_nothing(hits, monkeypatch):
    values, clusters = hits
    expected = cluster_bootstrap(values, clusters, seed=7)
    order = np.random.default_rng(8).permutation(300)
    monkeypatch.setattr(stats, "_CHUNK", 100)
    found = cluster_bootstrap(values[order], clusters[order], seed=7)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    other = cluster_bootstrap(values, clusters, seed=8)
    assert other.high != expected.high
    few = cluster_bootstrap(values, clusters, n_resamples=50, seed=7)
    assert few.high != expected.high


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
    found = cluster_bootstrap(better - worse, clusters, seed=14)
    assert found.estimate[0] == pytest.approx(better.mean() - worse.mean())
    single = cluster_bootstrap(better, clusters, seed=14)
    assert found.low[0] > 0
    # unpaired, the spread between conditions would drown it
    assert found.high[0] - found.low[0] < (single.high[0] - single.low[0]) / 3
    reverse = cluster_bootstrap(worse - better, clusters, seed=14)
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
    assert paired_permutation_p(a - b, clusters, average=average, seed=0) == expected
    assert 0 < expected < 1
    random = paired_permutation_p(a - b, clusters, average=average, n_permutations=63, seed=0)
    assert random != expected and abs(random - expected) < 0.25


def test_one_query_per_condition_is_scipys_permutation_test():
    rng = np.random.default_rng(16)
    a, b = rng.random((2, 10)) + np.array([[0.2], [0]])

    def mean_difference(x, y, axis):
        return np.mean(x - y, axis=axis)

    expected = scipy.stats.permutation_test(
        (a, b), mean_difference, permutation_type="samples", vectorized=True, n_resamples=np.inf
    ).pvalue
    assert paired_permutation_p(a - b, np.arange(10), seed=0) == pytest.approx(expected)


def test_many_conditions_are_permuted_at_random():
    rng = np.random.default_rng(17)
    a, b = rng.random((2, 30)) + np.array([[0.12], [0]])
    expected = scipy.stats.ttest_rel(a, b).pvalue
    found = paired_permutation_p(a - b, np.arange(30), n_permutations=20_000, seed=0)
    assert found == pytest.approx(expected, rel=0.3)
    assert found == paired_permutation_p(a - b, np.arange(30), n_permutations=20_000, seed=0)


def test_p_values_are_never_zero_and_one_without_a_difference():
    clusters = np.repeat(np.arange(40), 3)
    ones, zeros = np.ones(120), np.zeros(120)
    assert paired_permutation_p(ones - zeros, clusters, n_permutations=999, seed=0) == 1 / 1000
    assert paired_permutation_p(ones - ones, clusters, seed=0) == 1
    assert paired_permutation_p(-1e-16 * clusters, clusters, seed=0) == 1
    assert paired_permutation_p([1.0, -1.0], ["A", "B"], seed=0) == 1


def test_p_values_of_equal_methods_are_uniform():
    rng = np.random.default_rng(18)
    clusters = np.repeat(np.arange(12), 4)
    found = []
    for _ in range(300):
        strength = rng.normal(size=(12, 2))[clusters]
        a, b = (strength + rng.normal(size=(48, 2))).T
        found.append(paired_permutation_p(a - b, clusters, seed=0))
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001
    assert np.mean(np.array(found) <= 0.05) < 0.1


def crossed(rng, n_clusters, n_repeats, *, condition, repeat, noise=0.3, per_cluster=6):
    """Differences of queries in conditions, by repeat; the truth is 0."""
    clusters = np.repeat(np.arange(n_clusters), per_cluster)
    values = rng.normal(0, condition, (n_clusters, 1))[clusters] + rng.normal(0, repeat, (1, n_repeats))
    return values + rng.normal(0, noise, (len(clusters), n_repeats)), clusters


@pytest.mark.parametrize("repeat", [0.0, 0.15])
def test_intervals_over_repeats_cover_the_truth(repeat):
    rng = np.random.default_rng(20)
    held, naive = [], []
    for _ in range(300):
        values, clusters = crossed(rng, 20, 3, condition=0.2, repeat=repeat)
        found = repeated_mean(values, clusters, n_resamples=200)
        held.append(found.low <= 0 <= found.high)
        fixed = cluster_bootstrap(values.mean(axis=1), clusters, n_resamples=200, seed=0)
        naive.append(fixed.low[0] <= 0 <= fixed.high[0])
    assert 0.91 <= np.mean(held) <= 1
    assert np.mean(naive) < 0.8 if repeat else np.mean(naive) > 0.9


def test_intervals_over_repeats_worked_by_hand():
    rng = np.random.default_rng(21)
    values, clusters = crossed(rng, 9, 4, condition=0.2, repeat=0.3)
    found = repeated_mean(values, clusters, average="macro", n_resamples=2000, level=0.9)
    means = values.mean(axis=0)
    assert found.spread == pytest.approx(means.std(ddof=1)) and found.estimate == pytest.approx(means.mean())
    assert (found.n_repeats, found.n_clusters) == (4, 9) and np.isnan(found.p_value)
    by_condition = values.mean(axis=1).reshape(9, -1).mean(axis=1)
    parts = np.array([by_condition.var(ddof=1) / 9, means.var(ddof=1) / 4])
    freedom = parts.sum() ** 2 / (parts[0] ** 2 / 8 + parts[1] ** 2 / 3)
    half = scipy.stats.t.ppf(0.95, freedom) * np.sqrt(parts.sum())
    jackknife = scipy.stats.t.ppf(0.95, 8) * np.sqrt(parts[0])
    options = {"average": "macro", "n_resamples": 2000, "level": 0.9, "seed": 0}
    single = cluster_bootstrap(values.mean(axis=1), clusters, **options)
    reach = np.sqrt(half**2 - jackknife**2 + (single.high[0] - single.estimate[0]) ** 2)
    assert found.high == pytest.approx(found.estimate + reach) and reach > jackknife


def test_one_repeat_and_equal_repeats_have_the_interval_of_conditions(hits):
    values, clusters = hits
    expected = cluster_bootstrap(values, clusters, bounds=(0, 1), seed=0)
    for repeats in (values, values[:, None], np.tile(values[:, None], 3)):
        found = repeated_mean(repeats, clusters, bounds=(0, 1))
        assert (found.low, found.high) == (pytest.approx(expected.low[0]), pytest.approx(expected.high[0]))
        assert found.spread == 0 if repeats.ndim == 2 and repeats.shape[1] == 3 else np.isnan(found.spread)
    assert np.isnan(repeated_mean(np.ones((4, 2)), ["A"] * 4).low)


def test_a_method_without_random_numbers_is_compared_with_every_repeat(hits):
    values, clusters = hits
    rng = np.random.default_rng(22)
    refits = (rng.random((300, 3)) < 0.5).astype(float)
    found = repeated_difference(refits, values, clusters, n_resamples=300, n_permutations=999, seed=1)
    same = repeated_difference(
        refits, np.tile(values[:, None], 3), clusters, n_resamples=300, n_permutations=999, seed=1
    )
    assert found == same and found.estimate == pytest.approx(refits.mean() - values.mean())
    p = paired_permutation_p(refits.mean(axis=1) - values, clusters, n_permutations=999, seed=1)
    assert found.p_value == p
    reverse = repeated_difference(values, refits, clusters, n_resamples=300, seed=1)
    assert reverse.low == pytest.approx(-found.high)
    with pytest.raises(ValueError, match=r"got shapes \(300, 3\) and \(300, 2\)"):
        repeated_difference(refits, refits[:, :2], clusters, seed=1)
    with pytest.raises(ValueError, match=r"got shapes \(300, 3\) and \(299, 1\)"):
        repeated_difference(refits, values[:-1], clusters, seed=1)


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "coverage.py"
    spec = importlib.util.spec_from_file_location("coverage_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measured_coverage_is_found_again_by_the_benchmark(benchmark):
    options = {"repeats": 60, "target_repeats": 100, "n_resamples": 200, "candidates": True, "seed": 5}
    found = benchmark.measure(
        lambda rng, n: benchmark.draw_scores(rng, n, **benchmark.POPULATIONS["weak"]), 8, **options
    )
    coverage = found.groupby("interval")["coverage"].mean()
    assert abs(coverage["chosen"] - stats.measured_coverage(8, "micro", paired=True).measured) < 0.05
    assert coverage["percentile"] < coverage["chosen"] - 0.02
    null = found[(found["quantity"] == "no difference") & (found["interval"] == "chosen")]
    assert (null["target"] == 0).all() and null["rejected"].mean() <= 0.1
    # a table where no interval held the truth is not rescued by the summary
    assert (benchmark.packaged(found.assign(coverage=0.0))["measured"] == 0).all()


def test_coverage_is_that_of_the_next_lower_number_of_conditions():
    assert stats.measured_coverage(14, "macro").n_conditions == 8
    assert stats.measured_coverage(15, "macro").n_conditions == 15
    assert stats.measured_coverage(3, "micro").n_conditions == 8
    assert stats.measured_coverage(900, "micro").n_conditions == 60
    found = stats.measured_coverage(30, "micro", paired=True)
    assert found.nominal == 0.95 and found.n_repeats >= 300
    assert 0.8 < found.lowest <= found.measured <= found.highest <= 1
    with pytest.raises(ValueError, match="at least 2, got 1"):
        stats.measured_coverage(1, "micro")
    with pytest.raises(ValueError, match="average: expected one of .*, got 'mean'"):
        stats.measured_coverage(30, "mean")


def test_the_documented_coverage_is_the_packaged_one(benchmark):
    root = Path(__file__).parents[1]
    table = pd.read_csv(root / "perturbret" / "resources" / "coverage.csv")
    assert benchmark.markdown(table) in (root / "docs" / "method.md").read_text()


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
    with pytest.raises(ValueError, match=r"same queries in both, got shapes \(2, 1\) and \(1, 1\)"):
        repeated_difference(good, [1.0], clusters, seed=0)
    with pytest.raises(ValueError, match="NaN in 1 of 2 queries"):
        paired_permutation_p([0.0, np.nan], clusters, seed=0)
    with pytest.raises(ValueError, match="one value per query, got 2 columns"):
        paired_permutation_p(np.ones((2, 2)), clusters, seed=0)
    for p in ([0.5, np.nan], [1.2], [-0.1], [[0.5]]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            holm(p)
