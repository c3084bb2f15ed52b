from functools import partial

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbret.data.conditions import (
    CTRL,
    canonical_condition,
    control_names,
    targets,
)

GENES = st.sampled_from(["KLF1", "BAK1", "HLA-A", "C3orf72", "AC004381.6"])


@pytest.mark.parametrize(
    ("label", "control", "delimiter", "expected"),
    [
        ("KLF1", "ctrl", "+", "KLF1"),
        ("KLF1+ctrl", "ctrl", "+", "KLF1"),
        ("ctrl+KLF1", "ctrl", "+", "KLF1"),
        ("KLF1+BAK1", "ctrl", "+", "BAK1+KLF1"),
        ("BAK1+KLF1", "ctrl", "+", "BAK1+KLF1"),
        (" KLF1 + BAK1\n", "ctrl", "+", "BAK1+KLF1"),
        ("KLF1+KLF1", "ctrl", "+", "KLF1"),
        ("CTRL", "ctrl", "+", CTRL),
        ("Ctrl+KLF1", "ctrl", "+", "KLF1"),
        ("ctrl+ctrl", "ctrl", "+", CTRL),
        (" Control ", "control", "+", CTRL),
        ("KLF1_BAK1", "control", "_", "BAK1+KLF1"),
        ("CONTROL_KLF1", "control", "_", "KLF1"),
        ("KLF1 | BAK1", "NT", "|", "BAK1+KLF1"),
        ("KLF1--BAK1", "non-targeting", "--", "BAK1+KLF1"),
        ("Non-Targeting", "non-targeting", "+", CTRL),
        ("non_targeting", "non_targeting", "_", CTRL),
        ("KLF1_non_targeting", "non_targeting", "_", "KLF1"),
        ("non_targeting_KLF1_Non_Targeting", "non_targeting", "_", "KLF1"),
        ("KLF1+ctrl", "control", "+", "KLF1"),  # ctrl is a control whatever the source calls its own
        ("CTRL", "non-targeting", "+", "CTRL"),  # chymotrypsin like
        ("klf1", "ctrl", "+", "klf1"),  # mouse symbols stay as they are
        ("KLF1", None, "+", "KLF1"),
        ("CD4+/CD25 T Reg", None, None, "CD4⁺/CD25 T Reg"),
        (7, "ctrl", "+", "7"),
    ],
)
def test_one_spelling_for_each_condition(label, control, delimiter, expected):
    assert canonical_condition(label, control_label=control, delimiter=delimiter) == expected


@pytest.mark.parametrize(
    ("label", "delimiter", "message"),
    [
        ("A++B", "+", r"condition 'A\+\+B': empty gene symbol at position 2"),
        ("+A", "+", r"empty gene symbol at position 1"),
        ("A+ ", "+", r"empty gene symbol at position 2"),
        ("ctrl+", "+", r"empty gene symbol at position 2"),
        ("", "+", r"condition '': empty gene symbol at position 1"),
        ("  ", None, r"condition '  ': empty label"),
        (
            "A+B_C",
            "_",
            r"condition 'A\+B_C': expected genes separated by '_', got '\+' in gene symbol 'A\+B' at po",
        ),
        (None, "+", "missing value None"),
        (float("nan"), "+", "missing value nan"),
        (pd.NA, "+", "missing value <NA>"),
        ("A", "", "delimiter: expected at least one character or None, got ''"),
    ],
)
def test_bad_labels_are_refused_by_name(label, delimiter, message):
    with pytest.raises(ValueError, match=message):
        canonical_condition(label, control_label="ctrl", delimiter=delimiter)


@given(st.permutations(["KLF1", "BAK1", "ctrl", "CTRL", "C3orf72"]), st.sampled_from(["+", " + ", "+ "]))
def test_order_padding_and_blanks_do_not_matter(parts, join):
    assert canonical_condition(join.join(parts), control_label="ctrl") == "BAK1+C3orf72+KLF1"


@given(st.lists(GENES, max_size=4), st.sampled_from(["+", "_", " ", "|"]))
def test_canonical_names_stay_as_they_are(genes, delimiter):
    name = canonical_condition(delimiter.join([*genes, "ctrl"]), control_label="ctrl", delimiter=delimiter)
    assert canonical_condition(name, control_label="ctrl") == name
    assert targets(name) == tuple(sorted(set(genes)))


def test_targets():
    assert targets(CTRL) == () and targets("A+B") == ("A", "B") and targets("AB") == ("AB",)


def test_several_names_of_controls():
    read = partial(canonical_condition, control_label=["NegCtrl0", "non_targeting"], delimiter="_")
    assert read("negctrl0") == read("non_targeting") == read("NegCtrl0_non_targeting") == CTRL
    assert read("KLF1_NegCtrl0") == "KLF1" == read("non_targeting_KLF1")
    assert control_names(None) == () and control_names(" NT ") == ("NT",)
