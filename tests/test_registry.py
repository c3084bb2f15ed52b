from dataclasses import fields, replace
from pathlib import Path

import pytest

from perturbret.data.sources import (
    Entry,
    EntryError,
    UnknownDataset,
    default_registry,
    find_entry,
    load_registry,
    make_entry,
    read_entry,
)

MINIMAL = {"name": "toy", "path": "toy.h5ad", "condition_key": "condition", "control_label": "ctrl"}


def written(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_registry_has_the_datasets_it_promises():
    entries = load_registry()
    promised = "norman_subset thp1 simulated norman_gears norman_scperturb replogle_k562_essential pbmc68k"
    assert set(promised.split()) <= set(entries)
    assert all(entry.name == name for name, entry in entries.items())
    assert entries["simulated"].simulated and not entries["thp1"].simulated
    assert entries["norman_subset"].counts_layer == "recover"
    assert entries["pbmc68k"].control_label is None and entries["pbmc68k"].combo_delimiter is None


def test_every_entry_says_where_its_cells_are_from():
    for entry in load_registry().values():
        if not entry.simulated:
            assert entry.citation and entry.license, entry.name
            assert entry.url or entry.sha256, f"{entry.name}: neither an address nor a checksum"


def test_every_key_of_an_entry_is_explained_in_the_registry():
    comments = [line for line in default_registry().read_text().splitlines() if line.startswith("#")]
    for field in fields(Entry):
        assert any(field.name in line for line in comments), field.name


def test_defaults():
    entry = make_entry(MINIMAL)
    assert (entry.combo_delimiter, entry.min_cells, entry.duplicate_genes) == ("+", 20, "sum")
    assert entry.counts_layer is entry.batch_key is entry.sha256 is None
    assert entry.subset == entry.extra_masked_genes == {}


def test_a_key_left_blank_is_not_given():
    assert make_entry(MINIMAL | {"batch_key": None, "min_cells": None}) == make_entry(MINIMAL)


def test_null_delimiter_is_kept():
    assert make_entry(MINIMAL | {"combo_delimiter": None}).combo_delimiter is None


def test_unknown_key_names_the_nearest():
    with pytest.raises(EntryError, match=r"entry 'toy': unknown key 'batchkey'; nearest: 'batch_key'"):
        make_entry(MINIMAL | {"batchkey": "rep"})


@pytest.mark.parametrize("key", ["condition_key", "control_label"])
def test_missing_required_key(key):
    with pytest.raises(EntryError, match=f"missing key '{key}'"):
        make_entry({k: v for k, v in MINIMAL.items() if k != key})


@pytest.mark.parametrize("name", [None, "", "a/b", "../x", ".hidden", "auto", "a b", 7])
def test_names_that_are_no_folder_names_are_refused(name):
    with pytest.raises(EntryError, match="name: expected letters"):
        make_entry(MINIMAL | {"name": name})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": None}, "expected one source .*, got none"),
        ({"simulate": {}}, "got file and simulate"),
        ({"package_file": "a/b.h5ad"}, "got file and package_file"),
        ({"url": "ftp://host/file"}, "url: expected http"),
        ({"sha256": "abc"}, "sha256: expected 64 hexadecimal digits, got 'abc'"),
        ({"archive_member": "../../etc/passwd"}, "archive_member: expected a relative path"),
        ({"archive_member": "/etc/passwd"}, "archive_member: expected a relative path"),
        ({"min_cells": "20"}, "min_cells: expected a whole number of at least 1, got '20'"),
        ({"min_cells": True}, "min_cells: expected a whole number"),
        ({"min_cells": 0}, "min_cells: .* got 0"),
        ({"subset": "norman"}, "subset: expected a mapping"),
        ({"duplicate_genes": "drop"}, "duplicate_genes: expected 'sum' or 'refuse', got 'drop'"),
        (
            {"extra_masked_genes": {"A": "B"}},
            "extra_masked_genes: 'A': expected a list of gene symbols, got 'B'",
        ),
        (
            {"control_label": False},
            'control_label: expected text, got False; put quotes around it: .*"False"',
        ),
        ({"total_key": 3}, "total_key: expected text, got 3"),
        ({"control_label": []}, r"control_label: expected a list of names, as \[a, b\], got \[\]"),
        ({"drop_labels": "nan"}, "drop_labels: expected a list of names, .* got 'nan'"),
        ({"keep_columns": [True]}, r"keep_columns: expected a list of names, .* got \[True\]"),
        (
            {"target_map": ["KLF1"]},
            "target_map: expected a mapping of labels or targets to symbols, or 'nearest'",
        ),
        ({"target_map": {"klf1": 3}}, "target_map: expected a mapping"),
        (
            {"strip_guide_suffix": 1},
            "strip_guide_suffix: expected true, false or a regular expression, got 1",
        ),
        ({"strip_guide_suffix": "("}, r"strip_guide_suffix: expected a regular expression, got '\('"),
        ({"gene_symbol_pattern": "^hg19_"}, "gene_symbol_pattern: .* one group .* with 0"),
        ({"unmeasured_targets": "yes"}, "unmeasured_targets: expected 'accept' or a list of names"),
        ({"scaled_counts": True}, "scaled_counts: expected 'accept', got True"),
    ],
)
def test_malformed_values(change, said):
    with pytest.raises(EntryError, match=said):
        make_entry(MINIMAL | change)


def test_simulated_entry_has_no_use_for_file_keys():
    assert make_entry({"name": "s", "simulate": {}}).simulated
    with pytest.raises(EntryError, match="no use for batch_key"):
        make_entry({"name": "s", "simulate": {}, "batch_key": "b"})


def test_lists_and_maps_of_names_become_text():
    entry = make_entry(
        MINIMAL
        | {"control_label": ["NT", 0], "drop_labels": ["nan", 7], "target_map": {3: " KLF1 "}}
        | {"unmeasured_targets": ["PTEN"], "strip_guide_suffix": True}
    )
    assert entry.control_label == ("NT", "0") and entry.drop_labels == ("nan", "7")
    assert entry.target_map == {"3": "KLF1"} and entry.unmeasured_targets == ("PTEN",)
    assert entry.strip_guide_suffix is True and make_entry(MINIMAL).strip_guide_suffix is False


def test_an_entry_can_be_copied_with_changes():
    for entry in load_registry().values():
        assert replace(entry) == entry and replace(entry, citation="x").citation == "x"


def test_extra_masked_genes_become_tuples():
    entry = make_entry(MINIMAL | {"extra_masked_genes": {"HS2": ["HBG1", " HBG2 "]}})
    assert entry.extra_masked_genes == {"HS2": ("HBG1", "HBG2")}


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(UnknownDataset, match=r"'norman_subest' is unknown; nearest: 'norman_subset'"):
        find_entry("norman_subest", load_registry())
    with pytest.raises(UnknownDataset, match="nearest: 'thp1'"):
        find_entry("THP-1", load_registry())


def test_a_file_in_place_of_a_name_gets_the_way_to_describe_it():
    with pytest.raises(UnknownDataset, match="describe it in a YAML file"):
        find_entry("my/screen.h5ad", load_registry())


def test_user_file(tmp_path):
    (tmp_path / "toy.h5ad").write_bytes(b"")
    path = written(tmp_path, "name: toy\npath: toy.h5ad\ncondition_key: perturbation\ncontrol_label: NT\n")
    entry = read_entry(path)
    assert Path(entry.path) == tmp_path / "toy.h5ad"
    assert entry.condition_key == "perturbation"


def test_user_path_that_is_not_beside_the_file_stays_as_written(tmp_path):
    path = written(tmp_path, "name: toy\npath: toy.h5ad\ncondition_key: p\ncontrol_label: NT\n")
    assert read_entry(path).path == "toy.h5ad"


def test_missing_user_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.yaml.*expected a YAML file"):
        read_entry(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: toy\n  path: x", "expected YAML"),
        ("- name: toy", "expected a mapping of keys to values, got list"),
        ("", "expected a mapping of keys to values, got NoneType"),
        ("name: toy\npath: a.h5ad\npath: b.h5ad\n", "line 1: key 'path' is given twice"),
    ],
)
def test_user_file_that_is_no_entry(tmp_path, text, said):
    with pytest.raises(EntryError, match=said):
        read_entry(written(tmp_path, text))


def test_registry_with_two_entries_of_one_name(tmp_path):
    item = "- {name: toy, path: a.h5ad, condition_key: c, control_label: d}\n"
    with pytest.raises(EntryError, match="two entries are named 'toy'"):
        load_registry(written(tmp_path, item * 2))
    with pytest.raises(EntryError, match="expected a list of entries, got dict"):
        load_registry(written(tmp_path, "name: toy"))
