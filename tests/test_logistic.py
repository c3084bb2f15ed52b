"""The solver of multinomial logistic regression: scikit-learn's solution, in any precision and layout."""

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix
from sklearn.linear_model import LogisticRegression

from perturbret.encoders import logistic
from perturbret.encoders.logistic import fit_logistic, preconditioner
from perturbret.encoders.spectrum import spectrum

N_CLASSES = 4


@pytest.fixture(scope="module")
def problem():
    """Sparse non-negative features with one common direction, as expression has, and unequal classes."""
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(N_CLASSES), [120, 60, 30, 15])
    rate = rng.gamma(0.5, 1.0, 30) * np.exp(0.7 * rng.normal(size=(N_CLASSES, 30)))
    counts = rng.poisson(rate[classes] * rng.lognormal(0, 0.5, (len(classes), 1)))
    return csr_matrix(np.log1p(counts).astype(np.float64)), classes


def objective(features, classes, C, coef, intercept):
    logits = features @ coef.astype(np.float64) + intercept.astype(np.float64)
    top = logits.max(axis=1)
    loss = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top - logits[np.arange(len(classes)), classes]
    return loss.mean() + (coef.astype(np.float64) ** 2).sum() / (2 * C * len(classes))


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_solution_is_that_of_scikit_learn(problem, C):
    features, classes = problem
    oracle = LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(features, classes)
    fitted = fit_logistic(features, classes, N_CLASSES, C=C, tol=1e-13, max_iter=1000)
    assert fitted.converged
    np.testing.assert_allclose(fitted.coef, oracle.coef_.T, atol=1e-4)
    np.testing.assert_allclose(
        fitted.intercept, oracle.intercept_ - oracle.intercept_.mean(), atol=1e-4 * max(1, C**0.5)
    )
    logits = features @ fitted.coef + fitted.intercept
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, oracle.predict_proba(features), atol=1e-5)


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_default_tolerance_is_what_is_left_to_gain(problem, C):
    features, classes = problem
    exact = fit_logistic(features, classes, N_CLASSES, C=C, tol=1e-13, max_iter=1000)
    for kind in (np.float64, np.float32):
        fitted = fit_logistic(features.astype(kind), classes, N_CLASSES, C=C)
        reached = objective(features, classes, C, fitted.coef, fitted.intercept)
        assert 0 <= reached - exact.objective + 1e-12 < 3e-5
        assert reached == pytest.approx(fitted.objective, abs=2e-6)


def test_gradient_vanishes_at_the_solution(problem):
    features, classes = problem
    fitted = fit_logistic(features, classes, N_CLASSES, C=0.5, tol=1e-14, max_iter=1000)
    logits = features @ fitted.coef + fitted.intercept
    residual = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(N_CLASSES)[classes]
    gradient = features.T @ residual / len(classes) + fitted.coef / (0.5 * len(classes))
    assert np.abs(gradient).max() < 1e-6 and np.abs(residual.sum(axis=0)).max() < 1e-4


@pytest.mark.parametrize("layout", [np.asarray, csc_matrix], ids=["dense", "csc"])
def test_layout_does_not_matter(problem, layout):
    features, classes = problem
    sparse = fit_logistic(features, classes, N_CLASSES, C=1.0, tol=1e-12)
    other = fit_logistic(layout(features.toarray()), classes, N_CLASSES, C=1.0, tol=1e-12)
    np.testing.assert_allclose(other.coef, sparse.coef, atol=1e-5)


def test_blocks_and_threads_do_not_matter(problem, monkeypatch):
    features, classes = problem
    whole = fit_logistic(features, classes, N_CLASSES, C=1.0, tol=1e-12)
    monkeypatch.setattr(logistic, "_BLOCK_ROWS", 50)
    monkeypatch.setattr(logistic, "_BLOCK_COLUMNS", 7)
    one = fit_logistic(features, classes, N_CLASSES, C=1.0, tol=1e-12, threads=1)
    two = fit_logistic(features, classes, N_CLASSES, C=1.0, tol=1e-12, threads=2)
    np.testing.assert_allclose(one.coef, whole.coef, atol=1e-5)
    np.testing.assert_array_equal(one.coef, two.coef)


def test_a_poor_preconditioner_costs_iterations_and_not_the_solution(problem):
    features, classes = problem
    good = fit_logistic(features, classes, N_CLASSES, C=10.0, tol=1e-12, max_iter=1000)
    poor = fit_logistic(
        features, classes, N_CLASSES, C=10.0, tol=1e-12, max_iter=1000, basis=spectrum(features[::10], 1)
    )
    np.testing.assert_allclose(poor.coef, good.coef, atol=1e-4)
    assert poor.n_iter > good.n_iter


def test_preconditioner_is_of_few_cells_and_serves_every_strength(problem, monkeypatch):
    features, classes = problem
    monkeypatch.setattr(logistic, "SPECTRUM_CELLS", 100)
    basis = preconditioner(features)
    np.testing.assert_allclose(basis.mean, features[::3].toarray().mean(axis=0))
    for C in (0.1, 10.0):
        shared = fit_logistic(features, classes, N_CLASSES, C=C, tol=1e-12, max_iter=1000, basis=basis)
        own = LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(features, classes)
        np.testing.assert_allclose(shared.coef, own.coef_.T, atol=2e-4)


def test_features_without_information_give_class_shares():
    features, classes = csr_matrix((10, 3)), np.array([0] * 7 + [1] * 2 + [2])
    fitted = fit_logistic(features, classes, 3, C=1.0, tol=1e-12)
    logits = fitted.intercept
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), [0.7, 0.2, 0.1], atol=1e-6)
    assert (fitted.coef == 0).all()


def test_separable_classes_converge():
    features = np.repeat(np.eye(3), 5, axis=0)
    fitted = fit_logistic(features, np.repeat(np.arange(3), 5), 3, C=1e4)
    assert fitted.converged and (features @ fitted.coef + fitted.intercept).argmax(axis=1).tolist() == (
        [0] * 5 + [1] * 5 + [2] * 5
    )


def test_stopping_early_is_said(problem):
    features, classes = problem
    with pytest.warns(UserWarning, match=r"stopped after 2 iterations with about .* nats per cell to gain"):
        assert not fit_logistic(features, classes, N_CLASSES, C=100.0, max_iter=2).converged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"C": 0.0}, "C: expected a positive number, got 0.0"),
        ({"n_classes": 5}, r"classes: expected every value of 0..4 and no other, absent: \[4\]"),
        ({"n_classes": 3}, "classes: expected every value of 0..2 and no other"),
        ({"classes": np.zeros(3, int)}, "classes: expected 225 values, one per row of features, got 3"),
        ({"features": np.ones((225, 2), int)}, "features: expected float32 or float64, got int64"),
        ({"features": np.full((225, 2), np.nan)}, "features: expected finite values"),
    ],
)
def test_bad_input_is_named(problem, change, said):
    request = {"features": problem[0], "classes": problem[1], "n_classes": N_CLASSES, "C": 1.0, **change}
    with pytest.raises(ValueError, match=said):
        fit_logistic(request.pop("features"), request.pop("classes"), request.pop("n_classes"), **request)
