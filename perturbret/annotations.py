"""The columns of obs and var that a dataset entry names, checked."""

import numpy as np
import pandas as pd

from .genes import is_ensembl_id
from .registry import Entry, nearest


class ScreenError(ValueError):
    """A file that does not hold what its dataset entry says, or no screen that can be benchmarked."""


def column(obs: pd.DataFrame, key: str, what: str, entry: Entry) -> pd.Series:
    """The column of obs that an entry's key `what` names. ScreenError where there is none."""
    if key not in obs:
        raise ScreenError(
            f"{entry.name}: {what}: expected a column {key!r} in obs; {nearest(key, list(obs.columns))}"
        )
    return obs[key]


def read_cells(obs: pd.DataFrame, entry: Entry, audit: dict) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels, batches, guides and totals of the cells in the subset that have a label.

    Parameters
    ----------
    obs : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets `cells_before`, `cells_in_subset`, `unlabelled_cells`, `unassigned_guides`.

    Returns
    -------
    cells : pandas.DataFrame
        Index: unique cell names. Columns `condition` (as in the file), and `batch`, `guide`, `total` where the
        entry names them.
    keep : bool ndarray
        The rows of `obs` that these are.

    Raises
    ------
    ScreenError
        A column is missing or unusable, the subset is empty, cell names repeat.
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
    audit["unlabelled_cells"] = int((keep & labels.isna().to_numpy()).sum())
    keep &= ~labels.isna().to_numpy()
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
        {"condition": labels[keep].astype(object).to_numpy()}, index=pd.Index(names, name="cell")
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


def _texts(column: pd.Series) -> np.ndarray:
    # 1.0 and 1 are one batch, whichever type the file keeps it in.
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(str).to_numpy(object)


def read_genes(var: pd.DataFrame, entry: Entry, audit: dict) -> tuple[np.ndarray, np.ndarray]:
    """Gene symbols of the columns.

    Parameters
    ----------
    var : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets `genes_before`, `genes_without_symbol` (these keep the name of their row in var).

    Returns
    -------
    symbols, names : ndarray of str
        Symbols may repeat; `names` are the names of var's rows.

    Raises
    ------
    ScreenError
        No genes, no such column, or Ensembl ids where symbols are expected.
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
    symbols = np.array([symbol.strip() for symbol in symbols], dtype=object)
    empty = (symbols == "") | (symbols == "nan")
    symbols[empty] = raw[empty]
    audit |= {"genes_before": len(raw), "genes_without_symbol": int(empty.sum())}
    if not len(raw):
        raise ScreenError(f"{entry.name}: expected genes, got a file without any")
    if np.mean([is_ensembl_id(symbol) for symbol in symbols]) > 0.5:
        texts = [key for key in var if not pd.api.types.is_numeric_dtype(var[key])]
        raise ScreenError(
            f"{entry.name}: expected gene symbols, got Ensembl ids ({symbols[0]!r}, ...); set gene_symbol_key to "
            f"the column of var that holds symbols (text columns: {', '.join(map(repr, texts)) or 'none'})"
        )
    return symbols, raw
