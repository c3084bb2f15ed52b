"""Leading eigenvectors: numpy's, by either route."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from perturbret.encoders import spectrum as module
from perturbret.encoders.spectrum import gram, spectrum


@pytest.fixture(scope="module")
def features():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(300, 5)) * [9, 7, 5, 3, 2] @ rng.normal(size=(5, 60)) + rng.normal(
        size=(300, 60)
    )
    values[np.abs(values) < 2] = 0
    return csr_matrix(values)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_eigenpairs_are_those_of_the_covariance(features, exact, dense, monkeypatch):
    monkeypatch.setattr(module, "EXACT_FEATURES", 1000 if exact else 10)
    found = spectrum(features.toarray() if dense else features, 6, iterations=20)
    values, vectors = np.linalg.eigh(np.cov(features.toarray().T, bias=True))
    np.testing.assert_allclose(found.mean, features.toarray().mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(found.values, values[::-1][:6], rtol=1e-6)
    overlap = np.abs((found.vectors * vectors[:, ::-1][:, :6]).sum(axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-6)
    assert found.rest == pytest.approx(values[:-6].mean(), rel=1e-6)


@pytest.mark.parametrize("exact", [True, False])
def test_signs_are_fixed_and_results_repeat(features, exact, monkeypatch):
    monkeypatch.setattr(module, "EXACT_FEATURES", 1000 if exact else 10)
    first, again = spectrum(features, 6), spectrum(features, 6)
    np.testing.assert_array_equal(first.vectors, again.vectors)
    assert (first.vectors[np.abs(first.vectors).argmax(axis=0), np.arange(6)] > 0).all()


def test_leading_vectors_do_not_depend_on_how_many_are_asked_for(features):
    np.testing.assert_array_equal(spectrum(features, 20).vectors[:, :5], spectrum(features, 5).vectors)


def test_rank_is_cut_and_precision_kept(features):
    found = spectrum(features.astype(np.float32), 1000)
    assert found.vectors.shape == (60, 60) and found.vectors.dtype == np.float32 and found.rest == 0
    assert spectrum(features[:4], 1000).vectors.shape == (60, 4)


def test_covariance_is_summed_over_blocks(features, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ROWS", 7)
    mean = features.toarray().mean(axis=0)
    np.testing.assert_allclose(gram(features, mean), np.cov(features.toarray().T, bias=True), atol=1e-10)


@pytest.mark.parametrize(("rows", "rank"), [(300, 0), (0, 3)])
def test_nothing_to_decompose_is_an_error(features, rows, rank):
    with pytest.raises(ValueError, match="rank: expected at least 1, and at least one cell, got rank"):
        spectrum(features[:rows], rank)
