"""Roles of cells: made once from names, labels and a seed, written down, reused by every run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..files.atomic import replacing
from .screen import Screen
from .tracks import ROLES, Labelled, find_track

FRACTIONS = (0.64, 0.16, 0.20)
_METADATA_KEY = b"perturbret_split"


class SplitMismatch(ValueError):
    """A split file does not belong to the data or the settings at hand, or was changed after it was made."""


@dataclass(frozen=True, eq=False)
class Split:
    """Roles of the cells of one screen.

    Attributes
    ----------
    track : str
    seed : int
    roles : pandas.Series
        Index: unique cell names. Values: `train`, `val`, `gallery` or `query`.
    fractions : tuple of float
        Of train, val and query, as they were asked for.
    """

    track: str
    seed: int
    roles: pd.Series
    fractions: tuple[float, float, float]

    def __post_init__(self):
        _require_unique(self.roles.index)
        unknown = sorted(set(self.roles) - set(ROLES))
        if unknown:
            raise ValueError(f"roles: expected only {ROLES}, got {unknown}")

    @property
    def id(self) -> str:
        """Name of the split, e.g. `in_dist-seed0`."""
        return f"{self.track}-seed{self.seed}"

    @cached_property
    def hash(self) -> str:
        """sha256 over track, seed, fractions and every cell's role; the order of cells does not matter."""
        digest = hashlib.sha256(json.dumps([self.track, self.seed, list(self.fractions)]).encode())
        for cell, role in sorted(zip(map(str, self.roles.index), self.roles, strict=True)):
            digest.update(f"\0{cell}\1{role}".encode())
        return digest.hexdigest()


def make_split(
    obs: pd.DataFrame,
    *,
    track: str = "in_dist",
    seed: int,
    fractions: Sequence[float] = FRACTIONS,
    groups: np.ndarray | None = None,
) -> Split:
    """Give every cell a role, as a track of `perturbret.data.tracks` says.

    The query cells are the same for every seed; the seed divides the others. So no query cell of one seed takes
    part in a choice of another, and seeds are repeats of a fit that is judged on the same cells. Cells are drawn by
    hashes of names: roles do not depend on the order of rows, and stay the same across processes and versions of numpy.

    Parameters
    ----------
    obs : DataFrame
        Index: unique cell names. Column `condition`; optionally `batch`, `guide`, and what a track of your own needs.
    track : str
        A name in `perturbret.data.tracks.TRACKS`.
    seed : int
        At least 0.
    fractions : three floats
        Of train, val and query; not negative, train above 0, sum 1. What they are shares of, cells, guides or
        conditions, is the track's to say.
    groups : ndarray of int, shape (n_cells,), optional
        Cells with equal numbers, such as copies of one cell, share one role, whatever their conditions.

    Returns
    -------
    Split
        Its roles in the order of `obs`.

    Raises
    ------
    TrackError
        The screen does not have what the track holds out.
    ValueError
        Unknown track, bad seed or fractions, repeated cell names, no column `condition`, a missing condition,
        batch or guide.

    Examples
    --------
    >>> names = [f"cell{i}" for i in range(100)]
    >>> obs = pd.DataFrame({"condition": ["KLF1", "BAK1"] * 50}, index=names)
    >>> split = make_split(obs, seed=0)
    >>> split.roles.value_counts()[["train", "val", "query"]].tolist()
    [64, 16, 20]
    >>> query = split.roles == "query"
    >>> query.equals(make_split(obs, seed=1).roles == "query")
    True
    """
    chosen = find_track(track)
    seed = _whole(seed)
    fractions = _checked_fractions(fractions)
    _require_unique(obs.index)
    if "condition" not in obs:
        raise ValueError(f"obs: expected a column 'condition', got {list(obs.columns)}")
    roles = chosen.roles(Labelled(obs, groups), seed, fractions)
    return Split(track, seed, pd.Series(roles, index=obs.index, name="role", dtype=object), fractions)


def cells_of_role(role: str, split_id: str, split_hash: str) -> str:
    """How records name the cells of one role of a split."""
    return f"{role} of {split_id} ({split_hash[:12]})"


def get_split(
    screen: Screen, *, track: str = "in_dist", seed: int, directory, fractions: Sequence[float] = FRACTIONS
) -> Split:
    """The split of a screen from its file, which is made where there is none and never overwritten.

    Parameters
    ----------
    screen : Screen
    track, seed, fractions
        As for `make_split`.
    directory : path
        Holds `<track>-seed<seed>.parquet`: columns `cell` and `role`, provenance in the schema's metadata.

    Returns
    -------
    Split
        As read back from the file, in the order of the screen's cells.

    Raises
    ------
    SplitMismatch
        The file cannot be read, or its dataset fingerprint, track, seed, fractions, cells or hash are not
        those expected; names both values.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, n_genes=20, cells_per_condition=10)
    >>> with TemporaryDirectory() as directory:
    ...     first, again = (get_split(screen, seed=0, directory=directory) for _ in range(2))
    >>> first.hash == again.hash
    True
    """
    path = Path(directory) / f"{track}-seed{seed}.parquet"
    if not path.exists():
        split = make_split(screen.obs, track=track, seed=seed, fractions=fractions, groups=screen.duplicates)
        _write(path, split, screen)
    return _read(path, screen, track, _whole(seed), _checked_fractions(fractions))


def recorded_fingerprint(path: Path) -> str:
    """Of the data that a split file was made from; `unreadable` where that cannot be told."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return json.loads(pq.read_schema(path).metadata[_METADATA_KEY])["fingerprint"]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return "unreadable"


def _write(path: Path, split: Split, screen: Screen) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    provenance = {
        "dataset": screen.name,
        "fingerprint": screen.fingerprint,
        "track": split.track,
        "seed": split.seed,
        "fractions": list(split.fractions),
        "n_cells": len(split.roles),
        "hash": split.hash,
    }
    table = pa.table({"cell": [str(cell) for cell in split.roles.index], "role": list(split.roles)})
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_METADATA_KEY: json.dumps(provenance)}), temporary)


def _read(path: Path, screen: Screen, track: str, seed: int, fractions: tuple) -> Split:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        found = json.loads(table.schema.metadata[_METADATA_KEY])
        roles = pd.Series(
            table["role"].to_pylist(), index=table["cell"].to_pylist(), name="role", dtype=object
        )
        split = Split(found["track"], found["seed"], roles, tuple(found["fractions"]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise SplitMismatch(
            f"split file {path}: expected a whole parquet file with columns cell and role and split "
            f"metadata, got {type(error).__name__}: {error}; {_WAYS_OUT}"
        ) from error
    expected = {
        "fingerprint": (screen.fingerprint, found["fingerprint"]),
        "track": (track, split.track),
        "seed": (seed, split.seed),
        "fractions": (fractions, split.fractions),
        "hash of the roles": (found["hash"], split.hash),
    }
    for name, (wanted, got) in expected.items():
        if wanted != got:
            raise SplitMismatch(f"split file {path}: {name}: expected {wanted!r}, got {got!r}; {_WAYS_OUT}")
    cells = pd.Index(screen.obs.index.astype(str))
    if set(cells) != set(roles.index):
        absent, extra = cells.difference(roles.index), roles.index.difference(cells)
        raise SplitMismatch(
            f"split file {path}: cells: expected the {len(cells)} of {screen.name}, got {len(roles)}, "
            f"{len(extra)} unknown and {len(absent)} missing (first: {[*absent, *extra][0]!r}); {_WAYS_OUT}"
        )
    return Split(split.track, split.seed, roles.reindex(cells), split.fractions)


_WAYS_OUT = (
    "`make report` for this dataset moves aside the file and all that was made with it; or use another outputs "
    "directory"
)


def _whole(seed) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
    return int(seed)


def _checked_fractions(fractions: Sequence[float]) -> tuple[float, float, float]:
    fractions = tuple(float(fraction) for fraction in fractions)
    good = len(fractions) == 3 and all(0 <= f <= 1 for f in fractions) and abs(sum(fractions) - 1) < 1e-9
    if not good or fractions[0] == 0:
        raise ValueError(
            f"fractions: expected train above 0, val and query of at least 0, and sum 1, got {fractions}"
        )
    return fractions


def _require_unique(cells: pd.Index) -> None:
    if not cells.is_unique:
        raise ValueError(f"cells: expected unique names, got {cells[cells.duplicated()][0]!r} more than once")
