"""Files of a gene space: exact, refused where they are not what was written."""

import json

import pytest
from toy import gene_space as space

from perturbret.alignment.gene_space import GeneSpaceError, read_gene_space, write_gene_space


@pytest.fixture
def edited(tmp_path):
    """Writes the space, applies a change to the JSON, and reads it again."""

    def read(change):
        write_gene_space(space(), tmp_path)
        file = tmp_path / "cross_dataset_hvg_info.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return read_gene_space(file)

    return read


def test_files_round_trip_exactly(tmp_path):
    write_gene_space(space(), tmp_path)
    assert read_gene_space(tmp_path) == space() == read_gene_space(tmp_path / "cross_dataset_hvg_info.json")
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_gene_space(read_gene_space(tmp_path), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == first
    assert set(first) == {"cross_dataset_hvg_info.json", "hvg_info.json"}


def test_content_of_the_main_file(tmp_path):
    write_gene_space(space(), tmp_path)
    content = json.loads((tmp_path / "cross_dataset_hvg_info.json").read_text())
    assert content["schema_version"] == 2 and content["hvg_names"] == ["C", "A", "B"]
    assert content["hvg_ensembl_ids"] == ["ENSG00000000003", None, None]
    assert content["datasets"]["a"]["columns"] == [2, 0, 1]
    # Not measured is null; columns that are summed are a list.
    assert content["datasets"]["b"]["columns"] == [[0, 5], None, 3]
    assert content["datasets"]["b"]["mean"] == [1.5, None, 2.0] and content["statistics"]["rank"] == [
        1,
        None,
        2,
    ]
    assert content["datasets"]["b"]["fingerprint"] == "f1"


def test_the_compatible_file_selects_the_genes_in_their_order(tmp_path):
    write_gene_space(space(), tmp_path)
    content = json.loads((tmp_path / "hvg_info.json").read_text())
    panel = list("ABCD")
    # As its readers do: adata[:, hvg_indices], named by hvg_names.
    assert [panel[i] for i in content["hvg_indices"]] == content["hvg_names"] == ["C", "A", "B"]
    assert content["gene_name_to_hvg_idx"] == {"C": 0, "A": 1, "B": 2}
    assert content["gene_to_hvg_idx"] == {"2": 0, "0": 1, "1": 2}
    assert (content["total_genes"], content["n_hvgs"]) == (4, 3)


def test_the_compatible_file_is_refused_where_it_cannot_say_it(tmp_path):
    with pytest.raises(
        GeneSpaceError, match="hvg_info.json: b: expected one column for each gene, got 2 for C"
    ):
        write_gene_space(space(settings={"screen": "b"}), tmp_path)
    assert read_gene_space(tmp_path) == space(settings={"screen": "b"})
    assert [file.name for file in tmp_path.iterdir()] == ["cross_dataset_hvg_info.json"]
    write_gene_space(space(), tmp_path)
    write_gene_space(space(settings={"screen": None}), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["cross_dataset_hvg_info.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(schema_version=1), "version 2, got .*, 1"),
        (lambda c: c.pop("notes"), "expected a key 'notes'"),
        (lambda c: c["datasets"]["a"].pop("noise"), "expected a key 'noise'"),
        (
            lambda c: c["datasets"]["a"].update(columns={"2": 0, "0": 1, "1": 2}),
            "got dict with keys such as '2'",
        ),
        (
            lambda c: c["datasets"]["a"].update(columns=["2", "0", "1"]),
            "expected a column from 0 to 3, got '2'",
        ),
        (lambda c: c["datasets"]["a"].update(columns=[2, 0]), "columns: expected 3 entries, got 2"),
        (lambda c: c["datasets"]["a"].update(columns=[2, 0, 4]), "expected a column from 0 to 3, got 4"),
        (lambda c: c["datasets"]["a"].update(columns=[2, 0, -1]), "expected a column from 0 to 3, got -1"),
        (
            lambda c: c["datasets"]["a"].update(columns=[2, 0, True]),
            "expected a column from 0 to 3, got True",
        ),
        (
            lambda c: c["datasets"]["a"].update(columns=[2, 0, 2]),
            "column 2 is used twice, for gene 0 and gene 2",
        ),
        (lambda c: c["datasets"]["a"].update(columns=[2, None, 1]), "expected a name for each of 0 columns"),
        (lambda c: c["hvg_names"].sort(), "hvg_names were changed after they were written"),
        (lambda c: c["hvg_names"].__setitem__(0, "A"), "expected unique names, got 'A' twice"),
        (lambda c: c["statistics"]["rank"].pop(), "rank: expected 3 entries, got 2"),
        (lambda c: c.update(datasets=[]), "expected lists and mappings"),
        (lambda c: c["datasets"].update(a=None), "expected lists and mappings"),
        (lambda c: c.update(statistics=None), "expected lists and mappings"),
        (lambda c: c.update(hvg_names=None), "expected lists and mappings"),
        (lambda c: c["datasets"]["a"].update(n_columns="4"), "expected lists and mappings"),
        # Well formed, and not what was written.
        (lambda c: c.update(hvg_names="CAB"), "content was changed after it was written"),
        (lambda c: c.update(n_hvgs=99), "content was changed"),
        (lambda c: c.update(settings=None), "content was changed"),
        (lambda c: c["hvg_ensembl_ids"].reverse(), "content was changed"),
        (lambda c: c["datasets"]["a"]["columns"].reverse(), "content was changed"),
        (lambda c: c["datasets"]["a"].update(mean=["x", 1, 2]), "content was changed"),
        (lambda c: c["datasets"]["a"].update(noise=float("nan")), "expected JSON, got NaN"),
        (lambda c: c.pop("content_sha256"), "expected a key 'content_sha256'"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(edited, change, said):
    with pytest.raises(GeneSpaceError, match=said):
        edited(change)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected cross_dataset_hvg_info.json"):
        read_gene_space(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(GeneSpaceError, match="expected"):
            read_gene_space(tmp_path / "x.json")
