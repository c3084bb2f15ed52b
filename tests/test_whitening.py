import numpy as np
import pytest

import perturbret.evaluation.whitening
from perturbret.evaluation.retrieval import build_library, score_library
from perturbret.evaluation.whitening import MAX_SEARCHED, MAX_WHITENED, SHRINKAGES, choose_shrinkage, whitener


@pytest.fixture
def cells():
    """Correlated embeddings of 4 classes with a large common part: 120 train cells and 30 queries in 6-d."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6)) * [3, 2, 1, 1, 0.5, 0.2]
    labels = np.array(list("ABCD"))[np.arange(150) % 4]
    centres = rng.standard_normal((4, 6))
    embeddings = 5 + centres[np.arange(150) % 4] + rng.standard_normal((150, 6)) @ mixing
    return embeddings[:120].astype(np.float32), labels[:120], embeddings[120:].astype(np.float32)


def residuals(embeddings, labels):
    return embeddings - np.stack([embeddings[labels == label].mean(axis=0) for label in labels])


def test_whitening_is_the_inverse_of_the_ledoit_wolf_covariance_of_sklearn(cells):
    from sklearn.covariance import ledoit_wolf

    train, labels, _ = cells
    mean, matrix = whitener(train, labels)
    covariance, shrinkage = ledoit_wolf(residuals(train.astype(float), labels), assume_centered=True)
    assert 0.001 < shrinkage < 0.5
    np.testing.assert_allclose(mean, train.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.inv(matrix @ matrix.T), covariance, rtol=1e-6, atol=1e-9)


def test_nearest_mean_in_whitened_space_is_linear_discriminant_analysis(cells):
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    train, labels, queries = cells
    mean, matrix = whitener(train, labels)

    class Shrunk(EmpiricalCovariance):
        def fit(self, x, y=None):
            self.covariance_ = np.linalg.inv(matrix @ matrix.T)
            return self

    lda = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=Shrunk(), priors=np.full(4, 0.25))
    predicted = lda.fit(train.astype(float), labels).predict(queries.astype(float))
    centres = build_library(train, labels).prototypes
    distances = np.linalg.norm(
        ((queries - mean) @ matrix)[:, None] - ((centres - mean) @ matrix)[None], axis=2
    )
    assert np.array(list("ABCD"))[distances.argmin(axis=1)].tolist() == predicted.tolist()


def test_whitening_does_not_care_about_invertible_maps_when_cells_abound():
    rng = np.random.default_rng(1)
    labels = np.array(list("AB"))[np.arange(20_000) % 2]
    train = rng.standard_normal((20_000, 3)) + (labels == "A")[:, None] * [0.5, 0, 0]
    mixed = train @ np.array([[5, 0, 1], [1, 2, 0], [0, 1, 1.0]]) + 7
    plain, other = (
        score_library(x[:50], build_library(x, labels), whiten=whitener(x, labels)) for x in (train, mixed)
    )
    np.testing.assert_allclose(plain, other, atol=0.02)


@pytest.mark.parametrize(
    "shape", ["more dimensions than cells", "repeated columns", "dead column", "one dimension"]
)
def test_whitening_of_rank_deficient_embeddings(cells, shape):
    train, labels, _ = cells
    if shape == "more dimensions than cells":
        train = np.random.default_rng(2).standard_normal((120, 300)).astype(np.float32)
    elif shape == "repeated columns":
        train = np.hstack([train, train, train[:, :2] * 3])
    elif shape == "dead column":
        train = np.hstack([train, np.full((120, 1), 0.1, np.float32)])
    else:
        train = train[:, :1]
    mean, matrix = whitener(train, labels)
    assert np.isfinite(matrix).all()
    deviations = residuals(train.astype(float), labels)
    # With d > n the shrinkage carries most of it; whatever the shape, the whitened cells have unit variance
    # on average over directions, up to that shrinkage, and none has more.
    variances = np.linalg.eigvalsh(np.cov((deviations @ matrix).T, bias=True).reshape(matrix.shape))
    assert 0.5 < variances.max() < 300 and variances.min() > -1e-9
    scores = score_library(train, build_library(train, labels), whiten=(mean, matrix))
    assert np.isfinite(scores).all() and len(np.unique(scores)) > 4 - 3 * (shape == "one dimension")


def test_whitening_refuses_more_dimensions_than_it_can_hold():
    train = np.broadcast_to(np.float32(1), (4, MAX_WHITENED + 1))
    with pytest.raises(ValueError, match="at most 8192 dimensions, got 8193; reduce them first"):
        whitener(train, np.array(list("AABB")))


def test_whitening_of_a_singular_covariance_without_shrinkage():
    # All deviations have the same length, which leaves Ledoit and Wolf nothing to shrink, and one direction.
    train = np.array([[1, 1], [-1, -1], [1, 1], [-1, -1.0]])
    mean, matrix = whitener(train, np.array(list("AAAA")))
    assert np.isfinite(matrix).all()
    np.testing.assert_allclose(train.T @ train / 4 @ (matrix @ matrix.T) @ [1, 1], [1, 1], rtol=1e-6)


def test_whitener_refuses_lengths_that_differ(cells):
    with pytest.raises(ValueError, match=r"for 119 conditions, got shape \(120, 6\)"):
        whitener(cells[0], cells[1][1:])


def noisy(d, *, n=400, classes=8, power=1.5, seed=0):
    """Classes that differ most where their cells vary most, as in real screens; power 0: everywhere alike."""
    rng = np.random.default_rng(seed)
    labels = np.array([f"C{i}" for i in range(classes)])[np.arange(n) % classes]
    scale = np.geomspace(5, 0.5, d)
    centres = rng.standard_normal((classes, d)) * 0.1 * scale**power
    noise = rng.standard_normal((n, d)) * scale
    return (centres[np.arange(n) % classes] + noise).astype(np.float32), labels


def test_a_given_shrinkage_counts_where_it_is_above_that_of_ledoit_and_wolf(cells):
    train, labels, _ = cells
    _, own = whitener(train, labels)
    _, tiny = whitener(train, labels, shrinkage=1e-6)
    np.testing.assert_array_equal(own, tiny)
    covariance = np.cov(residuals(train.astype(float), labels).T, bias=True)
    _, half = whitener(train, labels, shrinkage=0.5)
    expected = 0.5 * covariance + 0.5 * np.trace(covariance) / 6 * np.eye(6)
    np.testing.assert_allclose(np.linalg.inv(half @ half.T), expected, rtol=1e-6, atol=1e-9)


def test_chosen_shrinkage_is_that_of_a_plain_cross_validation():
    embeddings, labels = noisy(60)
    names, codes = np.unique(labels, return_inverse=True)
    fold = np.arange(400) // 8 % 4
    found = []
    for shrinkage in SHRINKAGES:
        total = 0.0
        for number in range(4):
            kept = fold != number
            space = whitener(embeddings[kept], labels[kept], shrinkage=shrinkage)
            library = build_library(embeddings[kept], labels[kept])
            scores = score_library(embeddings[~kept], library, whiten=space)
            own = scores[np.arange(len(scores)), codes[~kept]]
            total += (1 / (scores >= own[:, None]).sum(axis=1)).sum()
        found.append(total)
    assert choose_shrinkage(embeddings, labels) == SHRINKAGES[np.argmax(found)] > 0


def test_shrinkage_is_chosen_where_it_helps_and_not_where_full_whitening_is_right():
    assert choose_shrinkage(*noisy(500)) >= 0.3
    assert choose_shrinkage(*noisy(20, n=4000, power=0)) == 0


def test_chosen_shrinkage_does_not_depend_on_held_out_cells_of_single_cell_conditions():
    embeddings, labels = noisy(30)
    labels = labels.astype("U8")
    labels[:3] = ["lone1", "lone2", "lone3"]
    assert choose_shrinkage(embeddings, labels) in SHRINKAGES
    assert choose_shrinkage(embeddings[:3], labels[:3]) == 0


def test_no_search_above_the_limit_and_none_where_nothing_varies(monkeypatch):
    assert choose_shrinkage(np.full((40, 5), 0.1, np.float32), np.array(list("AB") * 20)) == 0
    embeddings, labels = noisy(500)
    monkeypatch.setattr(perturbret.evaluation.whitening, "MAX_SEARCHED", 499)
    assert choose_shrinkage(embeddings, labels) == 0
    assert MAX_SEARCHED >= 512


def test_held_out_cells_are_thinned_not_cut(monkeypatch):
    embeddings, labels = noisy(60)
    by_class = np.argsort(labels, kind="stable")
    monkeypatch.setattr(perturbret.evaluation.whitening, "_HELD_OUT", 30)
    scored, real = [], perturbret.evaluation.whitening._reciprocal_ranks
    monkeypatch.setattr(
        perturbret.evaluation.whitening,
        "_reciprocal_ranks",
        lambda s, true: scored.append(true) or real(s, true),
    )
    choose_shrinkage(embeddings[by_class], labels[by_class])
    assert len(scored) == 4 * len(SHRINKAGES)
    assert all(len(true) < 60 and len(set(true)) == 8 for true in scored)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1])
def test_shrinkage_outside_its_range_is_refused(cells, shrinkage):
    with pytest.raises(ValueError, match="shrinkage: expected a number from 0 to 1"):
        whitener(*cells[:2], shrinkage=shrinkage)
