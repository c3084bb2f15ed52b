"""One gene, many names: match gene symbols through HGNC's approved, previous and alias symbols.

`python -m perturbret.genes rebuild HGNC.tsv` writes a compact table from a download of genenames.org.
"""

import argparse
import gzip
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd

from .atomic import replacing

PACKAGED_TABLE = Path(__file__).parent / "data" / "hgnc_symbols.tsv.gz"

# Links between two names, from the surest to the weakest.
_LINKS = ("direct", "ensembl", "previous", "alias")
_ENSEMBL = re.compile(r"(ENS[A-Z]{0,5}G\d{11})(?:\.\d+)?(?:_PAR_Y)?")
# The wording of the packaged table, of HGNC's custom downloads and of its complete set.
_COLUMNS = {
    "symbol": ("symbol", "Approved symbol"),
    "ensembl": ("ensembl", "Ensembl gene ID", "Ensembl ID(supplied by Ensembl)", "ensembl_gene_id"),
    "previous": ("previous", "Previous symbols", "prev_symbol"),
    "alias": ("alias", "Alias symbols", "alias_symbol"),
}
_STATUS = ("status", "Status")

Gene = tuple[str, str, Sequence[str], Sequence[str]]


def is_ensembl_id(name: str) -> bool:
    """Whether `name` is an Ensembl gene id of any species, with or without version."""
    return _ENSEMBL.fullmatch(str(name).strip()) is not None


def strip_version(name: str) -> str:
    """An Ensembl gene id without version and PAR suffix; any other name stripped of outer blanks only."""
    name = str(name).strip()
    match = _ENSEMBL.fullmatch(name)
    return match[1] if match else name


class SymbolResolver:
    """Finds the names of one gene in any collection of names: a panel, a vocabulary.

    A name is read as the approved symbol or Ensembl id that it is, else as the gene that once had it as
    approved symbol, else as the gene that has it as alias. Where several genes share it at that level it is
    ambiguous and matches nothing but itself. Withdrawn entries give no names: the symbol of one is known only
    if an approved gene lists it. Case matters.

    Parameters
    ----------
    genes : iterable of (approved symbol, Ensembl id or "", previous symbols, aliases)
        Or a function that returns them, called when they are first needed.
    source : str, optional
        Where they are from. None for a resolver without genes, which knows exact names only.
    """

    def __init__(
        self, genes: Iterable[Gene] | Callable[[], Iterable[Gene]] = (), *, source: str | None = None
    ):
        self._genes = genes if callable(genes) else tuple(genes)
        self.source = source or ("genes" if self._genes else None)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "SymbolResolver":
        """A resolver over a table of HGNC, packaged or as downloaded; read when first needed.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            When first used, as `read_table`.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"gene table: expected a file, {path} does not exist")
        return cls(partial(read_table, path), source=str(path))

    @classmethod
    def from_package(cls) -> "SymbolResolver":
        """The resolver over the table that the package ships, made once."""
        return _packaged()

    def readings(self, name: str) -> tuple[str, ...]:
        """Every gene that `name` may stand for: none, one, or several where it is ambiguous.

        Genes are named by approved symbol, or by Ensembl id where the table does not know it.
        """
        return self._read(name)[0]

    def canonical(self, names: Iterable[str]) -> pd.DataFrame:
        """One name per gene, whatever it is called: the approved symbol.

        Returns
        -------
        DataFrame
            One row per name, in order. `name`; `gene`: the approved symbol, or the name itself without blanks
            and version where it is unknown or ambiguous; `how`: `direct`, `ensembl`, `previous`, `alias`,
            `ambiguous`, `missing`.
        """
        rows = []
        for name in map(str, names):
            genes, how = self._read(name)
            rows.append((name, genes[0] if len(genes) == 1 else strip_version(name), how))
        return pd.DataFrame(rows, columns=["name", "gene", "how"], dtype=object)

    def approved(self, name: str) -> bool:
        """Whether `name` is an approved symbol of HGNC today."""
        return strip_version(name) in self._owners[0]

    @cached_property
    def ensembl_ids(self) -> dict[str, str]:
        """Approved symbol -> Ensembl id, of genes that have one."""
        return {symbol: identifier for identifier, symbol in self._owners[1].items()}

    def resolve(self, symbol: str, among: Collection[str]) -> str | None:
        """The name in `among` of the gene `symbol`, or None. For many symbols see `resolve_many`."""
        return self.resolve_many([symbol], among)["match"].iloc[0]

    def resolve_many(self, symbols: Iterable[str], among: Collection[str]) -> pd.DataFrame:
        """The names in `among` of many genes, and how each was found.

        The two names may be old or new on either side. Between several names of a gene in `among` the surest
        link decides; names that tie are ambiguous.

        Parameters
        ----------
        symbols : iterable of str
        among : collection of str
            Gene symbols or Ensembl ids (any version).

        Returns
        -------
        DataFrame
            One row per symbol, in order. `query`; `match`: a member of `among` or None; `how`: `direct` (the
            same name), `ensembl`, `previous`, `alias` (the weakest link between the two names), `ambiguous`,
            `missing`.
        """
        members = dict.fromkeys(map(str, among))
        panel: dict[str, tuple[int, list[str]]] = {}
        for name in members:
            genes, how = self._read(name)
            if len(genes) != 1:
                continue
            link = _LINKS.index(how)
            best, names = panel.get(genes[0], (len(_LINKS), []))
            if link < best:
                panel[genes[0]] = (link, [name])
            elif link == best:
                names.append(name)

        rows = []
        for query in map(str, symbols):
            symbol, match = query.strip(), None
            genes, how = self._read(symbol)
            if symbol in members:
                match, how = symbol, "direct"
            elif len(genes) < 2:
                link, names = panel.get(genes[0], (0, [])) if genes else (0, [])
                if len(names) == 1:
                    match, how = names[0], _LINKS[max(link, _LINKS.index(how))]
                else:
                    how = "ambiguous" if names else "missing"
            rows.append((query, match, how))
        return pd.DataFrame(rows, columns=["query", "match", "how"], dtype=object)

    def _read(self, name: str) -> tuple[tuple[str, ...], str]:
        """The genes that `name` may stand for, and the link to them."""
        name = strip_version(name)
        for link, owners in zip(_LINKS, self._owners, strict=True):
            owner = owners.get(name)
            if owner is not None:
                genes = tuple(dict.fromkeys(owner.split("\t")))
                return genes, link if len(genes) == 1 else "ambiguous"
        return ((name,), "ensembl") if is_ensembl_id(name) else ((), "missing")

    @cached_property
    def _owners(self) -> tuple[dict[str, str], ...]:
        """For each link: name -> approved symbol of its gene, several joined by tabs.

        Joined strings, since building a tuple for each of 140,000 names takes three times as long.
        """
        direct, ensembl, previous, alias = {}, {}, {}, {}
        for symbol, identifier, once, others in self._genes() if callable(self._genes) else self._genes:
            direct[symbol] = symbol
            if identifier:
                ensembl[identifier] = symbol
            for name in once:
                previous[name] = f"{previous[name]}\t{symbol}" if name in previous else symbol
            for name in others:
                alias[name] = f"{alias[name]}\t{symbol}" if name in alias else symbol
        return direct, ensembl, previous, alias


def read_table(path: str | os.PathLike) -> Iterator[Gene]:
    """Approved genes of an HGNC table: the packaged form, a custom download or the complete set.

    Yields
    ------
    (approved symbol, Ensembl id or "", previous symbols, aliases)

    Raises
    ------
    ValueError
        A column is missing, or a row has too few or too many cells.
    """
    content = Path(path).read_bytes()
    text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8")
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    header = next((line for line in lines if line and not line.startswith("#")), "").split("\t")
    places = []
    for name, spellings in _COLUMNS.items():
        place = next((header.index(spelling) for spelling in spellings if spelling in header), None)
        if place is None:
            raise ValueError(
                f"gene table {path}: expected a column {' or '.join(spellings)} ({name}), got {header[:20]}"
            )
        places.append(place)
    symbol, ensembl, previous, alias = places
    status = next((header.index(spelling) for spelling in _STATUS if spelling in header), None)
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(
                f"gene table {path}: expected {len(header)} cells, got {len(cells)} in data row {number}"
            )
        if status is None or cells[status] == "Approved":
            yield cells[symbol], cells[ensembl], _synonyms(cells[previous]), _synonyms(cells[alias])


def rebuild(source: str | os.PathLike, table: str | os.PathLike, *, date: str) -> int:
    """Write the compact table from a download of HGNC; the same download gives the same bytes.

    Parameters
    ----------
    source : path
        TSV of genenames.org: a custom download with status, previous and alias symbols and Ensembl gene id,
        or the complete set.
    table : path
        Written atomically, gzipped.
    date : str
        When the source was downloaded; kept in the header.

    Returns
    -------
    int
        Number of genes.
    """
    genes = sorted(read_table(source))
    lines = [
        f"# HGNC, genenames.org, CC0; downloaded {date}; {len(genes)} approved genes",
        "\t".join(_COLUMNS),
    ]
    for symbol, ensembl, previous, alias in genes:
        lines.append("\t".join((symbol, ensembl, "|".join(previous), "|".join(alias))))
    content = "\n".join([*lines, ""]).encode("utf-8")
    with replacing(table) as temporary:
        temporary.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    return len(genes)


def _synonyms(cell: str) -> Sequence[str]:
    if not cell:
        return ()
    if "," not in cell and "|" not in cell:
        return (cell.strip('" '),)
    return [name for name in map(str.strip, cell.strip('"').replace("|", ",").split(",")) if name]


@cache
def _packaged() -> SymbolResolver:
    return SymbolResolver.from_file(PACKAGED_TABLE)


def _main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m perturbret.genes")
    command = parser.add_subparsers(required=True).add_parser("rebuild", help="write the compact table")
    command.add_argument("source", help="TSV downloaded from genenames.org")
    command.add_argument("--date", required=True, help="when it was downloaded")
    command.add_argument("--table", default=PACKAGED_TABLE, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    count = rebuild(chosen.source, chosen.table, date=chosen.date)
    print(f"{chosen.table}: {count} genes, {Path(chosen.table).stat().st_size} bytes")


if __name__ == "__main__":
    _main()
