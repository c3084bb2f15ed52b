"""The Bayes ceiling is exact, calibrated and not exceeded."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from scipy.special import logsumexp, softmax
from scipy.stats import nbinom

from perturbret.data.conditions import CTRL, targets
from perturbret.data.masking import POLICIES, mask_counts, mask_totals
from perturbret.data.prepared import Cells, prepare
from perturbret.data.simulate import Truth, simulate_screen
from perturbret.data.splits import make_split
from perturbret.encoders.base import load_encoder
from perturbret.encoders.bayes import (
    bayes_log_posterior,
    expected_hits,
    fit_bayes,
    load,
    pooled_log_posterior,
)
from perturbret.evaluation.scoring import score_queries


def truth_of(means, changes, *, prior, unresponsive=0.0, dispersion=1e-9, genes=None):
    """A truth with one guide and one batch; by default as good as Poisson."""
    changes = np.asarray(changes, float)
    n_conditions, n_genes = changes.shape
    genes = [f"G{i}" for i in range(n_genes)] if genes is None else genes
    return Truth(
        genes=np.array(genes),
        conditions=tuple("ABCDEF"[:n_conditions]),
        batches=("batch1",),
        means=np.atleast_2d(np.asarray(means, float)),
        dispersion=np.full(n_genes, dispersion),
        log_fold_changes=changes[:, None, :],
        guide_weights=np.ones((n_conditions, 1)),
        targets=(),
        efficacies=np.ones((0, 1)),
        unresponsive=np.full(n_conditions, unresponsive),
        prior=np.asarray(prior, float),
        interactions={},
        reference_exposure=1000.0,
        cells=pd.DataFrame(),
    )


def seen(counts, exposure=1000.0):
    """Counts and totals as an encoder sees them."""
    counts = np.atleast_2d(np.asarray(counts, np.float32))
    return csr_matrix(counts), counts.sum(axis=1) + np.asarray(exposure, float)


def masked(screen, mask):
    place = {symbol: i for i, symbol in enumerate(screen.genes)}
    columns = {c: np.array([place[t] for t in targets(c) if t in place], int) for c in screen.conditions}
    labels = screen.obs["condition"].to_numpy(str)
    counts = mask_counts(screen.counts, labels, columns, mask)
    totals = mask_totals(screen.obs["total"].to_numpy(), screen.counts, counts)
    return counts, totals, {"batch": screen.obs["batch"].to_numpy(str), "mask": mask, "columns": columns}


def perturbed(screen):
    labels = screen.obs["condition"].to_numpy(str)
    rows = np.flatnonzero(labels != CTRL)
    return rows, np.searchsorted(screen.truth.conditions, labels[rows])


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(
        n_singles=8,
        n_doubles=4,
        n_genes=60,
        cells_per_condition=300,
        depth=100.0,
        measured_targets=1.0,
        seed=2,
    )


@pytest.fixture(scope="module")
def posteriors(screen):
    """Per mask policy, log posterior of all perturbed cells."""
    rows, _ = perturbed(screen)
    found = {}
    for mask in POLICIES:
        counts, totals, how = masked(screen, mask)
        found[mask] = bayes_log_posterior(screen.truth, counts, totals, **how)[rows]
    return found


def test_two_poisson_conditions_by_hand():
    # Means 2 and 4 at the reference, prior 3 : 1. Log odds of A to B: log 3 - x log 2 + 2 s.
    truth = truth_of([2.0], [[0.0], [np.log(2)]], prior=[0.75, 0.25])
    x = np.array([[0], [1], [3], [9]])
    for scale in (1.0, 0.5):
        posterior = bayes_log_posterior(truth, *seen(x, 1000 * scale))
        odds = np.log(3) - x[:, 0] * np.log(2) + 2 * scale
        np.testing.assert_allclose(posterior[:, 0] - posterior[:, 1], odds, atol=1e-6)
        np.testing.assert_allclose(np.exp(posterior).sum(axis=1), 1)


def test_unresponsive_cells_by_hand():
    # One count, means 1 and e, half unresponsive: p(1|B) / p(1|A) = (1 + e * exp(1 - e)) / 2.
    truth = truth_of([1.0], [[0.0], [1.0]], prior=[0.5, 0.5], unresponsive=0.5)
    posterior = np.exp(bayes_log_posterior(truth, *seen([1])))
    ratio = (1 + np.e * np.exp(1 - np.e)) / 2
    np.testing.assert_allclose(posterior[0], [1 / (1 + ratio), ratio / (1 + ratio)], atol=1e-6)


def test_own_target_zeros_by_hand():
    # Nobody has an effect. Gene 0 (mean 2) is the target of A, gene 1 (mean 1) of B: a zero at gene 0 is sure
    # under A and has probability exp(-2) otherwise; a count excludes A.
    truth = truth_of([2.0, 1.0, 5.0], np.zeros((3, 3)), prior=np.full(3, 1 / 3))
    how = {"mask": "own_targets", "columns": {"A": np.array([0]), "B": np.array([1]), "C": np.array([], int)}}
    posterior = np.exp(bayes_log_posterior(truth, *seen([[0, 0, 4], [3, 0, 4], [0, 1, 4], [1, 1, 0]]), **how))
    both = np.array([np.exp(2), np.exp(1), 1.0])
    expected = [both / both.sum(), [0, np.e / (np.e + 1), 1 / (np.e + 1)], [np.exp(2) / (np.exp(2) + 1), 0]]
    expected[2] = [*expected[2], 1 / (np.exp(2) + 1)]
    np.testing.assert_allclose(posterior, [*expected, [0, 0, 1]], atol=1e-6)


def test_excluded_candidates_rank_below_the_unlikeliest():
    # B is next to impossible (log-likelihood ratio about -4000), yet A cannot be.
    truth = truth_of([10.0, 1000.0], [[0.0, 0.0], [0.0, 2.0]], prior=[0.5, 0.5])
    how = {"mask": "own_targets", "columns": {"A": np.array([0]), "B": np.array([], int)}}
    posterior = np.exp(bayes_log_posterior(truth, *seen([5, 1000]), **how))
    np.testing.assert_allclose(posterior, [[0, 1]])


@pytest.mark.parametrize("mask", POLICIES)
def test_equals_the_brute_force_mixture(mask):
    screen = simulate_screen(
        n_singles=4,
        n_doubles=2,
        n_genes=12,
        cells_per_condition=6,
        n_control=4,
        measured_targets=0.8,
        depth=30.0,
    )
    truth, (counts, totals, how) = screen.truth, masked(screen, mask)
    x = counts.toarray()
    scale = (totals - x.sum(axis=1)) / truth.reference_exposure
    zeroed = {c: how["columns"][c] for c in truth.conditions}
    if mask != "own_targets":
        all_of_them = np.unique(np.concatenate(list(zeroed.values())))
        zeroed = dict.fromkeys(zeroed, all_of_them if mask == "all_targets" else np.array([], int))
    expected = np.empty((len(x), len(truth.conditions)))
    for i in range(len(x)):
        base = scale[i] * truth.means[truth.batches.index(how["batch"][i])]
        for c, condition in enumerate(truth.conditions):
            visible = np.setdiff1d(np.arange(12), zeroed[condition])
            terms = []
            parts = [(np.zeros(12), truth.unresponsive[c])]
            for j in range(2):
                weight = truth.guide_weights[c, j] * (1 - truth.unresponsive[c])
                parts.append((truth.log_fold_changes[c, j], weight))
            for change, weight in parts:
                size = 1 / truth.dispersion
                p = size / (size + base * np.exp(change))
                terms.append(np.log(weight) + nbinom.logpmf(x[i], size, p)[visible].sum())
            expected[i, c] = logsumexp(terms) if not x[i, zeroed[condition]].any() else -np.inf
    expected += np.log(truth.prior)
    expected -= logsumexp(expected, axis=1, keepdims=True)
    got = bayes_log_posterior(truth, counts, totals, **how)
    np.testing.assert_allclose(np.exp(got), np.exp(expected), atol=1e-10)
    if mask == "own_targets":
        assert np.isinf(expected).any()


@pytest.mark.parametrize("mask", POLICIES)
def test_calibrated(screen, posteriors, mask):
    probability, (_, true) = np.exp(posteriors[mask]), perturbed(screen)
    n = len(true)
    hit = probability.argmax(axis=1) == true
    error = np.sqrt((probability.max(axis=1) * (1 - probability.max(axis=1))).sum()) / n
    assert abs(hit.mean() - probability.max(axis=1).mean()) < 3.5 * error
    # The true class is a draw from the posterior: its mean probability is that of a second draw.
    of_true = probability[np.arange(n), true] - (probability**2).sum(axis=1)
    assert abs(of_true.mean()) < 3.5 * of_true.std() / np.sqrt(n)
    for c in range(probability.shape[1]):
        spread = np.sqrt((probability[:, c] * (1 - probability[:, c])).sum()) / n
        assert abs(probability[:, c].mean() - (true == c).mean()) < 4 * spread
    for low, high in [(0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.01)]:
        said = (probability >= low) & (probability < high)
        happened = np.eye(probability.shape[1])[true][said]
        p = probability[said]
        assert said.sum() > 20
        assert abs(happened.mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).sum()) / said.sum()


def test_own_target_zeros_raise_the_ceiling_over_what_expression_without_targets_tells(posteriors):
    ceiling = {mask: expected_hits(p, ks=(1,)).mean() for mask, p in posteriors.items()}
    assert ceiling["own_targets"] > ceiling["all_targets"] + 0.05
    assert ceiling["none"] > ceiling["all_targets"] + 0.05


def test_no_estimator_exceeds_the_ceiling():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.linear_model import LogisticRegression

    screen = simulate_screen(
        n_singles=4, n_doubles=2, n_genes=30, cells_per_condition=1500, depth=60.0, seed=1
    )
    rows, true = perturbed(screen)
    counts, totals, how = masked(screen, "all_targets")
    best = np.exp(bayes_log_posterior(screen.truth, counts, totals, **how))[rows]
    x = counts.toarray()[rows]
    exposure = totals[rows] - x.sum(axis=1)
    batch = (how["batch"][rows] == "batch2")[:, None]
    features = np.hstack([np.log1p(x / exposure[:, None] * 1e4), np.log(exposure)[:, None] - 9.5, batch])
    train, test = np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)
    optimal = best[test].argmax(axis=1) == true[test]
    for model in (LinearDiscriminantAnalysis(), LogisticRegression(max_iter=300)):
        hit = model.fit(features[train], true[train]).predict(features[test]) == true[test]
        gap = optimal.astype(float) - hit
        assert gap.mean() > -2 * gap.std() / np.sqrt(len(test))
        # A bound that nothing comes near would be no evidence either.
        assert hit.mean() > optimal.mean() - 0.1


@pytest.mark.parametrize("mask", ["none", "all_targets"])
def test_null_screens_leave_the_prior(mask):
    screen = simulate_screen(n_singles=5, n_doubles=2, n_genes=40, cells_per_condition=10, null=True)
    counts, totals, how = masked(screen, mask)
    posterior = bayes_log_posterior(screen.truth, counts, totals, **how)
    np.testing.assert_allclose(
        np.exp(posterior), np.tile(screen.truth.prior, (len(posterior), 1)), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(expected_hits(posterior, ks=(1,)), screen.truth.prior.max())


def test_null_screens_leak_the_label_under_own_targets():
    screen = simulate_screen(
        n_singles=5, n_doubles=2, n_genes=40, cells_per_condition=40, null=True, depth=200.0
    )
    rows, true = perturbed(screen)
    counts, totals, how = masked(screen, "own_targets")
    posterior = bayes_log_posterior(screen.truth, counts, totals, **how)[rows]
    assert (posterior.argmax(axis=1) == true).mean() > screen.truth.prior.max() + 0.1


def test_gene_order_does_not_matter(screen):
    counts, totals, how = masked(screen, "own_targets")
    order = np.random.default_rng(0).permutation(screen.n_genes)
    back = np.argsort(order)
    moved = {**how, "columns": {c: back[columns] for c, columns in how["columns"].items()}}
    one = bayes_log_posterior(screen.truth, counts, totals, **how)
    two = bayes_log_posterior(screen.truth, counts[:, order], totals, genes=screen.genes[order], **moved)
    np.testing.assert_allclose(np.exp(one), np.exp(two), atol=1e-10)


def test_genes_without_effect_change_nothing(screen):
    truth = truth_of([2.0, 3.0], [[0.5, 0.0], [-0.5, 0.0]], prior=[0.5, 0.5], dispersion=0.3)
    posterior = bayes_log_posterior(truth, *seen([[1, 0], [1, 7]]))
    np.testing.assert_array_equal(posterior[0], posterior[1])


def test_candidates_are_a_choice_among_the_conditions(screen, posteriors):
    rows, _ = perturbed(screen)
    counts, totals, how = masked(screen, "none")
    chosen = [screen.truth.conditions[i] for i in (5, 0, 3)]
    few = bayes_log_posterior(screen.truth, counts, totals, candidates=chosen, **how)[rows]
    expected = posteriors["none"][:, [5, 0, 3]]
    np.testing.assert_allclose(few, expected - logsumexp(expected, axis=1, keepdims=True), atol=1e-9)


def prepared_from(screen, mask, *, permute=False):
    split = make_split(screen.obs, seed=0)
    conditions = None
    if permute:
        labels, rng = screen.obs["condition"].to_numpy(str).copy(), np.random.default_rng(0)
        roles = split.roles.reindex(screen.obs.index).to_numpy(str)
        for role in np.unique(roles):
            rows = np.flatnonzero((roles == role) & (labels != CTRL))
            labels[rows] = labels[rng.permutation(rows)]
        conditions = labels
    return prepare(screen, split, mask=mask, conditions=conditions)


@pytest.mark.parametrize("mask", POLICIES)
def test_encoder_gives_the_posterior(screen, posteriors, mask):
    prepared = prepared_from(screen, mask)
    encoder = fit_bayes(prepared)
    rows, _ = perturbed(screen)
    embeddings = encoder.embed(prepared.cells.take(rows))
    assert encoder.kind == "bayes_ceiling" and encoder.classes == prepared.candidates
    assert encoder.context == prepared.context
    assert embeddings.dtype == np.float32 and embeddings.shape == (len(rows), 12)
    assert np.isfinite(embeddings).all()
    got = np.exp(encoder.log_proba(embeddings))
    np.testing.assert_allclose(got, np.exp(posteriors[mask]), atol=1e-5)


def test_embedding_of_a_cell_does_not_depend_on_the_others(screen):
    cells = prepared_from(screen, "own_targets").cells
    encoder = fit_bayes(prepared_from(screen, "own_targets"))
    order = np.random.default_rng(0).permutation(len(cells))[:50]
    np.testing.assert_allclose(encoder.embed(cells.take(order)), encoder.embed(cells)[order], rtol=1e-5)
    assert encoder.embed(cells.take(order[:0])).shape == (0, 12)


def test_many_cells_are_done_in_parts(screen):
    # About 40,000 cells in each batch, of 60 genes, are more than one part holds.
    cells = prepared_from(screen, "all_targets").cells
    encoder = fit_bayes(prepared_from(screen, "all_targets"))
    often = np.tile(np.arange(50), 1600)
    np.testing.assert_allclose(
        encoder.embed(cells.take(often)),
        np.tile(encoder.embed(cells.take(np.arange(50))), (1600, 1)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("mask", ["none", "all_targets"])
def test_permuted_labels_leave_the_prior(screen, mask):
    prepared = prepared_from(screen, mask, permute=True)
    encoder = fit_bayes(prepared)
    embeddings = encoder.embed(prepared.cells)
    # To the bit, so that ties are ties and rank as chance.
    assert (embeddings == embeddings[:, :1]).all()
    np.testing.assert_allclose(softmax(encoder.log_prior), screen.truth.prior)


def test_permuted_labels_under_own_targets_mix_all_conditions(screen):
    encoder = fit_bayes(prepared_from(screen, "own_targets", permute=True))
    drawn = fit_bayes(prepared_from(screen, "own_targets"))
    cells = prepared_from(screen, "own_targets", permute=True).cells.take(np.arange(2000))
    got = encoder.log_likelihood(cells.counts, cells.totals, cells.batch)
    for c in range(len(encoder.classes)):
        zeroed = replace(drawn, own=np.tile(drawn.own[c], (len(drawn.classes), 1)))
        expected = logsumexp(
            zeroed.log_likelihood(cells.counts, cells.totals, cells.batch) + drawn.log_prior, axis=1
        )
        possible = ~(cells.counts[:, np.flatnonzero(drawn.own[c])].toarray() > 0).any(axis=1)
        assert possible.sum() > 100
        np.testing.assert_allclose(got[possible, c], expected[possible], atol=1e-8)


def test_permuted_labels_under_own_targets_are_calibrated_leak(screen):
    prepared = prepared_from(screen, "own_targets", permute=True)
    rows = np.flatnonzero(prepared.conditions != CTRL)
    encoder = fit_bayes(prepared)
    probability = np.exp(encoder.log_proba(encoder.embed(prepared.cells.take(rows))))
    true = np.searchsorted(encoder.classes, prepared.conditions[rows])
    top = probability.max(axis=1)
    hit = probability.argmax(axis=1) == true
    assert abs(hit.mean() - top.mean()) < 3.5 * np.sqrt((top * (1 - top)).sum()) / len(top)
    assert hit.mean() > screen.truth.prior.max() + 0.1


def test_save_and_load_are_exact(screen, tmp_path):
    prepared = prepared_from(screen, "own_targets")
    encoder = fit_bayes(prepared)
    encoder.save(tmp_path / "encoder")
    loaded = load_encoder(tmp_path)
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["encoder.json", "weights.safetensors"]
    assert (loaded.classes, loaded.batches, loaded.context) == (
        encoder.classes,
        encoder.batches,
        encoder.context,
    )
    one, two = encoder.embed(prepared.cells), loaded.embed(prepared.cells)
    assert one.tobytes() == two.tobytes()
    assert encoder.log_proba(one).tobytes() == loaded.log_proba(two).tobytes()


def test_load_refuses_another_format(tmp_path):
    (tmp_path / "encoder.json").write_text('{"format": "linear"}')
    with pytest.raises(ValueError, match="expected format 'encoders.bayes', got 'linear'"):
        load(tmp_path)


def test_pooled_cells_by_hand():
    # Two Poisson cells of the same condition are one with twice the exposure.
    truth = truth_of([2.0], [[0.0], [np.log(2)]], prior=[0.75, 0.25])
    encoder_prior = np.log(truth.prior)
    counts, totals = seen([[1], [4]])
    singles = bayes_log_posterior(truth, counts, totals) - encoder_prior
    pooled = pooled_log_posterior(singles, [np.array([0, 1])], encoder_prior)
    np.testing.assert_allclose(pooled, bayes_log_posterior(truth, *seen([5], 2000.0)), atol=1e-6)


def test_pooling_is_calibrated_and_helps(screen):
    prepared = prepared_from(screen, "all_targets")
    encoder = fit_bayes(prepared)
    likelihood = encoder.embed(prepared.cells)
    groups = [np.flatnonzero(prepared.conditions == c)[:210].reshape(-1, 5) for c in encoder.classes]
    true = np.repeat(np.arange(12), [len(group) for group in groups])
    uniform = np.log(np.bincount(true) / len(true))
    probability = np.exp(pooled_log_posterior(likelihood, list(np.concatenate(groups)), uniform))
    top, hit = probability.max(axis=1), probability.argmax(axis=1) == true
    assert abs(hit.mean() - top.mean()) < 3.5 * np.sqrt((top * (1 - top)).sum()) / len(top)
    assert hit.mean() > 0.2 + expected_hits(encoder.log_proba(likelihood), ks=(1,)).mean()


def test_every_read_out_works_on_the_ceiling(screen):
    prepared = prepared_from(screen, "all_targets")
    found = {}
    options = {"libraries": ("mean",), "query_sizes": (1, 10), "poolings": ("scores", "embeddings")}
    scorings = ("cosine", "whitened", "classifier", "classifier_corrected")
    options |= {"scorings": scorings, "role": "query", "candidates": "train", "seed": 0}
    for scored in score_queries(fit_bayes(prepared), prepared, **options):
        assert np.isfinite(scored.scores).all()
        true = np.searchsorted(prepared.candidates, scored.queries.conditions)
        hit = scored.scores.argmax(axis=1) == true
        found[scored.scoring, scored.queries.size, scored.pooling] = hit.mean()
    assert len(found) == 12
    best = found["classifier", 1, "single"]
    assert best >= max(found[scoring, 1, "single"] for scoring in scorings) - 0.02
    # The exact rule for pools of equally frequent conditions, by either way of pooling.
    exact = found["classifier_corrected", 10, "scores"]
    assert exact == found["classifier_corrected", 10, "embeddings"] > best + 0.2


def test_every_read_out_works_where_nothing_has_an_effect():
    screen = simulate_screen(
        n_singles=4, n_doubles=1, n_genes=30, cells_per_condition=20, measured_targets=1.0, null=True
    )
    for mask in POLICIES:
        prepared = prepared_from(screen, mask)
        options = {"libraries": ("mean",), "query_sizes": (1,), "poolings": ("scores",)}
        options |= {"scorings": ("cosine", "whitened", "classifier"), "role": "query"}
        readouts = score_queries(fit_bayes(prepared), prepared, candidates="train", seed=0, **options)
        assert all(np.isfinite(scored.scores).all() for scored in readouts)


def test_expected_hits_by_hand():
    posterior = np.log([[0.2, 0.5, 0.3], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(expected_hits(posterior, ks=(1, 2, 5)), [[0.5, 0.8, 1], [1 / 3, 2 / 3, 1]])


def test_wrong_input_is_named(screen):
    counts, totals, how = masked(screen, "none")
    truth = screen.truth
    for change, message in [
        ({"mask": "some"}, "mask: expected one of .*, got 'some'"),
        ({"mask": "own_targets", "columns": None}, "columns: expected target columns .*, got None"),
        ({"candidates": ["nobody"]}, "candidates: expected conditions of the simulated screen, got 'nobody'"),
        ({"batch": None}, "batch: expected one of .*batch1.*, got None"),
        ({"batch": np.full(len(totals), "batch9")}, "batch: expected one of .*, got 'batch9'"),
        ({"genes": np.array(["x", "y"])}, "genes: expected the 60 of the simulated screen, got 2 others"),
    ]:
        with pytest.raises(ValueError, match=message):
            bayes_log_posterior(truth, counts, totals, **{**how, **change})
    with pytest.raises(ValueError, match="counts: expected 60 columns, got 59"):
        bayes_log_posterior(truth, counts[:, 1:], totals, batch=how["batch"])
    with pytest.raises(ValueError, match="totals: expected above the row sums"):
        bayes_log_posterior(truth, counts, np.zeros(len(totals)), batch=how["batch"])


def test_only_simulated_screens_have_a_ceiling(screen):
    prepared = prepared_from(screen, "none")
    with pytest.raises(ValueError, match="expected the truth of a simulated screen, got NoneType"):
        fit_bayes(replace(prepared, truth=None))
    other = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=2, n_genes=60)
    with pytest.raises(ValueError, match="expected cells of the simulated screen, got 'cell"):
        fit_bayes(replace(prepared, truth=other.truth))


def test_pseudobulks_of_summed_counts_embed_too(screen):
    prepared = prepared_from(screen, "none")
    pools = prepared.cells.pool([np.arange(5), np.arange(5, 15)])
    assert isinstance(pools, Cells)
    assert np.isfinite(fit_bayes(prepared).embed(pools)).all()
