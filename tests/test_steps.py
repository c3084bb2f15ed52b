"""The steps of notebooks 03 to 05 as calls: fit, judge validation cells, save, open what was saved, show it."""

import IPython.display
import numpy as np
import pandas as pd
import pytest
import toy

from perturbret.evaluation.judge import evaluate, summarise
from perturbret.report import explore
from perturbret.report.compare import collect
from perturbret.runs import pipeline, progress
from perturbret.runs.pipeline import evaluate_run, fit, fit_run, notebook_run, open_saved, save_run
from perturbret.runs.runs import RunExists, open_run

NOTHING = {"encoder": "", "mask": "", "track": "", "seed": -1, "search": {}}


@pytest.fixture(scope="module")
def screen():
    return toy.tiny_screen()


def opened(screen, outputs, encoder="mean_shift", **more):
    return open_run(screen, encoder=encoder, mask="all_targets", seed=1, outputs=str(outputs), **more)


def test_steps_in_a_notebook_save_what_one_call_saves_and_fit_once(screen, tmp_path, monkeypatch):
    whole, steps = opened(screen, tmp_path / "a"), opened(screen, tmp_path / "b")
    fit_run(whole)
    asked, real = [], pipeline._fit
    monkeypatch.setattr(pipeline, "_fit", lambda *a, **k: asked.append(a[2]) or real(*a, **k))
    fitted = fit(steps)
    assert not steps.directory.exists()  # nothing is written before the last step
    scores = evaluate(fitted.encoder, steps.prepared, role="val", query_sizes=(1,), seed=1)
    selection = save_run(steps, fitted, scores, summarise(scores, seed=1))
    assert asked == ["encoder", "null_encoder"]
    for name in (
        "validation.csv",
        "validation_scores.parquet",
        "selection.csv",
        "encoder/weights.safetensors",
    ):
        assert (steps.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    assert steps.manifest["fit"]["wall_s"] >= fitted.wall_s > 0
    again = fit(steps)
    pd.testing.assert_frame_equal(save_run(steps, again), again.selection)
    assert len(asked) == 2 and again.chosen == fitted.chosen and len(selection) == len(again.selection)
    # What was fitted anew is saved, even where the run is as it should be.
    save_run(steps, fitted)
    assert asked[2:] == ["null_encoder"]


def test_in_jupyterlab_a_scratch_run_is_replaced_and_no_report_reads_it(screen, tmp_path, monkeypatch):
    assert notebook_run("", False) == {"run": "", "overwrite": False}
    monkeypatch.setenv("JPY_SESSION_NAME", "03_baselines.ipynb")
    assert notebook_run("mine", False) == {"run": "mine", "overwrite": False}
    for encoder in ("prior", "mean_shift"):
        run = opened(screen, tmp_path, encoder, **notebook_run("", False))
        save_run(run, fit(run))
        assert run.directory.name == "scratch" and run.manifest["fit"]["params"]["encoder"] == encoder
    with pytest.raises(RunExists):
        opened(screen, tmp_path, "prior", run="scratch")
    run = open_saved(screen, **NOTHING, outputs=str(tmp_path))
    assert (run.directory.name, run.params["encoder"], run.params["seed"]) == ("scratch", "mean_shift", 1)
    evaluate_run(run, libraries=["mean"], query_sizes=[1], poolings=["scores"], n_resamples=20)
    assert collect(run.directory.parent) == ([], [])
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert open_saved(screen, **NOTHING, outputs=str(tmp_path)).directory.name == "pca-all_targets-seed0"


def test_a_saved_run_is_opened_by_its_name_alone(screen, tmp_path):
    made = opened(screen, tmp_path, "pca", search={"n_components": [5]}, run="mine")
    fit_run(made)
    assert open_saved(screen, **NOTHING, run="mine", outputs=str(tmp_path)).params == made.params
    with pytest.raises(RunExists, match="seed=1, asked for 2"):
        open_saved(screen, **{**NOTHING, "seed": 2}, run="mine", outputs=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected a run that notebook 03 or 04 saved.*there: mine"):
        open_saved(screen, **NOTHING, run="other", outputs=str(tmp_path))


def test_a_training_is_one_line_in_a_notebook_and_a_line_per_epoch_elsewhere(monkeypatch, capsys):
    lines = ["loaded 3 tensors", *(f"epoch {n}/3  loss {n}.5" for n in (1, 2, 3)), "epoch 1/3  loss 9.0"]
    report = progress.Progress("twin")
    for line in lines:
        report(line)
    assert capsys.readouterr().out.splitlines() == [f"twin: {line}" for line in lines]
    outputs = []

    class Handle:
        def __init__(self, data):
            outputs.append(data)
            self.place = len(outputs) - 1

        def update(self, data, raw):
            outputs[self.place] = data

    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda data, raw, display_id: Handle(data))
    for line in lines:
        report(line)
    assert capsys.readouterr().out == "twin: loaded 3 tensors\n"
    first, second = (each["text/plain"] for each in outputs)  # the next member has its own
    assert "twin: 100%" in first and "3/3 epochs" in first and "loss 3.5" in first
    assert "1/3 epochs" in second and "loss 9.0" in second


def test_one_ranking_and_the_commonest_mix_ups():
    top10 = ["B|A", "B|A", "A+B|A", "A|B"]
    scores = pd.DataFrame({"query_id": list("wxyz"), "condition": ["A", "A", "A", "C"], "top10": top10})
    ranking = explore.ranking(scores, "y")
    assert ranking["condition"].tolist() == ["A+B", "A"] and ranking["rank"].tolist() == [1, 2]
    assert ranking[""].tolist() == ["shares a target", "the true condition"]
    found = explore.confusions(scores, n=2)
    assert found[["condition", "ranked first", "queries"]].values.tolist() == [["A", "B", 2], ["A", "A+B", 1]]
    assert found["share"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert found["relation"].tolist() == ["", "shares a target"]


@pytest.mark.parametrize("width", [1, 2, 30])
@pytest.mark.parametrize("constant", [False, True])
def test_any_embedding_has_a_map(width, constant):
    values = np.ones((60, width)) if constant else np.random.default_rng(0).normal(size=(60, width))
    conditions = np.array([f"G{i % 12}" for i in range(60)])
    (axis,) = explore.embedding_map(values, conditions).axes
    assert sum(len(points.get_offsets()) for points in axis.collections) == 60
    assert [text.get_text() for text in axis.get_legend().get_texts()][0] == "3 others"
