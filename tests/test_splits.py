import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from perturbret.data.screen import Screen
from perturbret.data.splits import FRACTIONS, Split, SplitMismatch, get_split, make_split


def cells(sizes, n_batches=0):
    """obs with the given number of cells per condition, batches in turn."""
    labels = np.repeat([f"G{i}" for i in range(len(sizes))], sizes)
    obs = pd.DataFrame({"condition": labels}, index=[f"cell{i}" for i in range(len(labels))])
    if n_batches:
        obs["batch"] = [f"b{i % n_batches}" for i in range(len(labels))]
    return obs


def screen_of(obs, *, extra_count=0.0):
    counts = np.ones((len(obs), 2), np.float32)
    counts[0, 0] += extra_count
    return Screen("toy", csr_matrix(counts), np.array(["A", "B"]), obs.assign(total=2.0))


def counts_by(obs, split, keys):
    groups = [obs[key] for key in keys]
    return pd.crosstab(groups, split.roles).reindex(columns=["train", "val", "query"], fill_value=0)


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=6)
FRACTION_SETS = st.sampled_from(
    [FRACTIONS, (0.5, 0.0, 0.5), (1.0, 0.0, 0.0), (0.05, 0.15, 0.8), (1 / 3,) * 3]
)


@settings(max_examples=40)
@given(SIZES, st.integers(0, 5), st.integers(0, 1000), FRACTION_SETS)
def test_fractions_hold_in_every_condition(sizes, n_batches, seed, fractions):
    obs = cells(sizes, n_batches)
    split = make_split(obs, seed=seed, fractions=fractions)
    assert split.roles.index.equals(obs.index)
    table = counts_by(obs, split, ["condition"])
    exact = table.sum(axis=1).to_numpy()[:, None] * np.array(fractions)
    forced = (table["train"] == 1).to_numpy() & (
        exact[:, 0] < 1
    )  # the one train cell that each condition keeps
    assert (np.abs(table.to_numpy() - exact)[~forced] < 1 + 1e-6).all()
    assert (table["train"] >= 1).all()


@settings(max_examples=40)
@given(SIZES, st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(sizes, n_batches, random):
    obs = cells(sizes, n_batches)
    order = random.sample(range(len(obs)), len(obs))
    split, shuffled = make_split(obs, seed=3), make_split(obs.iloc[order], seed=3)
    pd.testing.assert_series_equal(shuffled.roles.reindex(obs.index), split.roles)
    assert shuffled.hash == split.hash


@settings(max_examples=40)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=6), st.integers(0, 100))
def test_batches_of_a_condition_are_divided_alike(sizes, seed):
    labels = np.repeat([f"b{i}" for i in range(len(sizes))], sizes)
    obs = pd.DataFrame({"condition": "G", "batch": labels}, index=[f"cell{i}" for i in range(len(labels))])
    table = counts_by(obs, make_split(obs, seed=seed), ["batch"])
    exact = table.sum(axis=1).to_numpy()[:, None] * np.array(FRACTIONS)
    # Each end of a role's stretch is off by less than one cell of the batch, and by its share of what the
    # other batches are off together.
    assert (np.abs(table.to_numpy() - exact) < 3).all()


def test_no_batch_is_bound_to_a_role():
    """One cell per condition and batch: the role must not follow from the batch's name."""
    obs = cells([5] * 400, n_batches=5)
    share = pd.crosstab(obs["batch"], make_split(obs, seed=0).roles, normalize="index")
    assert np.abs(share["train"] - 3 / 5).max() < 0.1
    assert np.abs(share["query"] - 1 / 5).max() < 0.1


def test_a_lone_cell_of_a_small_batch_may_get_any_role():
    labels = np.tile(["small"] + ["large"] * 30, 300)
    obs = pd.DataFrame({"condition": np.repeat([f"G{i}" for i in range(300)], 31), "batch": labels})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    share = make_split(obs, seed=0).roles[labels == "small"].value_counts(normalize=True)
    assert np.abs(share[["train", "val", "query"]] - FRACTIONS).max() < 0.1


@pytest.mark.parametrize(
    ("n", "train", "val", "query"),
    [
        (1, 1, 0, 0),
        (2, 1, 0, 1),
        (3, 2, 0, 1),
        (4, 2, 1, 1),
        (5, 3, 1, 1),
        (50, 32, 8, 10),
        (100, 64, 16, 20),
    ],
)
def test_sizes_by_hand(n, train, val, query):
    table = counts_by(cells([n]), make_split(cells([n]), seed=1), ["condition"])
    assert table.iloc[0].tolist() == [train, val, query]


@pytest.mark.parametrize(("n", "expected"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (5, [2, 1, 2])])
def test_ties_go_to_train_then_query(n, expected):
    table = counts_by(cells([n]), make_split(cells([n]), seed=1, fractions=(1 / 3,) * 3), ["condition"])
    assert table.iloc[0].tolist() == expected


def test_a_condition_keeps_a_train_cell_under_any_fractions():
    obs = cells([1, 2, 3])
    table = counts_by(obs, make_split(obs, seed=1, fractions=(0.01, 0.0, 0.99)), ["condition"])
    assert table["train"].tolist() == [1, 1, 1]


def test_seeds_differ_and_repeat():
    obs = cells([40, 40], 3)
    first, again, other = make_split(obs, seed=0), make_split(obs, seed=0), make_split(obs, seed=1)
    assert first.hash == again.hash != other.hash
    rest = first.roles != "query"
    assert 0.1 < (first.roles[rest] != other.roles[rest]).mean() < 0.9
    assert first.id == "in_dist-seed0"


@settings(max_examples=40)
@given(SIZES, st.integers(0, 4), st.integers(1, 1000), FRACTION_SETS)
def test_query_cells_are_the_same_for_every_seed(sizes, n_batches, seed, fractions):
    obs = cells(sizes, n_batches)
    first, other = (make_split(obs, seed=s, fractions=fractions).roles for s in (0, seed))
    assert ((first == "query") == (other == "query")).all()


@settings(max_examples=60)
@given(SIZES, st.integers(0, 3), st.integers(0, 50), st.integers(1, 40), FRACTION_SETS)
def test_copies_of_a_cell_share_a_role(sizes, n_batches, seed, n_groups, fractions):
    obs = cells(sizes, n_batches)
    groups = np.random.default_rng(seed).integers(0, n_groups, len(obs))
    split, later = (make_split(obs, seed=s, fractions=fractions, groups=groups) for s in (seed, seed + 1))
    assert (split.roles.groupby(groups).nunique() == 1).all()
    assert (counts_by(obs, split, ["condition"])["train"] >= 1).all()
    assert ((split.roles == "query") == (later.roles == "query")).all()
    alone = make_split(obs, seed=seed, fractions=fractions, groups=np.arange(len(obs)))
    pd.testing.assert_series_equal(alone.roles, make_split(obs, seed=seed, fractions=fractions).roles)


def test_a_split_keeps_copies_together_and_a_nearest_neighbour_finds_none(tmp_path):
    """A quarter of the cells is written twice, half of these copies under another condition."""
    rng = np.random.default_rng(0)
    obs = cells([60] * 8)
    counts = rng.poisson(1.0, (len(obs), 40)).astype(np.float32)
    copied = rng.permutation(len(obs))[:240].reshape(2, -1)
    counts[copied[1]] = counts[copied[0]]
    screen = Screen(
        "toy", csr_matrix(counts), np.array([f"G{i}x" for i in range(40)]), obs.assign(total=counts.sum(1))
    )
    assert np.bincount(screen.duplicates).max() == 2 and len(set(screen.duplicates)) == len(obs) - 120
    roles = get_split(screen, seed=1, directory=tmp_path).roles.to_numpy()
    assert (roles[copied[0]] == roles[copied[1]]).all()
    train, query = (np.flatnonzero(roles == role) for role in ("train", "query"))
    distance = ((counts[query][:, None] - counts[train]) ** 2).sum(axis=2)
    assert distance.min() > 0
    hit = obs["condition"].to_numpy()[train[distance.argmin(axis=1)]] == obs["condition"].to_numpy()[query]
    assert hit.mean() < 0.25
    # Without the groups the same cells meet themselves.
    loose = make_split(screen.obs, seed=1).roles.to_numpy()
    assert (loose[copied[0]] != loose[copied[1]]).any()


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_do_not_drift_into_one_role(copies):
    obs = cells([60 * copies] * 8)
    groups = np.tile(np.arange(60 * 8), copies)
    obs["condition"] = [f"G{i % 8}" for i in groups]
    shares = make_split(obs, seed=0, groups=groups).roles.value_counts(normalize=True)
    assert np.abs(shares[["train", "val", "query"]].to_numpy() - FRACTIONS).max() < 0.06


def test_nearly_empty_cells_are_no_copies():
    obs = cells([6])
    counts = np.zeros((6, 5), np.float32)
    counts[:4, :2] = 1
    counts[4:, :3] = 1
    screen = Screen("toy", csr_matrix(counts), np.array(list("ABCDE")), obs.assign(total=3.0))
    assert np.bincount(screen.duplicates).tolist() == [1, 1, 1, 1, 2]


def test_roles_do_not_depend_on_other_conditions():
    obs = cells([30, 20, 10], 2)
    alone = make_split(obs[obs["condition"] == "G1"], seed=5)
    pd.testing.assert_series_equal(make_split(obs, seed=5).roles[alone.roles.index], alone.roles)


def test_roles_stay_the_same_for_ever():
    """Whoever changes these makes every saved split another one than a fresh run would draw."""
    roles = make_split(cells([10], 2), seed=0).roles
    assert "".join(role[0] for role in roles) == "vvqqtttttt"
    assert make_split(cells([10], 2), seed=0).hash.startswith("0850d6404f425a09")


def test_controls_have_roles_too():
    obs = cells([50, 50]).replace({"condition": {"G0": "ctrl"}})
    table = counts_by(obs, make_split(obs, seed=0), ["condition"])
    assert table.loc["ctrl"].tolist() == [32, 8, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"track": "in_distribution"},
            "track: expected one of in_dist, batch_disjoint, .*, got 'in_distribution'",
        ),
        ({"seed": -1}, "seed: expected a whole number of at least 0, got -1"),
        ({"seed": 1.0}, "seed: .* got 1.0"),
        ({"seed": True}, "seed: .* got True"),
        ({"fractions": (0.6, 0.2, 0.3)}, r"fractions: .* sum 1, got \(0.6, 0.2, 0.3\)"),
        ({"fractions": (0.0, 0.5, 0.5)}, "fractions: expected train above 0"),
        ({"fractions": (1.2, -0.2, 0.0)}, "fractions: "),
        ({"fractions": (0.8, 0.2)}, "fractions: "),
        ({"fractions": (float("nan"), 0.5, 0.5)}, "fractions: "),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        make_split(cells([3]), **{"seed": 0, **change})


def test_bad_cells():
    obs = cells([3], 1)
    with pytest.raises(ValueError, match="unique names, got 'x' more than once"):
        make_split(obs.set_axis(["x", "y", "x"]), seed=0)
    with pytest.raises(ValueError, match=r"obs: expected a column 'condition', got \['batch'\]"):
        make_split(obs[["batch"]], seed=0)
    with pytest.raises(ValueError, match=r"obs\['batch'\]: expected a value for every cell, 1 have none"):
        make_split(obs.assign(batch=["b", None, "b"]), seed=0)
    with pytest.raises(ValueError, match=r"roles: expected only .*got \['test'\]"):
        Split("in_dist", 0, pd.Series({"x": "test"}), FRACTIONS)


def test_a_split_is_made_once_and_read_ever_after(tmp_path):
    screen = screen_of(cells([20, 30], 2))
    made = get_split(screen, seed=4, directory=tmp_path / "splits")
    path = tmp_path / "splits" / "in_dist-seed4.parquet"
    content, changed = path.read_bytes(), path.stat().st_mtime_ns
    read = get_split(screen, seed=4, directory=tmp_path / "splits")
    assert path.read_bytes() == content and path.stat().st_mtime_ns == changed
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    pd.testing.assert_series_equal(read.roles, make_split(screen.obs, seed=4).roles)
    pd.testing.assert_series_equal(read.roles, made.roles)
    assert read.hash == made.hash == make_split(screen.obs, seed=4).hash
    assert read.fractions == FRACTIONS


def rewrite(path, change_table=lambda table: table, **metadata):
    table = pq.read_table(path)
    found = json.loads(table.schema.metadata[b"perturbret_split"])
    table = change_table(table).replace_schema_metadata(
        {b"perturbret_split": json.dumps({**found, **metadata})}
    )
    pq.write_table(table, path)


def test_the_order_of_rows_in_the_file_does_not_matter(tmp_path):
    screen = screen_of(cells([20]))
    made = get_split(screen, seed=4, directory=tmp_path)
    rewrite(tmp_path / "in_dist-seed4.parquet", lambda table: table.take(list(range(19, -1, -1))))
    pd.testing.assert_series_equal(get_split(screen, seed=4, directory=tmp_path).roles, made.roles)


def other_role(table):
    roles = table["role"].to_pylist()
    return table.set_column(1, "role", pa.array(["val" if roles[0] == "train" else "train", *roles[1:]]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "expected a whole parquet file"),
        (lambda path: path.write_bytes(b""), "expected a whole parquet file"),
        (
            lambda path: pq.write_table(pa.table({"cell": ["x"], "role": ["val"]}), path),
            "split metadata, got TypeE",
        ),
        (lambda path: rewrite(path, lambda table: table.drop_columns(["role"])), "got KeyError"),
        (
            lambda path: rewrite(path, other_role),
            "hash of the roles: expected '[0-9a-f]{64}', got '[0-9a-f]{64}'",
        ),
        (lambda path: rewrite(path, lambda table: table.slice(1)), "hash of the roles"),
        (lambda path: rewrite(path, lambda table: pa.concat_tables([table, table])), "more than once"),
        (lambda path: rewrite(path, seed=5), "seed: expected 4, got 5"),
        (lambda path: rewrite(path, track="unseen_gene"), "track: expected 'in_dist', got 'unseen_gene'"),
        (lambda path: rewrite(path, fingerprint="f00"), "fingerprint: expected '[0-9a-f]{64}', got 'f00'"),
    ],
)
def test_a_damaged_or_changed_file_is_refused_and_kept(tmp_path, damage, message):
    screen = screen_of(cells([20]))
    get_split(screen, seed=4, directory=tmp_path)
    path = tmp_path / "in_dist-seed4.parquet"
    damage(path)
    content = path.read_bytes()
    with pytest.raises(SplitMismatch, match=message) as error:
        get_split(screen, seed=4, directory=tmp_path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_another_screen_or_other_fractions_are_refused(tmp_path):
    obs = cells([20])
    get_split(screen_of(obs), seed=0, directory=tmp_path)
    with pytest.raises(SplitMismatch, match="fingerprint: expected"):
        get_split(screen_of(obs, extra_count=1), seed=0, directory=tmp_path)
    with pytest.raises(
        SplitMismatch, match=r"fractions: expected \(0.5, 0.1, 0.4\), got \(0.64, 0.16, 0.2\)"
    ):
        get_split(screen_of(obs), seed=0, directory=tmp_path, fractions=(0.5, 0.1, 0.4))


def test_other_cells_under_the_same_fingerprint_are_refused(tmp_path):
    screen = screen_of(cells([20]))
    get_split(screen, seed=0, directory=tmp_path)
    renamed = Screen(
        "toy",
        screen.counts,
        screen.genes,
        screen.obs.rename(index={"cell3": "new"}),
        fingerprint=screen.fingerprint,
    )
    with pytest.raises(
        SplitMismatch, match=r"cells: expected the 20 of toy, got 20, 1 unknown and 1 missing"
    ):
        get_split(renamed, seed=0, directory=tmp_path)


def test_any_cell_names_survive_the_file(tmp_path):
    names = ["1", "AAACCTG-1", "a,b", '"x"', "µ β", " blank ", "None", "nan"]
    obs = pd.DataFrame({"condition": "G"}, index=names)
    assert get_split(screen_of(obs), seed=0, directory=tmp_path).roles.index.tolist() == names
