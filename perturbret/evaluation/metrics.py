"""How well scores rank the conditions that caused a query: one row of metrics per query, ties in expectation.

A metric of tied scores is its mean over all orders of the tied candidates, in closed form
(McSherry & Najork 2008, "Computing information retrieval performance measures efficiently in the presence of
tied scores", ECIR). An encoder that gives every candidate the same score gets exactly the chance level.
Definitions with formulas: docs/method.md.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from ..data.conditions import targets

KS = (1, 5, 8, 10)
MRR_CUT = 10
# Scores tie when they are equal after rounding, to a grid coarser than the noise of arithmetic in that
# precision. A tolerance would not do: "closer than" is not transitive.
DECIMALS = {np.dtype(np.float64): 9, np.dtype(np.float32): 6}
# Scores held at a time, so that sorting 100,000 queries needs no more memory than sorting a few thousand.
_CHUNK = 1_000_000


def relevance(true: Sequence[str], candidates: Sequence[str]) -> np.ndarray:
    """Relevance of every candidate for every query: 2 same condition, 1 shares a target gene, 0 neither.

    Parameters
    ----------
    true : sequence of str, length q
        Canonical condition of each query.
    candidates : sequence of str, length c
        Canonical conditions that are ranked, each once (else ValueError).

    Returns
    -------
    ndarray of int8, shape (q, c)
    """
    true, candidates = np.asarray(true, str), np.asarray(candidates, str)
    repeated = [name for name, n in Counter(candidates).items() if n > 1]
    if repeated:
        raise ValueError(f"candidates: expected unique conditions, got {str(repeated[0])!r} more than once")
    names = np.union1d(true, candidates)
    pairs = pd.DataFrame(
        [(i, gene) for i, name in enumerate(names) for gene in targets(name)], columns=["row", "gene"]
    )
    genes = pd.factorize(pairs["gene"])[0]
    shape = (len(names), genes.max(initial=0) + 1)
    incidence = csr_matrix((np.ones(len(pairs)), (pairs["row"].to_numpy(int), genes)), shape=shape)
    levels = (incidence @ incidence.T > 0).toarray().astype(np.int8)
    np.fill_diagonal(levels, 2)
    return levels[np.ix_(np.searchsorted(names, true), np.searchsorted(names, candidates))]


def per_query(scores: np.ndarray, relevance: np.ndarray, ks: Sequence[int] = KS) -> pd.DataFrame:
    """Metrics of every query, each the expectation over random tie breaking.

    Parameters
    ----------
    scores : ndarray of float, shape (q, c)
        Higher is more likely; infinities are allowed, NaN is not. Ties: equal after rounding, see `DECIMALS`.
    relevance : ndarray of int, shape (q, c)
        From `relevance`; at most one 2 in a row.
    ks : sequence of int
        Cut-offs, each at least 1.

    Returns
    -------
    DataFrame, q rows
        Of the candidate with relevance 2: `rank` (from 1; NaN where there is none), `mrr` (1 / rank),
        `mrr@10`, `exact_hit@k`, `ndcg_binary@k`. Of relevance at least 1: `relevant_hit@k`, `ap`. Of both:
        `ndcg@k` with gain 2**relevance - 1 and discount 1 / log2(rank + 1). Of the scores alone: `margin`,
        the best minus the second best. What is not among the candidates is never found: its metrics are 0.

    Raises
    ------
    ValueError
        Shapes differ, there are fewer than two candidates, a score is NaN, a relevance is not 0, 1 or 2, a
        row holds several 2, or a cut-off is below 1.
    """
    scores, relevance = _checked(scores), np.asarray(relevance)
    if relevance.shape != scores.shape:
        raise ValueError(f"relevance: expected the shape of scores {scores.shape}, got {relevance.shape}")
    if not np.isin(relevance, (0, 1, 2)).all():
        raise ValueError(f"relevance: expected 0, 1 or 2, got {np.setdiff1d(relevance, (0, 1, 2))[0]}")
    if ((relevance == 2).sum(axis=1) > 1).any():
        raise ValueError("relevance: expected at most one 2 in a row, got several; are candidates unique?")
    if min(ks, default=1) < 1:
        raise ValueError(f"ks: expected cut-offs of at least 1, got {min(ks)}")
    step = max(1, _CHUNK // scores.shape[1])
    rows = [slice(start, start + step) for start in range(0, max(len(scores), 1), step)]
    parts = [_chunk_metrics(_rounded(scores[at]), relevance[at], tuple(ks)) for at in rows]
    return pd.concat(parts, ignore_index=True)


def chance(relevance: np.ndarray, ks: Sequence[int] = KS) -> pd.DataFrame:
    """`per_query` of a ranking drawn at random, computed exactly: what equal scores get."""
    return per_query(np.zeros(np.shape(relevance)), relevance, ks)


def rank_top(scores: np.ndarray) -> np.ndarray:
    """Probability that each candidate is ranked first, shared equally among tied best scores.

    `scores` is (q, c) as in `per_query`; so is the result, float64, its rows summing to 1.
    """
    scores = _rounded(_checked(scores))
    first = scores == scores.max(axis=1, keepdims=True)
    return first / first.sum(axis=1, keepdims=True)


def top_conditions(scores: np.ndarray, candidates: Sequence[str], k: int = 10) -> np.ndarray:
    """Names of the `k` best candidates of each query, best first, for reading rather than for scoring.

    `scores` is (q, c), `candidates` has length c; the result is (q, min(k, c)). Tied candidates stand in the
    order of `candidates`. ValueError where lengths differ.
    """
    scores, candidates = _rounded(_checked(scores)), np.asarray(candidates, str)
    if len(candidates) != scores.shape[1]:
        raise ValueError(f"candidates: expected {scores.shape[1]} names, got {len(candidates)}")
    return candidates[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def coverage_accuracy(margin: np.ndarray, hit: np.ndarray) -> pd.DataFrame:
    """Accuracy over the most confident queries, for every number of queries answered.

    Parameters
    ----------
    margin : ndarray of float, shape (q,)
        Confidence: the queries with the largest margins are answered first. Queries with equal margins are
        answered in random order, and accuracy is the expectation over it.
    hit : ndarray of float, shape (q,)
        exact_hit@1 of each query. ValueError for no queries, a NaN, or arrays of unlike shapes.

    Returns
    -------
    DataFrame, q rows
        `coverage`, the fraction of queries answered (1/q, 2/q, … 1), and `accuracy`, the mean hit over them.
    """
    margin, hit = np.asarray(margin, np.float64), np.asarray(hit, np.float64)
    if margin.ndim != 1 or margin.shape != hit.shape or not len(margin) or np.isnan([margin, hit]).any():
        raise ValueError(
            f"margin, hit: expected numbers, one per query, got shapes {margin.shape} and {hit.shape}, "
            f"{np.isnan(margin).sum()} and {np.isnan(hit).sum()} NaN"
        )
    order = np.argsort(-margin, kind="stable")
    margin, hit = margin[order], hit[order]
    group = np.concatenate([[0], np.cumsum(margin[1:] != margin[:-1])])
    expected = (np.bincount(group, hit) / np.bincount(group))[group]
    answered = np.arange(1, len(hit) + 1)
    return pd.DataFrame({"coverage": answered / len(hit), "accuracy": np.cumsum(expected) / answered})


def coverage_area(margin: np.ndarray, hit: np.ndarray) -> float:
    """Area under `coverage_accuracy`: the mean accuracy over all coverages.

    A margin that tells nothing about being right gives the plain accuracy in expectation, and exactly that
    when all margins are equal. One minus it is the AURC of Geifman, Uziel & El-Yaniv (2019, "Bias-reduced
    uncertainty estimation for deep neural classifiers", ICLR).
    """
    return float(coverage_accuracy(margin, hit)["accuracy"].mean())


@dataclass(frozen=True)
class _Relevant:
    """Relevant candidates of a chunk of queries, one entry each, ordered by row and then by rank.

    A rank is uniform on `start` + 1 … `end`: `start` candidates score higher and `end` - `start` the same, of
    which `above` and `tied` are relevant (`end` and `tied` count the candidate itself).
    """

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    level: np.ndarray
    above: np.ndarray
    tied: np.ndarray

    @property
    def size(self) -> np.ndarray:
        return self.end - self.start


def _relevant(scores: np.ndarray, relevance: np.ndarray) -> _Relevant:
    order = np.argsort(-scores, axis=1)
    scores = np.take_along_axis(scores, order, axis=1)
    relevance = np.take_along_axis(relevance, order, axis=1)
    n, c = scores.shape
    steps = scores[:, 1:] != scores[:, :-1]
    start, end = np.zeros((n, c), np.int32), np.full((n, c), c, np.int32)
    start[:, 1:] = np.where(steps, np.arange(1, c), 0)
    end[:, :-1] = np.where(steps, np.arange(1, c), c)
    start = np.maximum.accumulate(start, axis=1)
    end = np.minimum.accumulate(end[:, ::-1], axis=1)[:, ::-1]
    found = np.zeros((n, c + 1), np.int32)
    np.cumsum(relevance > 0, axis=1, out=found[:, 1:])
    row, position = np.nonzero(relevance)
    start, end = start[row, position], end[row, position]
    above = found[row, start]
    return _Relevant(row, start, end, relevance[row, position], above, found[row, end] - above)


def _chunk_metrics(scores: np.ndarray, relevance: np.ndarray, ks: tuple[int, ...]) -> pd.DataFrame:
    n, c = scores.shape
    entries = _relevant(scores, relevance)
    size = entries.size
    ranks = np.arange(1, max(c, *ks, MRR_CUT) + 1)
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / ranks)])
    discount = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(ranks + 1.0))])

    def mean_over_ranks(cumulative, k):
        """Mean over the possible ranks of each entry of a function of the rank that is 0 beyond rank `k`."""
        return (cumulative[np.minimum(entries.end, k)] - cumulative[np.minimum(entries.start, k)]) / size

    exact = entries.level == 2

    def of_exact(values, absent=0.0):
        column = np.full(n, absent)
        column[entries.row[exact]] = values[exact]
        return column

    gain = 2.0**entries.level - 1.0
    n_exact = np.bincount(entries.row[exact], minlength=n)
    n_relevant = np.bincount(entries.row, minlength=n)
    columns = {
        "rank": of_exact((entries.start + entries.end + 1) / 2.0, absent=np.nan),
        "mrr": of_exact(mean_over_ranks(harmonic, c)),
        f"mrr@{MRR_CUT}": of_exact(mean_over_ranks(harmonic, MRR_CUT)),
    }
    for k in ks:
        columns[f"exact_hit@{k}"] = of_exact(mean_over_ranks(np.arange(len(harmonic)), k))
    for k in ks:
        columns[f"relevant_hit@{k}"] = _relevant_hit(entries, n, k)
    for k in ks:
        ideal = 3.0 * discount[np.minimum(n_exact, k)]
        ideal += discount[np.minimum(n_relevant, k)] - discount[np.minimum(n_exact, k)]
        found = np.bincount(entries.row, gain * mean_over_ranks(discount, k), minlength=n)
        columns[f"ndcg@{k}"] = np.divide(found, ideal, out=np.zeros(n), where=ideal > 0)
    for k in ks:
        columns[f"ndcg_binary@{k}"] = of_exact(mean_over_ranks(discount, k))
    precision = np.bincount(entries.row, _precision(entries, harmonic), minlength=n)
    columns["ap"] = precision / np.maximum(n_relevant, 1)
    best = np.partition(scores, c - 2, axis=1)[:, -2:]
    columns["margin"] = np.subtract(best[:, 1], best[:, 0], out=np.zeros(n), where=best[:, 1] != best[:, 0])
    return pd.DataFrame(columns)


def _relevant_hit(entries: _Relevant, n: int, k: int) -> np.ndarray:
    """Probability that the first `k` ranks hold a relevant candidate.

    Only the best-scored relevant tie group decides: none stands above it. With e candidates in it, r of them
    relevant, and s of the first k ranks, all s go to irrelevant ones with probability C(e-r, s) / C(e, s).
    """
    rows, first = np.unique(entries.row, return_index=True)
    start, size, tied = entries.start[first], entries.size[first], entries.tied[first]
    slots = np.clip(k - start, 0, size)
    missed = np.ones(len(rows))
    for drawn in range(k):
        left = np.maximum(size - tied - drawn, 0) / np.maximum(size - drawn, 1)
        missed *= np.where(drawn < slots, left, 1.0)
    hit = np.zeros(n)
    hit[rows] = 1.0 - missed
    return hit


def _precision(entries: _Relevant, harmonic: np.ndarray) -> np.ndarray:
    """Expected precision at the rank of each relevant candidate.

    At place i of a tie group of e candidates, r relevant, behind g candidates, R relevant, the candidate has
    R + 1 + (i - 1) (r - 1) / (e - 1) relevant ones up to itself in expectation. The mean over i = 1 … e of
    that divided by g + i is the expression below.
    """
    size = entries.size
    others = (entries.tied - 1) / np.maximum(size - 1, 1)
    inverse_ranks = harmonic[entries.end] - harmonic[entries.start]
    return ((entries.above + 1 - others * (entries.start + 1)) * inverse_ranks + others * size) / size


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise ValueError(f"scores: expected queries x at least 2 candidates, got shape {scores.shape}")
    if scores.dtype.kind in "iub":
        scores = scores.astype(np.float64)
    if scores.dtype not in DECIMALS:
        raise ValueError(f"scores: expected float64 or float32, got {scores.dtype}")
    missing = np.isnan(scores).any(axis=1).sum()
    if missing:
        raise ValueError(f"scores: expected numbers, got NaN in {missing} of {len(scores)} queries")
    return scores


def _rounded(scores: np.ndarray) -> np.ndarray:
    return np.round(scores.astype(np.float64), DECIMALS[scores.dtype])
