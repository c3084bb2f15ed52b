"""References: what the YAML says, checked, and read in chunks where the files are."""

import hashlib

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from perturbret.alignment.reference_cells import load_references, read_references
from perturbret.data.sources import DataNotFound, EntryError
from perturbret.files.downloads import ChecksumError

SHA = "0" * 64
ENTRY = f"name: a, file: f, sha256: '{SHA}', source: o"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A data directory with one of two references, and their YAML file."""
    (tmp_path / "data" / "pretrain").mkdir(parents=True)
    file = tmp_path / "data" / "pretrain" / "cells.h5ad"
    counts = csr_matrix(np.arange(6, dtype=np.float32).reshape(2, 3))
    anndata.AnnData(counts, var=pd.DataFrame(index=list("ABC"))).write_h5ad(file)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "r.yaml").write_text(
        f"- {{name: cells, file: pretrain/cells.h5ad, sha256: {sha256}, source: here}}\n"
        f"- {{name: screen, file: pretrain/cells.h5ad, sha256: {sha256}, source: here, perturbation_screen: true}}\n"
        f"- {{name: absent, file: pretrain/absent.h5ad, sha256: {sha256}, source: there}}\n"
    )
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path / "data"))
    return tmp_path


def test_those_that_are_here_are_read(here):
    (found,) = load_references(here / "r.yaml")
    assert found.name == "cells" and found.genes.tolist() == list("ABC") and found.n_cells == 2
    ((counts, totals),) = found.chunks()
    assert counts.toarray().tolist() == [[0, 1, 2], [3, 4, 5]] and totals is None


def test_perturbed_cells_come_only_when_asked_for(here):
    names = [found.name for found in load_references(here / "r.yaml", perturbation_screens=True)]
    assert names == ["cells", "screen"]
    assert [found.name for found in load_references(here / "r.yaml", names=["screen"])] == ["screen"]


def test_what_is_required_and_absent_is_named(here):
    with pytest.raises(DataNotFound, match="reference absent: expected pretrain/absent.h5ad"):
        load_references(here / "r.yaml", required=True)
    with pytest.raises(EntryError, match="no entry 'cell'.*cells"):
        load_references(here / "r.yaml", names=["cell"])


def test_without_a_data_directory_there_are_none(here, monkeypatch):
    monkeypatch.delenv("PERTURBRET_DATA")
    assert load_references(here / "r.yaml") == []


def test_another_file_of_the_name_is_refused(here):
    with open(here / "data" / "pretrain" / "cells.h5ad", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(ChecksumError, match="reference cells: sha256"):
        load_references(here / "r.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1", "expected a list of entries, got dict"),
        ("- 5", "number 1: expected a mapping of keys to values, got int"),
        (f"- {{name: a, file: f, sha256: '{SHA}'}}", "number 1: entry 'a': missing key 'source'"),
        (f"- {{{ENTRY}, license: x}}", "entry 'a': unknown key 'license'.*licence"),
        (f"- {{{ENTRY}, perturbation_screen: 1}}", "perturbation_screen: expected true or false, got 1"),
        (f"- {{{ENTRY}, matrix: 12}}", 'matrix: expected text, got 12; put quotes around it: matrix: "12"'),
        ("- {name: a, file: f, sha256: s, source: o}", "sha256: expected 64 hexadecimal digits, got 's'"),
        (f"- &a {{{ENTRY}}}\n- *a", "two entries are named 'a'"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(EntryError, match=said):
        read_references(tmp_path / "r.yaml")


def test_the_file_that_comes_with_the_project():
    entries = read_references()
    assert [entry.name for entry in entries.values() if entry.perturbation_screen] == ["k562_gasperini"]
    assert all(len(entry.sha256) == 64 and entry.citation != "see source" for entry in entries.values())
    with pytest.raises(FileNotFoundError, match="expected a YAML file"):
        read_references("none.yaml")


def test_real_cells_of_two_symbol_generations_align_by_value(real_data):
    from perturbret.alignment.panels import align
    from perturbret.alignment.remapping import verify_alignment

    if not (real_data / "pretrain").is_dir():
        pytest.skip("PERTURBRET_DATA has no folder pretrain: no reference cells to test on")
    found = load_references(names=["pbmc_kang2018", "celllines_sc_mixology"], required=True)
    space = align(found, n=2000)
    names = space.maps["pbmc_kang2018"].column_names
    renamed = {gene: name for gene, (name,) in zip(space.names, names, strict=True) if name != gene}
    assert len(space) == 2000 and len(renamed) > 50 and renamed["ARHGAP45"] == "HMHA1"
    assert space.settings["genes_in_at_least_n_datasets"]["2"] > 8400
    table = verify_alignment(space, {data.name: (next(data.chunks(200))[0], data.genes) for data in found})
    assert table["n_genes"].tolist() == [2000, 2000] and (table["n_values"] > 10_000).all()
