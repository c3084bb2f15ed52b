"""A one-hidden-layer classifier on sparse features, trained by Adam in numpy: small screens take seconds."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from .base import Average, Encoder, Layer
from .methods import Training, above_zero, at_least_zero, method, whole

LEARNING_RATE = 1e-3
MAX_EPOCHS = 100
PATIENCE = 5
_BATCH = 128
# Members of an average and repeats of a run have different random numbers.
_SEEDS_APART = 10_000


@dataclass(frozen=True)
class Network:
    """logits = max(0, x @ weights[0] + biases[0]) @ weights[1] + biases[1].

    Attributes
    ----------
    weights, biases : tuples of ndarray of float32
    epochs : int
        Passes over the training cells that made it.
    """

    weights: tuple[np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray]
    epochs: int

    def logits(self, features) -> np.ndarray:
        hidden = np.maximum(np.asarray(features @ self.weights[0]) + self.biases[0], 0)
        return hidden @ self.weights[1] + self.biases[1]


def train_network(
    features,
    classes: np.ndarray,
    n_classes: int,
    *,
    hidden: int,
    weight_decay: float,
    seed: int,
    epochs: int | None = None,
    validation: tuple | None = None,
) -> Network:
    """Minimise cross-entropy by AdamW (Loshchilov & Hutter, ICLR 2019; decay on weights, not on biases).

    Parameters
    ----------
    features : csr_matrix of float32, shape (n, p)
    classes : ndarray of int, shape (n,)
    n_classes, hidden : int
    weight_decay : float
        Share of the learning rate by which weights shrink per step.
    seed : int
        Of initial weights and order of cells.
    epochs : int, optional
        Train for just as many. The first epochs of a longer training are the same, so training again with the
        number that early stopping found gives the same network.
    validation : (features, classes), optional
        Needed without `epochs`: training stops when their cross-entropy has not fallen for `PATIENCE` epochs, and
        the network of the best epoch is returned.

    Raises
    ------
    ValueError
        Both `epochs` and `validation`, or neither.
    """
    if (epochs is None) == (validation is None):
        raise ValueError("epochs, validation: expected one of the two")
    rng = np.random.default_rng(seed)
    n, p = features.shape
    parameters = [
        rng.normal(0, np.sqrt(2 / p), (p, hidden)).astype(np.float32),
        np.zeros(hidden, np.float32),
        rng.normal(0, np.sqrt(1 / hidden), (hidden, n_classes)).astype(np.float32),
        np.zeros(n_classes, np.float32),
    ]
    moments = [(np.zeros_like(part), np.zeros_like(part)) for part in parameters]
    best, best_loss, step = None, np.inf, 0
    for epoch in range(1, (epochs or MAX_EPOCHS) + 1):
        order = rng.permutation(n)
        for start in range(0, n, _BATCH):
            rows = order[start : start + _BATCH]
            step += 1
            _adam(
                parameters, _gradients(parameters, features[rows], classes[rows]), moments, step, weight_decay
            )
        if epochs is None:
            network = _network(parameters, epoch)
            loss = _cross_entropy(network.logits(validation[0]), validation[1])
            if loss < best_loss:
                best, best_loss = network, loss
            elif epoch - best.epochs >= PATIENCE:
                break
    return _network(parameters, epochs) if epochs else best


@method(
    "mlp_x5",
    scorings=("classifier",),
    drafts=True,
    target_sum=above_zero(10000),
    hidden=whole(128, 256),
    weight_decay=at_least_zero(3.0, 1.0, 0.3, 0.1),
    members=whole(5),
)
@method("mlp", target_sum=above_zero(10000), hidden=whole(128), weight_decay=at_least_zero(3.0, 1.0))
def fit_mlp(training: Training, grid: list[dict]) -> Iterator[Encoder | Average]:
    """The network as an encoder: the embedding is the hidden layer. The number of epochs is a setting that early
    stopping on validation cells chooses, unless it is given.

    With `members` above 1: the mean class probabilities of so many networks from different random numbers, all trained
    for as many epochs as the first (a deep ensemble; Lakshminarayanan, Pritzel & Blundell 2017, NeurIPS). Settings are
    compared with the first network alone.
    """
    for chosen in grid:
        features = {"target_sum": chosen["target_sum"]}
        members, epochs = [], chosen.get("epochs")
        for number in range(1 if training.draft else chosen.get("members", 1)):
            values, classes = training.features("log1p", **features), training.labels
            options = {"hidden": chosen["hidden"], "weight_decay": chosen["weight_decay"]}
            options |= {"n_classes": len(training.classes), "seed": training.seed + _SEEDS_APART * number}
            validation = None if epochs else training.validation("log1p", **features)
            if validation and not len(validation[1]):
                # No validation cell is of a trained condition: epochs are chosen on every sixth training cell.
                aside = np.arange(len(classes)) % 6 == 0
                parts, validation = (values[~aside], classes[~aside]), (values[aside], classes[aside])
                epochs, validation = train_network(*parts, **options, validation=validation).epochs, None
            made = train_network(values, classes, **options, epochs=epochs, validation=validation)
            epochs = made.epochs
            layers = (Layer(made.weights[0], made.biases[0], relu=True),)
            head = Layer(made.weights[1], made.biases[1])
            members.append(training.encoder("log1p", layers, head, {**chosen, "epochs": epochs}, **features))
        if len(members) == 1:
            yield members[0]
        else:
            yield Average(training.kind, {"chosen": {**chosen, "epochs": epochs}}, tuple(members))


def _network(parameters, epoch):
    first, first_bias, second, second_bias = (part.copy() for part in parameters)
    return Network((first, second), (first_bias, second_bias), epoch)


def _gradients(parameters, block, classes):
    first, first_bias, second, second_bias = parameters
    hidden = np.maximum(np.asarray(block @ first) + first_bias, 0)
    error = hidden @ second + second_bias
    error -= error.max(axis=1, keepdims=True)
    np.exp(error, out=error)
    error /= error.sum(axis=1, keepdims=True)
    error[np.arange(len(classes)), classes] -= 1
    error /= len(classes)
    behind = (error @ second.T) * (hidden > 0)
    return np.asarray(block.T @ behind), behind.sum(axis=0), hidden.T @ error, error.sum(axis=0)


def _adam(parameters, gradients, moments, step, weight_decay):
    rate = np.float32(LEARNING_RATE * np.sqrt(1 - 0.999**step) / (1 - 0.9**step))
    for part, gradient, (mean, square) in zip(parameters, gradients, moments, strict=True):
        if part.ndim == 2:
            part *= np.float32(1 - LEARNING_RATE * weight_decay)
        mean += np.float32(0.1) * (gradient - mean)
        square += np.float32(0.001) * (gradient * gradient - square)
        part -= rate * mean / (np.sqrt(square) + np.float32(1e-8))


def _cross_entropy(logits, classes):
    return -float(log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(classes)), classes].mean())
