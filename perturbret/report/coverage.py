"""How much of a screen scGPT's vocabulary covers, before and after genes are mapped: the tables of notebook 02."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.conditions import targets
from ..data.genes import SymbolResolver
from ..data.screen import Screen
from ..data.targets import ABSENT, UNKNOWN
from ..runs.runs import write_table
from ..scgpt.vocabulary import LINKS, GeneTokens, Vocabulary, map_genes
from .audit import target_rows
from .wording import bullets, from_to, listed, percent, plain

# Below this share after mapping, by genes or by UMIs, the page warns.
WARN_BELOW = 0.95
SETS = ("all genes", "highly variable genes", "targets")


@dataclass(frozen=True)
class Coverage:
    """What of a screen has a token.

    Attributes
    ----------
    vocabulary : Vocabulary
    mapping : GeneTokens
        Of the panel.
    genes : DataFrame, one row per gene of the panel, in its order
        The mapping's table with `umis` (sum over cells), `hvg` and `target` (of some condition).
    targets : DataFrame, one row per target of any condition
        The mapping's columns for its name, with `measured` (names in the panel), `status`
        (`perturbret.data.targets.STATUSES`; "" where labels are no genes) and `n_conditions`.
    conditions : DataFrame, one row per condition
        `n_cells`; `without_token`, targets that have none; `umi_share_before`, `umi_share_after`, of its cells;
        `affected`: a target has no token, or the share after mapping is below `WARN_BELOW`.
    summary : DataFrame, one row per entry of `SETS`
        `n`; `before`, `after`, how many of them have a token; their shares, by number and by `umis`. Targets
        count by name, measured or not; their UMIs are those of the measured ones. NaN where there are no UMIs.
    """

    vocabulary: Vocabulary
    mapping: GeneTokens
    genes: pd.DataFrame
    targets: pd.DataFrame
    conditions: pd.DataFrame
    summary: pd.DataFrame


def measure_coverage(
    screen: Screen, vocabulary: Vocabulary, *, n_hvg: int = 2000, resolver: SymbolResolver | None = None
) -> Coverage:
    """Map a screen's genes and targets to tokens and count what has one.

    Before: the name itself is a token. After: see `perturbret.scgpt.vocabulary.map_genes`.

    Parameters
    ----------
    screen : Screen
    vocabulary : Vocabulary
    n_hvg : int
        Highly variable genes to count; all genes of a panel that has no more.
    resolver : SymbolResolver, optional
        The packaged one by default.

    Raises
    ------
    ValueError
        `n_hvg` is below 1.
    """
    resolver = SymbolResolver.from_package() if resolver is None else resolver
    mapping = map_genes(screen.genes, vocabulary, resolver=resolver)
    is_target = np.zeros(screen.n_genes, dtype=bool)
    is_target[[column for found in screen.target_columns.values() for column in found]] = True
    genes = mapping.table.assign(
        umis=np.asarray(screen.counts.sum(axis=0, dtype=np.float64)).ravel(),
        hvg=highly_variable(screen, n_hvg),
        target=is_target,
    )
    named = _targets(screen, vocabulary, resolver)
    conditions = _conditions(screen, genes, named)
    return Coverage(vocabulary, mapping, genes, named, conditions, _summary(genes, named))


def highly_variable(screen: Screen, n: int) -> np.ndarray:
    """The n genes with the largest normalised dispersion (Satija et al. 2015, as in scanpy's flavor `seurat`).

    Counts are scaled to 10,000 per cell by the cells' totals, and log1p is taken. ValueError for n below 1.

    Returns
    -------
    ndarray of bool, shape (n_genes,)
        All True where the panel has no more than `n` genes.
    """
    if n < 1:
        raise ValueError(f"n_hvg: expected at least 1, got {n}")
    if screen.n_genes <= n:
        return np.ones(screen.n_genes, dtype=bool)
    # Slow to import, and needed for large panels only.
    import anndata
    import scanpy

    scale = 1e4 / np.maximum(screen.obs["total"].to_numpy(np.float64), 1)
    values = screen.counts.copy()
    values.data = np.log1p(values.data * np.repeat(scale, np.diff(values.indptr))).astype(np.float32)
    ranked = scanpy.pp.highly_variable_genes(
        anndata.AnnData(values), flavor="seurat", n_top_genes=n, inplace=False
    )
    return ranked["highly_variable"].to_numpy(bool)


def write_coverage(coverage: Coverage, directory: Path) -> None:
    """Write genes.csv, targets.csv, conditions.csv, collisions.csv and coverage.csv, each atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    tables = {
        "genes": coverage.genes,
        "targets": coverage.targets,
        "conditions": coverage.conditions,
        "collisions": coverage.mapping.collisions,
        "coverage": coverage.summary,
    }
    for name, table in tables.items():
        write_table(directory / f"{name}.csv", table)


def mapped_genes(coverage: Coverage) -> pd.DataFrame:
    """Genes that found a token under another name, those with most UMIs first."""
    genes = coverage.genes
    found = genes[genes["how"].isin(LINKS[1:])].sort_values("umis", ascending=False, kind="stable")
    return found[["gene", "token", "how", "umis"]].reset_index(drop=True)


def genes_without_token(coverage: Coverage) -> pd.DataFrame:
    """Genes that stay without token and why, those with most UMIs first."""
    genes = coverage.genes
    left = genes[genes["token"].isna()].sort_values("umis", ascending=False, kind="stable")
    return left[["gene", "how", "possible", "umis", "target"]].reset_index(drop=True)


def findings(coverage: Coverage) -> str:
    """What follows, in Markdown sentences computed from the tables."""
    whole, hvg, named = coverage.summary.itertuples()
    found = coverage.genes["how"].value_counts()
    ways = [f"{found[how]} by {_WORDS[how]}" for how in LINKS[1:] if how in found]
    lines = [
        f"Vocabulary: {len(coverage.vocabulary):,} tokens ({coverage.vocabulary.source}; sha256 "
        f"`{coverage.vocabulary.hash[:12]}`).",
        f"**{whole.before:,} → {whole.after:,} of {whole.n:,} genes** have a token, before and after mapping "
        f"({_shares(whole, 'the')}). "
        + (
            f"Mapping found {', '.join(ways)}."
            if ways
            else "Every token was found under the gene's own name."
        ),
        "The panel is not larger than the number of highly variable genes asked for: all of its genes count."
        if hvg.n == whole.n
        else f"{hvg.before:,} → {hvg.after:,} of the {hvg.n:,} highly variable genes ({_shares(hvg, 'their')}).",
        _target_line(coverage, named),
        *_left_lines(coverage),
        *_warnings(coverage),
    ]
    return bullets(lines)


_WORDS = {"ensembl": "Ensembl id", "previous": "previous symbol", "alias": "alias"}
_WHY = {
    "ambiguous": "whose name may mean several tokens or genes",
    "collision": "whose token belongs to another gene of the panel",
    "missing": "that the vocabulary does not know",
}


def _targets(screen: Screen, vocabulary: Vocabulary, resolver: SymbolResolver) -> pd.DataFrame:
    """One row per target; see `Coverage`."""
    of = {condition: targets(condition) for condition in screen.conditions}
    names = sorted({name for found in of.values() for name in found})
    rows = {row["target"]: row for row in target_rows(screen)}
    table = map_genes(names, vocabulary, resolver=resolver).table.rename(columns={"gene": "target"})
    return table.assign(
        measured=[", ".join(rows[name]["columns"]) if name in rows else "" for name in names],
        status=[rows[name]["status"] if name in rows else "" for name in names],
        n_conditions=[sum(name in found for found in of.values()) for name in names],
    )


def _conditions(screen: Screen, genes: pd.DataFrame, named: pd.DataFrame) -> pd.DataFrame:
    bare = set(named.loc[named["token"].isna(), "target"])
    labels = screen.obs["condition"].to_numpy(str)
    kept = {"umis": np.ones(len(genes)), "before": genes["how"] == "direct", "after": genes["token"].notna()}
    sums = pd.DataFrame({name: screen.counts @ np.asarray(mask, np.float64) for name, mask in kept.items()})
    sums = sums.groupby(labels).sum().reindex(screen.conditions)
    without = [", ".join(name for name in targets(c) if name in bare) for c in screen.conditions]
    before, after = ((sums[name] / sums["umis"]).to_numpy() for name in ("before", "after"))
    return pd.DataFrame(
        {
            "condition": screen.conditions,
            "n_cells": [int((labels == condition).sum()) for condition in screen.conditions],
            "without_token": without,
            "umi_share_before": before,
            "umi_share_after": after,
            "affected": (np.array(without, dtype=object) != "") | (after < WARN_BELOW),
        }
    )


def _summary(genes: pd.DataFrame, named: pd.DataFrame) -> pd.DataFrame:
    """One row per entry of `SETS`: what is counted, and the columns of the panel whose UMIs are."""
    hvg = genes[genes["hvg"]]
    rows = []
    for name, items, panel in zip(
        SETS, (genes, hvg, named), (genes, hvg, genes[genes["target"]]), strict=True
    ):
        row = {"set": name, "n": len(items)}
        found = {
            "before": lambda table: table["how"] == "direct",
            "after": lambda table: table["token"].notna(),
        }
        row |= {when: int(has(items).sum()) for when, has in found.items()}
        row |= {f"share_{when}": _ratio(row[when], len(items)) for when in found}
        row["umis"] = panel["umis"].sum()
        row |= {
            f"umi_share_{w}": _ratio(panel.loc[h(panel), "umis"].sum(), row["umis"]) for w, h in found.items()
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else float("nan")


def _shares(row, whose: str) -> str:
    by_number = from_to(row.share_before, row.share_after)
    return f"{by_number}; of {whose} UMIs {from_to(row.umi_share_before, row.umi_share_after)}"


def _target_line(coverage: Coverage, named) -> str:
    measured = int((coverage.targets["measured"] != "").sum())
    if named.n == 0:
        return "The screen names no targets."
    text = f"{named.before:,} → {named.after:,} of {named.n:,} targets have a token; the panel measures {measured}"
    for status, what in ((ABSENT, "known but not measured"), (UNKNOWN, "unknown to HGNC")):
        text += f", {int((coverage.targets['status'] == status).sum())} are {what}"
    umis = from_to(named.umi_share_before, named.umi_share_after)
    return f"{text} (of their UMIs {umis})." if named.umis else f"{text}."


def _left_lines(coverage: Coverage) -> list[str]:
    left = genes_without_token(coverage)
    lines = []
    for how, why in _WHY.items():
        if len(part := left[left["how"] == how]):
            lines.append(
                f"{len(part)} {'gene' if len(part) == 1 else 'genes'} {why}: {_names(part['gene'])}."
            )
    if lines:
        lines.append("Genes without token are left out of scGPT's input; all other methods see them.")
    return lines


def _warnings(coverage: Coverage) -> list[str]:
    low = [
        f"{row.set} {percent(share)} {what}"
        for row in coverage.summary.itertuples()
        for share, what in ((row.share_after, "by number"), (row.umi_share_after, "by UMIs"))
        if share < WARN_BELOW
    ]
    hit = coverage.conditions[coverage.conditions["affected"]]
    names = f"{len(hit)} of {len(coverage.conditions)} conditions: {_names(hit['condition'])}"
    if low:
        lowest = coverage.conditions["umi_share_after"].min()
        kept = "" if np.isnan(lowest) else f", and each keeps at least {percent(lowest)} of its cells' UMIs"
        affected = (
            f"Affected, by a target without token or by less than {WARN_BELOW:.0%} of their cells' UMIs: {names}."
            if len(hit)
            else f"No condition has a target without token{kept}."
        )
        return [
            f"**Warning:** coverage is below {WARN_BELOW:.0%} after mapping: {'; '.join(low)}. {affected} Read "
            "results of scGPT on this screen with that in mind."
        ]
    if len(hit):
        return [f"Coverage is {WARN_BELOW:.0%} or more for every set; still affected are {names}."]
    return [f"Coverage is {WARN_BELOW:.0%} or more for every set, and no condition is affected."]


def _names(names: pd.Series) -> str:
    return listed(map(plain, names), most=10)
