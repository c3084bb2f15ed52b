"""Time and memory of retrieval at full size: 16,651 queries x 8,460 prototypes x 512 dimensions.

    OMP_NUM_THREADS=2 python benchmarks/retrieval.py

Prints one line per step: seconds, and by how much the step raised the peak memory of the process.
"""

import resource
import time
from collections.abc import Callable

import numpy as np

from perturbret.evaluation.metrics import per_query, relevance
from perturbret.evaluation.nulls import luck_p_values
from perturbret.evaluation.retrieval import build_library, score_library
from perturbret.evaluation.whitening import choose_shrinkage, whitener


def main() -> None:
    rng = np.random.default_rng(0)
    n_train, n_queries, n_conditions, d = 56_000, 16_651, 282, 512
    names = np.array([f"G{i}" for i in range(n_conditions)])
    train = rng.standard_normal((n_train, d), dtype=np.float32)
    queries = rng.standard_normal((n_queries, d), dtype=np.float32)
    conditions, true = names[np.arange(n_train) % n_conditions], names[np.arange(n_queries) % n_conditions]

    library = measure(
        "bootstrap library, 282 x 30 means of 50 cells",
        lambda: build_library(train, conditions, kind="bootstrap", seed=0),
    )
    shape = f"{n_queries:,} queries x {len(library.prototypes):,} prototypes x {d}"
    scores = measure(f"cosine, {shape}", lambda: score_library(queries, library))
    measure("metrics of these queries", lambda: per_query(scores, relevance(true, library.candidates)))
    measure(f"shrinkage chosen, {n_train:,} cells x {d}", lambda: choose_shrinkage(train, conditions))
    whiten = measure(f"whitening fitted, {n_train:,} cells x {d}", lambda: whitener(train, conditions))
    measure(
        f"whitened cosine, {shape}",
        lambda: score_library(queries, library, whiten=whiten),
    )
    cells = build_library(train, conditions, kind="raw_cell")
    measure(
        f"cosine, {n_queries:,} queries x {n_train:,} raw cells x {d}", lambda: score_library(queries, cells)
    )
    top = (scores == scores.max(axis=1, keepdims=True)).astype(float)
    codes = np.arange(n_queries) % n_conditions
    measure(f"luck of {n_queries:,} queries, 9,999 permutations", lambda: luck_p_values([top], codes, seed=0))
    wide = rng.standard_normal((10_000, 5000), dtype=np.float32)
    measure("whitening fitted, 10,000 cells x 5,000", lambda: whitener(wide, conditions[:10_000]))


def measure(name: str, step: Callable):
    """Run `step`, print what it took, and return its result."""
    before, started = peak_mb(), time.perf_counter()
    result = step()
    print(
        f"{name:62s} {time.perf_counter() - started:7.2f} s   peak +{peak_mb() - before:6.0f} MB", flush=True
    )
    return result


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
