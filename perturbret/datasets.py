"""A dataset's name or YAML file -> Screen."""

import inspect
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .annotations import ScreenError
from .download import ChecksumError
from .fetch import DataNotFound, fetch, locate
from .h5ad import Source, from_anndata, open_source
from .ingest import ingest
from .registry import Entry, EntryError, find_entry, load_registry, nearest, read_entry
from .screen import Screen

AUTO = ("norman_subset", "simulated")

# Seconds that `auto` gives the network before it takes the simulated screen.
AUTO_SECONDS = 10.0


def resolve_dataset(dataset: str = "auto", *, registry: str | Path | None = None, cache=None) -> Entry:
    """The entry that `dataset` means; reads no cells.

    Parameters
    ----------
    dataset : str
        A name in the registry, the path of a YAML file with one entry, or `auto`: the real `norman_subset`
        where its file is on this machine or comes from the network within `AUTO_SECONDS`, else `simulated`,
        with a warning.
    registry : path, optional
        In place of `params/datasets.yaml`.
    cache : path, optional
        In place of `perturbret.fetch.cache_directory()`.

    Raises
    ------
    UnknownDataset, EntryError, FileNotFoundError
        No such name (the nearest are named), a malformed entry, no such YAML file.
    ChecksumError
        `auto` met a `norman_subset` file on this machine with other contents.
    """
    dataset = str(dataset)
    if dataset.endswith((".yaml", ".yml")):
        return read_entry(dataset)
    entries = load_registry(registry)
    if dataset != "auto":
        return find_entry(dataset, entries)
    real, simulated = (find_entry(name, entries) for name in AUTO)
    if locate(real, cache=cache) is not None:
        return real
    try:
        fetch(real, cache=cache, timeout=AUTO_SECONDS, progress=False)
    except (DataNotFound, ChecksumError, ValueError) as error:
        warnings.warn(f"auto: taking SIMULATED cells, since {error}", stacklevel=2)
        return simulated
    return real


def load_screen(dataset: str | Entry = "auto", *, registry: str | Path | None = None, cache=None) -> Screen:
    """Load a dataset, checked and canonicalised.

    Parameters
    ----------
    dataset : str or Entry
        As for `resolve_dataset`.
    registry, cache : path, optional
        As for `resolve_dataset`.

    Returns
    -------
    Screen
        `audit` tells what was found, merged and dropped; its keys are listed in `perturbret.ingest.ingest`.

    Raises
    ------
    DataNotFound, ChecksumError
        The file cannot be had, or is another one.
    ScreenError, CountsError, ValueError
        The file is not what the entry says; see `perturbret.ingest.ingest`.
    """
    entry = (
        dataset if isinstance(dataset, Entry) else resolve_dataset(dataset, registry=registry, cache=cache)
    )
    if entry.simulated:
        return _simulate(entry)
    path = fetch(entry, cache=cache)
    with open_source(path, modality=entry.modality) as source:
        _expect_readable(source, entry, path)
        return ingest(source, entry, file=path)


def screen_from_anndata(adata: Any, entry: Entry) -> Screen:
    """A screen from an AnnData object, in memory or backed; otherwise as `load_screen`."""
    return ingest(from_anndata(adata), entry)


def _expect_readable(source: Source, entry: Entry, path: Path) -> None:
    """Raise where a part that the entry names is among those that could not be read.

    Raises
    ------
    ScreenError
        Names the file, the part, why it cannot be read and the entry's key that asks for it.
    """
    asked = {"subset": list(entry.subset)}
    asked |= {
        field.name: [getattr(entry, field.name)] for field in fields(entry) if field.name.endswith("_key")
    }
    wanted = {
        f"{table}/{column}": key
        for key, columns in asked.items()
        for column in columns
        for table in ("obs", "var", "raw/var")
    }
    layer = (entry.counts_layer or "counts").removeprefix("recover").removeprefix(":") or "X"
    wanted |= dict.fromkeys(
        [layer, f"{layer}/X"] if layer in ("X", "raw") else [f"layers/{layer}"], "counts_layer"
    )
    if entry.counts_layer is None and "counts" not in source.layers:
        wanted["X"] = "counts_layer"
    if not source.matrices and not source.unreadable:
        raise ScreenError(
            f"{entry.name}: counts_layer: {path}: expected values in X, raw or a layer, found none (X is null)"
        )
    for part, reason in source.unreadable.items():
        if part in wanted:
            raise ScreenError(
                f"{entry.name}: {wanted[part]}: {path}: {part} cannot be read ({reason}); repair the file, or name "
                "another part"
            )


def _simulate(entry: Entry) -> Screen:
    from .simulate import simulate_screen

    known = [name for name in inspect.signature(simulate_screen).parameters if name != "name"]
    for key in entry.simulate:
        if key not in known:
            raise EntryError(f"{entry.name}: simulate: unknown key {key!r}; {nearest(str(key), known)}")
    screen = simulate_screen(name=entry.name, **entry.simulate)
    return replace(screen, audit={**screen.audit, "accepted_columns": list(entry.accepted_columns)})
