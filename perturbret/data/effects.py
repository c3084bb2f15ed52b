"""Screens of effects: one row of real values for each condition, against controls, in place of counts of cells."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from ..files.downloads import sha256_of
from .annotations import LabelRules, ScreenError, read_cells, read_genes
from .conditions import CTRL, targets
from .datasets import check_targets, expect_readable, load_screen, nearest_names, resolve_dataset
from .genes import SymbolResolver
from .h5ad import Source, open_source
from .screen import Screen
from .sources import Entry, fetch, find_entry, load_registry, locate
from .targets import match_targets

# `own_targets` has no place here: a row with its own targets at 0 is named by its zeros.
EFFECT_POLICIES = ("none", "all_targets")
HALVES = ("half1", "half2")


@dataclass(frozen=True)
class Effects:
    """What each condition of a screen does to each gene.

    Attributes
    ----------
    name : str
        Of the dataset entry.
    values : ndarray of float, shape (n_conditions, n_genes)
        Effects against controls, on a scale on which effects of two perturbations may add up, such as differences of
        mean log expression.
    conditions : tuple of str
        Canonical, unique, sorted: `A`, or `A+B`.
    genes : ndarray of str, shape (n_genes,)
    target_columns : mapping of condition to ndarray of int
        Columns that masks take out.
    halves : ndarray of float, shape (2, n_conditions, n_genes), or None
        The same effects from two disjoint halves of each condition's cells, where they are known.
    simulated : bool
    audit : mapping
        What loading found and left out; JSON-able.
    fingerprint : str
        sha256 over all of the above but `name` and `audit`.
    """

    name: str
    values: np.ndarray
    conditions: tuple[str, ...]
    genes: np.ndarray
    target_columns: Mapping[str, np.ndarray]
    halves: np.ndarray | None = None
    simulated: bool = False
    audit: Mapping = field(default_factory=dict)
    fingerprint: str = ""

    def __post_init__(self):
        shape = (len(self.conditions), len(self.genes))
        if self.values.shape != shape:
            raise ValueError(f"values: expected conditions x genes {shape}, got {self.values.shape}")
        if self.halves is not None and self.halves.shape != (2, *shape):
            raise ValueError(f"halves: expected shape {(2, *shape)}, got {self.halves.shape}")
        if list(self.conditions) != sorted(set(self.conditions)) or CTRL in self.conditions:
            raise ValueError("conditions: expected them sorted, each once, without controls")
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self))

    def masked(self, policy: str) -> "Effects":
        """The same effects without the columns that a mask takes out.

        Parameters
        ----------
        policy : str
            `none`; `all_targets`: the columns of all targets are gone, from every condition.

        Raises
        ------
        ValueError
            Another policy, or no column is left.
        """
        if policy not in EFFECT_POLICIES:
            raise ValueError(
                f"mask: expected one of {', '.join(EFFECT_POLICIES)} for effects, got {policy!r}"
                + (": zeros in a row's own targets would name the row" if policy == "own_targets" else "")
            )
        if policy == "none":
            return self
        keep = np.ones(len(self.genes), bool)
        keep[np.concatenate([np.empty(0, int), *self.target_columns.values()])] = False
        if not keep.any():
            raise ValueError(f"{self.name}: every column is a target's; mask all_targets leaves none")
        halves = None if self.halves is None else self.halves[:, :, keep]
        none = dict.fromkeys(self.conditions, np.empty(0, int))
        return replace(
            self, values=self.values[:, keep], genes=self.genes[keep], halves=halves, target_columns=none,
            fingerprint=""
        )  # fmt: skip


def load_effects(dataset: str | Entry = "auto", *, registry=None, cache=None) -> Effects:
    """Effects of a dataset: read, where its entry says `counts_layer: effects`, else computed from its cells.

    Parameters
    ----------
    dataset, registry, cache
        As for `perturbret.data.datasets.load_screen`; `auto` is `norman_effects` where its file is on this machine.

    Raises
    ------
    DataNotFound, ChecksumError
        The file cannot be had, or is another one.
    ScreenError
        The file is not what the entry says; see `ingest_effects`.
    """
    if dataset == "auto" and locate(find_entry("norman_effects", load_registry(registry)), cache=cache):
        dataset = "norman_effects"
    known = isinstance(dataset, Entry)
    entry = dataset if known else resolve_dataset(dataset, registry=registry, cache=cache)
    if not entry.effects:
        return effects_of(load_screen(entry, cache=cache))
    path = fetch(entry, cache=cache)
    with open_source(path, modality=entry.modality) as source:
        expect_readable(source, entry, path)
        return ingest_effects(
            source, entry, file=path.name, sha256=None if path.is_dir() else sha256_of(path)
        )


def ingest_effects(source: Source, entry: Entry, **audit) -> Effects:
    """Validate and canonicalise a table of effects.

    Labels are read as those of cells are, from the entry's `condition_key`, or from the names of the rows where it
    has none. Rows of controls, and of three genes or more, are left out and named in `audit`. Columns of one symbol
    are averaged.

    Raises
    ------
    ScreenError
        The values are missing, not finite, or never negative, as counts and expression are and effects are not; a
        condition has several rows; fewer than two conditions are left; else as `perturbret.data.datasets.ingest`.
    ValueError
        A condition names an empty gene.
    """
    layer = entry.effects
    if layer not in source.matrices:
        raise ScreenError(
            f"{entry.name}: counts_layer: expected {layer!r} in the file; it has {', '.join(sorted(source.matrices))} "
            "(effects is X, effects:LAYER a layer)"
        )
    audit |= {"dataset": entry.name, "url": entry.url, "citation": entry.citation, "license": entry.license}
    resolver = SymbolResolver.from_package()
    columns = read_genes(source.raw_var if layer == "raw" else source.var, entry, audit, resolver)
    mapped = entry.target_map if isinstance(entry.target_map, dict) else {}
    rules = LabelRules(
        entry.control_label, entry.combo_delimiter, mapped, entry.strip_guide_suffix, entry.drop_labels,
        frozenset(map(str, columns.symbols)), resolver,
    )  # fmt: skip
    obs, labelled = source.obs, entry
    if entry.condition_key is None:
        obs, labelled = obs.assign(row_name=obs.index.astype(str)), replace(entry, condition_key="row_name")
    rows, keep = read_cells(obs, labelled, audit, rules)
    codes, symbols = pd.factorize(columns.symbols)
    audit["duplicate_genes"] = {str(symbols[i]): int(n) for i, n in enumerate(np.bincount(codes)) if n > 1}
    genes = symbols.astype(str)
    identifiers = [
        sum((columns.identifiers[i] for i in np.flatnonzero(codes == c)), ()) for c in range(len(genes))
    ]
    conditions = nearest_names(rows["condition"].to_numpy(str), genes, identifiers, entry, resolver)

    wanted = np.array([0 < len(targets(condition)) < 3 for condition in conditions])
    audit["rows_left_out"] = sorted({str(condition) for condition in conditions[~wanted]})
    at = np.flatnonzero(keep)[wanted]
    conditions, names = conditions[wanted], rows.index[wanted]
    repeated = pd.Series(names, conditions)[pd.Index(conditions).duplicated(keep=False)]
    if len(repeated):
        first = repeated.index[0]
        raise ScreenError(
            f"{entry.name}: expected one row of effects for each condition, got {first!r} in rows "
            f"{', '.join(map(repr, repeated.loc[[first]]))} (A+B and B+A are one condition); average them first"
        )
    if len(conditions) < 2:
        raise ScreenError(
            f"{entry.name}: expected at least two conditions, got {list(map(str, conditions)) or 'none'}"
        )
    order = np.argsort(conditions)
    conditions, at, names = tuple(map(str, conditions[order])), at[order], names[order]
    values, *halves = (
        _matrix(source, name, entry, names, at, columns, codes)
        for name in (layer, *(HALVES if set(HALVES) <= set(source.matrices) else ()))
    )
    if (values >= 0).all():
        raise ScreenError(
            f"{entry.name}: counts_layer: expected effects in {layer!r}, differences from controls, got no value "
            "below 0: counts or expression are read with another counts_layer"
        )
    extra = {rules.read(label): masked for label, masked in entry.extra_masked_genes.items()}
    matches = match_targets(conditions, genes, resolver=resolver, extra=extra, identifiers=identifiers)
    audit["dropped_conditions"] = {}
    check_targets(matches, genes, identifiers, entry, audit, resolver)
    audit |= {"n_conditions": len(conditions), "genes_after": len(genes), "halves": bool(halves)}
    return Effects(
        entry.name, values, conditions, genes, matches.columns, np.stack(halves) if halves else None, audit=audit
    )  # fmt: skip


def _matrix(source: Source, layer: str, entry: Entry, names, at, columns, codes) -> np.ndarray:
    """Rows `at` of a layer, genes only, columns of one symbol averaged. ScreenError where a value is not finite."""
    matrix = source.matrices[layer]
    matrix = matrix[:] if hasattr(matrix, "shape") and not hasattr(matrix, "format") else matrix.to_memory()
    matrix = np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix, np.float64)
    values = matrix[at][:, columns.keep]
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ScreenError(
            f"{entry.name}: {layer}: expected finite effects, {len(bad)} values are not (first: row "
            f"{names[row]!r}, gene {columns.symbols[column]!r})"
        )
    onto = np.zeros((len(codes), codes.max() + 1))
    onto[np.arange(len(codes)), codes] = 1
    return values @ (onto / onto.sum(axis=0)) if onto.shape[0] > onto.shape[1] else values


def effects_of(screen: Screen) -> Effects:
    """Effects from cells: mean log1p of counts per 10,000 of each condition, minus that of controls.

    Every cell is scaled by its own total, so that a mask on columns leaves no trace in other genes but through that
    total. Cells and controls are dealt into halves by their order in the screen, one to the left and one to the
    right.

    Raises
    ------
    ScreenError
        The screen has no controls; or a condition, or the controls, have a single cell.
    """
    labels = screen.obs["condition"].to_numpy(str)
    names, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if CTRL not in names:
        raise ScreenError(f"{screen.name}: expected controls, which effects are differences from, got none")
    if sizes.min() < 2:
        raise ScreenError(f"{screen.name}: expected two cells or more of {names[sizes.argmin()]!r}, got 1")
    logs = screen.counts.multiply(1e4 / np.maximum(screen.obs["total"].to_numpy(float), 1)[:, None]).tocsr()
    logs.data = np.log1p(logs.data)
    place = np.empty(len(codes), int)
    place[np.argsort(codes, kind="stable")] = np.concatenate([np.arange(n) for n in sizes])
    means = []
    for part in (np.ones(len(codes), bool), place % 2 == 0, place % 2 == 1):
        onto = np.zeros((len(names), len(codes)))
        onto[codes[part], np.flatnonzero(part)] = 1
        means.append((onto / onto.sum(axis=1, keepdims=True)) @ logs)
    means = np.asarray(means)
    effects = means - means[:, names == CTRL]
    kept = np.array([0 < len(targets(name)) < 3 for name in names])
    conditions = tuple(map(str, names[kept]))
    columns = {condition: screen.target_columns[condition] for condition in conditions}
    return Effects(
        screen.name, effects[0, kept], conditions, screen.genes, columns, effects[1:, kept],
        simulated=screen.simulated, audit=dict(screen.audit),
    )  # fmt: skip


def _fingerprint(effects: Effects) -> str:
    digest = hashlib.sha256()
    for array in (effects.values, effects.halves):
        digest.update(b"\0" if array is None else np.ascontiguousarray(array).tobytes())
    for texts in (effects.conditions, effects.genes):
        digest.update("\0".join(map(str, texts)).encode() + b"\1")
    for condition in effects.conditions:
        digest.update(np.asarray(effects.target_columns[condition], np.int64).tobytes() + b"\2")
    return digest.hexdigest()
