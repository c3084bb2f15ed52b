"""Go on with masked-value training on a screen's own training cells, before labels are used."""

import dataclasses
from collections.abc import Callable

import numpy as np

from .corpus import Part, held_out_cells
from .network import fingerprint
from .prepare import Cells
from .pretraining import Plan, pretrain
from .tokens import tokenize
from .trunk import Trunk

_BATCH = 64


def adapt_trunk(
    trunk: Trunk,
    cells: Cells,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    report: Callable[[str], None] = print,
) -> Trunk:
    """A trunk whose network was trained on to guess hidden values of `cells`; no label takes part.

    The decoders start anew: a checkpoint's are not kept with a trunk.

    Parameters
    ----------
    trunk : Trunk
    cells : Cells
        Training cells, masked as everywhere else; never query cells. Their order has no influence.
    steps : int
        Batches of 64 cells or more.
    learning_rate : float
    seed : int
    report : callable

    Returns
    -------
    Trunk
        With `adapted` in its `origin`: steps, learning rate, cells, and held-out errors at the end.
    """
    cells = cells.take(np.argsort(cells.names))
    tokens = tokenize(cells, trunk.token_ids, trunk.vocabulary, **trunk.token_settings)
    genes, values, indptr = tokens.without_cls()
    part = Part(
        "training cells",
        genes,
        values.astype(np.float32),
        indptr,
        np.sort(trunk.token_ids[trunk.token_ids >= 0]),
        held_out_cells(cells.names),
        tokens.hash,
    )
    shape = trunk.network.shape
    plan = Plan(
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        d_hid=shape.d_hid,
        n_layers=shape.n_layers,
        dropout=shape.dropout,
        steps=steps,
        batch_cells=_BATCH,
        max_length=max(int(tokens.lengths.max()), 17),
        learning_rate=learning_rate,
        check_every=max(1, steps // 2),
    )
    made = pretrain(
        [part], trunk.vocabulary, plan, seed=seed, start=trunk.network.state_dict(), report=report
    )
    network = made.network.to(trunk.network.encoder.embedding.weight.device)
    last = made.history.iloc[-1]
    adapted = {
        "steps": steps,
        "learning_rate": learning_rate,
        "cells": len(cells),
        "held_out_gene": float(last["gene"]),
        "held_out_mean": float(last["mean"]) if np.isfinite(last["mean"]) else None,
        "sha256": fingerprint(network),
    }
    return dataclasses.replace(trunk, network=network, origin={**trunk.origin, "adapted": adapted})
