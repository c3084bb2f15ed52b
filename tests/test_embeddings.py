"""Embeddings kept on disk: read when everything is the same, computed when anything is not."""

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from perturbret.scgpt import encoder as embeddings
from perturbret.scgpt.encoder import cached_embed, embedding_key
from perturbret.scgpt.model import embed
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.tokens import Tokens

SHAPE = Shape(103, 32, 4, 48, 2, 0.2, 100)


def make_network(seed=1, **sizes):
    torch.manual_seed(seed)
    return ScGPT(Shape(**{**vars(SHAPE), **sizes})).eval()


def make_tokens(lengths=(9, 20, 4, 12), seed=0):
    rng = np.random.default_rng(seed)
    genes = [[101, *rng.choice(100, n - 1, replace=False)] for n in lengths]
    values = [[-2, *rng.integers(1, 51, n - 1)] for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(
        np.concatenate(genes).astype(np.int32), np.concatenate(values).astype(np.int8), indptr, 103, 100, -2
    )


@pytest.fixture
def network():
    return make_network()


@pytest.fixture
def computed(monkeypatch):
    """How many times the network is asked."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return embed(*arguments, **keywords)

    monkeypatch.setattr(embeddings, "embed", counted)
    return calls


@pytest.fixture
def no_network(monkeypatch):
    """From when it is called on, computing is an error."""

    def refuse(*arguments, **keywords):
        raise AssertionError("computed")

    return lambda: monkeypatch.setattr(embeddings, "embed", refuse)


def test_second_call_reads_the_same_bits(network, tmp_path, no_network):
    tokens = make_tokens()
    first = cached_embed(network, tokens, directory=tmp_path, normalise=True)
    np.testing.assert_array_equal(first, embed(network, tokens, normalise=True))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    no_network()
    network.train()
    again = cached_embed(network, make_tokens(), directory=tmp_path, normalise=True, batch_tokens=7)
    assert again.tobytes() == first.tobytes() and again.dtype == np.float32
    again[0] = 0  # a copy of one's own
    third = cached_embed(network, tokens, directory=tmp_path, normalise=True)
    assert third.tobytes() == first.tobytes()


def test_memory_mapped_tokens_are_the_same_tokens(network, tmp_path, no_network):
    tokens = make_tokens()
    first = cached_embed(network, tokens, directory=tmp_path / "cache", normalise=True)
    for name in ("genes", "values", "indptr"):
        np.save(tmp_path / f"{name}.npy", getattr(tokens, name))
    arrays = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("genes", "values", "indptr")]
    no_network()
    mapped = Tokens(*arrays, 103, 100, -2)
    assert (cached_embed(network, mapped, directory=tmp_path / "cache", normalise=True) == first).all()


def change_weight(network):
    with torch.no_grad():
        network.transformer_encoder["layers"][1].linear2.bias[3] += 1e-3


def swap_weights(network):
    """The same numbers under other names."""
    layers = network.transformer_encoder["layers"]
    first, second = layers[0].state_dict(), {k: v.clone() for k, v in layers[1].state_dict().items()}
    layers[1].load_state_dict(first)
    layers[0].load_state_dict(second)


def change_heads(network):
    network.transformer_encoder["layers"][0].self_attn.n_heads = 2


def replace_module(network):
    class Other(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1

    old = network.transformer_encoder["layers"][0].linear1
    new = Other(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    network.transformer_encoder["layers"][0].linear1 = new


@pytest.mark.parametrize("change", [change_weight, swap_weights, change_heads, replace_module])
def test_another_network_is_computed(network, tmp_path, computed, change):
    tokens = make_tokens()
    before = cached_embed(network, tokens, directory=tmp_path, normalise=False)
    change(network)
    after = cached_embed(network, tokens, directory=tmp_path, normalise=False)
    assert len(computed) == 2 and np.abs(after - before).max() > 1e-5
    np.testing.assert_array_equal(after, embed(network, tokens, normalise=False))
    assert len(list(tmp_path.glob("*.npy"))) == 2


def test_adapters_count_with_weights_and_scale(network, tmp_path, computed):
    tokens = make_tokens()
    bare = cached_embed(network, tokens, directory=tmp_path, normalise=False)
    targets = r"transformer_encoder\.layers\.\d+\.(self_attn\.(Wqkv|out_proj)|linear1|linear2)"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    inject_adapter_in_model(config, network)
    found = [cached_embed(network, tokens, directory=tmp_path, normalise=False)]
    adapted = [module for module in network.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        module.scaling["default"] *= 3
    found.append(cached_embed(network, tokens, directory=tmp_path, normalise=False))
    for module in adapted:
        module.enable_adapters(False)
    found.append(cached_embed(network, tokens, directory=tmp_path, normalise=False))
    assert len(computed) == 4 and len(adapted) == 8
    assert np.abs(found[0] - bare).max() > 1e-3 and np.abs(found[1] - found[0]).max() > 1e-3
    np.testing.assert_array_equal(found[2], bare)


def test_forward_hooks_are_refused(network, tmp_path):
    handle = network.encoder.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="no forward hooks.*got some on 'encoder'"):
        cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    handle.remove()
    cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)


@pytest.mark.parametrize(
    "change", [{"normalise": False}, {"pooling": "mean"}, {"precision": "bfloat16"}], ids=lambda c: [*c][0]
)
def test_each_setting_is_part_of_the_key(network, tmp_path, computed, change):
    settings = {"normalise": True, "pooling": "cls", "precision": "float32"}
    before = cached_embed(network, make_tokens(), directory=tmp_path, **settings)
    after = cached_embed(network, make_tokens(), directory=tmp_path, **{**settings, **change})
    assert len(computed) == 2 and (after != before).any()
    key, other = (
        embedding_key(network, make_tokens(), **chosen) for chosen in (settings, {**settings, **change})
    )
    assert {name for name in key if key[name] != other[name]} == set(change)


def test_code_is_part_of_the_key(network, tmp_path, computed, monkeypatch):
    tokens = make_tokens()
    cached_embed(network, tokens, directory=tmp_path / "cache", normalise=True)
    monkeypatch.setattr(embeddings, "code_hash", lambda *starts: "another")
    cached_embed(network, tokens, directory=tmp_path / "cache", normalise=True)
    assert len(computed) == 2


def test_other_tokens_are_computed(network, tmp_path, computed):
    for tokens in (make_tokens(), make_tokens(seed=1), make_tokens((9, 20, 4))):
        cached_embed(network, tokens, directory=tmp_path, normalise=True)
    assert len(computed) == 3
    tokens = make_tokens()
    tokens.values[5] += 1  # written to after it was hashed once
    cached_embed(network, tokens, directory=tmp_path, normalise=True)
    assert len(computed) == 4


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def flip_header(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(4, 32)", b"(2, 64)"))


def empty(path):
    path.write_bytes(b"")


def pickled(path):
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut, flip, flip_header, empty, pickled])
def test_damaged_embeddings_are_computed_again(network, tmp_path, computed, damage):
    expected = cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    (path,) = tmp_path.glob("*.npy")
    before = path.read_bytes()
    damage(path)
    assert path.read_bytes() != before
    np.testing.assert_array_equal(
        cached_embed(network, make_tokens(), directory=tmp_path, normalise=True), expected
    )
    assert len(computed) == 2 and path.read_bytes() == before  # repaired
    cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    assert len(computed) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"key": 1}', None], ids=["empty", "list", "bare", "other", "gone"]
)
def test_damaged_record_is_not_trusted(network, tmp_path, computed, text):
    expected = cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    (record,) = tmp_path.glob("*.json")
    if text is None:
        record.unlink()
    else:
        record.write_text(text)
    found = cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    assert len(computed) == 2 and (found == expected).all()


def test_record_of_another_key_is_not_taken(network, tmp_path, computed):
    """As where 16 hexadecimal digits of two keys agree."""
    cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    (record,) = tmp_path.glob("*.json")
    content = json.loads(record.read_text())
    content["key"]["weights"] = "0" * 64
    record.write_text(json.dumps(content))
    cached_embed(network, make_tokens(), directory=tmp_path, normalise=True)
    assert len(computed) == 2


def test_nothing_is_left_when_the_network_fails(network, tmp_path):
    with pytest.raises(ValueError, match="pooling: expected one of cls, mean, got 'max'"):
        cached_embed(network, make_tokens(), directory=tmp_path, normalise=True, pooling="max")
    with pytest.raises(ValueError, match="precision"):
        cached_embed(network, make_tokens(), directory=tmp_path, normalise=True, precision="float16")
    assert list(tmp_path.iterdir()) == []


def race(directory):
    torch.set_num_threads(1)
    found = [
        cached_embed(make_network(), make_tokens(), directory=directory, normalise=True) for _ in range(3)
    ]
    return [array.tobytes() for array in found]


def test_processes_may_race(network, tmp_path, no_network):
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        found = [bits for three in pool.map(race, [tmp_path] * 3) for bits in three]
    assert len(found) == 9 and len(set(found)) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".npy"]
    no_network()
    assert cached_embed(network, make_tokens(), directory=tmp_path, normalise=True).tobytes() == found[0]


def test_no_cells(network, tmp_path, computed):
    none = Tokens(np.empty(0, np.int32), np.empty(0, np.int8), np.zeros(1, np.int64), 103, 100, -2)
    for _ in range(2):
        assert cached_embed(network, none, directory=tmp_path, normalise=True).shape == (0, 32)
    assert len(computed) == 1
