"""Dataset entries: where a screen lies, what its columns mean, how its counts are read."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_TEXT_KEYS = (
    "path url sha256 archive_member package_file condition_key batch_key guide_key total_key "
    "counts_layer modality combo_delimiter duplicate_genes gene_symbol_key gene_symbol_pattern citation license"
).split()
_NAME_LISTS = ("drop_labels", "keep_columns", "drop_columns")
_NULLABLE = {"control_label", "combo_delimiter"}
_SOURCES = {"file": ("path", "url"), "package_file": ("package_file",), "simulate": ("simulate",)}


class EntryError(ValueError):
    """A dataset entry that cannot be used as it is written."""


class UnknownDataset(ValueError):
    """No entry has the name that was asked for."""


@dataclass(frozen=True)
class Entry:
    """One dataset, as its YAML entry describes it. Has one source: a file, a package's file, or `simulate`.

    Attributes
    ----------
    name : str
        Letters, digits, `_`, `-`, `.`; also the name of the output directory.
    path : str or None
        File name to look for. Absolute, beside the user's YAML file, or in PERTURBRET_DATA and the cache.
    url, sha256 : str or None
        Public address, and checksum of what it serves (of the zip, where `archive_member` is given).
    archive_member : str or None
        Path of the h5ad within a zip.
    package_file : str or None
        File that an installed package ships, as `package/folder/file`.
    simulate : mapping or None
        Arguments of `perturbret.simulate.simulate_screen`.
    condition_key : str or None
        Column of obs with the perturbation of each cell; required unless simulated.
    control_label : str, tuple of str or None
        What the source calls its controls; None (written `null`): it has none.
    drop_labels : tuple of str
        Labels, as they stand in the file, whose cells are left out.
    target_map : mapping of label or target to symbol or column; or "nearest"
        What labels and targets stand for; a label may stand for a combination, written `A+B`. "nearest": every
        target without a column of its own stands for the column of the nearest name.
    strip_guide_suffix : bool or str, default False
        Whether guide and promoter endings are taken off targets (`sgKLF1_1`, `KLF1_P1P2`); a str is the regular
        expression of what to take off. Names of genes (`HLA-A`, `NKX2-1`) are left alone.
    unmeasured_targets : "accept", tuple of str or None
        Targets that have no column, whatever their names resemble; "accept": all without a match.
    batch_key, guide_key, total_key : str or None
        Columns of obs: batch; guide; UMIs of the cell over the whole transcriptome.
    subset : mapping of obs column to value or list of values
        Cells to keep.
    counts_layer : str or None
        A layer's name, `X`, `raw` (raw.X); or `recover`, `recover:raw`, `recover:LAYER` for log1p-normalised
        values of X, raw.X or that layer. None: the layer `counts` where there is one, else X.
    modality : str or None
        Of an h5mu; None: `rna` or `gex`, or the only one that there is.
    combo_delimiter : str or None, default "+"
        Between the genes of a combination. None (`null`): labels are names, such as cell types, not genes.
    min_cells : int, default 20
        Smaller conditions are dropped.
    duplicate_genes : {"sum", "refuse"}
        What happens to columns that share a symbol.
    extra_masked_genes : mapping of condition to tuple of genes
        Masked together with the condition's targets.
    accepted_columns : tuple of str
        Columns that nearly name a condition and are known to be effects of it, no traces of the guide
        (`perturbret.column_guard`); `*` for all, where labels are no perturbations.
    gene_symbol_key : str or None
        Column of var with gene symbols; None: the names of var.
    gene_symbol_pattern : str or None
        Regular expression with one group: the symbol within those names, as `^GRCh38_(.+)$`.
    keep_columns, drop_columns : tuple of str
        Columns that are genes, or are not, whatever their names and feature types say.
    scaled_counts : "accept" or None
        Take whole numbers as counts although they look like normalised counts that were rounded.
    citation, license : str or None
    """

    name: str
    path: str | None = None
    url: str | None = None
    sha256: str | None = None
    archive_member: str | None = None
    package_file: str | None = None
    simulate: Mapping[str, Any] | None = None
    condition_key: str | None = None
    control_label: str | tuple[str, ...] | None = None
    drop_labels: tuple[str, ...] = ()
    target_map: Mapping[str, str] | str = field(default_factory=dict)
    strip_guide_suffix: bool | str = False
    unmeasured_targets: tuple[str, ...] | str | None = None
    batch_key: str | None = None
    guide_key: str | None = None
    total_key: str | None = None
    subset: Mapping[str, Any] = field(default_factory=dict)
    counts_layer: str | None = None
    modality: str | None = None
    combo_delimiter: str | None = "+"
    min_cells: int = 20
    duplicate_genes: str = "sum"
    extra_masked_genes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    accepted_columns: tuple[str, ...] = ()
    gene_symbol_key: str | None = None
    gene_symbol_pattern: str | None = None
    keep_columns: tuple[str, ...] = ()
    drop_columns: tuple[str, ...] = ()
    scaled_counts: str | None = None
    citation: str | None = None
    license: str | None = None

    @property
    def simulated(self) -> bool:
        return self.simulate is not None


def default_registry(file: str = "datasets.yaml") -> Path:
    """Path of a registry that comes with perturbret: a file of `params/`. FileNotFoundError where it is not there."""
    here = Path(__file__).resolve().parent
    for path in (here.parent / "params" / file, here / "data" / file):
        if path.is_file():
            return path
    raise FileNotFoundError(f"expected the registry at {here.parent / 'params' / file}")


def load_registry(path: str | Path | None = None) -> dict[str, Entry]:
    """All entries of a registry file (a YAML list of entries), by name.

    Raises
    ------
    EntryError
        An entry is malformed, or two share a name.
    """
    path = default_registry() if path is None else Path(path)
    content = read_yaml(path)
    if not isinstance(content, list):
        raise EntryError(f"{path}: expected a list of entries, got {type(content).__name__}")
    entries: dict[str, Entry] = {}
    for item in content:
        entry = make_entry(item, where=str(path))
        if entry.name in entries:
            raise EntryError(f"{path}: two entries are named {entry.name!r}")
        entries[entry.name] = entry
    return entries


def read_entry(path: str | Path) -> Entry:
    """The one entry in a user's YAML file; a relative `path` in it may lie beside the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    EntryError
        It is no YAML, or no entry.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset {str(path)!r}: expected a YAML file with one entry, found no file there"
        )
    content = read_yaml(path)
    if isinstance(content, Mapping) and isinstance(content.get("path"), str):
        local = Path(content["path"]).expanduser()
        beside = local if local.is_absolute() else path.resolve().parent / local
        content = {**content, "path": str(beside) if beside.exists() else str(local)}
    return make_entry(content, where=str(path))


def make_entry(content: Mapping[str, Any], *, where: str = "entry") -> Entry:
    """Check one entry as it comes out of YAML.

    Raises
    ------
    EntryError
        Names the file, the entry and the key, what was expected and what was got.
    """
    if not isinstance(content, Mapping):
        raise EntryError(f"{where}: expected a mapping of keys to values, got {type(content).__name__}")
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "auto":
        raise EntryError(f"{where}: name: expected letters, digits, _ - . (and not 'auto'), got {name!r}")
    where = f"{where}: entry {name!r}"
    known = [field.name for field in fields(Entry)]
    for key in content:
        if key not in known:
            raise EntryError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
    values = {key: value for key, value in content.items() if value is not None or key in _NULLABLE}
    for key in _TEXT_KEYS:
        _check_text(where, key, values)
    _check_source(where, values)
    for key in ("subset", "extra_masked_genes"):
        if not isinstance(values.get(key, {}), Mapping):
            raise EntryError(f"{where}: {key}: expected a mapping, got {values[key]!r}")
    min_cells = values.get("min_cells", 1)
    if not isinstance(min_cells, int) or isinstance(min_cells, bool) or min_cells < 1:
        raise EntryError(f"{where}: min_cells: expected a whole number of at least 1, got {min_cells!r}")
    if values.get("duplicate_genes", "sum") not in ("sum", "refuse"):
        raise EntryError(
            f"{where}: duplicate_genes: expected 'sum' or 'refuse', got {values['duplicate_genes']!r}"
        )
    values |= _names_and_maps(where, values)
    values["extra_masked_genes"] = {
        condition: _gene_list(f"{where}: extra_masked_genes: {condition!r}", genes)
        for condition, genes in values.get("extra_masked_genes", {}).items()
    }
    if "accepted_columns" in values:
        values["accepted_columns"] = _gene_list(f"{where}: accepted_columns", values["accepted_columns"])
    return Entry(**values)


def find_entry(name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry called `name`.

    Raises
    ------
    UnknownDataset
        Names the nearest known names.
    """
    if name not in entries:
        hint = (
            "; to use a file of your own, describe it in a YAML file and give its path" if "." in name else ""
        )
        raise UnknownDataset(f"dataset {name!r} is unknown; {nearest(name, [*entries, 'auto'])}{hint}")
    return entries[name]


def nearest(word: str, known: list[str], n: int = 3) -> str:
    """'nearest: a, b' out of `known`, then all known names when none is near or they are few."""
    known = [str(name) for name in known]
    by_case = {name.casefold(): name for name in known}
    close = [by_case[key] for key in difflib.get_close_matches(word.casefold(), by_case, n=n, cutoff=0.5)]
    listed = ", ".join(map(repr, sorted(known)[:40])) + (" ..." if len(known) > 40 else "")
    return (f"nearest: {', '.join(map(repr, close))}; " if close else "") + f"known: {listed}"


def _check_text(where: str, key: str, values: Mapping[str, Any]) -> None:
    if key not in values or (values[key] is None and key in _NULLABLE):
        return
    value = values[key]
    if not isinstance(value, str) or not value.strip():
        quoted = f'; put quotes around it: {key}: "{value}"' if isinstance(value, bool | int | float) else ""
        raise EntryError(f"{where}: {key}: expected text, got {value!r}{quoted}")


def _names_and_maps(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entry's values that are lists of names, maps or patterns, checked and in their final form."""
    found: dict[str, Any] = {}
    for key in _NAME_LISTS:
        if key in values:
            found[key] = _name_list(where, key, values[key])
    control = values.get("control_label")
    if isinstance(control, list | tuple):
        found["control_label"] = _name_list(where, "control_label", control)
    else:
        _check_text(where, "control_label", values)
    unmeasured = values.get("unmeasured_targets")
    if unmeasured is not None and unmeasured != "accept":
        found["unmeasured_targets"] = _name_list(
            where, "unmeasured_targets", unmeasured, also="'accept' or ", example="KLF1"
        )
    mapped = values.get("target_map", {})
    if mapped != "nearest":
        if not isinstance(mapped, Mapping) or not all(
            isinstance(value, str) and value.strip() for value in mapped.values()
        ):
            raise EntryError(
                f"{where}: target_map: expected a mapping of labels or targets to symbols, or 'nearest', got {mapped!r}"
            )
        found["target_map"] = {str(key).strip(): value.strip() for key, value in mapped.items()}
    strip = values.get("strip_guide_suffix", False)
    if not isinstance(strip, bool | str):
        raise EntryError(
            f"{where}: strip_guide_suffix: expected true, false or a regular expression, got {strip!r}"
        )
    for key, groups in (("strip_guide_suffix", None), ("gene_symbol_pattern", 1)):
        if isinstance(values.get(key), str):
            _check_pattern(where, key, values[key], groups)
    if values.get("scaled_counts") not in (None, "accept"):
        raise EntryError(f"{where}: scaled_counts: expected 'accept', got {values['scaled_counts']!r}")
    return found


def _name_list(where: str, key: str, names: object, *, also: str = "", example: str = "a") -> tuple[str, ...]:
    """A list of names; numbers in it are taken as they are written."""
    listed = isinstance(names, list | tuple) and names
    if not listed or not all(
        isinstance(name, str | int | float) and not isinstance(name, bool) for name in names
    ):
        raise EntryError(f"{where}: {key}: expected {also}a list of names, as [{example}, b], got {names!r}")
    return tuple(str(name) for name in names)


def _check_pattern(where: str, key: str, pattern: str, groups: int | None) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise EntryError(f"{where}: {key}: expected a regular expression, got {pattern!r}: {error}") from None
    if groups is not None and compiled.groups != groups:
        raise EntryError(
            f"{where}: {key}: expected a regular expression with one group (...), got {pattern!r} with "
            f"{compiled.groups}"
        )


def _check_source(where: str, values: Mapping[str, Any]) -> None:
    given = [source for source, keys in _SOURCES.items() if any(key in values for key in keys)]
    if len(given) != 1:
        sources = "path and/or url, package_file, or simulate"
        raise EntryError(f"{where}: expected one source ({sources}), got {' and '.join(given) or 'none'}")
    if given == ["simulate"]:
        if not isinstance(values["simulate"], Mapping):
            raise EntryError(
                f"{where}: simulate: expected a mapping ({{}} for defaults), got {values['simulate']!r}"
            )
        useless = sorted(set(values) - {"name", "simulate", "citation", "license", "accepted_columns"})
        if useless:
            raise EntryError(f"{where}: a simulated dataset has no use for {', '.join(useless)}")
        return
    for key in ("condition_key", "control_label"):
        if key not in values:
            null = " (null when the source has no controls)" if key == "control_label" else ""
            raise EntryError(f"{where}: missing key {key!r}{null}")
    url, sha256, member = (values.get(key) for key in ("url", "sha256", "archive_member"))
    if url is not None and not re.match(r"https?://[^/\s]+/", url):
        raise EntryError(f"{where}: url: expected http(s)://host/..., got {url!r}")
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise EntryError(f"{where}: sha256: expected 64 hexadecimal digits, got {sha256!r}")
    if member is not None and (member.startswith("/") or "\\" in member or ".." in member.split("/")):
        raise EntryError(f"{where}: archive_member: expected a relative path within the zip, got {member!r}")


def _gene_list(where: str, genes: object) -> tuple[str, ...]:
    if (
        isinstance(genes, list | tuple)
        and genes
        and all(isinstance(gene, str) and gene.strip() for gene in genes)
    ):
        return tuple(gene.strip() for gene in genes)
    raise EntryError(f"{where}: expected a list of gene symbols, got {genes!r}")


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises
    ------
    EntryError
        It is no YAML, or gives a key twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice; PyYAML would silently keep the last."""

    def mapping(loader, node):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise EntryError(f"{path}: line {node.start_mark.line + 1}: key {key!r} is given twice")
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EntryError(f"{path}: expected YAML, got {error}") from error
