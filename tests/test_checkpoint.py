"""Checkpoint directories load whole, each tensor accounted for, or not at all; what loads embeds as scgpt does."""

import json
import re

import anndata
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scgpt_oracle import official_model, scgpt
from scipy.sparse import csr_matrix

from perturbret.data.prepared import Cells
from perturbret.networks.embedding import embed, fingerprint
from perturbret.scgpt.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.tokens import tokenize
from perturbret.scgpt.vocabulary import load_vocabulary

# As in the whole-human checkpoint, which holds the settings of its training beside them.
ARGS = {
    "pad_token": "<pad>",
    "input_style": "binned",
    "input_emb_style": "continuous",
    "n_bins": 51,
    "max_seq_len": 1200,
    "mask_ratio": [0.25, 0.5, 0.75],
    "fast_transformer": True,
    "nlayers": 3,
    "nheads": 4,
    "embsize": 32,
    "d_hid": 48,
    "dropout": 0.2,
    "n_layers_cls": 3,
    "mask_value": -1,
    "pad_value": -2,
}


@pytest.fixture(scope="module")
def official():
    return official_model()


@pytest.fixture
def write(official, tmp_path):
    """Writer of a checkpoint directory as flash-attention builds leave them; `change` edits the tensors first."""
    model, vocab = official

    def make(change=lambda state: state, *, args=None, vocab=vocab, save=torch.save, name="best_model.pt"):
        state = {key.replace("in_proj_", "Wqkv."): value.clone() for key, value in model.state_dict().items()}
        state["flag_encoder.weight"] = torch.zeros(2, 32)
        state = change(state) or state
        (tmp_path / "args.json").write_text(json.dumps(ARGS if args is None else args))
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        save(state, tmp_path / name)
        return tmp_path

    return make


def load(directory):
    return load_checkpoint(directory, report=lambda line: None)


def torch_names(state):
    return {key.replace("self_attn.Wqkv.", "self_attn.in_proj_"): value for key, value in state.items()}


@pytest.mark.parametrize("change", [lambda state: state, torch_names], ids=["Wqkv", "in_proj"])
@pytest.mark.parametrize(
    ("save", "name"), [(torch.save, "best_model.pt"), (save_file, "best_model.safetensors")]
)
def test_both_styles_of_names_and_files_load(write, official, change, save, name):
    network = load(write(change, save=save, name=name)).network
    expected = {key.replace("in_proj_", "Wqkv."): value for key, value in official[0].state_dict().items()}
    assert not network.training and network.shape == Shape(103, 32, 4, 48, 3, 0.2, 100)
    for key, value in network.state_dict().items():
        assert torch.equal(value, expected[key])
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.fixture
def untied_cells():
    """Cells without equal counts, of 1 to 60 genes, some of which have no token."""
    rng = np.random.default_rng(0)
    rows = np.zeros((12, 90), np.float32)
    for row, size in zip(rows, rng.integers(20, 60, 12), strict=True):
        row[rng.choice(90, size, replace=False)] = rng.choice(np.arange(1, 500), size, replace=False)
    genes = np.array([f"g{i}" if i % 9 else f"unknown{i}" for i in range(90)])
    names = np.array([f"cell{i}" for i in range(12)])
    return Cells(csr_matrix(rows), rows.sum(axis=1).astype(float), genes, names)


@pytest.mark.filterwarnings("ignore")  # of torch, on how the official package calls it
def test_embeddings_equal_those_of_embed_data(write, untied_cells, monkeypatch):
    directory = write(torch_names)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: ())  # read by embed_data: no worker processes
    data = anndata.AnnData(untied_cells.counts.copy())
    data.var["feature_name"] = untied_cells.genes
    expected = scgpt.tasks.embed_data(data, directory, device="cpu", use_fast_transformer=False)
    checkpoint = load(directory)
    ids = np.array([checkpoint.vocabulary.ids.get(gene, -1) for gene in untied_cells.genes])
    tokens = tokenize(untied_cells, ids, checkpoint.vocabulary, **checkpoint.token_settings)
    found = embed(checkpoint.network, tokens, normalise=True)
    np.testing.assert_allclose(found, expected.obsm["X_scGPT"], atol=1e-5, rtol=0)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_account_names_every_tensor(write, capsys):
    account = load_checkpoint(write()).account
    assert len(account.loaded) == 2 + 1 + 2 * 3 + 12 * 3 and account.missing == ()
    assert account.n_values == sum(value.numel() for value in load(write()).network.parameters())
    assert "flag_encoder.weight" in account.unused
    state = torch.load(write() / "best_model.pt")
    assert set(account.loaded) | set(account.unused) == set(state)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"loaded 45 tensors ({account.n_values:,} values); unused {len(account.unused)} (" in printed
    assert "cls_decoder 10, decoder 6, flag_encoder 1, mvc_decoder 3); missing 0" in printed


def test_settings_of_tokens_come_from_the_checkpoint(write):
    assert load(write()).token_settings == {
        "values": "bins",
        "n_bins": 51,
        "max_seq_len": 1200,
        "pad_value": -2,
    }
    continuous = {**ARGS, "input_style": "log1p", "max_seq_len": 300}
    settings = load(write(args=continuous)).token_settings
    assert (settings["values"], settings["max_seq_len"]) == ("log1p", 300)


def drop(*names):
    return lambda state: {key: value for key, value in state.items() if key not in names}


def put(name, value):
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop("encoder.enc_norm.bias"), "loaded 44 .* missing 1: encoder.enc_norm.bias"),
        (
            drop("transformer_encoder.layers.2.self_attn.Wqkv.weight"),
            "missing 1: .*layers.2.self_attn.Wqkv.weight",
        ),
        (put("dsbn.bns.0.weight", torch.ones(32)), "unknown 1: dsbn.bns.0.weight"),
        (put("transformer_encoder.layers.3.norm1.bias", torch.ones(32)), "unknown 1: .*layers.3.norm1.bias"),
        (put("encoder.enc_norm.bias", torch.ones(31)), r"enc_norm.bias of shape \(32,\) .* got \(31,\)"),
        (put("encoder.enc_norm.bias", torch.ones(32, dtype=int)), "floating point in encoder.enc_norm.bias"),
        (
            put("encoder.embedding.weight", torch.ones(104, 32)),
            r"\(103, 32\) .* vocabulary of 103 tokens, got \(104",
        ),
        (
            put("transformer_encoder.layers.0.self_attn.in_proj_bias", torch.ones(96)),
            "layers.0.self_attn.Wqkv.bias and its torch name .*, got both",
        ),
        (lambda state: {"epoch": 3, **state}, "expected named tensors, got int as 'epoch'"),
        (lambda state: {"model": state}, "expected named tensors, got dict as 'model'"),
        (lambda state: list(state.values()), "expected named tensors, got list"),
        (lambda state: re.compile("a pickled object"), "expected named tensors and nothing else"),
        (lambda state: ScGPT(Shape(103, 32, 4, 48, 3, 0.2, 100)), "expected named tensors and nothing else"),
    ],
)
def test_weights_that_are_not_as_expected_are_refused(write, change, said):
    with pytest.raises(CheckpointError, match=said):
        load(write(change))


def test_a_file_that_is_no_checkpoint_is_refused(write):
    for name in ("best_model.pt", "best_model.safetensors"):
        directory = write()
        (directory / "best_model.pt").unlink()
        (directory / name).write_bytes(b"no tensors" * 20)
        with pytest.raises(CheckpointError, match=f"{name}: expected named tensors and nothing else"):
            load(directory)
        (directory / name).unlink()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({key: value for key, value in ARGS.items() if key not in ("nheads", "dropout")}, "nheads, dropout"),
        ({**ARGS, "nlayers": "3"}, "expected whole numbers, got nlayers '3'"),
        ({**ARGS, "nheads": 5}, "d_model a multiple of n_heads"),
        ({**ARGS, "nlayers": 2}, "unknown 12"),
        ({**ARGS, "nlayers": 4}, "missing 12"),
        ({**ARGS, "pre_norm": True}, "expected pre_norm False, got True"),
        ({**ARGS, "input_emb_style": "category"}, "input_emb_style 'continuous', got 'category'"),
        ({**ARGS, "input_style": "normed_raw"}, "input_style binned or log1p, got 'normed_raw'"),
        ({**ARGS, "domain_spec_batchnorm": "dsbn"}, "domain_spec_batchnorm False, got 'dsbn'"),
        ({**ARGS, "pad_token": "[PAD]"}, "pad_token '<pad>', got '\\[PAD\\]'"),
        ([1], "expected an object of settings"),
    ],
)
def test_settings_of_another_network_are_refused(write, args, said):
    with pytest.raises(CheckpointError, match=said):
        load(write(args=args))


def test_a_vocabulary_of_another_size_is_refused(write, official):
    larger = {**official[1], "one more": 103}
    with pytest.raises(CheckpointError, match="vocabulary of 104 tokens"):
        load(write(vocab=larger))


def test_missing_and_doubled_files_are_refused(write):
    for name in ("args.json", "vocab.json", "best_model.pt"):
        directory = write()
        (directory / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load(directory)
    write(save=save_file, name="best_model.safetensors")
    with pytest.raises(
        CheckpointError, match="one file of weights, found best_model.pt and best_model.safet"
    ):
        load(write())
    (directory / "args.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        load(directory)


def test_half_precision_is_read_as_float32(write):
    network = load(write(lambda state: {key: value.half() for key, value in state.items()})).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_saved_checkpoint_loads_bit_for_bit(write, tmp_path):
    first = load(write())
    target = tmp_path / "saved"
    save_checkpoint(target, first.network, first.vocabulary, first.args)
    assert sorted(path.name for path in target.iterdir()) == [
        "args.json",
        "best_model.safetensors",
        "vocab.json",
    ]
    second = load(target)
    assert fingerprint(second.network) == fingerprint(first.network)
    assert (second.vocabulary.tokens, second.args, second.account.unused) == (
        first.vocabulary.tokens,
        {"pre_norm": False, "domain_spec_batchnorm": False, **ARGS},
        (),
    )
    save_checkpoint(target, first.network, first.vocabulary)  # sizes alone are enough to load
    assert load(target).network.shape == first.network.shape


def test_saved_weights_load_into_the_official_network(write, tmp_path):
    checkpoint = load(write())
    save_checkpoint(tmp_path / "saved", checkpoint.network, checkpoint.vocabulary, checkpoint.args)
    other, vocab = official_model(seed=7)
    state = load_file(tmp_path / "saved" / "best_model.safetensors")
    scgpt.utils.load_pretrained(other, state, verbose=False)
    genes = torch.tensor([[101, 4, 9]])
    values = torch.tensor([[-2.0, 3.0, 40.0]])
    with torch.inference_mode():
        expected = other._encode(genes, values, torch.zeros(1, 3, dtype=bool))[:, 0]
        torch.testing.assert_close(checkpoint.network(genes, values), expected, atol=1e-5, rtol=0)


def test_saving_refuses_another_vocabulary(write, tmp_path):
    network = load(write()).network
    with pytest.raises(
        CheckpointError, match="expected 103 tokens with <pad> at 100, got 60697 with <pad> at 60694"
    ):
        save_checkpoint(tmp_path / "saved", network, load_vocabulary())
    assert not (tmp_path / "saved").exists()
