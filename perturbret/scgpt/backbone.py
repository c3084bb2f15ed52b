"""scGPT as a backbone: the network that a run starts from, cut to a panel of genes, and the panel's tokens.

Rows of genes that the panel lacks are left out. What is trained, saved and moved to a device is then as small as the
panel, and a saved encoder needs no checkpoint to be loaded.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch

from ..alignment.gene_space import SPACE_FILE, content_hash, place_panel, read_gene_space
from ..data.prepared import UNLABELLED, Cells, Prepared
from ..data.sources import find_checkpoint
from ..data.splits import cells_of_role
from ..evaluation.validation import Fitted
from ..networks.embedding import best_device, fingerprint
from ..networks.fit import fit_network
from .checkpoint import load_checkpoint
from .corpus import Part, held_out_cells
from .network import ScGPT, Shape
from .pretraining import Plan, pretrain
from .settings import ScGPTSettings
from .tokens import Tokens, tokenize
from .vocabulary import NO_TOKEN, PAD, SPECIALS, Vocabulary, map_genes

INITS = ("pretrained", "random")


@dataclass(frozen=True)
class ScGPTBackbone:
    """A network over the tokens of a panel, and the tokens of its genes.

    Attributes
    ----------
    network : ScGPT
        In evaluation mode.
    vocabulary : Vocabulary
        The panel's tokens and the special ones, in the order of the network's embedding.
    token_ids : ndarray of int64, shape (n_genes,)
        Token of each gene of the panel, counted in `vocabulary`; -1 where a gene has none.
    token_settings : dict
        Further arguments of `perturbret.scgpt.tokens.tokenize`.
    origin : dict
        For the manifest: `init`, `checkpoint`, `checkpoint_sha256` (over the weights; of a random network: those that
        it has), `account`, `genes_without_token`; of a checkpoint with a gene space `gene_space`: its hash, and the
        cells of each dataset that its genes were chosen on.
    """

    family: ClassVar[str] = "scgpt"
    settings: ClassVar[type[ScGPTSettings]] = ScGPTSettings

    network: ScGPT
    vocabulary: Vocabulary
    token_ids: np.ndarray
    token_settings: dict
    origin: dict

    @classmethod
    def make(cls, prepared: Prepared, options: ScGPTSettings, *, seed: int, report: Callable) -> Self:
        """The backbone of a run: a checkpoint cut to the panel, adapted to the screen where the options ask for it."""
        backbone = backbone_for(
            prepared.cells.genes,
            checkpoint=find_checkpoint(options.checkpoint),
            init=options.init,
            seed=seed,
            dropout=options.dropout,
            report=report,
        )
        _warn_of_foreign_cells(prepared, backbone, report)
        backbone.network.to(best_device())
        if options.values != "checkpoint":
            settings = {**backbone.token_settings, "values": options.values}
            backbone = replace(backbone, token_settings=settings)
        if options.adapt == "mlm":
            own = prepared.cells.take(np.isin(prepared.roles, ("train", UNLABELLED)))
            how = {"steps": options.adapt_steps, "learning_rate": options.lr_adapt}
            backbone = adapt(backbone, own, **how, seed=seed, report=report)
        return backbone

    def inputs(self, cells: Cells, *, directory: Path | None = None) -> Tokens:
        """Tokens of masked cells, by the settings that the network was trained with."""
        return tokenize(cells, self.token_ids, self.vocabulary, directory=directory, **self.token_settings)

    def describe(self) -> dict:
        """All but the weights, JSON-able."""
        return {
            "shape": asdict(self.network.shape),
            "vocabulary": list(self.vocabulary.tokens),
            "token_ids": self.token_ids.tolist(),
            "token_settings": self.token_settings,
            "origin": self.origin,
        }

    @classmethod
    def load(cls, description: Mapping, weights: dict[str, torch.Tensor], directory: Path) -> Self:
        """The backbone that was described, with these weights."""
        network = ScGPT(Shape(**description["shape"])).eval()
        network.load_state_dict(weights)
        return cls(
            network.to(best_device()),
            Vocabulary(tuple(description["vocabulary"]), str(directory)),
            np.array(description["token_ids"], np.int64),
            description["token_settings"],
            description["origin"],
        )


def fit_scgpt(prepared: Prepared, **options) -> Fitted:
    """`perturbret.networks.fit.fit_network` of scGPT."""
    return fit_network(ScGPTBackbone, prepared, **options)


def _warn_of_foreign_cells(prepared: Prepared, backbone: ScGPTBackbone, report: Callable) -> None:
    """Warn where the genes of the checkpoint's space were chosen on cells other than this split's training cells."""
    context = prepared.context
    cells = backbone.origin.get("gene_space", {}).get("cells", {}).get(context.dataset)
    if cells not in (None, cells_of_role("train", context.split_id, context.split_hash)):
        report(
            f"WARNING: the checkpoint's genes were chosen on these cells of {context.dataset}: {cells}. Others than "
            f"training cells of {context.split_id} may be among them: make the space with this split (02, seed)"
        )


def backbone_for(
    genes: Iterable[str], *, checkpoint, init: str, seed: int, dropout: float | None = None, report=print
) -> ScGPTBackbone:
    """Load a checkpoint and keep what a panel needs of it.

    Parameters
    ----------
    genes : iterable of str
        The panel, in the order of its columns.
    checkpoint : path
        A directory that `perturbret.scgpt.checkpoint.load_checkpoint` reads.
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
        The checkpoint comes with a gene space (`perturbret.alignment.gene_space`), and the panel is another one.
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
    shape = replace(
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
    return ScGPTBackbone(network, vocabulary, token_ids, loaded.token_settings, origin)


def restrict(vocabulary: Vocabulary, token_ids: np.ndarray) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary of some tokens and the special ones, in the old order, and their old ids."""
    special = [vocabulary.ids[token] for token in SPECIALS]
    rows = np.union1d(np.asarray(token_ids)[np.asarray(token_ids) != NO_TOKEN], special).astype(np.int64)
    tokens = tuple(vocabulary.tokens[row] for row in rows)
    return Vocabulary(tokens, f"{len(tokens)} tokens of {vocabulary.source}"), rows


def adapt(
    backbone: ScGPTBackbone,
    cells: Cells,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    report: Callable[[str], None] = print,
) -> ScGPTBackbone:
    """A backbone whose network was trained on to guess hidden values of `cells`; no label takes part.

    The decoders start anew: a checkpoint's are not kept with a backbone.

    Parameters
    ----------
    backbone : ScGPTBackbone
    cells : Cells
        Training cells, masked as everywhere else; never query cells. Their order has no influence.
    steps : int
        Batches of 64 cells or more.
    learning_rate : float
    seed : int
    report : callable

    Returns
    -------
    ScGPTBackbone
        With `adapted` in its `origin`: steps, learning rate, cells, and held-out errors at the end.
    """
    cells = cells.take(np.argsort(cells.names))
    tokens = backbone.inputs(cells)
    genes, values, indptr = tokens.without_cls()
    part = Part(
        "training cells",
        genes,
        values.astype(np.float32),
        indptr,
        np.sort(backbone.token_ids[backbone.token_ids >= 0]),
        held_out_cells(cells.names),
        tokens.hash,
    )
    shape = backbone.network.shape
    plan = Plan(
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        d_hid=shape.d_hid,
        n_layers=shape.n_layers,
        dropout=shape.dropout,
        steps=steps,
        batch_cells=64,
        max_length=max(int(tokens.lengths.max()), 17),
        learning_rate=learning_rate,
        check_every=max(1, steps // 2),
    )
    made = pretrain(
        [part], backbone.vocabulary, plan, seed=seed, start=backbone.network.state_dict(), report=report
    )
    network = made.network.to(backbone.network.encoder.embedding.weight.device)
    last = made.history.iloc[-1]
    adapted = {
        "steps": steps,
        "learning_rate": learning_rate,
        "cells": len(cells),
        "held_out_gene": float(last["gene"]),
        "held_out_mean": float(last["mean"]) if np.isfinite(last["mean"]) else None,
        "sha256": fingerprint(network),
    }
    return replace(backbone, network=network, origin={**backbone.origin, "adapted": adapted})
