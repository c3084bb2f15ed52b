"""Other ways to spell a gene's name: what files, spreadsheets and guide libraries make of a symbol."""

import re
from collections.abc import Callable, Iterator

from .genes import SymbolResolver, is_ensembl_id

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
# Names that clone libraries gave to loci without a symbol, as RP11-228B15.4: its first part is no gene.
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
    """`name` without dashes, dots and blanks; as it is where one of them keeps a number apart (KLF1_1 is no KLF11)."""
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
