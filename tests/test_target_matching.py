import pytest

from perturbret.data.genes import SymbolResolver
from perturbret.data.targets import count_statuses, match_targets, symbol_pattern, unsettled

RESOLVER = SymbolResolver.from_package()


def rows(targets, genes, **keys):
    found = match_targets(targets, genes, resolver=RESOLVER, **keys)
    return {row["target"]: row for row in found.table}, found


def test_statuses_and_counts():
    table, found = rows(["KLF1+PTEN", "foo", "ctrl"], ["EKLF", "MYC"])
    assert {name: row["status"] for name, row in table.items()} == {
        "KLF1": "matched",
        "PTEN": "known gene, not measured",
        "foo": "name unknown to HGNC",
    }
    assert list(count_statuses(found.table).values()) == [1, 1, 1]
    assert [row["target"] for row in unsettled(found.table)] == ["foo"]
    assert unsettled(found.table, ["foo"]) == [] == unsettled(found.table, "accept")
    assert {name: list(columns) for name, columns in found.columns.items()} == {"KLF1+PTEN": [0], "foo": []}


def test_extra_genes_are_matched_and_not_counted_as_targets():
    table, found = rows(["KLF1"], ["KLF1", "hbg1"], extra={"KLF1": ("HBG1",)})
    assert table["HBG1"]["nearest"] == "hbg1" and table["HBG1"]["conditions"] == 0
    assert list(count_statuses(found.table).values()) == [1, 0, 0]
    assert [row["target"] for row in unsettled(found.table)] == ["HBG1"]


def test_identifiers_of_columns_count():
    table, found = rows(["KLF1"], ["probe1", "probe2"], identifiers=[(), ("ENSG00000105610",)])
    assert list(found.columns["KLF1"]) == [1] and table["KLF1"]["columns"] == ["probe2"]


@pytest.mark.parametrize(
    ("target", "column"),
    [
        ("GATA3", "GATA3-AS1"),
        ("BSN", "BSN-DT"),
        ("KCNQ1", "KCNQ1OT1"),
        ("MDP1", "NEDD8-MDP1"),
        ("NEDD8", "NEDD8-MDP1"),
        ("CFAP44", "WDR52-AS1"),  # WDR52 is CFAP44's former symbol
    ],
)
def test_known_transcripts_beside_a_target_are_masked_with_it(target, column):
    assert RESOLVER.readings(column)
    table, found = rows([target], [column, target])
    assert list(found.columns[target]) == [0, 1]
    assert table[target]["columns"] == [target] and table[target]["also_masked"] == [column]


@pytest.mark.parametrize(
    ("target", "column"),
    [
        ("PRPF31", "RP11-228B15.4"),  # RP11 once was PRPF31
        ("KLF1", "KLF11"),
        ("KLF1", "KLF1P1"),
        ("KLF11", "KLF1"),
        ("HLA-A", "HLA-B"),
        ("NKX2-1", "NKX2-2"),
        ("MT-CO1", "MT-CO2"),
        ("ACTA2", "ACTA1"),
    ],
)
def test_names_of_other_genes_are_no_spellings(target, column):
    table, found = rows([target], [column])
    assert list(found.columns[target]) == [] and table[target]["nearest"] == ""


def test_whole_genome_names_no_near_column_for_any_of_its_own_genes():
    symbols = sorted(RESOLVER.ensembl_ids)
    targets, panel = symbols[::80], [name for i, name in enumerate(symbols) if i % 8]
    _, found = rows(targets, panel)
    assert [row for row in found.table if row["nearest"]] == []
    assert {row["status"] for row in found.table} <= {"known gene, not measured", "matched"}


@pytest.mark.parametrize(
    ("column", "pattern"),
    [
        ("GRCh38_KLF1", "^GRCh38_(.+)$"),
        ("GRCh38___HLA-A", "^GRCh38___(.+)$"),
        ("ENSG00000105610_KLF1", r"^ENS[A-Z]*G\d+(?:\.\d+)?[_|:-](.+)$"),
        ("KLF1_ENSG00000105610.3", r"^(.+?)[_|:-]ENS[A-Z]*G\d+(?:\.\d+)?$"),
        ("KLF1", ""),
    ],
)
def test_patterns_that_take_the_symbol_out(column, pattern):
    assert symbol_pattern(column) == pattern
