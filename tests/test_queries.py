import numpy as np
import pytest
from toy import reordered, toy_cells, toy_screen

from perturbret.evaluation.scoring import by_name, make_queries


@pytest.fixture
def prepared():
    return toy_cells(**toy_screen(n_query=23, batches=3))


def names_of(prepared, queries):
    return {
        query: frozenset(prepared.cells.names[members])
        for query, members in zip(queries.ids, queries.members, strict=True)
    }


def test_size_one_is_every_cell_of_the_role_once_without_controls(prepared):
    queries = make_queries(prepared, size=1, seed=0)
    expected = prepared.cells.names[(prepared.roles == "query") & (prepared.conditions != "ctrl")]
    assert sorted(queries.ids) == sorted(expected)
    assert (prepared.cells.names[queries.members[:, 0]] == queries.ids).all()
    assert (prepared.conditions[queries.members[:, 0]] == queries.conditions).all()
    assert (prepared.cells.batch[queries.members[:, 0]] == queries.batch).all()


def test_groups_are_distinct_sets_of_distinct_cells_of_one_condition_and_role(prepared):
    queries = make_queries(prepared, size=5, seed=0)
    assert len(set(queries.ids)) == len(queries) == 5 * 4 * 5
    assert len(set(names_of(prepared, queries).values())) == len(queries)
    for condition, members in zip(queries.conditions, queries.members, strict=True):
        assert len(set(members)) == 5
        assert set(prepared.conditions[members]) == {condition}
        assert set(prepared.roles[members]) == {"query"}


def test_groups_of_one_shuffle_are_disjoint(prepared):
    queries = make_queries(prepared, size=5, seed=0, repeats=1)
    assert len(np.unique(queries.members)) == queries.members.size == 5 * 20


def test_number_of_groups_is_capped_per_condition(prepared):
    queries = make_queries(prepared, size=2, seed=0, max_per_condition=13)
    assert set(np.unique(queries.conditions, return_counts=True)[1]) == {13}


def test_a_condition_with_too_few_cells_is_left_out_and_one_with_just_enough_has_one_query():
    prepared = toy_cells(["A"] * 6 + ["B"] * 5, ["query"] * 11)
    queries = make_queries(prepared, size=6, seed=0)
    assert queries.conditions.tolist() == ["A"]
    assert sorted(queries.members[0]) == list(range(6))
    assert len(make_queries(prepared, size=7, seed=0)) == 0


@pytest.mark.parametrize("size", [1, 5])
def test_order_of_the_cells_does_not_matter(prepared, size):
    shuffled = reordered(prepared, np.random.default_rng(1).permutation(len(prepared.conditions)))
    a, b = make_queries(prepared, size=size, seed=0), make_queries(shuffled, size=size, seed=0)
    assert a.ids.tolist() == b.ids.tolist()
    assert (prepared.cells.names[a.members] == shuffled.cells.names[b.members]).all()


def test_groups_of_a_condition_do_not_depend_on_the_other_conditions(prepared):
    some = reordered(prepared, np.flatnonzero(prepared.conditions == "C"))
    mine = names_of(some, make_queries(some, size=5, seed=0))
    all_ = names_of(prepared, make_queries(prepared, size=5, seed=0))
    assert mine == {query: members for query, members in all_.items() if query.startswith("C/")}


def test_seed_changes_the_groups(prepared):
    a, b = (make_queries(prepared, size=5, seed=seed).members for seed in (0, 1))
    assert not np.array_equal(a, b)
    assert np.array_equal(a, make_queries(prepared, size=5, seed=0).members)


def test_batch_of_a_group_is_that_of_most_cells_first_by_name_among_equals():
    prepared = toy_cells(["A"] * 5, ["query"] * 5, batch=["y", "x", "y", "x", "y"])
    assert make_queries(prepared, size=5, seed=0).batch.tolist() == ["y"]
    prepared = toy_cells(["A"] * 4, ["query"] * 4, batch=["y", "x", "y", "x"])
    assert make_queries(prepared, size=4, seed=0).batch.tolist() == ["x"]
    assert make_queries(toy_cells(["A"] * 4, ["query"] * 4), size=4, seed=0).batch is None


@pytest.mark.parametrize("name", ["size", "max_per_condition", "repeats"])
def test_values_below_one_are_refused(prepared, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        make_queries(prepared, **{"size": 2, "seed": 0, name: 0})


def test_a_role_without_cells_is_refused(prepared):
    with pytest.raises(ValueError, match="role 'gallery', found none"):
        make_queries(prepared, role="gallery", size=1, seed=0)


def test_by_name_orders_by_condition_then_name():
    prepared = toy_cells(["B", "A", "A"], ["train"] * 3, names=["c1", "c3", "c2"])
    assert by_name(prepared, np.array([0, 1, 2])).tolist() == [2, 1, 0]
