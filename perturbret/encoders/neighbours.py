"""Nearest neighbours among the training cells, by cosine between principal components."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .base import Encoder, Transform, identity
from .linear import principal_components
from .methods import Training, above_zero, method, whole


@dataclass(frozen=True)
class Neighbours(Transform):
    """Log shares of the classes among the `k` training cells of largest cosine, class shares counting as one more.

    Cells that are as near as the k-th, to 9 decimals, all count: no order of cells decides.

    Attributes
    ----------
    directions : ndarray of float32, shape (N, d)
        Training cells, of length 1 (or 0).
    labels : ndarray of int32, shape (N,)
    shares : ndarray of float64, shape (C,)
    k : int
        Cut to N.
    """

    directions: np.ndarray
    labels: np.ndarray
    shares: np.ndarray
    k: int

    @property
    def width(self) -> int:
        return 3 * len(self.labels)

    def __call__(self, values) -> np.ndarray:
        cosine = _unit(values).astype(np.float64) @ self.directions.T.astype(np.float64)
        # Rounded: a matrix product sums one row in another order than many.
        np.round(cosine, 9, out=cosine)
        k = min(self.k, len(self.labels))
        near = cosine >= np.partition(cosine, -k, axis=1)[:, [-k]]
        votes = near.astype(np.float32) @ np.eye(len(self.shares), dtype=np.float32)[self.labels]
        return np.log(votes + self.shares)


@method(
    "knn",
    scorings=("classifier",),
    target_sum=above_zero(10000),
    n_components=whole(20, 50, 100),
    k=whole(200, 100, 50, 25, 10),
)
def fit_knn(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """k nearest neighbours (Cover & Hart 1967, IEEE Trans. Inf. Theory 13) by cosine between principal components
    of log1p expression, as in `pca`; the embedding is the logarithm of the classes' votes."""
    for chosen, components in principal_components(training, grid):
        settings = {"target_sum": chosen["target_sum"]}
        known = _unit(components(training.features("log1p", **settings)))
        near = Neighbours(known, training.labels.astype(np.int32), training.shares, chosen["k"])
        head = identity(len(training.classes))
        yield training.encoder("log1p", (components, near), head, chosen, **settings)


def _unit(values: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay so. Rounded first, so that the order of earlier sums is hidden."""
    values = np.asarray(values).astype(np.float32).astype(np.float64)
    length = np.sqrt((values**2).sum(axis=1, keepdims=True))
    return (values / np.where(length > 0, length, 1.0)).astype(np.float32)
