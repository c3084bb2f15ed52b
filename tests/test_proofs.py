"""Each part of the proof passes for an honest training, and fails for the fault that it is there for."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from toy import tiny_tokens

from perturbret.networks import proofs
from perturbret.networks.adapters import add_lora, freeze, merge_lora, trainable, unfreeze_last
from perturbret.networks.embedding import fingerprint
from perturbret.networks.heads import Head, HeadedNetwork
from perturbret.networks.proofs import ProofFailed, prove
from perturbret.networks.training import Outcome
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.settings import ScGPTSettings

TOKENS = tiny_tokens(24)
INDEX = np.arange(20)
SHAPE = Shape(23, 16, 2, 16, 2, 0.0, 20)


def original_of(kind=ScGPT):
    torch.manual_seed(0)
    return kind(SHAPE).eval()


def make(original, adapt=None):
    """A model from a copy of the original, with adapters unless `adapt` says what to train."""
    network = copy.deepcopy(original)
    freeze(network)
    if adapt is None:
        add_lora(network, targets=["Wqkv", "linear1"], layers=(), rank=2, alpha=4.0, dropout=0.0)
    else:
        adapt(network)
    head = Head(16, 4, depth=1, width=8, dim=6, dropout=0.0, loss="both", temperature=0.1)
    return HeadedNetwork(network, head, pooling="cls", normalise=False, start=0)


def tuned(model):
    """As training would: every trained tensor is another."""
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(torch.empty_like(weight).uniform_(-0.3, 0.3))
    return model


def check(model, original, *, sha256=None, gradients=None, n_steps=9, **options):
    gradients = dict.fromkeys(trainable(model), 1.0) if gradients is None else gradients
    sha256 = fingerprint(original) if sha256 is None else sha256
    outcome = Outcome(pd.DataFrame(), 1, gradients, n_steps)
    return prove(model, original, sha256, TOKENS, INDEX, outcome, ScGPTSettings(**options))


def test_an_honest_training_passes():
    original = original_of()
    model = tuned(make(original))
    found = check(model, original)
    assert found["embedding_change"] > 1e-3 and 0 <= found["merged_difference"] < 1e-5
    assert found["frozen_unchanged"] == len(original.state_dict())
    assert set(found["gradient_norms"]) == set(trainable(model))
    assert check(model, original, precision="bfloat16")["merged_difference"] < 0.05


def test_tuned_last_layers_pass():
    original = original_of()
    found = check(tuned(make(original, lambda network: unfreeze_last(network, 1))), original)
    assert found["merged_difference"] is None and found["embedding_change"] > 1e-3
    assert found["frozen_unchanged"] == len(original.state_dict()) - 12


def test_a_head_alone_passes_and_the_network_may_not_change():
    original = original_of()
    model = tuned(make(original, lambda network: None))
    found = check(model, original)
    assert found["embedding_change"] == 0.0 and found["frozen_unchanged"] == len(original.state_dict())
    with torch.no_grad():
        model.network.encoder.enc_norm.weight[0] += 1e-3
    with pytest.raises(
        ProofFailed, match="expected the frozen network to embed cells as before, they differ"
    ):
        check(model, original)


@pytest.mark.parametrize("norm", [0.0, float("nan"), None])
def test_a_tensor_without_gradient_fails(norm):
    original = original_of()
    model = tuned(make(original))
    gradients = dict.fromkeys(trainable(model), 1.0)
    first = sorted(gradients)[0]
    gradients[first] = norm
    if norm is None:
        del gradients[first]
    with pytest.raises(ProofFailed, match=f"expected a gradient in each of 13 .* 1 never got one: {first}"):
        check(model, original, gradients=gradients)


def test_a_single_step_gives_the_first_half_of_an_adapter_no_gradient():
    original = original_of()
    model = tuned(make(original))
    gradients = {name: 0.0 if ".lora_A." in name else 1.0 for name in trainable(model)}
    assert sum(norm == 0 for norm in gradients.values()) == 4
    assert check(model, original, gradients=gradients, n_steps=1)["embedding_change"] > 0
    with pytest.raises(ProofFailed, match="4 never got one: .*lora_A"):
        check(model, original, gradients=gradients, n_steps=2)
    other = sorted(name for name in gradients if ".lora_B." in name)[0]
    with pytest.raises(ProofFailed, match="1 never got one: .*lora_B"):
        check(model, original, gradients={**gradients, other: 0.0}, n_steps=1)


def test_the_networks_mode_is_left_as_it_was():
    original = original_of()
    check(tuned(make(original)), original)
    assert not original.training


def test_adapters_on_a_module_that_is_never_called_fail():
    """By the gradient that they cannot get; and where one is claimed, by embeddings that do not change."""

    class Idle(ScGPT):
        def __init__(self, shape):
            super().__init__(shape)
            self.extra = nn.Linear(16, 16)

    def adapt(network):
        inject_adapter_in_model(LoraConfig(r=2, target_modules="extra"), network)

    original = original_of(Idle)
    model = tuned(make(original, adapt))
    model(*(torch.from_numpy(part) for part in TOKENS.padded(INDEX)))[1].sum().backward()
    gradients = {
        name: 1.0
        if name.startswith("head")
        else float(weight.grad.norm())
        if weight.grad is not None
        else 0.0
        for name, weight in trainable(model).items()
    }
    with pytest.raises(ProofFailed, match="2 never got one: network.extra.lora_A"):
        check(model, original, gradients=gradients)
    with pytest.raises(
        ProofFailed, match="expected the trained network to embed cells otherwise than before"
    ):
        check(model, original)


class Stock(ScGPT):
    """torch's own encoder in place of plain modules: in evaluation it reads raw weights, adapters or not."""

    def __init__(self, shape):
        super().__init__(shape)
        layer = nn.TransformerEncoderLayer(
            shape.d_model, shape.n_heads, shape.d_hid, shape.dropout, batch_first=True
        )
        self.transformer_encoder = nn.TransformerEncoder(layer, shape.n_layers, enable_nested_tensor=False)

    def pool(self, hidden, padding, *, pooling="cls", start=0):
        return self.transformer_encoder(hidden, src_key_padding_mask=padding)[:, 0]


def test_adapters_on_torchs_own_encoder_fail():
    def adapt(network):
        pattern = r"transformer_encoder\.layers\.\d+\.(linear1|linear2)"
        inject_adapter_in_model(LoraConfig(r=2, target_modules=pattern), network)

    original = original_of(Stock)
    model = tuned(make(original, adapt)).train()
    model(*(torch.from_numpy(part) for part in TOKENS.padded(INDEX)))[0].pow(2).sum().backward()
    # In training the gradient is there: nothing looks wrong until cells are embedded.
    norms = {n: float(w.grad.norm()) for n, w in trainable(model).items() if n.startswith("network.")}
    assert len(norms) == 8 and min(norms.values()) > 0
    with pytest.raises(
        ProofFailed, match="expected the trained network to embed cells otherwise than before"
    ):
        check(model, original)


def test_training_that_changed_nothing_fails():
    original = original_of()
    with pytest.raises(ProofFailed, match="found no difference"):
        check(make(original), original)


def test_merging_that_changes_embeddings_fails(monkeypatch):
    original = original_of()
    model = tuned(make(original))

    def twice(network):
        for module in network.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 2
        merge_lora(network)

    monkeypatch.setattr(proofs, "merge_lora", twice)
    with pytest.raises(ProofFailed, match="expected merged adapters to embed cells as unmerged ones do"):
        check(model, original)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.embedding.weight",
        "transformer_encoder.layers.1.self_attn.Wqkv.base_layer.weight",
        "transformer_encoder.layers.0.norm2.bias",
    ],
)
def test_a_frozen_weight_that_moved_fails(name):
    original = original_of()
    model = tuned(make(original))
    with torch.no_grad():
        model.network.state_dict()[name].view(-1)[3] += 1e-6
    own = name.replace(".base_layer", "")
    with pytest.raises(ProofFailed, match=f"expected the frozen {own} to be as it was, it changed"):
        check(model, original)


def test_the_original_may_not_move_along():
    """Shared by mistake, a weight that moved would equal itself."""
    original = original_of()
    sha256 = fingerprint(original)
    model = tuned(make(original))
    for network, name in ((original, "linear2"), (model.network, "linear2")):
        with torch.no_grad():
            getattr(network.transformer_encoder["layers"][0], name).weight[0, 0] += 1
    with pytest.raises(
        ProofFailed, match="expected the weights that training started from to be as they were"
    ):
        check(model, original, sha256=sha256)


def test_a_frozen_tensor_that_is_gone_fails():
    original = original_of()
    model = tuned(make(original))
    model.network.value_encoder.norm = nn.LayerNorm(16, elementwise_affine=False)
    with pytest.raises(ProofFailed, match="value_encoder.norm.bias, value_encoder.norm.weight are gone"):
        check(model, original)
