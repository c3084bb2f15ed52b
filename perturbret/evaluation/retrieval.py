"""Retrieval: the prototypes of every candidate condition, and the scores of queries against them."""

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

LIBRARY_KINDS = ("mean", "bootstrap", "raw_cell")
LIBRARY_SCORINGS = ("cosine", "whitened")
# Scores are computed to about 7 digits (float32) and kept to this many of the largest: noise must not break
# real ties, or a collapsed encoder would be ranked by rounding errors and not score
# chance. `perturbret.evaluation.metrics` takes two scores for tied when they are equal to 9 decimals, so ties made here
# are ties there.
RESOLUTION = 1e-6
# Distances from the mean below this share of the vectors' length are rounding errors of float32 embeddings.
COLLAPSED = 1e-6
_BLOCK_BYTES = 32e6


@dataclass(frozen=True)
class Library:
    """Prototypes in embedding space, ordered by condition.

    Attributes
    ----------
    kind : str
        One of `LIBRARY_KINDS`.
    prototypes : ndarray of float32, shape (p, d)
    conditions : ndarray of str, shape (p,)
        Condition of each prototype, in ascending order.
    """

    kind: str
    prototypes: np.ndarray
    conditions: np.ndarray

    def __post_init__(self):
        if self.prototypes.ndim != 2 or not len(self.prototypes):
            raise ValueError(f"prototypes: expected at least one, as rows, got shape {self.prototypes.shape}")
        if len(self.conditions) != len(self.prototypes):
            raise ValueError(
                f"conditions: expected one per prototype ({len(self.prototypes)}), got {len(self.conditions)}"
            )
        if (self.conditions[1:] < self.conditions[:-1]).any():
            raise ValueError("conditions: expected prototypes in ascending order of condition")

    @property
    def candidates(self) -> tuple[str, ...]:
        """The conditions that can be retrieved, sorted."""
        return tuple(np.unique(self.conditions).tolist())

    @property
    def starts(self) -> np.ndarray:
        """Row of the first prototype of each candidate, int (c,)."""
        return np.unique(self.conditions, return_index=True)[1]


def build_library(
    embeddings: np.ndarray,
    conditions: np.ndarray,
    *,
    kind: str = "mean",
    k: int = 30,
    m: int = 50,
    seed: int = 0,
) -> Library:
    """Prototypes from the embeddings of library cells (train, or gallery where the track says so).

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
    conditions : ndarray of str, shape (n,)
    kind : {'mean', 'bootstrap', 'raw_cell'}
        One mean per condition; `k` means of `m` cells drawn with replacement; every cell.
    k, m : int
        Of the bootstrap library.
    seed : int
        Of the bootstrap library. The draws of a condition depend on its name and on the order of its cells,
        not on the other conditions.

    Raises
    ------
    ValueError
        Unknown `kind`; no cells; lengths differ; `k` or `m` is below 1; an embedding is not finite.

    Examples
    --------
    >>> embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    >>> library = build_library(embeddings, ["KLF1", "BAK1", "KLF1"])
    >>> library.conditions.tolist(), library.prototypes.tolist()
    (['BAK1', 'KLF1'], [[0.0, 1.0], [2.0, 0.0]])
    >>> build_library(embeddings, ["KLF1", "BAK1", "KLF1"], kind="raw_cell").starts.tolist()
    [0, 1]
    """
    if kind not in LIBRARY_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(LIBRARY_KINDS)}, got {kind!r}")
    if k < 1 or m < 1:
        raise ValueError(f"k, m: expected at least 1, got {k} and {m}")
    embeddings, conditions = np.asarray(embeddings), np.asarray(conditions, str)
    if embeddings.ndim != 2 or len(embeddings) != len(conditions) or not len(conditions):
        raise ValueError(
            f"embeddings: expected cells x dimensions for {len(conditions)} conditions, got shape "
            f"{embeddings.shape}"
        )
    if not np.isfinite(embeddings).all():
        bad = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        raise ValueError(
            f"embeddings: expected finite numbers, {len(bad)} cells have others (first row {bad[0]})"
        )
    order = np.argsort(conditions, kind="stable")
    names, starts = np.unique(conditions[order], return_index=True)
    if kind == "raw_cell":
        return Library(kind, embeddings[order].astype(np.float32, copy=False), conditions[order])
    prototypes = []
    for name, rows in zip(names, np.split(order, starts[1:]), strict=True):
        cells = embeddings[rows].astype(np.float64)
        if kind == "mean":
            prototypes.append(cells.mean(axis=0, keepdims=True))
        else:
            # How often each cell is drawn is all that a mean needs: k x n weights, not k x m x d copies.
            rng = np.random.default_rng([seed, crc32(name.encode())])
            drawn = rng.multinomial(m, np.full(len(rows), 1 / len(rows)), size=k)
            prototypes.append((drawn / m) @ cells)
    repeated = np.repeat(names, [len(part) for part in prototypes])
    return Library(kind, np.concatenate(prototypes).astype(np.float32), repeated)


def directions(embeddings: np.ndarray, whiten: tuple[np.ndarray, np.ndarray] | None = None) -> np.ndarray:
    """Embeddings, whitened where asked, scaled to length 1.

    Vectors without a direction become 0: those of length 0, and in whitened space those that stand at the
    mean but for rounding errors. They score 0 with every candidate, which is a tie and not a NaN.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
    whiten : (mean, W), optional
        From `perturbret.evaluation.whitening.whitener`.

    Returns
    -------
    ndarray of float32, shape (n, d)

    Raises
    ------
    ValueError
        An embedding is not finite.
    """
    embeddings = np.asarray(embeddings)
    n, d = embeddings.shape
    units = np.empty((n, d), np.float32)
    if whiten is not None:
        mean, matrix = (part.astype(np.float32) for part in whiten)
    for block in row_blocks(n, 8 * d):
        rows = embeddings[block].astype(np.float32)
        if not np.isfinite(rows).all():
            bad = block.start + np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]
            raise ValueError(f"embeddings: expected finite numbers, row {bad} holds others")
        lost = np.zeros(len(rows), bool)
        if whiten is not None:
            length = np.maximum(_lengths(rows), _lengths(mean[None]))
            rows -= mean
            lost = _lengths(rows) <= COLLAPSED * length
            rows = rows @ matrix
        length = _lengths(rows)
        length[lost | (length == 0)] = np.inf
        units[block] = rows / length[:, None]
    return units


def match(queries: np.ndarray, prototypes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Score of every condition for every query: the largest cosine with one of its prototypes.

    Queries are taken in blocks, so that the full query x prototype matrix never exists.

    Parameters
    ----------
    queries : ndarray of float32, shape (q, d)
        From `directions`.
    prototypes : ndarray of float32, shape (p, d)
        From `directions`, ordered by condition.
    starts : ndarray of int, shape (c,)
        First prototype of each condition (`Library.starts`).

    Returns
    -------
    ndarray, shape (q, c)
        In steps of `RESOLUTION`; within one and a half steps of 1 is 1.

    Examples
    --------
    >>> library = build_library(np.eye(2), ["BAK1", "KLF1"])
    >>> queries = directions(np.array([[0.0, 5.0], [3.0, 4.0]]))
    >>> match(queries, directions(library.prototypes), library.starts).round(3).tolist()
    [[0.0, 1.0], [0.6, 0.8]]
    """
    scores = np.empty((len(queries), len(starts)))
    single = len(starts) == len(prototypes)
    for block in row_blocks(len(queries), 4 * len(prototypes)):
        cosines = queries[block] @ prototypes.T
        scores[block] = cosines if single else np.maximum.reduceat(cosines, starts, axis=1)
    scores[scores > 1 - 1.5 * RESOLUTION] = 1.0
    return settle(scores)


def score_library(
    embeddings: np.ndarray, library: Library, whiten: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Scores (q, c) of query embeddings (q, d) against a library; columns in the order of `library.candidates`.

    By cosine, or by whitened cosine with `whiten`, the (mean, W) of `perturbret.evaluation.whitening.whitener`.
    ValueError where dimensions differ.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or embeddings.shape[1] != library.prototypes.shape[1]:
        raise ValueError(
            f"embeddings: expected queries x {library.prototypes.shape[1]} dimensions as in the library, got "
            f"shape {embeddings.shape}"
        )
    return match(directions(embeddings, whiten), directions(library.prototypes, whiten), library.starts)


def class_scores(
    log_proba: np.ndarray,
    classes: Sequence[str],
    candidates: Sequence[str],
    log_prior: np.ndarray | None = None,
) -> np.ndarray:
    """Classifier scores of the candidates: log p, or log p - log prior.

    Parameters
    ----------
    log_proba : ndarray, shape (q, C)
    classes : sequence of str, length C
    candidates : sequence of str, length c
    log_prior : ndarray, shape (C,), optional
        Subtracted when given: the class shares of the training cells then no longer favour common conditions.

    Returns
    -------
    ndarray, shape (q, c)

    Raises
    ------
    ValueError
        The classifier has no class, and so no score, for a candidate.
    """
    column = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in candidates if name not in column]
    if unknown:
        raise ValueError(
            f"candidates: the classifier knows {len(column)} classes, without {unknown[0]!r} "
            f"and {len(unknown) - 1} other candidates; use a library scoring for conditions that were not "
            f"trained on"
        )
    chosen = [column[name] for name in candidates]
    scores = np.asarray(log_proba, np.float64)[:, chosen]
    # The scale is that of log p: what is left after the prior is subtracted carries the noise of log p.
    scale = np.abs(np.where(np.isfinite(scores), scores, 0.0)).max(axis=1, keepdims=True)
    if log_prior is not None:
        scores = scores - np.asarray(log_prior, np.float64)[chosen]
    return settle(scores, scale)


def settle(scores: np.ndarray, scale: float | np.ndarray = 1.0) -> np.ndarray:
    """Scores rounded to steps of `RESOLUTION` times `scale` (a number, or one per row); see `RESOLUTION`."""
    step = RESOLUTION * np.where(np.asarray(scale) > 0, scale, 1.0)
    return np.round(scores / step) * step


def pool_scores(scores: np.ndarray, members: np.ndarray, *, total: bool = False) -> np.ndarray:
    """Mean (or sum, when `total`) of the score vectors of each query's cells.

    Parameters
    ----------
    scores : ndarray, shape (n, c)
    members : ndarray of int, shape (q, size)
        Rows of `scores`.
    total : bool
        Log-probabilities of independent cells add up.

    Returns
    -------
    ndarray, shape (q, c)
    """
    pooled = _sums(scores, members)
    return pooled if total else pooled / members.shape[1]


def pool_embeddings(embeddings: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Mean embedding of each query's cells: float32 (q, d) from (n, d) and `members` as in `pool_scores`."""
    return (_sums(embeddings, members) / members.shape[1]).astype(np.float32)


def _sums(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(members), values.shape[1]))
    for column in members.T:
        sums += values[column]
    return sums


def row_blocks(n: int, row_bytes: int) -> list[slice]:
    """Slices of `n` rows that hold a bounded number of bytes each, given those of a row."""
    step = max(1, int(_BLOCK_BYTES / max(row_bytes, 1)))
    return [slice(start, start + step) for start in range(0, n, step)]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
