import dataclasses

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.metrics import matthews_corrcoef
from toy import toy_cells

from perturbret.data.datasets import load_screen
from perturbret.data.prepared import prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split
from perturbret.evaluation.column_guard import THRESHOLD, _phi, guard_columns, guard_findings, suspect


def columns(
    change=lambda x, labels, rng: None, *, seed=0, n_genes=30, n_train=60, conditions="ABCDEFGH", **options
):
    """Toy cells of Poisson counts whose columns `change` may edit; 60 training and 20 query cells a condition."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([*conditions, "ctrl"], n_train + 20)
    roles = np.tile(np.repeat(["train", "query"], [n_train, 20]), len(conditions) + 1)
    x = rng.poisson(rng.lognormal(0, 1, n_genes), (len(labels), n_genes))
    change(x, labels, rng)
    return toy_cells(labels, roles, counts=x, **options)


def test_phi_is_the_correlation_of_told_and_true():
    rng = np.random.default_rng(0)
    true, told = rng.random(200) < 0.3, rng.random(200) < 0.4
    mine = _phi(*(np.float64(v) for v in ((true & told).sum(), told.sum(), true.sum())), 200.0)
    assert mine == pytest.approx(matthews_corrcoef(true, told))


def test_columns_without_relation_are_below_and_below_luck_mostly():
    table = guard_columns(columns())
    assert list(table["verdict"]) == ["below"] * 3 and table["phi"].max() < 0.4
    assert suspect(table) == []
    assert "No column of the masked cells" in guard_findings(table)[0]


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_a_column_that_is_on_in_one_condition_is_suspect(share):
    def guide(x, labels, rng):
        x[:, 7] = np.where((labels == "C") & (rng.random(len(labels)) < share), 5, 0)

    table = guard_columns(columns(guide))
    row = table.iloc[0]
    assert (row["column"], row["tells"], row["by"], row["verdict"]) == ("gene7", "C", "high", "suspect")
    assert row["precision"] == 1 and row["recall"] == pytest.approx(share, abs=0.12)
    assert row["luck"] < row["phi"]
    assert suspect(table) == ["gene7"]


def test_a_gene_that_one_condition_has_lost_is_suspect():
    def loss(x, labels, rng):
        x[:, 3] = np.where(labels == "B", 0, rng.poisson(20, len(labels)))

    row = guard_columns(columns(loss)).iloc[0]
    assert (row["column"], row["tells"], row["by"], row["verdict"]) == ("gene3", "B", "low", "suspect")


def test_a_column_in_which_only_middle_values_tell_is_suspect():
    def code(x, labels, rng):
        x[:, 5] = np.where(labels == "D", 8, np.where(rng.random(len(labels)) < 0.5, 0, 100))

    row = guard_columns(columns(code)).iloc[0]
    assert (row["column"], row["tells"], row["verdict"]) == ("gene5", "D", "suspect")


def test_a_guide_of_several_combinations_tells_its_target():
    names = ["A", "A+B", "A+C", "A+D", "B", "C", "D", "E"]

    def guide(x, labels, rng):
        x[:, 0] = np.where(np.char.find(labels, "A") >= 0, 4, 0)

    row = guard_columns(columns(guide, conditions=names)).iloc[0]
    assert (row["column"], row["tells"]) == ("gene0", "target A (4 conditions)") and row["phi"] == 1


def test_an_effect_of_strong_but_usual_size_is_below():
    """Twice the counts in one condition, or on in 60% against 10%: what perturbations do to genes."""

    def effect(x, labels, rng):
        x[:, 0] = rng.poisson(np.where(labels == "A", 10, 5))
        x[:, 1] = rng.random(len(labels)) < np.where(labels == "B", 0.6, 0.1)

    assert suspect(guard_columns(columns(effect))) == []


def test_only_training_cells_are_read():
    def in_query(x, labels, rng):
        x[:, 7] = 0

    prepared = columns(in_query)
    before = guard_columns(prepared)
    counts = prepared.cells.counts.toarray()
    counts[(prepared.roles != "train") & (prepared.conditions == "C"), 7] = 50
    changed = dataclasses.replace(prepared.cells, counts=csr_matrix(counts))
    assert guard_columns(dataclasses.replace(prepared, cells=changed)).equals(before)


def test_accepted_columns_are_shown_as_accepted():
    def guide(x, labels, rng):
        x[:, 7], x[:, 8] = (labels == "C") * 5, (labels == "D") * 5

    prepared = columns(guide)
    table = guard_columns(prepared, accepted=["gene7", "gene1"])
    assert (
        dict(zip(table["column"], table["verdict"], strict=True)).items()
        >= {
            "gene7": "accepted",
            "gene8": "suspect",
        }.items()
    )
    assert suspect(table) == ["gene8"]
    text = "\n".join(guard_findings(table, ["gene7", "gene1"]))
    assert "**SUSPECT: 1 column nearly names" in text and "accepted_columns: [gene8]" in text
    assert "although they do: gene7." in text and "names gene1," in text
    everything = guard_columns(prepared, accepted=["*"])
    assert suspect(everything) == [] and "no score counts" not in "\n".join(guard_findings(everything, ["*"]))


def test_what_the_batch_explains_is_shown():
    rng = np.random.default_rng(1)
    n = 9 * 80
    batch = np.where(np.arange(n) // 80 == 2, "own", rng.choice(["x", "y"], n))

    def batch_gene(x, labels, rng):
        x[:, 7] = (labels == "C") * 5

    confined = guard_columns(columns(batch_gene, batch=batch)).iloc[0]
    mixed = guard_columns(columns(batch_gene, batch=rng.choice(["x", "y"], n))).iloc[0]
    assert confined["phi"] == mixed["phi"] == 1
    assert confined["within_batch"] == 1 and abs(mixed["within_batch"]) < 0.1


def test_embeddings_are_looked_at_by_dimension_and_as_a_whole():
    rng = np.random.default_rng(0)
    labels = np.repeat([*"ABCDEFGH", "ctrl"], 80)
    one_hot = (labels[:, None] == np.array([*"ABCDEFGH"])).astype(float)
    rotation = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    hidden = (one_hot + 0.05 * rng.standard_normal(one_hot.shape)) @ rotation
    given = {"label": one_hot, "hidden": hidden, "noise": rng.standard_normal((len(labels), 5))}
    table = guard_columns(columns(obsm=given))
    assert "obsm:label[0]" in suspect(table) and "obsm:hidden" in suspect(table)
    assert not any(name.startswith("obsm:noise") for name in suspect(table))
    assert suspect(table, "pca") == []
    assert "obsm:hidden" in suspect(table, "obsm:hidden")
    assert not any(name.startswith("obsm:label") for name in suspect(table, "obsm:hidden"))


def test_few_conditions_or_permutations_are_refused():
    with pytest.raises(
        ValueError, match=r"conditions: expected two or more with training cells, got \['A'\]"
    ):
        guard_columns(columns(conditions="A"))
    few = guard_columns(columns(n_train=9))
    assert few.empty and suspect(few) == [] and "was not checked" in guard_findings(few)[0]
    with pytest.raises(ValueError, match="n_permutations: expected at least 1, got 0"):
        guard_columns(columns(), n_permutations=0)


def test_blocks_of_columns_do_not_show(monkeypatch):
    from perturbret.evaluation import column_guard as module

    prepared = columns()
    whole = guard_columns(prepared)
    monkeypatch.setattr(module, "_CHUNK", 100)
    assert guard_columns(prepared).equals(whole)


def with_column(screen, values, name):
    """The screen with one more column."""
    counts = csr_matrix(np.column_stack([screen.counts.toarray(), values]).astype(np.float32))
    return dataclasses.replace(
        screen,
        counts=counts,
        genes=np.append(screen.genes, name),
        obs=screen.obs.assign(total=screen.obs["total"] + values),
        target_columns=None,
        fingerprint="",
    )


def guarded(screen, mask="all_targets"):
    split = make_split(screen.obs, track="in_dist", seed=0)
    return guard_columns(prepare(screen, split, mask=mask), accepted=screen.audit.get("accepted_columns", ()))


@pytest.mark.parametrize("share", [0.65, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_guides_of_a_simulated_screen_are_found(share, seed):
    screen = simulate_screen(n_singles=8, n_doubles=4, n_genes=100, cells_per_condition=90, seed=seed)
    rng = np.random.default_rng(seed)
    condition = screen.conditions[seed]
    own = screen.obs["condition"].to_numpy() == condition
    values = np.where(
        own & (rng.random(len(own)) < share), rng.poisson(4, len(own)) + 1, rng.random(len(own)) < 0.001
    )
    assert "guide1" in suspect(guarded(with_column(screen, values, "guide1")))


@pytest.mark.parametrize("name", ["norman_subset", "thp1"])
def test_real_screens_are_not_suspect_and_planted_guides_in_them_are(real_data, name):
    screen = load_screen(name)
    table = guarded(screen)
    assert suspect(table) == []
    others = table[table["verdict"] == "below"]
    assert others["phi"].max() < 0.55 < THRESHOLD
    rng = np.random.default_rng(0)
    own = screen.obs["condition"].to_numpy() == screen.conditions[3]
    guide = np.where(own & (rng.random(len(own)) < 0.65), 3, 0)
    assert suspect(guarded(with_column(screen, guide, "unnamed"))) == ["unnamed"]


def test_a_real_activated_target_under_another_name_is_found(real_data):
    screen = load_screen("norman_subset")
    hidden = dataclasses.replace(
        screen,
        genes=np.array(["oddly-spelled" if gene == "TMSB4X" else gene for gene in screen.genes]),
        target_columns=None,
        fingerprint="",
    )
    row = guarded(hidden).iloc[:2].set_index("column").loc["oddly-spelled"]
    assert (row["tells"], row["verdict"]) == ("TMSB4X", "suspect")
