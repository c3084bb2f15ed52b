"""A dataset's name or YAML file -> Screen: counts checked, labels canonical, every change on record."""

import inspect
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ..files.downloads import ChecksumError, sha256_of
from ..files.names import nearest
from .annotations import GeneColumns, LabelRules, ScreenError, expect_known, read_cells, read_genes
from .conditions import CTRL, JOIN, canonical_condition, control_names, targets
from .counts import CountsError, check_counts, recover, scaled_counts
from .genes import SymbolResolver, known_as
from .h5ad import Source, open_source, read_rows
from .screen import Screen
from .sources import (
    DataNotFound,
    Entry,
    EntryError,
    fetch,
    find_entry,
    load_registry,
    locate,
    read_entry,
)
from .targets import MATCHED, UNKNOWN, TargetMatches, count_statuses, match_targets, unsettled


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
        With `audit`. Source: `dataset`, `file`, `sha256`, `url`, `citation`, `license`, `accepted_columns`;
        `counts` (evidence that they are counts), `totals` (where they are from). Cells: `cells_before`,
        `cells_in_subset`, `unlabelled_cells`, `empty_cells` (both dropped), `cells_after`; `unlabelled_labels`,
        `dropped_labels` (label: cells), `suspicious_labels` (rows of label, condition, n_cells, why);
        `unassigned_guides`. Columns: `genes_before`, `genes_after`, `columns_left_out` (symbol: why it is not a
        gene), `duplicate_genes` (symbol: columns summed), `genes_without_symbol` (they keep the name of their row in
        var). Targets: `labels_are_names` (no genes: the entry has no combo_delimiter), else `unmeasured_targets`
        (that the entry states) and `targets` (rows of `perturbret.data.targets.TargetMatches.table`). Conditions:
        `n_raw_labels`; of the cells that are kept `merged_labels` (rows of raw, condition, n_cells),
        `n_classes_without_merging` (raw labels, those of controls included) and `n_conditions` (without controls);
        `min_cells`, `dropped_conditions` (condition: cells). `obsm_left_out` (name: reason); `unreadable_parts` (of
        the file, which the entry does not use: reason).

    Raises
    ------
    ScreenError
        A column that the entry names is missing or unusable, cell names repeat, gene symbols are missing, the
        control label does not occur, fewer than two conditions are left; labels are numbers, or name controls that
        the entry does not; targets cannot be told from genes that are not measured.
    CountsError
        The values are not counts, and counts cannot be recovered from them.
    ValueError
        A condition names an empty gene.
    """
    audit: dict[str, Any] = {"dataset": entry.name, "file": None, "sha256": None}
    if file is not None:
        audit |= {"file": file.name, "sha256": sha256_of(file)}
    audit |= {"url": entry.url, "citation": entry.citation, "license": entry.license}
    audit["accepted_columns"] = list(entry.accepted_columns)
    audit["unreadable_parts"] = dict(source.unreadable)
    resolver = SymbolResolver.from_package()
    layer = _layer(source, entry)
    columns = read_genes(source.raw_var if layer == "raw" else source.var, entry, audit, resolver)
    rules = LabelRules(
        controls=entry.control_label,
        delimiter=entry.combo_delimiter,
        target_map=entry.target_map if isinstance(entry.target_map, dict) else {},
        strip=entry.strip_guide_suffix,
        drop=entry.drop_labels,
        columns=frozenset(map(str, columns.symbols)),
        resolver=resolver,
    )
    obs, keep = read_cells(source.obs, entry, audit, rules)
    _check_controls(obs, entry)
    audit["n_raw_labels"] = int(obs["label"].nunique())
    counts = _counts(source, layer, entry, keep, obs, columns, audit)
    counts, genes, identifiers = _sum_duplicates(counts, columns, entry, audit)
    conditions = nearest_names(obs["condition"].to_numpy(str), genes, identifiers, entry, resolver)

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
    _audit_labels(obs["label"].iloc[chosen], conditions[chosen], audit)
    extra = _extra_masked(entry, rules, conditions, left)
    matches = match_targets(left, genes, resolver=resolver, extra=extra, identifiers=identifiers)
    check_targets(matches, genes, identifiers, entry, audit, resolver)

    if len(chosen) < counts.shape[0]:
        counts = counts[chosen]
    obs = obs.iloc[chosen].drop(columns="label")
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
        extra_masked_genes=extra,
        target_columns=matches.columns,
        audit=audit,
    )


def _check_controls(obs: pd.DataFrame, entry: Entry) -> None:
    """Raise a ScreenError where a control label of the entry, or one of several, has no cells."""
    found, names = sorted(set(obs["label"].astype(str))), control_names(entry.control_label)
    held = {
        part.strip().casefold()
        for label in found
        for part in (label, *label.split(entry.combo_delimiter or "\0"))
    }
    absent = [name for name in names if name.casefold() not in held] if len(names) > 1 else []
    hint = ""
    if not absent and names and CTRL not in set(obs["condition"]):
        absent, hint = [entry.control_label], "; strip_guide_suffix: true takes guides' numbers off labels"
    if absent:
        raise ScreenError(
            f"{entry.name}: control_label: expected cells labelled {absent[0]!r} in obs[{entry.condition_key!r}], "
            f"found none; {nearest(str(absent[0]), found)}{hint}"
        )


def nearest_names(conditions, genes, identifiers, entry: Entry, resolver) -> np.ndarray:
    """Conditions with the names of the columns that are nearest, where the entry takes those."""
    if entry.target_map != "nearest":
        return conditions
    table = match_targets(set(conditions), genes, resolver=resolver, identifiers=identifiers).table
    names = {row["target"]: row["nearest"] for row in table if row["nearest"]}
    renamed = {
        condition: canonical_condition(
            JOIN.join(names.get(name, name) for name in targets(condition)) or CTRL, control_label=None
        )
        for condition in set(conditions)
    }
    return np.array([renamed[condition] for condition in conditions])


def check_targets(
    matches: TargetMatches, genes, identifiers, entry: Entry, audit: dict, resolver: SymbolResolver
) -> None:
    """Put the matches on record; refuse where a mask may miss targets that are measured.

    Raises
    ------
    ScreenError
        Names what was found, the nearest columns and the keys of the entry that settle it.
    """
    table, n = matches.table, len(matches.table)
    audit["labels_are_names"] = entry.combo_delimiter is None
    if entry.combo_delimiter is None:
        named = [row["target"] for row in table if row["status"] != UNKNOWN]
        if len(named) > n / 2 and entry.unmeasured_targets != "accept":
            raise ScreenError(
                f"{entry.name}: combo_delimiter: null says that labels are names such as cell types, but {len(named)} "
                f"of {n} are symbols of genes ({', '.join(named[:5])}), which only a mask keeps from giving the "
                'condition away: leave the key out, or set it to what separates combined genes, such as "+"'
            )
        return
    audit["targets"] = table
    unmeasured = entry.unmeasured_targets
    audit["unmeasured_targets"] = unmeasured if isinstance(unmeasured, str) else list(unmeasured or ())
    accepted = entry.unmeasured_targets or ()
    known = {row["target"] for row in table}
    absent = [] if accepted == "accept" else sorted(set(accepted) - known)
    if not set(absent) <= set(audit["dropped_conditions"]):
        expect_known(absent, known, entry, "unmeasured_targets", "targets of the screen")
    open_rows = unsettled(table, accepted)
    near = [row for row in open_rows if row["nearest"]]
    counted = ", ".join(f"{number} {status}" for status, number in count_statuses(table).items())
    if near or len(open_rows) > n / 2:
        rows = near or open_rows
        columns = [
            f"nearest column {row['nearest']!r}" if near else "no column of a similar name" for row in rows
        ]
        shown = "; ".join(
            f"{row['target']!r} ({column})" for row, column in zip(rows[:5], columns, strict=False)
        )
        lines = list(dict.fromkeys(row["suggestion"] for row in rows if row["suggestion"]))
        raise ScreenError(
            f"{entry.name}: {len(rows)} of {n} targets have no column of their own, so no mask could take them out: "
            f"{shown}{' and more' if len(rows) > 5 else ''}. Targets: {counted}. "
            f"What may settle it in the dataset's YAML: {_remedies(lines, near)}"
        )
    matched = sum(row["status"] == MATCHED for row in table)
    read = sum(
        bool(known_as(str(gene), resolver)) or any(map(resolver.readings, ids))
        for gene, ids in zip(genes, identifiers, strict=True)
    )
    if matched < n / 2 and read < len(genes) / 2 and accepted != "accept":
        raise ScreenError(
            f"{entry.name}: only {read} of {len(genes)} columns have names that HGNC knows "
            f"({', '.join(genes[:3])}, ...), so nothing tells whether the targets are measured. Targets: {counted}. "
            "Set gene_symbol_key or gene_symbol_pattern to where the symbols are, or unmeasured_targets: accept"
        )


def _remedies(lines: list[str], near: list) -> str:
    maps = [
        line.removeprefix("target_map: {").removesuffix("}")
        for line in lines
        if line.startswith("target_map")
    ]
    lines = [line for line in lines if not line.startswith("target_map")]
    if maps:
        more = ", ..." if len(maps) > 10 else ""
        lines.append(f"target_map: {{{', '.join(maps[:10])}{more}}}")
    if near:
        lines.append("target_map: nearest")
    elif not maps:
        lines.append("target_map: {name: SYMBOL}, combo_delimiter, gene_symbol_key")
    return " or ".join(
        [*lines, "unmeasured_targets: accept (or a list of targets), if these are truly not measured"]
    )


def _layer(source: Source, entry: Entry) -> str:
    """Name of the matrix that the entry's counts come from.

    Raises
    ------
    ScreenError
        The file does not hold it.
    """
    wanted = entry.counts_layer or ("counts" if "counts" in source.layers else "X")
    if re.match("recover(:|$)", wanted):
        wanted = wanted.partition(":")[2] or "X"
    if wanted not in source.matrices:
        raise ScreenError(f"{entry.name}: counts_layer: expected {wanted!r} in the file; {_ways(source)}")
    return wanted


def _ways(source: Source) -> str:
    names = [*source.matrices, *(f"recover:{name}" for name in source.matrices)]
    return f"counts_layer can be {', '.join(sorted(names))}"


def _counts(source, layer, entry, keep, obs, columns: GeneColumns, audit) -> csr_matrix:
    def only_genes(block):
        return block if columns.keep.all() else block[:, columns.keep]

    def as_counts(block, rows):
        return check_counts(only_genes(block), name=name, cells=cells[rows], genes=columns.names)

    recovering = (entry.counts_layer or "").startswith("recover")
    matrix, cells = source.matrices[layer], np.full(len(keep), "", object)
    cells[keep] = obs.index
    name = f"{entry.name}: {layer if layer in ('X', 'raw') else f'layers[{layer!r}]'}"
    audit["counts"] = {"layer": layer, "stored_as": str(matrix.dtype), "recovered": recovering}
    if recovering:
        values = read_rows(matrix, keep, name=name, check=lambda block, _: _without_zeros(only_genes(block)))
        totals = obs["total"].to_numpy() if "total" in obs else None
        result = recover(values, totals=totals, name=name)
        audit["counts"] |= result.evidence
        return result.counts
    try:
        counts = read_rows(matrix, keep, name=name, check=as_counts)
    except CountsError as error:
        raise CountsError(f"{error}; {_ways(source)}") from None
    scaled = scaled_counts(counts)
    if scaled and entry.scaled_counts != "accept":
        raise CountsError(
            f"{name}: expected UMI counts, got whole numbers that look normalised and then rounded: {scaled}; "
            f"{_ways(source)}; scaled_counts: accept takes them as they are"
        )
    audit["counts"] |= {"n_values": int(counts.nnz), "largest_count": float(counts.data.max(initial=0))}
    return counts


def _without_zeros(block: csr_matrix) -> csr_matrix:
    block = block.copy()
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def _sum_duplicates(counts, columns: GeneColumns, entry, audit) -> tuple[csr_matrix, np.ndarray, list]:
    """One column per symbol, at the place of its first one, with the Ensembl ids of all."""
    codes, unique = pd.factorize(columns.symbols)
    sizes = np.bincount(codes)
    repeated = {str(unique[i]): int(sizes[i]) for i in np.flatnonzero(sizes > 1)}
    audit["duplicate_genes"] = repeated
    if not repeated:
        return counts, columns.symbols.astype(str), columns.identifiers
    if entry.duplicate_genes == "refuse":
        raise ScreenError(
            f"{entry.name}: expected unique gene symbols, got {len(repeated)} repeated (symbol: columns): "
            f"{dict(list(repeated.items())[:5])}; duplicate_genes: sum would add them up"
        )
    identifiers: list[tuple[str, ...]] = [()] * len(unique)
    for code, found in zip(codes, columns.identifiers, strict=True):
        identifiers[code] += found
    ones, n = np.ones(len(codes), np.float32), len(codes)
    onto = csr_matrix((ones, (np.arange(n), codes)), shape=(n, len(unique)))
    summed = (counts @ onto).tocsr()
    summed.sort_indices()
    return summed, np.asarray(unique).astype(str), identifiers


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


def _audit_labels(raw: pd.Series, conditions: np.ndarray, audit: dict) -> None:
    """Labels of the cells that are kept: what was merged, and how many classes there would be without it."""
    table = pd.DataFrame({"raw": raw.astype(str).to_numpy(), "condition": conditions})
    table = table.value_counts().rename("n_cells").reset_index()
    merged = table[table["condition"].duplicated(keep=False)].sort_values(["condition", "raw"])
    audit["merged_labels"] = [
        {"raw": str(row.raw), "condition": str(row.condition), "n_cells": int(row.n_cells)}
        for row in merged.itertuples()
    ]
    audit["n_classes_without_merging"] = int(raw.nunique())


def _extra_masked(
    entry: Entry, rules: LabelRules, conditions: np.ndarray, left: list[str]
) -> dict[str, tuple[str, ...]]:
    """The entry's extra genes by canonical condition; a condition that was dropped takes its genes along."""
    known, result = set(conditions) - {CTRL}, {}
    for label, genes in entry.extra_masked_genes.items():
        condition = rules.read(label)
        expect_known([condition or label], known, entry, "extra_masked_genes", "conditions of the screen")
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


AUTO = ("norman_subset", "simulated")

# Seconds that `auto` gives the network before it takes the simulated screen.
AUTO_SECONDS = 10.0


def resolve_dataset(dataset: str = "auto", *, registry: str | Path | None = None, cache=None) -> Entry:
    """The entry that `dataset` means; reads no cells.

    Parameters
    ----------
    dataset : str
        A name in the registry, the path of a YAML file with one entry, or `auto`: the real `norman_subset`
        where its file is on this machine or comes from the network within `AUTO_SECONDS`, else `simulated`,
        with a warning.
    registry : path, optional
        In place of `params/datasets.yaml`.
    cache : path, optional
        In place of `perturbret.data.sources.cache_directory()`.

    Raises
    ------
    UnknownDataset, EntryError, FileNotFoundError
        No such name (the nearest are named), a malformed entry, no such YAML file.
    ChecksumError
        `auto` met a `norman_subset` file on this machine with other contents.

    Examples
    --------
    >>> resolve_dataset("simulated").simulated
    True
    """
    dataset = str(dataset)
    if dataset.endswith((".yaml", ".yml")):
        return read_entry(dataset)
    entries = load_registry(registry)
    if dataset != "auto":
        return find_entry(dataset, entries)
    real, simulated = (find_entry(name, entries) for name in AUTO)
    if locate(real, cache=cache) is not None:
        return real
    try:
        fetch(real, cache=cache, timeout=AUTO_SECONDS, progress=False)
    except (DataNotFound, ChecksumError, ValueError) as error:
        warnings.warn(f"auto: taking SIMULATED cells, since {error}", stacklevel=2)
        return simulated
    return real


def load_screen(dataset: str | Entry = "auto", *, registry: str | Path | None = None, cache=None) -> Screen:
    """Load a dataset, checked and canonicalised.

    Parameters
    ----------
    dataset : str or Entry
        As for `resolve_dataset`.
    registry, cache : path, optional
        As for `resolve_dataset`.

    Returns
    -------
    Screen
        `audit` tells what was found, merged and dropped; its keys are listed in `perturbret.data.datasets.ingest`.

    Raises
    ------
    DataNotFound, ChecksumError
        The file cannot be had, or is another one.
    ScreenError, CountsError, ValueError
        The file is not what the entry says; see `perturbret.data.datasets.ingest`. Or it holds effects and no cells.

    Examples
    --------
    >>> from perturbret.data import make_entry
    >>> sizes = {"n_singles": 2, "n_doubles": 1, "n_genes": 20, "cells_per_condition": 10}
    >>> screen = load_screen(make_entry({"name": "small", "simulate": sizes}))
    >>> screen.name, screen.n_genes, len(screen.conditions)
    ('small', 20, 3)
    """
    entry = (
        dataset if isinstance(dataset, Entry) else resolve_dataset(dataset, registry=registry, cache=cache)
    )
    if entry.effects:
        raise ScreenError(
            f"{entry.name} holds effects, one row for each condition, and no cells: nothing can be split, trained or "
            "tokenised. perturbret.data.load_effects reads it, and notebook 08_combinations asks which two genes a "
            "combination is of"
        )
    if entry.simulated:
        return _simulate(entry)
    path = fetch(entry, cache=cache)
    with open_source(path, modality=entry.modality) as source:
        expect_readable(source, entry, path)
        return ingest(source, entry, file=path)


def expect_readable(source: Source, entry: Entry, path: Path) -> None:
    """Raise where a part that the entry names is among those that could not be read.

    Raises
    ------
    ScreenError
        Names the file, the part, why it cannot be read and the entry's key that asks for it.
    """
    asked = {key: [getattr(entry, key)] for key in vars(entry) if key.endswith("_key")}
    wanted = {
        f"{table}/{column}": key
        for key, columns in (asked | {"subset": list(entry.subset)}).items()
        for column in columns
        for table in ("obs", "var", "raw/var")
    }
    layer = entry.effects or (entry.counts_layer or "counts").removeprefix("recover").removeprefix(":") or "X"
    parts = [layer, f"{layer}/X"] if layer in ("X", "raw") else [f"layers/{layer}"]
    if entry.counts_layer is None and "counts" not in source.layers:
        parts.append("X")
    wanted |= dict.fromkeys(parts, "counts_layer")
    if not source.matrices and not source.unreadable:
        raise ScreenError(
            f"{entry.name}: counts_layer: {path}: expected values in X, raw or a layer, found none (X is null)"
        )
    for part, reason in source.unreadable.items():
        if part in wanted:
            raise ScreenError(
                f"{entry.name}: {wanted[part]}: {path}: {part} cannot be read ({reason}); repair the file, or name "
                "another part"
            )


def _simulate(entry: Entry) -> Screen:
    from .simulate import simulate_screen

    known = [name for name in inspect.signature(simulate_screen).parameters if name != "name"]
    for key in entry.simulate:
        if key not in known:
            raise EntryError(f"{entry.name}: simulate: unknown key {key!r}; {nearest(str(key), known)}")
    screen = simulate_screen(name=entry.name, **entry.simulate)
    return replace(screen, audit={**screen.audit, "accepted_columns": list(entry.accepted_columns)})
