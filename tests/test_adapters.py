"""Adapters sit on the modules that were named and no others, learn, and merge."""

import copy
import itertools

import numpy as np
import pytest
import torch

from perturbret.networks.adapters import (
    add_lora,
    freeze,
    is_adapter,
    merge_lora,
    trainable,
    unfreeze_last,
)
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.settings import LORA_TARGETS

TARGETS = ScGPT.lora_targets
OPTIONS = {"targets": tuple(TARGETS), "layers": (), "rank": 2, "alpha": 4.0, "dropout": 0.0}
PAD = 20


def make_network():
    torch.manual_seed(0)
    network = ScGPT(Shape(23, 16, 2, 12, 3, 0.0, PAD)).eval()
    freeze(network)
    return network


@pytest.fixture
def block():
    rng = np.random.default_rng(0)
    genes = torch.from_numpy(np.stack([rng.permutation(20)[:7] for _ in range(4)]))
    values = torch.from_numpy(rng.integers(1, 50, genes.shape)).float()
    padding = torch.zeros(4, 7, dtype=torch.bool)
    padding[0, 5:] = True
    return genes, values, padding


def fill(network):
    """Give every adapter an effect: their B start at 0."""
    with torch.no_grad():
        for name, weight in trainable(network).items():
            if "lora_B" in name:
                weight.uniform_(-0.5, 0.5)


def test_settings_know_the_same_targets():
    assert set(LORA_TARGETS) == set(TARGETS)


def test_freeze():
    assert trainable(make_network()) == {}
    assert len(trainable(ScGPT(Shape(23, 16, 2, 12, 3, 0.0, PAD)))) == 45


@pytest.mark.parametrize("targets", [c for n in range(1, 5) for c in itertools.combinations(TARGETS, n)])
def test_adapters_sit_on_the_named_modules_alone(targets):
    network = make_network()
    assert add_lora(network, **{**OPTIONS, "targets": targets}) == 0
    adapted = {name for name, module in network.named_modules() if is_adapter(module)}
    assert adapted == {
        f"transformer_encoder.layers.{layer}.{TARGETS[t]}" for layer in range(3) for t in targets
    }
    assert all("lora_" in name for name in trainable(network))
    assert len(trainable(network)) == 2 * 3 * len(targets)


@pytest.mark.parametrize(("layers", "start"), [((2,), 2), ((2, 1), 1), ((0, 2), 0), ((), 0), ((1, 1), 1)])
def test_layers(layers, start):
    network = make_network()
    assert add_lora(network, **{**OPTIONS, "layers": layers}) == start
    adapted = {int(name.split(".")[2]) for name in trainable(network)}
    assert adapted == (set(layers) or {0, 1, 2})


def test_names_that_others_share_are_not_hit():
    """value_encoder has a linear1 and a linear2 as well, and layer 1 is the beginning of layer 11."""
    network = ScGPT(Shape(23, 8, 2, 8, 12, 0.0, PAD))
    add_lora(network, **{**OPTIONS, "targets": ("linear1", "linear2"), "layers": (1,)})
    assert {name.split(".lora_")[0] for name in trainable(network)} == {
        "transformer_encoder.layers.1.linear1",
        "transformer_encoder.layers.1.linear2",
    }
    assert not any(is_adapter(module) for module in network.value_encoder.modules())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradients_reach_all_adapters_in_training_and_evaluation(block, pooling):
    for mode in (True, False):
        network = make_network()
        add_lora(network, **OPTIONS)
        fill(network)
        network.train(mode)
        network(*block, pooling=pooling).pow(3).sum().backward()
        silent = [n for n, w in network.named_parameters() if (w.grad is None) == w.requires_grad]
        assert silent == []
        assert all(w.grad.norm() > 0 for w in trainable(network).values())


def test_new_adapters_change_nothing_and_each_acts_once_it_is_filled(block):
    plain = make_network()
    network = make_network()
    add_lora(network, **OPTIONS)
    with torch.inference_mode():
        torch.testing.assert_close(network(*block), plain(*block), atol=0, rtol=0)
        for name, weight in trainable(network).items():
            if "lora_B" in name:
                weight.uniform_(-0.5, 0.5)
                assert (network(*block) - plain(*block)).abs().max() > 1e-4, name
                weight.zero_()


def test_an_adapter_adds_alpha_over_rank_times_its_product():
    network = make_network()
    add_lora(network, **{**OPTIONS, "targets": ("linear1",), "rank": 4, "alpha": 12.0})
    fill(network)
    module = network.transformer_encoder["layers"][1].linear1
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), module.get_base_layer()(x) + 12 / 4 * x @ a.T @ b.T)


def test_merged_equals_unmerged_and_no_adapter_is_left(block):
    network = make_network()
    add_lora(network, **OPTIONS)
    fill(network)
    merged = copy.deepcopy(network)
    merge_lora(merged)
    assert not any(is_adapter(module) for module in merged.modules())
    assert set(merged.state_dict()) == set(make_network().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(merged(*block), network(*block), atol=1e-5, rtol=0)
        assert (make_network()(*block) - network(*block)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": ("q_proj",)}, "lora_targets: expected some of Wqkv, .*, got \\['q_proj'\\]"),
        ({"targets": ()}, "lora_targets: expected some of"),
        ({"layers": (3,)}, "lora_layers: expected positions from 0 to 2, got \\[3\\]"),
        ({"layers": (-1,)}, "lora_layers: expected positions from 0 to 2"),
        ({"rank": 0}, "lora: expected a rank from 1 to the least width 12 and"),
        ({"rank": 13}, "lora: expected a rank from 1 to the least width 12 and .*, got 13"),
        ({"alpha": 0.0}, "alpha above 0, got 2, 0.0"),
    ],
)
def test_errors(change, said):
    with pytest.raises(ValueError, match=said):
        add_lora(make_network(), **{**OPTIONS, **change})


def test_last_layers():
    network = make_network()
    assert unfreeze_last(network, 2) == 1
    assert {name.split(".")[2] for name in trainable(network)} == {"1", "2"}
    assert len(trainable(network)) == 24
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"last_layers: expected 1 to the network's 3 layers, got {n}"):
            unfreeze_last(network, n)
