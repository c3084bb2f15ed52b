"""Runs, pipeline, comparison and report together, on one small simulated screen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from perturbret.data.prepared import ContextMismatch
from perturbret.data.simulate import simulate_screen
from perturbret.encoders.base import load_encoder
from perturbret.evaluation.readouts import primary_readout
from perturbret.report import ablation as report
from perturbret.report import compare, sentences, tables
from perturbret.report.explore import at_readout
from perturbret.report.wording import percent
from perturbret.runs import runs
from perturbret.runs.pipeline import evaluate_run, fit_run

ENCODERS = ("prior", "pca", "logreg")
SETTINGS = {
    "libraries": ["mean"],
    "query_sizes": [1, 5],
    "poolings": ["scores", "embeddings"],
    "n_resamples": 200,
}


def checked(warnings=(), suspect=False, confounded=False):
    """What `perturbret.report.audit.check_screen` says of a screen, as far as a report reads it."""
    return SimpleNamespace(warnings=list(warnings), suspect=suspect, confounded=confounded, names=["copies"])


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(n_singles=6, n_doubles=2, cells_per_condition=40, n_control=40, n_genes=80, seed=3)


@pytest.fixture(scope="module")
def outputs(screen, tmp_path_factory):
    """Three encoders under two masks and three seeds, evaluated."""
    directory = tmp_path_factory.mktemp("outputs")
    for encoder in ENCODERS:
        for mask in ("all_targets", "own_targets"):
            for seed in (0, 1, 2):
                run = runs.open_run(screen, encoder=encoder, mask=mask, seed=seed, outputs=str(directory))
                evaluate_run(run, **SETTINGS)
    return directory


@pytest.fixture(scope="module")
def built(screen, outputs):
    return report.build_report(screen, checked(), outputs=str(outputs), n_resamples=300)


def behind(built):
    """The simple opponent that is not the baseline."""
    return ({"pca", "logreg"} - {built.baseline}).pop()


def opened(screen, outputs, **changes):
    request = {"encoder": "pca", "mask": "all_targets", "seed": 0, **changes}
    return runs.open_run(screen, outputs=str(outputs), **request)


def test_a_run_leaves_every_artifact_of_the_design(screen, outputs):
    directory = outputs / screen.name / "pca-all_targets-seed0"
    names = {path.name for path in directory.iterdir()}
    assert {
        "params.yaml", "manifest.json", "encoder", "null_encoder", "embeddings.h5ad", "scores.parquet",
        "summary.csv", "validation.csv", "validation_scores.parquet", "selection.csv", "null_control.csv",
        "confidence.csv", "reliability.csv",
        "limits.csv", "cells_needed.csv",
    } <= names  # fmt: skip
    assert not [name for name in names if ".tmp" in name]
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["fit"]["params"]["encoder"] == "pca"
    assert manifest["fit"]["context"]["fingerprint"] == screen.fingerprint
    assert set(manifest) == {"identity", "fit", "environment", "evaluation"}
    identity = opened(screen, outputs).identity
    assert runs.Identity.read(manifest) == identity and identity.method == "pca" and identity.seed == 0


def test_embeddings_are_those_of_the_saved_encoder(screen, outputs):
    import anndata

    run = opened(screen, outputs)
    stored = anndata.read_h5ad(run.directory / "embeddings.h5ad")
    assert list(stored.obs_names) == list(screen.obs.index)
    np.testing.assert_array_equal(stored.X, load_encoder(run.directory).embed(run.prepared.cells))
    assert set(stored.obs["role"]) == {"train", "val", "query"}


def test_confidence_is_written_at_the_readout_that_validation_chose(screen, outputs):
    run = opened(screen, outputs)
    table = pd.read_csv(run.directory / "confidence.csv").set_index("quantity")
    library, scoring = primary_readout(run.directory, SETTINGS["libraries"])
    assert set(table["library"]) == {library} and set(table["scoring"]) == {scoring}
    scores = pd.read_parquet(run.directory / "scores.parquet")
    own = at_readout(scores, library, scoring)
    assert (scores["probability"].notna() == scores.index.isin(own.index)).all()
    assert table.loc["accuracy", "estimate"] == pytest.approx(own["exact_hit@1"].mean())
    sure = table.loc["accuracy", "estimate"] + table.loc["overconfidence", "estimate"]
    assert own["probability"].mean() == pytest.approx(sure)
    said = sentences.confidence(run, table.reset_index())
    assert f"temperature {table.loc['temperature', 'estimate']:.3g}" in said and "exchangeable" not in said
    assert f"LAC {percent(table.loc['conformal_lac_coverage', 'estimate'])}" in said
    assert "library at all" not in said


def test_methods_are_compared_by_how_far_their_answers_can_be_trusted(built):
    table = tables.confidence_table(built)
    assert table.index.tolist() == built.single()["encoder"].tolist()
    own = built.confidence.query("encoder == 'pca' and quantity == 'ece' and mask == 'all_targets'")
    assert len(own) == 3 and table.loc["pca", "ECE"].startswith(f"{own['estimate'].mean():.3f} [")
    nothing = tables.confidence_table(replace(built, confidence=compare.confidences([])))
    assert not len(nothing) and list(nothing) == list(table)
    assert len(pd.read_csv(built.directory / "confidence.csv")) == len(built.confidence)


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
    assert missing == ["pca-all_targets-seed0"] and len(finished) == 17


@pytest.mark.parametrize("name", ["encoder", "null_encoder"])
def test_an_encoder_that_was_put_in_anothers_place_counts_as_not_judged(screen, outputs, tmp_path, name):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    with open(tmp_path / screen.name / "pca-all_targets-seed0" / name / "encoder.json", "a") as file:
        file.write(" ")
    finished, missing = compare.collect(tmp_path / screen.name)
    assert missing == ["pca-all_targets-seed0"] and len(finished) == 17


def test_estimates_and_contrasts_agree_with_the_scores_by_hand(built):
    row = built.single().set_index("encoder").loc["pca"]
    single = built.scores.query("mask == 'all_targets' and query_size == 1")
    own = single.query("encoder == 'pca' and primary")
    assert row.estimate == pytest.approx(own["exact_hit@1"].mean())
    assert row.spread == pytest.approx(own.groupby("seed")["exact_hit@1"].mean().std())
    assert row.n_repeats == 3 and row.n_queries == own["query_id"].nunique() == len(own) // 3
    assert built.nuisance == "prior" and built.best == built.baseline != "prior"
    contrast = built.asked("baseline").loc[behind(built)]
    assert (contrast.scoring, contrast.library) == ("whitened", "mean")  # PCA has no classifier
    sides = single.query("scoring == 'whitened' and library == 'mean' and encoder in ['pca', 'logreg']")
    wide = sides.pivot(index=["seed", "query_id"], columns="encoder", values="exact_hit@1")
    assert contrast.difference == pytest.approx((wide[behind(built)] - wide[built.baseline]).mean())
    assert contrast.low < contrast.difference < contrast.high


def test_the_baseline_is_not_compared_with_itself_and_nuisance_with_no_baseline(built):
    assert set(built.asked("baseline").index) == {behind(built)}
    excess = built.asked("nuisance")
    assert set(excess.index) == {"pca", "logreg"} and set(excess["against"]) == {"prior"}
    single = built.single().set_index("encoder")["estimate"]
    assert excess.loc["logreg", "difference"] == pytest.approx(single["logreg"] - single["prior"])


def test_readouts_are_chosen_on_validation_not_on_queries(screen, outputs, tmp_path):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    for seed in (0, 1, 2):
        path = tmp_path / screen.name / f"pca-all_targets-seed{seed}" / "validation_scores.parquet"
        table = pd.read_parquet(path)
        table["exact_hit@1"] = (table["scoring"] == "cosine").astype(float)
        table.to_parquet(path, index=False)
    changed = compare.choose_readouts(compare.collect(tmp_path / screen.name)[0], n_resamples=50)
    row = changed.query("encoder == 'pca' and mask == 'all_targets'").iloc[0]
    assert row.scoring == "cosine" and row.validation == 1 and row.stability == 1


def test_prior_only_predicts_the_most_common_condition(built):
    assert built.single().set_index("encoder").loc["prior"].estimate == pytest.approx(built.prior, abs=0.03)


def test_null_verdicts_hold_without_a_leak(built):
    verdicts = report.validity(built).set_index(["encoder", "mask"])["verdict"]
    assert set(verdicts.xs("all_targets", level="mask")) == {"holds"}


def test_headline_says_who_is_first_by_what_verdict_and_what_was_checked(built):
    text = sentences.headline(built)
    best = built.single().set_index("encoder").loc[built.best]
    assert f"**First on validation cells, mask `all_targets`: {best.name}**" in text
    assert percent(best.estimate) in text and percent(best.ci_low) in text
    verdict = built.asked("baseline").loc[behind(built), "verdict"]
    assert f"{verdict}: {behind(built)}" in text and "**prior, which reads no expression**" in text
    assert "detects only leaks that follow the permuted labels" in text
    assert "**No leak was found by the checks that were run**: copies, null control." in text
    assert "leak-free" not in text
    assert "simulated screens of 8 conditions such intervals held the truth" in text


def test_the_smallest_leak_that_the_null_control_finds_is_said_beside_it(built):
    own = built.verdicts.query("mask == 'all_targets'")
    assert own["detectable"].between(0.01, 0.9).all()
    assert f"gives away the label of {own['detectable'].max():.1%} of the cells" in sentences.headline(built)
    table = tables.null_table(built).query("mask == 'all_targets' and method == 'pca'")
    worst = own.query("encoder == 'pca'")["detectable"].max()
    assert table["finds leaks from"].tolist() == [f"{worst:.3f}"]


@pytest.mark.parametrize("flag", ["suspect", "confounded"])
def test_nothing_is_claimed_of_a_screen_that_fails_its_checks(screen, outputs, flag):
    told = ["CAUTION: one column names the conditions"]
    found = report.build_report(
        screen, checked(warnings=told, **{flag: True}), outputs=str(outputs), n_resamples=50
    )
    text = sentences.headline(found)
    assert text.startswith(f"- **{told[0]}**")
    assert f"**No method is named best: {flag}" in text
    for claim in ("First on validation", "No leak was found", "better", "worse", "best mode"):
        assert claim not in text
    judged = found.contrasts.query("question != 'nuisance'")["verdict"]
    assert set(judged) == {f"not judged: {flag}"}
    assert f"not judged: {flag}" in set(report.headline_table(found)["verdict"])


def test_a_null_control_that_does_not_hold_takes_the_all_clear_away(built):
    broken = replace(built, verdicts=built.verdicts.assign(holds=False))
    text = sentences.headline(broken)
    assert "**INVALID: " in text and "logreg under all_targets" in text
    assert tables.method_table(broken)["verdict"].str.contains("INVALID").all()
    assert "No leak was found" not in text


def test_nuisance_alone_is_no_method(screen, outputs):
    names = [f"prior-all_targets-seed{seed}" for seed in (0, 1, 2)]
    found = report.build_report(screen, runs=names, outputs=str(outputs), n_resamples=50)
    assert found.best is None and found.baseline is None
    assert "**No method that reads expression was run**" in sentences.headline(found)
    tables.method_table(found)


def test_tables_show_every_method_and_chance(built):
    table = tables.method_table(built)
    assert list(table.index) == built.single()["encoder"].tolist()
    other = behind(built)
    contrast = built.asked("baseline").loc[other]
    alone = {built.baseline: "the baseline", "prior": "reads no expression"}
    assert table["verdict"].drop(other).to_dict() == alone
    assert table.loc[other, "verdict"] == f"{contrast.verdict}, p = {contrast.p_holm:.2g}"
    assert table.loc[other, "against the baseline"].startswith(f"{contrast.difference:+.3f} [")
    assert table.loc[other, "against the baseline"].endswith("at whitened, mean")
    metric = tables.metric_table(built, ["exact_hit@1", "mrr"])
    assert metric.loc["chance", "exact_hit@1"] == f"{1 / 8:.3f}"
    assert tables.readout_table(built).loc["pca", "classifier"] == ""
    pools = tables.pool_table(built)
    assert list(pools.index) == list(table.index) and all("[" in text for text in pools.iloc[:, -1])


def test_the_headline_table_is_written_as_a_readme_shows_it(screen, outputs):
    fresh = report.build_report(screen, outputs=str(outputs), n_resamples=50)
    written = pd.read_csv(fresh.directory / "headline.csv", keep_default_na=False)
    row = fresh.single().set_index("encoder").loc[fresh.baseline]
    own = written.set_index("method").loc[fresh.baseline]
    assert own["exact_hit@1"] == f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
    assert own["verdict"] == "the baseline" and own["track"] == "in_dist" and own["train_share"] == 1


def test_missing_runs_are_named(screen, outputs):
    names = ["pca-all_targets-seed0", "mlp-all_targets-seed0"]
    partial = report.build_report(screen, runs=names, outputs=str(outputs), n_resamples=200)
    assert partial.missing == ["mlp-all_targets-seed0"]
    assert "mlp-all_targets-seed0" in sentences.headline(partial)


def test_no_leak_free_run_is_an_error(screen, outputs):
    with pytest.raises(FileNotFoundError, match="expected at least one finished run with mask all_targets"):
        report.build_report(screen, runs=["pca-own_targets-seed0"], outputs=str(outputs))


def test_where_nothing_was_run_the_report_names_the_notebooks_and_makes_nothing(screen, tmp_path):
    with pytest.raises(FileNotFoundError, match="notebooks 03 and 04 fit a run and notebook 05 evaluates it"):
        report.build_report(screen, outputs=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_is_left_out_and_named(screen, outputs):
    built = report.build_report(
        screen, failed=["pca-all_targets-seed0"], outputs=str(outputs), n_resamples=200
    )
    assert built.missing == ["pca-all_targets-seed0"]
    assert built.single().set_index("encoder").loc["pca", "n_repeats"] == 2
    (verdict,) = built.asked("baseline")["verdict"]
    assert verdict == "not judged: 2 repeats"


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
    for recipe, search in (("", {}), ("pca_small", {"n_components": [2]})):
        run = runs.open_run(
            screen, encoder="pca", mask="all_targets", seed=0, search=search, recipe=recipe,
            run=f"{recipe}-0", outputs=str(tmp_path),
        )  # fmt: skip
        evaluate_run(run, **SETTINGS)
    # An evaluation that does not name the recipe keeps it.
    again = runs.open_run(
        screen,
        encoder="pca",
        mask="all_targets",
        seed=0,
        search=search,
        run="pca_small-0",
        outputs=str(tmp_path),
    )
    evaluate_run(again, **SETTINGS)
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    assert set(built.single()["encoder"]) == {"pca", "pca_small"}
    shutil.copytree(tmp_path / screen.name / "-0", tmp_path / screen.name / "copy")
    with pytest.raises(ValueError, match="'-0' and 'copy' are the same method, mask and seed"):
        report.build_report(screen, outputs=str(tmp_path))


def test_the_identity_is_for_reading_and_makes_no_fit_stale(screen, outputs, tmp_path):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    run = opened(screen, tmp_path)
    manifest = run.directory / "manifest.json"
    content = json.loads(manifest.read_text())
    stored = content.pop("identity")
    manifest.write_text(json.dumps(content))
    before = (run.directory / "encoder" / "weights.safetensors").stat().st_mtime_ns
    finished, _ = compare.collect(tmp_path / screen.name)
    assert run.identity in {each.identity for each in finished}
    fit_run(opened(screen, tmp_path, recipe="mine"))
    assert (run.directory / "encoder" / "weights.safetensors").stat().st_mtime_ns == before
    assert run.manifest == {**content, "identity": {**stored, "method": "mine"}}


@pytest.mark.parametrize(
    ("arena", "first", "other"),
    [
        ("train_share", 1.0, 0.5),
        ("track", "in_dist", "batch_disjoint"),
    ],
)
def test_tracks_shares_and_candidates_are_told_apart_and_compared_only_within(
    screen, outputs, tmp_path, arena, first, other
):
    for encoder in ("pca", "logreg"):
        for seed in (0, 1, 2):
            source = outputs / screen.name / f"{encoder}-all_targets-seed{seed}"
            for name in ("a", "b"):
                shutil.copytree(source, tmp_path / screen.name / f"{name}{encoder}{seed}")
            path = tmp_path / screen.name / f"b{encoder}{seed}" / "manifest.json"
            content = json.loads(path.read_text())
            content["identity"][arena] = other
            path.write_text(json.dumps(content))
    main = report.build_report(screen, outputs=str(tmp_path), n_resamples=50)
    (second,) = main.others
    assert (getattr(main, arena), getattr(second, arena)) == (first, other)
    for part in (main, second):
        assert set(part.single()["encoder"]) == {"pca", "logreg"}
        assert set(part.single()["n_repeats"]) == {3}
        assert part.contrasts["question"].tolist() == ["baseline"]
    written = pd.read_csv(main.directory / "differences.csv", keep_default_na=False)
    assert written[arena].tolist() == [first, other]
    across = tables.track_table(main)
    assert across.shape == (3, 2) and across.index[-1] == "chance"
    assert across.columns[1].startswith(second.track) and (across != "").all(axis=None)
    finished, _ = compare.collect(tmp_path / screen.name)
    for function in (
        lambda: compare.choose_readouts(finished, n_resamples=50),
        lambda: compare.kept_scores(finished, main.readouts),
    ):
        with pytest.raises(
            ValueError, match="expected one track, train_share and candidates, got .*" + str(other)
        ):
            function()


def test_whatever_else_varies_is_another_method(screen, tmp_path):
    for components in ([2], [4]):
        for seed in (0, 1):
            run = runs.open_run(
                screen, encoder="pca", mask="all_targets", seed=seed, search={"n_components": components},
                run=f"{components[0]}{seed}", outputs=str(tmp_path),
            )  # fmt: skip
            evaluate_run(run, **SETTINGS)
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=50)
    assert dict(built.single()[["encoder", "n_repeats"]].to_numpy()) == {
        "pca (n_components=[2])": 2, "pca (n_components=[4])": 2
    }  # fmt: skip
    assert built.others == [] and built.contrasts["question"].tolist() == ["baseline"]
    sentences.headline(built)


def test_labels_show_every_parameter_that_varies_and_no_other():
    def finished(recipe="pca", **params):
        given = {"dataset": "x", "encoder": "pca", "mask": "all_targets", "seed": 0, "track": "in_dist"}
        identity = runs.Identity.of({**given, "search": {}, **params}, recipe=recipe)
        return compare.Finished(Path("anywhere"), {}, identity)

    labelled = compare.label_methods(
        [
            finished(),
            finished(seed=1),
            finished(track="batch_disjoint"),
            finished(search={"n_components": [20]}),
            finished("other", mask="none"),
            finished("", encoder="lda"),
        ]
    )
    assert [run.label for run in labelled] == [
        "pca (n_components=default)",
        "pca (n_components=default)",
        "pca",
        "pca (n_components=[20])",
        "other",
        "lda",
    ]


def test_an_evaluation_that_was_cut_short_does_not_count(screen, outputs, tmp_path, monkeypatch):
    shutil.copytree(outputs / screen.name, tmp_path / screen.name)
    run = opened(screen, tmp_path)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("perturbret.runs.pipeline.save_embeddings", stop)
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
    others = [
        replace(screen, fingerprint="", extra_masked_genes={screen.conditions[0]: (str(screen.genes[0]),)}),
        replace(screen, fingerprint="", obsm={"X": np.zeros((screen.n_cells, 2), np.float32)}),
    ]
    assert len({screen.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_a_leaning_towards_a_condition_does_not_find_it(built):
    first = built.scores["top10"].str.split("|").str[0]
    always = built.scores.assign(**{"exact_hit@1": (built.scores["condition"] == first[0]).astype(float)})
    table = report.per_condition(replace(built, scores=always.assign(top10=first[0])), "pca").set_index(
        "condition"
    )
    assert table.loc[first[0], "estimate"] == 1 == table.loc[first[0], "base_rate"]
    assert not (table["ci_low"] > table["base_rate"] + 1e-9).any()


def test_wilson_interval_by_hand():
    low, high = report.wilson_interval(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert report.wilson_interval(1.0, 3)[0] == pytest.approx(0.4385, abs=1e-4)


def test_conclusion_gives_pools_an_interval(built):
    text = sentences.conclusion(built, built.best, report.per_condition(built, built.best))
    assert "Pools of 5 cells" in text and "queries of the 8 conditions" in text


def test_only_the_posterior_of_the_ceiling_is_a_ceiling(screen, tmp_path):
    for encoder in ("pca", "bayes_ceiling"):
        run = runs.open_run(screen, encoder=encoder, mask="all_targets", seed=0, outputs=str(tmp_path))
        evaluate_run(run, **SETTINGS)
    built = report.build_report(screen, outputs=str(tmp_path), n_resamples=200)
    ceiling = built.readouts[built.readouts["encoder"] == "bayes_ceiling"]
    assert ceiling["scoring"].tolist() == ["classifier"] and ceiling["n_readouts"].tolist() == [1]
    assert "**Bayes ceiling**" in sentences.headline(built) and built.best == "pca"


def test_percentages_as_pages_write_them():
    assert [percent(value) for value in (0.1234, -0.1234, 0, -1e-17, -0.0004)] == [
        "12.3%", "-12.3%", "0.0%", "0.0%", "0.0%"
    ]  # fmt: skip
    assert [percent(value, True) for value in (0.1234, -0.1234, -1e-17)] == ["+12.3%", "-12.3%", "+0.0%"]
