"""A backbone is its checkpoint cut to a panel: the same embeddings from fewer tokens."""

import shutil

import numpy as np
import pytest

from perturbret.alignment.gene_space import (
    ColumnMap,
    GeneSpace,
    GeneSpaceMismatch,
    hash_genes,
    write_gene_space,
)
from perturbret.networks.embedding import embed, fingerprint
from perturbret.scgpt.backbone import backbone_for, restrict
from perturbret.scgpt.checkpoint import load_checkpoint
from perturbret.scgpt.tokens import tokenize
from perturbret.scgpt.vocabulary import PAD, SPECIALS, Vocabulary, map_genes


def quiet(line):
    pass


@pytest.fixture(scope="module")
def panel(tiny_prepared):
    """Half of the genes, in another order; the first has no token."""
    cells = tiny_prepared.cells
    order = np.concatenate([[0], np.random.default_rng(0).permutation(np.arange(1, 24))[:11]])
    return type(cells)(cells.counts[:, order].tocsr(), cells.totals, cells.genes[order], cells.names)


def trunk_of(panel, checkpoint, init="pretrained", seed=0, dropout=None):
    return backbone_for(
        panel.genes, checkpoint=checkpoint, init=init, seed=seed, dropout=dropout, report=quiet
    )


def test_embeds_as_the_whole_checkpoint_does(panel, tiny_checkpoint):
    whole = load_checkpoint(tiny_checkpoint, report=quiet)
    mapped = map_genes(panel.genes, whole.vocabulary)
    tokens = tokenize(panel, mapped.token_ids, whole.vocabulary, **whole.token_settings)
    expected = embed(whole.network, tokens, normalise=False)
    backbone = trunk_of(panel, tiny_checkpoint)
    tokens = tokenize(panel, backbone.token_ids, backbone.vocabulary, **backbone.token_settings)
    np.testing.assert_allclose(embed(backbone.network, tokens, normalise=False), expected, atol=1e-5)
    assert expected.std(axis=0).max() > 1e-2
    assert len(backbone.vocabulary) == 11 + len(SPECIALS) < len(whole.vocabulary)
    assert backbone.network.shape.pad_id == backbone.vocabulary.ids[PAD]


def test_tokens_are_those_of_the_genes(panel, tiny_checkpoint):
    backbone = trunk_of(panel, tiny_checkpoint)
    assert backbone.token_ids[0] == -1
    assert [backbone.vocabulary.tokens[i] for i in backbone.token_ids[1:]] == list(panel.genes[1:])


def test_origin_says_where_it_came_from(panel, tiny_checkpoint):
    backbone = trunk_of(panel, tiny_checkpoint)
    whole = load_checkpoint(tiny_checkpoint, report=quiet)
    assert backbone.origin["checkpoint_sha256"] == fingerprint(whole.network)
    assert backbone.origin["init"] == "pretrained" and backbone.origin["genes_without_token"] == 1
    assert backbone.origin["account"].startswith("loaded 33 tensors")


def test_random_has_the_shape_and_none_of_the_weights(panel, tiny_checkpoint):
    pretrained, random = trunk_of(panel, tiny_checkpoint), trunk_of(panel, tiny_checkpoint, "random")
    assert random.network.shape == pretrained.network.shape
    assert fingerprint(trunk_of(panel, tiny_checkpoint, "random").network) == fingerprint(random.network)
    assert fingerprint(trunk_of(panel, tiny_checkpoint, "random", 1).network) != fingerprint(random.network)
    theirs = dict(pretrained.network.named_parameters())
    for name, weight in random.network.named_parameters():
        assert (weight != theirs[name]).any(), name


def test_dropout_is_the_checkpoints_or_as_given(panel, tiny_checkpoint):
    assert trunk_of(panel, tiny_checkpoint).network.shape.dropout == 0.1
    assert (
        trunk_of(panel, tiny_checkpoint, dropout=0.0).network.transformer_encoder["layers"][0].dropout.p == 0
    )


def test_a_run_keeps_the_global_random_numbers(panel, tiny_checkpoint):
    import torch

    before = torch.get_rng_state()
    trunk_of(panel, tiny_checkpoint, "random")
    assert torch.equal(torch.get_rng_state(), before)


def test_restrict():
    vocabulary = Vocabulary(("b", "<pad>", "a", "<cls>", "c", "<eoc>"), "toy")
    kept, rows = restrict(vocabulary, np.array([4, -1, 0]))
    assert kept.tokens == ("b", "<pad>", "<cls>", "c", "<eoc>")
    np.testing.assert_array_equal(rows, [0, 1, 3, 4, 5])


def test_errors(panel, tiny_checkpoint):
    with pytest.raises(ValueError, match="init: expected one of pretrained, random, got 'zeros'"):
        trunk_of(panel, tiny_checkpoint, "zeros")
    strange = type(panel)(panel.counts, panel.totals, np.array([f"X{i}" for i in range(12)]), panel.names)
    with pytest.raises(ValueError, match="genes: expected some that the vocabulary.*none of 12 .first: 'X0'"):
        trunk_of(strange, tiny_checkpoint)


def gene_space(genes):
    """A common gene space of one dataset whose columns are in its order."""
    n = len(genes)
    columns = ColumnMap(
        tuple((i,) for i in range(n)), tuple((gene,) for gene in genes), n, hash_genes(genes), 9, "all", "f0", 0.1,
        (0.5,) * n, (0.5,) * n, (5,) * n,
    )  # fmt: skip
    table = {"dispersion": (1.0,) * n, "rank": tuple(range(1, n + 1)), "perturbed": (False,) * n}
    return GeneSpace(tuple(genes), (None,) * n, {"a": columns}, table, {"screen": "a"})


def test_a_checkpoint_of_another_gene_space_is_refused(panel, tiny_checkpoint, tmp_path):
    own = [str(gene) for gene in panel.genes]
    place = tmp_path / "spaced"
    shutil.copytree(tiny_checkpoint, place)
    write_gene_space(gene_space(own), place)
    same = trunk_of(panel, place)
    assert fingerprint(same.network) == fingerprint(trunk_of(panel, tiny_checkpoint).network)
    for init in ("pretrained", "random"):
        write_gene_space(gene_space([own[0], own[2], own[1], *own[3:]]), place)
        said = f"differ: position 1: {own[2]} against {own[1]}, position 2: {own[1]} against {own[2]}; .*another order"
        with pytest.raises(GeneSpaceMismatch, match=said):
            trunk_of(panel, place, init)
        write_gene_space(gene_space([*own, "EXTRA1"]), place)
        with pytest.raises(GeneSpaceMismatch, match="13 genes, the data 12.*only the checkpoint.*EXTRA1"):
            trunk_of(panel, place, init)


def test_a_gene_space_is_compared_by_approved_symbols(panel, tiny_checkpoint, tmp_path):
    """A space holds approved symbols; data that call a gene by a former one are in it."""
    place = tmp_path / "spaced"
    shutil.copytree(tiny_checkpoint, place)
    own = [str(gene) for gene in panel.genes]
    former = [*own[:-1], "FAM155A"]
    write_gene_space(gene_space([*own[:-1], "NALF1"]), place)
    renamed = type(panel)(panel.counts, panel.totals, np.array(former), panel.names)
    assert trunk_of(renamed, place).origin["genes_without_token"] == 2
