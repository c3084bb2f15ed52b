"""Scores of every double from doubles that share no gene with it, at a setting that was chosen in the same way."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..evaluation.metrics import DECIMALS
from ..files.hashing import mix, name_seeds
from .composers import Composer
from .task import PairTask

BLOCKS = 12


@dataclass(frozen=True)
class Nested:
    """Scores of a composer on doubles that took part neither in its fit nor in the choice of its setting.

    Attributes
    ----------
    scores : ndarray, shape (q, c)
    chosen : tuple of mapping, length q
        Setting at which each query was scored.
    """

    scores: np.ndarray
    chosen: tuple[Mapping, ...]


def deal(genes, blocks: int, seed: int = 0) -> np.ndarray:
    """Block of each gene, int (n,): equal numbers of genes, drawn by a hash of seed and name."""
    order = np.argsort(mix(name_seeds(f"{seed} {gene}" for gene in genes)))
    dealt = np.empty(len(order), int)
    dealt[order] = np.arange(len(order)) % blocks
    return dealt


def nested_scores(task: PairTask, composer: Composer, *, blocks: int = BLOCKS, seed: int = 0) -> Nested:
    """Leave the blocks of both genes out, twice.

    Genes are dealt into blocks. A double with genes in blocks u and v is scored by what was fitted to T, the doubles
    without any gene of u and v, at the setting with the best mrr over T; and for that choice a double of T with genes
    in blocks w and x is scored by what was fitted to the doubles without any gene of u, v, w, x. Ranks in the choice
    are among all pairs of singles; the first of equal settings wins. Singles are known throughout: combinations are
    made of them.

    Parameters
    ----------
    task : PairTask
    composer : Composer
    blocks, seed : int
        More blocks leave more doubles to learn from, and take longer: about blocks**4 / 24 fits of each setting.
    """
    block = deal(task.genes, min(blocks, len(task.genes)), seed)
    groups = [frozenset(block[pair].tolist()) for pair in task.members]
    whole = frozenset(block.tolist())
    settings, everyone = list(composer.settings), np.arange(len(groups))

    def free(out) -> np.ndarray:
        return np.array([q for q in everyone if not groups[q] & out], int)

    @cache
    def scored_by_all(number: int) -> np.ndarray:
        """Of a composer that learns nothing: doubles that are left out change nothing."""
        return composer.score(task, everyone[:0], everyone, **settings[number])

    def score(number: int, out: frozenset, asked: np.ndarray) -> np.ndarray:
        if not composer.learns:
            return scored_by_all(number)[asked]
        return composer.score(task, free(out), asked, **settings[number])

    @cache
    def reciprocal_ranks(number: int, out: frozenset) -> dict[int, float]:
        """Of the doubles within the blocks `out`, from a fit to those without any of them."""
        asked = np.array([q for q in everyone if groups[q] <= out], int)
        scores = score(number, out, asked)[:, task.candidate_set("pairs")]
        return dict(zip(asked.tolist(), expected_reciprocal_rank(scores, task.true[asked]), strict=True))

    scores, chosen = np.empty((len(groups), len(task.candidates))), [{}] * len(groups)
    for out in dict.fromkeys(groups):
        train, best = free(out), 0
        if len(settings) > 1 and len(train):
            means = [
                np.mean(
                    [
                        reciprocal_ranks(number, out | groups[q] if composer.learns else whole)[int(q)]
                        for q in train
                    ]
                )
                for number in range(len(settings))
            ]
            best = int(np.argmax(np.round(means, 12)))
        asked = np.array([q for q in everyone if groups[q] == out], int)
        scores[asked] = score(best, out, asked)
        for q in asked:
            chosen[q] = settings[best]
    return Nested(scores, tuple(chosen))


def expected_reciprocal_rank(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    """mrr as in `perturbret.evaluation.metrics`, of the candidate `true` of each query, (q,), and nothing else."""
    scores = np.round(scores, DECIMALS[np.dtype(np.float64)])
    own = np.take_along_axis(scores, true[:, None], axis=1)
    above, equal = (scores > own).sum(axis=1), (scores == own).sum(axis=1)
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1.0, scores.shape[1] + 1))])
    return (sums[above + equal] - sums[above]) / equal
