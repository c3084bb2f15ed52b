"""Prepared cells and an encoder small enough to reason about, for tests of scoring and evaluation."""

import numpy as np
from scipy.sparse import csr_matrix

from perturbret.conditions import CTRL
from perturbret.prepare import Cells, Context, Prepared


def toy_cells(conditions, roles, *, counts=None, batch=None, obsm=None, names=None) -> Prepared:
    """Cells with the given labels and roles; by default each is named by its number and counts one UMI."""
    conditions, roles = np.asarray(conditions, str), np.asarray(roles, "U8")
    n = len(conditions)
    counts = np.ones((n, 1)) if counts is None else np.asarray(counts)
    cells = Cells(
        csr_matrix(counts.astype(np.float32)),
        counts.sum(axis=1).astype(float),
        np.array([f"gene{i}" for i in range(counts.shape[1])]),
        np.array([f"cell{i:05d}" for i in range(n)]) if names is None else np.asarray(names, str),
        None if batch is None else np.asarray(batch, str),
        {} if obsm is None else obsm,
    )
    context = Context("toy", "data", "in_dist-seed0", "split", "all_targets", counts.shape[1], "genes")
    candidates = tuple(sorted(set(conditions[roles == "train"]) - {CTRL}))
    return Prepared(cells, conditions, roles, candidates, {}, context)


def toy_screen(n_train=20, n_query=10, conditions=("A", "A+B", "B", "C", "D"), controls=5, batches=0):
    """Labels, roles and batches of a balanced screen with some controls."""
    labels, roles = [], []
    for condition in conditions:
        labels += [condition] * (n_train + n_query)
        roles += ["train"] * n_train + ["query"] * n_query
    labels += [CTRL] * 2 * controls
    roles += ["train"] * controls + ["query"] * controls
    batch = [f"batch{i % batches}" for i in range(len(labels))] if batches else None
    return {"conditions": np.array(labels), "roles": np.array(roles), "batch": batch}


def reordered(prepared: Prepared, order: np.ndarray) -> Prepared:
    """The same cells in another order."""
    conditions, roles = prepared.conditions[order], prepared.roles[order]
    return Prepared(
        prepared.cells.take(order), conditions, roles, prepared.candidates, prepared.columns, prepared.context
    )


class ToyEncoder:
    """Embeds by a function of Cells; `weights` (d, C) make a softmax head."""

    kind = "toy"

    def __init__(self, prepared: Prepared, embed, *, weights=None, log_prior=None):
        self.context, self.classes = prepared.context, prepared.candidates
        self.function, self.head, self.log_prior = embed, weights, log_prior

    def embed(self, cells: Cells) -> np.ndarray:
        return np.asarray(self.function(cells), np.float32)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        logits = embeddings.astype(np.float64) @ self.head
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def from_obsm(key: str = "x"):
    """An embedding that is stored with the cells."""
    return lambda cells: cells.obsm[key]
