"""Choose genes for several datasets together: matched by gene, ranked by dispersion, in one common order."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import vstack

from ..data.genes import SymbolResolver, is_ensembl_id, strip_version
from ..data.masking import target_columns
from ..data.screen import Screen
from ..data.splits import Split
from .chunks import CHUNK_CELLS, ChunkedCounts, chunked_screen
from .gene_space import ColumnMap, GeneSpace, hash_genes
from .gene_stats import GeneStats, canonical_counts, pool_stats, stream_stats
from .remapping import indicator

# From the surest to the weakest link between a name and its gene.
_LINKS = ("direct", "ensembl", "previous", "alias")


@dataclass(frozen=True, eq=False)
class MatchedGenes:
    """One key per gene; columns with equal keys, in one dataset or in several, are the same gene.

    Attributes
    ----------
    by : str
        `ensembl` where every dataset has Ensembl ids, else `symbol`.
    keys : mapping of dataset to ndarray of str
        Key of each column: the Ensembl id without version, or the approved symbol, or the name itself where
        HGNC does not know it, or knows several genes by it.
    symbols : mapping of key to str
        Unique, whatever the order of the datasets. By `ensembl`: the symbol that HGNC approves for the id, else the
        alphabetically first of the datasets' names, else (or where that is another gene's too) the id itself.
    ensembl_ids : mapping of key to str
        Where known.
    own_name : tuple of str
        Names that HGNC gives to another gene of the same dataset as well, and that stay their own gene.
    """

    by: str
    keys: Mapping[str, np.ndarray]
    symbols: Mapping[str, str]
    ensembl_ids: Mapping[str, str]
    own_name: tuple[str, ...] = ()

    def columns(self, dataset: str) -> dict[str, tuple[int, ...]]:
        """Key -> columns of `dataset` with that key, ascending."""
        groups = pd.Series(self.keys[dataset]).groupby(self.keys[dataset], sort=False).indices
        return {str(key): tuple(columns.tolist()) for key, columns in groups.items()}


def match_genes(
    genes: Mapping[str, np.ndarray],
    ensembl_ids: Mapping[str, np.ndarray | None],
    *,
    resolver: SymbolResolver | None = None,
) -> MatchedGenes:
    """Give each column of each dataset the key of its gene.

    Where a dataset has two names of one gene, an old and a new one, its annotation holds them for two genes: the
    surest link (the approved symbol itself, then a previous symbol, then an alias) keeps the gene, and the other
    name stays a gene of its own, in all datasets alike. Names that are equally sure all stay their own. Columns
    of the same name, or of the same Ensembl id, are one gene, measured in parts.

    Parameters
    ----------
    genes : mapping of dataset to ndarray of str
    ensembl_ids : mapping of dataset to ndarray of str or None
    resolver : SymbolResolver, optional
        The packaged one by default.
    """
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    if genes and all(ensembl_ids.get(name) is not None for name in genes):
        return _by_ensembl(genes, ensembl_ids, resolver)
    names = sorted({str(gene).strip() for panel in genes.values() for gene in panel})
    table = resolver.canonical(names).set_index("name")
    gene, how = table["gene"].to_dict(), table["how"].to_dict()
    own = sorted(set().union(*(_rivals(panel, gene, how) for panel in genes.values())))
    gene |= {name: name for name in own}
    keys = {
        dataset: np.array([gene[str(name).strip()] for name in panel], dtype=str)
        for dataset, panel in genes.items()
    }
    every = sorted(set(gene.values()))
    known = {key: resolver.ensembl_ids[key] for key in every if key in resolver.ensembl_ids}
    return MatchedGenes("symbol", keys, {key: key for key in every}, known, tuple(own))


def _by_ensembl(genes, ensembl_ids, resolver: SymbolResolver) -> MatchedGenes:
    keys = {
        dataset: np.array([strip_version(identifier) for identifier in ensembl_ids[dataset]], dtype=str)
        for dataset in genes
    }
    names: dict[str, set[str]] = {}
    for dataset, panel in genes.items():
        for key, name in zip(keys[dataset], map(strip_version, panel), strict=True):
            found = names.setdefault(str(key), set())
            if name and not is_ensembl_id(name):
                found.add(name)
    approved = {identifier: symbol for symbol, identifier in resolver.ensembl_ids.items()}
    # Of all datasets alike, so that their order has no influence.
    symbols = {key: approved.get(key) or min(found, default=key) for key, found in names.items()}
    # A symbol of two ids would make names ambiguous: those go by their id.
    times = pd.Series(symbols, dtype=object).value_counts()
    symbols = {
        key: symbol if times[symbol] == 1 and symbol not in names else key for key, symbol in symbols.items()
    }
    return MatchedGenes("ensembl", keys, symbols, {key: key for key in symbols})


def _rivals(panel, gene: Mapping[str, str], how: Mapping[str, str]) -> set[str]:
    """Names of a panel that lose their gene to a surer name of it, or that tie."""
    names = pd.DataFrame({"name": sorted({str(name).strip() for name in panel})})
    names["gene"] = names["name"].map(gene)
    names["rank"] = [
        _LINKS.index(how[name]) if how[name] in _LINKS else len(_LINKS) for name in names["name"]
    ]
    of_gene = names.groupby("gene")["rank"]
    surest = names["rank"] == of_gene.transform("min")
    alone = surest.groupby(names["gene"]).transform("sum") == 1
    rivals = (of_gene.transform("size") > 1) & ~(surest & alone)
    return set(names.loc[rivals, "name"])


SELECTIONS = ("dispersion", "seurat_v3", "all")
WEIGHTS = ("cells", "equal")


def align_screen(
    screen: Screen, references: Sequence[ChunkedCounts], *, split: Split | None = None, **options: Any
) -> GeneSpace:
    """`align` for a fine-tuning screen: its training cells where it is split, its conditions as the perturbed.

    Examples
    --------
    >>> from perturbret.data import make_split, simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, cells_per_condition=20, n_genes=30, measured_targets=1.0)
    >>> space = align_screen(screen, [], split=make_split(screen.obs, seed=0), n=10)
    >>> len(space), set(screen.conditions) <= set(space.names)
    (10, True)
    >>> space.maps["simulated"].cells.partition(" (")[0]
    'train of in_dist-seed0'
    """
    datasets = [chunked_screen(screen, split), *references]
    return align(datasets, screen=screen.name, perturbed=screen.conditions, **options)


def align(
    datasets: Sequence[ChunkedCounts],
    *,
    n: int = 2000,
    screen: str = "",
    perturbed: Sequence[str] = (),
    min_datasets: int | None = None,
    selection: str = "dispersion",
    weights: str = "cells",
    min_percent_cells: float = 0.01,
    between: bool = False,
    subtract_noise: bool = True,
    resolver: SymbolResolver | None = None,
    chunk_cells: int = CHUNK_CELLS,
) -> GeneSpace:
    """Choose up to `n` genes, each read once from each dataset in one streaming pass.

    Per dataset d, mean m_d and variance v_d of counts per 10,000 UMIs, weights w_d that sum to 1 over the datasets
    that measure the gene (docs/method.md, Gene spaces):

        mean m = sum w_d m_d        within = sum w_d v_d        between = sum w_d (m_d - m)^2
        dispersion = (within [+ between] - sum w_d m_d noise_d) / m,     noise_d = mean over cells of 10,000 / total

    With weights by cells, within + between is the variance of all cells together (law of total variance). The
    between term is large for genes that differ by laboratory or tissue, and so is left out of the ranking unless
    asked for. Counting noise alone gives every gene of a dataset the same variance over mean; subtracting it changes
    no order within one dataset, and between them takes away the advantage of genes of the shallow ones.

    Parameters
    ----------
    datasets : sequence of ChunkedCounts
        With distinct names.
    n : int
        Genes to choose, the perturbed among them.
    screen : str
        Name of the fine-tuning screen among the datasets: every chosen gene is measured there. Empty for none.
    perturbed : sequence of str
        Canonical conditions of the screen. Their targets that it measures have a place always: below the filter,
        in no other dataset, and beyond `n`.
    min_datasets : int, optional
        How many datasets, the screen included, must measure any other gene. All of them by default.
    selection : str
        `dispersion`; `seurat_v3`, scanpy's, with datasets as batches (holds the counts of the genes that all
        datasets measure in memory); `all` eligible genes, whatever `n` and the filter.
    weights : str
        `cells`: by number of cells; `equal`: every dataset the same.
    min_percent_cells : float
        In percent of cells, weighted as above: a gene counted in fewer is not ranked.
    between, subtract_noise : bool
        See above.
    resolver : SymbolResolver, optional
        The packaged one by default.
    chunk_cells : int
        Cells in memory at a time.

    Returns
    -------
    GeneSpace
        In the order of Ensembl id or symbol, which depends neither on the order of datasets nor on ties. Columns of
        its table: `mean`, `variance_within`, `variance_between`, `dispersion`, `percent_cells`, `n_datasets`, `rank`
        (1 for the first; None where not ranked), `perturbed`, `passes_filter`.

    Raises
    ------
    ValueError
        An argument is out of range; no gene is eligible, or none is counted in enough cells; values that are not
        counts; a dataset of another number of cells than it says.

    Warns
    -----
    UserWarning
        Fewer than `n` genes are available, or the perturbed ones alone are more; also in the notes of the space.

    Examples
    --------
    >>> from perturbret.alignment import chunked_screen
    >>> from perturbret.data import simulate_screen
    >>> sizes = {"few": 20, "many": 30}
    >>> screens = [simulate_screen(name=name, cells_per_condition=sizes[name], n_genes=50) for name in sizes]
    >>> space = align([chunked_screen(screen) for screen in screens], n=10)
    >>> len(space), sorted(space.maps), space.statistics["n_datasets"].unique().tolist()
    (10, ['few', 'many'], [2])
    """
    names = [dataset.name for dataset in datasets]
    least = len(datasets) if min_datasets is None else min_datasets
    _check_arguments(names, screen, perturbed, n, least, selection, weights, min_percent_cells)
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    matched = match_genes(
        {d.name: d.genes for d in datasets}, {d.name: d.ensembl_ids for d in datasets}, resolver=resolver
    )
    columns = {name: matched.columns(name) for name in names}
    measured = pd.Series([key for found in columns.values() for key in found]).value_counts()
    own = set(columns[screen]) if screen else set(measured.index)
    forced = _perturbed_keys(datasets, matched, screen, perturbed, resolver)
    eligible = {key for key in own if measured[key] >= least}
    keys = sorted(eligible | forced)
    if not keys:
        raise ValueError(f"expected genes that at least {least} of {', '.join(names)} measure, found none")
    where = {name: [columns[name].get(key, ()) for key in keys] for name in names}
    stats = {
        d.name: stream_stats(
            d.chunks(chunk_cells), len(d.genes), collapse=indicator(where[d.name], len(d.genes)), name=d.name
        )
        for d in datasets
    }
    for d in datasets:
        if stats[d.name].n_cells != d.n_cells:
            raise ValueError(
                f"{d.name}: expected {d.n_cells} cells, as its n_cells says, read {stats[d.name].n_cells}"
            )
    table = pool_stats(where, stats, weights=weights, between=between, subtract_noise=subtract_noise)
    table["perturbed"] = [key in forced for key in keys]
    table["passes_filter"] = table["percent_cells"] >= min_percent_cells * (1 - 1e-12)
    candidates = np.flatnonzero(table["passes_filter"] & np.array([key in eligible for key in keys]))
    if selection != "all" and not (len(candidates) or forced):
        raise ValueError(
            f"expected genes counted in at least {min_percent_cells} percent of cells (min_percent_cells), found none "
            f"among the {len(keys)} that at least {least} of {', '.join(names)} measure"
        )
    if selection == "seurat_v3":
        order = _seurat_v3(datasets, where, candidates, n, chunk_cells)
    else:
        # keys are sorted, and a stable sort leaves ties in their order.
        order = candidates[np.argsort(-table["dispersion"].to_numpy()[candidates], kind="stable")]
    rank = np.zeros(len(keys), int)
    rank[order] = np.arange(1, len(order) + 1)
    # Of objects: beside None, pandas would turn the numbers into floats, and None into NaN, which JSON cannot carry.
    table["rank"] = pd.Series([int(place) or None for place in rank], dtype=object)

    must = np.flatnonzero(table["perturbed"])
    rest = order[~np.isin(order, must)][: max(0, n - len(must))]
    chosen = np.arange(len(keys)) if selection == "all" else np.sort(np.concatenate([must, rest]))
    counted = {str(k): sum(int(measured[key]) >= k for key in own) for k in range(1, len(names) + 1)}
    low = [matched.symbols[keys[i]] for i in must if not table["passes_filter"].iloc[i]]
    notes = _notes(len(chosen), len(must), n, selection, least, len(eligible), len(candidates), low, screen)
    settings = {
        "selection": selection,
        "n": int(n),
        "screen": screen or None,
        "min_datasets": int(least),
        "weights": weights,
        "min_percent_cells": min_percent_cells,
        "between": between,
        "subtract_noise": subtract_noise,
        "matched_by": matched.by,
        "genes_in_at_least_n_datasets": counted,
    }
    maps = {d.name: _column_map(d, where[d.name], stats[d.name], chosen) for d in datasets}
    return GeneSpace(
        tuple(matched.symbols[keys[i]] for i in chosen),
        tuple(matched.ensembl_ids.get(keys[i]) for i in chosen),
        maps,
        {name: tuple(table[name].iloc[chosen].tolist()) for name in table},
        settings,
        notes,
    )


def _check_arguments(names, screen, perturbed, n, least, selection, weights, min_percent_cells) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"datasets: expected at least one, with distinct names, got {names}")
    if screen and screen not in names:
        raise ValueError(f"screen: expected one of {names}, got {screen!r}")
    if len(perturbed) and not screen:
        raise ValueError("perturbed: expected the name of the screen that the conditions are of, got none")
    for what, value in (("n", n), ("min_datasets", least)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{what}: expected a whole number, got {value!r}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    if not 1 <= least <= len(names):
        raise ValueError(f"min_datasets: expected 1 to {len(names)}, got {least}")
    for what, value, known in (("selection", selection, SELECTIONS), ("weights", weights, WEIGHTS)):
        if value not in known:
            raise ValueError(f"{what}: expected one of {known}, got {value!r}")
    if selection == "seurat_v3" and least < len(names):
        raise ValueError(
            f"min_datasets: seurat_v3 compares genes that all {len(names)} datasets measure, got {least}"
        )
    if not 0 <= min_percent_cells <= 100:
        raise ValueError(f"min_percent_cells: expected 0 to 100 percent, got {min_percent_cells}")


def _perturbed_keys(datasets, matched: MatchedGenes, screen: str, perturbed, resolver) -> set[str]:
    if not screen:
        return set()
    panel = next(dataset.genes for dataset in datasets if dataset.name == screen)
    hits = target_columns(perturbed, panel, resolver=resolver).values()
    return {str(matched.keys[screen][column]) for found in hits for column in found}


def _column_map(dataset: ChunkedCounts, where, stats: GeneStats, chosen) -> ColumnMap:
    columns = tuple(tuple(where[i]) for i in chosen)

    def values(array):
        return tuple(array[i].item() if where[i] else None for i in chosen)

    return ColumnMap(
        columns,
        tuple(tuple(str(dataset.genes[column]) for column in found) for found in columns),
        len(dataset.genes),
        hash_genes(dataset.genes),
        stats.n_cells,
        dataset.cells,
        stats.fingerprint,
        stats.noise,
        values(stats.mean),
        values(stats.variance),
        values(stats.n_detected),
    )


def _seurat_v3(datasets, where, candidates, n: int, chunk_cells: int) -> np.ndarray:
    """The first n candidates by scanpy's batch-aware seurat_v3 (Stuart et al. 2019), best first."""
    if not len(candidates):
        return candidates
    import anndata
    import scanpy

    parts, batch = [], []
    for dataset in datasets:
        collapse = indicator([where[dataset.name][i] for i in candidates], len(dataset.genes))
        chunks = (canonical_counts(counts, name=dataset.name) for counts, _ in dataset.chunks(chunk_cells))
        parts += [(counts @ collapse).tocsr() for counts in chunks]
        batch += [dataset.name] * dataset.n_cells
    adata = anndata.AnnData(vstack(parts, format="csr"))
    adata.obs["batch"] = pd.Categorical(batch)
    ranked = scanpy.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=min(n, len(candidates)), batch_key="batch", inplace=False
    )
    best = ranked.reset_index(drop=True).query("highly_variable")
    columns = ["highly_variable_rank", "highly_variable_nbatches"]
    best = best.sort_values(columns, ascending=[True, False], kind="stable", na_position="last")
    return candidates[best.index.to_numpy()]


def _notes(n_chosen, n_must, n, selection, least, n_eligible, n_counted, low, screen) -> tuple[str, ...]:
    notes = []
    if selection != "all" and n_chosen < n:
        whose = f"of {screen} " if screen else ""
        notes.append(
            f"{n_chosen} genes, fewer than the {n} asked for: {n_eligible} genes {whose}are measured in at least "
            f"{least} datasets, and {n_counted} of them are counted in enough cells"
        )
    if n_must > n and selection != "all":
        notes.append(f"{n_must} perturbed genes, more than the {n} asked for; all have a place")
    for note in notes:
        warnings.warn(f"gene space: {note}", stacklevel=3)
    if low:
        notes.append(f"perturbed and counted in too few cells, kept: {', '.join(low)}")
    return tuple(notes)
