"""Naive Bayes on counts: genes are independent negative binomials given condition and depth."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix, issparse

from .base import Encoder, Layer, Transform
from .methods import Training, above_zero, class_sums, flag, method

# Every gene, cell and class takes a logarithm: 70,000 cells of this many genes and 100 classes take two minutes.
_BAYES_GENES = 2000
_BLOCK_VALUES = 4_000_000
# Where a gene does not vary more than Poisson; so small that it is one.
_POISSON = 1e-8


@dataclass(frozen=True)
class NegativeBinomial(Transform):
    """Log-likelihoods of counts under every class, their mean over classes taken off; the last column is the total.

    With x the count of a gene, s the total, mu = s rate and phi the dispersion, up to terms without the class,

        log p(x | class) = x log(mu / (1 + phi mu)) - log(1 + phi mu) / phi        summed over genes

    (Dong et al. 2016, NBLDA, BMC Bioinformatics 17:369, equation 4).

    Attributes
    ----------
    rate : ndarray of float64, shape (C, p)
        Mean count per UMI of the cell, above 0.
    dispersion : ndarray of float64, shape (p,)
        Variance of a count of mean m is m + dispersion m**2.
    """

    rate: np.ndarray
    dispersion: np.ndarray

    @property
    def width(self) -> int:
        return 4 * self.rate.shape[1]

    def __call__(self, values) -> np.ndarray:
        values = np.asarray(values.toarray() if issparse(values) else values, np.float64)
        counts, totals = values[:, :-1], values[:, -1:]
        found = np.empty((len(values), len(self.rate)))
        for column, rate in enumerate(self.rate):
            grown = np.log1p(totals * (rate * self.dispersion))
            # The logarithm of the total is the same for all classes.
            found[:, column] = (counts * (np.log(rate) - grown) - grown / self.dispersion).sum(axis=1)
        return found - found.mean(axis=1, keepdims=True)


@method(
    "naive_bayes",
    smoothing=above_zero(1000.0, 300.0, 100.0, 30.0, 10.0, 3.0),
    overdispersed=flag(False, True),
)
def fit_naive_bayes(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Negative-binomial naive Bayes with size factors; the embedding is the classes' log-likelihoods.

    A class's rate of a gene is its share of the class's UMIs, with `smoothing` cells of median depth added that have
    the rates of all cells: the mean of the posterior under a gamma prior (for Poisson counts). The dispersion is the
    moment estimate over training cells around their classes' unsmoothed means, 0 unless `overdispersed`.
    """
    settings = training.most_variable(_BAYES_GENES, 10000)
    values = training.features("counts", **settings)
    counts, totals = csr_matrix(values[:, :-1], dtype=np.float64), values[:, -1:].toarray().astype(np.float64)
    sums = class_sums(values, training.labels, len(training.classes))
    sums, depths = sums[:, :-1], np.maximum(sums[:, -1:], 1.0)
    # Half a UMI for a gene that no training cell has.
    overall = np.maximum(sums.sum(axis=0), 0.5) / depths.sum()
    typical = np.median(totals)
    moments = _dispersion(counts, totals, sums / depths, training.labels)
    head = Layer(np.ones(len(training.classes)), np.log(training.shares))
    for chosen in grid:
        more = chosen["smoothing"] * max(typical, 1.0)
        dispersion = np.maximum(moments if chosen["overdispersed"] else np.zeros_like(moments), _POISSON)
        layer = NegativeBinomial((sums + more * overall) / (depths + more), dispersion)
        yield training.encoder("counts", (layer,), head, chosen, **settings)


def _dispersion(counts: csr_matrix, totals: np.ndarray, rates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """sum((x - m)**2 - m) / sum(m**2) of each gene with m = total x rate of the cell's class; never below 0."""
    excess, squares = np.zeros(counts.shape[1]), np.zeros(counts.shape[1])
    step = max(1, _BLOCK_VALUES // counts.shape[1])
    for start in range(0, counts.shape[0], step):
        part = np.s_[start : start + step]
        mean = totals[part] * rates[labels[part]]
        excess += ((counts[part].toarray() - mean) ** 2 - mean).sum(axis=0)
        squares += (mean**2).sum(axis=0)
    return np.maximum(excess, 0) / np.where(squares > 0, squares, 1.0)
