"""The one in-memory form of a perturbation screen that every later step reads."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, issparse

from .conditions import CTRL
from .genes import SymbolResolver
from .masking import target_columns

# Cells with hardly a count are equal without being copies of one another.
_ALIKE_BY_CHANCE = 3


@dataclass(frozen=True)
class Screen:
    """Raw counts of a perturbation screen with canonical labels.

    Attributes
    ----------
    name : str
        Name of the dataset entry it was loaded from.
    counts : scipy.sparse.csr_matrix, shape (n_cells, n_genes), float32
        UMI counts; whole numbers, at least 0, below 2**24 (so that float32 holds them exactly).
    genes : ndarray of str, shape (n_genes,)
        Gene symbols, unique.
    obs : pandas.DataFrame, n_cells rows
        Index: unique cell names. Columns: `condition` (canonical), `total` (UMIs of the cell over the whole
        transcriptome where known, else over `genes`); optionally `batch`, `guide`.
    obsm : mapping of str to ndarray, each (n_cells, d)
        Precomputed embeddings, to be compared as they are.
    extra_masked_genes : mapping of condition to gene symbols
        Genes to mask with the condition's targets (an enhancer target's downstream gene, say).
    target_columns : mapping of condition to ndarray of int
        Columns that masks take out for each condition. Matched by name and HGNC's symbols where none are given.
    simulated : bool
        Drawn by `perturbret.data.simulate`; every page made from it says so.
    audit : mapping
        What loading found, merged and dropped; JSON-able.
    truth : object or None
        The generating parameters of a simulated screen.
    fingerprint : str
        sha256 over counts, genes, labels, totals, `obsm` and `extra_masked_genes`; set when the screen is made.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> counts = csr_matrix(np.array([[5, 1], [3, 4], [2, 2]], np.float32))
    >>> obs = pd.DataFrame({"condition": ["KLF1", "ctrl", "KLF1"], "total": [6, 7, 4]}, index=["a", "b", "c"])
    >>> screen = Screen("small", counts, np.array(["HBG1", "KLF1"]), obs)
    >>> screen.conditions, screen.target_columns["KLF1"].tolist()
    (['KLF1'], [1])
    """

    name: str
    counts: csr_matrix
    genes: np.ndarray
    obs: pd.DataFrame
    obsm: Mapping[str, np.ndarray] = field(default_factory=dict)
    extra_masked_genes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    target_columns: Mapping[str, np.ndarray] | None = None
    simulated: bool = False
    audit: Mapping = field(default_factory=dict)
    truth: object | None = None
    fingerprint: str = ""

    def __post_init__(self):
        if not issparse(self.counts) or self.counts.format != "csr":
            raise ValueError(f"counts: expected a CSR matrix, got {type(self.counts).__name__}")
        n_cells, n_genes = self.counts.shape
        if len(self.genes) != n_genes:
            raise ValueError(
                f"genes: expected {n_genes} symbols for {n_genes} columns, got {len(self.genes)}"
            )
        if len(self.obs) != n_cells:
            raise ValueError(f"obs: expected {n_cells} rows for {n_cells} cells, got {len(self.obs)}")
        missing = [column for column in ("condition", "total") if column not in self.obs]
        if missing:
            raise ValueError(f"obs: expected columns condition and total, missing {missing}")
        if self.target_columns is None:
            columns = target_columns(
                self.conditions,
                self.genes,
                resolver=SymbolResolver.from_package(),
                extra=self.extra_masked_genes,
            )
            object.__setattr__(self, "target_columns", columns)
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self))

    @property
    def n_cells(self) -> int:
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        return self.counts.shape[1]

    @property
    def conditions(self) -> list[str]:
        """Sorted conditions, controls left out."""
        return sorted(set(self.obs["condition"]) - {CTRL})

    @cached_property
    def duplicates(self) -> np.ndarray:
        """Group of each cell, int (n_cells,): cells whose counts are equal in every gene share one.

        Cells that count fewer than `_ALIKE_BY_CHANCE` genes are each a group of their own.
        """
        counts = self.counts if self.counts.has_sorted_indices else self.counts.sorted_indices()
        rows = [
            counts.indices[a:b].tobytes() + counts.data[a:b].tobytes() if b - a >= _ALIKE_BY_CHANCE else i
            for i, (a, b) in enumerate(zip(counts.indptr[:-1], counts.indptr[1:], strict=True))
        ]
        return pd.factorize(np.array(rows, dtype=object))[0]


def _fingerprint(screen: Screen) -> str:
    digest = hashlib.sha256()
    counts = screen.counts
    if not counts.has_sorted_indices:
        counts = counts.sorted_indices()
    for array in (
        counts.indptr.astype(np.int64),
        counts.indices.astype(np.int64),
        counts.data.astype(np.float32),
    ):
        digest.update(np.ascontiguousarray(array).data)
    columns = [column for column in ("condition", "batch", "guide") if column in screen.obs]
    for texts in (screen.genes, screen.obs.index, *(screen.obs[column] for column in columns)):
        digest.update("\0".join(map(str, texts)).encode())
        digest.update(b"\1")
    digest.update(screen.obs["total"].to_numpy(np.float64).tobytes())
    for key in sorted(screen.obsm):
        digest.update(key.encode() + np.ascontiguousarray(screen.obsm[key]).tobytes())
    for condition in sorted(screen.extra_masked_genes):
        digest.update("\0".join([condition, *sorted(screen.extra_masked_genes[condition])]).encode() + b"\2")
    return digest.hexdigest()
