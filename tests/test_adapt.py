"""Adaptation without labels: it trains, on training cells alone, and stays with the encoder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import toy

from perturbret.data.prepared import UNLABELLED
from perturbret.encoders.base import load_encoder, without_cache
from perturbret.networks.embedding import fingerprint
from perturbret.scgpt import backbone as backbone_module
from perturbret.scgpt.backbone import adapt, backbone_for, fit_scgpt
from perturbret.scgpt.corpus import Part
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.pretraining import Decoders, draw_batch, losses

STEPS = 6


def quiet(line):
    pass


@pytest.fixture(scope="module")
def prepared():
    return toy.tiny_prepared(train_share=0.5)


@pytest.fixture
def backbone(prepared, tiny_checkpoint):
    return backbone_for(
        prepared.cells.genes, checkpoint=tiny_checkpoint, init="pretrained", seed=0, report=quiet
    )


@pytest.fixture
def fit(prepared, tiny_checkpoint):
    def run(prepared=prepared, **given):
        given = {"mode": "frozen", "adapt": "mlm", "adapt_steps": STEPS, "lr_adapt": 0.01, **given}
        settings = {"checkpoint": str(tiny_checkpoint), "head_depth": 0, "epochs": 2, **given}
        return fit_scgpt(prepared, seed=0, settings=settings, report=quiet)

    return run


def adapted(backbone, prepared, **given):
    cells = prepared.cells.take(prepared.roles == "train")
    return adapt(
        backbone, cells, **{"steps": STEPS, "learning_rate": 0.01, "seed": 0, "report": quiet, **given}
    )


def test_weights_change_and_the_origin_says_so(backbone, prepared):
    before = fingerprint(backbone.network)
    made = adapted(backbone, prepared)
    assert fingerprint(made.network) != before == fingerprint(backbone.network)
    changed = [
        name
        for name, tensor in made.network.state_dict().items()
        if not torch.equal(tensor, backbone.network.state_dict()[name])
    ]
    assert "encoder.embedding.weight" in changed and len(changed) > 20
    said = made.origin["adapted"]
    assert said["steps"] == STEPS and said["learning_rate"] == 0.01
    assert said["cells"] == (prepared.roles == "train").sum()
    assert said["sha256"] == fingerprint(made.network)
    assert np.isfinite([said["held_out_gene"], said["held_out_mean"]]).all()
    assert {**made.origin, "adapted": None} == {**backbone.origin, "adapted": None}
    assert "adapted" not in backbone.origin
    # Otherwise the backbone that it was.
    assert made.vocabulary == backbone.vocabulary and made.token_settings == backbone.token_settings
    assert made.network.shape == backbone.network.shape and not made.network.training


def test_guesses_of_held_out_cells_get_better(backbone, prepared):
    short, long = (
        adapted(backbone, prepared, steps=steps).origin["adapted"]["held_out_gene"] for steps in (2, 40)
    )
    assert long < 0.8 * short


def test_the_same_again_and_another_seed(backbone, prepared):
    before = torch.get_rng_state()
    first, again = (adapted(backbone, prepared).origin["adapted"]["sha256"] for _ in range(2))
    assert first == again != adapted(backbone, prepared, seed=1).origin["adapted"]["sha256"]
    assert torch.equal(torch.get_rng_state(), before)


def test_only_training_cells_with_and_without_label_take_part(fit, prepared, monkeypatch):
    seen, inner = [], backbone_module.adapt

    def observed(backbone, cells, **keywords):
        seen.append(cells.names)
        return inner(backbone, cells, **keywords)

    monkeypatch.setattr(backbone_module, "adapt", observed)
    fit()
    (names,) = seen
    roles = dict(zip(prepared.cells.names, prepared.roles, strict=True))
    assert {roles[name] for name in names} == {"train", UNLABELLED}
    assert sorted(names) == sorted(name for name, role in roles.items() if role in ("train", UNLABELLED))
    seen.clear()
    fit(adapt="none")
    assert seen == []


def test_no_label_and_no_order_of_cells_takes_part(fit, prepared):
    """Conditions handed round and cells in another order: the same network."""
    rng = np.random.default_rng(0)
    conditions = prepared.conditions.copy()
    for role in np.unique(prepared.roles):
        at = prepared.roles == role
        conditions[at] = rng.permutation(conditions[at])
    other = toy.reordered(
        dataclasses.replace(prepared, conditions=conditions), rng.permutation(len(conditions))
    )
    first, second = (fit(each).encoder.backbone for each in (prepared, other))
    assert first.origin["adapted"]["sha256"] == second.origin["adapted"]["sha256"]


@pytest.mark.parametrize("mode", ["frozen", "head", "lora_head"])
def test_an_adapted_encoder_is_saved_and_loaded(fit, prepared, tmp_path, mode):
    fitted = fit(mode=mode)
    plain = fit(mode="frozen", adapt="none").encoder
    said = fitted.encoder.backbone.origin["adapted"]
    # Everything after starts from the adapted weights.
    assert fitted.checks["network_sha256"] == said["sha256"] != fingerprint(plain.backbone.network)
    fitted.encoder.save(tmp_path / "encoder")
    saved = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    assert saved["backbone"]["origin"]["adapted"] == said
    loaded = load_encoder(tmp_path)
    cells = prepared.cells.take(np.arange(20))
    mine = without_cache(fitted.encoder).embed(cells)
    np.testing.assert_array_equal(loaded.embed(cells), mine)
    assert fingerprint(loaded.backbone.network) == said["sha256"]
    if mode == "frozen":
        assert np.abs(mine - plain.embed(cells)).max() > 1e-2


def test_cells_that_lack_no_gene(backbone):
    """Where every cell has every gene, there is no absent gene to guess, and nothing to fail on."""
    shape = Shape(23, 16, 2, 16, 1, 0.0, 20)
    genes, values = np.tile(np.arange(20, dtype=np.int32), 6), np.ones(120, np.float32)
    part = Part("dense", genes, values, np.arange(0, 121, 20), np.arange(20), np.zeros(6, bool), "")
    batch = draw_batch(
        part, range(6), np.random.default_rng(0), length=30, hidden_share=0.3, pad_id=20, cls_id=21
    )
    torch.manual_seed(0)
    found = losses(ScGPT(shape), Decoders(16), batch, pad_id=20)
    assert found["absent"].item() == 0 and np.isfinite(found["gene"].item())
    sum(found.values()).backward()
