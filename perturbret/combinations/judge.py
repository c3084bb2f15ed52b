"""How well scores of candidate pairs name the two genes: a row per query and candidate set, then means by gene."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..evaluation.metrics import per_query, relevance
from .task import CANDIDATE_SETS, PairTask

HITS = (1, 8)
GENES = (2, 4, 8)
METRICS = ("exact_hit@1", "exact_hit@8", "relevant_hit@1", *(f"both_genes@{k}" for k in GENES), "mrr")


def judge(task: PairTask, scores: np.ndarray, queries: Sequence[int] | None = None) -> pd.DataFrame:
    """Metrics of every query among each candidate set, ties in expectation.

    Parameters
    ----------
    task : PairTask
    scores : ndarray of float, shape (q, c)
        Of all of `task.candidates`, for every query, or for those given. Higher is more likely.
    queries : sequence of int, optional
        Rows of the task's queries that the scores are of.

    Returns
    -------
    DataFrame
        `query`, `candidates` (the set), `first` (the best candidate; the first of equals), `rank` and `METRICS`;
        defined in docs/method.md.
    """
    asked = np.arange(len(task.queries)) if queries is None else np.asarray(queries)
    names, tables = np.array(task.queries)[asked], []
    for which in CANDIDATE_SETS:
        chosen = task.candidate_set(which)
        held, conditions = scores[:, chosen], task.names[chosen]
        table = per_query(held, relevance(names, conditions), HITS)
        best = by_gene(held, task.candidates[chosen], len(task.genes))
        for k in GENES:
            table[f"both_genes@{k}"] = both_within(best, task.members[asked], k)
        table.insert(0, "query", names)
        table.insert(1, "candidates", which)
        table.insert(2, "first", conditions[held.argmax(axis=1)])
        tables.append(table[["query", "candidates", "first", "rank", *METRICS]])
    return pd.concat(tables, ignore_index=True)


def by_gene(scores: np.ndarray, pairs: np.ndarray, n: int) -> np.ndarray:
    """Best score of a candidate that holds each of n genes, (q, n); -inf where none does."""
    best = np.full((len(scores), n), -np.inf)
    for gene in np.unique(pairs):
        best[:, gene] = scores[:, (pairs == gene).any(axis=1)].max(axis=1)
    return best


def both_within(scores: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    """Whether both true genes are among the k genes that score highest: the mean over all orders of equals.

    Parameters
    ----------
    scores : ndarray, shape (q, n)
        Of genes; rounded to 9 decimals, as those of conditions are.
    members : ndarray of int, shape (q, 2)
    k : int

    Returns
    -------
    ndarray, shape (q,)
        Of a group of e equals, s have a place among the first k: each of them with probability s / e, two of the same
        group with s (s - 1) / (e (e - 1)).
    """
    scores = np.round(scores, 9)
    own = np.take_along_axis(scores, members, axis=1)
    above = (scores[:, None, :] > own[:, :, None]).sum(axis=2)
    equal = (scores[:, None, :] == own[:, :, None]).sum(axis=2)
    places = np.clip(k - above, 0, equal)
    each = places / equal
    same = own[:, 0] == own[:, 1]
    together = places[:, 0] * (places[:, 0] - 1) / np.maximum(equal[:, 0] * (equal[:, 0] - 1), 1)
    return np.where(same, together, each.prod(axis=1))


def gene_interval(
    values: np.ndarray, members: np.ndarray, *, level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over doubles with percentile intervals that resample genes.

    Genes are drawn with replacement, as many as ask, and a double counts as often as the product of the draws of its
    two genes (the pigeonhole bootstrap: Owen 2007, "The pigeonhole bootstrap", Ann Appl Stat 1:386; for graphs
    Snijders & Borgatti 1999, Connections 22:161). Doubles with a common gene vary together; the interval is
    conservative where genes matter little.

    Parameters
    ----------
    values : ndarray, shape (q,) or (q, m)
    members : ndarray of int, shape (q, 2)

    Returns
    -------
    mean, low, high : ndarray, shape (m,)
        The ends are NaN where fewer than three genes ask.

    Examples
    --------
    >>> hits = np.array([1, 1, 0, 0])
    >>> mean, low, high = gene_interval(hits, np.array([[0, 1], [0, 2], [3, 4], [3, 5]]))
    >>> mean.tolist(), bool(low[0] < 0.2), bool(high[0] > 0.8)
    ([0.5], True, True)
    """
    values = np.asarray(values, float).reshape(len(members), -1)
    genes, rows = np.unique(members, return_inverse=True)
    mean, n = values.mean(axis=0), len(genes)
    if n < 3:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
    weights = drawn[:, rows.reshape(-1, 2)].prod(axis=2).astype(float)
    weights = weights[weights.sum(axis=1) > 0]
    resampled = weights @ values / weights.sum(axis=1, keepdims=True)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, low, high
