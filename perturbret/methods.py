"""The register of simple opponents: how each is fitted, which settings it has, which values are tried and allowed.

A new opponent is one file with a function under `@method(...)`, imported by `perturbret.baselines`, and a recipe.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import pandas as pd

from .prepare import Prepared
from .training import Training
from .validation import SCORINGS, Fitted, best_readout

# YAML reads 1e4 as a text and not as a number; a text that got through would fail far from here.
_TEXT = "(write 1.0e4 or 10000, YAML takes 1e4 for a text)"


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


def above_zero(*tried: float) -> Setting:
    return Setting(tried, f"a number above 0 {_TEXT}", lambda value: _number(value) and value > 0)


def at_least_zero(*tried: float) -> Setting:
    return Setting(tried, "a number of at least 0", lambda value: _number(value) and value >= 0)


def share(*tried: float) -> Setting:
    return Setting(tried, "a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)


def part(*tried: float) -> Setting:
    return Setting(tried, "a number above 0 and up to 1", lambda value: _number(value) and 0 < value <= 1)


def sign(*tried: int) -> Setting:
    return Setting(tried, "1 or -1", lambda value: _number(value) and value in (1, -1))


def _number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


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
    """

    name: str
    fit: Callable[[Training, list[dict]], Iterator]
    settings: Mapping[str, Setting]
    scorings: tuple[str, ...]
    drafts: bool


METHODS: dict[str, Method] = {}


def method(
    name: str, *, scorings: Sequence[str] = SCORINGS, drafts: bool = False, **settings: Setting
) -> Callable:
    """Register the decorated function as the fit of opponent `name`; one function may serve several names.

    Raises
    ------
    ValueError
        The name is taken.
    """

    def register(fit):
        if name in METHODS:
            raise ValueError(f"method: {name!r} is registered already, by {METHODS[name].fit.__module__}")
        METHODS[name] = Method(name, fit, settings, tuple(scorings), drafts)
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
    """Fit a registered opponent: what `perturbret.baselines.fit_baseline` does.

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
    used = METHODS[name]
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
