"""Which genes an answer hangs on: what taking one out of a cell does to the score of its true condition."""

import numpy as np
import pandas as pd
from scipy.sparse import diags_array

from ..data.prepared import Cells, Prepared
from .retrieval import build_library, class_scores, score_library
from .scoring import candidate_names, library_cells, make_queries, whitening


def occlusion(
    encoder,
    prepared: Prepared,
    conditions: list[str],
    *,
    library: str,
    scoring: str,
    n_genes: int = 40,
    n_cells: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the score of the true condition falls, against the mean score of the others, without one gene's counts.

    Occlusion (Zeiler & Fergus 2014, ECCV): the counts of a gene, and what they add to the total, are taken out of
    query cells as a mask would. Only genes that training cells of the condition express otherwise than all training
    cells are looked at: the `n_genes` of largest |difference of mean log1p(counts per 10,000)|. What a gene stands
    for may be carried by others as well: a small fall says little, a large one that the method goes by this gene.

    Parameters
    ----------
    encoder : Encoder
    prepared : Prepared
    conditions : list of str
        Of query cells.
    library, scoring : str
        The read-out.
    n_genes, n_cells : int
        Genes and query cells of each condition; cells in name order.
    seed : int
        Of a bootstrap library.

    Returns
    -------
    pandas.DataFrame
        condition, gene, `fall` (mean over cells, in units of the scoring), `error` (its standard error), `expressed`
        (share of these cells that count the gene), n_cells; largest fall first within a condition.
    """
    names = candidate_names(prepared, prepared.candidate_sets[0], "query")
    rank = _scorer(encoder, prepared, names, library, scoring, seed)
    queries = make_queries(prepared, size=1, seed=seed)
    train = prepared.cells.take(prepared.where("train"))
    labels = prepared.conditions[prepared.where("train")]
    expression = (train.counts.multiply(1e4 / np.maximum(train.totals, 1)[:, None])).tocsr().log1p()
    overall = np.asarray(expression.mean(axis=0)).ravel()
    tables = []
    for condition in conditions:
        rows = queries.members[queries.conditions == condition, 0][:n_cells]
        own = np.flatnonzero(labels == condition)
        away = np.abs(np.asarray(expression[own].mean(axis=0)).ravel() - overall) if len(own) else overall
        genes = np.argsort(-away, kind="stable")[:n_genes]
        cells, true = prepared.cells.take(rows), names.index(condition)
        whole = _lead(rank(cells), true)
        falls = np.array([whole - _lead(rank(_without(cells, gene)), true) for gene in genes])
        tables.append(
            pd.DataFrame(
                {
                    "condition": condition,
                    "gene": prepared.cells.genes[genes],
                    "fall": falls.mean(axis=1),
                    "error": falls.std(axis=1, ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else np.nan,
                    "expressed": np.asarray((cells.counts[:, genes] > 0).mean(axis=0)).ravel(),
                    "n_cells": len(rows),
                }
            ).sort_values("fall", ascending=False, kind="stable")
        )
    return pd.concat(tables, ignore_index=True)


def _scorer(encoder, prepared: Prepared, names, library: str, scoring: str, seed: int):
    """Cells -> scores (n, candidates) at a read-out."""
    if library == "none":
        prior = encoder.log_prior if scoring == "classifier_corrected" else None
        return lambda cells: class_scores(
            encoder.log_proba(encoder.embed(cells)), encoder.classes, names, prior
        )
    rows = library_cells(prepared, prepared.candidate_sets[0], "query")
    embeddings, conditions = encoder.embed(prepared.cells.take(rows)), prepared.conditions[rows]
    made = build_library(embeddings, conditions, kind=library, seed=seed)
    space = whitening(encoder, prepared, rows, embeddings) if scoring == "whitened" else None
    return lambda cells: score_library(encoder.embed(cells), made, space)


def _lead(scores: np.ndarray, true: int) -> np.ndarray:
    """Score of the true condition over the mean of the others, (n,)."""
    others = np.delete(scores, true, axis=1)
    return scores[:, true] - others.mean(axis=1)


def _without(cells: Cells, gene: int) -> Cells:
    kept = np.ones(cells.counts.shape[1], np.float32)
    kept[gene] = 0
    taken = cells.counts[:, [gene]].toarray().ravel()
    return Cells(
        (cells.counts @ diags_array(kept)).tocsr(),
        cells.totals - taken,
        cells.genes,
        cells.names,
        cells.batch,
        cells.obsm,
    )
