"""A fine-tuning run as a directory: what it holds, when it is kept, when it is fitted again, how it is evaluated."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import toy
from safetensors.torch import load_file, save_file

from perturbret.data.prepared import UNLABELLED
from perturbret.data.sources import CheckpointNotFound
from perturbret.encoders.base import load_encoder
from perturbret.networks.embedding import device_name
from perturbret.report import training as training_report
from perturbret.report.compare import collect
from perturbret.runs import pipeline
from perturbret.runs.pipeline import evaluate_run, fit_code, fit_run
from perturbret.runs.runs import RunExists, open_run, run_name

REQUEST = {"encoder": "scgpt", "mask": "all_targets", "seed": 0}
HEAD = {"mode": "head", "epochs": 2, "head_dim": 8, "batch_size": 32, "lora_targets": ("Wqkv",)}
NAME = "scgpt_head-all_targets-seed0-share0.5"


@pytest.fixture(scope="module")
def screen():
    return toy.tiny_screen()


@pytest.fixture(scope="module")
def fitted(screen, tiny_checkpoint, tmp_path_factory):
    """Outputs directory with one fitted run."""
    outputs = tmp_path_factory.mktemp("outputs")
    fit_run(open_head(screen, outputs, tiny_checkpoint))
    return outputs


def open_head(screen, outputs, checkpoint, **changes):
    settings = {"checkpoint": str(checkpoint), **HEAD}
    return open_run(screen, **REQUEST, settings=settings, train_share=0.5, outputs=str(outputs), **changes)


@pytest.fixture
def copied(fitted, screen, tiny_checkpoint, tmp_path):
    """The fitted run, in a directory of one's own."""
    shutil.copytree(fitted, tmp_path / "outputs")
    return open_head(screen, tmp_path / "outputs", tiny_checkpoint)


@pytest.fixture
def no_fit(monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("fitted")

    return lambda: monkeypatch.setattr(pipeline, "_fit", refuse)


def test_changed_evaluation_code_judges_validation_cells_again_and_fits_nothing(copied, no_fit, monkeypatch):
    table = (copied.directory / "validation.csv").read_text()
    (copied.directory / "validation.csv").write_text("stale")
    code = pipeline._code
    no_fit()
    fit_run(copied)
    assert (copied.directory / "validation.csv").read_text() == "stale"
    monkeypatch.setattr(
        pipeline, "_code", lambda *starts: "new" if starts == pipeline._VALIDATION else code(*starts)
    )
    fit_run(copied)
    assert (copied.directory / "validation.csv").read_text() == table
    assert copied.manifest["fit"]["validation_code"] == "new"


def test_an_ensemble_has_a_null_twin_of_one_member(screen, tmp_path):
    run = open_run(screen, encoder="mlp", mask="all_targets", seed=0, outputs=str(tmp_path))
    asked = []
    real = pipeline._fit

    def record(run, prepared, name, fixed=None):
        asked.append(fixed)
        fitted = real(run, prepared, name, fixed and {k: v for k, v in fixed.items() if k != "members"})
        return dataclasses.replace(fitted, chosen={**fitted.chosen, "members": 3})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_fit", record)
        fit_run(run)
    assert asked[0] is None and asked[1]["members"] == 1


def test_two_processes_make_one_run(fitted, screen, tiny_checkpoint, tmp_path, no_fit):
    toy.run_two(__file__, tmp_path, tiny_checkpoint)
    run = open_head(screen, tmp_path, tiny_checkpoint)
    alone = fitted / screen.name / NAME
    assert sorted(path.name for path in run.directory.iterdir()) == sorted(p.name for p in alone.iterdir())
    assert run.manifest["fit"]["checks"]["reloaded_equal"]
    no_fit()
    found, expected = fit_run(run), pd.read_csv(alone / "selection.csv")
    # Dropout differs between one process and two.
    assert len(found) == len(expected) == 1 and found.columns.tolist() == expected.columns.tolist()


def test_run_names():
    assert run_name("logreg", "own_targets", 3) == "logreg-own_targets-seed3"
    assert run_name("obsm:X_pca", "all_targets", 0, {}) == "obsm.X_pca-all_targets-seed0"
    settings = {"mode": "last_n", "init": "pretrained", "checkpoint": "small"}
    assert run_name("scgpt", "all_targets", 0, settings) == "scgpt_last_n-all_targets-seed0"
    settings["init"] = "random"
    assert (
        run_name("scgpt", "all_targets", 1, settings, 0.25)
        == "scgpt_last_n_random-all_targets-seed1-share0.25"
    )


def test_a_fitted_run_leaves_its_artifacts(fitted, screen, tiny_checkpoint):
    run = open_head(screen, fitted, tiny_checkpoint)
    assert run.directory == fitted / screen.name / NAME
    names = {path.name for path in run.directory.iterdir()}
    assert names == {
        "encoder", "null_encoder", "manifest.json", "params.yaml", "history.csv", "selection.csv", "validation.csv",
        "validation_scores.parquet",
    }  # fmt: skip
    history = pd.read_csv(run.directory / "history.csv")
    assert history["epoch"].tolist() == [1, 2] and (history["member"] == 0).all()
    fit = run.manifest["fit"]
    checks = fit["checks"]
    assert checks["reloaded_equal"] is True and set(checks) == {"network_sha256", "member0", "reloaded_equal"}
    assert checks["member0"]["embedding_change"] == 0
    assert min(checks["member0"]["gradient_norms"].values()) > 0
    assert fit["context"]["train_share"] == 0.5 and fit["params"]["settings"]["mode"] == "head"
    made = run.manifest["environment"]
    assert made["device"].startswith(f"{device_name()} (")
    assert made["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    # The null twin: as many epochs, other weights.
    null, encoder = (load_encoder(run.directory, name) for name in ("null_encoder", "encoder"))
    assert null.settings["chosen"] == encoder.settings["chosen"] == fit["chosen"]
    cells = run.prepared.cells.take(np.arange(20))
    assert np.abs(null.embed(cells) - encoder.embed(cells)).max() > 1e-3
    # What notebook 04 shows of it.
    best = training_report.best_epoch(pipeline.fit(run).history)
    assert [best["epoch"]] == fit["chosen"]["stop_epochs"]
    table = training_report.proof_table(run)
    assert list(table) == ["member0"] and table["member0"].iloc[-1] == "yes"


def test_the_same_request_keeps_the_encoder(copied, no_fit):
    first = pd.read_csv(copied.directory / "selection.csv")
    no_fit()
    pd.testing.assert_frame_equal(fit_run(copied), first)


def test_a_tampered_run_is_fitted_again(copied):
    file = copied.directory / "encoder" / "member0.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, file)
    assert file.read_bytes() != before
    fit_run(copied)
    assert file.read_bytes() == before  # bit for bit what it was
    assert not list(copied.directory.glob("training_*"))


def stop_before_the_twin(patch):
    """Break the fit after the encoder and before its null twin, which is fitted with fixed settings."""
    real = pipeline._fit
    patch.setattr(pipeline, "_fit", lambda *a, fixed=None: 1 / 0 if fixed else real(*a, fixed=fixed))


def test_a_run_that_was_stopped_goes_on_and_leaves_no_state(
    screen, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    run = open_head(screen, tmp_path, tiny_checkpoint)
    with monkeypatch.context() as patch:
        stop_before_the_twin(patch)
        with pytest.raises(ZeroDivisionError):
            fit_run(run)
    assert list(run.directory.glob("training_encoder/*/training-*.pt")) and not run.manifest
    # Other code does not go on from it.
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_code", lambda *starts: "0" * 64)
        stop_before_the_twin(patch)
        with pytest.raises(ZeroDivisionError):
            fit_run(run)
    assert "resumed" not in capsys.readouterr().out
    fit_run(run)
    assert capsys.readouterr().out.count("resumed after epoch 2") == 1
    assert not list(run.directory.glob("training_*"))


def test_curves_of_another_training_do_not_stay(copied, screen, tiny_checkpoint):
    assert (copied.directory / "history.csv").exists()
    frozen = {"checkpoint": str(tiny_checkpoint), "mode": "frozen"}
    outputs = str(copied.directory.parents[1])
    fit_run(
        open_run(
            screen, **REQUEST, settings=frozen, train_share=0.5, outputs=outputs, run=NAME, overwrite=True
        )
    )
    assert not (copied.directory / "history.csv").exists()


@pytest.mark.parametrize("searched", [False, True])
def test_other_weights_at_the_same_path_are_another_start(screen, tiny_prepared, tmp_path, searched, no_fit):
    place, genes = tmp_path / "weights", tiny_prepared.cells.genes[1:]
    toy.write_tiny_checkpoint(place, genes)
    given = (
        {"settings": {"mode": "frozen"}}
        if searched
        else {"settings": {"mode": "frozen", "checkpoint": str(place)}}
    )
    given["search"] = {"checkpoint": [str(place)]} if searched else {}
    run = open_run(screen, **REQUEST, **given, outputs=str(tmp_path / "outputs"))
    fit_run(run)
    first = run.manifest["fit"]["checks"]["network_sha256"]
    shutil.rmtree(place)
    toy.write_tiny_checkpoint(place, genes, seed=1)
    fit_run(run)
    assert run.manifest["fit"]["checks"]["network_sha256"] != first
    no_fit()
    fit_run(run)
    # A mode that trains nothing has no curves, and its proof is that of saving.
    assert pipeline.fit(run).history is None and len(training_report.gradient_table(run)) == 0
    assert training_report.proof_table(run).index.tolist() == ["saved and loaded again: equal bit for bit"]
    assert training_report.proof_table(run).iloc[0].tolist() == ["yes"]


def test_evaluation_of_a_run_that_is_opened_without_settings(copied, screen, no_fit):
    run = open_run(screen, **REQUEST, train_share=0.5, run=NAME, outputs=str(copied.directory.parents[1]))
    assert run.params == copied.params and run.params["settings"]["lora_targets"] == ["Wqkv"]
    no_fit()
    scores, summary, null = evaluate_run(
        run, libraries=["mean"], query_sizes=[1], poolings=["scores"], n_resamples=50
    )
    assert (run.prepared.roles == UNLABELLED).any()
    queries = run.prepared.cells.names[run.prepared.where("query")]
    assert set(scores["query_id"]) == set(queries)
    assert set(summary["scoring"]) >= {"cosine", "classifier"} and len(null)
    assert run.manifest["evaluation"]["encoder_sha256"] == run.manifest["fit"]["encoder_sha256"]
    for name in ("embeddings.h5ad", "scores.parquet", "summary.csv", "null_control.csv"):
        assert (run.directory / name).exists()
    with pytest.raises(RunExists, match="train_share=0.5, asked for 0.9"):
        open_run(screen, **REQUEST, train_share=0.9, run=NAME, outputs=str(copied.directory.parents[1]))


def test_settings_are_those_of_the_run_there_and_without_one_it_is_an_error(copied, screen, tmp_path):
    with pytest.raises(
        ValueError, match="scgpt-all_targets-seed0: expected a run .* got none.*: no such run"
    ):
        open_run(screen, **REQUEST, outputs=str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=f"{NAME}. Name one with run="):
        open_run(screen, **REQUEST, outputs=str(copied.directory.parents[1]))
    with pytest.raises(RunExists, match="the run there has settings=.*asked for .*'epochs': 3"):
        open_run(
            screen,
            **REQUEST,
            settings={**copied.params["settings"], "epochs": 3},
            train_share=0.5,
            outputs=str(copied.directory.parents[1]),
        )


def test_embeddings_are_computed_once_where_there_is_a_cache(copied, tmp_path, monkeypatch):
    from perturbret.encoders.base import without_cache
    from perturbret.networks import embedding

    cells = copied.prepared.cells.take(np.arange(30))
    cached = load_encoder(copied.directory, cache=tmp_path / "cache")
    first = cached.embed(cells)
    assert list((tmp_path / "cache").glob("embeddings-*/*.npy"))

    def refuse(*arguments, **keywords):
        raise RuntimeError("computed")

    monkeypatch.setattr(embedding, "embed", refuse)
    again = load_encoder(copied.directory, cache=tmp_path / "cache")
    assert again.embed(cells).tobytes() == first.tobytes()
    with pytest.raises(RuntimeError, match="computed"):
        again.embed(copied.prepared.cells.take(np.arange(31)))
    anew = without_cache(again)
    assert anew.cache is None and again.cache is not None
    with pytest.raises(RuntimeError, match="computed"):
        anew.embed(cells)
    plain = load_encoder(copied.directory)
    assert plain.cache is None and without_cache(plain) is plain


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    fit_run(open_head(toy.tiny_screen(), *map(Path, sys.argv[1:])))
    torch.distributed.destroy_process_group()


def test_a_run_is_judged_and_counts_without_its_checkpoint(screen, tiny_checkpoint, tmp_path, no_fit):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    run = open_head(screen, tmp_path / "outputs", checkpoint)
    fit_run(run)
    shutil.move(checkpoint, tmp_path / "elsewhere")
    no_fit()
    evaluate_run(run, libraries=["mean"], query_sizes=[1], poolings=["scores"], n_resamples=50)
    finished, missing = collect(run.directory.parent, code=fit_code)
    assert [each.name for each in finished] == [run.directory.name] and missing == []
    # Other weights that are there under its name are another start.
    shutil.copytree(tmp_path / "elsewhere", checkpoint)
    with open(checkpoint / "args.json", "a") as file:
        file.write(" ")
    assert collect(run.directory.parent, code=fit_code)[1] == [run.directory.name]
    # And without a fit that is there, a checkpoint is needed.
    shutil.rmtree(checkpoint)
    with pytest.raises(CheckpointNotFound):
        fit_code(run.params)
