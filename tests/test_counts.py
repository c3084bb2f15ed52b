import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from perturbret.data.counts import CountsError, check_counts, recover

CELLS = np.array([f"cell{i}" for i in range(40)])
GENES = np.array([f"G{i}" for i in range(40)])


def checked(dense, dtype=None):
    return check_counts(csr_matrix(np.asarray(dense, dtype)), name="X", cells=CELLS, genes=GENES)


def poisson(n_cells=30, n_genes=40, rate=3.0, seed=0):
    return np.random.default_rng(seed).poisson(rate, (n_cells, n_genes))


def lognormalised(counts, totals=None, target=1e4):
    """log1p(counts / totals * target), per cell."""
    totals = counts.sum(1) if totals is None else totals
    return np.log1p(counts / totals[:, None] * target)


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "int8", "int16", "uint16", "int32", "int64", "uint8"]
)
def test_counts_of_any_type_come_out_as_float32(dtype):
    counts = poisson()
    result = checked(counts, dtype)
    assert result.dtype == np.float32 and result.format == "csr"
    np.testing.assert_array_equal(result.toarray(), counts)


def test_explicit_zeros_go_and_repeated_entries_are_summed():
    data, columns = np.array([1.0, 2.0, 0.0, 3.0]), np.array([2, 2, 0, 1])
    matrix = csr_matrix((data, columns, np.array([0, 3, 4])), (2, 3))
    result = check_counts(matrix, name="X", cells=CELLS, genes=GENES)
    np.testing.assert_array_equal(result.toarray(), [[0, 0, 3], [0, 3, 0]])
    assert result.nnz == 2 and result.has_sorted_indices
    np.testing.assert_array_equal(matrix.data, data)  # the caller's matrix is as it was
    np.testing.assert_array_equal(matrix.indices, columns)


def test_the_first_value_of_a_row_behind_empty_rows_is_placed_right():
    with pytest.raises(CountsError, match="in cell 'cell3', gene 'G1'"):
        checked([[0, 1], [0, 0], [0, 0], [0, -1]], float)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1.0, "counts of at least 0, got -1.0 in cell 'cell1', gene 'G2'"),
        (1.5, "whole numbers, got 1.5 in cell 'cell1', gene 'G2'"),
        (np.nan, "counts, got nan in cell 'cell1', gene 'G2'"),
        (np.inf, "finite counts, got inf in cell 'cell1', gene 'G2'"),
        (2.0**24, r"counts below 2\*\*24 = 16777216, got 16777216.0 in cell 'cell1', gene 'G2'"),
    ],
)
def test_values_that_are_no_counts_are_refused_with_their_place(value, said):
    counts = poisson(3, 4).astype(float)
    counts[1, 2] = value
    with pytest.raises(CountsError, match=f"X: expected {said}"):
        checked(counts)


def test_the_largest_exact_count_passes():
    assert checked([[2.0**24 - 1, 0]]).max() == 2**24 - 1


def test_large_integers_are_refused_like_floats():
    with pytest.raises(CountsError, match=r"below 2\*\*24.*16777217"):
        checked([[2**24 + 1]], np.int64)


def test_int16_counts_that_wrapped_around_are_refused():
    wrapped = np.array([[40_000, 3]]).astype(np.int16)
    with pytest.raises(CountsError, match="at least 0, got -25536 .*counts above 32767 do not fit int16"):
        checked(wrapped)


@pytest.mark.parametrize(("dtype", "limit"), [("int16", 32767), ("uint8", 255)])
def test_counts_cut_off_at_the_limit_of_their_type_are_refused(dtype, limit):
    with pytest.raises(CountsError, match=f"below the limit of {dtype}, got {limit} "):
        checked([[limit, 1]], dtype)


def test_negative_floats_hint_at_scaling_and_fractions_at_log1p():
    with pytest.raises(CountsError, match="scaled or centred"):
        checked([[-0.3, 1.0]])
    with pytest.raises(CountsError, match="look like log1p-normalised"):
        checked(lognormalised(poisson()))


def test_values_that_are_no_numbers_are_refused():
    with pytest.raises(CountsError, match="expected numbers, got values of type bool"):
        checked([[True, False]], bool)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rate=st.sampled_from([0.3, 2.0, 30.0]),
    target=st.sampled_from([1e4, 1e6, 873.0]),
    dtype=st.sampled_from(["float32", "float64"]),
    known=st.booleans(),
)
def test_recover_gives_back_the_counts(seed, rate, target, dtype, known):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(1.0, rate, 40), (25, 40))
    counts[:, 0], counts[:, 1] = (
        1,
        2,
    )  # every cell has a count of 1, so that the smallest numbers are the true ones
    totals = counts.sum(1) + rng.integers(500, 600, 25)  # genes outside the panel
    result = recover(
        csr_matrix(lognormalised(counts, totals, target).astype(dtype)), totals=totals if known else None
    )
    np.testing.assert_array_equal(result.counts.toarray(), counts)
    np.testing.assert_allclose(result.scale, target / totals, rtol=1e-4)
    assert result.evidence["residual_log"] <= result.evidence["tolerance_log"]
    json.dumps(result.evidence, allow_nan=False)


def test_recover_uses_each_cells_own_scale():
    counts = np.array([[1, 2, 5], [1, 3, 4]])
    values = np.log1p(counts * np.array([[0.5], [7.25]]))
    np.testing.assert_array_equal(recover(csr_matrix(values)).counts.toarray(), counts)


def test_recover_finds_counts_whose_smallest_is_not_one():
    counts = np.array([[2, 3, 9], [4, 6, 5], [60, 62, 0]])
    result = recover(csr_matrix(np.log1p(counts * 0.37)))
    np.testing.assert_array_equal(result.counts.toarray(), [[2, 3, 9], [4, 6, 5], [30, 31, 0]])


def test_known_totals_settle_a_common_factor():
    counts = np.array([[1, 2, 5, 3]] * 5 + [[2, 4, 6, 0], [3, 3, 3, 0]])
    totals = np.array([100, 110, 120, 90, 100, 105, 95])
    result = recover(csr_matrix(lognormalised(counts, totals)), totals=totals)
    np.testing.assert_array_equal(result.counts.toarray(), counts)
    assert result.evidence["n_cells_settled_by_totals"] == 2
    np.testing.assert_allclose(result.scale, 1e4 / totals)


def test_totals_that_include_genes_left_out_of_the_normalisation_still_settle_it():
    counts = np.vstack([poisson(20, 40) + 1, np.full((1, 40), 2)])
    totals = counts.sum(1) + 1000
    result = recover(csr_matrix(lognormalised(counts, totals)), totals=totals * np.linspace(1.0, 1.01, 21))
    np.testing.assert_array_equal(result.counts.toarray(), counts)


def test_totals_that_contradict_the_counts_are_refused():
    counts = poisson(20, 40) + 1
    totals = counts.sum(1).astype(float)
    values = csr_matrix(lognormalised(counts, totals))
    totals[3] *= 0.4
    with pytest.raises(CountsError, match="known totals contradict .* check total_key"):
        recover(values, totals=totals)


def test_a_cell_with_one_distinct_value_needs_its_total():
    counts = np.array([[1, 2, 5], [3, 0, 3]])
    with pytest.raises(CountsError, match="1 of 2 cells have one distinct nonzero value.*total_key"):
        recover(csr_matrix(lognormalised(counts)))


def test_recover_keeps_empty_cells():
    counts = np.array([[0, 0, 0], [1, 2, 3], [0, 0, 0]])
    result = recover(csr_matrix(np.log1p(counts * 1.7)), totals=np.array([50, 60, 70]))
    np.testing.assert_array_equal(result.counts.toarray(), counts)
    assert result.scale[0] == result.scale[2] == 0


def test_values_rounded_to_three_decimals_are_recovered_and_say_so():
    counts = poisson(30, 40, rate=20)
    counts[:, 0] = 1
    result = recover(csr_matrix(np.round(lognormalised(counts), 3).astype(np.float32)))
    np.testing.assert_array_equal(result.counts.toarray(), counts)
    assert result.evidence["stored_decimals"] == 3
    assert 1e-5 < result.evidence["residual_log"] <= 0.00051


def test_rounded_values_of_deep_cells_are_recovered():
    counts = np.vstack([np.r_[1, 300, poisson(1, 60, rate=r)[0]] for r in (2, 40)])
    values = np.round(lognormalised(counts, np.full(2, 100_000.0)), 3)
    np.testing.assert_array_equal(recover(csr_matrix(values)).counts.toarray(), counts)


def test_values_too_coarse_for_their_counts_are_refused():
    counts = poisson(10, 40, rate=2000)
    counts[:, 0] = 1
    with pytest.raises(CountsError, match="no scale .* in 10 of the 10 cells"):
        recover(csr_matrix(np.round(lognormalised(counts), 3)))


@pytest.mark.parametrize(
    ("relative", "scale", "decimals"),
    [
        ([1, 210, 224, 250], 0.1, 3),  # rounded, 210 could as well be 209 or 211
        (
            [1, 10.04, 10.96, 13.05, 16.93, 19.08, 22.91, 29.12],
            0.1,
            3,
        ),  # each fits a scale near the first, but not the same one
        ([1, 2, 4, 8, 16, 32, 60], 4.0, 2),  # whole, but so coarse that other values would pass too
    ],
)
def test_cells_that_leave_a_doubt_are_refused(relative, scale, decimals):
    with pytest.raises(CountsError, match="no scale"):
        recover(csr_matrix(np.round(np.log1p(np.array([relative]) * scale), decimals)))


def test_one_value_off_is_refused():
    values = lognormalised(poisson(30, 40) + 1)
    values[7, 3] *= 1.001
    with pytest.raises(
        CountsError, match=r"in 1 of the 30 cells .*first in row 7.*cannot be recovered exactly"
    ):
        recover(csr_matrix(values))


@pytest.mark.parametrize(
    "values", [np.random.default_rng(0).gamma(2.0, 1.0, (20, 40)), np.log2(1 + poisson(20, 40))]
)
def test_values_that_are_no_log1p_of_counts_are_refused(values):
    with pytest.raises(CountsError, match="cannot be recovered exactly"):
        recover(csr_matrix(values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[-0.5, 1.0]]), "1 negative ones .smallest -0.5.: scaled or centred"),
        (np.array([[np.nan, 1.0]]), "1 NaN or infinite"),
        (np.array([[np.inf, 1.0]]), "1 NaN or infinite"),
        (np.array([[3.0, 1.0]]), "whole numbers: read them as counts"),
        (np.array([[3, 1]]), "are they counts"),
    ],
)
def test_recover_refuses_other_input(values, said):
    with pytest.raises(CountsError, match=said):
        recover(csr_matrix(values))


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    counts = poisson(25, 40)
    counts[::5] *= 2
    counts[3] = 0
    totals = np.maximum(counts.sum(1), 1)
    values = csr_matrix(lognormalised(counts, totals))
    whole = recover(values, totals=totals)
    monkeypatch.setattr("perturbret.data.counts._ROWS", 4)
    parts = recover(values, totals=totals)
    np.testing.assert_array_equal(whole.counts.toarray(), counts)
    np.testing.assert_array_equal(parts.counts.toarray(), counts)
    np.testing.assert_array_equal(parts.scale, whole.scale)
