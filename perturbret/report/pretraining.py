"""What notebook 00 shows: the cells, the curves, and whether cell types separate in the embedding."""

import warnings

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ..data.prepared import Cells
from ..networks.embedding import embed
from ..pretraining.run import CHECKPOINT, Pretraining
from ..scgpt.checkpoint import load_checkpoint
from ..scgpt.network import ScGPT
from ..scgpt.pretraining import PretrainedNetwork
from ..scgpt.tokens import Tokens, tokenize
from ..scgpt.vocabulary import NO_TOKEN, map_genes
from .figures import new_figure

NEIGHBOURS = 15
_FEWEST_GENES = 50


def setting(run: Pretraining) -> str:
    """One line on what is trained on what."""
    plan = run.plan
    line = (
        f"{sum(len(part.held_out) for part in run.corpus):,} cells of {len(run.corpus)} datasets; "
        f"{len(run.vocabulary):,} tokens; {plan.n_layers} layers of width {plan.d_model}; {plan.steps:,} steps."
    )
    if run.space is not None:
        line += f" Tokens are the {len(run.space):,} genes of a common space; cells were compared by value with it."
    return ("**SIMULATED DATA**: no reference cells were found. " if run.simulated else "") + line


def corpus_table(run: Pretraining) -> pd.DataFrame:
    """A row per dataset: cells, held-out cells, genes measured, genes detected per cell (median)."""
    return pd.DataFrame(
        {
            part.name: {
                "cells": len(part.held_out),
                "held out": int(part.held_out.sum()),
                "genes with a token": len(part.measured),
                "genes per cell": int(np.median(np.diff(part.indptr))),
            }
            for part in run.corpus
        }
    ).T


def curves(history: pd.DataFrame) -> Figure:
    """Training loss, and held-out losses against guessing the mean, over steps."""
    figure, (left, right) = new_figure(9.5, 3.2, columns=2)
    left.plot(history["step"], history["loss"], color="#8a8a8a")
    left.set(title="Training loss (sum of the three)", xlabel="step", yscale="log")
    for name, colour in (("gene", "#1b6ca8"), ("cell", "#c1440e"), ("absent", "#3f8f4f")):
        right.plot(history["step"], history[name], color=colour, label=name)
    right.axhline(history["mean"].iloc[-1], color="#555", ls=":", label="the gene's mean")
    right.set(title="Held-out squared error", xlabel="step", yscale="log")
    right.legend()
    return figure


def reload_difference(run: Pretraining, made: PretrainedNetwork) -> float:
    """Largest difference between a weight in memory and the one in the saved checkpoint."""
    saved = load_checkpoint(run.directory / CHECKPOINT, report=lambda text: None).network.state_dict()
    return max(
        (saved[name] - tensor).abs().max().item() for name, tensor in made.network.state_dict().items()
    )


def separation(run: Pretraining, made: PretrainedNetwork) -> pd.DataFrame:
    """kNN accuracy and silhouette of known types for each way to embed cells; empty where too few genes are known."""
    views, types = _views(run, made)
    rows = {name: _scores(values, types) for name, values in views.items()}
    return pd.DataFrame(rows).T


def embedding_map(run: Pretraining, made: PretrainedNetwork) -> Figure | None:
    """First two principal components of each embedding of the labelled cells, coloured by type."""
    views, types = _views(run, made)
    if not views:
        return None
    figure, axes = new_figure(3.6 * len(views), 3.6, columns=len(views))
    names = sorted(set(types))
    for axis, (title, values) in zip(axes, views.items(), strict=True):
        centred = values - values.mean(axis=0)
        left, spread, _ = np.linalg.svd(centred, full_matrices=False)
        for i, name in enumerate(names):
            at = types == name
            axis.scatter(*(left[at, :2] * spread[:2]).T, s=6, color=f"C{i}", label=name, alpha=0.8)
        axis.set(title=title, xticks=[], yticks=[])
    axes[-1].legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def conclusion(run: Pretraining, made: PretrainedNetwork, table: pd.DataFrame) -> str:
    """What the pretraining reached, in computed sentences."""
    last = made.history.iloc[-1]
    gains = {name: 1 - last[name] / last["mean"] for name in ("gene", "cell")}
    said = {name: f"{abs(gain):.0%} {'less' if gain > 0 else 'more'}" for name, gain in gains.items()}
    lines = [
        f"Hidden values of held-out cells are guessed with a squared error of **{last['gene']:.3f}**, {said['gene']} "
        f"than by the gene's mean ({last['mean']:.3f}); from the cell's embedding alone with {last['cell']:.3f}, "
        f"{said['cell']}."
    ]
    if len(table):
        best = table["kNN accuracy"]
        lines.append(
            f"Cell types: kNN accuracy {best['pretrained']:.3f} after pretraining, {best['random']:.3f} before, "
            f"{best['PCA']:.3f} by principal components."
        )
    else:
        lines.append(
            f"Cell types are not compared: tokens stand for fewer than {_FEWEST_GENES} genes of labelled cells."
        )
    lines.append(
        f"The checkpoint is in `{run.directory.name}/{CHECKPOINT}/`; notebook 04 takes its path as `checkpoint`. "
        f"It is a small network trained here, not the scGPT whole-human checkpoint."
    )
    return "\n".join(f"- {line}" for line in lines)


def _views(run: Pretraining, made: PretrainedNetwork) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Embeddings of labelled cells by name, and the cells' types."""
    cells, types = labelled_cells()
    mapped = map_genes(cells.genes, run.vocabulary)
    if (mapped.token_ids != NO_TOKEN).sum() < _FEWEST_GENES:
        return {}, types
    tokens = tokenize(cells, mapped.token_ids, run.vocabulary, values="log1p")
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        random = ScGPT(made.network.shape)
    known = cells.counts[:, mapped.token_ids != NO_TOKEN].toarray() / cells.totals[:, None] * 1e4
    logged = np.log1p(known)
    left, spread, _ = np.linalg.svd(logged - logged.mean(axis=0), full_matrices=False)
    views = {
        "PCA": left[:, :50] * spread[:50],
        "random": _embed(random, tokens),
        "pretrained": _embed(made.network, tokens),
    }
    return views, types


def _embed(network: ScGPT, tokens: Tokens) -> np.ndarray:
    return embed(network, tokens, normalise=True, pooling="mean")


def labelled_cells() -> tuple[Cells, np.ndarray]:
    """The 700 blood cells that scanpy ships, as counts, and their types.

    The file holds log(1 + counts per 10,000) and each cell's total, from which the counts follow.
    """
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = scanpy.datasets.pbmc68k_reduced()
    totals = adata.obs["n_counts"].to_numpy(np.float64)
    counts = adata.raw.X.tocsr().astype(np.float32).copy()
    rows = np.repeat(np.arange(len(totals)), np.diff(counts.indptr))
    counts.data = np.round(np.expm1(counts.data) * totals[rows] / 1e4).astype(np.float32)
    names = adata.obs_names.to_numpy(str)
    return Cells(counts, totals, adata.raw.var_names.to_numpy(str), names), adata.obs["bulk_labels"].to_numpy(
        str
    )


def _scores(values: np.ndarray, types: np.ndarray) -> dict[str, float]:
    """kNN: each cell's own type against the vote of its nearest others, by cosine."""
    from sklearn.metrics import silhouette_score

    unit = (values - values.mean(axis=0)).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :NEIGHBOURS]
    kinds, codes = np.unique(types, return_inverse=True)
    votes = np.stack([np.bincount(codes[row], minlength=len(kinds)) for row in nearest])
    return {
        "kNN accuracy": float((votes.argmax(axis=1) == codes).mean()),
        "silhouette": float(silhouette_score(unit, codes, metric="cosine")),
        "dimensions": values.shape[1],
    }
