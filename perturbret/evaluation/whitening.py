"""Whitening by the within-class covariance of training cells, with a shrinkage that retrieval chooses."""

from dataclasses import dataclass

import numpy as np

from .retrieval import COLLAPSED, directions, match, row_blocks

# Largest dimension whitened: its covariance takes 0.5 GB, and factorising it seconds to minutes.
MAX_WHITENED = 8192
# Largest dimension for which the shrinkage is searched; above it would take minutes.
MAX_SEARCHED = 1024
SHRINKAGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
FOLDS = 4
# Held-out cells scored per fold, about.
_HELD_OUT = 2000


@dataclass(frozen=True)
class _Within:
    """Moments of cells by class: deviations from class means have `covariance` (d, d).

    `ledoit_wolf` is the shrinkage intensity of Ledoit & Wolf (2004), `collapsed` is whether nothing varies
    within classes but for rounding errors.
    """

    mean: np.ndarray
    class_means: np.ndarray
    covariance: np.ndarray
    ledoit_wolf: float
    collapsed: bool


def whitener(
    embeddings: np.ndarray, conditions: np.ndarray, *, shrinkage: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Whitening of the within-class covariance of training cells.

    The covariance S of the deviations from the class means is shrunk to (1 - a) S + a tr(S) / d I, with a the
    larger of `shrinkage` and the intensity of Ledoit & Wolf (2004, "A well-conditioned estimator for
    large-dimensional covariance matrices", J Multivariate Anal 88:365). It is therefore invertible for any
    number of cells and dimensions, rank-deficient embeddings included. W is its inverse Cholesky factor: it
    differs from the symmetric inverse square root by a rotation only, which cosines do not see, and is much
    cheaper.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
        Of training cells, and of those only: whitening fitted on the evaluated cells inflates.
    conditions : ndarray of str, shape (n,)
    shrinkage : float
        From 0 to 1; see `choose_shrinkage`.

    Returns
    -------
    mean : ndarray, shape (d,)
        Of all cells.
    W : ndarray, shape (d, d)
        W @ W.T is the inverse of the shrunk covariance; a row vector is whitened by (x - mean) @ W. The
        identity where nothing varies within classes.

    Raises
    ------
    ValueError
        No cells, lengths differ, d is above `MAX_WHITENED`, or `shrinkage` is not between 0 and 1.

    Examples
    --------
    >>> conditions = np.repeat(["A", "B"], 1000)
    >>> noise = np.random.default_rng(0).normal(size=(2000, 2)) * [2.0, 1.0]
    >>> mean, matrix = whitener(noise + 5.0 * (conditions == "A")[:, None], conditions)
    >>> (noise @ matrix).std(axis=0).round(1).tolist()
    [1.0, 1.0]
    """
    from scipy.linalg.lapack import dtrtri

    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage: expected a number from 0 to 1, got {shrinkage}")
    embeddings, codes = _checked(embeddings, conditions)
    within = _within(embeddings, codes)
    d = len(within.mean)
    if within.collapsed:
        return within.mean, np.eye(d)
    intensity = max(shrinkage, within.ledoit_wolf)
    covariance = (1 - intensity) * within.covariance
    covariance[np.diag_indices(d)] += intensity * np.trace(within.covariance) / d
    inverse, _ = dtrtri(np.linalg.cholesky(covariance), lower=1)
    return within.mean, inverse.T


def choose_shrinkage(embeddings: np.ndarray, conditions: np.ndarray) -> float:
    """The shrinkage of `SHRINKAGES` with which training cells retrieve their own conditions best.

    Ledoit & Wolf's intensity makes the covariance accurate in squared error, in which the few directions of
    large variance count. Retrieval hinges on the many of small variance, and gains from more shrinkage, the
    more dimensions there are. So it is chosen by cross-validation among the training cells: the cells of each
    condition are dealt out to `FOLDS` folds, and those of one fold are ranked against the means of the others
    by whitened cosine. The criterion is the mean reciprocal rank.

    Parameters
    ----------
    embeddings : ndarray, shape (n, d)
        Of training cells. Cells are dealt out in the order given.
    conditions : ndarray of str, shape (n,)

    Returns
    -------
    float
        0 (which leaves it to Ledoit & Wolf) where nothing speaks for more, and for d above `MAX_SEARCHED`.

    Raises
    ------
    ValueError
        As `whitener`.
    """
    embeddings, codes = _checked(embeddings, conditions)
    if embeddings.shape[1] > MAX_SEARCHED:
        return 0.0
    order = np.argsort(codes, kind="stable")
    fold = np.empty(len(codes), int)
    fold[order] = np.arange(len(codes)) - np.searchsorted(codes[order], codes[order])
    fold %= FOLDS
    found = np.zeros(len(SHRINKAGES))
    for number in range(FOLDS):
        kept = fold != number
        present = np.unique(codes[kept])
        held = np.flatnonzero(~kept & np.isin(codes, present))
        held = held[:: max(1, len(held) // _HELD_OUT)]
        within = _within(embeddings[kept], np.searchsorted(present, codes[kept])) if len(held) else None
        if within is None or within.collapsed:
            continue
        true = np.searchsorted(present, codes[held])
        values, vectors = np.linalg.eigh(within.covariance)
        # Along the eigenvectors whitening is a division, whatever the shrinkage: rotate once.
        cells, prototypes = (
            (part - within.mean) @ vectors for part in (embeddings[held], within.class_means)
        )
        for i, shrinkage in enumerate(SHRINKAGES):
            intensity = max(shrinkage, within.ledoit_wolf)
            spread = np.sqrt((1 - intensity) * np.maximum(values, 0) + intensity * values.mean())
            scores = match(
                directions(cells / spread), directions(prototypes / spread), np.arange(len(present))
            )
            found[i] += _reciprocal_ranks(scores, true).sum()
    return SHRINKAGES[int(np.round(found, 9).argmax())]


def _reciprocal_ranks(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    own = scores[np.arange(len(true)), true][:, None]
    return 1 / ((scores > own).sum(axis=1) + ((scores == own).sum(axis=1) + 1) / 2)


def _checked(embeddings: np.ndarray, conditions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    embeddings, conditions = np.asarray(embeddings), np.asarray(conditions, str)
    if embeddings.ndim != 2 or len(embeddings) != len(conditions) or not embeddings.size:
        raise ValueError(
            f"embeddings: expected cells x dimensions for {len(conditions)} conditions, got shape "
            f"{embeddings.shape}"
        )
    if embeddings.shape[1] > MAX_WHITENED:
        raise ValueError(
            f"whitened scoring: expected embeddings of at most {MAX_WHITENED} dimensions, got "
            f"{embeddings.shape[1]}; reduce them first (PCA), or leave `whitened` out of the scorings"
        )
    return embeddings, np.unique(conditions, return_inverse=True)[1]


def _within(embeddings: np.ndarray, codes: np.ndarray) -> _Within:
    n, d = embeddings.shape
    mean = embeddings.mean(axis=0, dtype=np.float64)
    of_class = [embeddings[codes == code].mean(axis=0, dtype=np.float64) for code in range(codes.max() + 1)]
    class_means = np.stack(of_class)
    covariance, fourth = np.zeros((d, d)), 0.0
    for block in row_blocks(n, 8 * d):
        deviations = embeddings[block] - class_means[codes[block]]
        covariance += deviations.T @ deviations
        fourth += (np.einsum("ij,ij->i", deviations, deviations) ** 2).sum()
    covariance /= n
    trace, squared = np.trace(covariance), (covariance**2).sum()
    distance = squared - trace**2 / d
    intensity = min((fourth / n - squared) / n, distance) / distance if distance > 0 else 0.0
    # The floor keeps the factorisation possible where a great many cells leave almost no shrinkage.
    intensity = max(intensity, 1e-8)
    return _Within(mean, class_means, covariance, intensity, bool(trace <= COLLAPSED**2 * (mean @ mean)))
