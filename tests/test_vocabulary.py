"""scGPT's vocabulary and the tokens of genes: the checkpoint's order, and nothing guessed."""

import hashlib
import json
import sys

import numpy as np
import pytest

from perturbret.data.datasets import load_screen
from perturbret.data.genes import SymbolResolver
from perturbret.files.downloads import ChecksumError
from perturbret.scgpt.vocabulary import (
    CENSUS_FILE,
    SPECIALS,
    Vocabulary,
    VocabularyError,
    census_file,
    load_vocabulary,
    map_genes,
)

# Approved symbol, Ensembl id, previous symbols, aliases. OLD belongs to two genes.
RESOLVER = SymbolResolver(
    [
        ("BMAL2", "ENSG00000029153", ("ARNTL2",), ("MOP9", "CLIF")),
        ("NALF1", "ENSG00000204442", ("FAM155A", "OLD"), ()),
        ("CLECL1P", "ENSG00000184293", ("CLECL1", "OLD"), ("DCAL1",)),
        ("KLF1", "ENSG00000105610", (), ("EKLF",)),
    ]
)


@pytest.fixture(scope="module")
def census():
    return load_vocabulary()


def vocabulary(*genes):
    return Vocabulary((*genes, *SPECIALS), "toy")


@pytest.fixture
def saved(tmp_path):
    """Writes text, or an object as JSON, to vocab.json."""

    def save(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "vocab.json").write_text(text)
        return tmp_path / "vocab.json"

    return save


def test_the_packaged_vocabulary_is_the_census_tokens_and_the_special_ones(census):
    in_file = json.loads(census_file().read_text())
    assert len(census) == 60697 and len(in_file) == 60694
    assert census.tokens[60694:] == ("<pad>", "<cls>", "<eoc>")
    assert all(census.tokens[number] == token for token, number in in_file.items())
    assert len(census.genes) == 60694 and set(census.genes).isdisjoint(SPECIALS)


@pytest.mark.parametrize(
    ("token", "number"),
    [
        ("A1BG", 0),
        ("AC022154.7", 828),
        ("BCAT1", 3068),
        ("SGSM3-AS1", 31087),
        ("RBMXP1", 42041),
        ("MIR155", 59723),
        ("POLR2J4_ENSG00000272655", 60522),
        ("RP5-973N23.5", 60693),
        ("<cls>", 60695),
    ],
)
def test_ids_are_those_of_the_whole_human_checkpoint(census, token, number):
    assert census.ids[token] == number


@pytest.fixture
def other_scgpt(tmp_path, monkeypatch):
    """Puts a package scgpt in front of the real one; importing it fails."""
    (tmp_path / "scgpt" / "tokenizer").mkdir(parents=True)
    (tmp_path / "scgpt" / "__init__.py").write_text("raise ImportError('scgpt was imported')")
    monkeypatch.delitem(sys.modules, "scgpt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "scgpt"


def test_the_wheel_is_read_without_importing_it(other_scgpt, monkeypatch):
    content = json.dumps({"A": 0}).encode()
    (other_scgpt / CENSUS_FILE).write_bytes(content)
    assert census_file() == other_scgpt / CENSUS_FILE
    with pytest.raises(ChecksumError, match="default_census_vocab.json of the scgpt package"):
        load_vocabulary()
    monkeypatch.setattr("perturbret.scgpt.vocabulary.CENSUS_SHA256", hashlib.sha256(content).hexdigest())
    assert load_vocabulary().tokens == ("A", *SPECIALS)
    assert "scgpt" not in sys.modules


def test_a_missing_wheel_or_file_says_what_to_do(other_scgpt, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match=r"does not hold it \(looked in .*pip install --no-deps scgpt"
    ):
        load_vocabulary()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="which is not installed; .* or give the path"):
        load_vocabulary()


def test_a_checkpoints_vocabulary_comes_from_its_file_or_directory(saved):
    path = saved({"<pad>": 0, "B": 3, "<eoc>": 2, "A": 1, "<cls>": 4})
    assert load_vocabulary(path).tokens == ("<pad>", "A", "<eoc>", "B", "<cls>")
    assert load_vocabulary(path.parent).tokens == load_vocabulary(str(path)).tokens
    assert load_vocabulary(path).genes == ("A", "B")


def test_missing_special_tokens_are_appended_in_order(saved):
    assert load_vocabulary(saved({"A": 1, "<cls>": 0})).tokens == ("<cls>", "A", "<pad>", "<eoc>")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("not json", "expected JSON"),
        ("[]", r"expected an object of token to id, got \[\]"),
        ("{}", "expected an object of token to id"),
        ({"A": 0, "B": 2}, "expected the ids 0 to 1, each once; got 2 for 'B' where 1 was due"),
        ({"A": 0, "B": 0}, "got 0 for 'B' where 1 was due"),
        ({"A": 1, "B": 2}, "got 1 for 'A' where 0 was due"),
        ({"A": -1, "B": 0}, "got -1 for 'A' where 0 was due"),
        ({"A": "0"}, "expected a whole number as id of 'A', got '0'"),
        ({"A": 0.0}, "expected a whole number as id of 'A', got 0.0"),
        ({"A": False}, "expected a whole number as id of 'A', got False"),
        ('{"A": 0, "A": 1}', "expected each token once, got 'A' twice"),
        ({"A": 0, " ": 1}, "expected a name for token 1, got ' '"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(saved, content, said):
    with pytest.raises(VocabularyError, match=said):
        load_vocabulary(saved(content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none at .*vocab.json"):
        load_vocabulary(tmp_path)
    with pytest.raises(FileNotFoundError, match="found none at .*nowhere.json"):
        load_vocabulary(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (("A", "A", *SPECIALS), "expected each token once, got 'A' twice"),
        (("A", "<pad>", "<eoc>"), r"missing \['<cls>'\]"),
    ],
)
def test_tokens_that_are_no_vocabulary_are_refused(tokens, said):
    with pytest.raises(VocabularyError, match=said):
        Vocabulary(tokens, "toy")


def test_the_hash_follows_tokens_and_order():
    assert vocabulary("A", "B").hash == Vocabulary(("A", "B", *SPECIALS), "elsewhere").hash
    assert len({vocabulary(*genes).hash for genes in (("A", "B"), ("B", "A"), ("AB",), ("A", "B", "C"))}) == 4


@pytest.mark.parametrize(
    ("gene", "tokens", "token", "how", "possible"),
    [
        ("KLF1", ["EKLF", "KLF1"], "KLF1", "direct", ""),
        ("NOTAGENE", ["NOTAGENE"], "NOTAGENE", "direct", ""),
        ("BMAL2", ["ARNTL2"], "ARNTL2", "previous", ""),
        ("ARNTL2", ["BMAL2"], "BMAL2", "previous", ""),
        ("BMAL2", ["CLIF", "ARNTL2"], "ARNTL2", "previous", ""),
        ("CLIF", ["BMAL2"], "BMAL2", "alias", ""),
        ("ENSG00000105610.17", ["KLF1"], "KLF1", "ensembl", ""),
        ("KLF1", ["ENSG00000105610.3"], "ENSG00000105610.3", "ensembl", ""),
        ("ENSG00000999999.2", ["ENSG00000999999"], "ENSG00000999999", "ensembl", ""),
        ("OLD", ["NALF1", "CLECL1P"], None, "ambiguous", "NALF1, CLECL1P"),
        ("OLD", ["NALF1"], None, "ambiguous", "NALF1"),
        ("BMAL2", ["MOP9", "CLIF"], None, "ambiguous", "MOP9, CLIF"),
        ("NALF1", ["OLD"], None, "missing", "OLD"),
        ("KLF1", ["KLF2"], None, "missing", ""),
        ("klf1", ["KLF1"], None, "missing", ""),
        ("<cls>", ["KLF1"], None, "missing", ""),
    ],
)
def test_the_token_of_a_gene(gene, tokens, token, how, possible):
    among = vocabulary("FIRST", *tokens)
    found = map_genes([gene], among, resolver=RESOLVER)
    (row,) = found.table.to_dict("records")
    number = -1 if token is None else among.ids[token]
    assert row == {"gene": gene, "token": token, "token_id": number, "how": how, "possible": possible}
    assert found.token_ids.tolist() == [number] and len(found.collisions) == 0


@pytest.mark.parametrize(
    ("genes", "kept", "how"),
    [
        (["ARNTL2", "BMAL2"], "BMAL2", ["collision", "direct"]),
        (["CLIF", "ENSG00000029153"], "ENSG00000029153", ["collision", "ensembl"]),
        (["CLIF", "ARNTL2", "X"], "ARNTL2", ["collision", "previous", "missing"]),
        (["CLIF", "MOP9"], None, ["collision", "collision"]),
        (["ENSG00000029153.1", "CLIF", "ENSG00000029153.2"], None, ["collision"] * 3),
    ],
)
def test_of_genes_that_find_one_token_only_the_surest_keeps_it(genes, kept, how):
    found = map_genes(genes, vocabulary("KLF1", "BMAL2"), resolver=RESOLVER)
    assert found.table["how"].tolist() == how
    assert found.table["token"].tolist() == ["BMAL2" if gene == kept else None for gene in genes]
    assert found.token_ids.tolist() == [1 if gene == kept else -1 for gene in genes]
    claims = [gene for gene in genes if gene != "X"]
    assert sorted(found.collisions["gene"]) == sorted(claims)
    assert found.collisions.set_index("gene")["kept"].to_dict() == {gene: gene == kept for gene in claims}
    lost = found.table.query("how == 'collision'")
    assert set(lost["possible"]) == {"BMAL2"} and set(found.collisions["token"]) == {"BMAL2"}


def test_counts_reach_the_token_of_their_gene():
    genes = np.array(["EKLF", "FAM155A", "NOTAGENE", "DCAL1", "BMAL2"])
    named = {"NALF1": 20, "CLECL1P": 40, "BMAL2": 50, "KLF1": 10}  # by gene, whatever its name here
    counts = np.array([10, 20, 30, 40, 50])
    among = vocabulary(*named)
    for order in ([0, 1, 2, 3, 4], [3, 2, 4, 0, 1]):
        found = map_genes(genes[order], among, resolver=RESOLVER)
        by_token = np.zeros(len(among))
        by_token[found.token_ids[found.token_ids >= 0]] = counts[order][found.token_ids >= 0]
        assert {token: by_token[among.ids[token]] for token in named} == named
        assert by_token.sum() == counts.sum() - 30
        assert found.vocabulary_hash == among.hash


def test_a_gene_given_twice_is_refused():
    with pytest.raises(ValueError, match="expected unique names, got 'KLF1' twice"):
        map_genes(["A", "KLF1", "KLF1"], vocabulary("KLF1"), resolver=RESOLVER)


def test_no_genes_are_no_error():
    assert map_genes([], vocabulary("KLF1"), resolver=RESOLVER).token_ids.shape == (0,)


def test_real_screen_gets_all_its_tokens(real_data, census):
    found = map_genes(load_screen("norman_subset").genes, census).table.set_index("gene")
    assert (found["how"] == "direct").sum() == 491
    assert (found["token_id"] >= 0).sum() == len(found) == 500
    assert found.query("how != 'direct'")["token"].to_dict() == {
        "VNN3P": "VNN3",
        "CLECL1P": "CLECL1",
        "BMAL2": "ARNTL2",
        "MSRB3-AS1": "RP11-230G5.2",
        "ABTB3": "BTBD11",
        "USP12-DT": "USP12-AS2",
        "NALF1": "FAM155A",
        "LINC02914": "C14orf177",
        "CEDORA": "RP11-298D21.1",
    }
