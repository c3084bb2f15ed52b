"""The network that a run starts from: a checkpoint's or a random one, with the tokens of one gene panel.

Rows of genes that the panel lacks are left out. What is trained, saved and moved to a device is then as small as the
panel, and a saved encoder needs no checkpoint to be loaded.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .checkpoint import load_checkpoint
from .gene_space import place_panel
from .gene_space_file import SPACE_FILE, content_hash, read_gene_space
from .network import ScGPT, fingerprint
from .vocabulary import NO_TOKEN, PAD, SPECIALS, Vocabulary, map_genes

INITS = ("pretrained", "random")


@dataclass(frozen=True)
class Trunk:
    """A network over the tokens of a panel.

    Attributes
    ----------
    network : ScGPT
        In evaluation mode.
    vocabulary : Vocabulary
        The panel's tokens and the special ones, in the order of the network's embedding.
    token_ids : ndarray of int64, shape (n_genes,)
        Token of each gene of the panel, counted in `vocabulary`; -1 where a gene has none.
    token_settings : dict
        Further arguments of `perturbret.tokens.tokenize`.
    origin : dict
        For the manifest: `init`, `checkpoint`, `checkpoint_sha256` (over the weights; of a random network: those that
        it has), `account`, `genes_without_token`; of a checkpoint with a gene space `gene_space`: its hash, and the
        cells of each dataset that its genes were chosen on.
    """

    network: ScGPT
    vocabulary: Vocabulary
    token_ids: np.ndarray
    token_settings: dict
    origin: dict


def make_trunk(
    genes: Iterable[str], *, checkpoint, init: str, seed: int, dropout: float | None = None, report=print
) -> Trunk:
    """Load a checkpoint and keep what a panel needs of it.

    Parameters
    ----------
    genes : iterable of str
        The panel, in the order of its columns.
    checkpoint : path
        A directory that `perturbret.checkpoint.load_checkpoint` reads.
    init : str
        `pretrained`: the checkpoint's weights. `random`: a network of the same shape, with none of them.
    seed : int
        Of random weights.
    dropout : float, optional
        In place of the checkpoint's.
    report : callable
        Gets what was loaded, as text.

    Raises
    ------
    ValueError
        `init` is unknown, or no gene of the panel has a token.
    GeneSpaceMismatch
        The checkpoint comes with a gene space (`perturbret.gene_space`), and the panel is another one.
    """
    if init not in INITS:
        raise ValueError(f"init: expected one of {', '.join(INITS)}, got {init!r}")
    genes = list(genes)
    names, space = genes, None
    if (Path(checkpoint) / SPACE_FILE).exists():
        # Weights that were trained in a fixed gene space go with that space alone.
        space = read_gene_space(checkpoint)
        names = place_panel(space, genes)
    loaded = load_checkpoint(checkpoint, report=report)
    origin = {"init": init, "checkpoint": str(checkpoint), "account": str(loaded.account)}
    if space is not None:
        chosen_on = {dataset: columns.cells for dataset, columns in space.maps.items()}
        origin["gene_space"] = {"sha256": content_hash(space), "cells": chosen_on}
    own_ids = np.full(len(genes), NO_TOKEN)
    placed = np.array([name is not None for name in names], bool)
    own_ids[placed] = map_genes([name for name in names if name is not None], loaded.vocabulary).token_ids
    vocabulary, rows = restrict(loaded.vocabulary, own_ids)
    if len(vocabulary) == len(SPECIALS):
        raise ValueError(
            f"genes: expected some that the vocabulary of {checkpoint} has, got none of {len(genes)} "
            f"(first: {str(genes[0])!r})"
        )
    shape = dataclasses.replace(
        loaded.network.shape,
        n_tokens=len(vocabulary),
        pad_id=vocabulary.ids[PAD],
        dropout=loaded.network.shape.dropout if dropout is None else dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ScGPT(shape).eval()
    if init == "pretrained":
        weights = dict(loaded.network.state_dict())
        weights["encoder.embedding.weight"] = weights["encoder.embedding.weight"][torch.from_numpy(rows)]
        network.load_state_dict(weights)
    origin["checkpoint_sha256"] = fingerprint(loaded.network if init == "pretrained" else network)
    origin["genes_without_token"] = int((own_ids == NO_TOKEN).sum())
    token_ids = np.where(own_ids == NO_TOKEN, NO_TOKEN, np.searchsorted(rows, own_ids))
    return Trunk(network, vocabulary, token_ids, loaded.token_settings, origin)


def restrict(vocabulary: Vocabulary, token_ids: np.ndarray) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of some tokens and the special ones, in the old order, and their old ids."""
    special = [vocabulary.ids[token] for token in SPECIALS]
    rows = np.union1d(np.asarray(token_ids)[np.asarray(token_ids) != NO_TOKEN], special).astype(np.int64)
    tokens = tuple(vocabulary.tokens[row] for row in rows)
    return Vocabulary(tokens, f"{len(tokens)} tokens of {vocabulary.source}"), rows
