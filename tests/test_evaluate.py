import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from toy import ToyEncoder, from_obsm, reordered, toy_cells, toy_screen

from perturbret.data.conditions import CTRL
from perturbret.data.prepared import ContextMismatch, prepare
from perturbret.data.screen import Screen
from perturbret.data.splits import make_split
from perturbret.evaluation.judge import READOUT, evaluate, null_control, summarise, within_batch
from perturbret.evaluation.nulls import permute_conditions
from perturbret.evaluation.scoring import ALL_SCORINGS, make_queries

CONDITIONS = ("A", "A+B", "B", "C", "D", "E", "F", "G")
SIZES = (1, 5, 10, 20)


def screen(embed, *, seed=0, n_train=30, n_query=20, **options):
    """Toy cells whose embedding is `embed(labels, rng)`."""
    parts = toy_screen(n_train=n_train, n_query=n_query, conditions=CONDITIONS, **options)
    rng = np.random.default_rng(seed)
    return toy_cells(**parts, obsm={"x": embed(parts["conditions"], rng)})


def codes(labels):
    return np.array([CONDITIONS.index(label) if label in CONDITIONS else 0 for label in labels])


def informative(labels, rng, strength=1.5):
    """Weak signal: a class centre plus noise, in 12-d."""
    centres = np.random.default_rng(99).standard_normal((len(CONDITIONS), 12)) * strength
    return 2 + centres[codes(labels)] + rng.standard_normal((len(labels), 12)) * 2


def with_head(prepared, weights=None):
    d = prepared.cells.obsm["x"].shape[1]
    weights = np.eye(d, len(CONDITIONS)) * 20 if weights is None else weights
    prior = np.log(np.full(len(CONDITIONS), 1 / len(CONDITIONS)))
    return ToyEncoder(prepared, from_obsm(), weights=weights, log_prior=prior)


def estimates(summary, **wanted):
    for column, value in wanted.items():
        summary = summary[summary[column] == value]
    return summary["estimate"]


def test_a_perfect_encoder_scores_one_in_every_way():
    prepared = screen(lambda labels, rng: np.eye(len(CONDITIONS))[codes(labels)])
    scores = evaluate(with_head(prepared), prepared, query_sizes=SIZES)
    read_outs = scores.groupby(READOUT).ngroups
    assert read_outs == (3 * 2 + 2) * (1 + 3 * 3)
    for metric in ("rank", "mrr", "mrr@10", "exact_hit@1", "exact_hit@10", "relevant_hit@1", "ndcg_binary@5"):
        assert (scores[metric] == 1).all()
    assert scores["top10"].str.split("|").str[0].tolist() == scores["condition"].tolist()


@pytest.mark.parametrize("point", [0.0, 0.1, 1000.0])
def test_a_collapsed_encoder_scores_exactly_chance_in_every_way(point):
    prepared = screen(lambda labels, rng: np.tile(point * rng.exponential(size=300), (len(labels), 1)))
    encoder = with_head(prepared, np.zeros((300, len(CONDITIONS))))
    summary = summarise(evaluate(encoder, prepared, query_sizes=SIZES), n_resamples=10)
    np.testing.assert_allclose(summary["estimate"], summary["chance"], rtol=1e-12)
    assert estimates(summary, metric="exact_hit@1").tolist() == pytest.approx([1 / 8] * 2 * 8 * 10)


def test_an_encoder_that_collapsed_but_for_rounding_errors_scores_chance():
    def embed(labels, rng):
        return rng.exponential(size=64) * (1 + 1e-7 * rng.standard_normal((len(labels), 64)))

    prepared = screen(embed)
    encoder = ToyEncoder(prepared, from_obsm())
    summary = summarise(evaluate(encoder, prepared, query_sizes=SIZES), n_resamples=10)
    np.testing.assert_allclose(summary["estimate"], summary["chance"], rtol=1e-12)


def test_random_embeddings_and_shuffled_labels_score_near_chance():
    random = screen(lambda labels, rng: rng.standard_normal((len(labels), 12)), n_query=100)
    real = screen(informative, n_query=100)
    shuffled = toy_cells(
        permute_conditions(real.conditions, real.roles, seed=5), real.roles, obsm=real.cells.obsm
    )
    for prepared in (random, shuffled):
        summary = summarise(evaluate(ToyEncoder(prepared, from_obsm()), prepared, query_sizes=(1,)))
        rows = summary.query("metric == 'exact_hit@1' and average == 'micro'")
        assert (rows["n_queries"] == 800).all()
        # Four standard errors of a proportion over 800 queries.
        assert (abs(rows["estimate"] - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / 800)).all()
    real_hits = estimates(summarise(evaluate(ToyEncoder(real, from_obsm()), real)), metric="exact_hit@1")
    assert real_hits.min() > 0.25


def test_order_of_the_cells_does_not_matter():
    prepared = screen(informative, batches=2)
    shuffled = reordered(prepared, np.random.default_rng(3).permutation(len(prepared.conditions)))
    a, b = (evaluate(with_head(cells), cells, query_sizes=(1, 5), seed=2) for cells in (prepared, shuffled))
    pd.testing.assert_frame_equal(a, b)


def test_embedding_in_batches_or_not_does_not_matter():
    prepared = screen(informative)
    calls = []

    def one_by_one(cells):
        calls.append(len(cells))
        return np.concatenate([cells.take([i]).obsm["x"] for i in range(len(cells))])

    a = evaluate(ToyEncoder(prepared, from_obsm()), prepared, query_sizes=(1, 5))
    pd.testing.assert_frame_equal(a, evaluate(ToyEncoder(prepared, one_by_one), prepared, query_sizes=(1, 5)))
    # Query cells, expression pools and library cells: each embedded once.
    assert sorted(calls) == sorted(
        [8 * 20, (a.query("pooling == 'expression'")["query_id"].nunique()), 8 * 30]
    )


def test_table_says_what_was_scored():
    prepared = screen(informative, batches=2)
    scores = evaluate(with_head(prepared), prepared, query_sizes=(1, 5, 50), libraries=("mean",))
    assert set(scores["query_size"]) == {1, 5}
    assert set(scores.query("query_size == 1")["pooling"]) == {"single"}
    assert set(scores.query("query_size == 5")["pooling"]) == {"scores", "embeddings", "expression"}
    assert set(map(tuple, scores[["library", "scoring"]].to_numpy())) == {
        ("mean", "cosine"),
        ("mean", "whitened"),
        ("none", "classifier"),
        ("none", "classifier_corrected"),
    }
    assert (scores["candidates"] == "train").all() and (scores["n_candidates"] == 8).all()
    assert (scores["n_relevant"] == scores["condition"].map({"A": 2, "B": 2, "A+B": 3}).fillna(1)).all()
    assert set(scores["batch"]) == {"batch0", "batch1"}
    assert not scores.duplicated([*READOUT, "query_id"]).any()
    assert "batch" not in evaluate(with_head(screen(informative)), screen(informative), query_sizes=(1,))


def test_classifier_pooling_sums_log_probabilities_and_averages_embeddings_in_the_head():
    prepared = screen(informative)
    encoder = with_head(prepared, np.random.default_rng(1).standard_normal((12, 8)))
    encoder.log_prior = np.log(np.random.default_rng(2).dirichlet(np.ones(8)))
    x = prepared.cells.obsm["x"].astype(np.float32)
    queries = make_queries(prepared, size=5, seed=0)
    log_proba = encoder.log_proba(x)
    expected = {
        ("classifier", "scores"): log_proba[queries.members].sum(axis=1),
        ("classifier_corrected", "scores"): (log_proba - encoder.log_prior)[queries.members].sum(axis=1),
        ("classifier", "embeddings"): encoder.log_proba(x[queries.members].mean(axis=1)),
    }
    scores = evaluate(encoder, prepared, query_sizes=(5,))
    for (scoring, pooling), wanted in expected.items():
        rows = scores[(scores["scoring"] == scoring) & (scores["pooling"] == pooling)]
        assert rows["query_id"].tolist() == queries.ids.tolist()
        best = np.array(encoder.classes)[wanted.argmax(axis=1)]
        assert rows["top10"].str.split("|").str[0].tolist() == best.tolist()
        top = np.sort(wanted, axis=1)
        np.testing.assert_allclose(rows["margin"], top[:, -1] - top[:, -2], atol=1e-3)


def test_expression_is_pooled_before_the_encoder_and_embeddings_after_it():
    rng = np.random.default_rng(0)
    parts = toy_screen(n_train=30, n_query=20, conditions=CONDITIONS)
    rates = np.exp(np.random.default_rng(9).standard_normal((8, 12)))
    prepared = toy_cells(**parts, counts=rng.poisson(rates[codes(parts["conditions"])]) + 1)
    seen = []

    def embed(cells):
        seen.append(cells)
        return np.log(cells.counts.toarray())

    scores = evaluate(ToyEncoder(prepared, embed), prepared, query_sizes=(5,), libraries=("mean",))
    pooled = next(cells for cells in seen if cells.names[0] == "pool0")
    queries = make_queries(prepared, size=5, seed=0)
    counts = prepared.cells.counts.toarray()
    np.testing.assert_array_equal(pooled.counts.toarray(), counts[queries.members].sum(axis=1))
    np.testing.assert_array_equal(pooled.totals, counts[queries.members].sum(axis=(1, 2)))
    library = np.stack([
        np.log(counts[(prepared.conditions == name) & (prepared.roles == "train")]).mean(axis=0)
        for name in CONDITIONS
    ])  # fmt: skip
    library /= np.linalg.norm(library, axis=1, keepdims=True)
    for pooling, embedded in (
        ("expression", np.log(counts[queries.members].sum(axis=1))),
        ("embeddings", np.log(counts)[queries.members].mean(axis=1)),
    ):
        rows = scores[(scores["pooling"] == pooling) & (scores["scoring"] == "cosine")]
        best = (embedded @ library.T).argmax(axis=1)
        assert rows["top10"].str.split("|").str[0].tolist() == np.array(CONDITIONS)[best].tolist()


def test_pooled_scores_are_the_mean_of_the_cells_cosines():
    prepared = screen(informative)
    scores = evaluate(ToyEncoder(prepared, from_obsm()), prepared, query_sizes=(1, 20), libraries=("mean",))
    x = prepared.cells.obsm["x"]
    train, query = prepared.where("train"), prepared.where("query")
    library = np.stack([x[train][prepared.conditions[train] == name].mean(axis=0) for name in CONDITIONS])
    cosines = x[query] @ library.T
    cosines /= np.linalg.norm(x[query], axis=1)[:, None] * np.linalg.norm(library, axis=1)
    # 20 query cells per condition: the one query of size 20 is all of them.
    means = np.stack([cosines[prepared.conditions[query] == name].mean(axis=0) for name in CONDITIONS])
    rows = (
        scores.query("pooling == 'scores' and scoring == 'cosine'")
        .set_index("condition")
        .loc[list(CONDITIONS)]
    )
    top = np.sort(means, axis=1)
    np.testing.assert_allclose(rows["margin"], top[:, -1] - top[:, -2], atol=2e-6)


def test_whitening_is_fitted_on_training_cells_alone():
    prepared = screen(informative)
    moved = screen(informative)
    query = moved.where("query")
    moved.cells.obsm["x"][query[1:]] *= 50
    options = {"query_sizes": (1,), "scorings": ("whitened",), "libraries": ("mean",)}
    a, b = (evaluate(ToyEncoder(cells, from_obsm()), cells, **options) for cells in (prepared, moved))
    first = prepared.cells.names[query[0]]
    pd.testing.assert_frame_equal(a[a["query_id"] == first], b[b["query_id"] == first])


def test_observed_candidates_come_from_the_gallery_too():
    prepared = screen(lambda labels, rng: np.eye(len(CONDITIONS))[codes(labels)])
    held_out = prepared.conditions == "A+B"
    prepared.roles[held_out & (prepared.roles == "train")] = "gallery"
    encoder = ToyEncoder(prepared, from_obsm())
    observed = evaluate(encoder, prepared, query_sizes=(1,), candidates="observed")
    assert (observed["exact_hit@1"] == 1).all() and (observed["n_candidates"] == 8).all()
    trained = evaluate(encoder, prepared, query_sizes=(1,), libraries=("mean",))
    unseen = trained[trained["condition"] == "A+B"]
    assert (unseen["exact_hit@10"] == 0).all() and unseen["rank"].isna().all()
    assert (unseen["n_relevant"] == 2).all() and (trained["n_candidates"] == 7).all()
    summary = summarise(trained, n_resamples=10)
    assert "rank" not in set(summary["metric"])
    chance = summary.query("metric == 'exact_hit@1' and average == 'macro'")["chance"]
    assert chance.tolist() == pytest.approx([1 / 7 * 7 / 8] * 2)


def test_classifier_cannot_score_candidates_that_it_was_not_trained_on():
    prepared = screen(informative)
    prepared.roles[(prepared.conditions == "A+B") & (prepared.roles == "train")] = "gallery"
    encoder = with_head(prepared, np.ones((12, 7)))
    encoder.classes = tuple(name for name in CONDITIONS if name != "A+B")
    assert set(evaluate(encoder, prepared, candidates="observed")["scoring"]) == {"cosine", "whitened"}
    with pytest.raises(ValueError, match="without 'A\\+B'"):
        evaluate(encoder, prepared, candidates="observed", scorings=["classifier"])


def test_an_encoder_without_head_has_no_classifier_rows():
    prepared = screen(informative)
    encoder = ToyEncoder(prepared, from_obsm())
    assert set(evaluate(encoder, prepared, query_sizes=(1,))["scoring"]) == {"cosine", "whitened"}
    with pytest.raises(ValueError, match="'toy' has no classifier, got only classifier"):
        evaluate(encoder, prepared, scorings=("classifier",))


def test_an_encoder_of_another_mask_is_refused_unless_declared():
    prepared = screen(informative)
    encoder = ToyEncoder(prepared, from_obsm())
    encoder.context = dataclasses.replace(prepared.context, mask="none")
    with pytest.raises(ContextMismatch, match="mask: the encoder was fitted with 'none'.*'all_targets'"):
        evaluate(encoder, prepared)
    assert len(evaluate(encoder, prepared, query_sizes=(1,), ablation=("mask",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"libraries": ("median",)}, "libraries: expected some of mean, bootstrap, raw_cell, got median"),
        ({"poolings": ("sum",)}, "poolings: expected some of scores, embeddings, expression, got sum"),
        ({"scorings": ()}, "scorings: expected some of cosine, .*, got none"),
        ({"candidates": "all"}, "candidates: expected one of train, observed, predicted, got 'all'"),
        ({"role": "val"}, "role 'val', found none"),
        ({"query_sizes": (50,)}, r"query_sizes: expected one that a condition reaches .* got \(50,\)"),
    ],
)
def test_bad_requests_are_refused(options, message):
    prepared = screen(informative)
    with pytest.raises(ValueError, match=message):
        evaluate(ToyEncoder(prepared, from_obsm()), prepared, **options)


def test_summary_has_a_row_per_readout_metric_and_average_with_computed_chance():
    prepared = screen(informative)
    scores = evaluate(with_head(prepared), prepared, query_sizes=(1, 5), libraries=("mean",))
    summary = summarise(scores, n_resamples=200)
    assert not summary.duplicated([*READOUT, "metric", "average"]).any()
    assert (summary["ci_low"] <= summary["estimate"] + 1e-12).all()
    assert (summary["ci_high"] >= summary["estimate"] - 1e-12).all()
    rows = summary.query("query_size == 1 and scoring == 'cosine'").set_index(["metric", "average"])
    assert set(rows["n_queries"]) == {160} and set(rows["n_conditions"]) == {8}
    single = scores.query("query_size == 1 and scoring == 'cosine'")
    assert rows.loc[("mrr", "micro"), "estimate"] == pytest.approx(single["mrr"].mean())
    by_condition = single.groupby("condition")["ndcg@5"].mean()
    assert rows.loc[("ndcg@5", "macro"), "estimate"] == pytest.approx(by_condition.mean())
    assert rows.loc[("exact_hit@5", "micro"), "chance"] == pytest.approx(5 / 8)
    assert rows.loc[("rank", "micro"), "chance"] == pytest.approx(4.5)
    # Of 8 candidates 2 are relevant to A and to B, 3 to A+B and 1 to each of the other five.
    relevant = (2 * 2 / 8 + 3 / 8 + 5 / 8) / 8
    assert rows.loc[("relevant_hit@1", "macro"), "chance"] == pytest.approx(relevant)
    assert "margin" not in set(summary["metric"])


def test_summary_survives_a_round_trip_through_a_file(tmp_path):
    prepared = screen(informative, batches=2)
    scores = evaluate(with_head(prepared), prepared, query_sizes=(1, 5), libraries=("mean",))
    scores.to_parquet(tmp_path / "scores.parquet", index=False)
    read = pd.read_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(summarise(read, n_resamples=20), summarise(scores, n_resamples=20))


def test_null_control_agrees_with_evaluate_and_knows_chance_prior_and_luck():
    prepared = screen(informative, batches=2)
    null = null_control(with_head(prepared), prepared, n_permutations=199, n_resamples=200)
    summary = summarise(evaluate(with_head(prepared), prepared, query_sizes=(1,)), n_resamples=10)
    rows = summary.query("metric == 'exact_hit@1' and average == 'micro'").set_index(["library", "scoring"])
    for row in null.itertuples():
        assert row.estimate == pytest.approx(rows.loc[(row.library, row.scoring), "estimate"])
        assert row.ci_low < row.estimate < row.ci_high
    assert len(null) == 3 * 2 + 2 and set(null["scoring"]) == set(ALL_SCORINGS)
    assert null["chance"].tolist() == pytest.approx([1 / 8] * 8)
    assert null["class_prior"].tolist() == pytest.approx([1 / 8] * 8)
    assert (null["n_queries"] == 160).all()
    # These labels are the true ones: far more hits than luck.
    assert null.query("scoring == 'cosine'")["p_value"].tolist() == [1 / 200] * 3
    assert null["luck"].between(0.08, 0.2).all()


TARGETS = ("KLF1", "GATA1", "SPI1", "TAL1", "MYB", "IRF1")


def expressed_targets_screen():
    """Counts without any effect of the label, 2 UMIs per cell of every target."""
    rng = np.random.default_rng(0)
    conditions = np.repeat([*TARGETS, CTRL], 80)
    genes = np.array([*TARGETS, "ACTB", "GAPDH", "B2M", "FTL", "HBG1", "HBZ"])
    counts = rng.poisson(2.0, (len(conditions), len(genes))).astype(np.float32)
    obs = pd.DataFrame(
        {
            "condition": conditions,
            "total": counts.sum(axis=1) + 50.0,
            "batch": rng.choice(["b1", "b2"], len(conditions)),
        },
        index=[f"cell{i}" for i in range(len(conditions))],
    )
    return Screen("expressed", csr_matrix(counts), genes, obs)


def test_null_control_shows_the_leak_of_own_targets_and_none_of_all_targets():
    cells = expressed_targets_screen()
    split = make_split(cells.obs, seed=0)
    found = {}
    for mask in ("none", "own_targets", "all_targets"):
        roles = split.roles.reindex(cells.obs.index).to_numpy(str)
        permuted = permute_conditions(
            cells.obs["condition"].to_numpy(str), roles, cells.obs["batch"].to_numpy(str), seed=1
        )
        prepared = prepare(cells, split, mask=mask, conditions=permuted)
        encoder = ToyEncoder(
            prepared, lambda masked: np.log1p(masked.counts.toarray() / masked.totals[:, None] * 100)
        )
        found[mask] = null_control(encoder, prepared, n_permutations=999).set_index(["library", "scoring"])
    leak = found["own_targets"].loc[("mean", "whitened")]
    assert leak["p_value"] == 1 / 1000 and leak["ci_low"] > 0.4 > 2 * leak["chance"]
    for mask in ("none", "all_targets"):
        assert (found[mask]["p_value"] > 0.02).all()
        assert (found[mask]["ci_low"] < found[mask]["class_prior"]).all()
        assert (found[mask]["ci_high"] > found[mask]["chance"]).all()


def test_single_cells_are_judged_among_the_conditions_of_their_batch():
    """A batch of one condition, one of two, one of all: an embedding that knows the batch alone gains nothing."""
    parts = toy_screen(n_train=30, n_query=20, conditions=CONDITIONS)
    labels = parts["conditions"]
    batch = np.where(labels == "A", "one", np.where(np.isin(labels, ["B", "C"]), "two", "all"))
    one_hot = (batch[:, None] == np.array(["all", "one", "two"])).astype(float)
    known = toy_cells(labels, parts["roles"], batch=batch, obsm={"x": one_hot})
    scores = evaluate(
        ToyEncoder(known, from_obsm()), known, query_sizes=(1, 5), libraries=("mean",), scorings=("cosine",)
    )
    single = scores[scores["query_size"] == 1]
    assert single.groupby("batch")["batch_n_candidates"].first().dropna().to_dict() == {"all": 5, "two": 2}
    assert single.loc[single["batch"] == "one", "batch_hit@1"].isna().all()
    assert scores.loc[scores["query_size"] == 5, "batch_hit@1"].isna().all()
    # Prototypes of the conditions of a batch are equal: a tie, whose expectation is chance.
    np.testing.assert_allclose(single["batch_hit@1"].dropna(), 1 / single["batch_n_candidates"].dropna())
    (row,) = within_batch(scores).to_dict("records")
    assert row["estimate"] == pytest.approx(row["chance"]) and row["excess"] == pytest.approx(0)
    assert row["n_queries"] == 20 * 7 and row["n_conditions"] == 7
    assert row["chance"] == pytest.approx((40 / 2 + 100 / 5) / 140)
    assert "batch_hit@1" not in set(summarise(scores, n_resamples=10)["metric"])


def test_a_method_that_reads_expression_is_right_within_batches_too():
    prepared = screen(lambda labels, rng: informative(labels, rng, strength=4.0), batches=2)
    scores = evaluate(
        ToyEncoder(prepared, from_obsm()),
        prepared,
        query_sizes=(1,),
        libraries=("mean",),
        scorings=("cosine",),
    )
    row = within_batch(pd.concat([scores.assign(encoder=name, mask="none") for name in "ab"])).iloc[1]
    assert (
        row["encoder"] == "b"
        and row["ci_low"] > 0.2
        and row["estimate"] - row["chance"] == pytest.approx(row["excess"])
    )
    # All conditions are in both batches: the same question as among all candidates.
    np.testing.assert_allclose(scores["batch_hit@1"], scores["exact_hit@1"])


def test_without_batches_there_is_nothing_within_them():
    prepared = screen(informative)
    scores = evaluate(ToyEncoder(prepared, from_obsm()), prepared, query_sizes=(1,), libraries=("mean",))
    assert "batch_hit@1" not in scores and within_batch(scores).empty
