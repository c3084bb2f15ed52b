"""Which two genes? Task, metrics, intervals, opponents, and choices that share no gene with what is judged."""

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from toy_effects import toy_effects

from perturbret.combinations.compare import by_shared_genes, compare, differences, summarise
from perturbret.combinations.composers import LEARNED, OPPONENTS, Composer
from perturbret.combinations.judge import both_within, gene_interval, judge
from perturbret.combinations.nested import deal, expected_reciprocal_rank, nested_scores
from perturbret.combinations.opponents import dominance
from perturbret.combinations.task import make_task

OPPONENT = {each.name: each for each in OPPONENTS}


@pytest.fixture(scope="module")
def task():
    return make_task(toy_effects(), "all_targets")


def test_candidates_are_all_pairs_then_singles_and_queries_know_their_own(task):
    n = len(task.genes)
    assert len(task.candidates) == n * (n - 1) // 2 + n
    assert list(task.names[task.true]) == list(task.queries)
    assert set(task.names[task.candidate_set("pairs")]) == {"+".join(p) for p in combinations(task.genes, 2)}
    assert set(task.names[task.candidate_set("singles+doubles")]) == {*task.queries, *task.genes}
    assert set(task.names[task.candidate_set("doubles")]) == set(task.queries)


def test_a_double_without_one_of_its_singles_neither_asks_nor_answers():
    effects = toy_effects()
    keep = [i for i, c in enumerate(effects.conditions) if c != "T03"]
    conditions = tuple(effects.conditions[i] for i in keep)
    fewer = make_task(
        replace(effects, conditions=conditions, values=effects.values[keep], halves=None, fingerprint="")
    )
    assert fewer.left_out and all("T03" in double for double in fewer.left_out)
    assert not any("T03" in name for name in fewer.names)


def composed(task):
    i, j = task.candidates.T
    return np.where((i == j)[:, None], task.effects[i], task.effects[i] + task.effects[j])


def test_additive_is_the_cosine_with_the_sum(task):
    prototypes, everyone = composed(task), np.arange(len(task.queries))
    lengths = np.linalg.norm(task.values, axis=1)[:, None] * np.linalg.norm(prototypes, axis=1)
    additive = OPPONENT["additive"].score(task, everyone[:0], everyone)
    np.testing.assert_allclose(additive, task.values @ prototypes.T / lengths, atol=1e-12)
    table = judge(task, additive).query("candidates == 'pairs'")
    assert (
        table["exact_hit@1"].mean() == 1
        and table["mrr"].mean() == 1
        and (table["first"] == table["query"]).all()
    )


def test_whitening_is_that_of_the_whole_matrix(task):
    train, asked = np.arange(8), np.arange(8, 16)
    singles, doubles = task.effects, task.values[train]
    whole = singles.T @ singles / np.mean(np.sum(singles**2, 1)) + 3 * doubles.T @ doubles / np.mean(
        np.sum(doubles**2, 1)
    )
    values, vectors = np.linalg.eigh(whole + 0.3 * np.eye(len(whole)))
    root = vectors / np.sqrt(values) @ vectors.T
    i, j = task.candidates.T
    prototypes = (singles[i] + singles[j]) @ root
    queries = task.values[asked] @ root
    expected = (
        queries @ prototypes.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(prototypes, axis=1)
    )
    found = LEARNED.score(task, train, asked, ridge=0.3, doubles=3.0)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_without_a_ridge_it_is_the_sum_of_two_regression_coefficients(task):
    everyone = np.arange(len(task.queries))
    scores = LEARNED.score(task, everyone[:0], everyone, ridge=1e-9)[:, task.candidate_set("pairs")]
    coefficients = np.linalg.lstsq(task.effects.T, task.values.T, rcond=None)[0].T
    sums = coefficients[:, task.candidates[: scores.shape[1]]].sum(axis=2)
    np.testing.assert_array_equal(np.argsort(scores, axis=1)[:, -3:], np.argsort(sums, axis=1)[:, -3:])


def test_whitening_learns_what_doubles_have_in_common():
    """A direction that all doubles share, and no single, hides what they are made of until others show it."""
    effects = toy_effects(n_singles=16, n_doubles=40, n_genes=100, own=0.0, noise=0.3, seed=2)
    rng = np.random.default_rng(0)
    shared = (
        np.array([("+" in c) * rng.normal() for c in effects.conditions])[:, None]
        * 6
        * rng.normal(size=len(effects.genes))
    )
    task = make_task(replace(effects, values=effects.values + shared, halves=None, fingerprint=""))
    hits = {}
    for doubles in (0.0, 1.0):
        composer = replace(LEARNED, settings=({"ridge": 0.1, "doubles": doubles},))
        table = judge(task, nested_scores(task, composer, blocks=8).scores)
        hits[doubles] = table.query("candidates == 'pairs'")["exact_hit@1"].mean()
    assert hits[1.0] > hits[0.0] + 0.2


def test_dominance_is_found_and_used():
    task = make_task(toy_effects(dominance=(1.0, 0.3), noise=0.0))
    assert dominance(task, np.arange(8)) == pytest.approx((1.0, 0.3), abs=1e-9)
    assert dominance(task, np.arange(0)) == (1.0, 1.0)
    scores = OPPONENT["additive, scaled"].score(task, np.arange(8), np.arange(8, 12))
    np.testing.assert_allclose(scores[np.arange(4), task.true[8:12]], 1.0)


def test_own_targets_tell_all_under_no_mask_and_nothing_under_all_targets():
    effects, everyone = toy_effects(own=3.0), np.arange(16)
    own = OPPONENT["own targets"]
    task = make_task(effects, "none")
    assert (
        judge(task, own.score(task, everyone[:0], everyone))
        .query("candidates == 'pairs'")["exact_hit@1"]
        .mean()
        == 1
    )
    lowered = make_task(toy_effects(own=-3.0), "none")
    assert judge(lowered, own.score(lowered, everyone[:0], everyone))["exact_hit@1"].mean() == 1
    masked = make_task(effects, "all_targets")
    assert np.isnan(masked.own).all() and (own.score(masked, everyone[:0], everyone) == 0).all()


def test_reciprocal_ranks_of_the_choice_are_those_of_the_metric(task):
    scores = np.random.default_rng(0).integers(0, 30, (len(task.queries), len(task.candidates))).astype(float)
    found = expected_reciprocal_rank(scores[:, task.candidate_set("pairs")], task.true)
    np.testing.assert_allclose(found, judge(task, scores).query("candidates == 'pairs'")["mrr"])


def test_equal_scores_get_chance(task):
    table = judge(task, np.zeros((len(task.queries), len(task.candidates))))
    for which, part in table.groupby("candidates"):
        c = len(task.candidate_set(which))
        np.testing.assert_allclose(part["exact_hit@1"], 1 / c)
        np.testing.assert_allclose(part["rank"], (c + 1) / 2)
    pairs = table.query("candidates == 'pairs'")
    n = len(task.genes)
    np.testing.assert_allclose(pairs["both_genes@4"], 4 * 3 / (n * (n - 1)))


def test_both_genes_is_the_mean_over_orders_of_equals():
    scores = np.array([[3.0, 2, 2, 2, 1], [1, 1, 1, 1, 1], [5, 4, 3, 2, 2], [2, 2, 1, 1, 0]])
    members = np.array([[0, 2], [1, 3], [0, 4], [0, 3]])
    for k in (1, 2, 3, 4):
        expected = []
        for row, pair in zip(scores, members, strict=True):
            orders = [
                sorted(range(5), key=lambda gene, o=order, r=row: (-r[gene], o[gene]))
                for order in permutations(range(5))
            ]
            expected.append(np.mean([set(pair) <= set(order[:k]) for order in orders]))
        np.testing.assert_allclose(both_within(scores, members, k), expected, err_msg=str(k))


def test_interval_draws_genes_and_counts_a_double_by_both():
    members, values = np.array([[0, 1], [0, 2], [3, 4]]), np.array([[1.0, 2], [0, 0], [5, 1]])
    drawn = np.random.default_rng(3).multinomial(5, np.full(5, 0.2), 50)
    weights = [[draw[a] * draw[b] for a, b in members] for draw in drawn]
    means = [np.average(values, axis=0, weights=weight) for weight in weights if sum(weight)]
    mean, low, high = gene_interval(values, members, n_resamples=50, seed=3)
    np.testing.assert_allclose(mean, [2, 1])
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0))
    assert np.isnan(gene_interval([1.0], np.array([[0, 1]]))[1]).all()


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_interval_covers_where_doubles_share_genes(spread):
    """Whatever a gene adds to its doubles, intervals of nominal 95% hold the truth."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        pairs = np.array(list(combinations(range(25), 2)))
        members = pairs[rng.permutation(len(pairs))[:50]]
        gene = spread * rng.normal(size=25)
        values = gene[members].sum(axis=1) + rng.normal(size=50)
        _, low, high = gene_interval(values, members, n_resamples=300)
        held += low[0] <= 0 <= high[0]
    assert held / 400 >= 0.93


def spy(log):
    def score(task, train, queries, *, way=0):
        log.append((set(train.tolist()), set(queries.tolist()), way))
        return np.random.default_rng(way).random((len(queries), len(task.candidates)))

    return Composer("spy", "records what it is given", score, ({"way": 0}, {"way": 1}), learns=True)


def test_no_fit_sees_a_gene_of_what_it_scores(task):
    log = []
    nested = nested_scores(task, spy(log), blocks=6)
    block = deal(task.genes, 6)
    assert any(train for train, _, _ in log) and nested.scores.shape == (
        len(task.queries),
        len(task.candidates),
    )
    for train, asked, _ in log:
        seen = {gene for q in train for gene in task.members[q]}
        judged = {gene for q in asked for gene in task.members[q]}
        assert not seen & judged and not {block[g] for g in seen} & {block[g] for g in judged}


def test_neither_fit_nor_setting_of_a_double_depends_on_doubles_that_share_its_genes(task):
    """Other values of such doubles change nothing of how it is scored; those of others do."""

    def score(task, train, queries, *, way):
        # Noise that hangs on all that is learned from, and a setting that suits some doubles by their own values.
        rng = np.random.default_rng(int(1e6 * np.abs(task.values[train]).sum()))
        scores = rng.random((len(queries), len(task.candidates)))
        suited = (task.values[queries].sum(axis=1) > 0) == (way > 0)
        scores[np.flatnonzero(suited), task.true[queries][suited]] += 1
        return scores

    composer = Composer("chance", "", score, tuple({"way": way} for way in (0.0, 1.0)), learns=True)
    before = nested_scores(task, composer, blocks=10)
    for q in (0, 5, 9):
        related = np.isin(task.members, task.members[q]).any(axis=1)
        related[q] = False
        after = nested_scores(replace(task, values=task.values - 3 * related[:, None]), composer, blocks=10)
        assert after.chosen[q] == before.chosen[q]
        np.testing.assert_array_equal(after.scores[q], before.scores[q])
        after = nested_scores(replace(task, values=task.values - 3 * ~related[:, None]), composer, blocks=10)
        assert (after.scores[q] != before.scores[q]).any()


def test_the_setting_with_the_best_mrr_on_other_doubles_is_chosen(task):
    def score(task, train, queries, *, right):
        scores = np.zeros((len(queries), len(task.candidates)))
        scores[np.arange(len(queries)), task.true[queries]] = float(right)
        return scores

    composer = Composer("oracle", "", score, ({"right": False}, {"right": True}))
    assert nested_scores(task, composer).chosen == ({"right": True},) * len(task.queries)


def test_comparison_averages_dealings_and_pairs_differences_by_double(task):
    spied = replace(spy([]), name="random")
    table, chosen = compare(task, (OPPONENT["additive"], spied, OPPONENT["own targets"]), seeds=(0, 1))
    assert set(table["method"]) == {"chance", "additive", "random"} and len(table) == 9 * len(task.queries)
    assert chosen["doubles"].sum() == 2 * len(task.queries) and set(chosen["method"]) == {"random"}
    summary, gains = summarise(task, table), differences(task, table)
    rows = summary.set_index(["method", "candidates", "metric"])["estimate"]
    gain = gains.set_index(["method", "candidates", "metric"]).loc[("random", "pairs", "mrr")]
    assert gain["difference"] == pytest.approx(
        rows["random", "pairs", "mrr"] - rows["additive", "pairs", "mrr"]
    )
    assert gain["gained"] - gain["lost"] == pytest.approx(gain["difference"] * len(task.queries))
    assert rows["chance", "pairs", "exact_hit@1"] == pytest.approx(1 / 45)


def test_shared_genes_are_those_that_it_says_and_all_learn_from_equally_many(task):
    log = []
    table = by_shared_genes(task, spy(log), {"way": 0})
    assert set(table["shared"]) == {0, 1, 2} and len(log) == 4 * table["query"].nunique() > 0
    for number, (train, (q,), _) in enumerate((train, tuple(asked), way) for train, asked, way in log):
        shared = {gene for other in train for gene in task.members[other]} & set(task.members[q].tolist())
        assert len(shared) == (2, 1, 1, 0)[number % 4] and q not in train
        assert len(train) == len(task.without(task.members[q]))
