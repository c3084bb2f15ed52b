"""limits.csv of a run: what is in it, what it may have seen, and that it agrees with the exact posterior."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import toy
from scipy.sparse import csr_matrix

from perturbret.data.prepared import Cells, prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import get_split, make_split
from perturbret.encoders.base import load_encoder
from perturbret.encoders.bayes import fit_bayes
from perturbret.evaluation.judge import evaluate, summarise
from perturbret.evaluation.query_sizes import cells_needed
from perturbret.evaluation.readouts import choose_readout, read_validation
from perturbret.report import limits as shown
from perturbret.runs import limits as run_limits
from perturbret.runs.limits import COLUMNS, find_limits, told_apart
from perturbret.runs.pipeline import evaluate_run
from perturbret.runs.runs import open_run

SETTINGS = {
    "libraries": ["mean"],
    "query_sizes": [1, 3, 6],
    "poolings": ["scores", "embeddings", "expression"],
}


@pytest.fixture(scope="module")
def screen():
    return toy.tiny_screen(cells_per_condition=40)


@pytest.fixture(scope="module")
def runs(screen, tmp_path_factory):
    """An evaluated run of PCA and of the exact posterior."""
    outputs = str(tmp_path_factory.mktemp("outputs"))
    found = {}
    for encoder in ("pca", "bayes_ceiling"):
        found[encoder] = open_run(screen, encoder=encoder, mask="all_targets", seed=0, outputs=outputs)
        evaluate_run(found[encoder], **SETTINGS, n_resamples=50)
    return found


def table(run):
    return pd.read_csv(run.directory / "limits.csv")


def asked(run):
    """Arguments of `find_limits` but for the encoder and embeddings."""
    library, scoring = table(run).query("about == 'alike merged'")[["library", "scoring"]].iloc[0]
    return {
        "summary": pd.read_csv(run.directory / "summary.csv"),
        **{"library": library, "scoring": scoring, "n_resamples": 20, "seed": 0},
        **{name: SETTINGS[name] for name in ("query_sizes", "poolings")},
    }


def test_what_a_run_leaves(runs):
    found = table(runs["pca"])
    assert tuple(found.columns) == COLUMNS
    about = set(found["about"])
    assert about == {
        "cells needed", "pooling on validation", "alike merged", "replicates", "positive control", "bound", "embedding",
    }  # fmt: skip
    assert set(found.query("about == 'replicates'")["name"]) == {"halves", "guides", "guides, dealt out"}
    control = found.query("about == 'positive control'").set_index("level")["estimate"]
    assert control[1.0] == 1 and control[0.5] > 0.8
    pooled = found.query("about == 'pooling on validation'")
    assert sorted(pooled["name"]) == ["chosen", "tried", "tried"] and (pooled["query_size"] == 6).all()
    assert set(found.query("about == 'cells needed'")["pooling"]) == set(SETTINGS["poolings"])
    by_condition = pd.read_csv(runs["pca"].directory / "cells_needed.csv")
    assert by_condition["condition"].tolist() == list(runs["pca"].prepared.candidates)
    assert {"1 cells", "3 cells", "6 cells", "cells for 50%", "cells for 80%"} < set(by_condition)


def test_the_pages_say_what_is_in_it(runs):
    run = runs["pca"]
    found = table(run)
    choice = choose_readout(read_validation(run.directory, ["mean"]))
    assert f"**Setting to use**: {choice.scoring}" in shown.recommendation(choice, found)
    assert "of the range from chance to the exact posterior" in shown.limit_lines(found)
    real = found[found["about"] != "bound"]
    assert "No bound is known on real cells" in shown.limit_lines(real)
    assert set(shown.reference_table(real)["read-out"]) == {
        "cosine of mean embeddings, no bound",
        "whitened of mean embeddings, no bound",
        "cosine, raw_cell, positive control",
    }
    assert "effective dimensions" in shown.shape_lines(found)
    tests = told_apart(run.screen, mask="all_targets", root=run.directory.parent)
    assert "are told from controls" in shown.alike_lines(tests, found)
    assert len(shown.needed_table(found)) == 6
    assert len(shown.needed_by_condition(pd.read_csv(run.directory / "cells_needed.csv"))) == 5


def test_unreached_sizes_are_said_to_be(runs):
    found = table(runs["pca"])
    never = found.assign(estimate=np.inf, ci_low=np.inf, ci_high=np.inf)
    assert "is not reached with up to 6 cells" in shown.limit_lines(never[never["about"] == "cells needed"])
    assert "not with 6" in set(shown.needed_table(never)["cells needed"])


def changed(prepared, role):
    """The same cells, those of one role with other counts."""
    counts = prepared.cells.counts.toarray()
    rows = np.flatnonzero(prepared.roles == role)
    counts[rows] = np.random.default_rng(0).poisson(3.0, (len(rows), counts.shape[1]))
    cells = prepared.cells
    totals = np.where(prepared.roles == role, cells.totals + 500, cells.totals)
    other = Cells(csr_matrix(counts), totals, cells.genes, cells.names, cells.batch, cells.obsm)
    return replace(prepared, cells=other)


def test_nothing_chosen_or_fitted_depends_on_query_cells(runs, screen, tmp_path):
    run = runs["pca"]
    encoder = load_encoder(run.directory)
    rows = ["pooling on validation", "embedding"]

    def chosen(prepared):
        found = find_limits(
            replace(run, prepared=prepared), encoder, encoder.embed(prepared.cells), **asked(run)
        )
        found = found[found["about"].isin(rows) & ~found["name"].str.startswith("hubs")]
        return found.reset_index(drop=True)

    pd.testing.assert_frame_equal(
        chosen(run.prepared), chosen(changed(run.prepared, "query")), check_exact=True
    )
    # What must change does, with cells that it may see.
    assert not chosen(run.prepared).equals(chosen(changed(run.prepared, "val")))
    assert not chosen(run.prepared).equals(chosen(changed(run.prepared, "train")))


def test_what_is_told_apart_depends_on_training_cells_alone(runs):
    prepared = runs["pca"].prepared
    as_it_is = run_limits._test(prepared)
    for role in ("query", "val"):
        pd.testing.assert_frame_equal(as_it_is, run_limits._test(changed(prepared, role)), check_exact=True)
    assert not as_it_is.equals(run_limits._test(changed(prepared, "train")))
    order = np.random.default_rng(0).permutation(len(prepared.conditions))
    again = run_limits._test(toy.reordered(prepared, order))
    assert np.allclose(as_it_is["p_value"], again["p_value"])


def test_tests_are_made_once_for_a_mask_and_shared_by_seeds(screen, tmp_path, monkeypatch):
    made = []
    real = run_limits._test
    monkeypatch.setattr(run_limits, "_test", lambda prepared: made.append(prepared) or real(prepared))
    first = told_apart(screen, mask="all_targets", root=tmp_path)
    pd.testing.assert_frame_equal(first, told_apart(screen, mask="all_targets", root=tmp_path))
    assert len(made) == 1
    told_apart(screen, mask="none", root=tmp_path)
    assert len(made) == 2
    # Cells that were compared are queries of no seed.
    names = made[0].cells.names[made[0].where("train")]
    for seed in (0, 1, 2):
        roles = get_split(screen, seed=seed, directory=tmp_path / "splits").roles
        assert not (roles[names] == "query").any()


def test_a_screen_without_effects_tells_nothing_apart_and_merged_hits_are_chance(tmp_path):
    screen = simulate_screen(
        n_singles=4, n_doubles=1, n_genes=30, cells_per_condition=40, n_batches=2, null=True, seed=4
    )
    tests = told_apart(screen, mask="all_targets", root=tmp_path / screen.name)
    assert not tests.loc[tests["n_cells"] == tests["n_cells"].max(), "apart"].any()
    run = open_run(screen, encoder="pca", mask="all_targets", seed=0, outputs=str(tmp_path))
    evaluate_run(run, libraries=["mean"], query_sizes=[1, 4], poolings=["scores"], n_resamples=50)
    found = table(run)
    merged = found.query("about == 'alike merged'")
    assert (merged["estimate"] == 1).all() and (merged["chance"] == 1).all()
    halves = found.query("about == 'replicates' and name == 'halves'")
    assert (halves["ci_low"] <= halves["chance"]).all() and (halves["chance"] <= halves["ci_high"]).all()
    assert {"halves of batches", "halves of batches, dealt out"} < set(
        found.query("about == 'replicates'")["name"]
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bound_agrees_with_the_exact_posterior_of_many_fresh_cells(seed, tmp_path):
    """The rates and the cells needed of some query cells, within their intervals of what thousands of cells give."""
    size = {
        "n_singles": 6,
        "n_doubles": 2,
        "n_genes": 40,
        "n_control": 10,
        "n_batches": 1,
        "effect": 1.0,
        "seed": seed,
    }
    sizes = (1, 2, 4, 8)

    def exact(screen):
        prepared = prepare(screen, make_split(screen.obs, track="in_dist", seed=0), mask="all_targets")
        encoder = fit_bayes(prepared)
        options = {
            "query_sizes": sizes,
            "poolings": ("scores",),
            "scorings": ("classifier", "classifier_corrected"),
        }
        return summarise(evaluate(encoder, prepared, **options), n_resamples=20)

    truth = exact(simulate_screen(cells_per_condition=1500, **size)).query("metric == 'exact_hit@1'")
    run = open_run(
        simulate_screen(cells_per_condition=60, **size),
        **{"encoder": "bayes_ceiling", "mask": "all_targets", "seed": 0, "outputs": str(tmp_path)},
    )
    evaluate_run(run, libraries=["mean"], query_sizes=list(sizes), poolings=["scores"], n_resamples=300)
    found = table(run)
    for row in found.query("about == 'bound' and name == 'exact posterior'").itertuples():
        wanted = {"average": row.average, "query_size": row.query_size}
        wanted["scoring"] = "classifier" if row.average == "micro" else "classifier_corrected"
        same = truth[np.logical_and.reduce([truth[name] == value for name, value in wanted.items()])]
        assert row.ci_low <= same["estimate"].item() <= row.ci_high
    needed = found.query("about == 'cells needed' and pooling == 'scores'").set_index("level")
    right = cells_needed(truth).query("scoring == 'classifier_corrected'").set_index("level")["cells"]
    for level in (0.5, 0.8):
        assert needed.loc[level, "ci_low"] <= right[level] <= needed.loc[level, "ci_high"]


def test_shares_of_the_range_are_those_of_the_means(runs):
    for run in runs.values():
        found, summary = table(run), pd.read_csv(run.directory / "summary.csv")
        bound = found[found["about"] == "bound"]
        for (average, size), part in bound.groupby(["average", "query_size"]):
            wanted = {
                "average": average,
                "query_size": size,
                "metric": "exact_hit@1",
                "scoring": part["scoring"].iloc[0],
            }
            hit = summary[np.logical_and.reduce([summary[name] == value for name, value in wanted.items()])]
            hit = hit[hit["pooling"].isin(["single", "scores"])]["estimate"].item()
            by_name = part.set_index("name")["estimate"]
            expected = (hit - 0.2) / (by_name["exact posterior"] - 0.2)
            assert by_name["share of the range from chance"] == pytest.approx(expected)
    own = table(runs["bayes_ceiling"]).query("about == 'bound' and average == 'micro'")
    assert set(own["scoring"]) == {"classifier"} and own["estimate"].iloc[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("track", "encoder"),
    [
        ("batch_disjoint", "pca"),
        ("guide_disjoint", "logreg"),
        ("unseen_combo", "pca"),
        ("unseen_gene", "logreg"),
    ],
)
def test_other_tracks_have_limits_without_a_bound(track, encoder, tmp_path):
    size = {"n_genes": 30, "cells_per_condition": 30, "n_control": 20, "n_batches": 4, "guides_per_target": 3}
    screen = simulate_screen(n_singles=6, n_doubles=5, effect=2.0, **size)
    run = open_run(screen, encoder=encoder, mask="all_targets", seed=1, track=track, outputs=str(tmp_path))
    evaluate_run(run, libraries=["mean"], query_sizes=[1, 4], poolings=["scores"], n_resamples=20)
    found = table(run)
    assert "bound" not in set(found["about"])
    tests = told_apart(screen, mask="all_targets", track=track, root=run.directory.parent)
    # Held-out conditions are compared by the cells of their prototypes.
    library = set(run.prepared.conditions[np.isin(run.prepared.roles, ["train", "gallery"])]) - {"ctrl"}
    assert set(tests["condition"]) == library >= set(run.prepared.conditions[run.prepared.where("query")])
    assert found.query("about == 'alike merged'")["estimate"].between(0, 1).all()
