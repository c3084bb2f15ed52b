"""Gene statistics of 1,000,000 simulated cells x 20,000 genes in bounded memory, and a remap of one chunk.

    python benchmarks/align.py [--cells 1000000] [--genes 20000]

Cells are drawn chunk by chunk and never kept. Prints seconds and the peak memory of the process; exits with 1 above
1 GB.
"""

import argparse
import resource
import sys
import time
import warnings

import numpy as np
from scipy.sparse import csr_matrix

LIMIT_GB = 1.0
# Distinct columns drawn per cell: a cell has nearly as many expressed genes.
DRAWN = 500


def main() -> int:
    from perturbret.alignment.chunks import ChunkedCounts
    from perturbret.alignment.panels import align
    from perturbret.alignment.remapping import remap

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=20_000)
    arguments = parser.parse_args()
    genes = np.array([f"G{i}" for i in range(arguments.genes)])
    drawing = [0.0]

    def read(n_cells):
        rng = np.random.default_rng(0)
        for start in range(0, arguments.cells, n_cells):
            started = time.perf_counter()
            chunk = draw(rng, min(n_cells, arguments.cells - start), arguments.genes)
            drawing[0] += time.perf_counter() - started
            yield chunk, None

    before = peak_gb()
    started = time.perf_counter()
    source = ChunkedCounts("simulated", genes, None, arguments.cells, read)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        space = align([source], n=2000)
    seconds = time.perf_counter() - started
    columns = space.maps["simulated"]
    millions = DRAWN * arguments.cells / 1e6
    print(f"{columns.n_cells:,} cells x {arguments.genes:,} genes, {millions:,.0f} million UMIs")
    print(f"one pass: {seconds:.1f} s, of which drawing the cells {drawing[0]:.1f} s")
    print(f"peak memory: {peak_gb():.2f} GB, {before:.2f} GB of it the imports")
    chunk, _ = next(read(4096))
    started = time.perf_counter()
    remap(chunk, columns, genes=genes)
    print(f"remap of 4,096 cells: {time.perf_counter() - started:.2f} s")
    return int(peak_gb() > LIMIT_GB)


def draw(rng: np.random.Generator, n_cells: int, n_genes: int) -> csr_matrix:
    """Counts of 1 or more in genes of which the first are the commonest."""
    columns = (
        (n_genes * rng.random((n_cells, DRAWN), dtype=np.float32) ** 3).astype(np.int32).clip(0, n_genes - 1)
    )
    indptr = np.arange(0, columns.size + 1, DRAWN)
    counts = csr_matrix(
        (np.ones(columns.size, np.float32), columns.ravel(), indptr), shape=(n_cells, n_genes)
    )
    counts.sum_duplicates()
    return counts


def peak_gb() -> float:
    """Largest resident memory of this process so far; Linux counts in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    sys.exit(main())
