"""Combinations that no fit has seen, as their genes alone predict them."""

import numpy as np
from scipy.sparse import csr_matrix

from ..data.conditions import CTRL, JOIN, targets
from ..data.prepared import Cells, Prepared

# Ways to compose, each a library of its own.
COMPOSITIONS = ("added", "scaled", "added_expression")


def composable(prepared: Prepared, role: str) -> tuple[str, ...]:
    """Sorted combinations that are held out and of whose genes each has cells by itself, in training or gallery.

    For validation cells, those that are held out for validation.
    """
    known = set(prepared.conditions[np.isin(prepared.roles, ("train", "gallery"))])
    roles = ("val",) if role == "val" else ("val", "query")
    held_out = set(prepared.conditions[np.isin(prepared.roles, roles)]) - set(prepared.candidates)
    return tuple(sorted(name for name in held_out if len(targets(name)) > 1 and set(targets(name)) <= known))


def compose(encoder, prepared: Prepared, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Prototypes of combinations, from cells of their genes alone: for each of `COMPOSITIONS` float32 (len(names), d).

    With m(g) the mean embedding of gene g's cells (gallery, or training where it has none), and c that of the
    controls (of all training cells where there are none):

        added              c + sum over genes of (m(g) - c)
        scaled             c + a x that sum; a by least squares over the combinations in training, 1 without any
        added_expression   the embedding of a cell whose expression is composed like `added`: from mean shares of
        UMIs, cut
                           off at 0, with the median total of training cells; not of embeddings that came with the cells

    Additive effects: Norman et al. 2019, Science 365:786.

    Parameters
    ----------
    encoder : Encoder
    prepared : Prepared
    names : tuple of str
        Some of `composable`.
    """
    asked = {name: targets(name) for name in names}
    known = set(prepared.candidates)
    trained = {name: targets(name) for name in known if JOIN in name and set(targets(name)) <= known}
    genes = sorted({gene for parts in (*asked.values(), *trained.values()) for gene in parts})

    rows = np.flatnonzero(np.isin(prepared.roles, ("train", "gallery")))
    cells, conditions, roles = prepared.cells.take(rows), prepared.conditions[rows], prepared.roles[rows]
    means = _means(encoder.embed(cells), conditions, roles, [CTRL, *genes, *trained])
    found = {"added": _added(means, asked), "scaled": _added(means, asked, _dominance(means, trained))}
    if not encoder.kind.startswith("obsm:"):
        shares = csr_matrix(cells.counts.multiply(1 / np.maximum(cells.totals, 1)[:, None]))
        total = float(np.median(cells.totals[roles == "train"]))
        expression = np.maximum(_added(_means(shares, conditions, roles, [CTRL, *genes]), asked), 0) * total
        composed = Cells(
            csr_matrix(expression.astype(np.float32)),
            np.full(len(names), total),
            cells.genes,
            np.array([f"{name}/composed" for name in names]),
            None if cells.batch is None else np.repeat(cells.batch[:1], len(names)),
        )
        found["added_expression"] = encoder.embed(composed)
    return {kind: prototypes.astype(np.float32) for kind, prototypes in found.items()}


def _means(values, conditions: np.ndarray, roles: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Mean rows of conditions: over gallery cells, or training cells of conditions without any."""
    means = {}
    for name in names:
        own, gallery = conditions == name, roles == "gallery"
        rows = own & gallery if (own & gallery).any() else own
        rows = np.flatnonzero(rows if rows.any() else ~gallery)
        means[name] = np.asarray(values[rows].mean(axis=0, dtype=np.float64)).ravel()
    return means


def _dominance(means: dict[str, np.ndarray], trained: dict[str, tuple[str, ...]]) -> float:
    """By how much the sum of two shifts is to be scaled to become that of the combination, over those in training."""
    if not trained:
        return 1.0
    added = _added(means, trained) - means[CTRL]
    observed = np.array([means[name] for name in trained]) - means[CTRL]
    return float((added * observed).sum() / max((added**2).sum(), np.finfo(float).tiny))


def _added(means: dict[str, np.ndarray], genes: dict[str, tuple[str, ...]], scale: float = 1.0) -> np.ndarray:
    """c + scale x sum of the genes' shifts from c, a row per combination."""
    centre = means[CTRL]
    shifts = [sum(means[gene] - centre for gene in parts) for parts in genes.values()]
    return centre + scale * np.array(shifts).reshape(len(genes), len(centre))
