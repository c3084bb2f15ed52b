"""Counts in the common order: equal by value to what the names say, and each known way to go wrong is caught."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csc_matrix, csr_matrix, random_array

from perturbret.alignment.gene_space import ColumnMap, GeneSpace, GeneSpaceError, hash_genes
from perturbret.alignment.remapping import indicator, remap, verify_alignment
from perturbret.data.counts import CountsError
from perturbret.data.genes import SymbolResolver

RESOLVER = SymbolResolver([("NEW", "", ("OLD",), ()), ("OTHER", "", (), ())])
PANELS = {"a": np.array(["x", "OLD", "dup", "y", "dup"]), "b": np.array(["y", "NEW", "x"])}
NAMES = ("NEW", "dup", "x", "y")
COLUMNS = {"a": ((1,), (2, 4), (0,), (3,)), "b": ((1,), (), (2,), (0,))}
COUNTS = {
    "a": csr_matrix(np.arange(1, 16).reshape(3, 5).astype(np.float32)),
    "b": csr_matrix(np.arange(100, 106).reshape(2, 3).astype(np.float32)),
}


def column_map(dataset, columns=None):
    columns = COLUMNS[dataset] if columns is None else columns
    panel = PANELS[dataset]
    blank = (None,) * len(columns)
    names = tuple(tuple(str(panel[i]) for i in found) for found in columns)
    hashed = hash_genes(panel)
    return ColumnMap(columns, names, len(panel), hashed, 1, "all", "", 0.0, blank, blank, blank)


def space(**maps):
    maps = {"a": column_map("a"), "b": column_map("b"), **maps}
    return GeneSpace(NAMES, (None,) * 4, maps, {}, {"matched_by": "symbol"})


def verify(made, **counts):
    data = {name: (counts.get(name, COUNTS[name]), PANELS[name]) for name in made.maps}
    return verify_alignment(made, data, resolver=RESOLVER)


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix])
def test_remap_by_hand(form):
    made = remap(form(COUNTS["a"]), column_map("a"), genes=PANELS["a"])
    # OLD, then the sum of both columns named dup, x, y.
    assert made.toarray().tolist() == [[2, 8, 1, 4], [7, 18, 6, 9], [12, 28, 11, 14]]
    assert made.format == "csr" and made.dtype == np.float32 and made.has_canonical_format
    missing = remap(COUNTS["b"], column_map("b"))
    assert missing.toarray().tolist() == [[101, 0, 102, 100], [104, 0, 105, 103]]
    assert missing.nnz == 6


def test_remap_equals_the_dense_sum_of_columns():
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.3, (50, 30)).astype(np.float32)
    order = rng.permutation(30)
    columns = tuple(tuple(map(int, order[i : i + 2])) for i in range(0, 24, 2)) + ((), (int(order[29]),))
    blank = (None,) * len(columns)
    made = remap(csr_matrix(dense), ColumnMap(columns, columns, 30, "", 1, "", "", 0, blank, blank, blank))
    expected = np.stack([dense[:, list(found)].sum(axis=1) for found in columns], axis=1)
    np.testing.assert_array_equal(made.toarray(), expected)
    assert made.nnz == (expected > 0).sum()
    assert indicator(columns, 30).sum() == 25


def test_verification_passes_on_what_is_right_and_counts_it():
    table = verify(space())
    assert table.to_dict("list") == {
        "dataset": ["a", "b"], "n_cells": [3, 2], "n_genes": [4, 3], "n_counted": [4, 3], "n_values": [12, 6]
    }  # fmt: skip


def test_a_map_sorted_the_wrong_way_is_caught():
    """Columns in the order of the dataset beside names in the order of the space: shapes, names and sets agree."""
    right = column_map("b")
    found = iter(sorted(column for entry in right.columns for column in entry))
    wrong = replace(right, columns=tuple((next(found),) if entry else () for entry in right.columns))
    with pytest.raises(
        GeneSpaceError, match=r"b: gene 0 \(NEW\): by name \(NEW\) cell 0 has 101, by position 100"
    ):
        verify(space(b=wrong))
    # The names sorted with them: now they tell that this is another gene.
    renamed = column_map("b", wrong.columns)
    with pytest.raises(GeneSpaceError, match=r"b: gene 0: expected NEW, got 'y' \(no known gene\)"):
        verify(space(b=renamed))


def test_a_duplicated_symbol_of_which_one_column_is_taken_is_caught():
    lost = column_map("a", ((1,), (2,), (0,), (3,)))
    with pytest.raises(GeneSpaceError, match=r"gene 1 \(dup\).*cell 0 has 8, by position 3"):
        verify(space(a=lost))


def test_a_name_of_another_gene_is_caught():
    wrong = replace(column_map("b"), column_names=(("OTHER",), (), ("x",), ("y",)))
    with pytest.raises(GeneSpaceError, match="expected columns OTHER, found 0"):
        verify(space(b=wrong))
    data = {"b": (COUNTS["b"], np.array(["y", "OTHER", "x"]))}
    with pytest.raises(GeneSpaceError, match=r"expected NEW, got 'OTHER' \(OTHER\)"):
        verify_alignment(space(b=wrong), data, resolver=RESOLVER)


def test_keys_that_are_text_are_caught():
    with pytest.raises(GeneSpaceError, match="expected a column from 0 to 2, got '1'"):
        space(b=replace(column_map("b"), columns=(("1",), (), ("2",), ("0",))))


def test_a_panel_in_another_order_is_caught():
    with pytest.raises(GeneSpaceError, match="expected the 3 columns that the map was made for.*NEW, x, y"):
        remap(COUNTS["b"], column_map("b"), genes=["NEW", "x", "y"])
    with pytest.raises(GeneSpaceError, match="expected 3 columns, got 2"):
        remap(COUNTS["b"][:, :2], column_map("b"))
    with pytest.raises(GeneSpaceError, match="expected a sparse matrix, got ndarray"):
        remap(COUNTS["b"].toarray(), column_map("b"))


def with_ids(ids, *, names=None, settings=None):
    """A space matched by Ensembl id of one dataset, whose columns are turned round."""
    names = ["s", "t", "s"] if names is None else names
    turned = ((2,), (1,), (0,))
    columns = replace(
        column_map("b", turned),
        column_names=tuple((names[i],) for (i,) in turned),
        genes_sha256=hash_genes(names),
    )
    known = tuple(ids[i] for (i,) in turned)
    return GeneSpace(("p", "q", "r"), known, {"b": columns}, {}, {"matched_by": "ensembl"})


class TestEnsembl:
    IDS = ["ENSG00000000010", "ENSG00000000011", "ENSG00000000012"]

    def test_by_ids_beside_names_or_by_names_that_are_ids(self):
        versions = [f"{identifier}.7" for identifier in self.IDS]
        given = verify_alignment(with_ids(self.IDS), {"b": (COUNTS["b"], ["s", "t", "s"], versions)})
        named = verify_alignment(with_ids(self.IDS, names=versions), {"b": (COUNTS["b"], versions)})
        assert given["n_genes"].tolist() == named["n_genes"].tolist() == [3]
        with pytest.raises(GeneSpaceError, match="b: expected the Ensembl id of each column.*got 's'"):
            verify_alignment(with_ids(self.IDS), {"b": (COUNTS["b"], ["s", "t", "s"])})

    @pytest.mark.parametrize("names", [["s", "t", "u"], IDS])
    def test_a_map_sorted_the_wrong_way_with_its_names_is_caught(self, names):
        right = with_ids(self.IDS, names=names)
        columns = replace(
            right.maps["b"], columns=((0,), (1,), (2,)), column_names=tuple((n,) for n in names)
        )
        data = {"b": (COUNTS["b"], names, self.IDS)}
        with pytest.raises(GeneSpaceError, match=f"gene 0: expected {self.IDS[2]}, got {self.IDS[0]}"):
            verify_alignment(replace(right, maps={"b": columns}), data)

    def test_of_a_symbol_of_two_ids_the_column_of_the_id_counts(self):
        space = with_ids(self.IDS)
        swapped = replace(space.maps["b"], columns=((0,), (1,), (2,)))  # both bear the same name
        with pytest.raises(
            GeneSpaceError, match=r"gene 0 \(p\): by name \(s\) cell 0 has 102, by position 100"
        ):
            verify_alignment(
                replace(space, maps={"b": swapped}), {"b": (COUNTS["b"], ["s", "t", "s"], self.IDS)}
            )


def test_verification_of_nothing_is_no_verification():
    with pytest.raises(GeneSpaceError, match="data: expected cells of at least one dataset"):
        verify_alignment(space(), {}, resolver=RESOLVER)
    with pytest.raises(
        GeneSpaceError, match="b: expected cells with counts of the space's genes, got none in 2"
    ):
        verify(space(), b=csr_matrix((2, 3), dtype=np.float32))
    table = verify_alignment(space(), {"a": (COUNTS["a"][:1], PANELS["a"])}, resolver=RESOLVER).set_index(
        "dataset"
    )
    assert table.loc["b"].tolist() == [0, 0, 0, 0]
    empty = COUNTS["a"].copy()
    empty.data[empty.indices == 3] = 0
    assert verify(space(), a=empty)["n_counted"].tolist() == [3, 3]


def test_counts_stay_as_they_were_given():
    """Stored zeros are left out of the result and stay in the caller's matrix."""
    stored = csr_matrix((np.array([1, 0, 2, 3, 4], np.float32), [0, 1, 2, 1, 2], [0, 3, 5]), shape=(2, 3))
    before = [array.copy() for array in (stored.data, stored.indices, stored.indptr)]
    first = remap(stored, column_map("b"), genes=PANELS["b"])
    assert first.toarray().tolist() == [[0, 0, 2, 1], [3, 0, 4, 0]] and first.nnz == 4
    for array, kept in zip((stored.data, stored.indices, stored.indptr), before, strict=True):
        np.testing.assert_array_equal(array, kept)
    assert (remap(stored, column_map("b")) != first).nnz == 0
    assert verify(space(), b=stored)["n_values"].tolist() == [12, 4]


@pytest.mark.parametrize(
    "columns",
    [((0,), (0,), (2,), (1,)), ((1, 1), (), (2,), (0,)), (("1",), (), (2,), (0,)), ((3,), (), (2,), (0,))],
)
def test_a_map_that_contradicts_itself_is_refused_where_it_is_used(columns):
    wrong = replace(
        column_map("b"), columns=columns, column_names=tuple(("n",) * len(found) for found in columns)
    )
    with pytest.raises(GeneSpaceError, match="map: "):
        remap(COUNTS["b"], wrong)


def test_int16_counts_do_not_overflow():
    dense = np.array([[0, 0, 20_000, 0, 20_000]])
    made = remap(csr_matrix(dense.astype(np.int16)), column_map("a"))
    assert made.toarray().tolist() == [[0, 40_000, 0, 0]]
    # Those that overflowed before they came here are refused.
    for value, said in (
        (40_000, "counts of at least 0, got -25536.*int16"),
        (32_767, "below the limit of int16"),
    ):
        with pytest.raises(CountsError, match=said):
            remap(csr_matrix((dense > 0) * np.array(value).astype(np.int16)), column_map("a"))


def test_sums_that_float32_does_not_hold_are_refused():
    half = csr_matrix(np.array([[0, 0, 2**23, 0, 2**23]], dtype=np.int64))
    with pytest.raises(GeneSpaceError, match="sums below"):
        remap(half, column_map("a"))


def test_a_large_sparse_matrix_is_never_dense():
    counts = csr_matrix(random_array((20_000, 30_000), density=1e-5, rng=0))
    counts.data[:] = 2
    columns = tuple((i,) for i in range(0, 30_000, 15))
    blank = (None,) * len(columns)
    made = remap(counts, ColumnMap(columns, columns, 30_000, "", 1, "", "", 0, blank, blank, blank))
    assert made.shape == (20_000, 2000) and made.sum() == counts[:, ::15].sum()
