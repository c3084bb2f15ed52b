import gzip
import os
from pathlib import Path

import pytest

from perturbret.data import genes
from perturbret.data.genes import SymbolResolver, is_ensembl_id, read_table, rebuild, strip_version

# Approved symbol, Ensembl id, previous symbols, aliases. OLD and NICK belong to two genes.
TABLE = [
    ("BMAL2", "ENSG00000029153", ("ARNTL2",), ("MOP9", "CLIF")),
    ("NALF1", "", ("FAM155A", "OLD"), ("NICK",)),
    ("CLECL1P", "ENSG00000184293", ("CLECL1", "OLD"), ("DCAL1", "NICK")),
    ("SEPTIN9", "ENSG00000184640", ("SEPT9", "MSF"), ("CLIF2",)),
    ("CLIF2", "", (), ("SEPT9",)),
    ("TWICE", "", ("ONCE",), ("ONCE", "SAME", "SAME")),
]


@pytest.fixture
def resolver():
    return SymbolResolver(TABLE)


def match_of(resolver, symbol, among):
    """The name of one gene in `among`, or None."""
    return resolver.resolve_many([symbol], among)["match"].iloc[0]


@pytest.mark.parametrize(
    ("query", "panel", "match", "how"),
    [
        ("BMAL2", ["BMAL2", "ARNTL2"], "BMAL2", "direct"),
        ("NOTAGENE", ["NOTAGENE"], "NOTAGENE", "direct"),
        (" BMAL2 ", ["BMAL2"], "BMAL2", "direct"),
        ("ARNTL2", ["BMAL2"], "BMAL2", "previous"),  # the query is old
        ("BMAL2", ["ARNTL2"], "ARNTL2", "previous"),  # the panel is old
        ("CLIF", ["BMAL2"], "BMAL2", "alias"),
        ("BMAL2", ["CLIF"], "CLIF", "alias"),
        ("ARNTL2", ["CLIF"], "CLIF", "alias"),  # both are old: the weaker link names it
        ("BMAL2", ["CLIF", "ARNTL2"], "ARNTL2", "previous"),  # the surer of two names
        ("ARNTL2", ["CLIF", "BMAL2"], "BMAL2", "previous"),
        ("BMAL2", ["MOP9", "CLIF"], None, "ambiguous"),
        ("OLD", ["NALF1"], None, "ambiguous"),
        ("NICK", ["NALF1"], None, "ambiguous"),
        ("NALF1", ["OLD", "NICK"], None, "missing"),  # an ambiguous panel name stands for no gene
        ("OLD", ["OLD"], "OLD", "direct"),
        ("SEPT9", ["SEPTIN9", "CLIF2"], "SEPTIN9", "previous"),  # a previous symbol before another's alias
        ("CLIF2", ["SEPTIN9"], None, "missing"),  # an approved symbol is not read as another's alias
        ("ONCE", ["TWICE"], "TWICE", "previous"),
        ("SAME", ["TWICE"], "TWICE", "alias"),  # listed twice, by one gene
        ("NOTAGENE", ["BMAL2"], None, "missing"),
        ("BMAL2", [], None, "missing"),
        ("bmal2", ["BMAL2"], None, "missing"),
        ("ENSG00000029153.12", ["BMAL2"], "BMAL2", "ensembl"),
        ("BMAL2", ["ENSG00000029153.9"], "ENSG00000029153.9", "ensembl"),
        ("ARNTL2", ["ENSG00000029153"], "ENSG00000029153", "previous"),
        ("ENSG00000999999.1", ["ENSG00000999999.2"], "ENSG00000999999.2", "ensembl"),  # not in the table
        ("ENSG00000999999", ["BMAL2"], None, "missing"),
    ],
)
def test_resolve(resolver, query, panel, match, how):
    found = resolver.resolve_many([query], panel)
    assert found.to_dict("records") == [{"query": query, "match": match, "how": how}]
    assert match_of(resolver, query, panel) == match


def test_many_keep_order_and_repeats(resolver):
    found = resolver.resolve_many(["CLIF", "X", "BMAL2", "CLIF"], {"BMAL2"})
    assert found["match"].tolist() == ["BMAL2", None, "BMAL2", "BMAL2"]
    assert found["how"].tolist() == ["alias", "missing", "direct", "alias"]


def test_readings_name_every_gene_that_may_be_meant(resolver):
    assert resolver.readings("OLD") == ("NALF1", "CLECL1P")
    assert resolver.readings("CLIF") == ("BMAL2",)
    assert resolver.readings("NOTAGENE") == ()


def test_without_table_only_exact_names_match():
    resolver = SymbolResolver()
    assert resolver.source is None
    assert match_of(resolver, "ARNTL2", ["BMAL2"]) is None
    assert match_of(resolver, "BMAL2", ["BMAL2"]) == "BMAL2"


@pytest.mark.parametrize(
    ("name", "is_id", "stripped"),
    [
        ("ENSG00000184640", True, "ENSG00000184640"),
        ("ENSG00000184640.11", True, "ENSG00000184640"),
        ("ENSG00000182378.15_PAR_Y", True, "ENSG00000182378"),
        (" ENSMUSG00000051951.6", True, "ENSMUSG00000051951"),
        ("ENSG0000018464", False, "ENSG0000018464"),
        ("ENST00000184640", False, "ENST00000184640"),
        ("AC004381.6", False, "AC004381.6"),
        (" ENSA ", False, "ENSA"),
    ],
)
def test_ensembl_ids(name, is_id, stripped):
    assert is_ensembl_id(name) is is_id
    assert strip_version(name) == stripped


CUSTOM = (
    "HGNC ID\tApproved symbol\tStatus\tPrevious symbols\tAlias symbols\tEnsembl gene ID\n"
    "HGNC:1\tBMAL2\tApproved\tARNTL2\tMOP9, CLIF\tENSG00000029153\n"
    "HGNC:2\tGONE\tSymbol Withdrawn\t\tGONER\t\n"
    "HGNC:3\tHS1BP3\tApproved\tGONE\tHS1-BP3,FLJ14249\t\n"
    "HGNC:4\tLOST\tEntry Withdrawn\t\t\t\n"
)
COMPLETE = (
    "hgnc_id\tsymbol\tname\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\r\n"
    'HGNC:1\tBMAL2\tbasic\tApproved\t"MOP9|CLIF"\tARNTL2\tENSG00000029153\r\n'
    'HGNC:3\tHS1BP3\thcls1\tApproved\t"HS1-BP3|FLJ14249"\tGONE\t\r\n'
)


@pytest.mark.parametrize("text", [CUSTOM, COMPLETE])
def test_both_forms_of_the_source_and_the_compact_table_say_the_same(tmp_path, text):
    source, table = tmp_path / "source.tsv", tmp_path / "table.tsv.gz"
    source.write_bytes(text.encode())
    assert rebuild(source, table, date="2026-01-31") == 2
    expected = [
        ("BMAL2", "ENSG00000029153", ["ARNTL2"], ["MOP9", "CLIF"]),
        ("HS1BP3", "", ["GONE"], ["HS1-BP3", "FLJ14249"]),
    ]
    for path in (source, table):
        assert [(s, e, list(p), list(a)) for s, e, p, a in read_table(path)] == expected
    assert "2026-01-31" in gzip.decompress(table.read_bytes()).decode().splitlines()[0]
    assert table.read_bytes()[4:8] == bytes(4)  # no time in the gzip header: same source, same bytes


def test_withdrawn_symbols_lead_only_to_an_approved_gene_that_lists_them(tmp_path):
    (tmp_path / "source.tsv").write_text(CUSTOM)
    resolver = SymbolResolver.from_file(tmp_path / "source.tsv")
    found = resolver.resolve_many(["GONE", "GONER", "LOST"], ["HS1BP3"])
    assert found["how"].tolist() == ["previous", "missing", "missing"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "Approved symbol\tStatus\nA\tApproved\n",
            r"expected a column ensembl or Ensembl gene ID .*got \['Approved",
        ),
        ("", r"expected a column symbol or Approved symbol"),
        ("symbol\tensembl\tprevious\talias\nA\t\t\t\nB\n", r"expected 4 cells, got 1 in data row 2"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "other.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        SymbolResolver.from_file(tmp_path / "other.tsv").readings("A")


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.tsv does not exist"):
        SymbolResolver.from_file(tmp_path / "nowhere.tsv")


def test_the_packaged_resolver_is_made_once_and_knows_old_and_new_names():
    resolver = SymbolResolver.from_package()
    assert resolver is SymbolResolver.from_package()
    assert match_of(resolver, "BMAL2", ["ARNTL2"]) == "ARNTL2"
    assert match_of(resolver, "ARNTL2", ["BMAL2"]) == "BMAL2"


def test_the_packaged_table_names_its_date_and_licence():
    import gzip

    with gzip.open(genes.PACKAGED_TABLE, "rt") as table:
        header = table.readline()
    assert header.startswith("# HGNC, genenames.org, CC0; downloaded") and "approved genes" in header


def test_real_table_rescues_renamed_genes(real_data):
    resolver = SymbolResolver.from_file(Path(os.environ["PERTURBRET_DATA"]) / "hgnc_symbols_49k.tsv")
    old_panel = ["CLECL1", "ARNTL2", "USP12-AS2", "FAM155A", "SEPT9"]
    found = resolver.resolve_many(["CLECL1P", "BMAL2", "USP12-DT", "NALF1", "SEPTIN9"], old_panel)
    assert found["match"].tolist() == old_panel
    assert set(found["how"]) == {"previous"}


def test_canonical_gives_every_gene_one_name(resolver):
    found = resolver.canonical(["CLIF", " BMAL2 ", "ENSG00000029153.4", "ARNTL2", "X"])
    assert found["gene"].tolist() == ["BMAL2"] * 4 + ["X"]
    assert found["how"].tolist() == ["alias", "direct", "ensembl", "previous", "missing"]
    assert resolver.ensembl_ids["BMAL2"] == "ENSG00000029153"


def test_an_ambiguous_name_is_its_own_canonical_name(resolver):
    ambiguous = next(
        name for link in resolver._owners[2:] for name in link if len(resolver.readings(name)) > 1
    )
    found = resolver.canonical([ambiguous]).iloc[0]
    assert (found["gene"], found["how"]) == (ambiguous, "ambiguous")
