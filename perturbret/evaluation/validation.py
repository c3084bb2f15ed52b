"""How well an encoder does on single validation cells: what settings, epochs and read-outs are chosen by."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..data.prepared import Prepared
from .metrics import rank_top
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


def best_readout(
    encoder, prepared: Prepared, *, seed: int, scorings: Sequence[str] = SELECTION_SCORINGS
) -> tuple[str, float]:
    """The best read-out of single validation cells with a mean library, and its exact_hit@1.

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
        `none` where no validation cell has a condition that was trained.
    hit : float
        NaN then.
    """
    validation = prepared.where("val")
    if not np.isin(prepared.conditions[validation], prepared.candidates).any():
        return "none", np.nan
    if encoder.embed(prepared.cells.take(validation[:1])).shape[1] > _MAX_WHITENED:
        scorings = [scoring for scoring in scorings if scoring != "whitened"]
    names = np.array(candidate_names(prepared, "train"))
    hits = {}
    for scored in score_queries(
        encoder,
        prepared,
        role="val",
        libraries=("mean",),
        query_sizes=(1,),
        poolings=("scores",),
        scorings=scorings,
        candidates="train",
        seed=seed,
    ):
        same = np.asarray(scored.queries.conditions, str)[:, None] == names
        hits[scored.scoring] = float((rank_top(scored.scores) * same).sum() / len(same))
    best = max(hits, key=hits.get)
    return best, hits[best]
