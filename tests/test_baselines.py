"""The simple opponents: right by hand or by scikit-learn, chosen on validation, blind to what they may not see."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from scipy.sparse import csr_matrix
from toy import reordered, toy_cells

from perturbret.data.conditions import CTRL
from perturbret.data.datasets import load_screen
from perturbret.data.prepared import prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split
from perturbret.encoders import linear, methods, mlp, trees
from perturbret.encoders import trivial as references
from perturbret.encoders.base import Average, depth, load_encoder, log1p
from perturbret.encoders.baselines import KINDS, SEARCH, fit_baseline
from perturbret.evaluation.judge import evaluate, null_control
from perturbret.evaluation.nulls import permute_conditions

FITTED = [kind for kind in SEARCH if kind != "obsm"] + ["obsm:X_a"]
STRONG = ["lda_low_rank", "knn", "naive_bayes", "mlp_x5", "extra_trees", "boosted_trees", "average"]
# Smaller searches where the default takes seconds.
SMALL = {
    "mlp_x5": {"hidden": [16, 32], "weight_decay": [0.1], "members": [3]},
    "extra_trees": {"n_trees": [80], "min_samples_leaf": [10, 3], "max_features": [0.2]},
    "boosted_trees": {"n_rounds": [3, 6], "max_leaves": [4]},
    "average": {"methods": ["logreg+lda_low_rank", "lda_low_rank+mlp"]},
}
PARAMS = Path(__file__).resolve().parents[1] / "params"


@pytest.fixture(scope="module")
def screen():
    made = simulate_screen(n_singles=6, n_doubles=2, cells_per_condition=60, n_control=60, n_genes=60, seed=1)
    noisy = np.random.default_rng(0).normal(size=(made.n_cells, 4)) * [1, 5, 0.1, 0] + [0, 9, 0, 0]
    return replace(made, obsm={"X_a": noisy})


@pytest.fixture(scope="module")
def prepared(screen):
    return prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")


@pytest.fixture(scope="module")
def fits(prepared):
    return {kind: fit(kind, prepared) for kind in FITTED}


def fit(kind, prepared, **options):
    return fit_baseline(kind, prepared, seed=0, search=SMALL.get(kind), **options)


def weights(encoder):
    """All tensors that it saves."""
    with TemporaryDirectory() as directory:
        encoder.save(Path(directory) / "encoder")
        files = sorted(Path(directory).rglob("*.safetensors"))
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def dense(prepared, role):
    return log1p(prepared.cells.take(prepared.where(role)), 10_000).toarray().astype(float)


def with_counts(prepared, rows, counts):
    new = prepared.cells.counts.tolil(copy=True)
    new[rows] = counts
    return replace(prepared, cells=replace(prepared.cells, counts=csr_matrix(new)))


@pytest.mark.parametrize("kind", FITTED)
def test_each_kind_is_saved_and_loaded_without_loss(kind, fits, prepared, tmp_path):
    encoder = fits[kind].encoder
    encoder.save(tmp_path / "encoder")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    loaded = load_encoder(tmp_path)
    embeddings = encoder.embed(prepared.cells)
    assert embeddings.ndim == 2 and np.isfinite(embeddings).all()
    assert loaded.embed(prepared.cells).tobytes() == embeddings.tobytes()
    assert loaded.settings == encoder.settings and loaded.context == prepared.context
    assert loaded.classes == prepared.candidates
    if encoder.head is not None:
        log_proba = loaded.log_proba(embeddings)
        assert log_proba.tobytes() == encoder.log_proba(embeddings).tobytes()
        np.testing.assert_allclose(np.exp(log_proba).sum(axis=1), 1)


@pytest.mark.parametrize("kind", FITTED)
def test_chosen_settings_fit_the_same_encoder_again(kind, fits, prepared):
    again = fit_baseline(kind, prepared, seed=0, fixed=fits[kind].chosen)
    assert weights(again.encoder) == weights(fits[kind].encoder)
    assert again.chosen == fits[kind].chosen and again.encoder.settings == fits[kind].encoder.settings
    assert again.selection["chosen"].tolist() == [True]


@pytest.mark.parametrize("kind", FITTED)
def test_query_cells_leave_no_trace(kind, fits, prepared):
    rows = prepared.where("query", controls=True)
    shuffled = prepared.cells.counts[np.random.default_rng(0).permutation(rows)]
    changed = with_counts(prepared, rows, shuffled)
    changed.cells.totals[:] = prepared.cells.totals
    labels = prepared.conditions.copy()
    labels[rows] = np.random.default_rng(1).permutation(labels[rows])
    other = fit(kind, replace(changed, conditions=labels))
    assert weights(other.encoder) == weights(fits[kind].encoder)
    assert other.selection.equals(fits[kind].selection)


@pytest.mark.parametrize("kind", FITTED)
def test_validation_cells_choose_and_do_not_fit(kind, fits, prepared):
    rows = prepared.where("val", controls=True)
    labels = prepared.conditions.copy()
    labels[rows] = np.random.default_rng(1).permutation(labels[rows])
    other = fit_baseline(kind, replace(prepared, conditions=labels), seed=0, fixed=fits[kind].chosen)
    assert weights(other.encoder) == weights(fits[kind].encoder)


@pytest.mark.parametrize("kind", FITTED)
def test_the_order_of_cells_does_not_matter(kind, fits, prepared):
    order = np.random.default_rng(0).permutation(len(prepared.conditions))
    other = fit(kind, reordered(prepared, order))
    assert weights(other.encoder) == weights(fits[kind].encoder)


@pytest.mark.parametrize(
    "kind", ["pca", "lda", "lda_low_rank", "naive_bayes", "logreg", "mlp", "obsm:X_a", "target_activation"]
)
def test_the_best_on_validation_is_chosen_as_evaluation_sees_it(kind, fits, prepared):
    fitted = fits[kind]
    table = fitted.selection
    assert len(table) > 1 and table["chosen"].sum() == 1
    assert table["chosen"].to_numpy().argmax() == table["exact_hit@1"].round(9).to_numpy().argmax()
    scores = evaluate(fitted.encoder, prepared, role="val", libraries=("mean",), query_sizes=(1,))
    reached = scores[scores["scoring"] != "classifier_corrected"].groupby("scoring")["exact_hit@1"].mean()
    chosen = table[table["chosen"]].iloc[0]
    assert reached[chosen["readout"]] == pytest.approx(chosen["exact_hit@1"], abs=1e-12)
    assert reached.max() == pytest.approx(chosen["exact_hit@1"], abs=1e-12)
    assert {key: chosen[key] for key in fitted.chosen} == fitted.chosen


@pytest.mark.parametrize("kind", ["knn", "boosted_trees", "average"])
def test_what_knows_its_training_cells_is_chosen_by_class_probabilities(kind, fits, prepared):
    table = fits[kind].selection
    assert len(table) > 1 and table["chosen"].sum() == 1 and set(table["readout"]) == {"classifier"}
    scores = evaluate(fits[kind].encoder, prepared, role="val", query_sizes=(1,), scorings=("classifier",))
    assert scores["exact_hit@1"].mean() == pytest.approx(
        table.loc[table["chosen"], "exact_hit@1"].item(), abs=1e-12
    )


@pytest.fixture(scope="module")
def plain():
    """A screen whose effects every honest method finds."""
    return simulate_screen(
        n_singles=5,
        n_doubles=0,
        n_genes=40,
        cells_per_condition=60,
        n_control=0,
        n_batches=1,
        effect=3.0,
        unresponsive=0.0,
        seed=0,
    )


@pytest.mark.parametrize("kind", STRONG)
def test_signal_is_found_and_permuted_labels_give_luck(kind, plain):
    split = make_split(plain.obs, seed=0)
    real = prepare(plain, split, mask="all_targets")
    fitted = fit(kind, real)
    hits = evaluate(fitted.encoder, real, query_sizes=(1,), scorings=("classifier",))["exact_hit@1"]
    assert hits.mean() > 1 / len(real.candidates) + 4 * hits.std() / np.sqrt(len(hits))
    permuted = permute_conditions(real.conditions, real.roles, seed=0)
    null = prepare(plain, split, mask="all_targets", conditions=permuted)
    twin = fit_baseline(kind, null, seed=0, fixed=fitted.chosen).encoder
    assert null_control(twin, null, scorings=("classifier",))["p_value"].min() > 0.05


def test_the_first_of_equals_is_chosen(prepared):
    # Target columns are masked: both signs give every cell the same scores.
    fitted = fit_baseline("target_activation", prepared, seed=0, search={"sign": [-1, 1]})
    assert fitted.chosen["sign"] == -1 and fitted.selection["exact_hit@1"].nunique() == 1


def test_a_search_replaces_the_default_values_it_names(prepared):
    fitted = fit_baseline("pca", prepared, seed=0, search={"n_components": [3, 5]})
    assert fitted.selection["n_components"].tolist() == [3, 5]
    assert fitted.selection["target_sum"].tolist() == SEARCH["pca"]["target_sum"] * 2


@pytest.fixture
def toy():
    """Two conditions of 3 and 1 training cells and 2 controls; 2 batches; genes: two targets and another."""
    labels = ["A", "A", "A", "B", CTRL, CTRL, "A", "B"]
    roles = ["train"] * 6 + ["val"] * 2
    counts = [[6, 0, 1], [6, 0, 3], [6, 1, 1], [0, 1, 9], [2, 0, 1], [4, 0, 1], [6, 0, 1], [0, 2, 2]]
    made = toy_cells(labels, roles, counts=counts, batch=["x", "x", "y", "y", "x", "y", "x", "z"])
    return replace(made, columns={"A": np.array([0]), "B": np.array([], int)})


def test_prior_says_the_shares_of_the_classes(toy):
    encoder = fit_baseline("prior", toy, seed=0).encoder
    found = encoder.log_proba(encoder.embed(toy.cells))
    np.testing.assert_allclose(np.exp(found), np.tile([0.75, 0.25], (8, 1)), rtol=1e-6)
    np.testing.assert_allclose(np.exp(encoder.log_prior), [0.75, 0.25])


def test_batch_says_the_shares_within_the_batch(toy):
    encoder = fit_baseline("batch", toy, seed=0).encoder
    found = np.exp(encoder.log_proba(encoder.embed(toy.cells)))
    # 2 A in batch x, 1 A and 1 B in batch y, each with 10 cells' worth of the shares; batch z is new.
    np.testing.assert_allclose(found[0], [9.5 / 12, 2.5 / 12], rtol=1e-6)
    np.testing.assert_allclose(found[2], [8.5 / 12, 3.5 / 12], rtol=1e-6)
    np.testing.assert_allclose(found[7], [0.75, 0.25], rtol=1e-6)


def test_batch_without_batches_is_the_prior(toy):
    bare = replace(toy, cells=replace(toy.cells, batch=None))
    encoder = fit_baseline("batch", bare, seed=0).encoder
    np.testing.assert_allclose(
        np.exp(encoder.log_proba(encoder.embed(bare.cells))[0]), [0.75, 0.25], rtol=1e-6
    )


def test_target_activation_is_the_z_score_of_the_target(toy):
    encoder = fit_baseline("target_activation", toy, seed=0, fixed={"target_sum": 10, "sign": 1}).encoder
    controls = np.log1p([10 * 2 / 3, 10 * 4 / 5])
    # One more control with one count, at the controls' median total of 4.
    spread = np.sqrt(controls.var() + np.log1p(10 / 4) ** 2 / 3)
    expected = (np.log1p(10 * 6 / 7) - controls.mean()) / spread
    np.testing.assert_allclose(encoder.embed(toy.cells)[0], [expected, 0], rtol=1e-5)
    lowered = fit_baseline("target_activation", toy, seed=0, fixed={"target_sum": 10, "sign": -1}).encoder
    np.testing.assert_allclose(lowered.embed(toy.cells)[0], [-expected, 0], rtol=1e-5)
    assert encoder.log_prior is None


def test_target_activation_weighs_doubles_by_stouffer(toy):
    both = replace(toy, columns={"A": np.array([0]), "B": np.array([0, 1])})
    encoder = fit_baseline("target_activation", both, seed=0, fixed={"target_sum": 10, "sign": 1}).encoder
    only = replace(toy, columns={"A": np.array([1]), "B": np.array([0])})
    second = fit_baseline("target_activation", only, seed=0, fixed={"target_sum": 10, "sign": 1}).encoder
    first, double = encoder.embed(toy.cells).T
    np.testing.assert_allclose(
        double, (first + second.embed(toy.cells)[:, 0]) / np.sqrt(2), rtol=1e-5, atol=1e-6
    )


def test_target_activation_finds_activated_targets(screen):
    open_eyed = prepare(screen, make_split(screen.obs, seed=0), mask="none")
    fitted = fit_baseline("target_activation", open_eyed, seed=0)
    assert fitted.chosen["sign"] == 1
    hits = evaluate(fitted.encoder, open_eyed, query_sizes=(1,), scorings=("classifier",))["exact_hit@1"]
    assert hits.mean() > 2 / len(open_eyed.candidates)


def test_mean_shift_is_from_the_controls_or_else_from_all(toy):
    encoder = fit_baseline("mean_shift", toy, seed=0).encoder
    values = log1p(toy.cells, 10_000).toarray()
    np.testing.assert_allclose(
        encoder.embed(toy.cells), values - values[4:6].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    alone = replace(toy, roles=np.where(toy.conditions == CTRL, "val", toy.roles))
    encoder = fit_baseline("mean_shift", alone, seed=0).encoder
    np.testing.assert_allclose(
        encoder.embed(toy.cells), values - values[:4].mean(axis=0), rtol=1e-5, atol=1e-6
    )


def test_library_size_is_scikit_learns_regression_on_depth(prepared, fits):
    from sklearn.linear_model import LogisticRegression

    def depth(role):
        some = prepared.cells.take(prepared.where(role))
        return np.log1p(np.column_stack([some.totals, (some.counts.toarray() > 0).sum(axis=1)]))

    train = depth("train")
    mean, spread = train.mean(axis=0), train.std(axis=0)
    oracle = LogisticRegression(C=1.0, tol=1e-8).fit(
        (train - mean) / spread, prepared.conditions[prepared.where("train")]
    )
    encoder = fits["library_size"].encoder
    embeddings = encoder.embed(prepared.cells.take(prepared.where("val")))
    np.testing.assert_allclose(
        np.exp(encoder.log_proba(embeddings)), oracle.predict_proba((depth("val") - mean) / spread), atol=2e-3
    )


def test_pca_is_scikit_learns(prepared):
    from sklearn.decomposition import PCA

    encoder = fit_baseline("pca", prepared, seed=0, search={"n_components": [10]}).encoder
    oracle = PCA(10).fit(dense(prepared, "train")).transform(dense(prepared, "query"))
    found = encoder.embed(prepared.cells.take(prepared.where("query")))
    np.testing.assert_allclose(np.abs(found), np.abs(oracle), atol=1e-3)


@pytest.mark.parametrize(("shrinkage", "scale"), [(0.1, False), (0.9, False), (0.5, True)])
def test_lda_is_scikit_learns(prepared, shrinkage, scale):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    search = {"shrinkage": [shrinkage], "scale": [scale]}
    encoder = fit_baseline("lda", prepared, seed=0, search=search).encoder
    train, query = dense(prepared, "train"), dense(prepared, "query")
    spread = np.where(train.std(axis=0) > 0, train.std(axis=0), 1) if scale else 1
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(
        train / spread, prepared.conditions[prepared.where("train")]
    )
    found = encoder.log_proba(encoder.embed(prepared.cells.take(prepared.where("query"))))
    np.testing.assert_allclose(np.exp(found), oracle.predict_proba(query / spread), atol=1e-4)
    assert len(encoder.layers[0].bias) == len(prepared.candidates) - 1


def test_low_rank_lda_keeps_the_leading_discriminants(prepared):
    from scipy.linalg import eigh

    fixed = {"target_sum": 10_000, "scale": False, "shrinkage": 0.5, "n_components": 3}
    encoder = fit_baseline("lda_low_rank", prepared, seed=0, fixed=fixed).encoder
    train, query = dense(prepared, "train"), dense(prepared, "query")
    labels = np.searchsorted(prepared.candidates, prepared.conditions[prepared.where("train")])
    shares = np.bincount(labels) / len(labels)
    means = np.stack([train[labels == c].mean(axis=0) for c in range(len(shares))])
    within = np.cov((train - means[labels]).T, bias=True)
    shrunk = 0.5 * within + 0.5 * np.trace(within) / len(within) * np.eye(len(within))
    spread = (means - train.mean(axis=0)).T * shares @ (means - train.mean(axis=0))
    axes = eigh(spread, shrunk)[1][:, :-4:-1]
    distances = ((query @ axes)[:, None] - means @ axes) ** 2
    expected = shares * np.exp(-0.5 * distances.sum(axis=2))
    found = encoder.log_proba(encoder.embed(prepared.cells.take(prepared.where("query"))))
    np.testing.assert_allclose(np.exp(found), expected / expected.sum(axis=1, keepdims=True), atol=1e-4)


@pytest.mark.parametrize("cells_per_tree", [4000, 100])
def test_extra_trees_are_scikit_learns_and_one_tree_that_never_splits(prepared, monkeypatch, cells_per_tree):
    from sklearn.ensemble import ExtraTreesClassifier

    monkeypatch.setattr(trees, "_TREE_CELLS", cells_per_tree)
    monkeypatch.setattr(trees, "_BLOCK_PATHS", 700)  # paths are followed a few cells at a time
    fixed = {"target_sum": 10_000, "n_trees": 30, "min_samples_leaf": 3, "max_features": 0.2}
    encoder = fit_baseline("extra_trees", prepared, seed=7, fixed=fixed).encoder
    index = prepared.where("train")
    index = index[np.lexsort((prepared.cells.names[index], prepared.conditions[index]))]
    labels = np.searchsorted(prepared.candidates, prepared.conditions[index])
    sampled = {"bootstrap": True, "max_samples": 100} if cells_per_tree == 100 else {}
    oracle = ExtraTreesClassifier(30, min_samples_leaf=3, max_features=0.2, random_state=7, **sampled)
    oracle.fit(seen(prepared, index), labels)
    query = prepared.where("query")
    expected = (30 * oracle.predict_proba(seen(prepared, query)) + np.bincount(labels) / len(labels)) / 31
    found = encoder.log_proba(encoder.embed(prepared.cells.take(query)))
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("n_classes", [2, 8])
def test_boosted_trees_are_scikit_learns(prepared, n_classes):
    from sklearn.ensemble import HistGradientBoostingClassifier

    kept = prepared.candidates[:n_classes]
    known = np.isin(prepared.conditions, kept)
    some = replace(prepared, roles=np.where(known, prepared.roles, "gallery"), candidates=kept)
    fixed = {"target_sum": 10_000, "n_rounds": 5, "learning_rate": 0.2, "max_leaves": 5}
    fixed |= {"max_features": 0.5, "l2": 1.0}
    encoder = fit_baseline("boosted_trees", some, seed=3, fixed=fixed).encoder
    index = some.where("train")
    index = index[np.lexsort((some.cells.names[index], some.conditions[index]))]
    oracle = HistGradientBoostingClassifier(
        max_iter=5,
        learning_rate=0.2,
        max_leaf_nodes=5,
        max_features=0.5,
        l2_regularization=1.0,
        max_bins=64,
        early_stopping=False,
        random_state=3,
    ).fit(seen(some, index), np.searchsorted(kept, some.conditions[index]))
    query = some.where("query")
    found = encoder.log_proba(encoder.embed(some.cells.take(query)))
    np.testing.assert_allclose(np.exp(found), oracle.predict_proba(seen(some, query)), rtol=1e-5)


def seen(prepared, index):
    some = prepared.cells.take(index)
    return np.hstack([log1p(some, 10_000).toarray(), depth(some)])


def test_a_threshold_in_half_the_bits_parts_the_same_values():
    exact = np.random.default_rng(0).uniform(-3, 9, 2000)
    near = exact.astype(np.float32)
    rounded = trees._rounded_down(exact)
    assert rounded.dtype == np.float32 and (near > exact).any() and (near < exact).any()
    for values in (near, np.nextafter(near, np.float32(99)), np.nextafter(near, np.float32(-99))):
        np.testing.assert_array_equal(values <= rounded, values.astype(float) <= exact)


def test_settings_of_trees_are_compared_on_few_and_the_chosen_forest_is_grown_in_full(fits, prepared):
    assert len(fits["extra_trees"].encoder.layers[0].roots) == 80 > trees._DRAFT_TREES
    assert fits["extra_trees"].chosen["n_trees"] == 80
    (one,) = trees.fit_extra_trees(draft(prepared), [fits["extra_trees"].chosen])
    assert len(one.layers[0].roots) == trees._DRAFT_TREES


def draft(prepared):
    made = methods.Training(prepared, "extra_trees", 0)
    made.draft = True
    return made


@pytest.mark.parametrize("overdispersed", [False, True])
def test_naive_bayes_is_the_product_of_its_genes(prepared, overdispersed):
    from scipy.stats import nbinom, poisson

    fixed = {"smoothing": 5.0, "overdispersed": overdispersed}
    encoder = fit_baseline("naive_bayes", prepared, seed=0, fixed=fixed).encoder
    train, query = (prepared.cells.take(prepared.where(role)) for role in ("train", "query"))
    labels = np.searchsorted(prepared.candidates, prepared.conditions[prepared.where("train")])
    counts, totals = train.counts.toarray().astype(float), train.totals
    classes = range(len(prepared.candidates))
    sums = np.stack([counts[labels == c].sum(axis=0) for c in classes])
    depths = np.array([totals[labels == c].sum() for c in classes])[:, None]
    overall, more = np.maximum(sums.sum(axis=0), 0.5) / depths.sum(), 5 * np.median(totals)
    rates = (sums + more * overall) / (depths + more)
    mean = totals[:, None] * (sums / depths)[labels]
    excess = np.maximum(((counts - mean) ** 2 - mean).sum(axis=0), 0)
    dispersion = (
        excess / np.maximum((mean**2).sum(axis=0), 1e-300) if overdispersed else np.zeros(len(overall))
    )
    assert overdispersed == (dispersion > 0.01).any()
    joint = []
    for c in classes:
        m, x = query.totals[:, None] * rates[c], query.counts.toarray()
        size = 1 / np.maximum(dispersion, 1e-8)
        each = np.where(dispersion > 1e-6, nbinom.logpmf(x, size, size / (size + m)), poisson.logpmf(x, m))
        joint.append(each.sum(axis=1) + np.log((labels == c).mean()))
    joint = np.array(joint).T
    found = encoder.log_proba(encoder.embed(query))
    np.testing.assert_allclose(found - found[:, :1], joint - joint[:, :1], atol=1e-3)


def test_neighbours_vote_as_scikit_learns_do(prepared):
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    fixed = {"target_sum": 10_000, "n_components": 10, "k": 7}
    encoder = fit_baseline("knn", prepared, seed=0, fixed=fixed).encoder
    train, query = dense(prepared, "train"), dense(prepared, "query")
    labels = np.searchsorted(prepared.candidates, prepared.conditions[prepared.where("train")])
    space = PCA(10, svd_solver="full").fit(train)
    oracle = KNeighborsClassifier(7, metric="cosine", algorithm="brute").fit(space.transform(train), labels)
    expected = (7 * oracle.predict_proba(space.transform(query)) + np.bincount(labels) / len(labels)) / 8
    found = encoder.log_proba(encoder.embed(prepared.cells.take(prepared.where("query"))))
    np.testing.assert_allclose(np.exp(found), expected, atol=1e-5)


def test_neighbours_as_near_as_the_last_all_count(toy):
    encoder = fit_baseline("knn", toy, seed=0, fixed={"target_sum": 10, "n_components": 2, "k": 99}).encoder
    np.testing.assert_allclose(
        np.exp(encoder.log_proba(encoder.embed(toy.cells))), np.tile([0.75, 0.25], (8, 1)), rtol=1e-6
    )


def test_members_are_networks_from_other_random_numbers_with_one_number_of_epochs(fits, prepared):
    encoder, chosen = fits["mlp_x5"].encoder, fits["mlp_x5"].chosen
    assert isinstance(encoder, Average) and len(encoder.members) == chosen["members"] == 3
    assert len({member.layers[0].weight.tobytes() for member in encoder.members}) == 3
    settings = {key: chosen[key] for key in ("target_sum", "hidden", "weight_decay", "epochs")}
    alone = fit_baseline("mlp", prepared, seed=0, fixed=settings).encoder
    assert alone.layers[0].weight.tobytes() == encoder.members[0].layers[0].weight.tobytes()
    (twin,) = {fit_baseline("mlp_x5", prepared, seed=0, fixed={**chosen, "members": 1}).encoder.kind}
    assert twin == "mlp_x5"


def test_an_average_is_the_mean_of_its_members_probabilities_and_tells_what_was_tried(fits, prepared):
    encoder, chosen, table = fits["average"].encoder, fits["average"].chosen, fits["average"].selection
    names = chosen["methods"].split("+")
    assert [member.kind for member in encoder.members] == names
    each = []
    for name, member in zip(names, encoder.members, strict=True):
        own = {key.removeprefix(f"{name}."): value for key, value in chosen.items() if key.startswith(name)}
        alone = fit_baseline(name, prepared, seed=0, fixed=own).encoder
        assert weights(alone) == weights(member)
        each.append(np.exp(alone.log_proba(alone.embed(prepared.cells))))
    found = encoder.log_proba(encoder.embed(prepared.cells))
    np.testing.assert_allclose(np.exp(found), np.mean(each, axis=0), rtol=1e-5)
    tried = table["methods"].value_counts()
    assert tried["logreg"] == 8 and tried["lda_low_rank"] == 36 and tried["mlp"] == 2
    assert tried["logreg+lda_low_rank"] == tried["lda_low_rank+mlp"] == 1 and table["chosen"].sum() == 1
    for name in ("logreg", "lda_low_rank", "mlp"):
        assert set(table.loc[table["methods"] == name, "readout"]) == {"classifier"}


def test_a_name_is_registered_once():
    with pytest.raises(
        ValueError, match="method: 'pca' is registered already, by perturbret.encoders.linear"
    ):
        methods.method("pca")(lambda training, grid: iter(()))
    assert methods.METHODS["pca"].fit is linear.fit_pca


@pytest.mark.parametrize("scale", [False, True])
def test_logistic_regression_is_scikit_learns(prepared, scale):
    from sklearn.linear_model import LogisticRegression

    encoder = fit_baseline("logreg", prepared, seed=0, search={"C": [0.1], "scale": [scale]}).encoder
    train, query = dense(prepared, "train"), dense(prepared, "query")
    spread = np.where(train.std(axis=0) > 0, train.std(axis=0), 1) if scale else 1
    oracle = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(
        train / spread, prepared.conditions[prepared.where("train")]
    )
    embeddings = encoder.embed(prepared.cells.take(prepared.where("query")))
    np.testing.assert_allclose(
        np.exp(encoder.log_proba(embeddings)), oracle.predict_proba(query / spread), atol=5e-3
    )
    logits = query / spread @ oracle.coef_.T + oracle.intercept_
    np.testing.assert_allclose(embeddings, logits, atol=0.05)


def test_network_learns_the_same_as_far_as_it_is_trained(prepared):
    few = {"target_sum": 10_000, "hidden": 16, "weight_decay": 0.0, "epochs": 1}
    losses = []
    train = prepared.where("train")
    own = np.searchsorted(prepared.candidates, prepared.conditions[train])
    for epochs in (10, 30, 90):
        encoder = fit_baseline("mlp", prepared, seed=0, fixed={**few, "epochs": epochs}).encoder
        found = encoder.log_proba(encoder.embed(prepared.cells.take(train)))
        losses.append(-found[np.arange(len(train)), own].mean())
    assert np.log(len(prepared.candidates)) > losses[0] > losses[1] > losses[2]
    other = fit_baseline("mlp", prepared, seed=1, fixed=few).encoder
    assert weights(other) != weights(fit_baseline("mlp", prepared, seed=0, fixed=few).encoder)


def test_network_gradient_is_that_of_its_loss():
    rng = np.random.default_rng(0)
    block, classes = csr_matrix(rng.poisson(1, (7, 6)).astype(float)), rng.integers(3, size=7)
    parameters = [rng.normal(size=shape) for shape in ((6, 5), 5, (5, 3), 3)]

    def loss(parts):
        made = mlp.Network((parts[0], parts[2]), (parts[1], parts[3]), 1)
        return mlp._cross_entropy(made.logits(block), classes)

    for i, gradient in enumerate(mlp._gradients(parameters, block, classes)):
        direction = rng.normal(size=gradient.shape)
        ahead, behind = (
            loss([part + (step * direction if i == j else 0) for j, part in enumerate(parameters)])
            for step in (1e-5, -1e-5)
        )
        assert (gradient * direction).sum() == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_training_stops_at_the_best_epoch_of_the_validation_cells(monkeypatch):
    monkeypatch.setattr(mlp, "LEARNING_RATE", 0.01)
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=160)
    values = csr_matrix(rng.poisson(1.0 + (labels[:, None] == np.arange(9) % 3)).astype(np.float32))
    request = {"n_classes": 3, "hidden": 64, "weight_decay": 0.0, "seed": 0}
    validation = values[100:], labels[100:]
    stopped = mlp.train_network(values[:100], labels[:100], **request, validation=validation)
    losses = [
        mlp._cross_entropy(
            mlp.train_network(values[:100], labels[:100], **request, epochs=n).logits(values[100:]),
            labels[100:],
        )
        for n in range(1, stopped.epochs + mlp.PATIENCE + 1)
    ]
    assert 1 < stopped.epochs == np.argmin(losses) + 1 < mlp.MAX_EPOCHS
    again = mlp.train_network(values[:100], labels[:100], **request, epochs=stopped.epochs)
    np.testing.assert_array_equal(again.weights[0], stopped.weights[0])


def test_weight_decay_shrinks_weights_by_its_share_per_step():
    values, labels = csr_matrix((4, 5), dtype=np.float32), np.array([0, 1, 0, 1])
    request = {"n_classes": 2, "hidden": 3, "seed": 0, "epochs": 2}
    kept = mlp.train_network(values, labels, **request, weight_decay=0.0).weights[0]
    shrunk = mlp.train_network(values, labels, **request, weight_decay=100.0).weights[0]
    # Cells without counts give the first layer no gradient: two steps of decay are all that happens to it.
    np.testing.assert_allclose(shrunk, kept * (1 - mlp.LEARNING_RATE * 100) ** 2, rtol=1e-5)


def test_a_given_embedding_is_kept_or_standardised(prepared):
    plain = fit_baseline("obsm:X_a", prepared, seed=0, fixed={"scale": False}).encoder
    np.testing.assert_allclose(plain.embed(prepared.cells), prepared.cells.obsm["X_a"], rtol=1e-6)
    scaled = fit_baseline("obsm:X_a", prepared, seed=0, fixed={"scale": True}).encoder
    train = scaled.embed(prepared.cells.take(prepared.where("train")))
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(axis=0), [1, 1, 1, 0], atol=1e-5)


def test_of_many_genes_the_most_variable_are_used(prepared, monkeypatch):
    monkeypatch.setattr(linear, "_LDA_GENES", 20)
    monkeypatch.setattr(references, "_SHIFT_GENES", 15)
    by_spread = np.argsort(-dense(prepared, "train").std(axis=0))
    for kind, limit in (("lda", 20), ("mean_shift", 15)):
        encoder = fit_baseline(kind, prepared, seed=0).encoder
        assert encoder.settings["columns"] == sorted(by_spread[:limit].tolist())
        assert np.isfinite(encoder.embed(prepared.cells)).all()
    assert encoder.embed(prepared.cells).shape[1] == 15


@pytest.mark.parametrize("kind", ["lda", "logreg", "mlp", "extra_trees", "naive_bayes"])
def test_the_leak_of_the_own_target_mask_is_learnt(kind):
    """Labels without any signal: only which columns were zeroed can tell them, and only under own_targets."""
    screen = simulate_screen(
        n_singles=6,
        n_doubles=0,
        cells_per_condition=80,
        n_control=0,
        n_genes=20,
        measured_targets=1.0,
        depth=500,
        seed=2,
    )
    split = make_split(screen.obs, seed=0)
    roles = split.roles.reindex(screen.obs.index).to_numpy(str)
    permuted = permute_conditions(screen.obs["condition"].to_numpy(str), roles, seed=0)
    hits, prior = {}, 0.0
    for mask in ("all_targets", "own_targets"):
        null = prepare(screen, split, mask=mask, conditions=permuted)
        encoder = fit_baseline(kind, null, seed=0).encoder
        scores = evaluate(encoder, null, query_sizes=(1,), scorings=("classifier",))
        hits[mask] = scores["exact_hit@1"].mean()
        prior = scores["condition"].value_counts(normalize=True).max()
    assert hits["all_targets"] < prior + 0.08
    assert hits["own_targets"] > prior + 0.25


def test_bayes_ceiling_is_a_kind(prepared):
    fitted = fit_baseline("bayes_ceiling", prepared, seed=0)
    assert fitted.encoder.kind == "bayes_ceiling" and fitted.chosen == {} and fitted.selection["chosen"].all()
    assert fit_baseline("bayes_ceiling", prepared, seed=0, fixed={}).encoder.kind == "bayes_ceiling"


@pytest.mark.parametrize(
    ("kind", "search", "said"),
    [
        ("logistic", None, "encoder: expected one of .*prior, library_size, .*bayes_ceiling, got 'logistic'"),
        ("obsm", None, "encoder: expected one of .*obsm:<key>.*, got 'obsm'"),
        ("obsm:X_b", None, r"obsm: expected one of \['X_a'\], got 'X_b'"),
        ("pca", {"C": [1.0]}, "search: pca has the settings target_sum, n_components, got 'C'"),
        ("prior", {"C": [1.0]}, "search: prior has the settings none, got 'C'"),
        ("logreg", {"C": []}, r"search: expected a list of values for C, got \[\]"),
        ("logreg", {"C": 1.0}, "search: expected a list of values for C, got 1.0"),
        ("logreg", {"C": [0.0]}, "search: expected a number above 0 .* for C of logreg, got 0.0"),
        (
            "logreg",
            {"target_sum": ["1e4"]},
            "search: expected a number above 0 .*YAML takes 1e4 for a text.*got '1e4'",
        ),
        ("logreg", {"scale": [1]}, "search: expected true or false for scale of logreg, got 1"),
        (
            "pca",
            {"n_components": [2.5]},
            "search: expected a whole number of at least 1 for n_components of pca",
        ),
        ("lda", {"shrinkage": [1.5]}, "search: expected a number from 0 to 1 for shrinkage of lda, got 1.5"),
        (
            "mlp",
            {"weight_decay": [-1]},
            "search: expected a number of at least 0 for weight_decay of mlp, got -1",
        ),
        (
            "average",
            {"methods": ["pca+lda"]},
            "search: expected two or more of logreg, .* joined by .*'pca.lda'",
        ),
        ("average", {"methods": ["logreg"]}, "search: expected two or more of .* for methods of average"),
        ("average", {"C": [1]}, "search: average has the settings methods, got 'C'"),
        ("extra_trees", {"n_trees": [0]}, "expected a whole number of at least 1 for n_trees of extra_trees"),
        ("extra_trees", {"max_features": [0]}, "expected a number above 0 and up to 1 for max_features"),
        ("boosted_trees", {"max_leaves": [1]}, "expected a whole number of at least 2 for max_leaves"),
        (
            "boosted_trees",
            {"depth": [1]},
            "boosted_trees has the settings target_sum, n_rounds, .*got 'depth'",
        ),
        ("knn", {"k": [True]}, "expected a whole number of at least 1 for k of knn, got True"),
        ("naive_bayes", {"overdispersed": [1]}, "expected true or false for overdispersed of naive_bayes"),
        ("mlp_x5", {"members": [2.0]}, "expected a whole number of at least 1 for members of mlp_x5"),
        ("lda_low_rank", {"n_components": [0]}, "expected a whole number of at least 1 for n_components"),
        ("target_activation", {"sign": [2]}, "search: expected 1 or -1 for sign of target_activation, got 2"),
    ],
)
def test_bad_requests_are_named(prepared, kind, search, said):
    with pytest.raises(ValueError, match=said):
        fit_baseline(kind, prepared, seed=0, search=search)


def test_without_validation_cells_nothing_is_chosen(prepared):
    blind = replace(prepared, roles=np.where(prepared.roles == "val", "gallery", prepared.roles))
    with pytest.raises(
        ValueError, match="search: expected validation cells to choose one of 3 settings of pca"
    ):
        fit_baseline("pca", blind, seed=0)
    fitted = fit_baseline("pca", blind, seed=0, search={"n_components": [5]})
    assert fitted.chosen["n_components"] == 5 and np.isnan(fitted.selection["exact_hit@1"].iloc[0])


def test_one_condition_is_too_few(toy):
    one = replace(toy, candidates=("A",), conditions=np.where(toy.conditions == "B", CTRL, toy.conditions))
    with pytest.raises(ValueError, match="expected training cells of at least 2 conditions, got 1"):
        fit_baseline("prior", one, seed=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ":" not in kind])
def test_every_kind_has_a_recipe_that_names_what_is_tried(kind):
    text = (PARAMS / f"{kind}.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["encoder"] == kind and set(recipe) <= {"encoder", "search"}
    named = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("# Tried by default")]
    assert [yaml.safe_load(line) for line in named] == ([SEARCH[kind]] if SEARCH.get(kind) else [])


def test_real_cells_reach_what_simple_models_can(real_data):
    """Norman subset, all targets masked, mean of three splits; what each encoder was chosen by is validation."""
    screen, hits = load_screen("norman_subset"), []
    for seed in range(3):
        prepared = prepare(screen, make_split(screen.obs, seed=seed), mask="all_targets")
        reached = {}
        for kind in ("logreg", "pca"):
            encoder = fit_baseline(kind, prepared, seed=seed).encoder
            scores = evaluate(encoder, prepared, libraries=("mean",), query_sizes=(1,), seed=seed)
            for scoring, rows in scores.groupby("scoring"):
                reached[kind, scoring] = rows["exact_hit@1"].mean()
        hits.append(reached)
    means = {key: np.mean([reached[key] for reached in hits]) for key in hits[0]}
    assert means["logreg", "classifier"] >= 0.175
    assert means["pca", "cosine"] >= 0.135
    assert means["pca", "whitened"] >= 0.16
