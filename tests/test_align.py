"""Genes chosen for several datasets together: the perturbed always, the rest by dispersion, in one order."""

import tracemalloc
import warnings

import numpy as np
import pytest
from scipy.sparse import csr_array, csr_matrix

from perturbret.alignment.chunks import ChunkedCounts
from perturbret.alignment.gene_space import write_gene_space
from perturbret.alignment.panels import align, align_screen
from perturbret.alignment.remapping import remap, verify_alignment
from perturbret.data.genes import SymbolResolver
from perturbret.data.screen import Screen
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split

RESOLVER = SymbolResolver([("NEW1", "ENSG00000000001", ("OLD1",), ()), ("NEW2", "", ("OLD2",), ())])


def dataset(name, counts, genes, ids=None, totals=None):
    counts = np.asarray(counts, np.float32)

    def read(n_cells):
        for start in range(0, len(counts), n_cells):
            rows = slice(start, start + n_cells)
            yield csr_matrix(counts[rows]), None if totals is None else totals[rows]

    return ChunkedCounts(name, np.array(genes), None if ids is None else np.array(ids), len(counts), read)


def in_form(name, matrix, genes):
    """All cells in one chunk, of whatever type the matrix is."""
    return ChunkedCounts(name, np.array(genes), None, matrix.shape[0], lambda n_cells: iter([(matrix, None)]))


def draw(name, genes, *, n_cells=200, seed=0, variable=(), **keys):
    """Poisson counts; those of `variable` are eight times higher in half of the cells."""
    rng = np.random.default_rng(seed)
    rates = np.full((n_cells, len(genes)), 2.0)
    for gene in variable:
        rates[: n_cells // 2, list(genes).index(gene)] *= 8
    # Equal totals, so that a gene's own variation is all there is.
    return dataset(name, rng.poisson(rates), genes, totals=np.full(n_cells, 1000.0), **keys)


def quiet(*arguments, **keys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return align(*arguments, resolver=RESOLVER, **keys)


def test_variable_genes_come_first_and_the_order_is_common():
    genes = [f"g{i}" for i in range(20)]
    one = draw("a", genes, variable=["g3", "g17"])
    other = draw("b", genes[::-1], seed=1, variable=["g3", "g5"])
    space = quiet([one, other], n=3)
    assert space.names == ("g17", "g3", "g5") and space.notes == ()
    assert space.maps["a"].columns == ((17,), (3,), (5,)) and space.maps["b"].columns == ((2,), (16,), (14,))
    assert space.statistics.set_index("gene").loc["g3", "rank"] == 1
    assert quiet([other, one], n=3).names == space.names


def test_statistics_are_those_of_the_dense_matrix():
    one = draw("a", ["x", "y", "z"], variable=["x"])
    space = quiet([one], n=3, subtract_noise=False)
    counts = np.concatenate([chunk.toarray() for chunk, _ in one.chunks(33)]).astype(float) * 10
    np.testing.assert_allclose(space.maps["a"].mean, counts.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(space.maps["a"].variance, counts.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        space.table["dispersion"], counts.var(axis=0) / counts.mean(axis=0), rtol=1e-12
    )


def test_a_difference_between_datasets_earns_no_place():
    genes = ["batch", "biology", "flat"]
    rng = np.random.default_rng(0)
    biology = rng.poisson(np.repeat([2.0, 12.0], 100))
    rates = {"a": 2.0, "b": 40.0}
    both = [
        dataset(
            name,
            np.stack([rng.poisson(rate, 200), biology, rng.poisson(3, 200)], axis=1),
            genes,
            totals=np.full(200, 1e4),
        )
        for name, rate in rates.items()
    ]
    assert quiet(both, n=1).names == ("biology",)
    assert quiet(both, n=1, between=True).names == ("batch",)


def test_weights_by_cells_or_equal():
    genes = ["p", "q", "r"]
    large = draw("large", genes, n_cells=2000, variable=["p"])
    small = dataset(
        "small",
        np.random.default_rng(1).poisson([[2, 20, 2]] * 50 + [[2, 2, 2]] * 50),
        genes,
        totals=np.full(100, 1000.0),
    )
    assert quiet([large, small], n=1).names == ("p",)
    assert quiet([large, small], n=1, weights="equal").names == ("q",)


def test_perturbed_genes_have_a_place_whatever_they_are():
    genes = ["rare", "own", "OLD1", "v", "w"]
    counts = np.random.default_rng(0).poisson(3, (300, 5))
    counts[:, 0] = 0
    screen = dataset("screen", counts, genes, totals=np.full(300, 1000.0))
    reference = draw("reference", ["v", "w", "rare", "NEW1"], variable=["w"])
    conditions = ["rare", "own+NEW1", "elsewhere"]
    space = quiet([screen, reference], n=4, screen="screen", perturbed=conditions)
    # `rare` is never counted in the screen, `own` in no reference, and NEW1 goes by its old name.
    assert space.names == ("NEW1", "own", "rare", "w")
    assert space.table["perturbed"] == (True, True, True, False)
    assert space.maps["reference"].columns == ((3,), (), (2,), (1,))
    assert space.maps["reference"].mean[1] is None and space.maps["screen"].columns[1] == (1,)
    assert space.table["rank"][1] is None, "a gene of one dataset takes no part in the ranking"
    everything = quiet([screen, reference], n=2, screen="screen", perturbed=conditions)
    assert (
        everything.names == ("NEW1", "own", "rare")
        and "3 perturbed genes, more than the 2" in everything.notes[0]
    )


def test_a_perturbed_gene_below_the_filter_is_flagged():
    counts = np.random.default_rng(0).poisson(3, (300, 3))
    counts[:, 0] = 0
    both = [dataset("screen", counts, ["rare", "x", "y"]), dataset("b", counts, ["rare", "x", "y"])]
    space = quiet(both, n=3, screen="screen", perturbed=["rare"])
    assert space.names == ("rare", "x", "y") and space.table["passes_filter"] == (False, True, True)
    assert space.notes == ("perturbed and counted in too few cells, kept: rare",)
    assert quiet(both, n=3, screen="screen").names == ("x", "y")


@pytest.mark.parametrize(("percent", "kept"), [(1.0, True), (1.01, False)])
def test_detection_is_in_percent_of_cells(percent, kept):
    counts = np.ones((200, 2))
    counts[2:, 0] = 0
    space = quiet([dataset("a", counts, ["few", "all"])], n=2, min_percent_cells=percent)
    assert ("few" in space.names) == kept


def test_the_default_is_one_cell_in_ten_thousand():
    rows = np.zeros(10_000, int)
    for cells, kept in ((1, True), (0, False)):
        counts = np.stack([rows, rows + 1], axis=1)
        counts[:cells, 0] = 1
        assert ("few" in quiet([dataset("a", counts, ["few", "all"])], n=2).names) == kept


@pytest.mark.parametrize("selection", ["dispersion", "seurat_v3"])
def test_a_filter_that_no_gene_passes_is_named(selection):
    counts = np.ones((200, 2))
    counts[10:] = 0
    both = [dataset(name, counts, ["x", "y"]) for name in "ab"]
    said = r"genes counted in at least 6 percent of cells .*, found none among the 2 that at least 2 of a, b measure"
    with pytest.raises(ValueError, match=said):
        quiet(both, min_percent_cells=6, selection=selection)
    assert quiet(both, min_percent_cells=6, selection="all").names == ("x", "y")
    assert quiet(both, min_percent_cells=6, screen="a", perturbed=["x"]).names == ("x",)


def test_fewer_than_asked_for_is_said():
    with pytest.warns(UserWarning, match="gene space: 2 genes, fewer than the 2000 asked for") as caught:
        space = align([draw("a", ["x", "y"])], resolver=RESOLVER)
    assert len(space) == 2 and space.notes[0] in str(caught[0].message)


def test_genes_of_all_or_of_some_datasets():
    screen = draw("screen", ["x", "y", "z"])
    others = [draw("b", ["x", "y"], seed=1), draw("c", ["x", "more"], seed=2)]
    space = quiet([screen, *others], screen="screen")
    assert space.names == ("x",)
    assert quiet([screen, *others], screen="screen", min_datasets=2).names == ("x", "y")
    assert quiet([screen, *others], screen="screen", min_datasets=1).names == ("x", "y", "z")
    assert quiet([screen, *others], min_datasets=1).names == ("more", "x", "y", "z")
    assert space.settings["genes_in_at_least_n_datasets"] == {"1": 3, "2": 2, "3": 1}


def test_all_shared_genes_whatever_n():
    space = quiet([draw("a", list("pqrs")), draw("b", list("srq"), seed=1)], n=1, selection="all")
    assert space.names == ("q", "r", "s") and space.notes == ()


def test_genes_are_matched_by_ensembl_id_where_all_have_it():
    ids = [f"ENSG0000000001{i}.1" for i in range(3)]
    one = draw("a", ["x", "y", "z"], ids=ids)
    other = draw("b", ["z", "old_x"], ids=[ids[2].replace(".1", ".9"), ids[0]], seed=1)
    space = quiet([one, other])
    assert space.names == ("old_x", "z") and space.ensembl_ids == ("ENSG00000000010", "ENSG00000000012")
    assert quiet([other, one]).names == space.names
    assert space.maps["b"].columns == ((1,), (0,)) and space.settings["matched_by"] == "ensembl"
    cells = {d.name: (next(d.chunks(50))[0], d.genes, d.ensembl_ids) for d in (one, other)}
    assert verify_alignment(space, cells)["n_genes"].tolist() == [2, 2]


def test_the_same_cells_in_two_panels_are_equal_after_remap():
    genes = [f"g{i}" for i in range(30)] + ["OLD1"]
    one = draw("a", genes, variable=["g4"])
    counts = next(one.chunks(1000))[0]
    order = np.random.default_rng(0).permutation(31)
    renamed = np.array([*genes[:30], "NEW1"])[order]
    other = dataset("b", counts.toarray()[:, order], renamed, totals=np.full(200, 1000.0))
    space = quiet([one, other], n=12, screen="a", perturbed=["NEW1"])
    first = remap(counts, space.maps["a"], genes=one.genes)
    second = remap(counts[:, order], space.maps["b"], genes=other.genes)
    assert (first != second).nnz == 0 and first.nnz > 0
    np.testing.assert_allclose(space.maps["a"].variance, space.maps["b"].variance, rtol=1e-12)


def test_only_training_cells_have_a_say(tmp_path):
    screen = simulate_screen(n_genes=80, cells_per_condition=10, n_control=20, seed=0)
    split = make_split(screen.obs, seed=0)
    train = split.roles.reindex(screen.obs.index).to_numpy() == "train"
    reference = draw("reference", screen.genes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = align_screen(screen, [reference], split=split, n=30)
        changed = screen.counts.tolil()
        changed[np.flatnonzero(~train)[:20]] = 50
        altered = Screen(screen.name, changed.tocsr(), screen.genes, screen.obs)
        assert align_screen(altered, [reference], split=split, n=30) == space
        assert align_screen(altered, [reference], n=30) != space
    assert (
        space.maps[screen.name].n_cells == train.sum()
        and "train of in_dist-seed0" in space.maps[screen.name].cells
    )
    assert set(np.array(space.names)[np.array(space.table["perturbed"])]) == {
        gene for condition in screen.conditions for gene in condition.split("+") if gene in screen.genes
    }
    write_gene_space(space, tmp_path)
    assert (tmp_path / "hvg_info.json").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n": 0}, "n: expected at least 1, got 0"),
        ({"n": "5"}, "n: expected a whole number, got '5'"),
        ({"n": 1.5}, "n: expected a whole number, got 1.5"),
        ({"min_datasets": 1.5}, "min_datasets: expected a whole number, got 1.5"),
        ({"min_datasets": 3}, "min_datasets: expected 1 to 2, got 3"),
        ({"selection": "top"}, "selection: expected one of"),
        ({"weights": "none"}, "weights: expected one of"),
        ({"screen": "c"}, r"screen: expected one of \['a', 'b'\], got 'c'"),
        ({"perturbed": ["x"]}, "perturbed: expected the name of the screen"),
        ({"min_percent_cells": 101}, "min_percent_cells: expected 0 to 100 percent, got 101"),
        ({"selection": "seurat_v3", "min_datasets": 1}, "seurat_v3 compares genes that all 2 datasets"),
    ],
)
def test_arguments_out_of_range_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        align([draw("a", ["x"]), draw("b", ["x"])], resolver=RESOLVER, **keys)


def test_a_dataset_of_other_cells_than_it_says_is_refused():
    counts = csr_matrix(np.ones((50, 2)))
    other = ChunkedCounts("b", np.array(["x", "y"]), None, 7, lambda n_cells: iter([(counts, None)]))
    with pytest.raises(ValueError, match="b: expected 7 cells, as its n_cells says, read 50"):
        align([draw("a", ["x", "y"]), other], resolver=RESOLVER)


def test_values_that_are_no_counts_are_refused_by_dataset():
    with pytest.raises(ValueError, match="b: expected counts of at least 0, got -1.0"):
        align([draw("a", ["x", "y"]), dataset("b", [[1, -1]], ["x", "y"])], resolver=RESOLVER)


def test_datasets_without_a_gene_in_common_or_a_name_of_their_own_are_refused():
    with pytest.raises(ValueError, match="expected genes that at least 2 of a, b measure, found none"):
        align([draw("a", ["x"]), draw("b", ["y"])], resolver=RESOLVER)
    with pytest.raises(ValueError, match="with distinct names"):
        align([draw("a", ["x"]), draw("a", ["x"])], resolver=RESOLVER)


def test_seurat_v3_with_datasets_as_batches():
    import anndata
    import scanpy

    genes = [f"g{i:02}" for i in range(60)]
    rng = np.random.default_rng(0)
    counts = {name: rng.poisson(rng.lognormal(0, 1, (100, 60))) for name in "ab"}
    both = [dataset(name, matrix, genes) for name, matrix in counts.items()]
    space = quiet(both, n=10, selection="seurat_v3", chunk_cells=30)
    adata = anndata.AnnData(csr_matrix(np.concatenate(list(counts.values())).astype(float)))
    adata.obs["batch"] = ["a"] * 100 + ["b"] * 100
    expected = scanpy.pp.highly_variable_genes(
        adata, flavor="seurat_v3", n_top_genes=10, batch_key="batch", inplace=False
    )
    assert space.names == tuple(np.array(genes)[expected["highly_variable"]])
    for form in (csr_array, np.asarray):
        others = [in_form(name, form(matrix), genes) for name, matrix in counts.items()]
        assert quiet(others, n=10, selection="seurat_v3").names == space.names
    kept = quiet(both, n=10, selection="seurat_v3", screen="a", perturbed=["g00", "g01"])
    assert {"g00", "g01"} <= set(kept.names) and len(kept) == 10
    assert len(set(kept.names) & set(space.names)) >= 8


def test_what_the_page_says_of_it():
    from perturbret.report.tables import gene_space_lines, gene_space_table

    screen, other = draw("screen", ["OLD1", "x", "own"]), draw("b", ["x", "NEW1"], seed=1)
    space = quiet([screen, other], screen="screen", perturbed=["own"], n=10)
    cells = {d.name: (next(d.chunks(50))[0], d.genes) for d in (screen, other)}
    table = gene_space_table(space, verify_alignment(space, cells, resolver=RESOLVER))
    assert table["chosen genes"].to_dict() == {"screen": 3, "b": 2}
    assert table["under another name"].to_dict() == {"screen": 1, "b": 0}
    assert table.loc["b", "compared by value"] == "2 genes (2 with counts) × 50 cells"
    first, measured, perturbed, note = gene_space_lines(space)
    assert first.startswith("**3 genes in a common order** (asked for: 10), matched by symbol")
    assert "3 in ≥ 1, 2 in ≥ 2; at least 2" in measured
    assert perturbed == "Perturbed genes among them: 1, of which 1 are in fewer data sets than that."
    assert note.startswith("**Note:** 3 genes, fewer than the 10 asked for")


def test_memory_is_that_of_a_chunk():
    """Ten times the cells of both datasets, the same peak; benchmarks/align.py does it at 1,000,000."""

    def simulated(name, n_chunks):
        def read(n_cells):
            rng = np.random.default_rng(0)
            for _ in range(n_chunks):
                columns = np.sort(rng.integers(0, 2000, (500, 100)), axis=1).ravel()
                yield csr_matrix((np.ones(50_000), columns, np.arange(0, 50_001, 100)), (500, 2000)), None

        return ChunkedCounts(name, np.array([f"g{i}" for i in range(2000)]), None, 500 * n_chunks, read)

    peaks = []
    for n_chunks in (4, 40):
        both = [simulated("a", n_chunks), simulated("b", n_chunks)]
        tracemalloc.start()
        space = align(both, n=500, resolver=RESOLVER)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(space) == 500 and space.maps["b"].n_cells == 500 * n_chunks
    assert peaks[1] < 1.2 * peaks[0] < 40e6
