"""What a screen holds, and what in it could mislead: the tables of notebook 01."""

import numpy as np
import pandas as pd

from .conditions import CTRL, targets
from .genes import SymbolResolver
from .masking import target_columns
from .screen import Screen
from .shown import Shown


def overview(screen: Screen) -> pd.DataFrame:
    """Scale, sparsity and depth of the screen, and the evidence that its values are counts.

    Returns
    -------
    pandas.DataFrame
        Index: what; column `value`, as text.
    """
    counts = screen.counts
    sums = np.asarray(counts.sum(axis=1)).ravel()
    detected = np.diff(counts.indptr)
    whole = bool(np.all(counts.data == np.round(counts.data)))
    ones = float(np.mean(counts.data == 1)) if counts.nnz else float("nan")
    rows = {
        "cells": f"{screen.n_cells:,}",
        "genes in the panel": f"{screen.n_genes:,}",
        "conditions, controls left out": f"{len(screen.conditions):,}",
        "control cells": f"{int((screen.obs['condition'] == CTRL).sum()):,}",
        "values are whole numbers of at least 0": "yes" if whole else "NO",
        "largest count": f"{counts.data.max() if counts.nnz else 0:,.0f}",
        "share of nonzero counts that are 1": f"{ones:.1%}",
        "share of zeros": f"{1 - counts.nnz / np.prod(counts.shape):.1%}",
        "median genes detected per cell, this panel": f"{np.median(detected):,.0f}",
        "median UMIs per cell, this panel": f"{np.median(sums):,.0f}",
        "median UMIs per cell, whole transcriptome": f"{screen.obs['total'].median():,.0f}",
    }
    return pd.DataFrame({"value": rows})


def loading_notes(screen: Screen) -> pd.DataFrame:
    """What loading found, and how the counts were had: one row per note that is not a table of labels."""
    notes = {}
    for name, value in screen.audit.items():
        if name == "counts":
            notes |= {f"counts: {key}": part for key, part in value.items()}
        elif not isinstance(value, (list, dict)) or not value:
            notes[name] = "none" if isinstance(value, (list, dict)) else value
    return pd.DataFrame({"value": {name.replace("_", " "): str(value) for name, value in notes.items()}})


def label_tables(screen: Screen) -> dict[str, pd.DataFrame]:
    """Tables of the audit: merged labels, dropped conditions and the like, those that are not empty."""
    tables = {}
    for name, value in screen.audit.items():
        if value and isinstance(value, list) and isinstance(value[0], dict):
            tables[name.replace("_", " ")] = pd.DataFrame(value)
        elif value and isinstance(value, dict) and name != "counts":
            tables[name.replace("_", " ")] = pd.DataFrame({"value": pd.Series(value)})
    return tables


def target_table(screen: Screen) -> pd.DataFrame:
    """Which targets of every condition are measured, and so can be masked.

    Returns
    -------
    pandas.DataFrame
        One row per condition: n_cells, targets, measured (panel names), not_measured, umis_per_cell of the
        measured targets in the condition's own cells and in controls.
    """
    resolver = SymbolResolver.from_package()
    columns = target_columns(
        screen.conditions, screen.genes, resolver=resolver, extra=screen.extra_masked_genes
    )
    labels = screen.obs["condition"].to_numpy(str)
    panel = set(map(str, screen.genes))
    by_column = screen.counts.tocsc()
    rows = []
    for condition in screen.conditions:
        own, control = labels == condition, labels == CTRL
        found = columns.get(condition, np.empty(0, int))
        part = by_column[:, found] if len(found) else None
        absent = [gene for gene in targets(condition) if resolver.resolve(gene, panel) is None]
        rows.append(
            {
                "condition": condition,
                "n_cells": int(own.sum()),
                "measured": ", ".join(map(str, screen.genes[found])),
                "not_measured": ", ".join(absent),
                "umis_own_cells": float(part[own].sum() / own.sum()) if part is not None else np.nan,
                "umis_controls": float(part[control].sum() / control.sum())
                if part is not None and control.any()
                else np.nan,
            }
        )
    return Shown(rows)


def batch_table(screen: Screen) -> pd.DataFrame | None:
    """Share of every condition's cells by batch, rows summing to 1; None where there are no batches."""
    if "batch" not in screen.obs:
        return None
    return pd.crosstab(screen.obs["condition"], screen.obs["batch"], normalize="index")


def findings(screen: Screen) -> str:
    """What follows from the audit, in Markdown sentences computed from the tables."""
    table = target_table(screen)
    sizes = table["n_cells"]
    measured = int((table["measured"] != "").sum())
    lines = [
        f"{screen.n_cells:,} cells in {len(table)} conditions of {sizes.min():,} to {sizes.max():,} cells; naming the "
        f"largest condition every time would be right for {sizes.max() / sizes.sum():.1%}, chance is "
        f"{1 / len(table):.1%}.",
        f"{measured} of {len(table)} conditions have a measured target. "
        + (
            "Masking each cell's own targets would tell these conditions by their zeros, so the leak-free mask "
            "removes all targets from all cells."
            if measured
            else "No target is in the panel: masks change nothing here."
        ),
        _batch_finding(screen),
    ]
    merged = screen.audit.get("n_classes_without_merging")
    kept = screen.obs["condition"].nunique()
    if merged and merged > kept:
        lines.append(
            f"Without merging label variants there would have been {merged} classes instead of {kept}."
        )
    return "\n".join(f"- {line}" for line in lines)


def _batch_finding(screen: Screen) -> str:
    if "batch" not in screen.obs:
        return "The entry names no batch column, so batch effects cannot be separated from conditions here."
    perturbed = screen.obs[screen.obs["condition"] != CTRL]
    guess = _batch_guess(perturbed["condition"].to_numpy(str), perturbed["batch"].to_numpy(str))
    prior = perturbed["condition"].value_counts(normalize=True).iloc[0]
    n = perturbed["batch"].nunique()
    text = (
        f"{n} batches. Naming the most common condition of a cell's batch is right for {guess:.1%}, of all batches "
        f"for {prior:.1%}"
    )
    # Many small batches flatter the guess: compare with the same batches, labels shuffled.
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(perturbed["condition"].to_numpy(str))
    if guess > 1.5 * max(prior, _batch_guess(shuffled, perturbed["batch"].to_numpy(str))):
        return (
            f"**Warning:** {text}: the batch tells much of the condition. Read every result against the "
            "batch-only opponent."
        )
    return f"{text}: batches are spread over conditions."


def _batch_guess(conditions: np.ndarray, batch: np.ndarray) -> float:
    """Share of cells whose condition is the most common one of their batch."""
    return float(pd.crosstab(batch, conditions).to_numpy().max(axis=1).sum() / len(conditions))
