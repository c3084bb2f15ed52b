"""Opponents that know almost nothing: class shares, depth, batch, the targets' own expression, a shift of means."""

from collections.abc import Iterator

import numpy as np

from .base import Encoder, Layer, compute_features, depth, identity, log1p
from .logistic import fit_logistic
from .methods import Training, above_zero, class_sums, flag, inverse_spread, method, moments, sign

# Cells' worth of the class shares added to each batch's own: few cells must not exclude a condition.
_PRIOR_CELLS = 10.0
# Embeddings of mean_shift are dense: 100,000 cells of this many genes take 0.8 GB.
_SHIFT_GENES = 2000


@method("prior")
def fit_prior(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """The same for every cell: log class shares."""
    head = Layer(np.zeros((1, len(training.classes))), np.log(training.shares))
    yield training.encoder("constant", (), head, {})


@method("library_size")
def fit_library_size(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Logistic regression on log total and log number of detected genes."""
    values = depth(training.cells).astype(np.float64)
    mean, _ = moments(values)
    scale = inverse_spread(values)
    standard = Layer(scale, -mean * scale)
    model = fit_logistic(standard(values), training.labels, len(training.classes), C=1.0)
    yield training.encoder("depth", (standard,), Layer(model.coef, model.intercept), {})


@method("batch")
def fit_batch(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Shares of the classes within the cell's batch, shrunk towards the class shares; a batch that is not among the
    training cells gets the class shares."""
    cells = training.cells
    batches = [] if cells.batch is None else np.unique(cells.batch).tolist()
    values = training.features("batch", batches=tuple(batches))
    counts = class_sums(values, training.labels, len(training.classes)).T
    log_shares = np.log(counts + _PRIOR_CELLS * training.shares) - np.log(
        counts.sum(axis=1, keepdims=True) + _PRIOR_CELLS
    )
    head = Layer(log_shares - np.log(training.shares), np.log(training.shares))
    yield training.encoder("batch", (), head, {}, batches=batches)


@method("target_activation", target_sum=above_zero(10000), sign=sign(1, -1))
def fit_target_activation(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """z-scores of each condition's measured targets against controls, summed over the targets and divided by the root
    of their number (Stouffer); 0 for a condition without any. `sign` -1: perturbation lowers its target.

    The variance of a gene is taken as if one more control held one count of it, or silent genes had none.
    """
    cells = training.reference
    for chosen in grid:
        values = log1p(cells, chosen["target_sum"])
        mean, spread = moments(values)
        typical = np.median(cells.totals[cells.totals > 0]) if (cells.totals > 0).any() else 1.0
        spread = np.sqrt(spread**2 + np.log1p(chosen["target_sum"] / typical) ** 2 / (len(cells) + 1))
        weight = np.zeros((len(mean), len(training.classes)))
        for column, condition in enumerate(training.classes):
            own = training.prepared.columns.get(condition, ())
            if len(own):
                weight[own, column] = chosen["sign"] / spread[own] / np.sqrt(len(own))
        layers, head = (Layer(weight, -mean @ weight),), identity(len(training.classes))
        yield training.encoder("log1p", layers, head, chosen, prior=False, target_sum=chosen["target_sum"])


@method("mean_shift", target_sum=above_zero(10000))
def fit_mean_shift(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """log1p expression minus its mean over control cells; of the most variable genes, where there are many."""
    for chosen in grid:
        settings = {"target_sum": chosen["target_sum"]}
        settings |= training.most_variable(_SHIFT_GENES, **settings)
        mean, _ = moments(compute_features("log1p", training.reference, settings))
        yield training.encoder("log1p", (Layer(np.ones(len(mean)), -mean),), None, chosen, **settings)


@method("obsm", scale=flag(False, True))
def fit_obsm(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """A given embedding as it is, or standardised on training cells."""
    values = training.features(training.kind)
    for chosen in grid:
        layers = ()
        if chosen["scale"]:
            mean, _ = moments(values)
            scale = inverse_spread(values)
            layers = (Layer(scale, -mean * scale),)
        yield training.encoder(training.kind, layers, None, chosen)
