"""What a screen holds, what in it could mislead, and what is checked before a report may claim anything."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..data.conditions import CTRL, targets
from ..data.genes import SymbolResolver
from ..data.prepared import prepare
from ..data.screen import Screen
from ..data.splits import get_split
from ..data.targets import ABSENT, MATCHED, STATUSES, UNKNOWN, count_statuses, match_targets, unsettled
from ..evaluation.column_guard import guard_columns, guard_findings, suspect
from ..evaluation.confounders import Confounding, confounding
from ..runs.runs import outputs_root, read_manifest
from .compare import LEAK_FREE
from .wording import Shown, bullets, listed, plain


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
        if name == "targets":
            continue
        if value and isinstance(value, list) and isinstance(value[0], dict):
            tables[name.replace("_", " ")] = pd.DataFrame(value)
        elif value and isinstance(value, dict) and name != "counts":
            tables[name.replace("_", " ")] = pd.DataFrame({"value": pd.Series(value)})
    return tables


def target_rows(screen: Screen) -> list[dict]:
    """One row per target, as `perturbret.data.targets.TargetMatches.table`; none where labels are no genes."""
    if screen.audit.get("labels_are_names"):
        return []
    if "targets" in screen.audit:
        return list(screen.audit["targets"])
    resolver = SymbolResolver.from_package()
    extra = screen.extra_masked_genes
    return match_targets(screen.conditions, screen.genes, resolver=resolver, extra=extra).table


def target_names(screen: Screen) -> pd.DataFrame:
    """Targets that have no column, or more masked than their own: all columns of `target_rows`, lists as text."""
    rows = [row for row in target_rows(screen) if row["status"] != MATCHED or row["also_masked"]]
    texts = [{key: ", ".join(v) if isinstance(v, list) else v for key, v in row.items()} for row in rows]
    return pd.DataFrame(texts)


def target_table(screen: Screen) -> pd.DataFrame:
    """Which targets of every condition are measured, and so can be masked.

    Returns
    -------
    pandas.DataFrame
        One row per condition: n_cells; measured, the panel names that masks take out; not_measured, known genes;
        unknown, names that HGNC does not know and that have no column; umis_per_cell of what is masked in the
        condition's own cells and in controls.
    """
    status = {row["target"]: row["status"] for row in target_rows(screen)}
    labels, by_column = screen.obs["condition"].to_numpy(str), screen.counts.tocsc()
    control = labels == CTRL
    rows = []
    for condition in screen.conditions:
        own, found = labels == condition, screen.target_columns[condition]
        genes = {kind: [g for g in targets(condition) if status.get(g) == kind] for kind in (ABSENT, UNKNOWN)}
        row = {"condition": condition, "n_cells": int(own.sum())}
        row |= {"measured": ", ".join(map(str, screen.genes[found]))}
        row |= {"not_measured": ", ".join(genes[ABSENT]), "unknown": ", ".join(genes[UNKNOWN])}
        for name, cells in (("umis_own_cells", own), ("umis_controls", control)):
            known = len(found) and cells.any()
            row[name] = float(by_column[:, found][cells].sum() / cells.sum()) if known else np.nan
        rows.append(row)
    return Shown(rows)


def targets_findings(screen: Screen) -> list[str]:
    """What masks can take out, and what may slip past them: Markdown sentences for the first screenful.

    Labels are escaped. Empty where labels are no genes.
    """
    rows = target_rows(screen)
    if not rows:
        return []
    n = count_statuses(rows)
    lines = [
        f"Targets: {', '.join(f'{n[status]} {status}' for status in STATUSES)}."
        + ("" if n[MATCHED] else " No target is in the panel: masks take out nothing of a target's own.")
    ]
    loose = unsettled(rows, screen.audit.get("unmeasured_targets") or ())
    if loose:
        names = {row["target"] for row in loose}
        hit = [condition for condition in screen.conditions if names & set(targets(condition))]
        lines.append(
            f"**Warning:** {len(hit)} of {len(screen.conditions)} conditions have a target that is neither matched "
            f"to a column nor known to be unmeasured, so a mask may miss it: "
            f"{listed(map(_with_nearest, loose), between='; ')}. Conditions: {listed(map(plain, hit))}. No mask is "
            "free of leaks for them until `target_map` or `unmeasured_targets` in the dataset's YAML settles it."
        )
    taken = [plain(row["target"]) for row in unsettled(rows) if row not in loose]
    if taken:
        lines.append(f"Not measured, as the dataset's YAML states: {listed(taken)}.")
    beside = [f"{plain(name)} ({plain(row['target'])})" for row in rows for name in row["also_masked"]]
    if beside:
        lines.append(
            f"Masked with targets, since they lie beside one or have a similar name: {listed(beside)}."
        )
    left_out = screen.audit.get("columns_left_out", {})
    if left_out:
        lines.append(
            f"{len(left_out)} columns are left out, since they are no genes: {listed(map(plain, left_out))}."
        )
    return lines


def _with_nearest(row: dict) -> str:
    near = f"nearest column {plain(row['nearest'])}" if row["nearest"] else "no column of a similar name"
    return f"{plain(row['target'])} ({near})"


def label_findings(screen: Screen) -> list[str]:
    """Cells that were left out by their label, and labels to look at: Markdown sentences, labels escaped."""
    lines = []
    for key, what in (
        ("unlabelled_labels", "cells are left out, since their label names no perturbation"),
        ("dropped_labels", "cells are left out, as the dataset's entry says"),
    ):
        if held := screen.audit.get(key, {}):
            counted = [f"{plain(label) or 'blank'} {cells:,}" for label, cells in held.items()]
            lines.append(f"{sum(held.values()):,} {what}: {listed(counted)}.")
    if suspicious := screen.audit.get("suspicious_labels", []):
        texts = [f"{plain(row['label'])} ({row['n_cells']:,} cells; {row['why']})" for row in suspicious]
        lines.append(f"**Look at these labels:** {listed(texts, between='; ')}.")
    return lines


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
            "Masking each cell's own targets would tell these conditions by their zeros, so the default mask "
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
    return bullets(lines)


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


@dataclass(frozen=True)
class Checks:
    """Findings of all checks on the training cells of one screen.

    Attributes
    ----------
    warnings : list of str
        Markdown sentences that belong on top of every page; none where nothing was found.
    notes : list of str
        Markdown sentences on what was checked and found in order.
    suspect : bool
        A column that the methods read nearly names a perturbation, and the dataset's entry does not accept it.
    confounded : bool
        Batch or depth alone tell much of the condition.
    columns : pandas.DataFrame
        See `perturbret.evaluation.column_guard.guard_columns`.
    nuisance : Confounding
    """

    warnings: list[str]
    notes: list[str]
    suspect: bool
    confounded: bool
    columns: pd.DataFrame
    nuisance: Confounding

    @property
    def names(self) -> list[str]:
        """What was checked, in words."""
        return ["names of targets", "columns that tell a condition", "batch and depth", "copies of cells"]


def check_screen(screen: Screen, *, outputs: str = "", encoders: Collection[str] | None = None) -> Checks:
    """Run all checks on the training cells of seed 0 under the mask of the headline.

    Parameters
    ----------
    screen : Screen
    outputs : str
        See `perturbret.runs.runs.outputs_root`; the split is made there where it is missing.
    encoders : collection of str, optional
        Whose input counts for `suspect`; None: of every run that lies in the outputs, genes at least.
    """
    root = outputs_root(outputs) / screen.name
    if encoders is None:
        fits = [read_manifest(path.parent).get("fit") for path in root.glob("*/manifest.json")]
        encoders = {fit["params"]["encoder"] for fit in fits if fit}
    split = get_split(screen, seed=0, directory=root / "splits")
    prepared = prepare(screen, split, mask=LEAK_FREE)
    accepted = screen.audit.get("accepted_columns", ())
    columns, nuisance = guard_columns(prepared, accepted=accepted), confounding(prepared)
    lines = [
        *targets_findings(screen),
        *label_findings(screen),
        *guard_findings(columns, accepted),
        *nuisance.findings(),
        _copies(screen),
    ]
    loud = ("**Warning", "**SUSPECT", "**CONFOUNDED", "**Look at")
    return Checks(
        warnings=[line for line in lines if line.startswith(loud)],
        notes=[line for line in lines if not line.startswith(loud)],
        suspect=any(suspect(columns, encoder) for encoder in {"pca", *encoders}),
        confounded=nuisance.confounded,
        columns=columns,
        nuisance=nuisance,
    )


def _copies(screen: Screen) -> str:
    sizes = np.bincount(screen.duplicates)
    copies, groups = int(sizes[sizes > 1].sum()), int((sizes > 1).sum())
    if not copies:
        return "No two cells have the same counts in every gene."
    labels = screen.obs["condition"].groupby(screen.duplicates).nunique()
    return (
        f"{copies:,} cells have the same counts as another one in every gene ({groups:,} groups, "
        f"{int((labels > 1).sum()):,} of them under several conditions). Every group is in one role, so that no cell "
        f"is asked for that was trained on."
    )
