"""What an embedding looks like, whatever it is good for: how many dimensions it uses, its hubs, its trace of depth."""

import numpy as np

from .retrieval import COLLAPSED

# Leading components that depth is predicted from, and cells that are looked at, at most.
_COMPONENTS = 50
_CELLS = 5000
_FOLDS = 5


def spread(embeddings: np.ndarray) -> float:
    """Root mean square distance from the mean embedding, over the root mean square length."""
    values = embeddings.astype(np.float64)
    length = np.sqrt(np.square(values).sum(axis=1).mean())
    around = np.sqrt(np.square(values - values.mean(axis=0)).sum(axis=1).mean())
    return float(around / length) if length else 0.0


def effective_rank(embeddings: np.ndarray) -> float:
    """Number of dimensions that embeddings (n, d) use: exp of the entropy of their singular values, centred.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO. From 1 to min(n, d); 0
    where all embeddings are alike but for rounding errors.
    """
    if spread(embeddings) <= COLLAPSED:
        return 0.0
    values = np.sqrt(_components(_thinned(embeddings))[0])
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def depth_r2(embeddings: np.ndarray, totals: np.ndarray) -> float:
    """How well the embedding of a cell tells its depth: R2 of log total, 5-fold cross-validated.

    Least squares on the leading principal components (at most 50, at most a tenth of the cells). Negative where it is
    worse than the mean.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
        Cells in an order that does not hang on their file; every fifth is of one fold.
    totals : ndarray, shape (n,)
        UMIs of each cell, above 0.

    Returns
    -------
    float
        NaN where all totals are equal or there are fewer than 20 cells.
    """
    cells, depth = _thinned(embeddings), np.log(_thinned(totals))
    if len(cells) < 20 or np.ptp(depth) == 0:
        return np.nan
    places = _components(cells)[1][:, : min(_COMPONENTS, len(cells) // 10)]
    predicted, fold = np.empty(len(cells)), np.arange(len(cells)) % _FOLDS
    for number in range(_FOLDS):
        held = fold == number
        design = np.column_stack([np.ones(len(cells)), places])
        predicted[held] = design[held] @ np.linalg.lstsq(design[~held], depth[~held], rcond=None)[0]
    return float(1 - np.square(depth - predicted).sum() / np.square(depth - depth.mean()).sum())


def hubness(top: np.ndarray) -> dict[str, float]:
    """Whether some candidates are ranked first for far more queries than others.

    Parameters
    ----------
    top : ndarray, shape (q, c)
        Probability that each candidate is ranked first (`perturbret.evaluation.metrics.rank_top`).

    Returns
    -------
    dict
        `skewness` of the numbers of queries that the candidates are ranked first for, N_1 of Radovanovic, Nanopoulos &
        Ivanovic 2010, "Hubs in space", J Mach Learn Res 11:2487 (0 where all are equal); `largest`, the share of
        queries of the most frequent candidate; `never`, the share of candidates ranked first for less than half a
        query.
    """
    counts = top.sum(axis=0)
    centred = counts - counts.mean()
    deviation = np.sqrt(np.mean(centred**2))
    skewness = float(np.mean(centred**3) / deviation**3) if deviation > 1e-9 * counts.mean() else 0.0
    return {
        "skewness": skewness,
        "largest": float(counts.max() / len(top)),
        "never": float(np.mean(counts < 0.5)),
    }


def _thinned(rows: np.ndarray) -> np.ndarray:
    return rows[:: -(-len(rows) // _CELLS)]


def _components(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared singular values, descending, and places (n, k) along the principal components of embeddings (n, d)."""
    centred = embeddings.astype(np.float64) - embeddings.mean(axis=0, dtype=np.float64)
    wide = centred.shape[1] > len(centred)
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    return values, vectors * np.sqrt(values) if wide else centred @ vectors
