"""Which measured columns a screen's targets are, and which targets have none that could be found.

Strictly first: the target's own name, other symbols and Ensembl ids of its gene, and columns that a tool made unique
(`KLF1-1`). Then columns beside it: antisense, divergent, overlapping and read-through transcripts. Last, names that may
be another spelling of the target's.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .conditions import CTRL, targets
from .genes import SymbolResolver, is_ensembl_id, known_as, spellings, squashed, strip_guide, upper

MATCHED = "matched"
ABSENT = "known gene, not measured"
UNKNOWN = "name unknown to HGNC"
STATUSES = (MATCHED, ABSENT, UNKNOWN)

# Spellings that are the whole name; of the other kinds the candidate is a part of it.
_WHOLE = ("case", "characters", "spreadsheet date")
_MADE_UNIQUE = re.compile(r"(.+)[-.]\d{1,2}")
_NEIGHBOUR = re.compile(r"(?i)(.+?)(?:[-._](?:AS|DT|OT|IT)\d*|OT\d+)")
_OPPOSITE_STRAND = re.compile(r"(.*[a-z].*?)os\d*")
_IDENTIFIER = r"ENS[A-Z]*G\d+(?:\.\d+)?"


@dataclass(frozen=True)
class TargetMatches:
    """Targets and columns of a screen.

    Attributes
    ----------
    columns : dict of condition to ndarray of int
        Columns to mask, sorted, unique; one key per condition, controls left out.
    table : list of dict
        One row per target, in name order, JSON-able: `target`; `status`, one of `STATUSES`; `columns`, of its own;
        `also_masked`, beside it or of a similar name; `nearest`, the column of the nearest name where it has no
        column of its own; `suggestion`, the line of the dataset's entry that settles it; `conditions`, how many target
        it: none, where it is a gene of `extra` only.
    """

    columns: dict[str, np.ndarray]
    table: list[dict]


def match_targets(
    conditions: Iterable[str],
    genes: Sequence[str],
    *,
    resolver: SymbolResolver | None = None,
    extra: Mapping[str, Sequence[str]] | None = None,
    identifiers: Sequence[Iterable[str]] | None = None,
) -> TargetMatches:
    """Find the columns of each condition's targets.

    A name with several readings stands for all of them, and columns beside a target or of a similar name are masked
    with it: a gene masked for nothing costs little, a target left in place is a leak.

    Parameters
    ----------
    conditions : iterable of str
        Canonical; controls are left out.
    genes : sequence of str, length n_genes
    resolver : SymbolResolver, optional
        None: exact names only.
    extra : mapping of condition to gene symbols, optional
        Matched and masked as if they were targets too.
    identifiers : sequence of iterables of str, length n_genes, optional
        Ensembl ids of the columns, where the file gives them.

    Examples
    --------
    >>> from perturbret.data.genes import SymbolResolver
    >>> genes = ["HBG1", "FOXF1", "FENDRR", "FOXF1-AS1"]
    >>> matches = match_targets(["FOXF1", "NOSUCH"], genes, resolver=SymbolResolver.from_package())
    >>> matches.columns["FOXF1"].tolist()
    [1, 3]
    >>> [(row["target"], row["status"], row["also_masked"]) for row in matches.table]
    [('FOXF1', 'matched', ['FOXF1-AS1']), ('NOSUCH', 'name unknown to HGNC', [])]
    """
    extra = extra or {}
    panel = _Panel(genes, resolver or SymbolResolver(), identifiers, exact_only=resolver is None)
    names = {
        condition: (*targets(condition), *map(str, extra.get(condition, ())))
        for condition in sorted({str(condition) for condition in conditions} - {CTRL})
    }
    uses = dict.fromkeys((name for found in names.values() for name in found), 0)
    for condition in names:
        for name in targets(condition):
            uses[name] += 1
    rows = {name: panel.row(name) for name in sorted(uses)}
    columns = {
        condition: np.array(sorted(set().union(*(rows[name].masked for name in found))), dtype=np.int64)
        for condition, found in names.items()
    }
    table = [
        {
            "target": name,
            "status": row.status,
            "columns": [panel.genes[column] for column in sorted(row.own)],
            "also_masked": [panel.genes[column] for column in sorted(row.masked - row.own)],
            "nearest": panel.genes[row.near[0][0]] if row.near and not row.own else "",
            "suggestion": "" if row.own else panel.suggestion(name, row),
            "conditions": uses[name],
        }
        for name, row in rows.items()
    ]
    return TargetMatches(columns, table)


def count_statuses(table: Sequence[Mapping]) -> dict[str, int]:
    """How many targets have each of `STATUSES`."""
    return {
        status: sum(row["status"] == status and row["conditions"] > 0 for row in table) for status in STATUSES
    }


def unsettled(table: Sequence[Mapping], accepted: str | Sequence[str] = ()) -> list[Mapping]:
    """Rows of targets without a column that are not known to be unmeasured: unknown names, near spellings.

    Parameters
    ----------
    table : rows of `TargetMatches.table`
    accepted : "accept" or list of targets
        What the dataset's entry states to be unmeasured.
    """
    if accepted == "accept":
        return []
    return [
        row
        for row in table
        if row["target"] not in accepted
        and row["status"] != MATCHED
        and (row["nearest"] or row["status"] == UNKNOWN)
    ]


@dataclass(frozen=True)
class _Row:
    status: str
    own: set[int]
    masked: set[int]
    near: list[tuple[int, str]]  # (column, kind of spelling), the nearest first


class _Panel:
    """Columns by all their names."""

    def __init__(self, genes, resolver, identifiers, *, exact_only):
        self.genes = [str(gene) for gene in genes]
        self.resolver, self.exact_only = resolver, exact_only
        self.by_name, self.by_gene = defaultdict(set), defaultdict(set)
        self.beside: dict[str, set[int]] = defaultdict(set)
        self.full: dict[str, list] = defaultdict(list)
        self.parts: dict[str, list] = defaultdict(list)
        names = set(self.genes)
        recased = 0
        for column, name in enumerate(self.genes):
            self.by_name[name].add(column)
            if exact_only:
                continue
            known = resolver.readings(name)
            for gene in known:
                self.by_gene[gene].add(column)
            for identifier in identifiers[column] if identifiers is not None else ():
                for gene in resolver.readings(identifier):
                    self.by_gene[gene].add(column)
            similar = known or known_as(name, resolver)
            recased += bool(similar) and not known
            base = "" if similar else _made_unique_from(name, names, resolver)
            if base:
                self.by_name[base].add(column)
                for gene in resolver.readings(base):
                    self.by_gene[gene].add(column)
            self._add_beside(column, name)
            self._add_spellings(column, name, known)
        # Mouse symbols are human ones in another case: then a name is known that is one in upper case.
        self.other_case = recased > 0.3 * len(self.genes)

    def _add_beside(self, column: int, name: str) -> None:
        found = _NEIGHBOUR.fullmatch(name) or _OPPOSITE_STRAND.fullmatch(name)
        if found:
            for key in self._keys(found[1]):
                self.beside[key].add(column)
        for dash in re.finditer(r"[-.]", name):
            pair = name[: dash.start()], name[dash.end() :]
            if all(self._approved(part) for part in pair):
                for part in pair:
                    for key in self._keys(part):
                        self.beside[key].add(column)

    def _add_spellings(self, column: int, name: str, known) -> None:
        for key in dict.fromkeys(
            (name.casefold(), squashed(name).casefold(), *(g.casefold() for g in known))
        ):
            self.full[key].append((column, "case" if key == name.casefold() else "characters"))
        if known:
            return
        for candidate, kind in spellings(name):
            keys = [candidate.casefold()]
            if kind in _WHOLE or is_ensembl_id(candidate):
                keys += [gene.casefold() for gene in known_as(candidate, self.resolver)]
            for key in keys:
                self.parts[key].append((column, kind))

    def _approved(self, name: str) -> bool:
        return self.resolver.approved(name) or self.resolver.approved(upper(name))

    def _keys(self, name: str) -> set[str]:
        return {name.casefold(), *(gene.casefold() for gene in known_as(name, self.resolver))}

    def row(self, name: str) -> _Row:
        known = self.resolver.readings(name)
        own = set(self.by_name.get(name, ())).union(*(self.by_gene.get(gene, ()) for gene in known))
        if self.exact_only:
            return _Row(MATCHED if own else UNKNOWN, own, own, [])
        near = self._near(name, known, own)
        masked = own.union(
            (column for column, _ in near), *(self.beside.get(key, ()) for key in self._keys(name))
        )
        if own:
            status = MATCHED
        else:
            reads = known or (self.other_case and known_as(name, self.resolver))
            status = ABSENT if reads else UNKNOWN
        return _Row(status, own, masked, near)

    def _near(self, name: str, known, own: set[int]) -> list[tuple[int, str]]:
        hits: dict[int, str] = {}
        if known:
            # A column of another gene cannot be a spelling of a known gene: only names unknown to HGNC can.
            bare = re.sub(r"[._\- ]", "", name)
            for key in (name.casefold(), bare.casefold(), *(gene.casefold() for gene in known)):
                for column, kind in self.parts.get(key, ()):
                    hits.setdefault(column, kind)
        else:
            for candidate, kind in spellings(name):
                if kind not in _WHOLE and not (
                    self._approved(candidate) or candidate.casefold() in self.full
                ):
                    continue
                for key in {candidate.casefold(): 0, **dict.fromkeys(self._keys(candidate))}:
                    for index in (self.full, self.parts):
                        for column, other in index.get(key, ()):
                            hits.setdefault(column, other if kind == "case" else kind)
        return [(column, kind) for column, kind in hits.items() if column not in own]

    def suggestion(self, name: str, row: _Row) -> str:
        """The line of a dataset's entry that settles a target without a column of its own."""
        column, kind = row.near[0] if row.near else (None, "")
        if kind in ("genome prefix", "joined with an id"):
            pattern = symbol_pattern(self.genes[column])
            if pattern:
                return f"gene_symbol_pattern: '{pattern}'"
        if self.resolver.readings(name):
            return f"target_map: {{{name}: {self.genes[column]}}}" if row.near else ""
        several = self._combination(name)
        if several:
            return f'combo_delimiter: "{several}"'
        bare = strip_guide(name, lambda part: bool(known_as(part, self.resolver)) or part in self.by_name)
        if bare != name and (known_as(bare, self.resolver) or bare in self.by_name):
            return "strip_guide_suffix: true"
        if row.near:
            return f"target_map: {{{name}: {self.genes[column]}}}"
        for candidate, kind in spellings(name):
            if kind in _WHOLE or self._approved(candidate):
                for gene in known_as(candidate, self.resolver):
                    return f"target_map: {{{name}: {gene}}}"
        return ""

    def _combination(self, name: str) -> str:
        """What stands between the parts of `name` where all of them are genes, or ''."""
        for delimiter in dict.fromkeys(re.findall(r"[^0-9A-Za-z]+", name)):
            parts = [part.strip() for part in name.split(delimiter)]
            if all(parts) and all(self._gene_or_guide(part) for part in parts):
                return delimiter
        return ""

    def _gene_or_guide(self, part: str) -> bool:
        def is_gene(text):
            return self._approved(text) or text in self.by_name

        return bool(re.search("[A-Za-z]", part)) and is_gene(strip_guide(part, is_gene))


def _made_unique_from(name: str, names: set[str], resolver: SymbolResolver) -> str:
    """The name that a tool made `name` of, to tell it from others: `KLF1-1`, `KLF1.1`, `KLF1-1-1`; or ''."""
    while found := _MADE_UNIQUE.fullmatch(name):
        name = found[1]
        if name in names or resolver.readings(name):
            return name
    return ""


def symbol_pattern(column: str) -> str:
    """The regular expression that takes the symbol out of names like `column`, or '' where none is known."""
    if re.match(rf"{_IDENTIFIER}[_|:-]", column):
        return rf"^{_IDENTIFIER}[_|:-](.+)$"
    if re.search(rf"[_|:-]{_IDENTIFIER}$", column):
        return rf"^(.+?)[_|:-]{_IDENTIFIER}$"
    found = re.match(r"[0-9A-Za-z]+[_\-.: ]+", column)
    return f"^{re.escape(found[0])}(.+)$" if found else ""
