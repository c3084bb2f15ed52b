"""What a hit rate is to be read against: replicates, a positive control, and a bound where there is one.

Replicates say how well one read-out finds a condition by other cells of the same kind. No other method is bounded by
it.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from .metrics import rank_top
from .retrieval import directions, match
from .stats import Estimates, cluster_bootstrap, cluster_mean

# Positive control: queries that are asked, at most.
_QUERIES = 1000


def replicates(
    embeddings: np.ndarray,
    conditions: np.ndarray,
    *,
    batch: np.ndarray | None = None,
    guide: np.ndarray | None = None,
    whiten: tuple[np.ndarray, np.ndarray] | None = None,
    n_draws: int = 10,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How often a condition is found by the mean of some of its cells, in a library of the means of others.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
        Cells in the order of condition and name.
    conditions : ndarray of str, shape (n,)
    batch, guide : ndarray of str, shape (n,), optional
    whiten : (mean, W), optional
        From `perturbret.evaluation.whitening.whitener`, fitted on training cells.
    n_draws : int
        How often halves are drawn; their hits are averaged.
    n_resamples : int
        Bootstrap resamples of conditions.
    seed : int

    Returns
    -------
    pandas.DataFrame
        Up to five rows. name: `halves` of each condition's cells, at random; `halves of batches`, which stay whole,
        where there are two or more; `guides`, each against the condition's other guides; the latter two also with the
        name `..., dealt out`, the same numbers of cells at random: what the batch or the guide itself costs is the
        difference. n_cells, the median behind a query; estimate, ci_low, ci_high of exact_hit@1, macro; chance;
        n_queries per draw; n_conditions. No row where no condition has two groups.
    """
    code, embeddings = np.unique(conditions, return_inverse=True)[1], np.asarray(embeddings, np.float64)
    rng = np.random.default_rng(seed)
    turns = pd.Series(code).groupby(code).cumcount().to_numpy() % 2
    drawn = {"halves": [dealt(turns, code, rng) for _ in range(n_draws)]}
    if batch is not None:
        batches, of = np.unique(batch, return_inverse=True)
        sides = [(rng.permutation(len(batches)) % 2)[of] for _ in range(n_draws if len(batches) > 1 else 0)]
        drawn["halves of batches"] = sides
        drawn["halves of batches, dealt out"] = [dealt(side, code, rng) for side in sides]
    if guide is not None:
        # A name such as g1 may stand for a guide of every condition.
        own = pd.DataFrame({"condition": code, "guide": guide}).groupby(["condition", "guide"]).ngroup()
        drawn["guides"] = [own.to_numpy()]
        drawn["guides, dealt out"] = [dealt(own.to_numpy(), code, rng) for _ in range(n_draws // 2 or 1)]
    rows = []
    for name, draws in drawn.items():
        found = [replicate_hits(embeddings, code, groups, whiten=whiten) for groups in draws]
        hits = pd.concat(found) if found else pd.DataFrame()
        if not len(hits):
            continue
        options = {"average": "macro", "bounds": (0, 1), "n_resamples": n_resamples, "seed": seed}
        mean = cluster_bootstrap(hits["hit"].to_numpy(), hits["condition"].to_numpy(), **options)
        row = {"name": name, "n_cells": hits["n_cells"].median(), "estimate": mean.estimate[0]}
        row |= {"ci_low": mean.low[0], "ci_high": mean.high[0], "chance": (1 / hits["n_candidates"]).mean()}
        rows.append(row | {"n_queries": len(hits) // len(draws), "n_conditions": hits["condition"].nunique()})
    return pd.DataFrame(rows)


def replicate_hits(
    embeddings: np.ndarray,
    code: np.ndarray,
    groups: np.ndarray,
    *,
    whiten: tuple[np.ndarray, np.ndarray] | None = None,
) -> pd.DataFrame:
    """Whether the mean of one group's cells is nearest to its condition's mean over the other groups, by cosine.

    Groups may be halves or batches, which conditions share: then no candidate has a cell of the query's group. Or
    guides of one condition each: then the query's own condition lacks these cells, and the others have all of theirs.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
    code : ndarray of int, shape (n,)
        Condition of each cell, numbered from 0.
    groups : ndarray of int, shape (n,)
    whiten : (mean, W), optional
        As for `replicates`.

    Returns
    -------
    pandas.DataFrame
        One row per condition and group where the condition has cells outside of the group: condition (its number),
        n_cells, n_candidates, hit (exact_hit@1, ties in expectation). Empty where there are none.
    """
    sizes = np.bincount(code)
    sums = _sums(embeddings, code, len(sizes))
    whole = directions(sums / sizes[:, None], whiten)
    pairs, place, counts = np.unique(groups * len(sizes) + code, return_inverse=True, return_counts=True)
    group, condition = np.divmod(pairs, len(sizes))
    bulks, parts = _sums(embeddings, place, len(pairs)), []
    for rows in np.split(np.arange(len(pairs)), np.flatnonzero(np.diff(group)) + 1):
        own, n_cells, part = condition[rows], counts[rows], bulks[rows]
        left = sizes[own] > n_cells
        candidates = np.delete(np.arange(len(sizes)), own[~left])
        own, part, n_cells = own[left], part[left], n_cells[left]
        if not len(own) or len(candidates) < 2:
            continue
        prototypes = whole.copy()
        prototypes[own] = directions((sums[own] - part) / (sizes[own] - n_cells)[:, None], whiten)
        queries = directions(part / n_cells[:, None], whiten)
        first = rank_top(match(queries, prototypes[candidates], np.arange(len(candidates))))
        hit = first[np.arange(len(own)), np.searchsorted(candidates, own)]
        parts.append((own, n_cells, np.full(len(own), len(candidates)), hit))
    columns = map(np.concatenate, zip(*parts, strict=True)) if parts else [np.empty(0)] * 4
    return pd.DataFrame(dict(zip(("condition", "n_cells", "n_candidates", "hit"), columns, strict=True)))


def dealt(groups: np.ndarray, within: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`groups` permuted among the cells that agree in `within`: groups of the same sizes that mean nothing."""
    found = np.empty_like(groups)
    found[np.argsort(within, kind="stable")] = groups[np.lexsort((rng.random(len(groups)), within))]
    return found


def duplicate_hits(
    queries: np.ndarray,
    conditions: np.ndarray,
    cells: np.ndarray,
    labels: np.ndarray,
    *,
    share: float,
    seed: int = 0,
) -> np.ndarray:
    """Positive control: exact_hit@1 of queries mixed with a cell of the library, by cosine to all cells of the library.

    Each query e becomes (1 - share) e + share p with p one library cell of its condition. With share 1 it is in the
    library, and only a machinery that cannot find what is there, or an embedding that gives other conditions the same
    direction, misses.

    Parameters
    ----------
    queries : ndarray, shape (q, d)
    conditions : ndarray of str, shape (q,)
        At most 1,000 queries, spread evenly, are asked, of those whose condition is in the library.
    cells : ndarray, shape (p, d)
    labels : ndarray of str, shape (p,)
        Condition of each library cell.
    share : float
    seed : int

    Returns
    -------
    ndarray, shape (n asked,)
    """
    order = np.argsort(labels, kind="stable")
    cells, labels = cells[order], np.asarray(labels)[order]
    names, starts, sizes = np.unique(labels, return_index=True, return_counts=True)
    asked = np.flatnonzero(np.isin(conditions, names))
    asked = asked[:: max(1, -(-len(asked) // _QUERIES))]
    true = np.searchsorted(names, conditions[asked])
    drawn = starts[true] + np.random.default_rng(seed).integers(sizes[true])
    mixed = (1 - share) * queries[asked] + share * cells[drawn]
    return rank_top(match(directions(mixed), directions(cells), starts))[np.arange(len(asked)), true]


def share_of_range(
    hit: np.ndarray,
    bound: np.ndarray,
    chance: np.ndarray,
    clusters: Sequence,
    *,
    average: str = "macro",
    n_resamples: int = 1000,
    seed: int = 0,
) -> Estimates:
    """Share of the range from chance to a bound that a method reaches: (hit - chance) / (bound - chance), of means.

    The interval is that of `cluster_bootstrap` for the linearised ratio r + (h - r b) / mean(b), h and b the excess of
    the method and of the bound over chance on one query (delta method). NaN where the bound is not above chance.

    Parameters
    ----------
    hit, bound, chance : ndarray, shape (q,)
        Of the same queries; `bound` by the exact posterior of a simulated screen: what only a read-out reaches is none.
    clusters, average, n_resamples, seed
        As for `cluster_bootstrap`.
    """
    excess, most = np.asarray(hit, float) - chance, np.asarray(bound, float) - chance
    mean, largest = cluster_mean(np.column_stack([excess, most]), clusters, average=average)
    if largest <= 0:
        return Estimates(*(np.full(1, np.nan) for _ in range(3)))
    linear = (mean + excess - mean / largest * most) / largest
    return cluster_bootstrap(linear, clusters, average=average, n_resamples=n_resamples, seed=seed)


def merged_hits(
    scores: np.ndarray, conditions: np.ndarray, names: Sequence[str], alike: pd.DataFrame
) -> pd.DataFrame:
    """Hits where any condition that counts as one with the query's own is ranked first.

    Parameters
    ----------
    scores : ndarray, shape (q, c)
    conditions : ndarray of str, shape (q,)
    names : sequence of str, length c
    alike : pandas.DataFrame of bool
        From `perturbret.evaluation.resolvability.merge_alike`; holds the queries' conditions and the candidates.

    Returns
    -------
    pandas.DataFrame
        A row per query: `merged_hit@1`, ties in expectation; `n_merged`, candidates that count; `chance`, their share.
    """
    labels, code = np.unique(conditions, return_inverse=True)
    counted = alike.loc[labels, list(names)].to_numpy()
    hit, n_merged = np.einsum("ij,ij->i", rank_top(scores), counted[code]), counted.sum(axis=1)[code]
    return pd.DataFrame({"merged_hit@1": hit, "n_merged": n_merged, "chance": n_merged / len(names)})


def _sums(rows: np.ndarray, code: np.ndarray, n: int) -> np.ndarray:
    """Sums of rows (m, d) by code, float64 (n, d)."""
    return csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))), shape=(n, len(code))) @ rows
