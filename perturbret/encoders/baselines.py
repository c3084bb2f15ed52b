"""The simple opponents: fitted on training cells, chosen on validation cells, kept as encoders like any other."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.prepared import Prepared
from ..evaluation.validation import Fitted
from ..files.plugins import load_plugins
from .bayes import fit_bayes
from .methods import METHODS, fit_method

# Importing a module registers its opponents: all modules of this room, then a user's own files.
for _found in pkgutil.iter_modules([str(Path(__file__).parent)]):
    importlib.import_module(f"{__package__}.{_found.name}")
load_plugins()

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

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> screen = simulate_screen(n_singles=3, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> fitted = fit_baseline("pca", prepared, seed=0, search={"n_components": [2, 5]})
    >>> fitted.selection["n_components"].tolist()
    [2, 5]
    >>> fitted.encoder.embed(prepared.cells).shape[1] == fitted.chosen["n_components"]
    True
    """
    if kind == "bayes_ceiling":
        return Fitted(fit_bayes(prepared), pd.DataFrame({"exact_hit@1": [np.nan], "chosen": [True]}), {})
    return fit_method(_name(kind), prepared, seed=seed, search=search, fixed=fixed, kind=kind)


def fit_functions(kind: str) -> list[Callable]:
    """The functions that fit an opponent, for a hash of their code.

    Raises
    ------
    ValueError
        Unknown kind.
    """
    if kind == "bayes_ceiling":
        return [fit_bayes]
    used = METHODS[_name(kind)]
    return [fit_method, used.fit, *(METHODS[name].fit for name in used.also_fits)]


def _name(kind: str) -> str:
    """The registered name behind a kind of opponent."""
    name = "obsm" if kind.startswith("obsm:") else kind
    if name not in METHODS or kind == "obsm":
        raise ValueError(f"encoder: expected one of {', '.join(KINDS)}, got {kind!r}")
    return name
