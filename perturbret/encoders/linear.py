"""Linear opponents on log1p expression: principal components, shrinkage LDA, multinomial logistic regression."""

from collections.abc import Iterator

import numpy as np
from scipy.linalg import cholesky, solve_triangular, svd
from scipy.sparse import csr_matrix, diags_array

from .base import Encoder, Layer, identity
from .logistic import fit_logistic, preconditioner
from .methods import Training, above_zero, class_sums, flag, inverse_spread, method, share, whole
from .spectrum import gram, spectrum

# Its covariance is dense: this many genes take 0.1 GB and a minute for 70,000 cells.
_LDA_GENES = 5000


@method("pca", target_sum=above_zero(10000), n_components=whole(20, 50, 100))
def fit_pca(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Leading principal components of the perturbed training cells, unscaled."""
    for chosen, components in principal_components(training, grid):
        yield training.encoder("log1p", (components,), None, chosen, target_sum=chosen["target_sum"])


def principal_components(training: Training, grid: list[dict]) -> Iterator[tuple[dict, Layer]]:
    """Each choice with the layer from log1p expression to its `n_components`."""
    # A round number, so that a choice fitted again alone is iterated with as many vectors as in the search.
    largest = -(-max(chosen["n_components"] for chosen in grid) // 100) * 100
    leading, target_sum = None, None
    for chosen in grid:
        if leading is None or chosen["target_sum"] != target_sum:
            target_sum = chosen["target_sum"]
            leading = spectrum(training.features("log1p", target_sum=target_sum), largest)
        vectors = leading.vectors[:, : chosen["n_components"]].astype(np.float64)
        yield chosen, Layer(vectors, -leading.mean.astype(np.float64) @ vectors)


@method(
    "lda_low_rank",
    target_sum=above_zero(10000),
    scale=flag(False),
    n_components=whole(4, 6, 8, 12, 16, 24),
    shrinkage=share(0.95, 0.9, 0.7, 0.5, 0.3, 0.1),
)
@method(
    "lda",
    target_sum=above_zero(10000),
    scale=flag(False),
    shrinkage=share(0.95, 0.9, 0.7, 0.5, 0.3, 0.1),
)
def fit_lda(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Linear discriminant analysis of the most variable genes; the embedding is the discriminant space.

    The within-class covariance S becomes (1 - a) S + a tr(S) / p I with a the `shrinkage` (Friedman 1989, J. Am. Stat.
    Assoc. 84). The embedding whitens by it and keeps the directions in which class means differ, so that the squared
    distances to the means, and hence the head's probabilities, are those of the full space. With `n_components` only
    the directions in which the weighted class means vary most are kept: reduced-rank discriminant analysis (Hastie,
    Tibshirani & Friedman 2009, The Elements of Statistical Learning, section 4.3.3).
    """
    for features, scale, settings, group in _by_features(training, grid, _LDA_GENES):
        sums = class_sums(features, training.labels, len(training.classes))
        total = sums.sum(axis=0) / len(training.labels)
        means = sums / np.bincount(training.labels)[:, None] - total
        within = gram(features, total) - (means.T * training.shares) @ means
        flat = np.trace(within) / len(within)
        for chosen in group:
            shrunk = (1 - chosen["shrinkage"]) * within
            shrunk[np.diag_indices_from(shrunk)] += chosen["shrinkage"] * flat + 1e-9 * (flat or 1.0)
            factor = cholesky(shrunk, lower=True, overwrite_a=True, check_finite=False)
            white = solve_triangular(factor, means.T, lower=True, check_finite=False).T
            _, strength, axes = svd(np.sqrt(training.shares)[:, None] * white, full_matrices=False)
            axes = axes[: max(1, int((strength > 1e-9 * strength[0]).sum()))][: chosen.get("n_components")].T
            located = white @ axes
            projection = solve_triangular(factor, axes, lower=True, trans="T", check_finite=False)
            projection *= scale[:, None]
            bias = -(total / scale) @ projection
            head = Layer(located.T, np.log(training.shares) - 0.5 * (located**2).sum(axis=1))
            yield training.encoder("log1p", (Layer(projection, bias),), head, chosen, **settings)


# Scaling genes to unit variance costs 3 points on shallow cells, yet is offered.
@method("logreg", target_sum=above_zero(10000), scale=flag(False, True), C=above_zero(0.01, 0.03, 0.1, 0.3))
def fit_logreg(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Multinomial logistic regression; the embedding is the logits."""
    n_classes = len(training.classes)
    for features, scale, settings, group in _by_features(training, grid):
        basis = preconditioner(features)
        for chosen in group:
            model = fit_logistic(features, training.labels, n_classes, C=chosen["C"], basis=basis)
            layers = (Layer(model.coef * scale[:, None], model.intercept),)
            yield training.encoder("log1p", layers, identity(n_classes), chosen, **settings)


def _by_features(training: Training, grid: list[dict], limit: int | None = None) -> Iterator[tuple]:
    """Training features, their scale, the settings that make them and the choices that use them: choices with the
    same features stand together."""
    groups: dict[tuple, list[dict]] = {}
    for chosen in grid:
        groups.setdefault((chosen["target_sum"], chosen["scale"]), []).append(chosen)
    for (target_sum, scaled), group in groups.items():
        settings = {"target_sum": target_sum}
        settings |= {} if limit is None else training.most_variable(limit, target_sum)
        features = training.features("log1p", **settings)
        scale = inverse_spread(features) if scaled else np.ones(features.shape[1])
        if scaled:
            features = csr_matrix(features @ diags_array(scale.astype(np.float32)))
        yield features, scale, settings, group
