"""Counts in chunks: the same cells from memory and from a file, in pieces, with what is wrong refused."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_matrix, vstack

from perturbret.alignment.chunks import (
    ChunkedCounts,
    chunked_h5ad,
    chunked_in_space,
    chunked_screen,
)
from perturbret.alignment.gene_space import ColumnMap, GeneSpace, GeneSpaceError, hash_genes
from perturbret.data.counts import CountsError
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split

COUNTS = np.random.default_rng(0).poisson(0.7, (25, 6)).astype(np.float32)
IDS = [f"ENSG0000000000{i}.3" for i in range(6)]


def example(counts=None):
    var = pd.DataFrame({"symbol": list("ABCDEA"), "id": IDS}, index=[f"v{i}" for i in range(6)])
    obs = pd.DataFrame({"umis": COUNTS.sum(axis=1) * 10.0}, index=[f"c{i}" for i in range(25)])
    adata = anndata.AnnData(csr_matrix(COUNTS if counts is None else counts), obs=obs, var=var)
    adata.layers["dense"] = COUNTS
    adata.layers["columns"] = csc_matrix(COUNTS)
    return adata


@pytest.fixture
def write(tmp_path):
    """Writer of a file of cells, by default those of `example`."""

    def path_of(adata=None):
        (example() if adata is None else adata).write_h5ad(tmp_path / "example.h5ad")
        return tmp_path / "example.h5ad"

    return path_of


@pytest.fixture
def saved(write):
    return write()


def together(source, size):
    chunks = list(source.chunks(size))
    assert all(counts.shape[0] <= size for counts, _ in chunks)
    return vstack([counts for counts, _ in chunks]).toarray(), [totals for _, totals in chunks]


def test_cells_in_a_gene_space_keep_values_and_totals(saved):
    """Genes of the space that are measured, in its order; columns of one gene summed; totals of all columns."""
    source = chunked_h5ad(saved, name="cells", symbol_key="symbol")
    columns = ((3,), (), (0, 5), (1,))
    blank = (None,) * 4
    names = tuple(tuple(source.genes[i] for i in found) for found in columns)
    hashed = hash_genes(source.genes)
    made = ColumnMap(columns, names, 6, hashed, 25, "all", "", 0.0, blank, blank, blank)
    space = GeneSpace(("D", "other", "A", "B"), blank, {"cells": made}, {}, {})
    remapped = chunked_in_space(source, space)
    assert remapped.genes.tolist() == ["D", "A", "B"] and remapped.n_cells == 25
    counts, totals = together(remapped, 10)
    np.testing.assert_array_equal(
        counts, np.stack([COUNTS[:, 3], COUNTS[:, 0] + COUNTS[:, 5], COUNTS[:, 1]], axis=1)
    )
    np.testing.assert_array_equal(np.concatenate(totals), COUNTS.sum(axis=1))
    known = chunked_in_space(chunked_h5ad(saved, name="cells", symbol_key="symbol", total_key="umis"), space)
    np.testing.assert_array_equal(np.concatenate(together(known, 10)[1]), COUNTS.sum(axis=1) * 10)
    with pytest.raises(GeneSpaceError, match="elsewhere: expected one of the gene space's datasets, cells"):
        chunked_in_space(chunked_h5ad(saved, name="elsewhere"), space)


@pytest.mark.parametrize("matrix", ["X", "dense", "columns"])
@pytest.mark.parametrize("size", [1, 10, 100])
def test_each_pass_reads_the_same_cells(saved, matrix, size):
    source = chunked_h5ad(saved, matrix=matrix)
    for _ in range(2):
        counts, totals = together(source, size)
        np.testing.assert_array_equal(counts, COUNTS)
        assert set(totals) == {None} and source.n_cells == 25
    assert source.name == "example"


def test_columns_of_the_tables_are_used(saved):
    source = chunked_h5ad(saved, name="s", symbol_key="symbol", ensembl_key="id", total_key="umis")
    assert source.genes.tolist() == list("ABCDEA") and source.ensembl_ids.tolist() == IDS
    _, totals = together(source, 10)
    np.testing.assert_array_equal(np.concatenate(totals), COUNTS.sum(axis=1) * 10.0)


def test_names_that_are_ensembl_ids_are_taken_for_them(write):
    adata = example()
    assert chunked_h5ad(write(adata)).ensembl_ids is None
    adata.var_names = IDS
    assert chunked_h5ad(write(adata)).ensembl_ids.tolist() == IDS
    adata.var_names = ["X", *IDS[1:]]
    assert chunked_h5ad(write(adata)).ensembl_ids is None


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"matrix": "counts"}, r"s: matrix: expected one of \['X', 'columns', 'dense'\], got 'counts'"),
        ({"symbol_key": "name"}, "s: symbol_key: expected a column 'name' in var"),
        ({"total_key": "n"}, "s: total_key: expected a column 'n' in obs"),
        ({"ensembl_key": "symbol"}, "ensembl_key: expected an Ensembl gene id for every gene, got 'A'"),
    ],
)
def test_what_is_not_there_is_refused(saved, keys, said):
    with pytest.raises(ValueError, match=said):
        chunked_h5ad(saved, name="s", **keys)


def test_values_that_are_no_counts_are_refused_when_read(write):
    wrong = COUNTS.copy()
    wrong[17, 2] = 0.5
    source = chunked_h5ad(write(example(wrong)), name="s")
    with pytest.raises(CountsError, match="cell 'c17', gene 'v2'"):
        list(source.chunks(10))


def test_a_split_screen_gives_its_training_cells_only():
    screen = simulate_screen(n_genes=60, cells_per_condition=12, n_control=20, seed=0)
    split = make_split(screen.obs, seed=3)
    source = chunked_screen(screen, split)
    chosen = split.roles.reindex(screen.obs.index).to_numpy() == "train"
    counts, totals = together(source, 50)
    np.testing.assert_array_equal(counts, screen.counts[chosen].toarray())
    np.testing.assert_array_equal(np.concatenate(totals), screen.obs["total"].to_numpy()[chosen])
    assert source.n_cells == chosen.sum() < screen.n_cells and split.hash[:12] in source.cells
    assert chunked_screen(screen).n_cells == screen.n_cells and chunked_screen(screen).cells == "all"


def test_a_split_of_another_screen_is_refused():
    screen = simulate_screen(n_genes=60, cells_per_condition=12, n_control=20, seed=0)
    split = make_split(screen.obs.iloc[5:], seed=0)
    with pytest.raises(ValueError, match="5 have none"):
        chunked_screen(screen, split)
    with pytest.raises(ValueError, match="expected cells in role 'gallery'"):
        chunked_screen(screen, make_split(screen.obs, seed=0), role="gallery")


def test_ids_must_fit_the_genes_and_chunks_hold_cells(saved):
    with pytest.raises(ValueError, match="expected an Ensembl id for each of 2 genes, got 1"):
        ChunkedCounts("s", np.array(["A", "B"]), np.array(IDS[:1]), 1, lambda n: iter(()))
    with pytest.raises(ValueError, match="expected at least 1 cell per chunk, got 0"):
        chunked_h5ad(saved, name="s").chunks(0)
