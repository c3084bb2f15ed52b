"""What is checked before a report may claim anything: targets, columns that tell, batch and depth, copies of cells."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .audit import label_findings, targets_findings
from .column_guard import guard_columns, guard_findings, suspect
from .compare import LEAK_FREE
from .confounding import Confounding, confounding
from .prepare import prepare
from .runs import outputs_root, read_manifest
from .screen import Screen
from .splits import get_split


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
        See `perturbret.column_guard.guard_columns`.
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
        See `perturbret.runs.outputs_root`; the split is made there where it is missing.
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
