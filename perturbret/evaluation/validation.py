"""How well an encoder does on single validation cells: what settings, epochs and read-outs are chosen by."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..data.prepared import Prepared
from .metrics import rank_top
from .retrieval import LIBRARY_SCORINGS
from .scoring import candidate_names, score_queries

# Read-outs that settings are compared by, the preferred one of equals first.
SELECTION_SCORINGS = ("cosine", "whitened", "classifier")
# Whitening more dimensions than this costs more than it tells about a choice of settings.
_MAX_WHITENED = 1024


@dataclass(frozen=True)
class Fitted:
    """An encoder and how it was chosen.

    Attributes
    ----------
    encoder : Encoder
    selection : pandas.DataFrame
        One row per setting tried: the settings, `exact_hit@1` on validation cells, the `readout` that reached it,
        `chosen`.
    chosen : dict
        The chosen settings; `fit_baseline(..., fixed=chosen)` fits the same encoder again.
    history : pandas.DataFrame or None
        One row per epoch, for what is trained in epochs by `perturbret.networks.fit`.
    checks : dict
        What was proved of the encoder, for the manifest.
    wall_s : float
        Seconds that the fit took, for the manifest.
    """

    encoder: object
    selection: pd.DataFrame
    chosen: dict
    history: pd.DataFrame | None = None
    checks: dict = field(default_factory=dict)
    wall_s: float = 0.0


def can_choose(prepared: Prepared) -> bool:
    """Whether a validation cell can be ranked right: one of a condition among the candidates."""
    conditions = prepared.conditions[prepared.where("val")]
    return bool(len(conditions)) and bool(
        np.isin(conditions, candidate_names(prepared, prepared.candidate_sets[0], "val")).any()
    )


def best_readout(
    encoder, prepared: Prepared, *, seed: int, scorings: Sequence[str] = SELECTION_SCORINGS
) -> tuple[str, float]:
    """The best read-out of single validation cells with a mean library, and its exact_hit@1.

    Among the candidates that the track is read under; where its validation cells are of conditions that no fit has
    seen, a classifier has no class for them, and is judged by cosine to its embeddings.

    Parameters
    ----------
    encoder : Encoder
        Read-outs that it does not offer are left out.
    prepared : Prepared
    seed : int
    scorings : sequence of str
        From the one preferred among equals.

    Returns
    -------
    readout : str
        `none` where no validation cell has a condition among the candidates.
    hit : float
        NaN then.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> from perturbret.encoders import fit_baseline
    >>> screen = simulate_screen(n_singles=4, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> best_readout(fit_baseline("prior", prepared, seed=0).encoder, prepared, seed=0, scorings=("cosine",))
    ('cosine', 0.25)
    """
    validation = prepared.where("val")
    if not can_choose(prepared):
        return "none", np.nan
    names = np.array(candidate_names(prepared, prepared.candidate_sets[0], "val"))
    if not set(names) <= set(encoder.classes):
        scorings = [scoring for scoring in scorings if scoring in LIBRARY_SCORINGS] or ["cosine"]
    if encoder.embed(prepared.cells.take(validation[:1])).shape[1] > _MAX_WHITENED:
        scorings = [scoring for scoring in scorings if scoring != "whitened"]
    hits = {}
    for scored in score_queries(
        encoder,
        prepared,
        role="val",
        libraries=("mean",),
        query_sizes=(1,),
        poolings=("scores",),
        scorings=scorings,
        candidates=prepared.candidate_sets[0],
        seed=seed,
    ):
        same = np.asarray(scored.queries.conditions, str)[:, None] == names
        hits[scored.scoring] = float((rank_top(scored.scores) * same).sum() / len(same))
    best = max(hits, key=hits.get)
    return best, hits[best]
