"""Simple answers that a better one has to beat, each a function from effects of singles to scores of candidates."""

import numpy as np
from scipy.stats import rankdata

from .task import PairTask

_BLOCK = 1 << 24  # composed values held at a time


def cosines(task: PairTask, gram: np.ndarray, queries: np.ndarray, first=1.0, second=1.0) -> np.ndarray:
    """Cosine of queries with first * s_i + second * s_j for all candidates (i, j), (len(queries), c).

    gram : inner products of singles, then queries, (n + q, n + q): no candidate is composed.
    """
    n, (i, j) = len(task.genes), task.candidates.T
    square = first**2 * gram[i, i] + second**2 * gram[j, j] + 2 * first * second * gram[i, j]
    lengths = np.sqrt(np.where(square > 1e-12 * square.max(initial=0), square, np.inf))
    asked = gram[n + queries]
    own = np.diag(gram)[n + queries]
    return (
        (first * asked[:, i] + second * asked[:, j])
        / lengths
        / np.sqrt(np.where(own > 0, own, np.inf))[:, None]
    )


def additive(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cosine with the sum of two singles."""
    return cosines(task, task.gram, queries)


def centred(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Additive, after the mean of all pairs of singles is subtracted from both sides."""
    mean = task.effects.mean(axis=0)
    values = np.concatenate([task.effects - mean, task.values - 2 * mean])
    return cosines(task, values @ values.T, queries)


def scaled(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Cosine with c1 s1 + c2 s2, s1 the single of the larger effect, c by least squares on other doubles."""
    first = stronger(task, task.candidates)
    c1, c2 = dominance(task, train)
    return cosines(task, task.gram, queries, np.where(first, c1, c2), np.where(first, c2, c1))


def dominance(task: PairTask, train: np.ndarray) -> tuple[float, float]:
    """Coefficients of the stronger and the weaker single over the doubles `train`; 1 and 1 where there are none."""
    if not len(train):
        return 1.0, 1.0
    pairs = task.members[train]
    strong, weak = np.where(stronger(task, pairs), pairs.T, pairs.T[::-1])
    parts = np.stack([task.effects[strong].ravel(), task.effects[weak].ravel()], 1)
    c1, c2 = np.linalg.lstsq(parts, task.values[train].ravel(), rcond=None)[0]
    return float(c1), float(c2)


def stronger(task: PairTask, pairs: np.ndarray) -> np.ndarray:
    """Whether the first single of each pair has the larger effect, or an equal one."""
    size = np.diag(task.gram)
    return size[pairs[:, 0]] >= size[pairs[:, 1]]


def differential_rank(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Spearman correlation with the sum of two singles: the order of genes from most lowered to most raised."""
    asked = _ranked(task.values[queries])
    step = max(1, _BLOCK // task.effects.shape[1])
    blocks = (task.candidates[at : at + step].T for at in range(0, len(task.candidates), step))
    return np.concatenate([asked @ _ranked(task.effects[i] + task.effects[j]).T for i, j in blocks], axis=1)


def norm_only(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """How near the size of the effect is to that of the sum of two singles; nothing else."""
    i, j = task.candidates.T
    gram = task.gram
    sizes = np.sqrt(np.where(i == j, gram[i, i], gram[i, i] + gram[j, j] + 2 * gram[i, j]).clip(0))
    return -np.abs(np.linalg.norm(task.values[queries], axis=1)[:, None] - sizes)


def own_targets(task: PairTask, train: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Sum over the genes of a candidate of the z-score of their own expression: are the two most changed these?

    z is against the other singles, and counts in the direction in which most singles change their own target; genes
    that are not measured, or masked, count 0.
    """
    n = len(task.genes)
    others = np.where(np.eye(n, dtype=bool), np.nan, task.own[:n])
    known = ~np.isnan(task.own).any(axis=0)
    direction = np.sign(np.nansum(np.sign(np.diag(task.own)[known]))) or 1.0
    z = np.zeros((len(queries), n))
    spread = np.nanstd(others[:, known], axis=0)
    z[:, known] = direction * (task.own[n + queries][:, known] - np.nanmean(others[:, known], axis=0))
    z[:, known] /= np.where(spread > 0, spread, np.inf)
    i, j = task.candidates.T
    return np.where(i == j, z[:, i], z[:, i] + z[:, j])


def _ranked(values: np.ndarray) -> np.ndarray:
    """Ranks of each row's values, centred and scaled to length 1."""
    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=1, keepdims=True)
    return ranks / np.where(lengths > 0, lengths, np.inf)
