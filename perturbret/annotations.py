"""The columns of obs and var that a dataset entry names, checked."""

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .conditions import CTRL, control_names, targets
from .gene_columns import columns_left_out
from .genes import SymbolResolver, is_ensembl_id, strip_version
from .labels import LabelRules, is_control_like, is_number
from .registry import Entry, nearest
from .spelling import tidy


class ScreenError(ValueError):
    """A file that does not hold what its dataset entry says, or no screen that can be benchmarked."""


def column(obs: pd.DataFrame, key: str, what: str, entry: Entry) -> pd.Series:
    """The column of obs that an entry's key `what` names. ScreenError where there is none."""
    if key not in obs:
        raise ScreenError(
            f"{entry.name}: {what}: expected a column {key!r} in obs; {nearest(key, list(obs.columns))}"
        )
    return obs[key]


def read_cells(
    obs: pd.DataFrame, entry: Entry, audit: dict, rules: LabelRules
) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels, batches, guides and totals of the cells in the subset that have a label.

    Parameters
    ----------
    obs : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets `cells_before`, `cells_in_subset`; `unlabelled_cells`, and how many of them by `unlabelled_labels` that
        are text (label: cells); `dropped_labels` (label: cells); `unassigned_guides`.
    rules : LabelRules

    Returns
    -------
    cells : pandas.DataFrame
        Index: unique cell names. Columns `label` (as in the file), `condition` (canonical), and `batch`, `guide`,
        `total` where the entry names them.
    keep : bool ndarray
        The rows of `obs` that these are.

    Raises
    ------
    ScreenError
        A column is missing or unusable, the subset is empty, cell names repeat, a label that the entry names does
        not occur, labels are numbers.
    ValueError
        A condition names an empty gene.
    """
    keep = np.ones(len(obs), bool)
    for key, value in entry.subset.items():
        values = column(obs, key, "subset", entry)
        wanted = value if isinstance(value, list | tuple) else [value]
        held = values.isin(wanted) | values.astype(str).isin([str(item) for item in wanted])
        if not held.any():
            present = [str(item) for item in values.dropna().unique()]
            raise ScreenError(
                f"{entry.name}: subset: expected cells with obs[{key!r}] == {value!r}, found none; "
                f"{nearest(str(value), present)}"
            )
        keep &= held.to_numpy(bool)
    labels = column(obs, entry.condition_key, "condition_key", entry)
    audit |= {"cells_before": len(obs), "cells_in_subset": int(keep.sum())}
    missing = labels.isna().to_numpy()
    audit["unlabelled_cells"] = int((keep & missing).sum())
    keep &= ~missing
    codes, raw = pd.factorize(labels.astype(object).where(keep, None).to_numpy(), use_na_sentinel=True)
    conditions = _read_labels(raw, np.bincount(codes[codes >= 0], minlength=len(raw)), entry, audit, rules)
    keep &= np.array([*(condition is not None for condition in conditions), False])[codes]
    if not keep.any():
        raise ScreenError(f"{entry.name}: expected cells with a condition, got none of {len(obs)}")

    names = obs.index[keep].astype(str)
    repeated = names[names.duplicated()]
    if len(repeated):
        raise ScreenError(
            f"{entry.name}: expected unique cell names, got {len(repeated)} repeated "
            f"(first {repeated[0]!r}); make them unique (AnnData.obs_names_make_unique)"
        )
    result = pd.DataFrame(
        {
            "label": labels[keep].astype(object).to_numpy(),
            "condition": np.array([*conditions, None], dtype=object)[codes[keep]],
        },
        index=pd.Index(names, name="cell"),
    )
    if entry.batch_key is not None:
        batch = column(obs, entry.batch_key, "batch_key", entry)[keep]
        if batch.isna().any():
            raise ScreenError(
                f"{entry.name}: batch_key: {int(batch.isna().sum())} cells have no {entry.batch_key!r}"
            )
        result["batch"] = _texts(batch)
    if entry.guide_key is not None:
        guide = column(obs, entry.guide_key, "guide_key", entry)[keep]
        audit["unassigned_guides"] = int(guide.isna().sum())
        result["guide"] = np.where(guide.isna(), "unassigned", _texts(guide))
    if entry.total_key is not None:
        total = pd.to_numeric(column(obs, entry.total_key, "total_key", entry)[keep], errors="coerce")
        total = total.to_numpy(np.float64, na_value=np.nan)
        bad = ~(np.isfinite(total) & (total > 0))
        if bad.any():
            raise ScreenError(
                f"{entry.name}: total_key: expected positive numbers in obs[{entry.total_key!r}], "
                f"{int(bad.sum())} cells have none (first {names[bad][0]!r})"
            )
        result["total"] = total
    return result, keep


def _read_labels(raw: np.ndarray, n_cells: np.ndarray, entry: Entry, audit: dict, rules: LabelRules) -> list:
    """The condition of each distinct label; None where it says nothing or the entry drops it."""
    texts = [str(label) for label in raw]
    mapped = entry.target_map if isinstance(entry.target_map, dict) else {}
    parts = {part.strip() for text in texts for part in text.split(entry.combo_delimiter or "\0")}
    seen = {*texts, *map(tidy, texts), *parts}
    known = {re.sub(r"\.0$", "", name) for name in seen}
    for key, names in (("drop_labels", entry.drop_labels), ("target_map", mapped)):
        stripped = {rules.stripped(part) for part in parts} if key == "target_map" else set()
        absent = [name for name in names if name not in seen | stripped and name not in known]
        if absent:
            raise ScreenError(
                f"{entry.name}: {key}: expected labels of obs[{entry.condition_key!r}], got {absent[0]!r}; "
                f"{nearest(absent[0], sorted(seen))}"
            )
    conditions, nothing, dropped = [], {}, {}
    for label, text, n in zip(raw, texts, n_cells, strict=True):
        condition = None
        if rules.dropped(label):
            dropped[text] = int(n)
        else:
            condition = rules.read(label)
            if condition is None:
                nothing[text] = int(n)
        conditions.append(condition)
    audit["unlabelled_cells"] += sum(nothing.values())
    audit |= {"unlabelled_labels": nothing, "dropped_labels": dropped}
    sizes = {}
    for text, condition, n in zip(texts, conditions, n_cells, strict=True):
        if condition is not None:
            sizes.setdefault(text, [condition, 0])[1] += int(n)
    audit["suspicious_labels"] = _suspicious(sizes, entry, rules)
    return conditions


def _suspicious(sizes: dict, entry: Entry, rules: LabelRules) -> list[dict]:
    """Labels that may not be what they are read as; refuses those that are hardly a perturbation.

    Raises
    ------
    ScreenError
        Labels are numbers, or name controls that the entry does not.
    """
    accepted = set(entry.unmeasured_targets or ()) - set("accept")
    numbers, controls, rows = [], {}, []
    for text, (condition, n) in sizes.items():
        names = (condition,) if entry.combo_delimiter is None else targets(condition)
        names = [name for name in names if name != CTRL and name not in accepted and text not in accepted]
        why = ""
        if any(is_number(name) for name in names):
            numbers.append(text)
            why = "a number"
        elif entry.combo_delimiter is not None and (
            like := [name for name in names if is_control_like(name, rules.is_gene)]
        ):
            controls[text] = like
        elif set(names) & {"CTRL"}:
            why = "read as the gene CTRL; if it names controls, add it to control_label"
        if why:
            rows.append({"label": text, "condition": condition, "n_cells": n, "why": why})
    key = f"{entry.name}: condition_key: obs[{entry.condition_key!r}]"
    if numbers and entry.combo_delimiter is not None:
        whole = [text for text in numbers if is_number(text)]
        cause = (
            "a converter from R wrote the codes of a factor in place of its names: in R turn the column into text "
            "(as.character) before writing, or state what the numbers stand for: target_map: "
            f"{{{', '.join(f'{text!r}: SYMBOL' for text in whole[:2])}, ...}}"
            if whole
            else "the number is a guide's: set strip_guide_suffix: true; or another combo_delimiter separates genes"
        )
        raise ScreenError(
            f"{key}: expected names of perturbed genes, got numbers in {len(numbers)} of {len(sizes)} labels "
            f"({_listed(numbers)}). Most likely {cause}"
        )
    # Where no control was found, what there is in its place is said elsewhere.
    if controls and (entry.control_label is None or any(read[0] == CTRL for read in sizes.values())):
        named = list(dict.fromkeys([*control_names(entry.control_label), *sum(controls.values(), [])]))
        raise ScreenError(
            f"{key}: {len(controls)} labels look like controls that control_label does not name: "
            f"{_listed(list(controls))}. If they are, set control_label: {named[:20]}"
            f"{' and so on' if len(named) > 20 else ''} (strip_guide_suffix: true takes numbers off them); if their "
            "cells are to be left out, drop_labels: [...]; if they are conditions of their own, unmeasured_targets: "
            "[...] with their names"
        )
    return rows


def _listed(names: list[str], n: int = 10) -> str:
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")


def _texts(column: pd.Series) -> np.ndarray:
    # 1.0 and 1 are one batch, whichever type the file keeps it in.
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(str).to_numpy(object)


@dataclass(frozen=True)
class GeneColumns:
    """The columns of a matrix that are genes.

    Attributes
    ----------
    keep : bool ndarray, shape (n_columns,)
        Which of the file's columns they are.
    symbols : ndarray of str
        Of those; may repeat.
    names : ndarray of str
        Of their rows in var.
    identifiers : list of tuple of str
        Ensembl ids that var gives them.
    """

    keep: np.ndarray
    symbols: np.ndarray
    names: np.ndarray
    identifiers: list[tuple[str, ...]]


def read_genes(var: pd.DataFrame, entry: Entry, audit: dict, resolver: SymbolResolver) -> GeneColumns:
    """Which columns are genes, and their symbols.

    Parameters
    ----------
    var : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets `genes_before`, `columns_left_out` (symbol: why it is no gene), `genes_without_symbol` (these keep the
        name of their row in var).
    resolver : SymbolResolver

    Raises
    ------
    ScreenError
        No genes, no such column, names that the entry's pattern does not fit, or Ensembl ids where symbols are
        expected and no table knows them.
    """
    raw = var.index.astype(str).to_numpy(object)
    if entry.gene_symbol_key is None:
        symbols = raw
    elif entry.gene_symbol_key in var:
        symbols = var[entry.gene_symbol_key]
        symbols = np.where(symbols.isna(), "", symbols.astype(str)).astype(object)
    else:
        raise ScreenError(
            f"{entry.name}: gene_symbol_key: expected a column {entry.gene_symbol_key!r} in var; "
            f"{nearest(entry.gene_symbol_key, list(var.columns))}"
        )
    symbols = np.array([tidy(symbol) for symbol in symbols], dtype=object)
    empty = (symbols == "") | (symbols == "nan")
    symbols[empty] = raw[empty]
    if entry.gene_symbol_pattern is not None:
        symbols = _within_names(symbols, entry)
    audit |= {"genes_before": len(raw), "genes_without_symbol": int(empty.sum())}
    if not len(raw):
        raise ScreenError(f"{entry.name}: expected genes, got a file without any")
    for key in ("keep_columns", "drop_columns"):
        absent = sorted(set(getattr(entry, key)) - set(symbols) - set(raw))
        if absent:
            raise ScreenError(
                f"{entry.name}: {key}: expected columns of the file, got {absent[0]!r}; "
                f"{nearest(absent[0], list(symbols))}"
            )
    left_out = columns_left_out(
        symbols, var, resolver=resolver, keep=entry.keep_columns, drop=entry.drop_columns
    )
    audit["columns_left_out"] = {str(symbols[i]): reason for i, reason in sorted(left_out.items())}
    keep = np.ones(len(raw), bool)
    keep[list(left_out)] = False
    if not keep.any():
        raise ScreenError(
            f"{entry.name}: expected genes, got {len(raw)} columns that are none ({_listed(list(symbols))}: "
            f"{next(iter(left_out.values()))}); keep_columns lists those that are"
        )
    ids = [np.array([is_ensembl_id(name) for name in map(str, values)]) for values in _texts_of(var)]
    if np.mean([is_ensembl_id(symbol) for symbol in symbols[keep]]) > 0.5:
        texts = [key for key in var if not pd.api.types.is_numeric_dtype(var[key])]
        unread = np.mean([not resolver.readings(symbol) for symbol in symbols[keep]])
        # Without a column of symbols the table's ids have to do, for species that it knows.
        if texts or unread > 0.5:
            raise ScreenError(
                f"{entry.name}: expected gene symbols, got Ensembl ids ({symbols[0]!r}, ...); set gene_symbol_key to "
                f"the column of var that holds symbols (text columns: {', '.join(map(repr, texts)) or 'none'})"
            )
    columns = [values for values, found in zip(_texts_of(var), ids, strict=True) if found.any()]
    identifiers = [
        tuple(strip_version(values[i]) for values in columns if is_ensembl_id(values[i]))
        for i in np.flatnonzero(keep)
    ]
    return GeneColumns(keep, symbols[keep], raw[keep], identifiers)


def _texts_of(var: pd.DataFrame) -> list[list[str]]:
    """The names of var's rows and its columns of text."""
    columns = [var[key] for key in var if not pd.api.types.is_numeric_dtype(var[key])]
    return [list(map(str, var.index)), *(list(map(str, column)) for column in columns)]


def _within_names(symbols: np.ndarray, entry: Entry) -> np.ndarray:
    pattern = re.compile(entry.gene_symbol_pattern)
    found = [pattern.search(symbol) for symbol in symbols]
    if not any(match and match[1] for match in found):
        raise ScreenError(
            f"{entry.name}: gene_symbol_pattern: expected {entry.gene_symbol_pattern!r} in names of columns, found it "
            f"in none ({_listed(list(symbols), 3)})"
        )
    # Names without the pattern keep their own: a spike-in needs no prefix.
    return np.array(
        [match[1] if match and match[1] else symbol for match, symbol in zip(found, symbols, strict=True)],
        dtype=object,
    )
