"""A large screen within bounded memory: 100,000 cells x 5,000 genes, loaded, split, masked, PCA + retrieval.

    OMP_NUM_THREADS=2 python benchmarks/large_screen.py [--cells 100000] [--genes 5000]

Prints one line per step: seconds, and the peak memory of the process so far. Exits with 1 above 6 GB. The file is
drawn by another process, whose memory does not count.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LIMIT_GB = 6.0
CONDITIONS = 240
CONTROL_SHARE = 0.08
UMIS = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=5_000)
    parser.add_argument("--draw", type=Path, help="only draw the file, to this path")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw, arguments.cells, arguments.genes)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.h5ad"
        size = ["--cells", str(arguments.cells), "--genes", str(arguments.genes)]
        subprocess.run([sys.executable, __file__, "--draw", str(path), *size], check=True)
        run(path, Path(folder))
    return int(peak_gb() > LIMIT_GB)


def run(path: Path, folder: Path) -> None:
    """The steps of a user's run, timed."""
    from perturbret.data.datasets import load_screen
    from perturbret.data.prepared import prepare
    from perturbret.data.sources import make_entry
    from perturbret.data.splits import get_split
    from perturbret.encoders.baselines import fit_baseline
    from perturbret.evaluation.judge import evaluate

    entry = make_entry(
        {"name": "large", "path": str(path), "condition_key": "condition", "control_label": "ctrl"}
    )
    screen = measure("load and check the h5ad", load_screen, entry)
    per_cell = screen.counts.nnz / screen.n_cells
    shape = f"{screen.n_cells:,} cells x {screen.n_genes:,} genes, {per_cell:.0f} nonzero per cell"
    print(f"  {shape}, {path.stat().st_size / 1e6:.0f} MB on disk, {len(screen.conditions)} conditions")
    split = measure("split", get_split, screen, track="in_dist", seed=0, directory=folder)
    prepared = measure("mask all_targets", prepare, screen, split, mask="all_targets")
    fitted = measure("fit PCA, chosen on validation", fit_baseline, "pca", prepared, seed=0)
    scores = measure(
        "evaluate, mean and bootstrap library, sizes 1 and 10",
        evaluate,
        fitted.encoder,
        prepared,
        libraries=("mean", "bootstrap"),
        query_sizes=(1, 10),
    )
    single = scores[(scores["query_size"] == 1) & (scores["library"] == "mean")]
    hits = single.groupby("scoring")["exact_hit@1"].mean().round(3).to_dict()
    print(
        f"  {len(single) // len(hits):,} single-cell queries, exact_hit@1 {hits}, chance {1 / CONDITIONS:.4f}"
    )


def draw(path: Path, n_cells: int, n_genes: int) -> None:
    """Write an h5ad whose conditions differ in the genes that a tenth of their UMIs come from."""
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix, vstack

    rng = np.random.default_rng(0)
    # Steep enough that a cell's 600 UMIs fall on about 400 genes, as in the full Norman screen.
    common = np.cumsum(rng.lognormal(0.0, 1.0, n_genes))
    own = [np.cumsum(rng.lognormal(0.0, 3.0, n_genes)) for _ in range(CONDITIONS)]
    names = np.array([f"G{i}" for i in range(n_genes)])
    labels = np.where(rng.random(n_cells) < CONTROL_SHARE, -1, rng.integers(0, CONDITIONS, n_cells))
    blocks = []
    for start in range(0, n_cells, 2000):
        block = labels[start : start + 2000]
        umis = rng.poisson(UMIS * rng.lognormal(0.0, 0.3, len(block))).clip(50)
        columns = [
            draw_cell(rng, common, own[c] if c >= 0 else common, n) for c, n in zip(block, umis, strict=True)
        ]
        indptr = np.concatenate([[0], np.cumsum(umis)])
        counts = csr_matrix(
            (np.ones(indptr[-1], np.float32), np.concatenate(columns), indptr), (len(block), n_genes)
        )
        counts.sum_duplicates()
        blocks.append(counts)
    condition = np.where(labels < 0, "ctrl", names[labels * (n_genes // CONDITIONS)])
    obs = pd.DataFrame({"condition": pd.Categorical(condition)}, index=[f"cell{i}" for i in range(n_cells)])
    anndata.AnnData(vstack(blocks, format="csr"), obs, pd.DataFrame(index=names)).write_h5ad(path)


def draw_cell(rng: np.random.Generator, common: np.ndarray, own: np.ndarray, n: int) -> np.ndarray:
    """Columns of n UMIs, nine tenths from the genes of all cells."""
    n_own = n // 10
    return np.concatenate(
        [
            np.searchsorted(common, rng.random(n - n_own) * common[-1]),
            np.searchsorted(own, rng.random(n_own) * own[-1]),
        ]
    ).astype(np.int32)


def measure(name: str, step, *arguments, **keywords):
    """Run `step`, print what it took, and return its result."""
    started = time.perf_counter()
    result = step(*arguments, **keywords)
    print(f"{name:56s} {time.perf_counter() - started:7.1f} s   peak {peak_gb():5.2f} GB", flush=True)
    return result


def peak_gb() -> float:
    """Largest resident memory of this process so far; Linux counts in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    sys.exit(main())
