"""Multinomial logistic regression on sparse counts: scikit-learn's objective, solved in tens of passes.

With n cells, features x, classes y and lambda = 1 / (C n), the objective is

    f(W, b) = 1/n sum_i [logsumexp_k(x_i W + b) - (x_i W + b)_{y_i}] + lambda/2 ||W||^2,

that of `sklearn.linear_model.LogisticRegression` divided by C n (intercept not penalised). Plain L-BFGS needs
hundreds of passes over the matrix, since expression features are strongly correlated. Here

- features are centred implicitly (the intercept absorbs it), which takes out the dominant direction;
- L-BFGS starts each step from an approximate Hessian, per class `h_k cov(X) + lambda I` with h_k the present mean
  of p_k (1 - p_k), inverted through the leading eigenvectors of the covariance, which serve every C (Böhning,
  Ann. Inst. Stat. Math. 44, 1992, uses a similar bound);
- logits are carried along, so that the line search is free and a step costs one product with the features
  and one with their transpose.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from scipy.sparse import csr_matrix, issparse

from .spectrum import Spectrum, spectrum

HISTORY = 10
# A preconditioner need be neither complete nor exact: ranks above 100 saved no iteration on real screens.
RANK = 100
SPECTRUM_CELLS = 20_000
_BLOCK_ROWS = 2048
_BLOCK_COLUMNS = 512


@dataclass(frozen=True)
class Logistic:
    """A fitted model: logits = x @ coef + intercept.

    Attributes
    ----------
    coef : ndarray, shape (n_features, n_classes)
    intercept : ndarray, shape (n_classes,)
        Sums to 0.
    objective : float
        f(W, b), nats per cell.
    decrement : float
        Estimate of what is left to gain, nats per cell: half the gradient times the quasi-Newton step.
    n_iter : int
    converged : bool
    """

    coef: np.ndarray
    intercept: np.ndarray
    objective: float
    decrement: float
    n_iter: int
    converged: bool


def preconditioner(features) -> Spectrum:
    """What `fit_logistic` uses of the features' covariance, from at most about `SPECTRUM_CELLS` cells."""
    sample = features[:: max(1, -(-features.shape[0] // SPECTRUM_CELLS))]
    return spectrum(sample, RANK, iterations=2)


def fit_logistic(
    features,
    classes: np.ndarray,
    n_classes: int,
    *,
    C: float,
    tol: float = 1e-5,
    max_iter: int = 200,
    basis: Spectrum | None = None,
    threads: int | None = None,
) -> Logistic:
    """Minimise f(W, b).

    Parameters
    ----------
    features : csr_matrix or ndarray, shape (n, p), float32 or float64
        Arithmetic is done in this precision.
    classes : ndarray of int, shape (n,)
        Values 0 .. n_classes - 1, each present.
    C : float
        Inverse strength of the L2 penalty, as in scikit-learn.
    tol : float
        Stop when the decrement falls below this many nats per cell.
    max_iter : int
    basis : Spectrum, optional
        Of the same features, from `preconditioner`; made when not given.
    threads : int, optional
        Default: OMP_NUM_THREADS, else the CPUs this process may use. The result does not depend on it.

    Raises
    ------
    ValueError
        Shapes disagree, a class is absent, C is not positive, or a feature is not finite.
    """
    features = _checked(features, classes, n_classes, C)
    basis = preconditioner(features) if basis is None else basis
    with ThreadPoolExecutor(threads or _threads()) as pool:
        return _minimise(_Problem(features, classes, n_classes, C, basis, pool), tol, max_iter)


def _checked(features, classes, n_classes, C):
    if not issparse(features):
        features = np.ascontiguousarray(features)
    elif features.format != "csr":
        features = csr_matrix(features)
    if features.dtype not in (np.float32, np.float64):
        raise ValueError(f"features: expected float32 or float64, got {features.dtype}")
    if features.shape[0] != len(classes):
        raise ValueError(
            f"classes: expected {features.shape[0]} values, one per row of features, got {len(classes)}"
        )
    absent = np.setdiff1d(np.arange(n_classes), classes)
    if len(absent) or np.max(classes) >= n_classes or np.min(classes) < 0:
        raise ValueError(
            f"classes: expected every value of 0..{n_classes - 1} and no other, absent: {absent[:5]}"
        )
    if not C > 0:
        raise ValueError(f"C: expected a positive number, got {C}")
    if not np.isfinite(features.data if issparse(features) else features).all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    return features


class _Problem:
    """Objective, gradient and preconditioner.

    A point is one (p + 1, K) array, its last row the intercept of centred features.
    """

    def __init__(self, features, classes, n_classes, C, basis, pool):
        n, p = features.shape
        self.n, self.p, self.k, self.pool, self.dtype = n, p, n_classes, pool, features.dtype
        self.penalty = 1.0 / (C * n)
        self.mean = basis.mean
        self.rows = [slice(i, min(i + _BLOCK_ROWS, n)) for i in range(0, n, _BLOCK_ROWS)]
        self.blocks = [features[rows] for rows in self.rows]
        # Tiles, for a product by the transpose would otherwise read residuals all over memory.
        columns = [slice(j, j + _BLOCK_COLUMNS) for j in range(0, p, _BLOCK_COLUMNS)]
        turned = [block.T.tocsr() if issparse(block) else block.T for block in self.blocks]
        self.tiles = [[part[some] for part in turned] for some in columns]
        self.classes = classes
        self.frequency = (np.bincount(classes, minlength=n_classes) / n).astype(self.dtype)
        self.basis = basis

    def each(self, function, items):
        return list(self.pool.map(function, items))

    def logits(self, point):
        weights, intercept = np.ascontiguousarray(point[:-1]), point[-1] - self.mean @ point[:-1]
        return self.each(lambda block: np.asarray(block @ weights) + intercept, self.blocks)

    def loss(self, logits):
        """Mean loss without penalty, and class probabilities by block."""
        sums, probabilities = zip(*self.each(self._softmax, zip(logits, self.rows, strict=True)), strict=True)
        return float(np.sum(sums)) / self.n, list(probabilities)

    def _softmax(self, item):
        logits, rows = item
        shifted = logits - logits.max(axis=1, keepdims=True)
        true = shifted[np.arange(len(shifted)), self.classes[rows]].sum(dtype=np.float64)
        np.exp(shifted, out=shifted)
        sums = shifted.sum(axis=1, keepdims=True)
        shifted /= sums
        return np.log(sums).sum(dtype=np.float64) - true, shifted

    def gradient(self, point, probabilities):
        """Gradient at a point; `probabilities` are overwritten. Sets the classes' mean p (1 - p)."""
        sums = np.sum([block.sum(axis=0) for block in probabilities], axis=0)
        squares = np.sum([np.einsum("ij,ij->j", block, block) for block in probabilities], axis=0)
        self.spread = np.maximum((sums - squares) / self.n, 1e-6)
        for block, rows in zip(probabilities, self.rows, strict=True):
            block[np.arange(len(block)), self.classes[rows]] -= 1
            block /= self.n
        total = sums / self.n - self.frequency
        gradient = np.empty_like(point)
        gradient[:-1] = np.concatenate(
            self.each(lambda tiles: self._summed(tiles, probabilities), self.tiles)
        )
        gradient[:-1] += self.dtype.type(self.penalty) * point[:-1] - np.outer(self.mean, total)
        gradient[-1] = total
        return gradient

    @staticmethod
    def _summed(tiles, residuals):
        total = np.asarray(tiles[0] @ residuals[0])
        for tile, block in zip(tiles[1:], residuals[1:], strict=True):
            total += tile @ block
        return total

    def precondition(self, gradient):
        """The approximate inverse Hessian times `gradient`; eigenvalues after the leading ones count as their mean."""
        vectors, values = self.basis.vectors, self.basis.values[:, None]
        penalty = self.dtype.type(self.penalty)
        rest = 1.0 / (self.spread * self.dtype.type(self.basis.rest) + penalty)
        scale = 1.0 / (self.spread * values + penalty)
        step = np.empty_like(gradient)
        step[:-1] = rest * gradient[:-1] + vectors @ ((scale - rest) * (vectors.T @ gradient[:-1]))
        step[-1] = gradient[-1] / self.spread
        return step

    def search(self, point, logits, direction, along):
        """Step length by safeguarded Newton on the convex function along `direction`, without a product."""
        norm, cross = _dot(direction[:-1], direction[:-1]), _dot(point[:-1], direction[:-1])
        low, high, step = 0.0, np.inf, 1.0
        for _ in range(12):
            parts = self.each(self._slopes, zip(logits, along, self.rows, repeat(step)))
            slope, bend = np.sum(parts, axis=0) / self.n
            slope += self.penalty * (cross + step * norm)
            bend += self.penalty * norm
            low, high = (low, step) if slope > 0 else (step, high)
            following = step - slope / bend
            if not low < following < high:
                following = 2 * low if np.isinf(high) else (low + high) / 2
            if abs(following - step) < 0.05 * step:
                return following
            step = following
        return step

    def _slopes(self, item):
        """Sums over some cells of the loss's first and second derivative along a direction."""
        logits, along, rows, step = item
        moved = logits + self.dtype.type(step) * along
        moved -= moved.max(axis=1, keepdims=True)
        np.exp(moved, out=moved)
        moved /= moved.sum(axis=1, keepdims=True)
        first = np.einsum("ij,ij->i", moved, along)
        moved *= along
        second = np.einsum("ij,ij->i", moved, along)
        true = along[np.arange(len(along)), self.classes[rows]]
        return np.array([(first - true).sum(dtype=np.float64), (second - first**2).sum(dtype=np.float64)])


def _minimise(problem, tol, max_iter):
    point = np.zeros((problem.p + 1, problem.k), problem.dtype)
    point[-1] = np.log(problem.frequency)
    logits = problem.logits(point)
    loss, probabilities = problem.loss(logits)
    gradient = problem.gradient(point, probabilities)
    steps, changes = [], []
    decrement, iteration = np.inf, 0
    for iteration in range(max_iter + 1):
        direction, decrement = _direction(problem, gradient, steps, changes)
        if decrement < tol or iteration == max_iter:
            break
        along = problem.logits(direction)
        step = problem.dtype.type(problem.search(point, logits, direction, along))
        moved = point + step * direction
        for block, change in zip(logits, along, strict=True):
            block += step * change
        loss, probabilities = problem.loss(logits)
        new_gradient = problem.gradient(moved, probabilities)
        # Positive by convexity, but for rounding once nothing is left to gain.
        if _dot(moved - point, new_gradient - gradient) > 0:
            steps.append(moved - point)
            changes.append(new_gradient - gradient)
            del steps[:-HISTORY], changes[:-HISTORY]
        point, gradient = moved, new_gradient
    if decrement >= tol:
        warnings.warn(
            f"logistic regression stopped after {max_iter} iterations with about {decrement:.1e} nats per cell to gain",
            stacklevel=3,
        )
    objective = loss + problem.penalty / 2 * _dot(point[:-1], point[:-1])
    intercept = point[-1] - problem.mean @ point[:-1]
    return Logistic(
        point[:-1], intercept - intercept.mean(), objective, decrement, iteration, decrement < tol
    )


def _direction(problem, gradient, steps, changes):
    """Two-loop recursion of L-BFGS (Nocedal & Wright 2006, algorithm 7.4) around the preconditioner."""
    q = gradient.copy()
    weights = []
    for s, y in zip(reversed(steps), reversed(changes), strict=True):
        rho = 1.0 / _dot(s, y)
        alpha = rho * _dot(s, q)
        q -= problem.dtype.type(alpha) * y
        weights.append((alpha, rho))
    step = problem.precondition(q)
    for (alpha, rho), s, y in zip(reversed(weights), steps, changes, strict=True):
        step += problem.dtype.type(alpha - rho * _dot(y, step)) * s
    return -step, 0.5 * _dot(gradient, step)


def _dot(a, b):
    return float(np.dot(a.ravel(), b.ravel()))


def _threads():
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
