"""Time and memory of judging a screen: 20,000 single query cells of 250 conditions and their pools, 6 read-outs.

    OMP_NUM_THREADS=2 python benchmarks/scoring.py

Scores by library and scoring, pools of 5 to 50 cells in three ways, ranks and all metrics, and the intervals of their
means. The goal is 60 s and 4 GB on two cores. Prints one line per step: seconds, and the peak memory so far.
"""

import resource
import time
from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from perturbret.data.prepared import Cells, Context, Prepared
from perturbret.evaluation.judge import evaluate, summarise
from perturbret.evaluation.scoring import make_queries

N_CONDITIONS, N_TRAIN, N_QUERY, DIMENSIONS = 250, 200, 80, 64
SIZES = (1, 5, 10, 20, 50)


class Embedding:
    """Counts as they are, with a softmax classifier of random weights."""

    kind = "benchmark"

    def __init__(self, prepared: Prepared):
        self.context, self.classes = prepared.context, prepared.candidates
        self.head = np.random.default_rng(1).standard_normal((DIMENSIONS, N_CONDITIONS)) / 20
        self.log_prior = np.full(N_CONDITIONS, -np.log(N_CONDITIONS))

    def embed(self, cells: Cells) -> np.ndarray:
        return cells.counts.toarray()

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        return log_softmax(embeddings.astype(np.float64) @ self.head, axis=1)


def main() -> None:
    prepared = screen()
    encoder = Embedding(prepared)
    pools = [len(make_queries(prepared, size=size, seed=0)) for size in SIZES]
    print(f"queries of {SIZES} cells: {pools}")
    scores = measure(
        "scores, pools, ranks and metrics of 6 read-outs",
        lambda: evaluate(encoder, prepared, libraries=("mean", "bootstrap"), query_sizes=SIZES),
    )
    print(f"{len(scores):,} rankings of {N_CONDITIONS} candidates")
    summary = measure("intervals, 1,000 resamples of conditions", lambda: summarise(scores))
    print(f"{len(summary):,} estimates")


def screen() -> Prepared:
    """Cells around the profile of their condition."""
    rng = np.random.default_rng(0)
    names = np.array([f"G{i:03d}" for i in range(N_CONDITIONS)])
    conditions = np.repeat(names, N_TRAIN + N_QUERY)
    roles = np.tile(np.repeat(["train", "query"], [N_TRAIN, N_QUERY]), N_CONDITIONS)
    profiles = rng.gamma(2, 2, (N_CONDITIONS, DIMENSIONS))
    counts = rng.poisson(np.repeat(profiles, N_TRAIN + N_QUERY, axis=0)).astype(np.float32)
    cells = Cells(
        csr_matrix(counts),
        counts.sum(axis=1).astype(float),
        np.array([f"gene{i}" for i in range(DIMENSIONS)]),
        np.array([f"cell{i:06d}" for i in range(len(counts))]),
    )
    context = Context("benchmark", "data", "in_dist-seed0", "split", "all_targets", DIMENSIONS, "genes")
    return Prepared(cells, conditions, roles, tuple(names.tolist()), {}, context)


def measure(name: str, step: Callable):
    """Run `step`, print what it took, and return its result."""
    started = time.perf_counter()
    result = step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{name:50s} {time.perf_counter() - started:7.2f} s   peak {peak:6.0f} MB", flush=True)
    return result


if __name__ == "__main__":
    main()
