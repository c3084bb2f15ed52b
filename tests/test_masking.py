import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_matrix

from perturbret.data.conditions import CTRL
from perturbret.data.genes import SymbolResolver
from perturbret.data.masking import POLICIES, UNSAFE, mask_counts, mask_totals, target_columns

GENES = np.array(["A", "B", "C", "D", "E"])
CONDITIONS = ["A", "A+B", "C", "UNMEASURED", CTRL]
COLUMNS = target_columns(CONDITIONS, GENES)
ALL = [0, 1, 2]


def masked_by_loop(dense, labels, policy):
    """The policies written out cell by cell."""
    result = dense.copy()
    for row, label in enumerate(labels):
        if policy == "own_targets" and label != CTRL:
            result[row, [list(GENES).index(gene) for gene in label.split("+") if gene in GENES]] = 0
        if policy == "all_targets":
            result[row, ALL] = 0
    return result


def screens():
    return st.integers(0, 8).flatmap(
        lambda n: st.tuples(
            arrays(np.float32, (n, len(GENES)), elements=st.sampled_from([0, 0, 1, 2, 40000])),
            st.lists(st.sampled_from(CONDITIONS), min_size=n, max_size=n),
        )
    )


@given(screens(), st.sampled_from(POLICIES))
def test_masked_counts_equal_the_policy_written_out(screen, policy):
    dense, labels = screen
    counts = csr_matrix(dense)
    before = [part.copy() for part in (counts.data, counts.indices, counts.indptr)]
    masked = mask_counts(counts, labels, COLUMNS, policy)
    expected = masked_by_loop(dense, labels, policy)
    np.testing.assert_array_equal(masked.toarray(), expected)
    assert masked.nnz == np.count_nonzero(expected)
    assert masked.dtype == np.float32 and masked.has_canonical_format
    for part, old in zip((counts.data, counts.indices, counts.indptr), before, strict=True):
        np.testing.assert_array_equal(part, old)
    assert not np.shares_memory(masked.data, counts.data)

    totals = dense.sum(axis=1, dtype=float) + 7
    np.testing.assert_array_equal(
        mask_totals(totals, counts, masked), totals - dense.sum(1, dtype=float) + expected.sum(1, dtype=float)
    )


@given(screens(), st.sampled_from(POLICIES))
def test_masking_twice_changes_nothing(screen, policy):
    dense, labels = screen
    once = mask_counts(csr_matrix(dense), labels, COLUMNS, policy)
    twice = mask_counts(once, labels, COLUMNS, policy)
    assert (once != twice).nnz == 0


@given(screens(), st.randoms(use_true_random=False))
def test_under_all_targets_the_labels_do_not_matter(screen, random):
    """What makes the policy free of the leak: permuted labels give the very same counts."""
    dense, labels = screen
    permuted = random.sample(labels, len(labels))
    one, other = (
        mask_counts(csr_matrix(dense), names, COLUMNS, "all_targets") for names in (labels, permuted)
    )
    np.testing.assert_array_equal(one.toarray(), other.toarray())


def test_own_targets_follow_the_labels_given():
    counts = csr_matrix(np.ones((2, 5), np.float32))
    masked = mask_counts(counts, ["C", "A"], COLUMNS, "own_targets").toarray()
    np.testing.assert_array_equal(masked, [[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]])
    assert UNSAFE == ("own_targets",)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_stored_zeros_and_unsorted_rows(policy):
    counts = csr_matrix((np.array([3, 0, 2], np.float32), [4, 0, 3], [0, 3, 3]), shape=(2, 5))
    assert not counts.has_sorted_indices
    masked = mask_counts(counts, ["A", "C"], COLUMNS, policy)
    assert masked.nnz == 2
    np.testing.assert_array_equal(masked.toarray(), [[0, 0, 0, 2, 3], [0, 0, 0, 0, 0]])
    masked.sort_indices()
    np.testing.assert_array_equal(masked.indices, [3, 4])


def test_columns_of_targets():
    assert {name: columns.tolist() for name, columns in COLUMNS.items()} == {
        "A": [0],
        "A+B": [0, 1],
        "C": [2],
        "UNMEASURED": [],
    }
    assert all(columns.dtype == np.int64 for columns in COLUMNS.values())


def test_extra_genes_are_masked_with_the_condition():
    columns = target_columns(["A", "C"], GENES, extra={"A": ("E", "D", "A"), "DROPPED": ("B",)})
    assert {name: hit.tolist() for name, hit in columns.items()} == {"A": [0, 3, 4], "C": [2]}


RESOLVER = SymbolResolver(
    [
        ("BMAL2", "ENSG00000029153", ("ARNTL2",), ("CLIF",)),
        ("NALF1", "", ("OLD",), ()),
        ("CLECL1P", "", ("OLD",), ()),
    ]
)


@pytest.mark.parametrize(
    ("condition", "genes", "expected"),
    [
        ("ARNTL2", ["X", "BMAL2"], [1]),  # a target named by its old symbol
        ("BMAL2", ["X", "ARNTL2"], [1]),  # an old panel
        ("ARNTL2", ["CLIF", "X"], [0]),  # both
        ("BMAL2", ["X", "ENSG00000029153.4"], [1]),
        ("BMAL2", ["BMAL2", "ARNTL2", "X"], [0, 1]),  # a gene that stands there twice
        ("OLD", ["NALF1", "X", "CLECL1P"], [0, 2]),  # ambiguous: every gene that may be meant
        ("NALF1", ["X", "OLD"], [1]),
        ("CLECL1P", ["X", "OLD"], [1]),
        ("NALF1", ["CLECL1P"], []),
        ("UNKNOWN", ["UNKNOWN"], [0]),
    ],
)
def test_targets_are_found_under_other_names(condition, genes, expected):
    assert target_columns([condition], genes, resolver=RESOLVER)[condition].tolist() == expected
    counts = csr_matrix(np.ones((1, len(genes)), np.float32))
    for policy in ("own_targets", "all_targets"):
        columns = target_columns([condition], genes, resolver=RESOLVER)
        masked = mask_counts(counts, [condition], columns, policy).toarray()[0]
        assert np.flatnonzero(masked == 0).tolist() == expected


def test_extra_genes_are_found_under_other_names():
    columns = target_columns(["X"], ["ARNTL2", "X"], resolver=RESOLVER, extra={"X": ["BMAL2"]})
    assert columns["X"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("labels", "policy", "message"),
    [
        (["A", "C"], "own", r"policy: expected one of \('none', 'own_targets', 'all_targets'\), got 'own'"),
        (["A"], "none", "conditions: expected 2, one per cell, got 1"),
        (["A", "Z"], "own_targets", r"got 1 others \(first: 'Z'\)"),
        (["A", "Z"], "all_targets", r"got 1 others \(first: 'Z'\)"),
    ],
)
def test_bad_arguments(labels, policy, message):
    with pytest.raises(ValueError, match=message):
        mask_counts(csr_matrix(np.ones((2, 5), np.float32)), labels, COLUMNS, policy)


def test_totals_that_cannot_hold_the_masked_counts_are_refused():
    counts = csr_matrix(np.array([[5, 0, 0, 1, 0], [9, 0, 0, 1, 0]], np.float32))
    masked = mask_counts(counts, ["A", "A"], COLUMNS, "all_targets")
    with pytest.raises(ValueError, match=r"less for 1 cells \(first: cell 1, total 8, masked 9\)"):
        mask_totals(np.array([6, 8]), counts, masked)


def test_totals_are_exact_where_float32_is_not():
    counts = csr_matrix(np.array([[2**24 - 1, 0, 0, 2**24 - 1, 2**24 - 1]], np.float32))
    masked = mask_counts(counts, ["A"], COLUMNS, "own_targets")
    assert mask_totals(np.array([3.0 * (2**24 - 1)]), counts, masked)[0] == 2 * (2**24 - 1)
