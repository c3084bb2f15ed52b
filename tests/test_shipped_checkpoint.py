"""The small checkpoint that the package carries: whole, small, readable, honest about what it is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import perturbret
from perturbret.data.sources import find_checkpoint, load_checkpoint_registry
from perturbret.pretraining.run import export
from perturbret.scgpt.backbone import backbone_for
from perturbret.scgpt.checkpoint import load_checkpoint
from perturbret.scgpt.vocabulary import NO_TOKEN, SPECIALS, load_vocabulary, map_genes

PLACE = Path(perturbret.__file__).resolve().parent / "resources" / "checkpoint_small"


@pytest.fixture(autouse=True)
def nowhere_else(request, monkeypatch):
    """No local directory of checkpoints; where real data are asked for, they stay."""
    monkeypatch.delenv("PERTURBRET_CHECKPOINTS", raising=False)
    if "real_data" not in request.fixturenames:
        monkeypatch.delenv("PERTURBRET_DATA", raising=False)


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(PLACE, report=lambda line: None)


def test_it_is_found_in_the_package_with_its_checksums():
    entry = load_checkpoint_registry()["small"]
    assert entry.url is None and None not in entry.files.values()
    assert find_checkpoint("small", progress=False).resolve() == PLACE
    assert {path.name for path in PLACE.iterdir()} == {*entry.files, "README.md"}


def test_its_files_are_small():
    assert sum(path.stat().st_size for path in PLACE.iterdir()) <= 15e6


def test_it_loads_with_finite_weights(loaded):
    shape = loaded.network.shape
    assert (shape.n_layers, shape.n_heads, shape.d_model, shape.d_hid) == (2, 4, 88, 176)
    assert shape.n_tokens == len(loaded.vocabulary) and loaded.token_settings["values"] == "log1p"
    assert loaded.account.missing == ()
    for name, weight in loaded.network.state_dict().items():
        assert np.isfinite(weight.numpy()).all() and weight.numpy().std() > 0, name


def test_its_tokens_are_scgpts(loaded):
    try:
        census = load_vocabulary()
    except FileNotFoundError:
        pytest.skip("the scgpt package is not installed: no vocabulary to compare with")
    assert set(loaded.vocabulary.genes) < set(census.genes)
    assert set(loaded.vocabulary.tokens) - set(loaded.vocabulary.genes) == set(SPECIALS)


def test_the_model_card_says_what_it_is_and_is_not(loaded):
    card = (PLACE / "README.md").read_text()
    assert "Not the scGPT whole-human checkpoint" in card
    shape = loaded.network.shape
    assert f"{shape.n_layers} layers, {shape.n_heads} heads, d = {shape.d_model}" in card
    assert f"{len(loaded.vocabulary):,} tokens" in card
    weights = load_file(PLACE / "best_model.safetensors").values()
    assert f"{sum(weight.numel() for weight in weights) / 1e6:.1f} million parameters" in card


def test_the_model_card_says_where_the_embedding_guesses_worse_than_the_mean():
    card = (PLACE / "README.md").read_text()
    table = card.split("| | gene | cell | absent | gene's mean |")[1].split("\n\n")[0]
    rows = [line.strip("|").split("|")[1:] for line in table.splitlines()[2:]]
    worse = sum(float(cell) > float(mean) for _, cell, _, mean in rows)
    words = ("none", "one", "two", "three", "four", "five")
    assert f"In {words[worse]} of the {words[len(rows)]} data sets, guessing from the cell embedding" in card


def test_the_model_card_names_the_input_that_the_network_wants(loaded):
    card = (PLACE / "README.md").read_text()
    assert f"`input_style` `{loaded.token_settings['values']}` in `args.json`" in card


def test_it_knows_the_genes_of_a_real_screen(real_data, loaded):
    from perturbret.data.datasets import load_screen

    genes = load_screen("norman_subset").genes
    found = map_genes(genes, loaded.vocabulary).token_ids != NO_TOKEN
    assert len(genes) == 500 and found.sum() >= 495
    backbone = backbone_for(genes, checkpoint=PLACE, init="pretrained", seed=0, report=lambda line: None)
    assert backbone.origin["genes_without_token"] == (~found).sum()


def test_it_is_exported_as_the_official_package_reads_it(loaded, tmp_path):
    from scgpt_oracle import load_official

    export("small", tmp_path / "official")
    model = load_official(tmp_path / "official")
    for name in ("encoder.embedding.weight", "transformer_encoder.layers.1.linear2.weight"):
        assert torch.equal(model.state_dict()[name], loaded.network.state_dict()[name])
    genes, values = torch.tensor([[loaded.vocabulary.ids["<cls>"], 5, 900]]), torch.tensor([[-2.0, 1.5, 3.0]])
    with torch.inference_mode():
        theirs = model(genes, values, torch.zeros_like(genes, dtype=torch.bool))["cell_emb"]
        ours = loaded.network.run(loaded.network.inputs(genes, values), None)[:, 0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    with pytest.raises(FileExistsError, match="official"):
        export("small", tmp_path / "official")


def test_an_exported_checkpoint_says_as_before_what_it_reads(tiny_checkpoint, tmp_path):
    """Bins stay bins; a checkpoint without decoders has none afterwards."""
    before = load_checkpoint(tiny_checkpoint, report=lambda line: None)
    export(str(tiny_checkpoint), tmp_path / "official")
    after = load_checkpoint(tmp_path / "official", report=lambda line: None)
    assert after.token_settings == before.token_settings and after.token_settings["values"] == "bins"
    assert after.vocabulary.hash == before.vocabulary.hash
