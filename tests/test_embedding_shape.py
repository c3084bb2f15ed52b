"""Effective rank, hubs and the trace of depth on embeddings whose shape is known."""

import numpy as np
import pytest
from scipy.stats import skew

from perturbret.evaluation.embedding_shape import depth_r2, effective_rank, hubness


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(200, 8)))[0]
    basis = np.linalg.qr(basis - basis.mean(axis=0))[0]  # orthonormal columns without a mean
    for wide in (False, True):
        rows = basis @ np.eye(8, 300 if wide else 10)
        assert effective_rank(rows + 5) == pytest.approx(8, rel=1e-5)
    values = np.array([3.0, 1.0])
    shares = values / 4
    assert effective_rank(basis[:, :2] * values) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(basis[:, :1] @ np.ones((1, 5))) == pytest.approx(1, abs=1e-3)
    assert effective_rank(np.ones((20, 3))) == effective_rank(np.zeros((20, 3))) == 0
    assert effective_rank(1 + 1e-9 * rng.normal(size=(20, 3))) == 0


def test_hubness_of_even_and_uneven_answers():
    even = np.eye(4)[np.arange(40) % 4]
    assert hubness(even) == {"skewness": 0.0, "largest": 0.25, "never": 0.0}
    hub = np.eye(4)[np.zeros(40, int)]
    found = hubness(hub)
    assert found["skewness"] == pytest.approx(skew([40, 0, 0, 0])) and (found["largest"], found["never"]) == (
        1,
        0.75,
    )
    # All tied: nobody is a hub, whatever the order of names.
    assert hubness(np.full((40, 4), 0.25)) == {"skewness": 0.0, "largest": 0.25, "never": 0.0}


def test_depth_is_found_where_it_is_and_only_there():
    rng = np.random.default_rng(0)
    totals = rng.lognormal(8, 0.5, 400)
    noise = rng.normal(size=(400, 6))
    depth = np.log(totals)[:, None]
    assert depth_r2(np.hstack([depth, noise]), totals) > 0.99
    assert -0.1 < depth_r2(noise, totals) < 0.05
    assert 0.3 < depth_r2(depth + rng.normal(size=(400, 1)) * 0.5, totals) < 0.7
    # Cross-validated: as many dimensions as cells explain nothing of what is not there.
    assert depth_r2(rng.normal(size=(400, 390)), totals) < 0.05
    assert np.isnan(depth_r2(noise, np.ones(400))) and np.isnan(depth_r2(noise[:10], totals[:10]))
