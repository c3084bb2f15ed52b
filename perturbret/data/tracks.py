"""Tracks: which cells are trained on, chosen on and asked about, from names and labels alone.

A track registers itself with `@track`. The query cells of a track are the same for every seed; the seed divides the
rest.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..files.plugins import load_plugins
from .conditions import CTRL, targets

# `gallery`: makes prototypes, and no fit sees it. `unused`: read by nothing.
ROLES = ("train", "val", "gallery", "query", "unused")
# Which doubles `unseen_combo` asks about, by how many of their genes occur in training: shares of 0, 1 and 2.
STRATA = (0.25, 0.25, 0.5)
_UNKNOWN = "unassigned"
# Share of a condition's cells that make its prototypes where conditions are held out.
_GALLERY = 0.2


class TrackError(ValueError):
    """The screen does not have what the track holds out."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """What a track may look at.

    Attributes
    ----------
    obs : pandas.DataFrame
        Index: unique cell names. Columns: `condition`, `total`; optionally `batch`, `guide`.
    groups : ndarray of int, shape (n,), or None
        Copies of one cell share a number.
    """

    obs: pd.DataFrame
    groups: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        return [str(cell) for cell in self.obs.index]

    @property
    def conditions(self) -> np.ndarray:
        return self.obs["condition"].to_numpy(str)

    def codes(self, column: str) -> np.ndarray:
        """A column as whole numbers; zeros where there is no such column. ValueError where a cell has no value."""
        if column not in self.obs:
            return np.zeros(len(self.obs), np.int64)
        codes, _ = pd.factorize(self.obs[column])
        if (codes < 0).any():
            raise ValueError(
                f"obs[{column!r}]: expected a value for every cell, {int((codes < 0).sum())} have none"
            )
        return codes


Assign = Callable[[Labelled, int, tuple[float, float, float]], np.ndarray]


@dataclass(frozen=True)
class Track:
    """One way to hold out.

    Attributes
    ----------
    name : str
    assign : callable
        (cells, seed, fractions of train, val and query) -> roles, ndarray of str (n,).
    candidates : tuple of str
        The candidate sets that queries are ranked in, of `perturbret.evaluation.scoring.CANDIDATES`: the first is the
        one that settings are chosen under.
    holds_out : str
        What no fit has seen of a query, in words: it completes "queries are of ...".
    needs : str
        Column of `obs` without which there is no such track; the key of a dataset's entry has `_key` after it.
    """

    name: str
    assign: Assign
    candidates: tuple[str, ...]
    holds_out: str
    needs: str = ""

    def roles(self, cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
        """Roles of the cells; copies of a cell keep to one role.

        Raises
        ------
        TrackError
            The screen lacks what the track holds out.
        """
        if self.needs and self.needs not in cells.obs:
            raise TrackError(
                f"track {self.name}: expected a screen with a {self.needs}, it has none; name its column in the "
                f"dataset's entry ({self.needs}_key)"
            )
        for column in ("condition", "batch", "guide"):
            cells.codes(column)
        found = np.asarray(self.assign(cells, seed, fractions), str)
        unknown = sorted({str(role) for role in found} - set(ROLES))
        if len(found) != len(cells.obs) or unknown:
            raise ValueError(
                f"track {self.name}: expected a role of {ROLES} for each of {len(cells.obs)} cells, got {len(found)} "
                f"and {unknown}"
            )
        return found if cells.groups is None else _keep_apart(found, cells.groups)


TRACKS: dict[str, Track] = {}


def track(
    name: str, *, candidates: str | tuple[str, ...], holds_out: str, needs: str = ""
) -> Callable[[Assign], Assign]:
    """Register the decorated function as `Track.assign` under `name`; parameters as in `Track`.

    Examples
    --------
    >>> @track("every_other", candidates="train", holds_out="every other cell")
    ... def every_other(cells, seed, fractions):
    ...     return np.where(np.arange(len(cells.names)) % 2, "query", "train")
    >>> TRACKS["every_other"].holds_out
    'every other cell'
    """
    sets = (candidates,) if isinstance(candidates, str) else tuple(candidates)

    def register(assign: Assign) -> Assign:
        if name in TRACKS:
            raise ValueError(f"track {name!r}: expected a new name, it is that of {TRACKS[name].assign}")
        TRACKS[name] = Track(name, assign, sets, holds_out, needs)
        return assign

    return register


def find_track(name: str) -> Track:
    """A registered track, those of plug-ins among them. ValueError for an unknown name."""
    load_plugins()
    if name not in TRACKS:
        raise ValueError(f"track: expected one of {', '.join(TRACKS)}, got {name!r}")
    return TRACKS[name]


@track(
    "in_dist", candidates="train", holds_out="other cells of the conditions, batches and guides trained on"
)
def in_dist(cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
    """The cells of each condition, controls too, divided into train, val and query.

    The number of cells per role and condition is the largest-remainder rounding of the fractions (remainders
    that tie go to train first, then query, then val); every condition keeps at least one train cell. With
    the default fractions, of 1, 2, 3, 4 and 5 cells train gets 1, 1, 2, 2, 3, query 0, 1, 1, 1, 1 and val 0,
    0, 0, 1, 1. Each batch of a condition is divided in about the same proportions: cells are drawn by systematic
    sampling, one random start per condition and batch.

    Copies of a cell all get the role of one of them, drawn by itself; the numbers above then hold up to their sizes.
    """
    condition, batch, names = cells.codes("condition"), cells.codes("batch"), cells.names
    rank, size = _draw(condition, batch, names, "in_dist\0query")
    n_train, n_val, _ = _largest_remainder(size, fractions).T
    is_query = rank >= n_train + n_val
    if cells.groups is not None:
        is_query = _as_one(is_query, names, cells.groups, condition, "in_dist\0query")

    rest = np.flatnonzero(~is_query)
    others = [names[i] for i in rest]
    rank, _ = _draw(condition[rest], batch[rest], others, f"in_dist\0{seed}")
    is_val = rank >= (n_train if fractions[1] else size)[rest]
    if cells.groups is not None:
        is_val = _as_one(is_val, others, cells.groups[rest], condition[rest], f"in_dist\0{seed}")
    roles = np.full(len(names), "query", dtype=object)
    roles[rest] = np.where(is_val, "val", "train")
    return roles


@track("batch_disjoint", candidates="train", holds_out="batches not trained on", needs="batch")
def batch_disjoint(cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
    """Whole batches held out, the same for every condition: some for query, some of the others for val.

    Of K batches query gets max(1, round(K x its fraction)), val likewise of the rest; of two batches val has none,
    and is drawn cell by cell from the one that is trained on. Conditions without a cell in the batches trained on are
    not used.
    """
    batch = cells.obs["batch"].to_numpy(str)
    query, val = _held_out(np.unique(batch), "batch_disjoint", seed, fractions)
    if not query:
        raise TrackError(f"track batch_disjoint: expected two batches or more, got {sorted(set(batch))}")
    roles = np.full(len(batch), "train", dtype=object)
    roles[np.isin(batch, sorted(query))] = "query"
    roles[np.isin(batch, sorted(val))] = "val"
    if not val:
        roles = _val_by_cell(cells, roles, f"batch_disjoint\0{seed}", fractions)
    for condition in np.unique(cells.conditions):
        own = cells.conditions == condition
        if not (roles[own] == "train").any():
            roles[own & (roles == "val")] = "train"
            if not (roles[own] == "train").any():
                roles[own] = "unused"
    return roles


@track("guide_disjoint", candidates="train", holds_out="guides not trained on", needs="guide")
def guide_disjoint(cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
    """Whole guides of each condition, controls too, held out: some for query, some of the others for val.

    Of a condition's K guides query gets max(1, round(K x its fraction)) where K > 1, val likewise of the rest; a
    condition with one guide is trained on and never asked about. Where no condition has three guides, val is drawn
    cell by cell from the guides trained on. Cells without a guide are not used where guides of their condition are
    held out.
    """
    conditions, guides = cells.conditions, cells.obs["guide"].to_numpy(str)
    roles = np.full(len(guides), "train", dtype=object)
    for condition in np.unique(conditions):
        own = conditions == condition
        known = np.unique(guides[own & (guides != _UNKNOWN)])
        query, val = _held_out(known, f"guide_disjoint\0{condition}", seed, fractions)
        roles[own & np.isin(guides, sorted(query))] = "query"
        roles[own & np.isin(guides, sorted(val))] = "val"
        if query:
            roles[own & (guides == _UNKNOWN)] = "unused"
    if not (roles == "query").any():
        raise TrackError("track guide_disjoint: expected a condition with two guides or more, there is none")
    if not (roles == "val").any():
        roles = _val_by_cell(cells, roles, f"guide_disjoint\0{seed}", fractions)
    return roles


@track("unseen_combo", candidates=("observed", "predicted"), holds_out="combinations not trained on")
def unseen_combo(cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
    """Combinations of genes held out, by how many of their genes occur in training (`STRATA`).

    For those with a gene that must not occur, every condition of that gene is held out: its combinations are asked
    about, the gene alone makes prototypes only. How far `STRATA` is reached depends on the combinations that the screen
    has. A fifth of every condition's cells is gallery.
    """
    known = sorted(set(cells.conditions) - {CTRL})
    combinations = [condition for condition in known if len(targets(condition)) > 1]
    if len(combinations) < 2:
        raise TrackError(
            f"track unseen_combo: expected two conditions or more that combine genes, got {len(combinations)}"
        )
    n_val, n_query = (max(round(len(combinations) * share), int(share > 0)) for share in fractions[1:])
    query, unseen = _draw_combinations(known, n_query, "unseen_combo\0query")
    rest = [condition for condition in known if condition not in query | unseen]
    val, unseen_too = _draw_combinations(rest, n_val, f"unseen_combo\0{seed}")
    return _held_out_conditions(cells, query, val, unseen | unseen_too, "unseen_combo")


@track("unseen_gene", candidates="observed", holds_out="genes not trained on")
def unseen_gene(cells: Labelled, seed: int, fractions: tuple[float, float, float]) -> np.ndarray:
    """Genes held out with all of their conditions, which are up to the fraction of conditions, one gene at least.

    A fifth of every condition's cells is gallery.
    """
    known = sorted(set(cells.conditions) - {CTRL})
    n_val, n_query = (len(known) * share for share in fractions[1:])
    query = _draw_genes(known, n_query, "unseen_gene\0query")
    rest = [condition for condition in known if condition not in query]
    val = _draw_genes(rest, n_val, f"unseen_gene\0{seed}") if fractions[1] else set()
    if not set(rest) - val:
        raise TrackError(
            f"track unseen_gene: expected three genes or more that are not always together, got {len(known)} conditions"
        )
    return _held_out_conditions(cells, query, val, set(), "unseen_gene")


def uniform(names: Sequence[str], salt: str) -> np.ndarray:
    """A random number in [0, 1) for each name, by a hash of both: the same in any order, process and version.

    Examples
    --------
    >>> uniform(["cell1", "cell2"], "salt").round(3).tolist()
    [0.278, 0.615]
    >>> uniform(["cell2", "cell1"], "salt").round(3).tolist()
    [0.615, 0.278]
    """
    return _numbers(list(names), salt)[0] / 2.0**64


def genes_seen(condition: str, trained: Iterable[str]) -> int:
    """How many genes of a condition occur in the conditions that were trained on."""
    return len(set(targets(condition)) & {gene for each in trained for gene in targets(each)})


def _held_out(
    units: np.ndarray, salt: str, seed: int, fractions: tuple[float, float, float]
) -> tuple[set[str], set[str]]:
    """Batches or guides for query and for val; both empty where there is one unit."""
    if len(units) < 2:
        return set(), set()
    n_query = min(max(1, round(len(units) * fractions[2])), len(units) - 1)
    query = _in_random_order(units, f"{salt}\0query")[:n_query]
    rest = [unit for unit in units if unit not in query]
    n_val = min(max(1, round(len(rest) * fractions[1] / (fractions[0] + fractions[1]))), len(rest) - 1)
    # In turn, so that with few units, too, seeds that follow one another hold out others.
    order = np.roll(_in_random_order(rest, salt), -seed * max(n_val, 1))
    return set(query), set(map(str, order[:n_val])) if fractions[1] else set()


def _val_by_cell(cells: Labelled, roles: np.ndarray, salt: str, fractions) -> np.ndarray:
    """`roles` with val drawn from the training cells of each condition."""
    rest = np.flatnonzero(roles == "train")
    names = cells.names
    rank, size = _draw(
        cells.codes("condition")[rest], cells.codes("batch")[rest], [names[i] for i in rest], salt
    )
    n_val = np.minimum(np.round(size * fractions[1] / (fractions[0] + fractions[1])), size - 1)
    roles[rest[rank >= size - n_val]] = "val"
    return roles


def _draw_combinations(conditions: Sequence[str], n: int, salt: str) -> tuple[set[str], set[str]]:
    """About `n` combinations, by `STRATA`, and the other conditions whose genes must not occur in training.

    Pairs of genes, then genes, are taken out in random order while their combinations fit into the strata of 0 and 1
    gene seen; the rest are combinations whose genes still occur in what is left.
    """
    combinations = {condition: set(targets(condition)) for condition in conditions if "+" in condition}
    wanted = _shares(n, STRATA)
    gone: set[str] = set()

    def counts(without: set[str]) -> list[int]:
        seen = [len(genes - without) for genes in combinations.values() if genes & without]
        return [sum(left == 0 for left in seen), sum(left > 0 for left in seen)]

    pairs = [frozenset(combinations[name]) for name in _in_random_order(combinations, f"{salt}\0pair")]
    singles = sorted({gene for genes in combinations.values() for gene in genes})
    for genes in (*pairs, *({gene} for gene in _in_random_order(singles, f"{salt}\0gene"))):
        if all(found <= most for found, most in zip(counts(gone | genes), wanted, strict=False)):
            gone = gone | genes
    drawn = {name for name, genes in combinations.items() if genes & gone}
    unseen = {name for name in conditions if set(targets(name)) & gone} - drawn
    left = [name for name in conditions if name not in drawn | unseen]
    for name in _in_random_order(sorted(set(combinations) - drawn), f"{salt}\0combination"):
        if len(drawn) >= n:
            break
        others = [other for other in left if other != name]
        if genes_seen(name, others) == len(combinations[name]):
            drawn.add(name)
            left = others
    if n and not drawn:
        drawn = set(_in_random_order(combinations, f"{salt}\0combination")[:1])
    return drawn, unseen - drawn


def _draw_genes(conditions: Sequence[str], n: float, salt: str) -> set[str]:
    """All conditions of genes drawn at random, at most `n` conditions where one gene does not have more."""
    genes = _in_random_order({gene for name in conditions for gene in targets(name)}, salt)
    of_gene = {gene: {name for name in conditions if gene in targets(name)} for gene in genes}
    drawn: set[str] = set()
    for gene in genes:
        if len(drawn | of_gene[gene]) <= n:
            drawn |= of_gene[gene]
    return drawn or min(of_gene.values(), key=len, default=set())


def _held_out_conditions(
    cells: Labelled, query: set[str], val: set[str], gallery: set[str], name: str
) -> np.ndarray:
    """Roles where whole conditions are held out; `gallery`: conditions that only make prototypes.

    A fifth of every condition's cells, controls too, is gallery: prototypes of all are means of as many cells, which
    no fit has seen. Others would stand apart by that alone.
    """
    conditions, names = cells.conditions, cells.names
    rank, size = _draw(cells.codes("condition"), cells.codes("batch"), names, f"{name}\0gallery")
    roles = np.full(len(names), "train", dtype=object)
    for held, role in ((gallery, "unused"), (val, "val"), (query, "query")):
        roles[np.isin(conditions, sorted(held))] = role
    roles[(rank < np.ceil(size * _GALLERY)) & (size > 1)] = "gallery"
    return roles


def _keep_apart(roles: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Where copies of a cell have several roles, the role furthest from training keeps its cells; others are unused."""
    order = {role: i for i, role in enumerate(("unused", "train", "gallery", "val", "query"))}
    rank = np.array([order[role] for role in roles])
    top = np.zeros(groups.max(initial=-1) + 1, int)
    np.maximum.at(top, groups, rank)
    return np.where(rank == top[groups], roles, "unused")


def _in_random_order(names: Collection[str], salt: str) -> list[str]:
    names = sorted(map(str, names))
    order, _ = _numbers(names, salt)
    return [names[i] for i in np.argsort(order, kind="stable")]


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


def _shares(n: int, fractions: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `n`, by largest remainder; of remainders that tie the last comes first."""
    exact = [n * fraction for fraction in fractions]
    whole = [int(each) for each in exact]
    order = sorted(range(len(exact)), key=lambda i: (round(exact[i] - whole[i], 9), i), reverse=True)
    for i in order[: n - sum(whole)]:
        whole[i] += 1
    return whole


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
