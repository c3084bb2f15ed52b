"""The simple opponents: fitted on training cells, chosen on validation cells, kept as encoders like any other."""

import itertools
import math
from collections.abc import Mapping
from numbers import Real

import numpy as np
import pandas as pd

from . import linear, mlp, references
from .prepare import Prepared
from .training import Training
from .validation import Fitted, best_readout

_FITS = {
    "prior": references.fit_prior,
    "library_size": references.fit_library_size,
    "batch": references.fit_batch,
    "target_activation": references.fit_target_activation,
    "mean_shift": references.fit_mean_shift,
    "pca": linear.fit_pca,
    "lda": linear.fit_lda,
    "logreg": linear.fit_logreg,
    "mlp": mlp.fit_mlp,
    "obsm": references.fit_obsm,
}
# What is tried for each setting where a recipe says nothing, from the simplest to the most complex: the first of
# equals is chosen. Scaling genes to unit variance costs 3 points on shallow cells, yet is offered to the classifier.
SEARCH = {
    "prior": {},
    "library_size": {},
    "batch": {},
    "target_activation": {"target_sum": [10000], "sign": [1, -1]},
    "mean_shift": {"target_sum": [10000]},
    "pca": {"target_sum": [10000], "n_components": [20, 50, 100]},
    "lda": {"target_sum": [10000], "scale": [False], "shrinkage": [0.95, 0.9, 0.7, 0.5, 0.3, 0.1]},
    "logreg": {"target_sum": [10000], "scale": [False, True], "C": [0.01, 0.03, 0.1, 0.3]},
    "mlp": {"target_sum": [10000], "hidden": [128], "weight_decay": [3.0, 1.0]},
    "obsm": {"scale": [False, True]},
}
KINDS = (*(kind for kind in SEARCH if kind != "obsm"), "obsm:<key>", "bayes_ceiling")


def fit_baseline(
    kind: str,
    prepared: Prepared,
    *,
    seed: int,
    search: Mapping | None = None,
    fixed: Mapping | None = None,
) -> Fitted:
    """Fit one opponent on the cells in role `train`, its settings chosen on those in role `val`.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    prepared : Prepared
    seed : int
        Of what is random in a fit.
    search : mapping of str to list, optional
        Values to try for each setting, simplest first; settings left out have the values of `SEARCH`. All
        combinations are tried, and the best micro exact_hit@1 on single validation cells wins, the first of equals.
        Each setting is judged by its best read-out: cosine or whitened cosine to condition means, or its classifier.
    fixed : mapping of str to value, optional
        Settings chosen before: nothing is searched and validation cells have no influence.

    Raises
    ------
    ValueError
        Unknown kind or setting, a value of the wrong type, no training cells, or no validation cells to choose on.
    """
    if kind == "bayes_ceiling":
        from .bayes import fit_bayes

        return Fitted(fit_bayes(prepared), pd.DataFrame({"exact_hit@1": [np.nan], "chosen": [True]}), {})
    name = "obsm" if kind.startswith("obsm:") else kind
    if name not in SEARCH or kind == "obsm":
        raise ValueError(f"encoder: expected one of {', '.join(KINDS)}, got {kind!r}")
    training = Training(prepared, kind, seed)
    if fixed is not None:
        (encoder,) = _FITS[name](training, [dict(fixed)])
        return Fitted(encoder, pd.DataFrame([{**fixed, "exact_hit@1": np.nan, "chosen": True}]), dict(fixed))
    rows, encoders = [], []
    for encoder in _FITS[name](training, _grid(name, search)):
        readout, hit = best_readout(encoder, prepared, seed=seed)
        rows.append({**encoder.settings["chosen"], "exact_hit@1": hit, "readout": readout})
        encoders.append(encoder)
    selection = pd.DataFrame(rows)
    if len(rows) > 1 and selection["exact_hit@1"].isna().any():
        raise ValueError(
            f"search: expected validation cells to choose one of {len(rows)} settings of {kind} on, got none; give "
            f"one value for each setting"
        )
    # Rounded, so that sums of hits in another order are equal.
    best = int(np.nan_to_num(selection["exact_hit@1"].to_numpy(float)).round(9).argmax())
    selection["chosen"] = np.arange(len(rows)) == best
    return Fitted(encoders[best], selection, dict(encoders[best].settings["chosen"]))


def _grid(name: str, search: Mapping | None) -> list[dict]:
    values = dict(SEARCH[name])
    for key, tried in (search or {}).items():
        if key not in values:
            known = ", ".join(values) or "none"
            raise ValueError(f"search: {name} has the settings {known}, got {key!r}")
        if not isinstance(tried, list | tuple) or not tried:
            raise ValueError(f"search: expected a list of values for {key}, got {tried!r}")
        values[key] = [_checked(name, key, value) for value in tried]
    return [
        dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())
    ]


def _checked(name: str, key: str, value):
    """YAML reads 1e4 as a text and not as a number; a text that got through would fail far from here."""
    default = SEARCH[name][key][0]
    if isinstance(default, bool):
        good, expected = isinstance(value, bool), "true or false"
    elif key in ("n_components", "hidden"):
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        expected = "a whole number of at least 1"
    elif key == "sign":
        good, expected = not isinstance(value, bool) and value in (1, -1), "1 or -1"
    else:
        good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (
            0 <= value <= 1 if key == "shrinkage" else value >= 0 if key == "weight_decay" else value > 0
        )
        expected = {"shrinkage": "a number from 0 to 1", "weight_decay": "a number of at least 0"}.get(
            key, "a number above 0 (write 1.0e4 or 10000, YAML takes 1e4 for a text)"
        )
    if not good:
        raise ValueError(f"search: expected {expected} for {key} of {name}, got {value!r}")
    return value
