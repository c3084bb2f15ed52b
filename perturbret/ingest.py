"""What an h5ad holds -> Screen: counts checked, labels canonical, every change on record."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from .annotations import ScreenError, read_cells, read_genes
from .conditions import CTRL, canonical_condition, canonical_conditions
from .counts import CountsError, check_counts, recover
from .download import sha256_of
from .h5ad import Source, read_rows
from .registry import Entry, nearest
from .screen import Screen


def ingest(source: Source, entry: Entry, *, file: Path | None = None) -> Screen:
    """Validate and canonicalise.

    Parameters
    ----------
    source : Source
    entry : Entry
    file : Path, optional
        Where the source is from, for the audit.

    Returns
    -------
    Screen
        With `audit`: `dataset`, `file`, `sha256`, `url`, `citation`, `license`; `counts` (evidence that they are
        counts), `totals` (where they are from); `cells_before`, `cells_in_subset`, `unlabelled_cells`,
        `empty_cells` (both dropped), `cells_after`; `genes_before`, `genes_after`, `duplicate_genes` (symbol:
        columns summed), `genes_without_symbol`; `n_raw_labels`; of the cells that are kept `merged_labels` (rows
        of raw, condition, n_cells), `n_classes_without_merging` (raw labels, those of controls included) and
        `n_conditions` (without controls); `min_cells`, `dropped_conditions` (condition: cells);
        `unassigned_guides`; `obsm_left_out` (name: reason); `unreadable_parts` (of the file, nobody asked for: reason).

    Raises
    ------
    ScreenError
        A column that the entry names is missing or unusable, cell names repeat, gene symbols are missing, the
        control label does not occur, fewer than two conditions are left.
    CountsError
        The values are no counts, or none can be recovered.
    ValueError
        A condition names an empty gene.
    """
    audit: dict[str, Any] = {"dataset": entry.name, "file": None, "sha256": None}
    if file is not None:
        audit |= {"file": file.name, "sha256": sha256_of(file)}
    audit |= {"url": entry.url, "citation": entry.citation, "license": entry.license}
    audit["unreadable_parts"] = dict(source.unreadable)
    obs, keep = read_cells(source.obs, entry, audit)
    conditions, _ = canonical_conditions(
        obs["condition"], control_label=entry.control_label, delimiter=entry.combo_delimiter
    )
    if entry.control_label is not None and CTRL not in conditions:
        found = sorted(set(obs["condition"].astype(str)))
        raise ScreenError(
            f"{entry.name}: control_label: expected cells labelled {entry.control_label!r} in "
            f"obs[{entry.condition_key!r}], found none; {nearest(entry.control_label, found)}"
        )
    layer = _layer(source, entry)
    audit["n_raw_labels"] = int(obs["condition"].nunique())
    genes, raw_genes = read_genes(source.raw_var if layer == "raw" else source.var, entry, audit)
    counts = _counts(source, layer, entry, keep, obs, raw_genes, audit)
    counts, genes = _sum_duplicates(counts, genes, entry, audit)

    filled = np.diff(counts.indptr) > 0
    audit["empty_cells"] = int((~filled).sum())
    names, sizes = np.unique(conditions[filled], return_counts=True)
    small = {str(n): int(s) for n, s in zip(names, sizes, strict=True) if s < entry.min_cells and n != CTRL}
    audit |= {"min_cells": entry.min_cells, "dropped_conditions": small}
    chosen = np.flatnonzero(filled & ~np.isin(conditions, list(small)))
    left = sorted(set(map(str, names)) - set(small) - {CTRL})
    if len(left) < 2:
        raise ScreenError(
            f"{entry.name}: expected at least two conditions with {entry.min_cells} cells or more, got "
            f"{left or 'none'}; dropped as too small (condition: cells): {small or 'none'}"
        )
    _audit_labels(obs["condition"].iloc[chosen], entry, audit)

    if len(chosen) < counts.shape[0]:
        counts = counts[chosen]
    obs = obs.iloc[chosen].copy()
    obs["condition"] = conditions[chosen].astype(object)
    row_sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    obs["total"] = _totals(obs, row_sums, entry, audit)
    audit |= {"cells_after": len(obs), "genes_after": len(genes), "n_conditions": len(left)}
    return Screen(
        name=entry.name,
        counts=counts,
        genes=genes,
        obs=obs,
        obsm=_obsm(source, np.flatnonzero(keep)[chosen], audit),
        extra_masked_genes=_extra_masked(entry, conditions, left),
        audit=audit,
    )


def _layer(source: Source, entry: Entry) -> str:
    """Name of the matrix that the entry's counts come from.

    Raises
    ------
    ScreenError
        The file does not hold it.
    """
    wanted = entry.counts_layer or ("counts" if "counts" in source.layers else "X")
    if wanted == "recover" or wanted.startswith("recover:"):
        wanted = wanted.partition(":")[2] or "X"
    if wanted not in source.matrices:
        raise ScreenError(f"{entry.name}: counts_layer: expected {wanted!r} in the file; {_ways(source)}")
    return wanted


def _ways(source: Source) -> str:
    names = [*source.matrices, *(f"recover:{name}" for name in source.matrices)]
    return f"counts_layer can be {', '.join(sorted(names))}"


def _counts(source, layer, entry, keep, obs, genes, audit) -> csr_matrix:
    recovering = (entry.counts_layer or "").startswith("recover")
    matrix, cells = source.matrices[layer], np.full(len(keep), "", object)
    cells[keep] = obs.index
    name = f"{entry.name}: {layer if layer in ('X', 'raw') else f'layers[{layer!r}]'}"
    audit["counts"] = {"layer": layer, "stored_as": str(matrix.dtype), "recovered": recovering}
    if recovering:
        values = read_rows(matrix, keep, name=name, check=lambda block, rows: _without_zeros(block))
        totals = obs["total"].to_numpy() if "total" in obs else None
        result = recover(values, totals=totals, name=name)
        audit["counts"] |= result.evidence
        return result.counts
    try:
        counts = read_rows(
            matrix,
            keep,
            name=name,
            check=lambda block, rows: check_counts(block, name=name, cells=cells[rows], genes=genes),
        )
    except CountsError as error:
        raise CountsError(f"{error}; {_ways(source)}") from None
    audit["counts"] |= {"n_values": int(counts.nnz), "largest_count": float(counts.data.max(initial=0))}
    return counts


def _without_zeros(block: csr_matrix) -> csr_matrix:
    block = block.copy()
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def _sum_duplicates(counts, genes, entry, audit) -> tuple[csr_matrix, np.ndarray]:
    """One column per symbol, at the place of its first one."""
    codes, unique = pd.factorize(genes)
    sizes = np.bincount(codes)
    repeated = {str(unique[i]): int(sizes[i]) for i in np.flatnonzero(sizes > 1)}
    audit["duplicate_genes"] = repeated
    if not repeated:
        return counts, genes.astype(str)
    if entry.duplicate_genes == "refuse":
        raise ScreenError(
            f"{entry.name}: expected unique gene symbols, got {len(repeated)} repeated (symbol: columns): "
            f"{dict(list(repeated.items())[:5])}; duplicate_genes: sum would add them up"
        )
    ones = np.ones(len(genes), np.float32)
    onto = csr_matrix((ones, (np.arange(len(genes)), codes)), shape=(len(genes), len(unique)))
    summed = (counts @ onto).tocsr()
    summed.sort_indices()
    return summed, np.asarray(unique).astype(str)


def _totals(obs: pd.DataFrame, row_sums: np.ndarray, entry: Entry, audit: dict) -> np.ndarray:
    if entry.total_key is None:
        audit["totals"] = "sums over the genes in the file"
        return row_sums
    totals = obs["total"].to_numpy()
    below = totals < row_sums - 0.5
    if below.any():
        first = int(np.flatnonzero(below)[0])
        raise ScreenError(
            f"{entry.name}: total_key: expected UMIs over the whole transcriptome, but {int(below.sum())} cells "
            f"have less in obs[{entry.total_key!r}] than their own counts add up to "
            f"(first {obs.index[first]!r}: {totals[first]:g} against {row_sums[first]:g})"
        )
    audit["totals"] = f"obs[{entry.total_key!r}]"
    return totals


def _audit_labels(raw: pd.Series, entry: Entry, audit: dict) -> None:
    """Labels of the cells that are kept: what was merged, and how many classes there would be without it."""
    _, merged = canonical_conditions(raw, control_label=entry.control_label, delimiter=entry.combo_delimiter)
    audit["merged_labels"] = [
        {"raw": str(row.raw), "condition": str(row.condition), "n_cells": int(row.n_cells)}
        for row in merged.itertuples()
    ]
    audit["n_classes_without_merging"] = int(raw.nunique())


def _extra_masked(entry: Entry, conditions: np.ndarray, left: list[str]) -> dict[str, tuple[str, ...]]:
    """The entry's extra genes by canonical condition; a condition that was dropped takes its genes along."""
    known, result = sorted(set(conditions) - {CTRL}), {}
    for label, genes in entry.extra_masked_genes.items():
        condition = canonical_condition(
            label, control_label=entry.control_label, delimiter=entry.combo_delimiter
        )
        if condition not in known:
            raise ScreenError(
                f"{entry.name}: extra_masked_genes: expected conditions of the screen, got {label!r}; "
                f"{nearest(condition, known)}"
            )
        if condition in left:
            result[condition] = tuple(sorted({*result.get(condition, ()), *genes}))
    return result


def _obsm(source: Source, rows: np.ndarray, audit: dict) -> dict[str, np.ndarray]:
    """Embeddings of the chosen cells; those that no method could use are named with the reason."""
    kept, left_out = {}, {}
    for name, value in source.obsm.items():
        try:
            value = value.toarray() if hasattr(value, "toarray") else np.asarray(value, np.float32)
        except (TypeError, ValueError):
            left_out[name] = "not numeric"
            continue
        if value.ndim != 2:
            left_out[name] = f"expected two dimensions, got {value.ndim}"
        elif not np.isfinite(value[rows]).all():
            left_out[name] = "NaN or infinite values"
        else:
            kept[name] = np.ascontiguousarray(value[rows], np.float32)
    audit["obsm_left_out"] = left_out
    return kept
