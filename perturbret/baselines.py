"""The simple opponents: fitted on training cells, chosen on validation cells, kept as encoders like any other."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

# Importing a module registers its opponents (`perturbret.methods.method`).
from . import average, linear, mlp, naive_bayes, neighbours, references, trees  # noqa: F401
from .methods import METHODS, fit_method
from .prepare import Prepared
from .validation import Fitted

# What is tried for each setting where a recipe says nothing, from the simplest to the most complex.
SEARCH = {
    name: {key: list(setting.tried) for key, setting in used.settings.items()}
    for name, used in METHODS.items()
}
KINDS = (*(name for name in METHODS if name != "obsm"), "obsm:<key>", "bayes_ceiling")


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
        Each setting is judged by its best read-out: cosine or whitened cosine to condition means, or its classifier
        (of neighbours, trees and averages, whose embeddings know the training cells, by the classifier alone).
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
    if name not in METHODS or kind == "obsm":
        raise ValueError(f"encoder: expected one of {', '.join(KINDS)}, got {kind!r}")
    return fit_method(name, prepared, seed=seed, search=search, fixed=fixed, kind=kind)
