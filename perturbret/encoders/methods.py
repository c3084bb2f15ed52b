"""The register of simple opponents: how each is fitted, which settings it has, which values are tried and allowed.

A new opponent is one function under `@method(...)` in a new file of this room, or in a file anywhere that the variable
PERTURBRET_PLUGINS names (`perturbret.files.plugins`).
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from ..data.conditions import CTRL
from ..data.prepared import Cells, Prepared
from ..evaluation.scoring import by_name
from ..evaluation.validation import SELECTION_SCORINGS, Fitted, best_readout
from .base import Encoder, Layer, Transform, compute_features


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

    def most_variable(self, limit: int, target_sum: float) -> dict[str, list[int]]:
        """`columns` of the `limit` genes that vary most in log1p expression; nothing where there are no more."""
        if len(self.cells.genes) <= limit:
            return {}
        _, spread = moments(self.features("log1p", target_sum=target_sum))
        return {"columns": np.sort(np.argsort(-spread, kind="stable")[:limit]).tolist()}

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


@dataclass(frozen=True)
class Setting:
    """One setting of a method.

    Attributes
    ----------
    tried : tuple
        Values tried where a recipe says nothing, from the simplest to the most complex: the first of equals wins.
    expected : str
        What may be given, in words.
    allows : callable
        Whether a value may be given.
    """

    tried: tuple
    expected: str
    allows: Callable[[object], bool]


def flag(*tried: bool) -> Setting:
    return Setting(tried, "true or false", lambda value: isinstance(value, bool))


def whole(*tried: int, least: int = 1) -> Setting:
    return Setting(
        tried,
        f"a whole number of at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def _numbers(expected: str, allows: Callable[[Real], bool]) -> Callable[..., Setting]:
    def allowed(value) -> bool:
        real = isinstance(value, Real) and not isinstance(value, bool)
        return real and math.isfinite(value) and allows(value)

    return lambda *tried: Setting(tried, expected, allowed)


# YAML reads 1e4 as a text and not as a number; a text that got through would fail far from here.
above_zero = _numbers(
    "a number above 0 (write 1.0e4 or 10000, YAML takes 1e4 for a text)", lambda value: value > 0
)
at_least_zero = _numbers("a number of at least 0", lambda value: value >= 0)
share = _numbers("a number from 0 to 1", lambda value: 0 <= value <= 1)
part = _numbers("a number above 0 and up to 1", lambda value: 0 < value <= 1)
sign = _numbers("1 or -1", lambda value: value in (1, -1))


@dataclass(frozen=True)
class Method:
    """A registered opponent.

    Attributes
    ----------
    name : str
    fit : callable
        (Training, list of settings) -> iterator of an encoder per settings.
    settings : mapping of str to Setting
    scorings : tuple of str
        The read-outs that settings are compared by.
    drafts : bool
        While several settings are compared, `fit` makes smaller encoders (`Training.draft`); the one that is kept is
        fitted in full.
    also_fits : tuple of str
        Other opponents that it may fit as its parts.
    """

    name: str
    fit: Callable[[Training, list[dict]], Iterator]
    settings: Mapping[str, Setting]
    scorings: tuple[str, ...]
    drafts: bool
    also_fits: tuple[str, ...] = ()


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    scorings: Sequence[str] = SELECTION_SCORINGS,
    drafts: bool = False,
    also_fits: Sequence[str] = (),
    **settings: Setting,
) -> Callable:
    """Register the decorated function as the fit of opponent `name`; one function may serve several names.

    Raises
    ------
    ValueError
        The name is taken.

    Examples
    --------
    >>> from perturbret.encoders.base import Layer
    >>> @method("first_genes", width=whole(2, 4))
    ... def fit_first_genes(training, grid):
    ...     "Log expression of the first few genes."
    ...     for chosen in grid:
    ...         kept = Layer(np.eye(len(training.cells.genes))[:, : chosen["width"]], np.zeros(chosen["width"]))
    ...         yield training.encoder("log1p", (kept,), None, chosen, target_sum=10000)
    >>> METHODS["first_genes"].settings["width"].tried
    (2, 4)
    """

    def register(fit):
        if name in METHODS:
            raise ValueError(f"method: {name!r} is registered already, by {METHODS[name].fit.__module__}")
        METHODS[name] = Method(name, fit, settings, tuple(scorings), drafts, tuple(also_fits))
        return fit

    return register


def fit_method(
    name: str,
    prepared: Prepared,
    *,
    seed: int,
    search: Mapping | None = None,
    fixed: Mapping | None = None,
    kind: str = "",
    scorings: Sequence[str] | None = None,
) -> Fitted:
    """Fit a registered opponent: what `perturbret.encoders.baselines.fit_baseline` does.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    prepared, seed, search, fixed
        See `fit_baseline`.
    kind : str
        What the encoder calls itself; the name by default.
    scorings : sequence of str, optional
        The read-outs that settings are compared by, in place of the method's own.

    Raises
    ------
    ValueError
        See `fit_baseline`.
    """
    used, prepared = METHODS[name], prepared.for_fitting()
    training = Training(prepared, kind or name, seed)
    if fixed is not None:
        (encoder,) = used.fit(training, [dict(fixed)])
        return Fitted(encoder, pd.DataFrame([{**fixed, "exact_hit@1": np.nan, "chosen": True}]), dict(fixed))
    grid = _grid(used, search)
    training.draft = used.drafts and len(grid) > 1
    rows, encoders = [], []
    for encoder in used.fit(training, grid):
        readout, hit = best_readout(encoder, prepared, seed=seed, scorings=scorings or used.scorings)
        rows.append({**encoder.settings["chosen"], "exact_hit@1": hit, "readout": readout})
        encoders.append(encoder)
    selection = pd.DataFrame(rows)
    if len(rows) > 1 and selection["exact_hit@1"].isna().any():
        raise ValueError(
            f"search: expected validation cells to choose one of {len(rows)} settings of {training.kind} on, got "
            f"none; give one value for each setting"
        )
    # Rounded, so that sums of hits in another order are equal.
    best = int(np.nan_to_num(selection["exact_hit@1"].to_numpy(float)).round(9).argmax())
    selection["chosen"] = np.arange(len(rows)) == best
    if training.tried:
        selection = pd.concat([selection, pd.DataFrame(training.tried).assign(chosen=False)])
        selection = selection.reset_index(drop=True)
    encoder = encoders[best]
    if training.draft:
        training.draft = False
        (encoder,) = used.fit(training, [dict(encoder.settings["chosen"])])
    return Fitted(encoder, selection, dict(encoder.settings["chosen"]))


def _grid(used: Method, search: Mapping | None) -> list[dict]:
    values = {key: list(setting.tried) for key, setting in used.settings.items()}
    for key, tried in (search or {}).items():
        if key not in values:
            known = ", ".join(values) or "none"
            raise ValueError(f"search: {used.name} has the settings {known}, got {key!r}")
        if not isinstance(tried, list | tuple) or not tried:
            raise ValueError(f"search: expected a list of values for {key}, got {tried!r}")
        setting = used.settings[key]
        for value in tried:
            if not setting.allows(value):
                raise ValueError(
                    f"search: expected {setting.expected} for {key} of {used.name}, got {value!r}"
                )
        values[key] = list(tried)
    return [
        dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())
    ]
