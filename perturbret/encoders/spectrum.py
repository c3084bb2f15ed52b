"""Leading eigenvectors of the covariance of sparse features: for PCA, and to precondition logistic regression."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh, qr
from scipy.sparse import issparse

# Up to this many features the covariance matrix itself is decomposed: exact, and faster than iterating.
EXACT_FEATURES = 1500
_OVERSAMPLING = 20
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Spectrum:
    """Mean and leading part of the covariance (divided by n) of some features.

    Attributes
    ----------
    mean : ndarray, shape (p,)
    vectors : ndarray, shape (p, rank)
        Orthonormal; the largest entry of each in absolute value is positive, so that signs are reproducible.
    values : ndarray, shape (rank,)
        Eigenvalues, descending, not negative.
    rest : float
        Mean of the other p - rank eigenvalues; 0 when there are none.
    """

    mean: np.ndarray
    vectors: np.ndarray
    values: np.ndarray
    rest: float


def spectrum(features, rank: int, *, iterations: int = 8) -> Spectrum:
    """Mean and leading `rank` eigenpairs of the covariance; sparse features are not densified as a whole.

    Above `EXACT_FEATURES` features: randomised subspace iteration (Halko, Martinsson & Tropp, SIAM Rev. 53, 2011,
    algorithm 4.4) from a fixed start, `iterations` + 1 times two passes over the features.

    Parameters
    ----------
    features : csr_matrix or ndarray, shape (n, p), float32 or float64
    rank : int
        At least 1; cut to min(n, p).
    iterations : int

    Raises
    ------
    ValueError
        `rank` is below 1, or there are no cells.
    """
    n, p = features.shape
    if rank < 1 or not n:
        raise ValueError(
            f"rank: expected at least 1, and at least one cell, got rank {rank} of {n} x {p} features"
        )
    rank = min(rank, n, p)
    mean = np.asarray(features.mean(axis=0, dtype=np.float64)).ravel()
    squares = (
        features.multiply(features).sum() if issparse(features) else np.square(features).sum(dtype=np.float64)
    )
    trace = float(squares) / n - float(mean @ mean)
    if p <= EXACT_FEATURES:
        values, vectors = _exact(features, mean, rank)
    else:
        values, vectors = _iterated(features, mean, rank, iterations)
    values = np.maximum(values, 0)
    signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(rank)])
    rest = max(0.0, trace - float(values.sum(dtype=np.float64))) / (p - rank) if p > rank else 0.0
    kind = features.dtype
    return Spectrum(mean.astype(kind), (vectors * signs).astype(kind), values.astype(kind), rest)


def gram(features, mean: np.ndarray) -> np.ndarray:
    """Covariance (p, p), divided by n, of features with the given mean; float64 up to `EXACT_FEATURES`, else float32,
    where it takes 4 p**2 bytes."""
    n, p = features.shape
    kind = np.float64 if p <= EXACT_FEATURES else np.float32
    mean = mean.astype(kind)
    total = np.zeros((p, p), kind)
    for start in range(0, n, _BLOCK_ROWS):
        block = features[start : start + _BLOCK_ROWS]
        block = (block.toarray() if issparse(block) else block).astype(kind) - mean
        total += block.T @ block
    return total / kind(n)


def _exact(features, mean, rank):
    # All eigenvectors, for then the leading ones do not depend on how many are asked for, to the last bit.
    values, vectors = eigh(gram(features, mean), overwrite_a=True, check_finite=False)
    return values[::-1][:rank], vectors[:, ::-1][:, :rank]


def _iterated(features, mean, rank, iterations):
    n, p = features.shape
    mean = mean.astype(features.dtype)
    transposed = features.T
    width = min(rank + _OVERSAMPLING, n, p)
    basis = np.random.default_rng(0).normal(size=(p, width)).astype(features.dtype)
    for _ in range(iterations):
        basis, _ = qr(
            _covariance_times(features, transposed, mean, basis), mode="economic", check_finite=False
        )
    image = _covariance_times(features, transposed, mean, basis)
    values, rotation = eigh(basis.T @ image, check_finite=False)
    return values[::-1][:rank], basis @ rotation[:, ::-1][:, :rank]


def _covariance_times(features, transposed, mean, basis):
    scores = np.asarray(features @ basis) - mean @ basis
    # Centred scores sum to 0, so centring the other factor as well would change nothing.
    return np.asarray(transposed @ scores) / np.asarray(features.shape[0], features.dtype)
