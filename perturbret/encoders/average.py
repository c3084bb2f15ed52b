"""The mean of the class probabilities of several simple opponents; validation cells choose which."""

from collections.abc import Iterator
from itertools import combinations

from .base import Average
from .methods import Setting, Training, fit_method, method

# What may be averaged: the best simple classifiers, linear ones, a network and trees, from the simplest.
MEMBERS = ("logreg", "lda_low_rank", "mlp", "extra_trees")
_SETS = tuple("+".join(names) for size in (2, 3, 4) for names in combinations(MEMBERS, size))
# Columns of a selection that are not settings.
_JUDGED = ("exact_hit@1", "readout")


def _allows(value) -> bool:
    names = value.split("+") if isinstance(value, str) else []
    return len(names) >= 2 and len(set(names)) == len(names) and set(names) <= set(MEMBERS)


@method(
    "average",
    scorings=("classifier",),
    also_fits=MEMBERS,
    methods=Setting(_SETS, f"two or more of {', '.join(MEMBERS)}, joined by +", _allows),
)
def fit_average(training: Training, grid: list[dict]) -> Iterator[Average]:
    """The mean of the members' class probabilities, each with the same weight (a linear opinion pool; Genest & Zidek
    1986, Stat. Sci. 1). Each member's settings are chosen first, by its own class probabilities on validation cells."""
    fitted = {}
    for chosen in grid:
        names = chosen["methods"].split("+")
        for name in names:
            if name in fitted:
                continue
            prefix = f"{name}."
            given = {
                key.removeprefix(prefix): value for key, value in chosen.items() if key.startswith(prefix)
            }
            fitted[name] = fit_method(
                name,
                training.prepared,
                seed=training.seed,
                fixed=given or None,
                scorings=("classifier",),
            )
            if not given:
                tried = fitted[name].selection.drop(columns="chosen")
                tried.columns = [key if key in _JUDGED else prefix + key for key in tried.columns]
                training.tried += [{"methods": name, **row} for row in tried.to_dict("records")]
        own = {f"{name}.{key}": value for name in names for key, value in fitted[name].chosen.items()}
        yield Average(
            training.kind,
            {"chosen": {"methods": chosen["methods"], **own}},
            tuple(fitted[name].encoder for name in names),
        )
