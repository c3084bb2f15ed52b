"""Runs, pipeline, comparison and report together, on one small simulated screen."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from perturbret import compare, report, runs, sentences, tables
from perturbret.encoders import load_encoder
from perturbret.pipeline import ensure_runs, evaluate_run, fit_run
from perturbret.prepare import ContextMismatch
from perturbret.simulate import simulate_screen
from perturbret.wording import percent

ENCODERS = ("prior", "pca", "logreg")
SETTINGS = {
    "libraries": ["mean"],
    "query_sizes": [1, 5],
    "poolings": ["scores", "embeddings"],
    "n_resamples": 200,
}


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(n_singles=6, n_doubles=2, cells_per_condition=40, n_control=40, n_genes=80, seed=3)


@pytest.fixture(scope="module")
def outputs(screen, tmp_path_factory):
    """Three encoders under two masks and two seeds, evaluated."""
    directory = tmp_path_factory.mktemp("outputs")
    for encoder in ENCODERS:
        for mask in ("all_targets", "own_targets"):
            for seed in (0, 1):
                run = runs.open_run(screen, encoder=encoder, mask=mask, seed=seed, outputs=str(directory))
                evaluate_run(run, **SETTINGS)
    return directory


@pytest.fixture(scope="module")
def built(screen, outputs):
    return report.build_report(screen, outputs=str(outputs), n_resamples=300)


def opened(screen, outputs, **changes):
    request = {"encoder": "pca", "mask": "all_targets", "seed": 0, **changes}
    return runs.open_run(screen, outputs=str(outputs), **request)


def test_a_run_leaves_every_artifact_of_the_design(screen, outputs):
    directory = outputs / screen.name / "pca-all_targets-seed0"
    names = {path.name for path in directory.iterdir()}
    assert {
        "params.yaml", "manifest.json", "encoder", "null_encoder", "embeddings.h5ad", "scores.parquet",
        "summary.csv", "validation.csv", "selection.csv", "null_control.csv",
    } <= names  # fmt: skip
    assert not [name for name in names if ".tmp" in name]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["fit"]["params"]["encoder"] == "pca"
    assert manifest["fit"]["context"]["fingerprint"] == screen.fingerprint
    assert set(manifest) == {"fit", "environment", "evaluation"}


def test_embeddings_are_those_of_the_saved_encoder(screen, outputs):
    import anndata

    run = opened(screen, outputs)
    stored = anndata.read_h5ad(run.directory / "embeddings.h5ad")
    assert list(stored.obs_names) == list(screen.obs.index)
    np.testing.assert_array_equal(stored.X, load_encoder(run.directory).embed(run.prepared.cells))
    assert set(stored.obs["role"]) == {"train", "val", "query"}


def test_the_same_request_reuses_the_encoder_and_other_parameters_are_refused(screen, outputs):
    run = opened(screen, outputs)
    weights = run.directory / "encoder" / "weights.safetensors"
    before = weights.stat().st_mtime_ns
    fit_run(run)
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(runs.RunExists, match=r"search=\{\}.*n_components"):
        opened(screen, outputs, search={"n_components": [3]})


def test_a_damaged_encoder_is_fitted_again(screen, outputs, tmp_path):
    shutil.copytree(
        outputs / screen.name / "pca-all_targets-seed0", tmp_path / screen.name / "pca-all_targets-seed0"
    )
    shutil.copytree(outputs / screen.name / "splits", tmp_path / screen.name / "splits")
    run = opened(screen, tmp_path)
    good = load_encoder(run.directory).embed(run.prepared.cells)
    (run.directory / "encoder" / "weights.safetensors").write_bytes(b"half")
    fit_run(run)
    np.testing.assert_array_equal(load_encoder(run.directory).embed(run.prepared.cells), good)
    assert "evaluation" not in run.manifest, "an evaluation of the lost encoder must not stay"


def test_an_encoder_is_refused_under_another_mask_or_split(screen, outputs):
    encoder = load_encoder(outputs / screen.name / "pca-all_targets-seed0")
    with pytest.raises(
        ContextMismatch, match="mask: the encoder was fitted with 'all_targets'.*'own_targets'"
    ):
        encoder.context.check(opened(screen, outputs, mask="own_targets").prepared.context)
    with pytest.raises(ContextMismatch, match="split_id"):
        encoder.context.check(opened(screen, outputs, seed=1).prepared.context)
    encoder.context.check(opened(screen, outputs, mask="own_targets").prepared.context, ablation=("mask",))


def test_an_evaluation_of_another_encoder_counts_as_missing(screen, outputs, tmp_path):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    manifest = tmp_path / screen.name / "pca-all_targets-seed0" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["evaluation"]["encoder_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    finished, missing = compare.collect(tmp_path / screen.name)
    assert missing == ["pca-all_targets-seed0"] and len(finished) == 11


@pytest.mark.parametrize("name", ["encoder", "null_encoder"])
def test_an_encoder_that_was_put_in_anothers_place_counts_as_not_judged(screen, outputs, tmp_path, name):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    with open(tmp_path / screen.name / "pca-all_targets-seed0" / name / "encoder.json", "a") as file:
        file.write(" ")
    finished, missing = compare.collect(tmp_path / screen.name)
    assert missing == ["pca-all_targets-seed0"] and len(finished) == 11


def test_comparison_agrees_with_the_scores_by_hand(built):
    row = built.single().set_index("encoder").loc["pca"]
    part = built.scores.query(
        "encoder == 'pca' and mask == 'all_targets' and query_size == 1 and scoring == @row.scoring"
    )
    assert row.estimate == pytest.approx(part["exact_hit@1"].mean())
    assert row.n_seeds == 2 and row.n_queries == len(part)
    best = sentences.best_encoder(built)
    other = built.scores.query(
        f"encoder == {best!r} and mask == 'all_targets' and query_size == 1 and primary"
    )
    paired = part.merge(other, on=["seed", "query_id"], suffixes=("", "_best"))
    assert row.difference == pytest.approx((paired["exact_hit@1"] - paired["exact_hit@1_best"]).mean())
    assert row.diff_low <= row.difference <= row.diff_high


def test_the_baseline_has_no_difference_to_itself(built):
    best = sentences.best_encoder(built)
    own = built.single().set_index("encoder").loc[best]
    assert own.difference == 0 and np.isnan(own.p_value)


def test_readouts_are_chosen_on_validation_not_on_queries(screen, outputs, tmp_path):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    for seed in (0, 1):
        path = tmp_path / screen.name / f"pca-all_targets-seed{seed}" / "validation.csv"
        table = pd.read_csv(path, keep_default_na=False)
        chosen = (table["metric"] == "exact_hit@1") & (table["scoring"] == "cosine")
        table.loc[chosen, "estimate"] = 0.999
        table.to_csv(path, index=False)
    changed = compare.choose_readouts(compare.collect(tmp_path / screen.name)[0])
    row = changed.query("encoder == 'pca' and mask == 'all_targets' and primary").iloc[0]
    assert row.scoring == "cosine" and row.validation == pytest.approx(0.999)


def test_prior_only_predicts_the_most_common_condition(built):
    assert built.single().set_index("encoder").loc["prior"].estimate == pytest.approx(built.prior, abs=0.03)


def test_null_verdicts_hold_without_a_leak(built):
    verdicts = report.validity(built).set_index(["encoder", "mask"])["verdict"]
    assert set(verdicts.xs("all_targets", level="mask")) == {"holds"}


def test_headline_names_best_method_interval_masks_and_null_control(built):
    text = sentences.headline(built)
    best = built.single().set_index("encoder").loc[sentences.best_encoder(built)]
    assert f"**Best method under the leak-free mask: {best.name}**" in text
    assert percent(best.estimate) in text and percent(best.ci_low) in text
    assert "Mask `own_targets`" in text and "Null control" in text


def test_tables_show_every_method_and_chance(built):
    table = tables.comparison_table(built)
    assert (table["difference"] == "the baseline").sum() == 1
    metric = tables.metric_table(built, ["exact_hit@1", "mrr"])
    assert metric.loc["chance", "exact_hit@1"] == f"{1 / 8:.3f}"


def test_missing_runs_are_named(screen, outputs):
    names = ["pca-all_targets-seed0", "mlp-all_targets-seed0"]
    partial = report.build_report(screen, runs=names, outputs=str(outputs), n_resamples=200)
    assert partial.missing == ["mlp-all_targets-seed0"]
    assert "mlp-all_targets-seed0" in sentences.headline(partial)


def test_no_leak_free_run_is_an_error(screen, outputs):
    with pytest.raises(FileNotFoundError, match="expected at least one finished run with mask all_targets"):
        report.build_report(screen, runs=["pca-own_targets-seed0"], outputs=str(outputs))


def test_a_report_alone_makes_the_runs_that_it_needs(screen, tmp_path):
    ensure_runs(screen, outputs=str(tmp_path))
    finished, _ = compare.collect(tmp_path / screen.name)
    assert {run.params["encoder"] for run in finished} == {"pca", "logreg"}
    made = {run.name: run.manifest["environment"]["finished"] for run in finished}
    ensure_runs(screen, outputs=str(tmp_path))
    again = {
        run.name: run.manifest["environment"]["finished"]
        for run in compare.collect(tmp_path / screen.name)[0]
    }
    assert again == made


def test_a_failed_run_is_left_out_and_named(screen, outputs):
    built = report.build_report(
        screen, failed=["pca-all_targets-seed0"], outputs=str(outputs), n_resamples=200
    )
    assert built.missing == ["pca-all_targets-seed0"]
    assert built.single().set_index("encoder").loc["pca", "n_seeds"] == 1


def test_runs_of_other_data_or_other_code_are_missing(screen, outputs, tmp_path):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    for name, part, key in (
        ("pca-all_targets-seed0", "context", "fingerprint"),
        ("pca-all_targets-seed1", None, "code"),
    ):
        path = tmp_path / screen.name / name / "manifest.json"
        content = json.loads(path.read_text())
        (content["fit"][part] if part else content["fit"])[key] = "other"
        path.write_text(json.dumps(content))
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    assert built.missing == ["pca-all_targets-seed0", "pca-all_targets-seed1"]


def test_two_recipes_of_one_encoder_are_two_methods(screen, tmp_path):
    for name, search in (("pca", {}), ("pca_small", {"n_components": [2]})):
        run = runs.open_run(
            screen, encoder="pca", mask="all_targets", seed=0, search=search,
            run=f"{name}-all_targets-seed0", outputs=str(tmp_path),
        )  # fmt: skip
        evaluate_run(run, **SETTINGS)
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    assert set(built.single()["encoder"]) == {"pca", "pca_small"}
    shutil.copytree(tmp_path / screen.name / "pca-all_targets-seed0", tmp_path / screen.name / "pca")
    with pytest.raises(
        ValueError, match="'pca' and 'pca-all_targets-seed0' are the same method, mask and seed"
    ):
        report.build_report(screen, outputs=str(tmp_path))


def test_an_evaluation_that_was_cut_short_does_not_count(screen, outputs, tmp_path, monkeypatch):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    run = opened(screen, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("perturbret.pipeline.save_embeddings", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate_run(run, **SETTINGS)
    assert compare.collect(tmp_path / screen.name)[1] == ["pca-all_targets-seed0"]


def test_runs_evaluated_with_other_sizes_are_compared_where_they_meet(screen, tmp_path):
    for encoder, sizes in (("logreg", [1]), ("pca", [1, 5])):
        run = runs.open_run(screen, encoder=encoder, mask="all_targets", seed=0, outputs=str(tmp_path))
        evaluate_run(run, **{**SETTINGS, "query_sizes": sizes})
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    assert set(built.table["query_size"]) == {1, 5}
    sentences.headline(built)


def test_masked_extra_genes_and_embeddings_count_in_the_fingerprint(screen):
    from dataclasses import replace

    others = [
        replace(screen, fingerprint="", extra_masked_genes={screen.conditions[0]: (str(screen.genes[0]),)}),
        replace(screen, fingerprint="", obsm={"X": np.zeros((screen.n_cells, 2), np.float32)}),
    ]
    assert len({screen.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_leaning_towards_a_condition_does_not_find_it(built):
    table = report.per_condition(built, "prior").set_index("condition")
    favourite = table["estimate"].idxmax()
    assert table.loc[favourite, "estimate"] > 0.9
    assert not (table["ci_low"] > table["base_rate"]).any()


def test_wilson_interval_by_hand():
    low, high = report.wilson_interval(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert report.wilson_interval(1.0, 3)[0] == pytest.approx(0.4385, abs=1e-4)


def test_conclusion_compares_pools_with_the_same_conditions(built):
    text = sentences.conclusion(built, report.per_condition(built, sentences.best_encoder(built)))
    assert "Pooling the scores of 5 cells" in text and "(macro, the 8 conditions" in text


def test_only_the_posterior_of_the_ceiling_is_a_ceiling(screen, tmp_path):
    for encoder in ("pca", "bayes_ceiling"):
        run = runs.open_run(screen, encoder=encoder, mask="all_targets", seed=0, outputs=str(tmp_path))
        evaluate_run(run, **SETTINGS)
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    ceiling = built.readouts[built.readouts["encoder"] == "bayes_ceiling"]
    assert ceiling["scoring"].tolist() == ["classifier"] and ceiling["primary"].all()
    assert "**Bayes ceiling**" in sentences.headline(built) and sentences.best_encoder(built) == "pca"


def test_percentages_as_pages_write_them():
    assert [percent(value) for value in (0.1234, -0.1234, 0, -1e-17, -0.0004)] == [
        "12.3%", "-12.3%", "0.0%", "0.0%", "0.0%"
    ]  # fmt: skip
    assert [percent(value, True) for value in (0.1234, -0.1234, -1e-17)] == ["+12.3%", "-12.3%", "+0.0%"]
