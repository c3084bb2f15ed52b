"""Compare solvers of multinomial logistic regression on a matrix shaped like a full perturbation screen.

    python benchmarks/logistic.py --cells 7000 --solvers all
    python benchmarks/logistic.py --cells 70000 --solvers preconditioned,preconditioned_1,sklearn_lbfgs

Every solver minimises mean cross-entropy + ||W||^2 / (2 C n), intercept free. `gap` is the objective minus the lowest
that any solver reached here, in nats per cell; `accuracy` is on 2,000 cells that no solver saw. Wall time is with as
many threads as OMP_NUM_THREADS says, unless the solver's name says otherwise.
"""

import argparse
import os
import time
import warnings

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, vstack

from perturbret.encoders.logistic import fit_logistic


def simulate(n_cells, n_genes, n_classes, *, nonzero=409, effect=0.6, seed=0):
    """log1p(CP10k) of Poisson counts: gamma-distributed gene means, 8% of the genes shifted per class, classes of
    unequal size, log-normal depths. Returns features (csr float32) and classes."""
    rng = np.random.default_rng(seed)
    base = rng.gamma(0.25, 1.0, n_genes)
    base /= base.sum()
    low, high = 0.0, 1e6
    for _ in range(60):  # total counts such that about `nonzero` genes are detected
        depth = (low + high) / 2
        low, high = (depth, high) if (1 - np.exp(-depth * base)).sum() < nonzero else (low, depth)
    shift = rng.normal(0, effect, (n_classes, n_genes)) * (rng.random((n_classes, n_genes)) < 0.08)
    share = rng.dirichlet(np.full(n_classes, 2.0))
    classes = np.concatenate([np.arange(n_classes), rng.choice(n_classes, n_cells - n_classes, p=share)])
    blocks = []
    for start in range(0, n_cells, 2000):
        rows = classes[start : start + 2000]
        rate = base * np.exp(shift[rows]) * depth * rng.lognormal(0, 0.35, (len(rows), 1))
        counts = csr_matrix(rng.poisson(rate).astype(np.float32))
        scale = 1e4 / np.asarray(counts.sum(axis=1)).ravel()
        counts.data = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr))).astype(np.float32)
        blocks.append(counts)
    return vstack(blocks, format="csr"), classes


class Objective:
    """Value and gradient for scipy's L-BFGS-B, with the sparse products of either scipy or torch's MKL."""

    def __init__(self, features, classes, n_classes, C, engine):
        self.shape = (features.shape[1] + 1, n_classes)
        self.classes, self.n, self.penalty = classes, len(classes), 1 / (C * len(classes))
        self.passes = 0
        transposed = features.T.tocsr()
        if engine == "torch":
            import torch

            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

            def wrap(matrix):
                parts = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
                tensor = torch.sparse_csr_tensor(*parts, size=matrix.shape)
                return lambda dense: (tensor @ torch.from_numpy(np.ascontiguousarray(dense))).numpy()

            self.forth, self.back = wrap(features), wrap(transposed)
        else:
            self.forth, self.back = features.__matmul__, transposed.__matmul__

    def __call__(self, flat):
        self.passes += 1
        point = flat.reshape(self.shape).astype(np.float32)
        logits = self.forth(point[:-1]) + point[-1]
        logits -= logits.max(axis=1, keepdims=True)
        true = logits[np.arange(self.n), self.classes].sum(dtype=np.float64)
        np.exp(logits, out=logits)
        sums = logits.sum(axis=1, keepdims=True)
        logits /= sums
        logits[np.arange(self.n), self.classes] -= 1
        logits /= self.n
        gradient = np.empty(self.shape)
        gradient[:-1] = self.back(logits) + self.penalty * point[:-1]
        gradient[-1] = logits.sum(axis=0)
        value = (np.log(sums).sum(dtype=np.float64) - true) / self.n
        return value + self.penalty / 2 * float((point[:-1].astype(np.float64) ** 2).sum()), gradient.ravel()


def run_preconditioned(features, classes, n_classes, C, threads=None):
    fitted = fit_logistic(features, classes, n_classes, C=C, threads=threads)
    return fitted.coef, fitted.intercept, fitted.n_iter


def run_lbfgs(features, classes, n_classes, C, engine):
    objective = Objective(features, classes, n_classes, C, engine)
    options = {"maxiter": 60, "maxcor": 10, "gtol": 1e-5, "ftol": 1e-9}
    found = minimize(
        objective, np.zeros(np.prod(objective.shape)), jac=True, method="L-BFGS-B", options=options
    )
    point = found.x.reshape(objective.shape)
    return point[:-1], point[-1], objective.passes


def run_sklearn(features, classes, n_classes, C, solver, max_iter):
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=C, solver=solver, max_iter=max_iter, random_state=0).fit(
            features, classes
        )
    return model.coef_.T, model.intercept_, int(model.n_iter_[0])


def run_minibatch(features, classes, n_classes, C, epochs=20, size=256):
    """Adam on minibatches, learning rate falling linearly to 0; the penalty in the gradient."""
    rng = np.random.default_rng(0)
    n, p = features.shape
    penalty = np.float32(1 / (C * n))
    point = np.zeros((p + 1, n_classes), np.float32)
    first, second = np.zeros_like(point), np.zeros_like(point)
    steps = epochs * -(-n // size)
    step = 0
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, size):
            rows = order[start : start + size]
            block = features[rows]
            logits = block @ point[:-1] + point[-1]
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            logits /= logits.sum(axis=1, keepdims=True)
            logits[np.arange(len(rows)), classes[rows]] -= 1
            logits /= len(rows)
            gradient = np.concatenate([block.T @ logits, logits.sum(axis=0, keepdims=True)])
            gradient[:-1] += penalty * point[:-1]
            step += 1
            first += np.float32(0.1) * (gradient - first)
            second += np.float32(0.001) * (gradient**2 - second)
            rate = np.float32(2e-3 * (1 - step / steps) / (1 - 0.9**step))
            point -= rate * first / (np.sqrt(second / np.float32(1 - 0.999**step)) + np.float32(1e-8))
    return point[:-1], point[-1], epochs


SOLVERS = {
    "preconditioned": (run_preconditioned, {}, "perturbret.encoders.logistic"),
    "preconditioned_1": (run_preconditioned, {"threads": 1}, "perturbret.encoders.logistic, 1 thread"),
    "scipy_lbfgs": (run_lbfgs, {"engine": "scipy"}, "L-BFGS-B, scipy products, 60 iterations"),
    "torch_lbfgs": (run_lbfgs, {"engine": "torch"}, "L-BFGS-B, torch MKL CSR products, 60 iterations"),
    "sklearn_lbfgs": (
        run_sklearn,
        {"solver": "lbfgs", "max_iter": 100},
        "scikit-learn lbfgs, 100 iterations",
    ),
    "sklearn_saga": (run_sklearn, {"solver": "saga", "max_iter": 20}, "scikit-learn saga, 20 epochs"),
    "minibatch_adam": (run_minibatch, {}, "Adam, 20 epochs of 256 cells"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=7000)
    parser.add_argument("--genes", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=236)
    parser.add_argument("--c", type=float, default=0.03)
    parser.add_argument("--solvers", default="all")
    arguments = parser.parse_args()
    names = list(SOLVERS) if arguments.solvers == "all" else arguments.solvers.split(",")
    n_test = 2000
    features, classes = simulate(arguments.cells + n_test, arguments.genes, arguments.classes)
    # The first cells hold every class once; the last ones are held out.
    train, test = features[: arguments.cells], features[arguments.cells :]
    y_train, y_test = classes[: arguments.cells], classes[arguments.cells :]
    print(
        f"{train.shape[0]} cells x {train.shape[1]} genes, {train.nnz / train.shape[0]:.0f} nonzero per cell, "
        f"{arguments.classes} classes, C = {arguments.c}",
        flush=True,
    )
    check = Objective(train, y_train, arguments.classes, arguments.c, "scipy")
    rows = []
    for name in names:
        function, options, description = SOLVERS[name]
        wall, cpu = time.perf_counter(), time.process_time()
        coef, intercept, iterations = function(train, y_train, arguments.classes, arguments.c, **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        value = check(np.vstack([coef, intercept[None]]).ravel())[0]
        accuracy = float(((test @ coef + intercept).argmax(axis=1) == y_test).mean())
        rows.append((description, wall, cpu, iterations, value, accuracy))
        print(
            f"  {description}: {wall:.1f} s, CPU {cpu:.1f} s, {iterations}, {value:.6f}, {accuracy:.4f}",
            flush=True,
        )
    best = min(row[4] for row in rows)
    print("| solver | wall, s | CPU, s | iterations | objective | gap | accuracy |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, wall, cpu, iterations, value, accuracy in rows:
        figures = f"{wall:.1f} | {cpu:.1f} | {iterations} | {value:.5f} | {value - best:.1e} | {accuracy:.3f}"
        print(f"| {name} | {figures} |")


if __name__ == "__main__":
    main()
