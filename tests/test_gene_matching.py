"""Genes of several datasets: one key per gene, whatever each dataset calls it, and two genes never merged."""

import numpy as np

from perturbret.alignment.panels import match_genes
from perturbret.data.genes import SymbolResolver

# Approved symbol, Ensembl id, previous symbols, aliases. SHARED belongs to two genes.
RESOLVER = SymbolResolver(
    [
        ("NEW1", "ENSG00000000001", ("OLD1",), ("AKA1",)),
        ("NEW2", "ENSG00000000002", ("OLD2", "SHARED"), ("AKA2", "AKB2")),
        ("NEW3", "ENSG00000000003", ("SHARED",), ()),
    ]
)


def match(ids=None, **genes):
    genes = {name: np.array(panel) for name, panel in genes.items()}
    return match_genes(genes, ids or dict.fromkeys(genes), resolver=RESOLVER)


def test_old_and_new_names_are_one_gene():
    matched = match(a=["OLD1", "NEW2", "x"], b=["AKA2", "NEW1"], c=["ENSG00000000001.7", "OLD2"])
    assert matched.by == "symbol"
    assert matched.keys["a"].tolist() == ["NEW1", "NEW2", "x"]
    assert matched.keys["b"].tolist() == ["NEW2", "NEW1"]
    assert matched.keys["c"].tolist() == ["NEW1", "NEW2"]
    assert matched.ensembl_ids == {"NEW1": "ENSG00000000001", "NEW2": "ENSG00000000002"}


def test_an_ambiguous_name_matches_itself_only():
    matched = match(a=["SHARED", "NEW2"], b=["SHARED", "NEW3"])
    assert matched.keys["a"].tolist() == ["SHARED", "NEW2"] and matched.keys["b"].tolist() == [
        "SHARED",
        "NEW3",
    ]


def test_two_names_of_a_gene_in_one_dataset_stay_two_genes_everywhere():
    matched = match(a=["NEW1", "OLD1"], b=["OLD1", "AKA2"])
    assert matched.keys["a"].tolist() == ["NEW1", "OLD1"]
    # b calls by OLD1 what a calls OLD1: the same name is the surest link.
    assert matched.keys["b"].tolist() == ["OLD1", "NEW2"]
    assert matched.own_name == ("OLD1",)


def test_the_surest_name_keeps_the_gene_and_ties_lose_it():
    assert match(a=["AKA1", "OLD1"]).keys["a"].tolist() == ["AKA1", "NEW1"]
    assert match(a=["AKA2", "AKB2"]).keys["a"].tolist() == ["AKA2", "AKB2"]


def test_columns_of_the_same_name_are_one_gene():
    matched = match(a=["NEW1", "x", "NEW1", "x"])
    assert matched.own_name == () and matched.columns("a") == {"NEW1": (0, 2), "x": (1, 3)}


def test_ensembl_ids_decide_where_every_dataset_has_them():
    ids = {
        "a": np.array(["ENSG00000000009.1", "ENSG00000000008.2"]),
        "b": np.array(["ENSG00000000008.5", "ENSG00000000009"]),
    }
    matched = match(ids, a=["P", "Q"], b=["renamed", "P"])
    assert matched.by == "ensembl"
    assert matched.keys["a"].tolist() == ["ENSG00000000009", "ENSG00000000008"]
    assert matched.keys["b"].tolist() == ["ENSG00000000008", "ENSG00000000009"]
    assert matched.symbols == {"ENSG00000000009": "P", "ENSG00000000008": "Q"}
    assert match(ids | {"b": None}, a=["P", "Q"], b=["Q", "P"]).by == "symbol"


def test_names_of_ensembl_ids_do_not_depend_on_the_order_of_datasets():
    one, other = (f"ENSG0000000000{i}" for i in (1, 9))
    third, fourth = "ENSG00000000006", "ENSG00000000005"
    ids = {
        "a": np.array([f"{one}.2", other, third, fourth]),
        "b": np.array([fourth, third, other, one]),
        "c": np.array([one, other]),
    }
    panels = {
        "a": ["OLD1", "zeta", third, "Q"],
        "b": [fourth, f"{third}.4", "beta", "AKA1"],
        "c": ["OLD1", "omega"],
    }
    # HGNC's symbol though no dataset has it; the first of three; no name but ids; a name before an id.
    expected = {one: "NEW1", other: "beta", third: third, fourth: "Q"}
    for order in ("abc", "acb", "bac", "bca", "cab", "cba"):
        assert match(ids, **{name: panels[name] for name in order}).symbols == expected


def test_names_of_ensembl_ids_are_unique():
    one, other = "ENSG00000000001", "ENSG00000000009"
    ids = {"a": np.array([one, other])}
    assert match(ids, a=["OLD1", "NEW1"]).symbols == {one: one, other: other}
    # Ids of no known form: a name that is another gene's id.
    odd = {"a": np.array(["id1", "id2", "id3"])}
    names = match(odd, a=["id2", "P", "P"]).symbols
    assert names == {"id1": "id1", "id2": "id2", "id3": "id3"}


def test_a_symbol_of_two_ids_names_neither():
    ids = {"a": np.array(["ENSG00000000009", "ENSG00000000008", "ENSG00000000007"])}
    assert list(match(ids, a=["P", "P", "Q"]).symbols.values()) == ["ENSG00000000009", "ENSG00000000008", "Q"]
