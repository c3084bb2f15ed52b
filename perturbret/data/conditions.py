"""Condition names: one spelling per perturbation, and the genes that it targets."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

CTRL = "ctrl"
JOIN = "+"


def canonical_condition(
    label: object, *, control_label: str | Sequence[str] | None, delimiter: str | None = JOIN
) -> str:
    """The one name of the condition that `label` spells.

    Gene symbols are stripped, sorted and joined by `+`; a control that pads a single (`A+ctrl`, `ctrl+A`)
    is left out, as is a repeated gene (`A+A` is `A`); a label of controls only is `ctrl`. The case of gene
    symbols is kept, that of controls is ignored. A lower-case `ctrl` is a control in every screen; `CTRL`
    is also the symbol of chymotrypsin like, and is read as that gene unless `control_label` is `ctrl`.

    Parameters
    ----------
    label : object
        As it stands in the source, usually a str.
    control_label : str, sequence of str or None
        What the source calls its controls; a name may hold the delimiter (`non_targeting` with `_`). None: the
        source has no name of its own for them.
    delimiter : str or None, default "+"
        What stands between the genes of a combination. None: labels are not gene combinations (cell types,
        say); each is kept whole, its `+` written as the superscript `⁺` (`CD34⁺`), to stay one target.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        `label` is missing, names an empty gene, or holds `+` within a symbol; `delimiter` is empty.

    Examples
    --------
    >>> canonical_condition("ctrl+KLF1", control_label="ctrl")
    'KLF1'
    >>> canonical_condition("KLF1_BAK1", control_label="control", delimiter="_")
    'BAK1+KLF1'
    """
    if delimiter == "":
        raise ValueError("delimiter: expected at least one character or None, got ''")
    if label is None or label is pd.NA or label is pd.NaT or (isinstance(label, float) and np.isnan(label)):
        raise ValueError(f"condition: expected a label, got the missing value {label!r}")
    text = str(label).strip()
    controls = control_names(control_label)
    if _is_control(text, controls):
        return CTRL
    if delimiter is None:
        if not text:
            raise ValueError(f"condition {label!r}: empty label")
        return text.replace(JOIN, "⁺")

    parts = [part.strip() for part in text.split(delimiter)]
    for control in controls:
        if delimiter in control:
            parts = _join_controls(parts, [part.strip().casefold() for part in control.split(delimiter)])
    genes = set()
    for position, part in enumerate(parts, start=1):
        if not part:
            raise ValueError(f"condition {label!r}: empty gene symbol at position {position}")
        if _is_control(part, controls):
            continue
        if JOIN in part:
            raise ValueError(
                f"condition {label!r}: expected genes separated by {delimiter!r}, got '+' in gene symbol "
                f"{part!r} at position {position}"
            )
        genes.add(part)
    return JOIN.join(sorted(genes)) or CTRL


def targets(condition: str) -> tuple[str, ...]:
    """Perturbed genes of a canonical `condition`, in name order; none for controls."""
    return () if condition == CTRL else tuple(condition.split(JOIN))


def control_names(control_label: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in an entry's `control_label`: none, one or several."""
    names = (control_label,) if isinstance(control_label, str) else control_label or ()
    return tuple(name.strip() for name in names if name.strip())


def _is_control(text: str, controls: Sequence[str]) -> bool:
    return text == CTRL or any(text.casefold() == control.casefold() for control in controls)


def _join_controls(parts: list[str], control: list[str]) -> list[str]:
    """Put back together the controls whose own name holds the delimiter."""
    joined, start = [], 0
    while start < len(parts):
        run = parts[start : start + len(control)]
        if [part.casefold() for part in run] == control:
            joined.append(CTRL)
            start += len(control)
        else:
            joined.append(parts[start])
            start += 1
    return joined
