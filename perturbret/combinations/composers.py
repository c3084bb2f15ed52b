"""The ways to compose that are compared, by name: a line here puts another one into the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import opponents
from .whitened import whitened


@dataclass(frozen=True)
class Composer:
    """A way to score candidates.

    Attributes
    ----------
    name, says : str
        Says in one line what it does.
    score : callable
        `score(task, train, queries, **setting)`: scores (len(queries), c) of all candidates of a PairTask, from all
        singles and the doubles `train` (rows of the task's queries, to learn from); the other doubles must not count.
    settings : sequence of mappings
        Values of its settings to choose from, the simplest first.
    learns : bool
        Whether it learns from doubles; else only its setting is chosen on them.
    masks : tuple of str
        Where it can be asked.
    """

    name: str
    says: str
    score: Callable[..., np.ndarray]
    settings: Sequence[Mapping] = field(default_factory=lambda: ({},))
    learns: bool = False
    masks: tuple[str, ...] = ("none", "all_targets")


OPPONENTS = (
    Composer("additive", "sum of the two singles, cosine", opponents.additive),
    Composer("additive, centred", "the same, without the mean of all pairs", opponents.centred),
    Composer(
        "additive, whitened", "the same, in directions scaled by how much singles differ there", whitened,
        tuple({"ridge": ridge} for ridge in (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)),
    ),
    Composer("additive, scaled", "stronger and weaker single by fitted factors, cosine", opponents.scaled, learns=True),
    Composer("differential rank", "order of genes by effect against that of the sum", opponents.differential_rank),
    Composer("own targets", "the two most changed own targets", opponents.own_targets, masks=("none",)),
    Composer("norm only", "size of the effect against that of the sum", opponents.norm_only),
)  # fmt: skip

LEARNED = Composer(
    "whitened by doubles too",
    "directions scaled by how much singles and other doubles differ there",
    whitened,
    tuple({"ridge": ridge, "doubles": doubles} for ridge in (1.0, 0.3, 0.1) for doubles in (1.0, 3.0)),
    learns=True,
)

COMPOSERS = (*OPPONENTS, LEARNED)
