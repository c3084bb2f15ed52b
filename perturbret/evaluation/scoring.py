"""Queries, single cells or pseudo-bulks, and their scores by every library, scoring, query size and pooling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from ..data.prepared import Prepared
from .composition import composable, compose
from .retrieval import (
    LIBRARY_KINDS,
    LIBRARY_SCORINGS,
    Library,
    build_library,
    class_scores,
    directions,
    match,
    pool_embeddings,
    pool_scores,
)
from .whitening import choose_shrinkage, whitener

CLASSIFIER_SCORINGS = ("classifier", "classifier_corrected")
ALL_SCORINGS = (*LIBRARY_SCORINGS, *CLASSIFIER_SCORINGS)
POOLINGS = ("scores", "embeddings", "expression")
CANDIDATES = ("train", "observed", "predicted")


@dataclass(frozen=True)
class Queries:
    """Queries of one size.

    Attributes
    ----------
    ids : ndarray of str, shape (q,)
        Cell name, or `<condition>/n<size>/<number>` for a pseudo-bulk.
    conditions : ndarray of str, shape (q,)
        True condition of each query.
    members : ndarray of int, shape (q, size)
        Positions of the cells of each query.
    size : int
        Cells per query.
    batch : ndarray of str, shape (q,), or None
        Batch of most of the query's cells (the first in name order among equals).
    """

    ids: np.ndarray
    conditions: np.ndarray
    members: np.ndarray
    size: int
    batch: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)


def make_queries(
    prepared: Prepared,
    *,
    role: str = "query",
    size: int,
    seed: int,
    max_per_condition: int = 40,
    repeats: int = 5,
) -> Queries:
    """Queries of `size` cells from the cells in `role`, controls left out.

    Size 1: every cell once. Larger sizes: the cells of a condition are shuffled `repeats` times and cut into
    disjoint groups each time; equal sets of cells are kept once, and at most `max_per_condition` groups stay.
    Groups of different shuffles overlap, which is why intervals resample conditions and not queries.
    Conditions with fewer than `size` cells have no query.

    The groups depend on `seed`, on cell names and on conditions, not on the order of the cells; those of one
    condition do not depend on which other conditions there are.

    Parameters
    ----------
    prepared : Prepared
    role : str
    size : int
        Cells per query, at least 1.
    seed : int
        At least 0.
    max_per_condition, repeats : int
        At least 1.

    Returns
    -------
    Queries
        Ordered by condition; empty when no condition has `size` cells.

    Raises
    ------
    ValueError
        `size`, `max_per_condition` or `repeats` is below 1, or no cell has the role.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, n_genes=20, cells_per_condition=40)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> len(make_queries(prepared, size=1, seed=0)) == len(prepared.where("query"))
    True
    >>> queries = make_queries(prepared, size=3, seed=0)
    >>> queries.members.shape[1], queries.ids[0] == f"{queries.conditions[0]}/n3/0"
    (3, True)
    """
    for name, value in (("size", size), ("max_per_condition", max_per_condition), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    index = by_name(prepared, prepared.where(role))
    if not len(index):
        raise ValueError(f"role: expected cells in role {role!r}, found none but controls")
    labels = prepared.conditions[index]
    if size == 1:
        batch = None if prepared.cells.batch is None else prepared.cells.batch[index]
        return Queries(prepared.cells.names[index], labels, index[:, None], 1, batch)
    conditions, starts = np.unique(labels, return_index=True)
    ids, repeated, members = [], [], [np.empty((0, size), int)]
    for condition, cells in zip(conditions, np.split(index, starts[1:]), strict=True):
        groups = _groups(cells, size, [seed, size, crc32(condition.encode())], max_per_condition, repeats)
        ids += [f"{condition}/n{size}/{number}" for number in range(len(groups))]
        repeated += [condition] * len(groups)
        members.append(groups)
    members = np.concatenate(members)
    return Queries(np.array(ids, str), np.array(repeated, str), members, size, _majority(prepared, members))


def by_name(prepared: Prepared, index: np.ndarray) -> np.ndarray:
    """`index` ordered by condition and cell name, so that nothing drawn or summed depends on file order."""
    return index[np.lexsort((prepared.cells.names[index], prepared.conditions[index]))]


def _groups(
    cells: np.ndarray, size: int, seed: list[int], max_per_condition: int, repeats: int
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n_groups = len(cells) // size
    kept: dict[tuple, None] = {}
    for _ in range(repeats if n_groups else 0):
        shuffled = rng.permutation(len(cells))[: n_groups * size].reshape(n_groups, size)
        kept.update(dict.fromkeys(map(tuple, np.sort(shuffled, axis=1).tolist())))
    chosen = np.array(list(kept)[:max_per_condition], int).reshape(-1, size)
    return cells[chosen]


def _majority(prepared: Prepared, members: np.ndarray) -> np.ndarray | None:
    if prepared.cells.batch is None:
        return None
    names, codes = np.unique(prepared.cells.batch, return_inverse=True)
    counts = np.zeros((len(members), len(names)), np.int32)
    for column in codes[members].T:
        counts[np.arange(len(members)), column] += 1
    return names[counts.argmax(axis=1)]


@dataclass(frozen=True)
class Scored:
    """Scores of the queries of one size, for one library, scoring and pooling.

    Attributes
    ----------
    library, scoring, pooling : str
        Library `none` for classifier scorings, pooling `single` for queries of one cell.
    queries : Queries
    scores : ndarray, shape (q, c)
    """

    library: str
    scoring: str
    pooling: str
    queries: Queries
    scores: np.ndarray


@dataclass(frozen=True)
class _Block:
    """Queries with what they are made of.

    `rows` (q, size) are the queries' cells among those of the first block. `embeddings` is None where the
    scores of these cells are pooled. `pooling` is empty where the block was not asked for.
    """

    pooling: str
    queries: Queries
    rows: np.ndarray
    embeddings: np.ndarray | None


def candidate_names(prepared: Prepared, candidates: str, role: str) -> tuple[str, ...]:
    """Sorted conditions that queries of a role are ranked among: those of `library_cells`, and what is predicted."""
    own = np.unique(prepared.conditions[library_cells(prepared, candidates, role)]).tolist()
    return tuple(sorted([*own, *(composable(prepared, role) if candidates == "predicted" else ())]))


def candidate_sets(prepared: Prepared) -> tuple[str, ...]:
    """Those of the track; `predicted` only where some combination can be composed, for queries and for validation."""
    can = composable(prepared, "query") and composable(prepared, "val")
    return tuple(each for each in prepared.candidate_sets if each != "predicted" or can)


def score_queries(
    encoder,
    prepared: Prepared,
    *,
    role: str,
    libraries: Sequence[str],
    query_sizes: Sequence[int],
    poolings: Sequence[str],
    scorings: Sequence[str],
    candidates: str,
    seed: int,
) -> Iterator[Scored]:
    """The scores behind `evaluate.evaluate`, one read-out at a time; parameters and errors as there.

    Columns of the scores: `candidate_names(prepared, candidates, role)`. Where there are candidates that a classifier
    was not trained on, it has no scoring of its own, and its embeddings are scored as any others.
    """
    for name, asked, known in (
        ("libraries", libraries, LIBRARY_KINDS),
        ("poolings", poolings, POOLINGS),
        ("scorings", scorings, ALL_SCORINGS),
    ):
        unknown = [value for value in asked if value not in known]
        if unknown or not asked:
            raise ValueError(
                f"{name}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'none'}"
            )
    names = candidate_names(prepared, candidates, role)
    by_library = [scoring for scoring in LIBRARY_SCORINGS if scoring in scorings]
    offered = {
        "classifier": encoder.head is not None,
        "classifier_corrected": encoder.head is not None and encoder.log_prior is not None,
    }
    by_class = [scoring for scoring in CLASSIFIER_SCORINGS if scoring in scorings and offered[scoring]]
    if by_library and not set(names) <= set(encoder.classes):
        by_class = []
    if not by_library and not by_class:
        raise ValueError(
            f"scorings: encoder {encoder.kind!r} has no classifier, got only {', '.join(scorings)}"
        )
    blocks = _make_blocks(encoder, prepared, role, query_sizes, poolings, seed)
    if by_library:
        cells = library_cells(prepared, candidates, role)
        made = _libraries(encoder, prepared, cells, libraries, candidates, role, seed)
        yield from _by_library(encoder, prepared, blocks, by_library, cells, *made)
    if by_class:
        log_probas = [encoder.log_proba(block.embeddings) for block in blocks if block.embeddings is not None]
        for scoring in by_class:
            prior = encoder.log_prior if scoring == "classifier_corrected" else None
            scores = [class_scores(log_proba, encoder.classes, names, prior) for log_proba in log_probas]
            yield from _pooled("none", scoring, blocks, scores, total=True)


def _make_blocks(
    encoder, prepared: Prepared, role: str, query_sizes: Sequence[int], poolings: Sequence[str], seed: int
) -> list[_Block]:
    """Embed what is to be scored. The first block is all single cells, asked for or not: others pool them."""
    cells = make_queries(prepared, role=role, size=1, seed=seed)
    embeddings = encoder.embed(prepared.cells.take(cells.members[:, 0]))
    row = np.full(len(prepared.conditions), -1)
    row[cells.members[:, 0]] = np.arange(len(cells))
    blocks = [_Block("single" if 1 in query_sizes else "", cells, row[cells.members], embeddings)]
    larger = [make_queries(prepared, role=role, size=size, seed=seed) for size in query_sizes if size != 1]
    larger = [queries for queries in larger if len(queries)]
    if not larger and 1 not in query_sizes:
        raise ValueError(
            f"query_sizes: expected one that a condition reaches in role {role!r}, got {tuple(query_sizes)}"
        )
    for pooling in poolings if larger else ():
        pooled: list[np.ndarray | None] = [None] * len(larger)
        if pooling == "embeddings":
            pooled = [pool_embeddings(embeddings, row[queries.members]) for queries in larger]
        elif pooling == "expression":
            groups = [members for queries in larger for members in queries.members]
            ends = np.cumsum([len(queries) for queries in larger])
            pooled = np.split(encoder.embed(prepared.cells.pool(groups)), ends[:-1])
        for queries, part in zip(larger, pooled, strict=True):
            blocks.append(_Block(pooling, queries, row[queries.members], part))
    return blocks


def _libraries(
    encoder,
    prepared: Prepared,
    cells: np.ndarray,
    kinds: Sequence[str],
    candidates: str,
    role: str,
    seed: int,
) -> tuple[np.ndarray, list[Library]]:
    """Embeddings of the library's cells, and the libraries: one of each kind, or one for each way to compose."""
    embeddings, conditions = encoder.embed(prepared.cells.take(cells)), prepared.conditions[cells]
    if candidates != "predicted":
        return embeddings, [build_library(embeddings, conditions, kind=kind, seed=seed) for kind in kinds]
    names = composable(prepared, role)
    own = build_library(embeddings, conditions)
    both = np.concatenate([own.conditions, np.array(names, str)])
    order = np.argsort(both, kind="stable")
    composed = compose(encoder, prepared, names) if names else {}
    return embeddings, [
        Library(kind, np.concatenate([own.prototypes, prototypes])[order], both[order])
        for kind, prototypes in composed.items()
    ] or [own]


def _by_library(
    encoder,
    prepared: Prepared,
    blocks: list[_Block],
    scorings: Sequence[str],
    cells: np.ndarray,
    embeddings: np.ndarray,
    libraries: list[Library],
) -> Iterator[Scored]:
    for scoring in scorings:
        space = whitening(encoder, prepared, cells, embeddings) if scoring == "whitened" else None
        views = [directions(block.embeddings, space) for block in blocks if block.embeddings is not None]
        for library in libraries:
            prototypes = directions(library.prototypes, space)
            scores = [match(view, prototypes, library.starts) for view in views]
            yield from _pooled(library.kind, scoring, blocks, scores, total=False)


def _pooled(
    library: str, scoring: str, blocks: list[_Block], scores: list[np.ndarray], *, total: bool
) -> Iterator[Scored]:
    """Scores of every block that was asked for, pooled from its cells where it has no embeddings."""
    cell_scores, own = scores[0], iter(scores)
    for block in blocks:
        if block.embeddings is None:
            found = pool_scores(cell_scores, block.rows, total=total)
        else:
            found = next(own)
        if block.pooling:
            yield Scored(library, scoring, block.pooling, block.queries, found)


def library_cells(prepared: Prepared, candidates: str, role: str) -> np.ndarray:
    """Positions of the cells that make the library for queries of `role`, by condition and name.

    `train`: training cells. `observed`: of every condition its gallery cells, training cells where it has none.
    `predicted`: the same, of conditions that were trained on. For validation cells, of no condition that is held out
    for queries.
    """
    if candidates not in CANDIDATES:
        raise ValueError(f"candidates: expected one of {', '.join(CANDIDATES)}, got {candidates!r}")
    cells = prepared.where("train")
    if candidates != "train":
        gallery = prepared.where("gallery")
        stands = np.unique(prepared.conditions[gallery])
        cells = np.concatenate([gallery, cells[~np.isin(prepared.conditions[cells], stands)]])
        known = np.isin(prepared.conditions[cells], prepared.candidates)
        if candidates == "observed":
            asked = np.unique(prepared.conditions[prepared.where("val")])
            known |= (role != "val") | np.isin(prepared.conditions[cells], asked)
        cells = cells[known]
    if not len(cells):
        raise ValueError(
            f"candidates: expected cells to make a library for {candidates!r}, found none but controls"
        )
    return by_name(prepared, cells)


def whitening(encoder, prepared: Prepared, cells: np.ndarray, embeddings: np.ndarray) -> tuple:
    """(mean, W) of the training cells; `cells` and their `embeddings` are not embedded again."""
    train = by_name(prepared, prepared.where("train"))
    if not np.array_equal(train, cells):
        embeddings = encoder.embed(prepared.cells.take(train))
    labels = prepared.conditions[train]
    return whitener(embeddings, labels, shrinkage=choose_shrinkage(embeddings, labels))
