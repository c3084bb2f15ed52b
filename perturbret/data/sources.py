"""Where things lie: entries of datasets and checkpoints, and their files in local folders, in the cache or by download.

A name stands for one checkpoint. Where its files are named with checksums, others are an error; where it is not to be
had, so is that: no other checkpoint is taken in its place.
"""

import importlib.util
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..files.atomic import disk_full, replacing, reporting_full, write_json
from ..files.downloads import (
    ChecksumError,
    download,
    expect_sha256,
    extract,
    read_record,
    record_path,
    sha256_of,
)
from ..files.names import nearest
from ..files.places import CHECKOUT, RESOURCES

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
        Arguments of `perturbret.data.simulate.simulate_screen`.
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
        (`perturbret.evaluation.column_guard`); `*` for all, where labels are no perturbations.
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
    for path in (CHECKOUT / "params" / file, RESOURCES / file):
        if path.is_file():
            return path
    raise FileNotFoundError(f"expected the registry at {CHECKOUT / 'params' / file}")


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


class DataNotFound(FileNotFoundError):
    """A dataset's file is not on this machine and cannot be downloaded."""


def cache_directory(cache: str | Path | None = None) -> Path:
    """`cache`, else PERTURBRET_CACHE, else the operating system's cache folder for perturbret."""
    chosen = cache or os.environ.get("PERTURBRET_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("perturbret")


def data_directory() -> Path | None:
    """The directory that PERTURBRET_DATA names, or None where it is unset or empty.

    Raises
    ------
    NotADirectoryError
        The variable names something else.
    """
    value = os.environ.get("PERTURBRET_DATA")
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_dir():
        raise NotADirectoryError(f"PERTURBRET_DATA: expected a directory, got {value!r}, which is none")
    return path


def locate(entry: Entry, *, cache: str | Path | None = None) -> Path | None:
    """The entry's file, or directory, where it is on this machine already, its checksum verified; else None.

    Raises
    ------
    ChecksumError
        A file of the right name has other contents.
    ValueError
        A zip on this machine is damaged or lacks the member.
    NotADirectoryError
        PERTURBRET_DATA is no directory.
    """
    if entry.package_file:
        return _package_file(entry)
    local = None if entry.path is None else Path(entry.path).expanduser()
    if local is not None and local.is_absolute():
        places = [local]
    else:
        data = data_directory()
        places = [] if data is None else [data / name for name in _names(entry)]
    for place in places:
        if place.exists():
            return _own(entry, place, cache)
    cached = _cached_path(entry, cache)
    return _verified(entry, cached) if cached.is_file() else None


def fetch(
    entry: Entry, *, cache: str | Path | None = None, timeout: float | None = None, progress: bool = True
) -> Path:
    """The entry's file, downloaded where it is not on this machine.

    Parameters
    ----------
    entry : Entry
    cache : path, optional
        In place of `cache_directory()`.
    timeout : float, optional
        Seconds for the whole download; none by default (30 s of silence end it).
    progress : bool, default True
        Show a progress bar.

    Returns
    -------
    Path
        Of an h5ad or h5mu, or of a zarr store, which is a directory; its content is what the
        entry, or the record of the first download, says.

    Raises
    ------
    DataNotFound
        Not on this machine, and not to be had from the network.
    DiskFull
        There is no space for it in the cache.
    ChecksumError
        The file on this machine, or the downloaded one, is not the described one.
    ValueError
        What was downloaded is no h5ad, or no zip with `archive_member` in it.
    """
    found = locate(entry, cache=cache)
    if found is not None:
        return found
    if entry.url is None:
        raise DataNotFound(_not_found(entry, cache, "it has no address to download it from"))
    target = _cached_path(entry, cache)
    try:
        with reporting_full(target):
            download(
                entry.url,
                target,
                label=entry.name,
                sha256=entry.sha256,
                archive_member=entry.archive_member,
                timeout=timeout,
                progress=progress,
            )
    except OSError as error:
        if disk_full(error):
            raise
        reason = f"{entry.url} could not be downloaded ({type(error).__name__}: {error})"
        raise DataNotFound(_not_found(entry, cache, reason)) from error
    return target


def _names(entry: Entry) -> list[str]:
    """Names under which the entry's file may lie in a data directory."""
    names = [entry.path or unquote(Path(urlsplit(entry.url).path).name)]
    # A bare member name (`perturb_processed.h5ad`) is common to many zips; with its folder it is not.
    if entry.archive_member and "/" in entry.archive_member:
        names.append(entry.archive_member)
    return names


def _cached_path(entry: Entry, cache: str | Path | None) -> Path:
    name = Path(_names(entry)[0]).name
    if entry.archive_member and not name.endswith(".h5ad"):
        name = Path(entry.archive_member).name
    return cache_directory(cache) / entry.name / name


def _own(entry: Entry, path: Path, cache: str | Path | None) -> Path:
    """The user's own file; where it is a zip, the member, extracted into the cache."""
    zipped = entry.archive_member is not None and path.is_file() and zipfile.is_zipfile(path)
    if zipped or entry.archive_member is None:
        expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
    if not zipped:
        return path
    target = _cached_path(entry, cache)
    if target.is_file() and read_record(target).get("archive_sha256") == sha256_of(path):
        return _verified(entry, target)
    with replacing(target) as temporary:
        extract(path, entry.archive_member, temporary)
        record = {
            "archive": str(path),
            "archive_member": entry.archive_member,
            "archive_sha256": sha256_of(path),
            "sha256": sha256_of(temporary),
        }
        write_json(record_path(target), record)
    return target


def _verified(entry: Entry, path: Path) -> Path:
    """A cached file that is what its record says; one that somebody put there is recorded as it is now."""
    record = read_record(path)
    if not record:
        record = {"url": entry.url, "sha256": sha256_of(path), "archive_sha256": None}
        write_json(record_path(path), record)
    expect_sha256(path, record["sha256"], f"{entry.name}: sha256 recorded when it was first fetched")
    if entry.archive_member is None:
        expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
    elif entry.sha256 and record["archive_sha256"] not in (None, entry.sha256.lower()):
        raise ChecksumError(
            f"{entry.name}: sha256 of the zip: expected {entry.sha256.lower()}, got "
            f"{record['archive_sha256']} when {path} was extracted; delete that file and "
            f"{record_path(path).name} to fetch it again"
        )
    return path


def _package_file(entry: Entry) -> Path:
    package, _, inside = entry.package_file.partition("/")
    # find_spec does not run the package (importing scanpy takes seconds).
    spec = importlib.util.find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for path in (Path(folder) / inside for folder in folders):
        if path.is_file():
            expect_sha256(path, entry.sha256, f"{entry.name}: sha256")
            return path
    found = "is not installed" if spec is None else f"does not ship it (looked in {', '.join(folders)})"
    raise DataNotFound(f"dataset {entry.name!r}: expected the file {entry.package_file!r}; {package} {found}")


def _not_found(entry: Entry, cache: str | Path | None, reason: str) -> str:
    names = _names(entry)
    if Path(names[0]).is_absolute():
        return f"dataset {entry.name!r}: expected a file at {names[0]}, found none, and {reason}"
    data = os.environ.get("PERTURBRET_DATA") or "unset"
    address = f" (its address: {entry.url})" if entry.url else ""
    return (
        f"dataset {entry.name!r}: the file {' or '.join(map(repr, names))} is neither in PERTURBRET_DATA "
        f"({data}) nor in the cache ({_cached_path(entry, cache).parent}), and {reason}. Two ways out: put "
        f"{names[0]!r} into a directory and set PERTURBRET_DATA to it{address}, or use simulated cells: "
        "DATASET=simulated"
    )


class CheckpointNotFound(FileNotFoundError):
    """A checkpoint is not on this machine and cannot be downloaded."""


@dataclass(frozen=True)
class Pretrained:
    """One checkpoint, as its YAML entry describes it.

    Attributes
    ----------
    name : str
        Letters, digits, `_`, `-`, `.`; also the name of its local directory.
    files : mapping of str to str or None
        Names of the files that its directory has to hold, with their sha256 (None: not known).
    published : str or None
        Where its authors give it to people.
    url : str or None
        Address that serves each file under its name, at a pinned revision.
    package : str or None
        Directory within an installed package, as `package/folder/folder`.
    citation, license : str or None
    """

    name: str
    files: Mapping[str, str | None] = field(default_factory=dict)
    published: str | None = None
    url: str | None = None
    package: str | None = None
    citation: str | None = None
    license: str | None = None


def load_checkpoint_registry(path: str | os.PathLike | None = None) -> dict[str, Pretrained]:
    """All entries of a registry file (a YAML list of entries), by name; `params/checkpoints.yaml` by default.

    Raises
    ------
    EntryError
        The file is no such list, an entry is malformed, or two share a name.
    """
    path = default_registry("checkpoints.yaml") if path is None else Path(path)
    content = read_yaml(path)
    if not isinstance(content, list):
        raise EntryError(f"{path}: expected a list of entries, got {type(content).__name__}")
    entries: dict[str, Pretrained] = {}
    for item in content:
        entry = _entry(item, str(path))
        if entry.name in entries:
            raise EntryError(f"{path}: two entries are named {entry.name!r}")
        entries[entry.name] = entry
    return entries


def find_checkpoint(
    name_or_path: str | os.PathLike,
    *,
    registry: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    timeout: float | None = None,
    progress: bool = True,
    fetch: bool = True,
) -> Path:
    """Directory of a checkpoint, for `perturbret.scgpt.checkpoint.load_checkpoint`.

    A name of the registry is looked for in `$PERTURBRET_CHECKPOINTS/<name>`, then in
    `$PERTURBRET_DATA/checkpoints/<name>`, then in the package that its entry names; the first of these directories that
    exists is it, and has to be whole. Without any, it is downloaded once into the cache, where its entry has an
    address.

    Parameters
    ----------
    name_or_path : str or path
        A name of the registry, or an existing directory, which is taken as it is. A directory that has the name of an
        entry is given with its folder, as in `./whole-human`.
    registry : path, optional
        In place of `params/checkpoints.yaml`.
    cache : path, optional
        In place of `perturbret.data.sources.cache_directory()`.
    timeout : float, optional
        Seconds for each file; none by default (30 s of silence end it).
    progress : bool, default True
        Show a progress bar.
    fetch : bool, default True
        Download what is not on this machine.

    Raises
    ------
    CheckpointNotFound
        There is no such directory or name; or the named checkpoint is neither on this machine nor to be downloaded; or
        its directory lacks a file.
    ChecksumError
        A file is not the one that the entry describes.
    NotADirectoryError
        PERTURBRET_CHECKPOINTS or PERTURBRET_DATA is set and no directory.
    """
    entries = load_checkpoint_registry(registry)
    asked = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or asked not in entries:
        path = Path(asked).expanduser()
        if path.is_dir():
            return path
        raise CheckpointNotFound(
            f"checkpoint {asked!r}: expected a directory or a name of the registry, found neither; "
            f"{nearest(asked, list(entries))}"
        )
    entry = entries[asked]
    cached = cache_directory(cache) / "checkpoints" / entry.name
    places = _places(entry)
    for place in [place for place in places if place.is_dir()]:
        return _checked(entry, place)
    if entry.url is None:
        raise CheckpointNotFound(
            _checkpoint_not_found(entry, places, "its entry has no address to download it from")
        )
    if not fetch and not cached.is_dir():
        raise CheckpointNotFound(
            _checkpoint_not_found(entry, [*places, cached], "it was not to be downloaded")
        )
    for file, sha256 in entry.files.items() if fetch else ():
        if not (cached / file).is_file():
            address = f"{entry.url.rstrip('/')}/{file}"
            try:
                download(
                    address,
                    cached / file,
                    label=entry.name,
                    sha256=sha256,
                    h5ad=False,
                    timeout=timeout,
                    progress=progress,
                )
            except OSError as error:
                if disk_full(error):
                    raise
                reason = f"{address} could not be downloaded ({type(error).__name__}: {error})"
                raise CheckpointNotFound(_checkpoint_not_found(entry, [*places, cached], reason)) from error
    return _checked(entry, cached)


def _places(entry: Pretrained) -> list[Path]:
    """Where the entry's directory may be on this machine, the first first; the cache left out."""
    places = []
    value = os.environ.get("PERTURBRET_CHECKPOINTS")
    if value:
        own = Path(value).expanduser()
        if not own.is_dir():
            raise NotADirectoryError(
                f"PERTURBRET_CHECKPOINTS: expected a directory, got {value!r}, which is none"
            )
        places.append(own / entry.name)
    data = data_directory()
    if data is not None:
        places.append(data / "checkpoints" / entry.name)
    if entry.package:
        package, _, inside = entry.package.partition("/")
        # find_spec does not run the package.
        spec = importlib.util.find_spec(package)
        folders = [] if spec is None else list(spec.submodule_search_locations or [])
        places += [Path(folder) / inside for folder in folders]
    return places


def _checked(entry: Pretrained, directory: Path) -> Path:
    """The directory, with every file of the entry in it."""
    for file, sha256 in entry.files.items():
        if not (directory / file).is_file():
            raise CheckpointNotFound(
                f"checkpoint {entry.name!r}: expected {', '.join(entry.files)} in {directory}, found no {file}; "
                f"{_sources(entry)}. No other checkpoint is taken in its place: give the path of a directory to use "
                "that one"
            )
        expect_sha256(directory / file, sha256, f"checkpoint {entry.name!r}: sha256 of {file}")
    return directory


def _checkpoint_not_found(entry: Pretrained, places: list[Path], reason: str) -> str:
    listed = ", ".join(map(str, places)) or "nowhere: PERTURBRET_CHECKPOINTS and PERTURBRET_DATA are unset"
    return (
        f"checkpoint {entry.name!r}: expected a directory with {', '.join(entry.files) or 'its files'}, found none "
        f"(looked in: {listed}), and {reason}. {_sources(entry)}; put the files into <folder>/{entry.name} and set "
        "PERTURBRET_CHECKPOINTS to <folder>. No other checkpoint is taken in its place"
    )


def _sources(entry: Pretrained) -> str:
    known = [address for address in (entry.published, entry.url, entry.package) if address]
    return (
        f"it can be had from {' or '.join(known)}" if known else "its entry does not say where it can be had"
    )


def _entry(content: Any, where: str) -> Pretrained:
    """Check one entry as it comes out of YAML."""
    if not isinstance(content, Mapping):
        raise EntryError(f"{where}: expected a mapping of keys to values, got {type(content).__name__}")
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise EntryError(f"{where}: name: expected letters, digits, _ - . , got {name!r}")
    where = f"{where}: entry {name!r}"
    known = [key.name for key in fields(Pretrained)]
    for key, value in content.items():
        if key not in known:
            raise EntryError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
        if key != "files" and (not isinstance(value, str) or not value.strip()):
            raise EntryError(f"{where}: {key}: expected text, got {value!r}")
    files = content.get("files", {})
    if not isinstance(files, Mapping):
        raise EntryError(f"{where}: files: expected a mapping of file names to sha256, got {files!r}")
    for file, sha256 in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", file):
            raise EntryError(f"{where}: files: expected the bare name of a file, got {file!r}")
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", str(sha256)):
            raise EntryError(
                f"{where}: files: {file}: sha256: expected 64 hexadecimal digits, got {sha256!r}"
            )
    url, package = content.get("url"), content.get("package")
    if url is not None and not re.match(r"https?://[^/\s]+/", url):
        raise EntryError(f"{where}: url: expected http(s)://host/..., got {url!r}")
    # What is downloaded unseen has to be known; a directory that a person placed may be taken on trust.
    if url is not None and (not files or None in files.values()):
        raise EntryError(f"{where}: url: expected a sha256 for each of its files, got {dict(files)}")
    if package is not None and (".." in package.split("/") or not re.match(r"\w+/.", package)):
        raise EntryError(f"{where}: package: expected package/folder, got {package!r}")
    return Pretrained(**content)
