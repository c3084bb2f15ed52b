"""Each mode from counts to a proven encoder, on a tiny simulated screen and a tiny checkpoint."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
import toy

from perturbret.data.prepared import Prepared
from perturbret.encoders.base import load_encoder, without_cache
from perturbret.evaluation.validation import best_readout
from perturbret.networks import fit as modes
from perturbret.networks.adapters import trainable
from perturbret.networks.embedding import embed, fingerprint
from perturbret.scgpt.backbone import fit_scgpt
from perturbret.scgpt.network import ScGPT
from perturbret.scgpt.tokens import tokenize

TINY = {
    "head_depth": 1,
    "pooling": "cls",
    "dropout": 0.0,
    "batch_size": 16,
    "epochs": 3,
    "head_dim": 8,
    "head_width": 8,
    "head_dropout": 0.0,
    "rank": 2,
    "lr_head": 0.02,
    "lr_backbone": 0.01,
}
NETWORK = ("lora_head", "last_n", "full")


@pytest.fixture
def fit(tiny_prepared, tiny_checkpoint, tmp_path):
    """Fit with the settings of TINY and what is given."""

    def run(prepared=tiny_prepared, *, seed=0, report=lambda line: None, search=None, fixed=None, **given):
        where = {"cache": given.pop("cache", tmp_path / "cache"), "state": given.pop("state", None)}
        settings = {"checkpoint": str(tiny_checkpoint), **TINY, **given}
        settings = {name: value for name, value in settings.items() if name not in (search or {})}
        return fit_scgpt(
            prepared, seed=seed, settings=settings, search=search, fixed=fixed, report=report, **where
        )

    return run


def without_validation(prepared):
    """The same cells, those of validation in no role at all."""
    roles = np.where(prepared.roles == "val", "other", prepared.roles)
    return Prepared(
        prepared.cells,
        prepared.conditions,
        roles,
        prepared.candidates,
        prepared.columns,
        prepared.context,
    )


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "frozen"},
        {"mode": "frozen", "init": "random", "values": "log1p"},
        {"mode": "head", "members": 2, "loss": "both"},
        {"mode": "lora_head"},
        {
            "mode": "lora_head",
            "lora_layers": [1],
            "loss": "contrastive",
            "sampler": "balanced",
            "init": "random",
        },
        {"mode": "last_n", "last_layers": 1, "pooling": "mean", "normalise": True, "values": "log1p"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_each_mode_is_fitted_proved_and_reloaded(fit, tiny_prepared, tmp_path, given):
    fitted = fit(**given)
    encoder, mode = fitted.encoder, given["mode"]
    members = given.get("members", 1)
    assert list(fitted.selection["mode"]) == [mode] and fitted.selection["chosen"].all()
    chance = 1 / len(tiny_prepared.candidates)
    assert 0 <= fitted.selection["exact_hit@1"][0] <= 1
    # What was proved.
    assert fitted.checks["network_sha256"] == fingerprint(encoder.backbone.network)
    assert len(fitted.checks) == (1 if mode == "frozen" else 1 + members)
    for m in range(0 if mode == "frozen" else members):
        proof = fitted.checks[f"member{m}"]
        assert set(proof["gradient_norms"]) == set(trainable(encoder.members[m]))
        assert (proof["embedding_change"] > 0) == (mode in NETWORK)
        assert (proof["merged_difference"] is None) == (mode != "lora_head")
    if mode == "frozen":
        assert fitted.history is None and fitted.chosen["stop_epochs"] == []
    else:
        assert len(fitted.history) == 3 * members
        assert list(fitted.history["member"].unique()) == list(range(members))
        hits = fitted.history.groupby("member")["val_exact_hit@1"].max()
        assert (hits > chance).all()
        assert [1 <= stop <= 3 for stop in fitted.chosen["stop_epochs"]] == [True] * members
    # The prior is in the classifier of random batches alone.
    carries = mode != "frozen" and given.get("sampler") != "balanced"
    assert (encoder.log_prior is not None) == carries
    if carries:
        train = tiny_prepared.conditions[tiny_prepared.where("train")]
        shares = np.array([(train == name).mean() for name in encoder.classes])
        np.testing.assert_allclose(np.exp(encoder.log_prior), 0.9 * shares + 0.1 / len(shares))
    encoder.save(tmp_path / "run" / "encoder")
    loaded = load_encoder(tmp_path / "run")
    cells = tiny_prepared.cells.take(tiny_prepared.where("val"))
    mine = without_cache(encoder).embed(cells)
    np.testing.assert_array_equal(loaded.embed(cells), mine)
    # Nothing but rounding: the cache was filled with other batches.
    np.testing.assert_allclose(encoder.embed(cells), mine, atol=1e-5)
    readout, hit = best_readout(loaded, tiny_prepared, seed=0)
    assert hit == pytest.approx(fitted.selection["exact_hit@1"][0])


def test_early_stopping_sees_what_evaluation_sees(fit, tiny_prepared):
    fitted = fit(mode="lora_head", epochs=4)
    _, hit = best_readout(fitted.encoder, tiny_prepared, seed=0, scorings=("classifier",))
    assert fitted.history["val_exact_hit@1"].max() == pytest.approx(hit)


def test_tuning_the_network_learns(fit, tiny_prepared):
    fitted = fit(mode="lora_head", epochs=24, patience=24, pooling="mean", lr_backbone=0.003)
    assert fitted.history["val_exact_hit@1"].max() > 2 / len(tiny_prepared.candidates)


@pytest.mark.parametrize("mode", ["frozen", "head", *NETWORK])
def test_fitting_again_gives_the_same(fit, tiny_prepared, tmp_path, mode):
    cells = tiny_prepared.cells.take(np.arange(20))
    first, second = (fit(mode=mode, cache=tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(first.encoder.embed(cells), second.encoder.embed(cells))
    pd.testing.assert_frame_equal(first.selection, second.selection)
    # For as many epochs, validation cells have no influence.
    fixed = fit(without_validation(tiny_prepared), fixed=first.chosen)
    np.testing.assert_array_equal(fixed.encoder.embed(cells), first.encoder.embed(cells))
    assert fixed.chosen == first.chosen and fixed.selection["exact_hit@1"].isna().all()


def test_the_head_is_trained_on_embeddings_computed_once(fit, monkeypatch):
    calls, training = [], []
    inner, train = ScGPT.pool, modes.train

    def pool(self, *arguments, **keywords):
        calls.append(bool(training))
        return inner(self, *arguments, **keywords)

    def observed(*arguments, **keywords):
        training.append(1)
        try:
            return train(*arguments, **keywords)
        finally:
            training.clear()

    monkeypatch.setattr(ScGPT, "pool", pool)
    monkeypatch.setattr(modes, "train", observed)
    fit(mode="head", members=2)
    assert calls and not any(calls)
    before = len(calls)
    fit(mode="lora_head")
    assert any(calls[before:])


def test_the_lower_layers_run_once(fit, monkeypatch):
    rows = []
    inner = ScGPT.inputs
    monkeypatch.setattr(ScGPT, "inputs", lambda self, *a: (rows.append(len(a[0])), inner(self, *a))[1])
    fit(mode="lora_head", lora_layers=[1])
    upper = sum(rows)
    rows.clear()
    fit(mode="lora_head", epochs=6, lora_layers=[1], seed=1)
    assert sum(rows) == upper  # twice the epochs, not one token more
    rows.clear()
    fit(mode="lora_head")
    assert sum(rows) > 1.3 * upper


@pytest.mark.parametrize("mode", NETWORK)
def test_a_tuned_network_never_gets_embeddings_of_the_one_before(fit, tiny_prepared, tmp_path, mode):
    fit(mode="head")  # leaves the frozen network's embeddings in the cache
    encoder = fit(mode=mode).encoder
    cells = tiny_prepared.cells
    np.testing.assert_allclose(encoder.embed(cells), without_cache(encoder).embed(cells), atol=1e-5)
    tokens = tokenize(
        cells, encoder.backbone.token_ids, encoder.backbone.vocabulary, **encoder.backbone.token_settings
    )
    tuned, frozen = (
        embed(network, tokens, normalise=False)
        for network in (encoder.members[0].network, encoder.backbone.network)
    )
    assert np.abs(tuned - frozen).mean() > 1e-3


def test_training_reads_the_tokens_that_evaluation_reads(fit, tiny_prepared, monkeypatch):
    seen, inner = [], modes.train

    def observed(model, source, *arguments, **keywords):
        seen.append(source.hash)
        return inner(model, source, *arguments, **keywords)

    monkeypatch.setattr(modes, "train", observed)
    backbone = fit(mode="lora_head").encoder.backbone
    cells = tiny_prepared.for_fitting().cells
    tokens = tokenize(cells, backbone.token_ids, backbone.vocabulary, **backbone.token_settings)
    assert seen == [tokens.hash] and len(cells) < len(tiny_prepared.cells)


def test_another_checkpoint_gives_other_metrics(fit, tiny_prepared, tmp_path):
    other = toy.write_tiny_checkpoint(tmp_path / "other", tiny_prepared.cells.genes[1:], seed=1)
    for mode in ("frozen", "head", "lora_head"):
        first, second = fit(mode=mode), fit(mode=mode, checkpoint=str(other))
        assert first.checks["network_sha256"] != second.checks["network_sha256"]
        cells = tiny_prepared.cells.take(np.arange(10))
        assert np.abs(first.encoder.embed(cells) - second.encoder.embed(cells)).max() > 1e-2
        if mode == "frozen":
            assert first.selection["exact_hit@1"][0] != second.selection["exact_hit@1"][0]
        else:
            assert (first.history["val_loss"] != second.history["val_loss"]).all()


class Killed(Exception):
    pass


def test_a_search_goes_on_after_a_kill(fit, tiny_prepared, tmp_path):
    """Killed in the second setting: the first is not trained again, and the result is the same."""
    search = {"head_dim": [8, 4]}
    whole = fit(mode="lora_head", search=search)
    lines = []

    def kill(line):
        lines.append(line)
        if sum("epoch 1/" in each for each in lines) == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(mode="lora_head", search=search, state=tmp_path / "state", report=kill)
    lines.clear()
    resumed = fit(mode="lora_head", search=search, state=tmp_path / "state", report=lines.append)
    said = [line for line in lines if "epoch" in line]
    assert said[0] == "resumed after epoch 3" and said[1] == "resumed after epoch 1" and len(said) == 4
    pd.testing.assert_frame_equal(resumed.selection, whole.selection)
    pd.testing.assert_frame_equal(resumed.history, whole.history, check_exact=True)
    cells = tiny_prepared.cells.take(np.arange(10))
    np.testing.assert_array_equal(resumed.encoder.embed(cells), whole.encoder.embed(cells))


@pytest.mark.parametrize("mode", ["head", "full"])
def test_validation_cells_of_conditions_that_were_not_trained(fit, tiny_prepared, mode):
    gone = tiny_prepared.candidates[0]
    roles = np.where(
        (tiny_prepared.roles == "train") & (tiny_prepared.conditions == gone), "other", tiny_prepared.roles
    )
    assert ((roles == "val") & (tiny_prepared.conditions == gone)).any()
    fewer = dataclasses.replace(tiny_prepared, roles=roles, candidates=tiny_prepared.candidates[1:])
    history = fit(fewer, mode=mode).history
    assert np.isfinite(history[["val_loss", "val_exact_hit@1"]]).all(axis=None)


def test_a_search_takes_the_best_on_validation(fit):
    fitted = fit(mode="head", search={"lr_head": [1e-6, 0.05], "epochs": [4]})
    table = fitted.selection
    assert list(table["lr_head"]) == [1e-6, 0.05]
    best = table["exact_hit@1"].to_numpy().argmax()
    assert list(np.flatnonzero(table["chosen"])) == [best]
    assert fitted.chosen["lr_head"] == table["lr_head"][best]


def test_a_run_leaves_the_global_random_numbers_alone(fit):
    before = torch.get_rng_state()
    fit(mode="head")
    assert torch.equal(torch.get_rng_state(), before)


def test_errors(fit, tiny_prepared):
    with pytest.raises(ValueError, match="expected validation cells of candidates"):
        fit(without_validation(tiny_prepared), mode="head")
    with pytest.raises(ValueError, match="lr_head: expected a number, got '1e-3'"):
        fit(mode="head", lr_head="1e-3")
    with pytest.raises(ValueError, match="lr_head: expected a number, got '1e-3'"):
        fit(mode="head", search={"lr_head": ["1e-3"]})
    with pytest.raises(ValueError, match="search: expected a list of values for lr_head, got 0.1"):
        fit(mode="head", search={"lr_head": 0.1})
    one = toy.toy_cells(["A"] * 6, ["train"] * 4 + ["val"] * 2)
    with pytest.raises(ValueError, match="expected training cells of 2 conditions or more, got 1"):
        fit(one)
