import pytest

from perturbret.data.genes import SymbolResolver, date_symbols, spellings, squashed, strip_guide, tidy, upper

RESOLVER = SymbolResolver.from_package()


def is_gene(name):
    return RESOLVER.approved(name)


@pytest.mark.parametrize(
    ("name", "gene"),
    [
        ("sgKLF1_1", "KLF1"),
        ("KLF1_sg1", "KLF1"),
        ("KLF1_P1P2", "KLF1"),
        ("KLF1-g2", "KLF1"),
        ("KLF1(1)", "KLF1"),
        ("KLF1_ACGTACGTACGTACGTACG", "KLF1"),
        ("KO_KLF1", "KLF1"),
        ("sgHLA-A_2", "HLA-A"),
        ("NKX2-1_1", "NKX2-1"),
        ("HLA-A", "HLA-A"),
        ("NKX2-1", "NKX2-1"),
        ("MT-CO1", "MT-CO1"),
        ("SGK1", "SGK1"),
        ("SHH", "SHH"),
        ("non-targeting_001", "non-targeting"),
        ("1", "1"),
    ],
)
def test_guides_are_taken_off_but_names_of_genes_stay(name, gene):
    assert strip_guide(name, is_gene) == gene


@pytest.mark.parametrize(
    ("date", "symbol"),
    [
        ("1-Mar", "MARCH1"),
        ("Mar-1", "MARCH1"),
        ("01-Mar", "MARC1"),
        ("2001-03-01", "MARCH1"),
        ("2001-03-01 00:00:00", "MARCH1"),
        ("X1.Mar", "MARCH1"),
        ("Sep-02", "SEPT2"),
        ("9/2/2021", "SEPT2"),
        ("1-Dec", "DEC1"),
    ],
)
def test_dates_of_spreadsheets(date, symbol):
    assert symbol in date_symbols(date)


@pytest.mark.parametrize("name", ["MARCH1", "KLF1", "2001-13-01", "1-Jan", "HLA-A", "RP11-228B15.4"])
def test_names_that_are_no_dates(name):
    assert date_symbols(name) == []


def test_tidy_names():
    assert tidy(" HLA\u2011A\u00a0") == "HLA-A" and tidy("KLF1\u200b") == "KLF1" and tidy("A\u2003B") == "A B"


def test_dashes_that_keep_numbers_apart_stay():
    assert squashed("HLA-A") == "HLAA" and squashed("KLF1_1") == "KLF1_1"
    assert "KLF11" not in dict(spellings("KLF1_1"))


def test_upper_case_of_symbols():
    assert upper("klf1") == "KLF1" and upper("c8ORF37") == "C8orf37"


def test_names_of_clones_have_no_parts():
    assert "RP11" not in dict(spellings("RP11-228B15.4")) and "PRPF31" not in dict(spellings("RP11-228B15.4"))


def test_greek_letters_are_latin_ones():
    assert "TNFA" in dict(spellings("TNFα"))
