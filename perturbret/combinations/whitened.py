"""Additive composition where directions in which effects differ anyway count less."""

import numpy as np
from scipy.linalg import solve

from .opponents import cosines
from .task import PairTask


def whitened(
    task: PairTask,
    train: np.ndarray,
    queries: np.ndarray,
    *,
    ridge: float,
    doubles: float = 0.0,
) -> np.ndarray:
    """Cosine with the sum of two singles, after whitening.

    Whitening is by W = S'S + `doubles` Y'Y + `ridge` I, with the singles S and the doubles Y of `train` as rows, each
    kind scaled to a mean squared length of 1, around 0 (no effect). So a ridge of 1 is as large as the mean
    eigenvalue of S'S. As the ridge goes to 0, the ranking is that of the sum of two coefficients when all singles are
    fitted to the query at once.

    By Woodbury's identity only inner products are needed: with rows M and weights w, M'diag(w)M + r I has the inverse
    (I - M' (M M' + r diag(1 / w))^-1 M) / r.
    """
    n, size = len(task.genes), np.diag(task.gram)
    rows, weights = np.arange(n), np.full(n, 1 / max(size[:n].mean(), 1e-300))
    if doubles and len(train):
        rows = np.concatenate([rows, n + train])
        weights = np.concatenate(
            [weights, np.full(len(train), doubles / max(size[n + train].mean(), 1e-300))]
        )
    used = np.concatenate([np.arange(n), n + queries])
    onto = task.gram[np.ix_(rows, used)]
    inner = task.gram[np.ix_(rows, rows)] + ridge * np.diag(1 / weights)
    gram = np.zeros_like(task.gram)
    gram[np.ix_(used, used)] = task.gram[np.ix_(used, used)] - onto.T @ solve(inner, onto, assume_a="pos")
    return cosines(task, gram, queries)
