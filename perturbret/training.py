"""What the fits of simple methods share: training cells in a fixed order, their classes, and making an encoder."""

import numpy as np
from scipy.sparse import csr_matrix, issparse

from .conditions import CTRL
from .encoders import Encoder, Layer, Transform
from .features import compute_features
from .prepare import Cells, Prepared
from .queries import by_name


class Training:
    """Training cells of a prepared screen.

    Attributes
    ----------
    prepared : Prepared
    kind : str
    seed : int
    classes : tuple of str
        Conditions with training cells, sorted.
    labels : ndarray of int, shape (n,)
        Class of each perturbed training cell; cells are ordered by condition and name, so that no fit depends on the
        order in a file.
    shares : ndarray, shape (C,)
        Of each class among the perturbed training cells.
    draft : bool
        Settings are being compared: what averages many parts may make fewer of them.
    tried : list of dict
        What else was tried on validation cells on the way, for the log of the selection.
    """

    def __init__(self, prepared: Prepared, kind: str, seed: int):
        self.prepared, self.kind, self.seed = prepared, kind, seed
        self.classes = prepared.candidates
        if len(self.classes) < 2:
            raise ValueError(
                f"prepared: expected training cells of at least 2 conditions, got {len(self.classes)}"
            )
        index = by_name(prepared, prepared.where("train"))
        self.cells = prepared.cells.take(index)
        self.labels = np.searchsorted(self.classes, prepared.conditions[index])
        self.shares = np.bincount(self.labels, minlength=len(self.classes)) / len(self.labels)
        self.draft = False
        self.tried: list[dict] = []
        self._computed: dict = {}

    @property
    def reference(self) -> Cells:
        """Control cells in role `train`; all perturbed training cells where the screen has no controls."""
        index = self.prepared.where("train", controls=True)
        index = by_name(self.prepared, index[self.prepared.conditions[index] == CTRL])
        return self.prepared.cells.take(index) if len(index) else self.cells

    def features(self, name: str, **settings) -> csr_matrix | np.ndarray:
        """Features of the perturbed training cells; those last asked for are kept."""
        key = repr((name, settings))
        if key not in self._computed:
            self._computed = {key: compute_features(name, self.cells, settings)}
        return self._computed[key]

    def most_variable(self, limit: int, target_sum: float) -> list[int] | None:
        """Columns of the `limit` genes that vary most in log1p expression; None where there are no more than that."""
        if len(self.cells.genes) <= limit:
            return None
        _, spread = moments(self.features("log1p", target_sum=target_sum))
        return np.sort(np.argsort(-spread, kind="stable")[:limit]).tolist()

    def validation(self, name: str, **settings) -> tuple:
        """Features and classes of the validation cells, those of untrained conditions left out."""
        index = by_name(self.prepared, self.prepared.where("val"))
        index = index[np.isin(self.prepared.conditions[index], self.classes)]
        labels = np.searchsorted(self.classes, self.prepared.conditions[index])
        return compute_features(name, self.prepared.cells.take(index), settings), labels

    def encoder(
        self,
        features: str,
        layers: tuple[Transform, ...],
        head: Layer | None,
        chosen: dict,
        *,
        prior: bool = True,
        **settings,
    ) -> Encoder:
        """An encoder of this training's kind, classes and context. `prior`: the head carries class shares."""
        return Encoder(
            kind=self.kind,
            features=features,
            settings={**settings, "chosen": dict(chosen)},
            layers=layers,
            head=head,
            classes=self.classes,
            log_prior=np.log(self.shares) if prior and head is not None else None,
            context=self.prepared.context,
        )


def class_sums(features, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Sum of the rows of each class, float64 (C, p)."""
    ones = csr_matrix(
        (np.ones(len(labels)), (labels, np.arange(len(labels)))), shape=(n_classes, len(labels))
    )
    sums = ones @ features.astype(np.float64)
    return sums.toarray() if issparse(sums) else np.asarray(sums)


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, float64; 0 exactly where a column does not vary."""
    mean = np.asarray(features.mean(axis=0, dtype=np.float64)).ravel()
    if issparse(features):
        squares = features.astype(np.float64)
        squares.data **= 2
        square = np.asarray(squares.mean(axis=0)).ravel()
    else:
        square = np.square(features, dtype=np.float64).mean(axis=0)
    variance = square - mean**2
    # The difference of equal sums is rounding error, not variance.
    return mean, np.sqrt(np.where(variance > 1e-12 * square, variance, 0.0))


def inverse_spread(features) -> np.ndarray:
    """1 / standard deviation of each column; 1 where a column does not vary."""
    _, spread = moments(features)
    return 1 / np.where(spread > 0, spread, 1.0)
