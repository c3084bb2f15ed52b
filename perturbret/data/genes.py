"""One gene, many names: HGNC's approved, previous and alias symbols, and other ways to spell them.

`python -m perturbret.data.genes rebuild HGNC.tsv` writes a compact table from a download of genenames.org.
"""

import argparse
import gzip
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache, cached_property, partial
from pathlib import Path

import pandas as pd

from ..files.atomic import replacing
from ..files.places import RESOURCES

PACKAGED_TABLE = RESOURCES / "hgnc_symbols.tsv.gz"

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
    parser = argparse.ArgumentParser(prog="python -m perturbret.data.genes")
    command = parser.add_subparsers(required=True).add_parser("rebuild", help="write the compact table")
    command.add_argument("source", help="TSV downloaded from genenames.org")
    command.add_argument("--date", required=True, help="when it was downloaded")
    command.add_argument("--table", default=PACKAGED_TABLE, help="default: %(default)s")
    chosen = parser.parse_args(arguments)
    count = rebuild(chosen.source, chosen.table, date=chosen.date)
    print(f"{chosen.table}: {count} genes, {Path(chosen.table).stat().st_size} bytes")


# Dashes and blanks that look like `-` and ` `; marks of no width.
_LOOKALIKES = {ord(dash): "-" for dash in "‐‑‒–—―−⁃﹘﹣－"}
_LOOKALIKES |= {ord(blank): " " for blank in "\t\n\r\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006"}
_LOOKALIKES |= {ord(blank): " " for blank in "\u2007\u2008\u2009\u200a\u202f\u205f\u3000"}
_LOOKALIKES |= dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u2060\ufeff"))
_GREEK = dict(zip(map(ord, "αβγδεζθκλΑΒΓΔΕΖΘΚΛ"), "ABGDEZTKL" * 2, strict=True))

# Months whose short names start gene symbols that spreadsheets turn into dates.
_MONTH_GENES = {
    "MAR": ("MARCH", "MARC", "MARCHF", "MTARC"),
    "SEP": ("SEPT", "SEPTIN", "SEP"),
    "DEC": ("DEC", "DELEC"),
    "OCT": ("OCT",),
    "NOV": ("NOV",),
    "FEB": ("FEB",),
    "APR": ("APR",),
}
_MONTHS = "JAN FEB MAR APR MAY JUN JUL AUG SEP OCT NOV DEC".split()
_DATES = (
    re.compile(r"X?(?P<day>\d{1,2})[-./ ]?(?P<month>[A-Z]{3,4})(?:[-./ ]\d{2,4})?"),
    re.compile(r"(?P<month>[A-Z]{3,4})[-./ ](?P<day>\d{1,2})"),
    re.compile(r"X?\d{4}[-./](?P<number>\d{2})[-./](?P<day>\d{2})(?:[ T][\d:.]+)?"),
    re.compile(r"X?(?P<number>\d{1,2})/(?P<day>\d{1,2})/\d{2,4}"),
)

_GENOME = re.compile(r"(?i)(?:GRC[hmz]\d+|hg\d\d|mm\d{1,2}|rn\d|human|mouse|hs|hsa|mmu)[_\-.: ]+")
# What guide libraries hang onto a symbol: a number, a guide, a promoter (P1, P1P2), a repeat in brackets.
GUIDE_ENDING = re.compile(
    r"(?i)(?:[_\-. ]*\(\d+\)|[_\-. :|/]+(?:(?:sg|g|guide|grna|sgrna|crrna|sh|si|ko|kd|oe|cr|p\d)[_\-. ]?)?\d+"
    r"|[_\-. ]+(?:P\d)+|[_\-. ]+(?:sg|guide|grna|sgrna|ko|kd|oe|[acgt]{17,23})|(?:sg|grna|sgrna)\d+)$"
)
GUIDE_START = re.compile(
    r"^(?:sg(?:RNA)?[_\-. ]*(?=[A-Za-z])|(?:sh|si|cr|g)(?:RNA)?(?:[_\-. ]+(?=[A-Za-z])|(?=[A-Z]))"
    r"|(?i:ko|kd|oe|grna|guide)[_\-. ]+(?=[A-Za-z]))"
)
_TOKENS = re.compile(r"[^_\-.:|/;,\s()\[\]+&]+")
# Names that clone libraries gave to loci without a symbol, as RP11-228B15.4: its first part is not a gene.
_CLONE = re.compile(r"^[A-Za-z0-9]+-\d+[A-Z]+\d+(\.\d+)?$")

# Kinds of spelling, from the least to the most that has to be taken away.
KINDS = (
    "case",
    "characters",
    "spreadsheet date",
    "genome prefix",
    "joined with an id",
    "guide ending",
    "part of a name",
)


def tidy(name: object) -> str:
    """`name` with ordinary dashes and blanks, nothing invisible, and no blanks around it."""
    return " ".join(str(name).translate(_LOOKALIKES).split(" ")).strip()


def known_as(name: str, resolver: SymbolResolver) -> tuple[str, ...]:
    """Genes that HGNC's table knows `name` as, in upper case where not as written; empty where none."""
    return resolver.readings(name) or resolver.readings(upper(name))


def upper(name: str) -> str:
    """`name` in the case of human symbols: upper, but for the `orf` of open reading frames."""
    return re.sub(r"^(C(?:\d+|[XY]))ORF(?=\d)", r"\1orf", name.upper())


def squashed(name: str) -> str:
    """`name` without dashes, dots and blanks; as it is where one of them keeps a number apart (KLF1_1 is not KLF11)."""
    return name if re.search(r"\d[._\- ]+\d", name) else re.sub(r"[._\- ]+", "", name)


def strip_guide(name: str, is_gene: Callable[[str], bool]) -> str:
    """`name` without what guide libraries put before and behind a symbol; as it is where it is a gene's own name.

    Examples
    --------
    >>> strip_guide("sgKLF1_P1P2", lambda name: name in {"KLF1", "HLA-A"})
    'KLF1'
    >>> strip_guide("HLA-A", lambda name: name in {"KLF1", "HLA-A"})
    'HLA-A'
    """
    for _ in range(4):
        if is_gene(name):
            return name
        start = GUIDE_START.sub("", name)
        if start != name and is_gene(start):
            return start
        shorter = GUIDE_ENDING.sub("", name)
        if shorter in ("", name):
            return start if start != name else name
        name = shorter
    return name


def spellings(name: str) -> Iterator[tuple[str, str]]:
    """What gene `name` may be another spelling of: (candidate, kind), the nearest first.

    Candidates of the kinds `guide ending`, `genome prefix`, `joined with an id` and `part of a name` are parts of
    the name, hence worth something only where they are the approved symbol of a gene or a column of their own.
    """
    name = tidy(name)
    yield name, "case"
    greek = name.translate(_GREEK)
    for other in dict.fromkeys((greek, re.sub(r"[._ ]", "-", greek), squashed(greek))):
        if other != name:
            yield other, "characters"
    if re.match(r"X\d", name):
        yield name[1:], "characters"
    for symbol in date_symbols(name):
        yield symbol, "spreadsheet date"
    if _CLONE.match(name):
        return
    bare = _GENOME.sub("", name, count=1)
    if bare != name and _GENOME.match(name):
        yield bare, "genome prefix"
        yield bare.replace(".", "-"), "genome prefix"
    kind = "part of a name"
    spans = [(match.start(), match.end()) for match in _TOKENS.finditer(name)]
    if any(is_ensembl_id(name[a:b]) for a, b in spans) and len(spans) > 1:
        kind = "joined with an id"
    ending = GUIDE_ENDING.sub("", name)
    modality = re.sub(r"(?<=[A-Z0-9])(?:[ia]|KO|KD|OE)$", "", name)
    for part in dict.fromkeys((modality, ending, GUIDE_START.sub("", name), GUIDE_START.sub("", ending))):
        if part not in ("", name):
            yield part, "guide ending"
    for length in (3, 2, 1):
        for first in range(len(spans) - length + 1):
            part = name[spans[first][0] : spans[first + length - 1][1]]
            if part == name or len(part) < 2 or not re.search(r"[A-Za-z]", part):
                continue
            yield part, kind
            if length > 1:
                yield re.sub(r"[._ ]", "-", part), kind
            elif GUIDE_START.match(part):
                yield GUIDE_START.sub("", part), kind


def date_symbols(name: str) -> list[str]:
    """Symbols that a spreadsheet turns into the date `name`: `1-Mar` may have been MARCH1 or MARC1."""
    for form in _DATES:
        match = form.fullmatch(tidy(name).upper())
        if match is None:
            continue
        found = match.groupdict()
        month = found.get("month") or ""
        if "number" in found:
            number = int(found["number"])
            month = _MONTHS[number - 1] if 1 <= number <= 12 else ""
        return [f"{stem}{int(found['day'])}" for stem in _MONTH_GENES.get(month[:3], ())]
    return []


if __name__ == "__main__":
    _main()
