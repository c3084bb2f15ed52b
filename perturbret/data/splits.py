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

TRACKS = ("in_dist",)
ROLES = ("train", "val", "gallery", "query")
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
        Of train, val and query cells within each condition.
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
    """Divide the cells of each condition, controls too, into train, val and query.

    The query cells are the same for every seed; the seed divides the others. So no query cell of one seed takes
    part in a choice of another, and seeds are repeats of a fit that is judged on the same cells.

    The number of cells per role and condition is the largest-remainder rounding of the fractions (remainders
    that tie go to train first, then query, then val); every condition keeps at least one train cell. With
    the default fractions, of 1, 2, 3, 4 and 5 cells train gets 1, 1, 2, 2, 3, query 0, 1, 1, 1, 1 and val 0,
    0, 0, 1, 1. Where `obs` has a batch, each batch of a condition is divided in about the same proportions:
    cells are drawn by systematic sampling, one random start per condition and batch.

    Cells are drawn by a hash of track and cell name, train and val by one of track, seed and cell name. So the
    roles depend neither on the order of rows nor on other conditions, and stay the same across versions of numpy.

    Cells of a group, such as copies of one cell, all get the role of one of them, drawn by itself; the
    numbers above then hold up to the sizes of groups.

    Parameters
    ----------
    obs : DataFrame
        Index: unique cell names. Column `condition`; optionally `batch`.
    track : str
        One of `TRACKS`.
    seed : int
        At least 0.
    fractions : three floats
        Of train, val and query; not negative, train above 0, sum 1.
    groups : ndarray of int, shape (n_cells,), optional
        Cells with equal numbers share one role, whatever their conditions.

    Returns
    -------
    Split
        Its roles in the order of `obs`.

    Raises
    ------
    ValueError
        Unknown track, bad seed or fractions, repeated cell names, no column `condition`, a missing condition
        or batch.
    """
    if track not in TRACKS:
        raise ValueError(f"track: expected one of {TRACKS}, got {track!r}")
    seed = _whole(seed)
    fractions = _checked_fractions(fractions)
    _require_unique(obs.index)
    condition = _codes(obs, "condition")
    batch = _codes(obs, "batch") if "batch" in obs else np.zeros(len(obs), dtype=np.int64)

    cells = [str(cell) for cell in obs.index]
    rank, size = _draw(condition, batch, cells, f"{track}\0query")
    n_train, n_val, _ = _largest_remainder(size, fractions).T
    is_query = rank >= n_train + n_val
    if groups is not None:
        is_query = _as_one(is_query, cells, groups, condition, f"{track}\0query")

    rest = np.flatnonzero(~is_query)
    others = [cells[i] for i in rest]
    rank, _ = _draw(condition[rest], batch[rest], others, f"{track}\0{seed}")
    is_val = rank >= (n_train if fractions[1] else size)[rest]
    if groups is not None:
        is_val = _as_one(is_val, others, groups[rest], condition[rest], f"{track}\0{seed}")
    roles = np.full(len(obs), "query", dtype=object)
    roles[rest] = np.where(is_val, "val", "train")
    return Split(track, seed, pd.Series(roles, index=obs.index, name="role"), fractions)


def _draw(condition, batch, cells: list[str], salt: str) -> tuple[np.ndarray, np.ndarray]:
    """Rank of each cell within its condition, in a random order that mixes batches, and the condition's size.

    Systematic sampling: the r-th of m cells of a batch stands at (r + random start) / m, so that any stretch of
    [0, 1) holds about the same share of every batch.
    """
    order, start = _numbers(cells, salt)
    by_batch = np.lexsort((order, batch, condition))
    first, rank, size = _groups(condition[by_batch], batch[by_batch])
    place = np.empty(len(cells))
    place[by_batch] = (rank + start[by_batch][first] / 2.0**64) / size
    by_place = np.lexsort((order, place, condition))
    _, rank[by_place], size[by_place] = _groups(condition[by_place])
    return rank, size


def _as_one(
    held_out: np.ndarray, cells: list[str], groups: np.ndarray, condition: np.ndarray, salt: str
) -> np.ndarray:
    """`held_out` with every group as one of its cells, which is drawn anew: the draw that held cells out would, by its
    order, hold back most groups. A group is kept where a condition would lose all of its cells."""
    order, _ = _numbers(cells, f"{salt}\0group")
    by_order = np.argsort(order, kind="stable")
    _, first, group = np.unique(groups[by_order], return_index=True, return_inverse=True)
    of_group = held_out[by_order][first]
    code = np.empty(len(groups), dtype=np.int64)
    code[by_order] = group
    for lost in np.flatnonzero(np.bincount(condition, ~of_group[code], minlength=1) == 0):
        own = np.flatnonzero(condition == lost)
        if len(own):
            of_group[code[own[0]]] = False
    return of_group[code]


def _numbers(cells: list[str], salt: str) -> tuple[np.ndarray, np.ndarray]:
    """Two random numbers (uint64) of each cell, by a hash of salt and name."""
    draws = [hashlib.blake2b(f"{salt}\0{cell}".encode(), digest_size=16).digest() for cell in cells]
    order, other = np.frombuffer(b"".join(draws), dtype="<u8").reshape(-1, 2).T
    return order, other


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


def _codes(obs: pd.DataFrame, column: str) -> np.ndarray:
    if column not in obs:
        raise ValueError(f"obs: expected a column {column!r}, got {list(obs.columns)}")
    codes, _ = pd.factorize(obs[column])
    if (codes < 0).any():
        raise ValueError(
            f"obs[{column!r}]: expected a value for every cell, {int((codes < 0).sum())} have none"
        )
    return codes


def _groups(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal keys in sorted rows: of each row, its run's start, its rank there, its run's size."""
    n = len(keys[0])
    new = np.zeros(n, dtype=bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    starts = np.flatnonzero(new)
    run = np.cumsum(new) - 1
    sizes = np.diff(np.append(starts, n))
    return starts[run], np.arange(n) - starts[run], sizes[run]


def _largest_remainder(n: np.ndarray, fractions: tuple) -> np.ndarray:
    """Whole numbers (len(n), 3) of train, val and query that sum to `n` and lie within 1 of n * fractions."""
    exact = np.asarray(n)[:, None] * np.asarray(fractions)
    whole = np.floor(exact).astype(int)
    left = np.asarray(n) - whole.sum(axis=1)
    tie_order = np.array([0, 2, 1])
    remainder = np.round(exact - whole, 9)[:, tie_order]
    ranked = np.argsort(np.argsort(-remainder, axis=1, kind="stable"), axis=1)
    counts = whole + (ranked < left[:, None])[:, np.argsort(tie_order)]
    untrained = np.flatnonzero((counts[:, 0] == 0) & (np.asarray(n) > 0))
    counts[untrained, counts[untrained].argmax(axis=1)] -= 1
    counts[untrained, 0] = 1
    return counts
