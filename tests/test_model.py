"""A model embeds the same cells alike from tokens, from what its lower layers gave, and from embeddings."""

import numpy as np
import pytest
import torch

from perturbret.networks.adapters import add_lora, freeze
from perturbret.networks.embedding import best_device, device_name, embed, embed_rows, run_lower
from perturbret.networks.heads import Head, HeadedNetwork
from perturbret.networks.inputs import Hidden, Rows, blocks, to_device
from perturbret.scgpt.backbone import backbone_for
from perturbret.scgpt.tokens import tokenize

INDEX = np.array([5, 0, 33, 12, 7, 7, 90])


@pytest.fixture
def backbone(tiny_prepared, tiny_checkpoint):
    return backbone_for(
        tiny_prepared.cells.genes,
        checkpoint=tiny_checkpoint,
        init="pretrained",
        seed=0,
        report=lambda line: None,
    )


@pytest.fixture
def tokens(tiny_prepared, backbone):
    return tokenize(tiny_prepared.cells, backbone.token_ids, backbone.vocabulary, **backbone.token_settings)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head(
        16, 5, depth=1, width=8, dim=4, dropout=0.5, loss="classification", temperature=0.1
    ).requires_grad_(True)


def model_from(backbone, head, start, pooling="cls", normalise=False):
    return HeadedNetwork(backbone.network, head, pooling=pooling, normalise=normalise, start=start)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_all_ways_give_the_same(backbone, tokens, head, pooling):
    assert tokens.lengths.min() < tokens.lengths.max()  # there is padding
    expected, logits = embed_rows(model_from(backbone, head, 0, pooling), tokens, INDEX)
    assert expected.shape == (7, 4) and logits.shape == (7, 5) and expected.std() > 1e-2
    rows = Rows(embed(backbone.network, tokens, normalise=False, pooling=pooling))
    ways = [
        (rows, None),
        (run_lower(backbone.network, tokens, 1), 1),
        (run_lower(backbone.network, tokens, 2), 2),
    ]
    for source, start in ways:
        assert len(source) == len(tokens)
        found, scores = embed_rows(model_from(backbone, head, start, pooling), source, INDEX)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(scores, logits, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_parts_of_a_batch_give_what_the_whole_does(backbone, tokens, monkeypatch, start, pooling):
    source = run_lower(backbone.network, tokens, start) if start else tokens
    model = model_from(backbone, None, start, pooling).eval()
    block = to_device(source.padded(np.arange(40)), "cpu")
    assert block[2] is not None and len(np.unique(tokens.lengths[:40])) > 5

    def outcome():
        model.zero_grad()
        cells = model(*block)[0]
        (cells * torch.arange(40.0)[:, None]).sum().backward()
        return cells, backbone.network.transformer_encoder["layers"][1].linear1.weight.grad

    whole, gradient = outcome()
    sizes, inner = [], model._run
    monkeypatch.setattr("perturbret.networks.heads.PART_TOKENS", 50)
    monkeypatch.setattr(model, "_run", lambda *part: sizes.append(part[0].shape[:2]) or inner(*part))
    parts, gradient_of_parts = outcome()
    assert len(sizes) > 5 and len({length for _, length in sizes}) > 3
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient_of_parts, gradient, atol=1e-3, rtol=1e-4)


def test_without_a_head_cells_are_what_the_network_embeds(backbone, tokens):
    raw = embed(backbone.network, tokens, normalise=False)[INDEX]
    found, logits = embed_rows(model_from(backbone, None, 0), tokens, INDEX)
    np.testing.assert_allclose(found, raw, atol=1e-5)
    assert logits is None
    unit, _ = embed_rows(model_from(backbone, None, 0, normalise=True), tokens, INDEX)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-5)


def test_dropout_does_not_act_and_training_mode_is_given_back(backbone, tokens, head):
    model = model_from(backbone, head, 0).train()
    first, _ = embed_rows(model, tokens, INDEX)
    np.testing.assert_array_equal(embed_rows(model, tokens, INDEX)[0], first)
    assert model.training and model.network.training
    hidden = run_lower(backbone.network, tokens, 1)
    np.testing.assert_array_equal(run_lower(backbone.network, tokens, 1).values, hidden.values)
    assert backbone.network.training


@pytest.mark.parametrize("batch_tokens", [1, 60, 10**6])
def test_blocks_cover_each_cell_once(tokens, batch_tokens):
    seen = np.zeros(len(INDEX), int)
    for chosen, (genes, _, padding) in blocks(tokens, INDEX, "cpu", batch_tokens=batch_tokens):
        seen[chosen] += 1
        assert genes.shape[0] == len(chosen) and (genes.numel() <= batch_tokens or len(chosen) == 1)
        real = genes.shape[1] if padding is None else (~padding).sum(dim=1).numpy()
        np.testing.assert_array_equal(tokens.lengths[INDEX[chosen]], real)
    assert (seen == 1).all()


def test_hidden_blocks():
    hidden = Hidden(np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 4, 6]))
    values, none, padding = hidden.padded(np.array([1, 0]))
    assert none is None
    np.testing.assert_array_equal(values[0], [[2, 3], [4, 5], [6, 7]])
    np.testing.assert_array_equal(values[1, 0], [0, 1])
    np.testing.assert_array_equal(padding, [[False] * 3, [False, True, True]])
    assert hidden.padded(np.array([2]))[2] is None


def test_lower_layers_hold_no_adapters_effect_above_them(backbone, tokens):
    before = run_lower(backbone.network, tokens, 1).values
    freeze(backbone.network)
    start = add_lora(backbone.network, targets=["linear1"], layers=[1], rank=2, alpha=4.0, dropout=0.0)
    with torch.no_grad():
        for name, weight in backbone.network.named_parameters():
            if "lora_B" in name:
                weight.uniform_(-1, 1)
    np.testing.assert_array_equal(run_lower(backbone.network, tokens, start).values, before)


def test_lower_layers_may_lie_on_disk(backbone, tokens, tmp_path):
    in_memory = run_lower(backbone.network, tokens, 1)
    on_disk = run_lower(backbone.network, tokens, 1, directory=tmp_path)
    assert isinstance(on_disk.values, np.memmap) and list(tmp_path.iterdir()) == []
    for source in (in_memory, on_disk):
        assert type(source.padded(INDEX)[0]) is np.ndarray
    np.testing.assert_array_equal(on_disk.padded(INDEX)[0], in_memory.padded(INDEX)[0])


@pytest.mark.parametrize("start", [0, 1])
def test_bfloat16_is_near_float32(backbone, tokens, start):
    index = np.arange(40)
    found = {}
    for precision in ("float32", "bfloat16"):
        source = run_lower(backbone.network, tokens, start, precision=precision) if start else tokens
        found[precision], _ = embed_rows(
            model_from(backbone, None, start), source, index, precision=precision
        )
    exact, near = found.values()
    cosine = (exact * near).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(near, axis=1)
    assert cosine.min() >= 0.99 and (exact != near).any()


def test_the_record_names_a_gpu(monkeypatch):
    assert device_name() == best_device().type or torch.cuda.is_available()
    monkeypatch.setattr("perturbret.networks.embedding.best_device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert device_name() == "card 1"


def test_best_device_is_the_cpu_without_a_gpu():
    if not torch.cuda.is_available():
        assert best_device().type in ("cpu", "mps")
