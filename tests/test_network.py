"""The network gives what the official one gives with the same weights, and nothing in it can be bypassed."""

import re

import numpy as np
import pytest
import torch
from scgpt_oracle import official_model

from perturbret.networks.embedding import embed, fingerprint
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.tokens import Tokens

# The official network's fused path, in every comparison.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

PAD = 100  # of official_model's default vocabulary
SMALL = Shape(103, 32, 4, 48, 3, 0.2, PAD)
# What adapters are put on; anchored, since value_encoder has a linear1 as well.
ADAPTED = re.compile(r"transformer_encoder\.layers\.\d+\.(self_attn\.(Wqkv|out_proj)|linear1|linear2)")


def with_weights_of(official, shape):
    network = ScGPT(shape)
    state = {name.replace("in_proj_", "Wqkv."): value for name, value in official.state_dict().items()}
    extra = network.load_state_dict(state, strict=False)
    assert extra.missing_keys == []
    assert {name.split(".")[0] for name in extra.unexpected_keys} == {"decoder", "cls_decoder", "mvc_decoder"}
    return network.eval()


def sequences(lengths, *, n_genes=100, largest=50, seed=0):
    """Tokens of random cells of the given lengths."""
    rng = np.random.default_rng(seed)
    genes = [[n_genes + 1, *rng.choice(n_genes, n - 1, replace=False)] for n in lengths]
    values = [[-2, *rng.integers(1, largest + 1, n - 1)] for n in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(
        np.concatenate(genes).astype(np.int32),
        np.concatenate(values).astype(np.float32),
        indptr,
        n_genes + 3,
        n_genes,
        -2,
    )


def block(tokens):
    """All cells as tensors; padding is made where there is none, since the official network wants it."""
    genes, values, padding = tokens.padded(np.arange(len(tokens)))
    padding = np.zeros(genes.shape, bool) if padding is None else padding
    return torch.from_numpy(genes), torch.from_numpy(values), torch.from_numpy(padding)


@pytest.fixture
def network():
    torch.manual_seed(1)
    return ScGPT(SMALL).eval()


@pytest.mark.parametrize(
    ("sizes", "lengths"),
    [
        ((32, 4, 48, 3), (9, 20, 4, 1)),
        ((32, 4, 48, 3), (12, 12)),
        ((24, 2, 24, 1), (30, 7)),
        ((64, 8, 128, 2), (2, 60, 33)),
    ],
)
@pytest.mark.parametrize("largest", [50, 700], ids=["bins", "beyond what values are cut at"])
def test_equals_the_official_network(sizes, lengths, largest):
    official, _ = official_model(100, *sizes)
    network = with_weights_of(official, Shape(103, *sizes, 0.2, PAD))
    genes, values, padding = block(sequences(lengths, largest=largest))
    with torch.inference_mode():
        expected = official._encode(genes, values, padding)
        every = network.run(network.inputs(genes, values), padding)
        first = network(genes, values, padding)
    torch.testing.assert_close(every[~padding], expected[~padding], atol=1e-5, rtol=0)
    torch.testing.assert_close(first, expected[:, 0], atol=1e-5, rtol=0)
    assert expected[:, 0].std() > 0.1


def test_equals_the_official_network_in_the_shape_of_the_whole_human_checkpoint():
    official, _ = official_model(60_694, 512, 8, 512, 12)
    network = with_weights_of(official, Shape(60_697, 512, 8, 512, 12, 0.2, 60_694))
    genes, values, padding = block(sequences((120, 75), n_genes=60_694))
    with torch.inference_mode():
        expected = official._encode(genes, values, padding)
        every = network.run(network.inputs(genes, values), padding)
        first = network(genes, values, padding)
    torch.testing.assert_close(every[~padding], expected[~padding], atol=1e-5, rtol=0)
    torch.testing.assert_close(first, expected[:, 0], atol=1e-5, rtol=0)


def test_gradients_equal_the_official_ones():
    official, _ = official_model(dropout=0.0)
    network = with_weights_of(official, Shape(103, 32, 4, 48, 3, 0.0, PAD))
    genes, values, padding = block(sequences((9, 20, 4)))
    for model, output in (
        (official.train(), lambda: official._encode(genes, values, padding)[:, 0]),
        (network.train(), lambda: network(genes, values, padding)),
    ):
        model.zero_grad()
        output().pow(3).sum().backward()
    theirs = {name.replace("in_proj_", "Wqkv."): p.grad for name, p in official.named_parameters()}
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=2e-5, rtol=1e-4)
        assert parameter.grad.abs().sum() > 0


def test_gradient_check_covers_every_weight(network):
    assert len(list(network.parameters())) == 2 + 1 + 2 * 3 + 12 * 3


def test_mean_is_over_real_tokens(network):
    genes, values, padding = block(sequences((9, 20, 4)))
    with torch.inference_mode():
        hidden = network.run(network.inputs(genes, values), padding)
        found = network(genes, values, padding, pooling="mean")
    expected = torch.stack([rows[~gone].mean(dim=0) for rows, gone in zip(hidden, padding, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    genes, values, padding = block(sequences((9, 9)))
    with torch.inference_mode():
        torch.testing.assert_close(
            network(genes, values, None, pooling="mean"),
            network(genes, values, padding, pooling="mean"),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_is_not_read(network, pooling):
    genes, values, padding = block(sequences((9, 20, 4)))
    with torch.inference_mode():
        expected = network(genes, values, padding, pooling=pooling)
        other = network(
            genes.masked_fill(padding, 7), values.masked_fill(padding, 33.0), padding, pooling=pooling
        )
        unmasked = network(genes.masked_fill(padding, 7), values.masked_fill(padding, 33.0), pooling=pooling)
    torch.testing.assert_close(other, expected, atol=1e-6, rtol=0)
    assert (unmasked - expected).abs().max() > 1e-3


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("split", range(4))
def test_lower_layers_can_be_computed_apart(network, pooling, split):
    genes, values, padding = block(sequences((9, 20, 4)))
    with torch.inference_mode():
        lower = network.run(network.inputs(genes, values), padding, stop=split)
        torch.testing.assert_close(
            network.pool(lower, padding, pooling=pooling, start=split),
            network(genes, values, padding, pooling=pooling),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_order_of_genes_does_not_matter(network, pooling):
    genes, values, padding = block(sequences((12, 12)))
    order = torch.cat([torch.zeros(1, dtype=int), 1 + torch.randperm(11)])
    with torch.inference_mode():
        torch.testing.assert_close(
            network(genes[:, order], values[:, order], pooling=pooling),
            network(genes, values, pooling=pooling),
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("lengths", [(9, 20, 4), (9, 9, 9)], ids=["padded", "even"])
def test_every_linear_module_acts_in_evaluation(network, pooling, lengths):
    tokens = sequences(lengths)
    expected = embed(network, tokens, normalise=False, pooling=pooling)
    linear = {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    assert sum(bool(ADAPTED.fullmatch(name)) for name in linear) == 4 * SMALL.n_layers
    for name, module in linear.items():
        # An adapter's part in small: what is added to the output of the module, its weights untouched.
        noise = torch.empty(module.out_features).uniform_(-0.5, 0.5)
        hook = module.register_forward_hook(lambda module, args, output, noise=noise: output + noise)
        changed = embed(network, tokens, normalise=False, pooling=pooling)
        hook.remove()
        assert np.abs(changed - expected).max() > 1e-3, name
    np.testing.assert_array_equal(embed(network, tokens, normalise=False, pooling=pooling), expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_embedding_does_not_depend_on_batches_or_order(network, pooling):
    lengths = np.random.default_rng(3).integers(1, 60, 40)
    tokens = sequences(lengths)
    expected = embed(network, tokens, normalise=True, pooling=pooling)
    for batch_tokens in (1, 70, 500):
        found = embed(network, tokens, normalise=True, pooling=pooling, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    order = np.random.default_rng(4).permutation(40)
    parts = [np.s_[tokens.indptr[i] : tokens.indptr[i + 1]] for i in order]
    shuffled = Tokens(
        np.concatenate([tokens.genes[part] for part in parts]),
        np.concatenate([tokens.values[part] for part in parts]),
        np.concatenate([[0], np.cumsum(lengths[order])]),
        103,
        PAD,
        -2,
    )
    found = embed(network, shuffled, normalise=True, pooling=pooling, batch_tokens=200)
    np.testing.assert_allclose(found, expected[order], atol=1e-5, rtol=0)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


def test_normalise_sets_length_and_keeps_direction(network):
    tokens = sequences((9, 20, 4))
    raw = embed(network, tokens, normalise=False)
    unit = embed(network, tokens, normalise=True)
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-6)
    assert raw.dtype == unit.dtype == np.float32
    none = Tokens(np.empty(0, np.int32), np.empty(0, np.int8), np.zeros(1, np.int64), 103, PAD, -2)
    assert embed(network, none, normalise=True).shape == (0, 32)


def test_embed_uses_evaluation_mode_and_gives_training_back(network):
    tokens = sequences((9, 20, 4))
    expected = embed(network, tokens, normalise=False)
    network.train()
    np.testing.assert_array_equal(embed(network, tokens, normalise=False), expected)
    assert network.training
    genes, values, padding = block(tokens)
    with torch.no_grad():
        assert np.abs(network(genes, values, padding).numpy() - expected).max() > 1e-2  # dropout acts
    with pytest.raises(ValueError, match="pooling: expected one of cls, mean, got 'max'"):
        embed(network, tokens, normalise=False, pooling="max")
    assert network.training


def test_bfloat16_is_close(network):
    tokens = sequences((9, 20, 4, 40))
    exact = embed(network, tokens, normalise=True)
    coarse = embed(network, tokens, normalise=True, precision="bfloat16")
    assert coarse.dtype == np.float32
    assert 0.999 <= (exact * coarse).sum(axis=1).min() and (exact != coarse).any()


def test_embed_refuses(network):
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16, got 'float16'"):
        embed(network, sequences((3,)), normalise=True, precision="float16")
    with pytest.raises(ValueError, match="vocabulary of 103 with padding 100, got one of 93 with padding 90"):
        embed(network, sequences((3,), n_genes=90), normalise=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_heads": 5}, "d_model a multiple of n_heads"),
        ({"n_layers": 0}, "sizes of 1 or more"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\)"),
        ({"pad_id": 103}, "pad_id among 103 tokens"),
    ],
)
def test_impossible_shapes_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Shape(**{**vars(SMALL), **change})


def test_fingerprint_is_of_the_weights(network):
    before = fingerprint(network)
    torch.manual_seed(1)
    assert fingerprint(ScGPT(SMALL)) == before
    for parameter in network.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1e-3
        assert fingerprint(network) != before
        before = fingerprint(network)
