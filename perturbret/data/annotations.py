"""What obs and var say, checked against a dataset entry: labels, controls, genes, columns that are not genes."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ..files.names import nearest
from .conditions import CTRL, JOIN, canonical_condition, control_names, targets
from .genes import (
    GUIDE_ENDING,
    GUIDE_START,
    SymbolResolver,
    is_ensembl_id,
    known_as,
    strip_guide,
    strip_version,
    tidy,
)
from .sources import Entry

_TYPE_COLUMNS = ("feature_types", "feature_type", "features_type")
# As 10x, and converters of its files, name expression.
_EXPRESSION = {"geneexpression", "gene", "genes", "gex", "rna", "mrna", "expression"}
# Parts of names that vectors, guides, barcodes and antibodies have.
_CONSTRUCTS = set(
    "sgrna grna guide guides guiderna crispr crispra crispri barcode barcodes featurebarcode hashtag hto adt "
    "totalseq cmo multiseq cas9 dcas9 spcas9 cas12a cas13d cpf1 krab vpr vp64 gfp egfp mgfp bfp tagbfp tagbfp2 rfp "
    "tagrfp mcherry tdtomato dsred mscarlet mkate2 yfp eyfp cfp venus citrine zsgreen mneongreen puro puror "
    "puromycin blasticidin bsdr hygro hygror neor zeor vector plasmid lenti lentivirus lentiguide lenticas9 "
    "transgene wpre sv40 luc2 luciferase lacz rtta tta tetr".split()
)
_GUIDE = re.compile(
    r"(?i).+[_\-.: |](?:sg|grna|sgrna|crrna|guide)(?:[_\-. ]?\d+)?$|.+[_\-.: |][ACGT]{17,23}$"
)
_GUIDE_OF_GENE = re.compile(r"(?i)(.+)[_\-.: |](?:g\d+|(?:P\d)+)$")


def columns_left_out(
    symbols: Sequence[str],
    var: pd.DataFrame,
    *,
    resolver: SymbolResolver,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> dict[int, str]:
    """Positions of columns that are not genes, and why.

    By `feature_types` of var, where the file has it; by name, where no gene has the name as its approved symbol.

    Parameters
    ----------
    symbols : sequence of str, length n
    var : DataFrame, n rows
    resolver : SymbolResolver
    keep, drop : sequence of str
        Symbols or names of var's rows that are genes, or are not, whatever they look like.
    """
    types, found = _other_types(var), {}
    for position, (symbol, name) in enumerate(zip(map(str, symbols), map(str, var.index), strict=True)):
        if {symbol, name} & set(drop):
            found[position] = "drop_columns of the dataset's entry"
        elif not {symbol, name} & set(keep):
            known = position in types
            found[position] = f"feature type {types[position]}" if known else why_no_gene(symbol, resolver)
    return {position: reason for position, reason in found.items() if reason}


def why_no_gene(name: str, resolver: SymbolResolver) -> str:
    """Why a column of this name does not belong to a gene, or '' where nothing speaks against it."""
    name = tidy(name)
    if resolver.approved(name):
        return ""
    parts = {part.casefold() for part in re.split(r"[^0-9A-Za-z]+", name) if part}
    if parts & _CONSTRUCTS or re.sub(r"[^0-9a-z]", "", name.casefold()) in _CONSTRUCTS:
        return "name of a guide, barcode, antibody or vector"
    if known_as(name, resolver):
        return ""
    of_gene = _GUIDE_OF_GENE.fullmatch(name)
    start = GUIDE_START.sub("", name)
    bare = [] if start == name else [start, GUIDE_ENDING.sub("", start)]
    if _GUIDE.fullmatch(name) or any(
        known_as(text, resolver) for text in [*bare, *(of_gene.groups() if of_gene else ())]
    ):
        return "name of a guide"
    return "name of a control guide" if is_control_like(name) else ""


def _other_types(var: pd.DataFrame) -> dict[int, str]:
    column = next((name for name in _TYPE_COLUMNS if name in var), None)
    if column is None:
        return {}
    types = var[column].astype(object).where(var[column].notna(), "missing").astype(str).to_numpy()
    expressed = np.array([re.sub(r"[^a-z]", "", kind.casefold()) in _EXPRESSION for kind in types])
    # A column that never says expression says something else, such as the biotype.
    return {int(i): types[i] for i in np.flatnonzero(~expressed)} if expressed.any() else {}


# Whole labels, case ignored, that say that no perturbation was found, or no single one.
_NO_LABEL = set(
    "nan na n/a #n/a none null nil nat <na> <nan> <none> <null> - -- . ? unassigned unassign notassigned unknown "
    "undefined undetermined ambiguous ambig negative multiplet multiplets multiple multi doublet doublets "
    "uncalled nocall noguide nosgrna nogrna noperturbation notdetected unmapped missing blank".split()
)
_CONTROL = re.compile(
    r"(?:neg(?:ative)?|pos(?:itive)?|sg|guide|human|mouse)*(?:ctrl|ctl|ctr|cntrl|control)s?(?:guide|sg|grna|sgrna)*\d*"
    r"|.*non?targett?(?:ing|ed)?.*|.*scramble.*|.*safe(?:harbou?r|target|cutter).*|.*intergenic.*|.*emptyvector.*"
    r"|nt|ntc\d*|nt(?:ctrl|control|sg|guide|grna)?\d+|neg(?:sg|guide)?\d*|scr\d*|aavs1(?:ctrl|control|sg|guide)?\d*"
    r"|g?t?rosa26\d*|ccr5safe\d*|(?:f|r|n)?luc(?:iferase)?\d*|lacz\d*|[em]?(?:gfp|bfp|rfp|yfp)\d*|mcherry\d*|mock"
    r"|untreated|unperturbed|untransduced|nontransduced|uninfected|parental|wt|wildtype|vehicle|dmso|pbs|dummy"
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_ALSO_SAFE_HARBOURS = {"AAVS1"}


@dataclass(frozen=True)
class LabelRules:
    """How a dataset's entry reads labels.

    Attributes
    ----------
    controls : str, sequence of str or None
        What controls are called.
    delimiter : str or None
        As for `perturbret.data.conditions.canonical_condition`.
    target_map : mapping of label or target to what it stands for
    strip : bool or str
        Take guide and promoter endings off targets; a str is the regular expression of what to take off.
    drop : sequence of str
        Raw labels whose cells are left out.
    columns : collection of str
        Names of the screen's columns.
    resolver : SymbolResolver
    """

    controls: str | Sequence[str] | None = None
    delimiter: str | None = JOIN
    target_map: Mapping[str, str] = field(default_factory=dict)
    strip: bool | str = False
    drop: Sequence[str] = ()
    columns: Collection[str] = ()
    resolver: SymbolResolver = field(default_factory=SymbolResolver)

    def read(self, label: object) -> str | None:
        """The condition that `label` names, `ctrl` for controls; None where it names no perturbation.

        Raises
        ------
        ValueError
            As `canonical_condition`.
        """
        text = tidy(label.decode() if isinstance(label, bytes) else label)
        if re.fullmatch(r"\d+\.0", text):
            # A missing value among whole numbers makes all of them fractions.
            text = text.removesuffix(".0")
        if text in self.target_map:
            return canonical_condition(self.target_map[text], control_label=self.controls)
        if self._names_control(text):
            return CTRL
        if self._names_nothing(text):
            return None
        if self.delimiter is None:
            return canonical_condition(text, control_label=self.controls, delimiter=None)
        parts = self._parts(text)
        if any(self._names_nothing(part) for part in parts if part):
            return None
        read = [self._target(part) for part in parts]
        # Empty parts are left in, for the error that names their position.
        return canonical_condition(JOIN.join(read), control_label=self.controls)

    def dropped(self, label: object) -> bool:
        """Whether the entry leaves cells of this label out by name."""
        return str(label) in self.drop or tidy(label) in self.drop

    def is_gene(self, name: str) -> bool:
        """Whether `name` is an approved symbol or a column of the screen."""
        return self.resolver.approved(name) or name in self.columns

    def _is_name(self, name: str) -> bool:
        """Whether a gene has or had this name, in whatever case."""
        return name in self.columns or bool(known_as(name, self.resolver))

    def _names_control(self, text: str) -> bool:
        return text == CTRL or text.casefold() in {name.casefold() for name in control_names(self.controls)}

    def _names_nothing(self, text: str) -> bool:
        bare = re.sub(r"[\s_-]", "", text.casefold())
        return (not bare or bare in _NO_LABEL or text.casefold() in _NO_LABEL) and not self.is_gene(text)

    def _parts(self, text: str) -> list[str]:
        """Split at the delimiter, but not within a name: `HLA-A` is one gene where combinations are `A-B`."""
        parts = [part.strip() for part in text.split(self.delimiter)]
        if len(parts) == 1 or all(self.is_gene(part) for part in parts):
            return parts
        joined, start = [], 0
        while start < len(parts):
            for stop in range(len(parts), start + 1, -1):
                whole = self.delimiter.join(parts[start:stop])
                if self._is_name(whole) or self._names_control(whole) or whole in self.target_map:
                    break
            else:
                stop, whole = start + 1, parts[start]
            # Behind a gene, what only numbers its guide belongs to it.
            ending = f"_{whole}"
            if self.strip is True and joined and GUIDE_ENDING.fullmatch(ending) and not self._is_name(whole):
                start = stop
                continue
            joined.append(whole)
            start = stop
        return joined

    def stripped(self, part: str) -> str:
        """A target without guide and promoter endings, where the entry asks for that."""
        if self.strip is True and not self._names_control(part):
            return strip_guide(part, self._is_name)
        if isinstance(self.strip, str) and not self._is_name(part):
            return re.sub(self.strip, "", part)
        return part

    def _target(self, part: str) -> str:
        if part in self.target_map:
            return self.target_map[part]
        part = self.stripped(part)
        part = self.target_map.get(part, part)
        return CTRL if self._names_control(part) else part


def is_number(name: str) -> bool:
    """Whether `name` is a bare number, as codes of a factor are."""
    return _NUMBER.fullmatch(name.strip()) is not None


def is_control_like(name: str, is_gene: Callable[[str], bool] = lambda name: False) -> bool:
    """Whether `name` is one that controls are given: NegCtrl1, non-targeting, NT, scramble, AAVS1, ...

    Names of genes are not (WT1, NT5E, CTRL), but for safe harbours, which are cut to perturb nothing.
    """
    if is_gene(name) and name.upper() not in _ALSO_SAFE_HARBOURS:
        return False
    short = GUIDE_ENDING.sub("", GUIDE_START.sub("", tidy(name)))
    return any(_CONTROL.fullmatch(re.sub(r"[^0-9a-z]", "", text.casefold())) for text in (name, short))


class ScreenError(ValueError):
    """A file that does not hold what its dataset entry says, or no screen that can be benchmarked."""


def expect_known(names: Iterable[str], known: Iterable[str], entry: Entry, key: str, what: str) -> None:
    """Raise a ScreenError that names the first of `names` that is not among `known`, and the nearest that are.

    what : what the entry's `key` was expected to name, as `columns of the file`.
    """
    known = set(known)
    for name in names:
        if name not in known:
            raise ScreenError(
                f"{entry.name}: {key}: expected {what}, got {name!r}; {nearest(str(name), sorted(known))}"
            )


def column(table: pd.DataFrame, name: str, key: str, entry: Entry, place: str = "obs") -> pd.Series:
    """The column of obs or var that an entry's `key` names. ScreenError where it is missing."""
    if name not in table:
        raise ScreenError(
            f"{entry.name}: {key}: expected a column {name!r} in {place}; {nearest(name, list(table.columns))}"
        )
    return table[name]


def read_cells(
    obs: pd.DataFrame, entry: Entry, audit: dict, rules: LabelRules
) -> tuple[pd.DataFrame, np.ndarray]:
    """Labels, batches, guides and totals of the cells in the subset that have a label.

    Parameters
    ----------
    obs : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets what `perturbret.data.datasets.ingest` lists of cells as they are read.
    rules : LabelRules

    Returns
    -------
    cells : pandas.DataFrame
        Index: unique cell names. Columns `label` (as in the file), `condition` (canonical), and `batch`, `guide`,
        `total` where the entry names them.
    keep : bool ndarray
        The rows of `obs` that these are.

    Raises
    ------
    ScreenError
        A column is missing or unusable, the subset is empty, cell names repeat, a label that the entry names does
        not occur, labels are numbers.
    ValueError
        A condition names an empty gene.
    """
    keep = np.ones(len(obs), bool)
    for key, value in entry.subset.items():
        values = column(obs, key, "subset", entry)
        wanted = value if isinstance(value, list | tuple) else [value]
        held = values.isin(wanted) | values.astype(str).isin([str(item) for item in wanted])
        if not held.any():
            present = [str(item) for item in values.dropna().unique()]
            raise ScreenError(
                f"{entry.name}: subset: expected cells with obs[{key!r}] == {value!r}, found none; "
                f"{nearest(str(value), present)}"
            )
        keep &= held.to_numpy(bool)
    labels = column(obs, entry.condition_key, "condition_key", entry)
    audit |= {"cells_before": len(obs), "cells_in_subset": int(keep.sum())}
    missing = labels.isna().to_numpy()
    audit["unlabelled_cells"] = int((keep & missing).sum())
    keep &= ~missing
    codes, raw = pd.factorize(labels.astype(object).where(keep, None).to_numpy(), use_na_sentinel=True)
    conditions = _read_labels(raw, np.bincount(codes[codes >= 0], minlength=len(raw)), entry, audit, rules)
    keep &= np.array([*(condition is not None for condition in conditions), False])[codes]
    if not keep.any():
        raise ScreenError(f"{entry.name}: expected cells with a condition, got none of {len(obs)}")

    names = obs.index[keep].astype(str)
    repeated = names[names.duplicated()]
    if len(repeated):
        raise ScreenError(
            f"{entry.name}: expected unique cell names, got {len(repeated)} repeated "
            f"(first {repeated[0]!r}); make them unique (AnnData.obs_names_make_unique)"
        )
    result = pd.DataFrame(
        {
            "label": labels[keep].astype(object).to_numpy(),
            "condition": np.array([*conditions, None], dtype=object)[codes[keep]],
        },
        index=pd.Index(names, name="cell"),
    )
    if entry.batch_key is not None:
        batch = column(obs, entry.batch_key, "batch_key", entry)[keep]
        if batch.isna().any():
            raise ScreenError(
                f"{entry.name}: batch_key: {int(batch.isna().sum())} cells have no {entry.batch_key!r}"
            )
        result["batch"] = _texts(batch)
    if entry.guide_key is not None:
        guide = column(obs, entry.guide_key, "guide_key", entry)[keep]
        audit["unassigned_guides"] = int(guide.isna().sum())
        result["guide"] = np.where(guide.isna(), "unassigned", _texts(guide))
    if entry.total_key is not None:
        total = pd.to_numeric(column(obs, entry.total_key, "total_key", entry)[keep], errors="coerce")
        total = total.to_numpy(np.float64, na_value=np.nan)
        bad = ~(np.isfinite(total) & (total > 0))
        if bad.any():
            raise ScreenError(
                f"{entry.name}: total_key: expected positive numbers in obs[{entry.total_key!r}], "
                f"{int(bad.sum())} cells have none (first {names[bad][0]!r})"
            )
        result["total"] = total
    return result, keep


def _read_labels(raw: np.ndarray, n_cells: np.ndarray, entry: Entry, audit: dict, rules: LabelRules) -> list:
    """The condition of each distinct label; None where it says nothing or the entry drops it."""
    texts = [str(label) for label in raw]
    mapped = entry.target_map if isinstance(entry.target_map, dict) else {}
    parts = {part.strip() for text in texts for part in text.split(entry.combo_delimiter or "\0")}
    seen = {*texts, *map(tidy, texts), *parts}
    known = {re.sub(r"\.0$", "", name) for name in seen}
    what = f"labels of obs[{entry.condition_key!r}]"
    expect_known(entry.drop_labels, seen | known, entry, "drop_labels", what)
    expect_known(mapped, seen | known | {rules.stripped(part) for part in parts}, entry, "target_map", what)
    conditions, nothing, dropped, sizes = [], {}, {}, {}
    for label, text, n in zip(raw, texts, map(int, n_cells), strict=True):
        left_out = rules.dropped(label)
        condition = None if left_out else rules.read(label)
        conditions.append(condition)
        if condition is not None:
            sizes.setdefault(text, [condition, 0])[1] += n
        else:
            (dropped if left_out else nothing)[text] = n
    audit["unlabelled_cells"] += sum(nothing.values())
    audit |= {"unlabelled_labels": nothing, "dropped_labels": dropped}
    audit["suspicious_labels"] = _suspicious(sizes, entry, rules)
    return conditions


def _suspicious(sizes: dict, entry: Entry, rules: LabelRules) -> list[dict]:
    """Labels that may not be what they are read as; refuses those that are hardly a perturbation.

    Raises
    ------
    ScreenError
        Labels are numbers, or name controls that the entry does not.
    """
    accepted = set(entry.unmeasured_targets or ()) - set("accept")
    numbers, controls, rows = [], {}, []
    for text, (condition, n) in sizes.items():
        names = (condition,) if entry.combo_delimiter is None else targets(condition)
        names = [name for name in names if name != CTRL and name not in accepted and text not in accepted]
        why = ""
        if any(is_number(name) for name in names):
            numbers.append(text)
            why = "a number"
        elif entry.combo_delimiter is not None and (
            like := [name for name in names if is_control_like(name, rules.is_gene)]
        ):
            controls[text] = like
        elif set(names) & {"CTRL"}:
            why = "read as the gene CTRL; if it names controls, add it to control_label"
        if why:
            rows.append({"label": text, "condition": condition, "n_cells": n, "why": why})
    key = f"{entry.name}: condition_key: obs[{entry.condition_key!r}]"
    if numbers and entry.combo_delimiter is not None:
        whole = [text for text in numbers if is_number(text)]
        cause = (
            "a converter from R wrote the codes of a factor in place of its names: in R turn the column into text "
            "(as.character) before writing, or state what the numbers stand for: target_map: "
            f"{{{', '.join(f'{text!r}: SYMBOL' for text in whole[:2])}, ...}}"
            if whole
            else "the number is a guide's: set strip_guide_suffix: true; or another combo_delimiter separates genes"
        )
        raise ScreenError(
            f"{key}: expected names of perturbed genes, got numbers in {len(numbers)} of {len(sizes)} labels "
            f"({_listed(numbers)}). Most likely {cause}"
        )
    # Where no control was found, what there is in its place is said elsewhere.
    if controls and (entry.control_label is None or any(read[0] == CTRL for read in sizes.values())):
        named = list(dict.fromkeys([*control_names(entry.control_label), *sum(controls.values(), [])]))
        raise ScreenError(
            f"{key}: {len(controls)} labels look like controls that control_label does not name: "
            f"{_listed(list(controls))}. If they are, set control_label: {named[:20]}"
            f"{' and so on' if len(named) > 20 else ''} (strip_guide_suffix: true takes numbers off them); if their "
            "cells are to be left out, drop_labels: [...]; if they are conditions of their own, unmeasured_targets: "
            "[...] with their names"
        )
    return rows


def _listed(names: list[str], n: int = 10) -> str:
    return ", ".join(map(repr, names[:n])) + (f" and {len(names) - n} more" if len(names) > n else "")


def _texts(column: pd.Series) -> np.ndarray:
    # 1.0 and 1 are one batch, whichever type the file keeps it in.
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    return column.astype(str).to_numpy(object)


@dataclass(frozen=True)
class GeneColumns:
    """The columns of a matrix that are genes.

    Attributes
    ----------
    keep : bool ndarray, shape (n_columns,)
        Which of the file's columns they are.
    symbols : ndarray of str
        Of those; may repeat.
    names : ndarray of str
        Of their rows in var.
    identifiers : list of tuple of str
        Ensembl ids that var gives them.
    """

    keep: np.ndarray
    symbols: np.ndarray
    names: np.ndarray
    identifiers: list[tuple[str, ...]]


def read_genes(var: pd.DataFrame, entry: Entry, audit: dict, resolver: SymbolResolver) -> GeneColumns:
    """Which columns are genes, and their symbols.

    Parameters
    ----------
    var : pandas.DataFrame
        As it stands in the file.
    entry : Entry
    audit : dict
        Gets what `perturbret.data.datasets.ingest` lists of columns, but for `genes_after` and `duplicate_genes`.
    resolver : SymbolResolver

    Raises
    ------
    ScreenError
        No genes, no such column, names that the entry's pattern does not fit, or Ensembl ids where symbols are
        expected and no table knows them.
    """
    raw = var.index.astype(str).to_numpy(object)
    symbols = raw
    if entry.gene_symbol_key is not None:
        found = column(var, entry.gene_symbol_key, "gene_symbol_key", entry, "var")
        symbols = np.where(found.isna(), "", found.astype(str))
    symbols = np.array([tidy(symbol) for symbol in symbols], dtype=object)
    empty = (symbols == "") | (symbols == "nan")
    symbols[empty] = raw[empty]
    if entry.gene_symbol_pattern is not None:
        symbols = _within_names(symbols, entry)
    audit |= {"genes_before": len(raw), "genes_without_symbol": int(empty.sum())}
    if not len(raw):
        raise ScreenError(f"{entry.name}: expected genes, got a file without any")
    for key in ("keep_columns", "drop_columns"):
        expect_known(sorted(getattr(entry, key)), {*symbols, *raw}, entry, key, "columns of the file")
    left_out = columns_left_out(
        symbols, var, resolver=resolver, keep=entry.keep_columns, drop=entry.drop_columns
    )
    audit["columns_left_out"] = {str(symbols[i]): reason for i, reason in sorted(left_out.items())}
    keep = np.ones(len(raw), bool)
    keep[list(left_out)] = False
    if not keep.any():
        raise ScreenError(
            f"{entry.name}: expected genes, got {len(raw)} columns that are not genes ({_listed(list(symbols))}: "
            f"{next(iter(left_out.values()))}); keep_columns lists those that are"
        )
    ids = [np.array([is_ensembl_id(name) for name in map(str, values)]) for values in _texts_of(var)]
    if np.mean([is_ensembl_id(symbol) for symbol in symbols[keep]]) > 0.5:
        texts = [key for key in var if not pd.api.types.is_numeric_dtype(var[key])]
        unread = np.mean([not resolver.readings(symbol) for symbol in symbols[keep]])
        # Without a column of symbols the table's ids have to do, for species that it knows.
        if texts or unread > 0.5:
            raise ScreenError(
                f"{entry.name}: expected gene symbols, got Ensembl ids ({symbols[0]!r}, ...); set gene_symbol_key to "
                f"the column of var that holds symbols (text columns: {', '.join(map(repr, texts)) or 'none'})"
            )
    columns = [values for values, found in zip(_texts_of(var), ids, strict=True) if found.any()]
    identifiers = [
        tuple(strip_version(values[i]) for values in columns if is_ensembl_id(values[i]))
        for i in np.flatnonzero(keep)
    ]
    return GeneColumns(keep, symbols[keep], raw[keep], identifiers)


def _texts_of(var: pd.DataFrame) -> list[list[str]]:
    """The names of var's rows and its columns of text."""
    columns = [var[key] for key in var if not pd.api.types.is_numeric_dtype(var[key])]
    return [list(map(str, var.index)), *(list(map(str, column)) for column in columns)]


def _within_names(symbols: np.ndarray, entry: Entry) -> np.ndarray:
    pattern = re.compile(entry.gene_symbol_pattern)
    found = [pattern.search(symbol) for symbol in symbols]
    if not any(match and match[1] for match in found):
        raise ScreenError(
            f"{entry.name}: gene_symbol_pattern: expected {entry.gene_symbol_pattern!r} in names of columns, found it "
            f"in none ({_listed(list(symbols), 3)})"
        )
    # Names without the pattern keep their own: a spike-in needs no prefix.
    return np.array(
        [match[1] if match and match[1] else symbol for match, symbol in zip(found, symbols, strict=True)],
        dtype=object,
    )
