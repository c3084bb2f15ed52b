"""Labels in tables and texts of pages are shown as they are written."""

import html as escapes

import numpy as np
import pandas as pd
import pytest
from nbconvert.filters import markdown2html
from toy import tiny_screen

from perturbret.report import audit
from perturbret.report.wording import Shown, plain, shown

BAD = "<b>5uM</b> & <NA>"


@pytest.fixture
def table():
    """Markup in a cell, in the index and in a column's name."""
    return pd.DataFrame({BAD: [BAD, None], "x": [0.12345, np.nan]}, index=[BAD, "b"])


def safe(html):
    body = html[html.index("<table") :]
    return "<b>" not in body and "<NA>" not in body and "&lt;NA&gt;" in body


@pytest.mark.parametrize("options", [{}, {"index": True}, {"precision": 4}, {"formats": {"x": "{:.1%}"}}])
def test_shown_tables_escape_cells_index_and_columns(table, options):
    assert safe(shown(table, **options).to_html())


def test_numbers_are_rounded_and_what_is_missing_is_a_dash(table):
    html = shown(table, formats={"x": "{:.1%}"}).to_html()
    assert "12.3%" in html and html.count("–") == 2
    assert ">0.1235<" in shown(table, precision=4).to_html().replace(" ", "")


def test_a_style_stays_safe_whatever_is_done_to_it(table):
    style = Shown(table).query("x > 0").style.format(precision=2, na_rep="–").format_index(str, axis=1)
    assert safe(style.to_html()) and safe(Shown(table).style.to_html())
    # The reason for all this: pandas does not.
    assert not safe(table.style.to_html())


def test_the_audits_targets_are_safe_to_style():
    screen = tiny_screen()
    assert isinstance(audit.target_table(screen), Shown)


def test_labels_in_texts_are_plain():
    for label in (BAD, "*A*", "_A_", "`A`", "[A](b)", "A|B", "$A$", "a\\b", "GENE_1", "HLA-A", "A+B"):
        page = markdown2html(f"- the easiest is {plain(label)}.")
        inner = page[page.index("<li>") + 4 : page.index("</li>")].strip()
        assert escapes.unescape(inner) == f"the easiest is {label}."
        assert "<b>" not in inner and "<em>" not in inner
    assert plain("GENE_1") == "GENE_1" and plain("A+B") == "A+B"
