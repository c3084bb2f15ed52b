"""The encoder of each mode is the same after it was saved and loaded, and embeds without leftovers."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perturbret.encoders.base import load_encoder, without_cache
from perturbret.networks import embedding
from perturbret.networks.adapters import trainable
from perturbret.networks.embedding import fingerprint
from perturbret.networks.encoder import TunedEncoder, build_network, load
from perturbret.scgpt.backbone import backbone_for
from perturbret.scgpt.settings import ScGPTSettings

MODES = {
    "frozen": {"mode": "frozen"},
    "frozen, normalised": {"mode": "frozen", "normalise": True, "pooling": "mean"},
    "head": {"mode": "head", "loss": "both", "head_depth": 2},
    "lora_head": {"mode": "lora_head", "rank": 2, "normalise": True},
    "lora above": {"mode": "lora_head", "rank": 2, "lora_layers": [1], "lora_targets": ["out_proj"]},
    "members": {"mode": "lora_head", "rank": 2, "members": 2, "loss": "contrastive"},
    "full": {"mode": "full"},
    "heads": {"mode": "head", "members": 2, "head_depth": 0},
    "last_n": {"mode": "last_n", "last_layers": 1},
}


@pytest.fixture
def make(tiny_prepared, tiny_checkpoint):
    """Maker of an encoder whose trained tensors are random."""

    def of(given, *, cache=None, seed=0):
        options = ScGPTSettings.read({"head_dim": 6, "head_width": 8, "head_depth": 1, **given})
        backbone = backbone_for(
            tiny_prepared.cells.genes,
            checkpoint=tiny_checkpoint,
            init="pretrained",
            seed=0,
            report=lambda line: None,
        )
        torch.manual_seed(seed)
        members = []
        for _ in range(options.members):
            model = build_network(backbone, options, 5)
            with torch.no_grad():
                for weight in trainable(model).values():
                    weight.add_(torch.empty_like(weight).uniform_(-0.2, 0.2))
                if model.head is not None:
                    model.head.set_scale(torch.randn(30, 16))
            members.append(model.eval())
        return TunedEncoder(
            kind="scgpt",
            settings={"chosen": {**options.model_dump(), "stop_epochs": [3]}},
            options=options,
            backbone=backbone,
            members=tuple(members),
            classes=tiny_prepared.candidates,
            log_prior=np.log(np.full(5, 0.2)),
            context=tiny_prepared.context,
            cache=cache,
        )

    return of


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_loaded_is_the_same_bit_for_bit(make, tiny_prepared, tmp_path, mode):
    encoder = make(MODES[mode])
    encoder.save(tmp_path / "encoder")
    loaded = load_encoder(tmp_path)
    cells = tiny_prepared.cells.take(np.arange(30))
    mine, theirs = encoder.embed(cells), loaded.embed(cells)
    np.testing.assert_array_equal(mine, theirs)
    assert mine.dtype == np.float32 and mine.std(axis=0).min() > 1e-4
    width = 6 if MODES[mode].get("head_depth", 1) and "frozen" not in mode else 16
    assert mine.shape == (30, width * MODES[mode].get("members", 1))
    if encoder.head is None:
        assert loaded.head is None and loaded.log_proba(theirs) is None
    else:
        np.testing.assert_array_equal(encoder.log_proba(mine), loaded.log_proba(theirs))
    assert (loaded.options, loaded.classes, loaded.context) == (
        encoder.options,
        encoder.classes,
        encoder.context,
    )
    np.testing.assert_array_equal(loaded.log_prior, encoder.log_prior)
    assert fingerprint(loaded.backbone.network) == fingerprint(encoder.backbone.network)
    assert loaded.backbone.origin == encoder.backbone.origin
    json.dumps(loaded.settings)


def test_each_saved_tensor_matters(make, tiny_prepared, tmp_path):
    make(MODES["lora_head"]).save(tmp_path / "encoder")
    cells = tiny_prepared.cells.take(np.arange(10))
    before = load(tmp_path / "encoder")
    z = before.embed(cells)
    for file in ("member0.safetensors", "network.safetensors"):
        path = tmp_path / "encoder" / file
        tensors = load_file(path)
        for name in tensors:
            # Not the same number everywhere: LayerNorm and softmax would take it out again.
            ramp = torch.linspace(0.1, 0.4, tensors[name].numel()).view(tensors[name].shape)
            save_file({**tensors, name: tensors[name] + ramp}, path)
            changed = load(tmp_path / "encoder")
            if "classifier" in name:
                assert np.abs(changed.log_proba(z) - before.log_proba(z)).max() > 1e-4, name
            else:
                assert np.abs(changed.embed(cells) - z).max() > 1e-4, name
        save_file(tensors, path)


def test_odd_tensors_are_refused(make, tmp_path):
    make(MODES["lora_head"]).save(tmp_path / "encoder")
    path = tmp_path / "encoder" / "member0.safetensors"
    tensors = load_file(path)
    gone = next(name for name in tensors if "lora_A" in name)
    save_file({name: t for name, t in tensors.items() if name != gone}, path)
    with pytest.raises(ValueError, match="expected the tensors of mode lora_head in member 0, odd: .*lora_A"):
        load(tmp_path / "encoder")
    save_file({**tensors, "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="odd: \\['more'\\]"):
        load(tmp_path / "encoder")


def test_cells_of_another_panel_are_refused(make, tiny_prepared):
    cells = tiny_prepared.cells
    fewer = type(cells)(cells.counts[:, :20].tocsr(), cells.totals, cells.genes[:20], cells.names)
    with pytest.raises(ValueError, match="cells: expected 24 genes, got 20"):
        make(MODES["head"]).embed(fewer)


def test_embedding_of_a_cell_does_not_depend_on_the_others(make, tiny_prepared):
    encoder = make(MODES["lora_head"])
    whole = encoder.embed(tiny_prepared.cells)
    some = np.array([40, 3, 77])
    np.testing.assert_allclose(encoder.embed(tiny_prepared.cells.take(some)), whole[some], atol=1e-5)


def test_probabilities_are_the_members_mean(make, tiny_prepared):
    encoder = make({"mode": "lora_head", "rank": 2, "members": 2})
    z = encoder.embed(tiny_prepared.cells.take(np.arange(12)))
    each = [
        member.head.classify(torch.from_numpy(part.copy())).softmax(dim=1).detach().numpy()
        for member, part in zip(encoder.members, np.split(z, 2, axis=1), strict=True)
    ]
    assert np.abs(each[0] - each[1]).max() > 1e-3
    np.testing.assert_allclose(np.exp(encoder.log_proba(z)), np.mean(each, axis=0), atol=1e-6)


def test_cached_embeddings_are_those_of_the_tuned_network(make, tiny_prepared, tmp_path):
    """Encoders of one cache that differ in adapters alone: neither gets what the other left."""
    cells = tiny_prepared.cells.take(np.arange(20))
    found = []
    for seed in (0, 1):
        encoder = make(MODES["lora_head"], cache=tmp_path, seed=seed)
        found.append(encoder.embed(cells))
        np.testing.assert_array_equal(encoder.embed(cells), found[-1])
        np.testing.assert_array_equal(without_cache(encoder).embed(cells), found[-1])
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert len(list(tmp_path.glob("embeddings-*/*.npy"))) == 2


def test_members_of_one_network_share_its_embedding(make, tiny_prepared, monkeypatch):
    calls, inner = [], embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    make(MODES["heads"]).embed(tiny_prepared.cells)
    assert len(calls) == 1
    make(MODES["members"]).embed(tiny_prepared.cells)
    assert len(calls) == 3
