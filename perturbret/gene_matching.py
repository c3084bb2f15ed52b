"""Which columns of several datasets are the same gene: by Ensembl id, else by approved symbol."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .genes import SymbolResolver, is_ensembl_id, strip_version

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
    symbols, ensembl_ids : mapping of key to str
        Symbol of each key, unique and whatever the order of the datasets: with `symbol`, the key. With `ensembl`, the
        symbol that HGNC approves for the id; where it knows none, the alphabetically first of the datasets' names;
        the id itself where that symbol is another gene's too, or where no dataset names one. Ensembl id where it is
        known.
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
        found: dict[str, list[int]] = {}
        for column, key in enumerate(self.keys[dataset]):
            found.setdefault(str(key), []).append(column)
        return {key: tuple(columns) for key, columns in found.items()}


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
    # Of all datasets alike, so that their order has no say.
    symbols = {key: approved.get(key) or min(found, default=key) for key, found in names.items()}
    # A symbol of two ids would make names ambiguous: those go by their id.
    times = pd.Series(symbols, dtype=object).value_counts()
    symbols = {
        key: symbol if times[symbol] == 1 and symbol not in names else key for key, symbol in symbols.items()
    }
    return MatchedGenes("ensembl", keys, symbols, {key: key for key in symbols})


def _rivals(panel, gene: Mapping[str, str], how: Mapping[str, str]) -> set[str]:
    """Names of a panel that lose their gene to a surer name of it, or that tie."""
    bearers: dict[str, list[str]] = {}
    for name in dict.fromkeys(str(name).strip() for name in panel):
        bearers.setdefault(gene[name], []).append(name)
    lost = set()
    for names in bearers.values():
        if len(names) > 1:
            ranks = [_LINKS.index(how[name]) if how[name] in _LINKS else len(_LINKS) for name in names]
            best = min(ranks)
            winner = names[ranks.index(best)] if ranks.count(best) == 1 else None
            lost |= set(names) - {winner}
    return lost
