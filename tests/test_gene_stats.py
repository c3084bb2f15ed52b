"""Streamed moments of genes: equal to numpy on the dense matrix, however cells are cut, in bounded memory."""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse import coo_array, coo_matrix, csc_matrix, csr_array, csr_matrix

from perturbret.alignment.gene_stats import GeneStats, pool_stats, stream_stats
from perturbret.alignment.remapping import indicator


def draw(n_cells=300, n_genes=40, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.lognormal(-1, 1.5, n_genes), (n_cells, n_genes))
    counts[5] = 0
    return counts.astype(np.float32)


def cut(counts, size, totals=None):
    for start in range(0, len(counts), size):
        rows = slice(start, start + size)
        yield csr_matrix(counts[rows]), None if totals is None else totals[rows]


def normalised(counts, totals=None):
    totals = counts.sum(axis=1, dtype=np.float64) if totals is None else totals
    return counts * (1e4 / np.where(totals > 0, totals, np.inf))[:, None]


@pytest.mark.parametrize("size", [1, 7, 300, 1000])
def test_moments_equal_numpy_on_the_dense_matrix(size):
    counts = draw()
    dense = normalised(counts.astype(np.float64))
    stats = stream_stats(cut(counts, size), 40)
    np.testing.assert_allclose(stats.mean, dense.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.variance, dense.var(axis=0), rtol=1e-12)
    assert (stats.n_detected == (counts > 0).sum(axis=0)).all()
    assert stats.n_cells == 300


def test_totals_of_the_whole_transcriptome_set_the_scale():
    counts = draw()
    totals = counts.sum(axis=1, dtype=np.float64) * 3 + 1
    stats = stream_stats(cut(counts, 64, totals), 40)
    np.testing.assert_allclose(stats.variance, normalised(counts, totals).var(axis=0), rtol=1e-12)
    assert stats.noise == pytest.approx((1e4 / totals).mean())


def test_a_large_mean_with_a_small_variance_does_not_cancel():
    rng = np.random.default_rng(1)
    # Equal totals: the values are 5000 +- 1e-3 of a unit of 10,000, where sums of squares in one pass lose everything.
    first = rng.integers(0, 3, 2000)
    counts = np.stack([8_000_000 + first, 8_000_000 - first], axis=1).astype(np.float32)
    stats = stream_stats(cut(counts, 100), 2)
    np.testing.assert_allclose(stats.variance, normalised(counts.astype(np.float64)).var(axis=0), rtol=1e-6)


def test_columns_of_a_gene_are_summed_before_anything_else():
    counts = draw()
    where = [(3,), (0, 7), ()]
    stats = stream_stats(cut(counts, 50), 40, collapse=indicator(where, 40))
    gene = counts[:, 0] + counts[:, 7]
    expected = normalised(counts.astype(np.float64))[:, [0, 7]].sum(axis=1)
    assert stats.mean[1] == pytest.approx(expected.mean(), rel=1e-12)
    assert stats.variance[1] == pytest.approx(expected.var(), rel=1e-12)
    assert stats.n_detected.tolist() == [(counts[:, 3] > 0).sum(), (gene > 0).sum(), 0]


def test_duplicate_entries_and_stored_zeros_change_nothing():
    matrix = csr_matrix((np.array([1.0, 2.0, 0.0, 4.0]), np.array([0, 0, 1, 2]), np.array([0, 3, 4])), (2, 3))
    clean = csr_matrix(np.array([[3.0, 0, 0], [0, 0, 4]]))
    one, other = (stream_stats([(m, None)], 3) for m in (matrix, clean))
    assert one.n_detected.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(one.mean, other.mean)
    assert one.fingerprint == other.fingerprint and matrix.nnz == 4


def small(counts):
    return csr_matrix(counts.astype(np.int16))


@pytest.mark.parametrize("form", [coo_matrix, coo_array, csc_matrix, csr_array, np.asarray, small])
def test_counts_of_any_form_are_the_same_counts(form):
    counts = draw()
    expected = stream_stats(cut(counts, 100), 40, collapse=indicator([(1, 4), (2,)], 40))
    chunks = ((form(counts[start : start + 100]), None) for start in range(0, 300, 100))
    stats = stream_stats(chunks, 40, collapse=indicator([(1, 4), (2,)], 40))
    assert stats.fingerprint == expected.fingerprint and stats.noise == expected.noise
    np.testing.assert_array_equal(stats.mean, expected.mean)
    np.testing.assert_array_equal(stats.variance, expected.variance)


@pytest.mark.parametrize("form", [csr_matrix, csr_array, coo_matrix])
def test_duplicate_entries_of_a_small_type_do_not_wrap_around(form):
    parts = coo_matrix((np.array([20000, 20000, 1], np.int16), ([0, 0, 0], [0, 0, 1])), shape=(1, 2))
    if form is not coo_matrix:
        parts = form((parts.data, parts.col, np.array([0, 3])), shape=(1, 2))
    stats = stream_stats([(parts, None)], 2)
    np.testing.assert_allclose(stats.mean, np.array([40000, 1]) / 40001 * 1e4, rtol=1e-12)
    assert parts.nnz == 3


@pytest.mark.parametrize("form", [csr_matrix, csr_array, coo_matrix, np.asarray])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1.0, r"expected counts of at least 0, got -1.0 in cell 'row 7', gene 'column 3' \(1 of"),
        (0.5, "expected whole numbers, got 0.5 in cell 'row 7'"),
        (np.nan, "expected counts, got nan in cell 'row 7'"),
        (np.inf, "expected finite counts, got inf in cell 'row 7'"),
    ],
)
def test_values_that_are_no_counts_are_refused_with_the_place(form, value, said):
    counts = draw(12).astype(np.float64)
    counts[7, 3] = value
    chunks = ((form(counts[start : start + 5]), None) for start in (0, 5, 10))
    with pytest.raises(ValueError, match=f"lung: {said}"):
        stream_stats(chunks, 40, name="lung")


@pytest.mark.parametrize("chunk", [np.ones(4), np.array([["a"] * 4]), np.ones((2, 4), complex)])
def test_chunks_that_are_no_table_of_numbers_are_refused(chunk):
    with pytest.raises(ValueError, match=r"lung: expected numbers of shape \(cells, genes\), got"):
        stream_stats([(chunk, None)], 4, name="lung")


def test_fingerprint_tells_content_and_not_chunks():
    counts = draw()
    whole = stream_stats(cut(counts, 300), 40).fingerprint
    assert stream_stats(cut(counts, 11), 40).fingerprint == whole
    assert stream_stats(cut(counts, 11), 40, collapse=indicator([(1,)], 40)).fingerprint == whole
    other = counts.copy()
    other[7, 3] += 1
    assert stream_stats(cut(other, 300), 40).fingerprint != whole
    swapped = counts[:, [1, 0, *range(2, 40)]]
    assert stream_stats(cut(swapped, 300), 40).fingerprint != whole
    assert stream_stats(cut(counts, 300, counts.sum(axis=1) + 1), 40).fingerprint != whole


def test_pure_counting_noise_has_no_dispersion_at_any_depth():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(50))
    stats, plain = {}, {}
    for name, depth in (("shallow", 500), ("deep", 20000)):
        totals = rng.poisson(depth, 4000)
        counts = np.stack([rng.multinomial(total, share) for total in totals]).astype(np.float32)
        stats[name] = stream_stats(cut(counts, 1000), 50)
        plain[name] = (stats[name].variance / stats[name].mean).mean()
    assert plain["shallow"] == pytest.approx(20, rel=0.1) and plain["deep"] == pytest.approx(0.5, rel=0.1)
    where = {name: [(i,) for i in range(50)] for name in stats}
    assert abs(pool_stats(where, stats)["dispersion"].mean()) < 0.05 * plain["shallow"]


def test_within_and_between_are_the_variance_of_all_cells_together():
    one, other = draw(300, seed=0), draw(100, seed=1) * 3
    stats = {"a": stream_stats(cut(one, 50), 40), "b": stream_stats(cut(other, 50), 40)}
    where = {name: [(i,) for i in range(40)] for name in stats}
    table = pool_stats(where, stats, subtract_noise=False)
    both = normalised(np.concatenate([one, other]).astype(np.float64))
    np.testing.assert_allclose(table["mean"], both.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        table["variance_within"] + table["variance_between"], both.var(axis=0), rtol=1e-11
    )
    counted = np.concatenate([one, other]) > 0
    np.testing.assert_allclose(table["percent_cells"], 100 * counted.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(table["dispersion"], table["variance_within"] / table["mean"], rtol=1e-12)
    total = pool_stats(where, stats, subtract_noise=False, between=True)
    np.testing.assert_allclose(total["dispersion"], both.var(axis=0) / both.mean(axis=0), rtol=1e-11)


def stats(n_cells, mean, variance, noise=0.0):
    mean, variance = np.array(mean, float), np.array(variance, float)
    return GeneStats(n_cells, mean, variance, np.full(len(mean), n_cells), noise, "")


def test_weights_by_hand():
    two = {"a": stats(30, [1.0, 2.0], [4.0, 4.0], 0.5), "b": stats(10, [3.0, 0.0], [8.0, 0.0], 1.0)}
    where = {"a": [(0,), (1,)], "b": [(0,), ()]}
    cells = pool_stats(where, two)
    # Gene 0: weights 3/4 and 1/4. Mean 1.5, within 5, noise 3/4 * 1 * .5 + 1/4 * 3 * 1 = 1.125.
    assert cells["dispersion"][0] == pytest.approx((5 - 1.125) / 1.5)
    assert cells["variance_between"][0] == pytest.approx(0.75 * 0.25 + 0.25 * 2.25)
    equal = pool_stats(where, two, weights="equal")
    assert equal["mean"][0] == 2 and equal["variance_within"][0] == 6
    # Gene 1 is measured in a only: b has no weight, not the weight of a zero.
    assert cells["mean"][1] == equal["mean"][1] == 2 and cells["n_datasets"].tolist() == [2, 1]


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([], "expected at least one cell, got none"),
        ([(csr_matrix(np.ones((2, 3))), None)], "expected chunks of 4 columns, got 3"),
        ([(csr_matrix(np.ones((2, 4))), np.array([4.0, 0.0]))], "got 0.0 in row 1"),
        ([(csr_matrix(np.ones((2, 4))), np.array([4.0, np.nan]))], "got nan in row 1"),
    ],
)
def test_what_cannot_be_normalised_is_refused(chunks, said):
    with pytest.raises(ValueError, match=said):
        stream_stats(chunks, 4)


def test_memory_is_that_of_a_chunk():
    """Ten times the cells, the same peak; benchmarks/align.py does it at 1,000,000."""

    def simulated(n_chunks):
        rng = np.random.default_rng(0)
        for _ in range(n_chunks):
            columns = np.sort(rng.integers(0, 2000, (500, 100)), axis=1).ravel()
            yield csr_matrix((np.ones(50000), columns, np.arange(0, 50001, 100)), (500, 2000)), None

    peaks = []
    for n_chunks in (4, 40):
        tracemalloc.start()
        stream_stats(simulated(n_chunks), 2000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20e6
