"""Where things lie: entries of datasets and checkpoints, and their files in local folders, in the cache or by download.

A name stands for one checkpoint: files with other checksums are an error, and so is a checkpoint that cannot be found.
No other one is taken in its place.
"""

import importlib.util
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..files.atomic import disk_full, replacing, reporting_full
from ..files.downloads import (
    ChecksumError,
    download,
    expect_sha256,
    extract,
    read_record,
    record_path,
    sha256_of,
    write_record,
)
from ..files.names import nearest
from ..files.places import CHECKOUT, RESOURCES

_Kind = TypeVar("_Kind")


class EntryError(ValueError):
    """An entry that cannot be used as it is written."""


class UnknownDataset(ValueError):
    """No entry has the name that was asked for."""


class DataNotFound(FileNotFoundError):
    """A dataset's file is not on this machine and cannot be downloaded."""


class CheckpointNotFound(FileNotFoundError):
    """A checkpoint is not on this machine and cannot be downloaded."""


# Types of an entry's values. A validator raises ValueError(what it expects, what else to say of the value), and takes
# its own results and the defaults, since `dataclasses.replace` checks again.


def _check_text(value: object, expected: str = "text", pattern: str = r".*\S.*") -> str | None:
    if value is None or (isinstance(value, str) and re.fullmatch(pattern, value, re.DOTALL)):
        return value
    raise ValueError(expected, "; put quotes around it" if isinstance(value, bool | int | float) else "")


def _text(expected: str, pattern: str) -> Any:
    """Type of text that matches a pattern, or None."""
    return Annotated[str | None, PlainValidator(lambda value: _check_text(value, expected, pattern))]


def _check_names(value: object, expected: str = "") -> tuple[str, ...]:
    """A list of names; numbers in it are taken as they are written."""
    if isinstance(value, list | tuple) and (value or value == ()):
        if all(isinstance(name, str | int | float) and not isinstance(name, bool) for name in value):
            return tuple(map(str, value))
    raise ValueError(f"{expected}a list of names, as [a, b]")


def _check_genes(value: object) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and (value or value == ()):
        if all(isinstance(gene, str) and gene.strip() for gene in value):
            return tuple(gene.strip() for gene in value)
    raise ValueError("a list of gene symbols")


def _check_map(value: object) -> dict[str, str] | str:
    if value == "nearest":
        return value
    if isinstance(value, Mapping) and all(isinstance(v, str) and v.strip() for v in value.values()):
        return {str(key).strip(): v.strip() for key, v in value.items()}
    raise ValueError("a mapping of labels or targets to symbols, or 'nearest'")


def _check_controls(value: object) -> tuple[str, ...] | str | None:
    return _check_names(value) if isinstance(value, list | tuple) else _check_text(value)


def _check_unmeasured(value: object) -> tuple[str, ...] | str | None:
    return value if value in (None, "accept") else _check_names(value, "'accept' or ")


def _groups(pattern: str, expected: str) -> int:
    """How many groups a regular expression has."""
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(expected, f": {error}") from None


def _check_strip(value: object) -> bool | str:
    if not isinstance(value, bool | str):
        raise ValueError("true, false or a regular expression")
    if isinstance(value, str):
        _groups(value, "a regular expression")
    return value


def _check_one_group(value: object) -> str | None:
    expected = "a regular expression with one group (...)"
    found = 1 if _check_text(value, expected) is None else _groups(value, expected)
    if found != 1:
        raise ValueError(expected, f" with {found}")
    return value


Text = Annotated[str | None, PlainValidator(_check_text)]
Sha256 = _text("64 hexadecimal digits", "[0-9a-fA-F]{64}")
_Url = _text("http(s)://host/...", r"https?://[^/\s]+/.*")
_Inside = _text("a relative path within the zip", r"(?!/)(?!(.*/)?\.\.(/|$))[^\\]+")
_Folder = _text("package/folder", r"\w+/(?!(.*/)?\.\.(/|$)).+")
_FileName = _text("the bare name of a file", r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_Names = Annotated[tuple[str, ...], PlainValidator(_check_names)]
_Genes = Annotated[tuple[str, ...], PlainValidator(_check_genes)]
_Controls = Annotated[str | tuple[str, ...] | None, PlainValidator(_check_controls)]
_Unmeasured = Annotated[str | tuple[str, ...] | None, PlainValidator(_check_unmeasured)]
_Strip = Annotated[bool | str, PlainValidator(_check_strip)]
_OneGroup = Annotated[str | None, PlainValidator(_check_one_group)]
_Mapping = Annotated[dict[Any, Any], Field(description="a mapping")]


@dataclass(frozen=True)
class Entry:
    """One dataset, as its YAML entry describes it, checked; the top of `params/datasets.yaml` explains each key.

    It has one source: a file (`path`, `url`), a `package_file`, or `simulate`. Lists are tuples here.
    """

    name: str
    path: Text = None
    url: _Url = None
    sha256: Sha256 = None
    archive_member: _Inside = None
    package_file: Text = None
    simulate: Annotated[dict[Any, Any] | None, Field(description="a mapping ({} for defaults)")] = None
    condition_key: Text = None
    control_label: _Controls = None
    drop_labels: _Names = ()
    target_map: Annotated[dict[str, str] | str, PlainValidator(_check_map)] = field(default_factory=dict)
    strip_guide_suffix: _Strip = False
    unmeasured_targets: _Unmeasured = None
    batch_key: Text = None
    guide_key: Text = None
    total_key: Text = None
    subset: _Mapping = field(default_factory=dict)
    counts_layer: Text = None
    modality: Text = None
    combo_delimiter: Text = "+"
    min_cells: Annotated[int, Field(strict=True, ge=1, description="a whole number of at least 1")] = 20
    duplicate_genes: Literal["sum", "refuse"] = "sum"
    extra_masked_genes: Annotated[dict[Any, _Genes], Field(description="a mapping")] = field(
        default_factory=dict
    )
    accepted_columns: _Genes = ()
    gene_symbol_key: Text = None
    gene_symbol_pattern: _OneGroup = None
    keep_columns: _Names = ()
    drop_columns: _Names = ()
    scaled_counts: Literal["accept"] | None = None
    citation: Text = None
    license: Text = None

    @property
    def simulated(self) -> bool:
        return self.simulate is not None

    @property
    def effects(self) -> str | None:
        """The layer that holds effects of conditions, where the dataset has those in place of cells."""
        keyword, _, layer = (self.counts_layer or "").partition(":")
        return (layer or "X") if keyword == "effects" else None


@dataclass(frozen=True)
class Pretrained:
    """One checkpoint, as its YAML entry describes it.

    Attributes
    ----------
    name : str
        Also the name of its local directory.
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
    files: Annotated[dict[_FileName, Sha256], Field(description="a mapping of file names to sha256")] = field(
        default_factory=dict
    )
    published: Text = None
    url: _Url = None
    package: _Folder = None
    citation: Text = None
    license: Text = None


def checked_entry(kind: type[_Kind], content: Any, *, where: str, nullable: tuple[str, ...] = ()) -> _Kind:
    """An entry of YAML as the pydantic dataclass `kind`; a key left blank counts as not given, unless `nullable`.

    Raises
    ------
    EntryError
        Names `where`, the entry and the key, what was expected and what was found.
    """
    if not isinstance(content, Mapping):
        raise EntryError(f"{where}: expected a mapping of keys to values, got {type(content).__name__}")
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or name == "auto":
        raise EntryError(f"{where}: name: expected letters, digits, _ - . (and not 'auto'), got {name!r}")
    where = f"{where}: entry {name!r}"
    known = [each.name for each in fields(kind)]
    for key in content:
        if key not in known:
            raise EntryError(f"{where}: unknown key {key!r}; {nearest(str(key), known)}")
    given = {key: value for key, value in content.items() if value is not None or key in nullable}
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        found = error.errors()[0]
    key, *inside = (part for part in found["loc"] if part != "[key]")
    if found["type"] == "missing":
        raise EntryError(f"{where}: missing key {key!r}")
    if found["type"] == "value_error":
        expected, hint = (*found["ctx"]["error"].args, "")[:2]
    else:
        known = kind.__pydantic_fields__[key].description
        expected, hint = known or found["ctx"]["expected"], ""
    if hint.endswith("quotes around it"):
        hint += f': {key}: "{found["input"]}"'
    place = ": ".join([key, *map(repr, inside)])
    raise EntryError(f"{where}: {place}: expected {expected}, got {found['input']!r}{hint}")


def read_registry(path: Path, make: Callable[..., _Kind]) -> dict[str, _Kind]:
    """Entries of a YAML list by name; `make(content, where=...)` checks one.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    EntryError
        It is not a list, or two entries share a name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a YAML file with a list of entries at {path}, found none")
    content = read_yaml(path)
    if not isinstance(content, list):
        raise EntryError(f"{path}: expected a list of entries, got {type(content).__name__}")
    entries: dict[str, Any] = {}
    for number, item in enumerate(content, start=1):
        entry = make(item, where=f"{path}, number {number}")
        if entry.name in entries:
            raise EntryError(f"{path}: two entries are named {entry.name!r}")
        entries[entry.name] = entry
    return entries


def default_registry(file: str = "datasets.yaml") -> Path:
    """Path of a registry that comes with perturbret: a file of `params/`. FileNotFoundError where it is not there."""
    for path in (CHECKOUT / "params" / file, RESOURCES / file):
        if path.is_file():
            return path
    raise FileNotFoundError(f"expected the registry at {CHECKOUT / 'params' / file}")


def load_registry(path: str | Path | None = None) -> dict[str, Entry]:
    """All datasets of a registry file by name, `params/datasets.yaml` by default; errors as `read_registry`.

    Examples
    --------
    >>> "simulated" in load_registry()
    True
    """
    return read_registry(default_registry() if path is None else Path(path), make_entry)


def read_entry(path: str | Path) -> Entry:
    """The one entry in a user's YAML file; a relative `path` in it may lie beside the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    EntryError
        It is not YAML, or not an entry.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset {str(path)!r}: expected a YAML file with one entry, found no file there"
        )
    content = read_yaml(path)
    if isinstance(content, Mapping) and isinstance(content.get("path"), str):
        local = Path(content["path"]).expanduser()
        beside = path.resolve().parent / local  # an absolute path stays as it is
        content = {**content, "path": str(beside) if beside.exists() else str(local)}
    return make_entry(content, where=str(path))


def make_entry(content: Mapping[str, Any], *, where: str = "entry") -> Entry:
    """Check one dataset's entry as it comes out of YAML; EntryError as `checked_entry`.

    Examples
    --------
    >>> content = {"name": "mine", "path": "mine.h5ad", "condition_key": "gene", "control_label": "NT"}
    >>> make_entry(content).min_cells
    20
    >>> make_entry({**content, "simulate": {}})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    perturbret.data.sources.EntryError: entry: entry 'mine': expected one source (...), got file and simulate
    """
    entry = checked_entry(Entry, content, where=where, nullable=("control_label", "combo_delimiter"))
    where = f"{where}: entry {entry.name!r}"
    sources = {
        "file": entry.path or entry.url,
        "package_file": entry.package_file,
        "simulate": entry.simulate,
    }
    given = [source for source, value in sources.items() if value is not None]
    if len(given) != 1:
        expected = "path and/or url, package_file, or simulate"
        raise EntryError(f"{where}: expected one source ({expected}), got {' and '.join(given) or 'none'}")
    if entry.simulated:
        used = {"name", "simulate", "citation", "license", "accepted_columns"}
        useless = sorted(key for key in set(content) - used if content[key] is not None)
        if useless:
            raise EntryError(f"{where}: a simulated dataset has no use for {', '.join(useless)}")
    elif entry.effects:
        of_cells = ("batch_key", "guide_key", "total_key", "scaled_counts", "min_cells")
        useless = [key for key in of_cells if content.get(key) is not None]
        if useless:
            raise EntryError(f"{where}: effects have no cells, and no use for {', '.join(useless)}")
    elif entry.condition_key is None:
        raise EntryError(f"{where}: missing key 'condition_key'")
    elif "control_label" not in content:
        raise EntryError(f"{where}: missing key 'control_label' (null when the source has no controls)")
    return entry


def find_entry(name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry called `name`.

    Raises
    ------
    UnknownDataset
        Names the nearest known names.

    Examples
    --------
    >>> entries = {"mine": make_entry({"name": "mine", "simulate": {}})}
    >>> find_entry("mine", entries).simulated
    True
    >>> find_entry("mime", entries)
    Traceback (most recent call last):
        ...
    perturbret.data.sources.UnknownDataset: dataset 'mime' is unknown; nearest: 'mine'; known: 'auto', 'mine'
    """
    if name not in entries:
        hint = (
            "; to use a file of your own, describe it in a YAML file and give its path" if "." in name else ""
        )
        raise UnknownDataset(f"dataset {name!r} is unknown; {nearest(name, [*entries, 'auto'])}{hint}")
    return entries[name]


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises
    ------
    EntryError
        It is not YAML, or gives a key twice.
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


def cache_directory(cache: str | Path | None = None) -> Path:
    """`cache`, else PERTURBRET_CACHE, else the operating system's cache folder for perturbret."""
    chosen = cache or os.environ.get("PERTURBRET_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("perturbret")


def data_directory(variable: str = "PERTURBRET_DATA") -> Path | None:
    """The directory that an environment variable names, or None where it is unset or empty.

    Raises
    ------
    NotADirectoryError
        The variable names something else.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).expanduser()
    if not path.is_dir():
        raise NotADirectoryError(f"{variable}: expected a directory, got {value!r}")
    return path


def local_places(*names: str, package: str | None = None) -> list[Path]:
    """Where on this machine something may lie, the first first; the cache left out.

    Parameters
    ----------
    names : str
        Paths: absolute, or within PERTURBRET_DATA.
    package : str, optional
        Path within an installed package, as `package/folder/file`.
    """
    data = data_directory()
    paths = [Path(name).expanduser() for name in names]
    places = [(data or Path()) / path for path in paths if data is not None or path.is_absolute()]
    if package:
        top, _, inside = package.partition("/")
        # find_spec does not run the package (importing scanpy takes seconds).
        spec = importlib.util.find_spec(top)
        places += [Path(folder) / inside for folder in (spec and spec.submodule_search_locations) or ()]
    return places


def locate(entry: Entry, *, cache: str | Path | None = None) -> Path | None:
    """The entry's file, or directory, where it is on this machine already, its checksum verified; else None.

    Raises
    ------
    DataNotFound
        No installed package has the entry's `package_file`.
    ChecksumError
        A file of the right name has other contents.
    ValueError
        A zip on this machine is damaged or lacks the member.
    NotADirectoryError
        PERTURBRET_DATA names something else.
    """
    places = local_places(*_names(entry), package=entry.package_file)
    for place in places:
        if place.exists():
            return _own(entry, place, cache)
    if entry.package_file:
        package = entry.package_file.partition("/")[0]
        looked = ", ".join(str(place.parent) for place in places)
        found = f"does not ship it (looked in {looked})" if places else "is not installed"
        raise DataNotFound(
            f"dataset {entry.name!r}: expected the file {entry.package_file!r}; {package} {found}"
        )
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
        Not on this machine, and not available from the network.
    DiskFull
        There is no space for it in the cache.
    ChecksumError
        The file on this machine, or the downloaded one, is not the described one.
    ValueError
        What was downloaded is not an h5ad, or not a zip with `archive_member` in it.
    """
    found = locate(entry, cache=cache)
    if found is not None:
        return found
    if entry.url is None:
        raise _data_not_found(entry, cache, "it has no address to download it from")
    return _download(
        entry.url,
        _cached_path(entry, cache),
        lambda reason: _data_not_found(entry, cache, reason),
        label=entry.name,
        sha256=entry.sha256,
        archive_member=entry.archive_member,
        timeout=timeout,
        progress=progress,
    )


def _download(url: str, target: Path, not_found: Callable[[str], Exception], **options) -> Path:
    """Download to `target`; a failure of the network is raised as `not_found(reason)`."""
    try:
        with reporting_full(target):
            download(url, target, **options)
    except OSError as error:
        if disk_full(error):
            raise
        raise not_found(f"{url} could not be downloaded ({type(error).__name__}: {error})") from error
    return target


def _names(entry: Entry) -> list[str]:
    """Names under which the entry's file may lie in a data directory; none of a package's file."""
    if entry.package_file:
        return []
    name = entry.path or unquote(Path(urlsplit(entry.url).path).name)
    # A bare member name (`perturb_processed.h5ad`) is common to many zips; with its folder it is not.
    nested = (
        entry.archive_member and "/" in entry.archive_member and not Path(name).expanduser().is_absolute()
    )
    return [name, entry.archive_member] if nested else [name]


def _cached_path(entry: Entry, cache: str | Path | None) -> Path:
    name = Path(_names(entry)[0]).name
    if entry.archive_member and not name.endswith(".h5ad"):
        name = Path(entry.archive_member).name
    return cache_directory(cache) / entry.name / name


def _own(entry: Entry, path: Path, cache: str | Path | None) -> Path:
    """A file that is on this machine; where it is a zip, its member, extracted into the cache."""
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
        origin = {"archive": str(path), "archive_member": entry.archive_member}
        write_record(target, temporary, **origin, archive_sha256=sha256_of(path))
    return target


def _verified(entry: Entry, path: Path) -> Path:
    """A cached file that is what its record says; one that somebody put there is recorded as it is now."""
    record = read_record(path) or write_record(path, path, url=entry.url)
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


def _data_not_found(entry: Entry, cache: str | Path | None, reason: str) -> DataNotFound:
    names = _names(entry)
    if Path(names[0]).is_absolute():
        return DataNotFound(
            f"dataset {entry.name!r}: expected a file at {names[0]}, found none, and {reason}"
        )
    data = os.environ.get("PERTURBRET_DATA") or "unset"
    address = f" (its address: {entry.url})" if entry.url else ""
    return DataNotFound(
        f"dataset {entry.name!r}: the file {' or '.join(map(repr, names))} is neither in PERTURBRET_DATA "
        f"({data}) nor in the cache ({_cached_path(entry, cache).parent}), and {reason}. Two ways out: put "
        f"{names[0]!r} into a directory and set PERTURBRET_DATA to it{address}, or use simulated cells: "
        "DATASET=simulated"
    )


def load_checkpoint_registry(path: str | os.PathLike | None = None) -> dict[str, Pretrained]:
    """All checkpoints of a registry file by name, `params/checkpoints.yaml` by default; errors as `read_registry`."""
    return read_registry(
        default_registry("checkpoints.yaml") if path is None else Path(path), _make_checkpoint
    )


def _make_checkpoint(content: Any, *, where: str) -> Pretrained:
    entry = checked_entry(Pretrained, content, where=where)
    # What is downloaded unseen has to be known; a directory that a person placed may be taken on trust.
    if entry.url is not None and (not entry.files or None in entry.files.values()):
        raise EntryError(
            f"{where}: entry {entry.name!r}: url: expected a sha256 for each of its files, got {entry.files}"
        )
    return entry


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
        There is no such directory or name, the named checkpoint cannot be downloaded, or its directory lacks a file.
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
    own = data_directory("PERTURBRET_CHECKPOINTS")
    places = local_places(f"checkpoints/{entry.name}", package=entry.package)
    places = [*([own / entry.name] if own else []), *places]
    for place in places:
        if place.is_dir():
            return _whole(entry, place)
    if entry.url is None:
        raise _checkpoint_not_found(entry, places, "its entry has no address to download it from")
    cached = cache_directory(cache) / "checkpoints" / entry.name
    places.append(cached)
    if not fetch and not cached.is_dir():
        raise _checkpoint_not_found(entry, places, "it was not to be downloaded")
    for file, sha256 in entry.files.items() if fetch else ():
        if not (cached / file).is_file():
            _download(
                f"{entry.url.rstrip('/')}/{file}",
                cached / file,
                lambda reason: _checkpoint_not_found(entry, places, reason),
                label=entry.name,
                sha256=sha256,
                h5ad=False,
                timeout=timeout,
                progress=progress,
            )
    return _whole(entry, cached)


def _whole(entry: Pretrained, directory: Path) -> Path:
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


def _checkpoint_not_found(entry: Pretrained, places: list[Path], reason: str) -> CheckpointNotFound:
    listed = ", ".join(map(str, places)) or "nowhere: PERTURBRET_CHECKPOINTS and PERTURBRET_DATA are unset"
    return CheckpointNotFound(
        f"checkpoint {entry.name!r}: expected a directory with {', '.join(entry.files) or 'its files'}, found none "
        f"(looked in: {listed}), and {reason}. {_sources(entry)}; put the files into <folder>/{entry.name} and set "
        "PERTURBRET_CHECKPOINTS to <folder>. No other checkpoint is taken in its place"
    )


def _sources(entry: Pretrained) -> str:
    known = [address for address in (entry.published, entry.url, entry.package) if address]
    return (
        f"it can be had from {' or '.join(known)}" if known else "its entry does not say where it can be had"
    )
