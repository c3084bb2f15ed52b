import errno
import json
import warnings

import anndata
import h5py
import numpy as np
import pytest
from anndata.io import write_elem
from scipy.sparse import csc_matrix, csr_array, csr_matrix

from perturbret.data import datasets
from perturbret.data.annotations import ScreenError
from perturbret.data.conditions import CTRL
from perturbret.data.counts import CountsError
from perturbret.data.datasets import ingest, load_screen, resolve_dataset
from perturbret.data.effects import load_effects
from perturbret.data.h5ad import from_anndata
from perturbret.data.sources import DataNotFound, EntryError, UnknownDataset, load_registry, make_entry
from perturbret.files.atomic import DiskFull
from perturbret.files.downloads import ChecksumError
from perturbret.runs.runs import outputs_root


def entry(**keys):
    content = {"name": "toy", "path": "toy.h5ad", "condition_key": "condition", "control_label": "ctrl"}
    return make_entry(content | {"min_cells": 5} | keys)


def loaded(adata, **keys):
    return ingest(from_anndata(adata), entry(**keys))


@pytest.fixture
def on_disk(tmp_path):
    def write(adata, **keys):
        adata.write_h5ad(tmp_path / "toy.h5ad")
        return entry(path=str(tmp_path / "toy.h5ad"), **keys)

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBRET_CACHE", str(tmp_path / "cache"))


def without_real(monkeypatch, url, tmp_path):
    """A registry whose norman_subset lies at `url`, and no data directory."""
    monkeypatch.delenv("PERTURBRET_DATA", raising=False)
    path = tmp_path / "registry.yaml"
    path.write_text(
        f"- {{name: norman_subset, path: none.h5ad, url: '{url}', condition_key: c, control_label: d}}\n"
        "- {name: simulated, simulate: {n_singles: 3, n_doubles: 1, cells_per_condition: 10, n_genes: 20}}\n"
    )
    return path


# -- the screen ------------------------------------------------------------------------------------------


def test_counts_labels_and_names_come_through(small_adata):
    adata = small_adata()
    screen = loaded(adata)
    assert screen.name == "toy" and screen.conditions == ["BAK1", "KLF1"]
    np.testing.assert_array_equal(screen.counts.toarray(), adata.X.toarray())
    assert screen.counts.dtype == np.float32
    assert list(screen.obs.index) == list(adata.obs_names) and list(screen.genes) == list(adata.var_names)
    np.testing.assert_array_equal(screen.obs["total"], adata.X.toarray().sum(1))
    assert not screen.simulated and "batch" not in screen.obs and "guide" not in screen.obs
    json.dumps(dict(screen.audit), allow_nan=False)


@pytest.mark.parametrize("kind", [csr_matrix, csc_matrix, csr_array, np.asarray])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "int64"])
@pytest.mark.parametrize("where", ["memory", "file", "backed"])
def test_every_kind_of_matrix_gives_the_same_screen(small_adata, on_disk, tmp_path, kind, dtype, where):
    plain = small_adata()
    adata = small_adata(kind(plain.X.toarray().astype(dtype)))
    if where == "memory":
        screen = loaded(adata)
    else:
        screen = load_screen(on_disk(adata))
    if where == "backed":
        backed = anndata.read_h5ad(tmp_path / "toy.h5ad", backed="r")
        screen = loaded(backed)
        backed.file.close()
    assert screen.fingerprint == loaded(plain).fingerprint


def test_blocks_of_rows_make_no_difference(small_adata, on_disk, monkeypatch):
    conditions = np.array(["KLF1", "BAK1", "ctrl", "other"] * 20)
    adata = small_adata(conditions=conditions, obs={"part": np.where(conditions == "other", "b", "a")})
    whole = loaded(adata, subset={"part": "a"})
    monkeypatch.setattr("perturbret.data.h5ad._ROWS", 7)
    for x in (adata.X, adata.X.toarray(), adata.X.tocsc()):
        parts = load_screen(
            on_disk(
                small_adata(x, conditions=conditions, obs={"part": adata.obs["part"].to_numpy()}),
                subset={"part": "a"},
            )
        )
        assert parts.fingerprint == whole.fingerprint
    assert whole.n_cells == 60


def test_label_variants_are_one_condition_and_the_audit_says_so(small_adata):
    labels = ["KLF1"] * 8 + ["KLF1+ctrl"] * 7 + [" ctrl+KLF1 "] * 6 + ["BAK1+KLF1"] * 9 + ["KLF1+BAK1"] * 5
    labels += ["ctrl"] * 10 + ["CTRL"] * 3 + ["ctrl+ctrl"] * 2
    screen = loaded(small_adata(conditions=labels))
    assert screen.obs["condition"].value_counts().to_dict() == {"KLF1": 21, "BAK1+KLF1": 14, CTRL: 15}
    audit = screen.audit
    assert (audit["n_raw_labels"], audit["n_classes_without_merging"], audit["n_conditions"]) == (8, 8, 2)
    merged = {row["raw"]: (row["condition"], row["n_cells"]) for row in audit["merged_labels"]}
    assert merged["KLF1+ctrl"] == ("KLF1", 7) and merged["KLF1+BAK1"] == ("BAK1+KLF1", 5)
    assert merged["CTRL"] == (CTRL, 3) and len(merged) == 8


def test_other_delimiters_and_control_names(small_adata):
    labels = (
        ["KLF1_BAK1"] * 9
        + ["BAK1_KLF1"] * 9
        + ["KLF1"] * 9
        + ["Non-Targeting"] * 9
        + ["KLF1_non-targeting"] * 9
    )
    screen = loaded(small_adata(conditions=labels), combo_delimiter="_", control_label="non-targeting")
    assert screen.obs["condition"].value_counts().to_dict() == {"BAK1+KLF1": 18, "KLF1": 18, CTRL: 9}


def test_small_conditions_are_dropped_and_listed(small_adata):
    labels = ["KLF1"] * 20 + ["BAK1"] * 20 + ["HBZ"] * 3 + ["HBZ+ctrl"] * 1 + ["ctrl"] * 2
    screen = loaded(small_adata(conditions=labels))
    assert screen.conditions == ["BAK1", "KLF1"] and (screen.obs["condition"] == CTRL).sum() == 2
    assert screen.audit["dropped_conditions"] == {"HBZ": 4}
    assert screen.audit["n_raw_labels"] == 5 and screen.audit["n_classes_without_merging"] == 3
    assert (screen.audit["cells_before"], screen.audit["cells_after"]) == (46, 42)


def test_empty_cells_are_dropped_with_their_number(small_adata):
    x = small_adata().X.toarray()
    x[[0, 25, 59]] = 0
    screen = loaded(small_adata(csr_matrix(x)))
    assert screen.n_cells == 57 and screen.audit["empty_cells"] == 3
    assert "cell0" not in screen.obs.index


def test_a_condition_can_fall_below_the_limit_by_its_empty_cells(small_adata):
    x = small_adata(conditions=["KLF1"] * 20 + ["BAK1"] * 20 + ["HBZ"] * 5 + ["ctrl"] * 5).X.toarray()
    x[44] = 0
    labels = ["KLF1"] * 20 + ["BAK1"] * 20 + ["HBZ"] * 5 + ["ctrl"] * 5
    assert loaded(small_adata(csr_matrix(x), conditions=labels)).audit["dropped_conditions"] == {"HBZ": 4}


def test_cells_without_a_label_are_dropped_with_their_number(small_adata):
    labels = np.repeat(["KLF1", "BAK1", "ctrl"], 20).astype(object)
    labels[[1, 2]] = [None, np.nan]
    screen = loaded(small_adata(conditions=labels))
    assert screen.n_cells == 58 and screen.audit["unlabelled_cells"] == 2


def test_subset_keeps_the_named_cells(small_adata):
    adata = small_adata(obs={"study": np.tile(["a", "b", "c"], 20), "rep": np.tile([1, 2], 30)})
    assert loaded(adata, subset={"study": "b"}).n_cells == 20
    assert loaded(adata, subset={"study": ["a", "b"], "rep": 2}).n_cells == 20
    with pytest.raises(
        ScreenError, match=r"subset: expected cells with obs\['study'\] == 'd', found none; known"
    ):
        loaded(adata, subset={"study": "d"})
    with pytest.raises(ScreenError, match="subset: expected a column 'studi' in obs; nearest: 'study'"):
        loaded(adata, subset={"studi": "a"})


def test_batch_guide_and_total_columns(small_adata):
    guide = np.array(["g1", None, "g3"] * 20, dtype=object)
    adata = small_adata(obs={"rep": np.tile([1.0, 2.0], 30), "g": guide, "n": np.arange(60) + 500})
    screen = loaded(adata, batch_key="rep", guide_key="g", total_key="n")
    assert set(screen.obs["batch"]) == {"1", "2"}
    assert set(screen.obs["guide"]) == {"g1", "g3", "unassigned"} and screen.audit["unassigned_guides"] == 20
    np.testing.assert_array_equal(screen.obs["total"], np.arange(60) + 500.0)
    assert loaded(small_adata()).audit["totals"] == "sums over the genes in the file"


@pytest.mark.parametrize(
    ("value", "key", "said"),
    [
        (np.nan, "batch_key", "batch_key: 1 cells have no 'v'"),
        (np.nan, "total_key", "positive numbers.*1 cells have none .first 'cell3'"),
        (0, "total_key", "positive numbers"),
        (
            1,
            "total_key",
            "1 cells have less in obs.'v'. than their own counts add up to .first 'cell3': 1 against",
        ),
    ],
)
def test_unusable_columns(small_adata, value, key, said):
    column = np.full(60, 1000.0)
    column[3] = value
    with pytest.raises(ScreenError, match=said):
        loaded(small_adata(obs={"v": column}), **{key: "v"})


@pytest.mark.parametrize("key", ["batch_key", "guide_key", "total_key", "condition_key"])
def test_missing_column_names_the_nearest(small_adata, key):
    with pytest.raises(
        ScreenError, match=f"{key}: expected a column 'conditions' in obs; nearest: 'condition'"
    ):
        loaded(small_adata(), **{key: "conditions"})


def test_duplicate_symbols_are_summed_with_a_note(small_adata):
    adata = small_adata(var={"symbol": ["KLF1", "BAK1", "KLF1", "HBZ", "HBZ ", "HBZ"]})
    screen = loaded(adata, gene_symbol_key="symbol")
    x = adata.X.toarray()
    assert list(screen.genes) == ["KLF1", "BAK1", "HBZ"]
    np.testing.assert_array_equal(screen.counts.toarray(), np.c_[x[:, 0] + x[:, 2], x[:, 1], x[:, 3:].sum(1)])
    assert screen.audit["duplicate_genes"] == {"KLF1": 2, "HBZ": 3}
    assert (screen.audit["genes_before"], screen.audit["genes_after"]) == (6, 3)


def test_duplicate_symbols_can_be_refused(small_adata):
    adata = small_adata(var={"symbol": ["KLF1", "BAK1", "KLF1", "HBZ", "A", "B"]})
    with pytest.raises(ScreenError, match="expected unique gene symbols, got 1 repeated .*'KLF1': 2"):
        loaded(adata, gene_symbol_key="symbol", duplicate_genes="refuse")


def test_ensembl_ids_without_a_symbol_column_are_refused(small_adata):
    ids = [f"ENSG0000010010{i}.2" for i in range(6)]
    adata = small_adata(genes=ids, var={"gene_name": list("ABCDEF"), "n_cells": range(6)})
    with pytest.raises(
        ScreenError, match="expected gene symbols, got Ensembl ids.*text columns: 'gene_name'"
    ):
        loaded(adata)
    assert list(loaded(adata, gene_symbol_key="gene_name").genes) == list("ABCDEF")


def test_genes_without_a_symbol_keep_their_id(small_adata):
    ids = [f"ENSG0000010010{i}" for i in range(6)]
    adata = small_adata(genes=ids, var={"s": np.array(["A", "B", None, "", "E", "F"], object)})
    screen = loaded(adata, gene_symbol_key="s")
    assert list(screen.genes) == ["A", "B", ids[2], ids[3], "E", "F"]
    assert screen.audit["genes_without_symbol"] == 2


def test_unknown_symbol_column(small_adata):
    with pytest.raises(
        ScreenError, match="gene_symbol_key: expected a column 'symbols' in var; nearest: 'symbol'"
    ):
        loaded(small_adata(var={"symbol": list("ABCDEF")}), gene_symbol_key="symbols")


def test_extra_masked_genes_follow_their_canonical_condition(small_adata):
    labels = ["KLF1"] * 20 + ["BAK1+KLF1"] * 20 + ["HBZ"] * 2 + ["ctrl"] * 9
    extra = {"KLF1+BAK1": ["HBG1"], "BAK1+KLF1": ["ACTB"], "HBZ": ["GAPDH"]}
    screen = loaded(small_adata(conditions=labels), extra_masked_genes=extra)
    assert screen.extra_masked_genes == {"BAK1+KLF1": ("ACTB", "HBG1")}
    with pytest.raises(
        ScreenError, match="extra_masked_genes: expected conditions of the screen, got 'KLF2'"
    ):
        loaded(small_adata(), extra_masked_genes={"KLF2": ["HBG1"]})


def test_embeddings_of_the_kept_cells_come_along(small_adata):
    good = np.arange(120.0).reshape(60, 2)
    bad = np.full((60, 2), np.nan)
    x = small_adata().X.toarray()
    x[0] = 0
    screen = loaded(small_adata(csr_matrix(x), obsm={"X_mine": good, "X_bad": bad}))
    np.testing.assert_array_equal(screen.obsm["X_mine"], good[1:])
    assert screen.audit["obsm_left_out"] == {"X_bad": "NaN or infinite values"}


def test_cell_types_are_names_without_targets_or_controls(small_adata):
    labels = ["CD4+ T"] * 30 + ["CD34+"] * 30
    screen = loaded(small_adata(conditions=labels), control_label=None, combo_delimiter=None)
    assert screen.conditions == ["CD34⁺", "CD4⁺ T"]


# -- counts ----------------------------------------------------------------------------------------------


def test_layers(small_adata):
    plain = small_adata()
    scaled = csr_matrix(plain.X.toarray() / 3)
    adata = small_adata(scaled, layers={"counts": plain.X, "umis": plain.X * 2})
    np.testing.assert_array_equal(loaded(adata).counts.toarray(), plain.X.toarray())
    np.testing.assert_array_equal(loaded(adata, counts_layer="umis").counts.toarray(), 2 * plain.X.toarray())
    with pytest.raises(
        CountsError, match="toy: X: expected whole numbers.*counts_layer can be X, counts, recover:X"
    ):
        loaded(adata, counts_layer="X")
    with pytest.raises(
        ScreenError, match="counts_layer: expected 'raw' in the file; counts_layer can be X, counts"
    ):
        loaded(adata, counts_layer="raw")


@pytest.mark.parametrize(("layer", "way"), [("X", "recover"), ("raw", "recover:raw"), ("log", "recover:log")])
def test_recovered_counts_and_their_evidence(small_adata, on_disk, layer, way):
    plain = small_adata()
    counts = plain.X.toarray()
    totals = counts.sum(1) + 900.0
    log = csr_matrix(np.log1p(counts / totals[:, None] * 1e4))
    adata = small_adata(log, obs={"n": totals}, layers={"log": log})
    if layer == "raw":
        adata.raw = adata
        adata.X = adata.X.toarray() - 1.0
    screen = load_screen(on_disk(adata, counts_layer=way, total_key="n"))
    np.testing.assert_array_equal(screen.counts.toarray(), counts)
    evidence = screen.audit["counts"]
    assert evidence["recovered"] and evidence["layer"] == layer
    assert evidence["residual_log"] <= evidence["tolerance_log"] < 1e-4
    assert evidence["total_times_scale_median"] == pytest.approx(1e4, rel=1e-5)


def test_raw_has_genes_of_its_own(small_adata):
    adata = small_adata()
    adata.raw = adata
    fewer = adata[:, :3].copy()
    assert loaded(fewer, counts_layer="raw").n_genes == 6 and loaded(fewer, counts_layer="X").n_genes == 3


def test_a_file_without_x(small_adata, on_disk):
    plain = small_adata()
    adata = anndata.AnnData(obs=plain.obs, var=plain.var, layers={"counts": plain.X})
    assert load_screen(on_disk(adata)).n_cells == 60
    with pytest.raises(ScreenError, match="counts_layer: expected 'X' in the file"):
        load_screen(on_disk(adata, counts_layer="X"))


def test_recover_refuses_what_is_not_exact(small_adata):
    adata = small_adata(csr_matrix(np.random.default_rng(0).gamma(2.0, 1.0, (60, 6))))
    with pytest.raises(CountsError, match="toy: X: .*cannot be recovered exactly"):
        loaded(adata, counts_layer="recover")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, "counts of at least 0, got -1.0 in cell 'cell7', gene 'HBG1'"),
        (0.5, "whole numbers, got 0.5 in cell 'cell7', gene 'HBG1'"),
        (np.nan, "counts, got nan in cell 'cell7', gene 'HBG1'"),
        (np.inf, "finite counts, got inf"),
        (2**25, r"counts below 2\*\*24"),
    ],
)
@pytest.mark.parametrize("kind", [csr_matrix, csc_matrix, np.asarray])
def test_values_that_are_no_counts(small_adata, on_disk, kind, value, said):
    x = small_adata().X.toarray()
    x[7, 2] = value
    with pytest.raises(CountsError, match=f"toy: X: expected {said}"):
        load_screen(on_disk(small_adata(kind(x))))


def test_the_named_cell_is_the_right_one_behind_a_subset_and_blocks(small_adata, monkeypatch):
    monkeypatch.setattr("perturbret.data.h5ad._ROWS", 8)
    x = small_adata().X.toarray()
    x[43, 2] = -1
    part = np.where(np.arange(60) % 2, "b", "a")
    with pytest.raises(CountsError, match="cell 'cell43'"):
        loaded(small_adata(csr_matrix(x), obs={"part": part}), subset={"part": "b"})
    assert loaded(small_adata(csr_matrix(x), obs={"part": part}), subset={"part": "a"}).n_cells == 30


def test_overflown_int16(small_adata, on_disk):
    x = small_adata().X.toarray()
    x[7, 2] = 40_000
    with pytest.raises(CountsError, match="got -25536 .*do not fit int16"):
        load_screen(on_disk(small_adata(x.astype(np.int16))))


def test_float16_is_refused(small_adata):
    with pytest.raises(TypeError, match="toy: X: .*float16"):
        loaded(small_adata(small_adata().X.toarray().astype(np.float16)))


# -- bad files -------------------------------------------------------------------------------------------


def test_missing_file(tmp_path):
    with pytest.raises(DataNotFound, match="expected a file at .*none.h5ad"):
        load_screen(entry(path=str(tmp_path / "none.h5ad")))


def test_file_that_is_no_hdf5(tmp_path):
    (tmp_path / "toy.h5ad").write_text("gene,cell\n")
    with pytest.raises(
        ValueError, match="expected a whole HDF5 file .*got 10 bytes that start with b'gene,cel'"
    ):
        load_screen(entry(path=str(tmp_path / "toy.h5ad")))


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_truncated_file(small_adata, on_disk, tmp_path, part):
    toy = on_disk(small_adata())
    content = (tmp_path / "toy.h5ad").read_bytes()
    (tmp_path / "toy.h5ad").write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ValueError, match="toy.h5ad: expected a whole HDF5 file"):
        load_screen(toy)


def test_hdf5_that_is_no_h5ad(tmp_path):
    import h5py

    with h5py.File(tmp_path / "toy.h5ad", "w") as file:
        file["matrix"] = np.eye(3)
    with pytest.raises(
        ValueError, match=r"expected an h5ad with obs and var, got an HDF5 file with \['matrix'\]"
    ):
        load_screen(entry(path=str(tmp_path / "toy.h5ad")))


def test_wrong_checksum(small_adata, on_disk):
    with pytest.raises(ChecksumError, match="expected 0000.*, got "):
        load_screen(on_disk(small_adata(), sha256="0" * 64))


def test_absent_control_label(small_adata):
    with pytest.raises(
        ScreenError, match=r"control_label: expected cells labelled 'contrl'.*nearest: 'control'"
    ):
        loaded(small_adata(conditions=["KLF1"] * 9 + ["BAK1"] * 9 + ["control"] * 9), control_label="contrl")


def test_duplicate_cell_names(small_adata):
    names = ["a", "b", "a", *(f"c{i}" for i in range(57))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = small_adata(cells=names)
    with pytest.raises(ScreenError, match="expected unique cell names, got 1 repeated .first 'a'"):
        loaded(adata)


def test_condition_that_names_an_empty_gene(small_adata):
    labels = ["KLF1"] * 20 + ["KLF1++BAK1"] * 20 + ["ctrl"] * 20
    with pytest.raises(ValueError, match=r"condition 'KLF1\+\+BAK1': empty gene symbol at position 2"):
        loaded(small_adata(conditions=labels))


def test_fewer_than_two_conditions(small_adata):
    labels = ["KLF1"] * 20 + ["BAK1"] * 4 + ["ctrl"] * 20
    with pytest.raises(ScreenError, match=r"at least two conditions .*got \['KLF1'\]; dropped .*'BAK1': 4"):
        loaded(small_adata(conditions=labels))


# -- names -----------------------------------------------------------------------------------------------


def test_unknown_name(tmp_path):
    with pytest.raises(UnknownDataset, match="nearest: 'norman_subset'"):
        load_screen("norman_subst")


def test_user_yaml_beside_its_file(small_adata, tmp_path):
    small_adata().write_h5ad(tmp_path / "mine.h5ad")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\npath: mine.h5ad\ncondition_key: condition\ncontrol_label: Ctrl\ncitation: me\n"
    )
    screen = load_screen(str(tmp_path / "mine.yaml"))
    assert screen.name == "mine" and screen.n_cells == 60
    assert screen.audit["file"] == "mine.h5ad" and len(screen.audit["sha256"]) == 64
    assert screen.audit["citation"] == "me"


def test_simulated_screen_gets_the_entrys_parameters(tmp_path, monkeypatch):
    registry = without_real(monkeypatch, "http://127.0.0.1:9/none.h5ad", tmp_path)
    screen = load_screen("simulated", registry=registry)
    assert screen.simulated and screen.name == "simulated" and screen.truth is not None
    assert screen.n_genes == 20 and len(screen.conditions) == 4


def test_simulated_entry_with_an_unknown_parameter():
    bad = make_entry({"name": "s", "simulate": {"n_single": 3}})
    with pytest.raises(EntryError, match="simulate: unknown key 'n_single'; nearest: 'n_singles'"):
        load_screen(bad)


def test_auto_takes_the_real_screen_that_is_at_hand(small_adata, tmp_path, monkeypatch):
    registry = without_real(monkeypatch, "http://127.0.0.1:9/none.h5ad", tmp_path)
    small_adata().write_h5ad(tmp_path / "none.h5ad")
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path))
    assert resolve_dataset("auto", registry=registry).name == "norman_subset"


def test_auto_without_file_and_network_takes_the_simulated_screen_and_warns(tmp_path, monkeypatch):
    registry = without_real(monkeypatch, "http://127.0.0.1:9/none.h5ad", tmp_path)
    with pytest.warns(UserWarning, match="taking SIMULATED cells, since dataset 'norman_subset'"):
        assert resolve_dataset("auto", registry=registry).simulated
    with pytest.warns(UserWarning, match="SIMULATED"):
        assert load_screen(registry=registry).simulated


def test_auto_gives_the_network_a_limited_time(tmp_path, monkeypatch):
    registry = without_real(monkeypatch, "http://nowhere.invalid/none.h5ad", tmp_path)
    asked = {}

    def fetch(entry, **keys):
        asked.update(keys)
        raise DataNotFound("too slow")

    monkeypatch.setattr(datasets, "fetch", fetch)
    with pytest.warns(UserWarning, match="too slow"):
        assert resolve_dataset("auto", registry=registry).simulated
    assert asked["timeout"] == 10


def test_auto_does_not_pass_over_a_real_file_with_other_contents(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path))
    (tmp_path / "perturbench_devel.h5ad").write_bytes(b"other")
    with pytest.raises(ChecksumError):
        resolve_dataset("auto")


# -- the registry's own datasets --------------------------------------------------------------------------


def test_pbmc68k_needs_no_network_and_gives_real_counts(monkeypatch):
    monkeypatch.delenv("PERTURBRET_DATA", raising=False)
    screen = load_screen("pbmc68k")
    assert screen.counts.shape == (692, 765) and len(screen.conditions) == 9
    assert "CD14⁺ Monocyte" in screen.conditions and CTRL not in set(screen.obs["condition"])
    evidence = screen.audit["counts"]
    assert evidence["total_times_scale_median"] == pytest.approx(1e4, rel=1e-4)
    assert evidence["total_times_scale_spread"] < 0.001 and evidence["residual_counts"] < 0.1


def test_norman_subset(real_data):
    screen = load_screen("norman_subset")
    assert screen.counts.shape == (3375, 500) and len(screen.conditions) == 33
    sizes = screen.obs["condition"].value_counts()
    assert sizes["PLK4"] == 95 and sizes["FOXL2+HOXB9"] == 80 and sizes[CTRL] == 100
    assert "KLF1+SET" in screen.conditions  # SET+KLF1 in the file
    assert screen.audit["counts"]["residual_counts"] < 1e-6
    rows = np.asarray(screen.counts.sum(1)).ravel()
    assert (rows >= 1).all() and (rows < screen.obs["total"]).all()


def test_norman_subset_counts_reproduce_the_file(real_data):
    screen = load_screen("norman_subset")
    adata = anndata.read_h5ad(real_data / "perturbench_devel.h5ad")
    values = np.expm1(adata[screen.obs.index[:200]].X.toarray())
    counts = screen.counts[:200].toarray()
    scale = values.sum(1) / counts.sum(1)
    np.testing.assert_allclose(values, counts * scale[:, None], rtol=1e-9, atol=1e-12)


def test_thp1(real_data):
    screen = load_screen("thp1")
    assert screen.counts.shape == (20_729, 303) and len(screen.conditions) == 25
    assert (screen.obs["condition"] == CTRL).sum() == 2386
    assert set(screen.obs["batch"]) == {"rep_1", "rep_2", "rep_3"}
    assert screen.obs["guide"].nunique() == 107 and (screen.obs["total"] >= 1).all()


def test_every_entry_without_a_file_at_hand_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path))
    for name, item in load_registry().items():
        if item.path and not item.url:
            read = load_effects if (item.counts_layer or "").startswith("effects") else load_screen
            with pytest.raises(DataNotFound, match="set PERTURBRET_DATA to it"):
                read(name)


# -- parts that nobody asked for ---------------------------------------------------------------------------


def odd(file, key):
    """Put something at `key` that no reader knows."""
    if key in file:
        del file[key]
    group = file.create_group(key)
    group.attrs["encoding-type"], group.attrs["encoding-version"] = "some-new-encoding", "9.9"


def listed(file, table, *names):
    order = [*file[table].attrs["column-order"], *names]
    file[table].attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())


def null(file, key):
    if key in file:
        del file[key]
    write_elem(file, key, None)


CHANGES = {
    "obsm/new": lambda f: odd(f, "obsm/new"),
    "layers/new": lambda f: odd(f, "layers/new"),
    "obs/new": lambda f: (odd(f, "obs/new"), listed(f, "obs", "new")),
    "obs/gone": lambda f: listed(f, "obs", "gone"),
    "var/new": lambda f: (odd(f, "var/new"), listed(f, "var", "new")),
    "raw/X": lambda f: (f.create_group("raw"), odd(f, "raw/X"), f.copy("var", "raw/var")),
    None: lambda f: (listed(f, "obs", "condition"), null(f, "raw"), odd(f, "uns/new"), odd(f, "obsp/new")),
}


@pytest.mark.parametrize("part", CHANGES)
def test_parts_that_nobody_asked_for_stop_no_load(small_adata, on_disk, part):
    toy = on_disk(small_adata())
    good = load_screen(toy)
    with h5py.File(toy.path, "a") as file:
        CHANGES[part](file)
    screen = load_screen(toy)
    assert screen.fingerprint == good.fingerprint
    assert list(screen.audit["unreadable_parts"]) == ([] if part is None else [part])


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("obs/new", {"batch_key": "new"}),
        ("obs/new", {"subset": {"new": 1}}),
        ("var/new", {"gene_symbol_key": "new"}),
        ("layers/new", {"counts_layer": "new"}),
        ("layers/new", {"counts_layer": "recover:new"}),
        ("raw/X", {"counts_layer": "raw"}),
    ],
)
def test_a_part_that_is_asked_for_is_named_with_its_file(small_adata, on_disk, part, keys):
    toy = on_disk(small_adata(), **keys)
    with h5py.File(toy.path, "a") as file:
        CHANGES[part](file)
    with pytest.raises(ScreenError, match=rf"toy: {next(iter(keys))}: .*toy\.h5ad: {part} cannot be read \("):
        load_screen(toy)


@pytest.mark.parametrize("change", [lambda f: odd(f, "layers/counts"), lambda f: odd(f, "X")])
def test_counts_that_cannot_be_read_are_not_replaced_by_others(small_adata, on_disk, change):
    toy = on_disk(small_adata())
    with h5py.File(toy.path, "a") as file:
        change(file)
    with pytest.raises(ScreenError, match=r"counts_layer: .*toy\.h5ad: (layers/counts|X) cannot be read"):
        load_screen(toy)


def test_a_file_without_values_or_without_cell_names_says_so(small_adata, on_disk):
    toy = on_disk(small_adata())
    with h5py.File(toy.path, "a") as file:
        null(file, "X")
    with pytest.raises(ScreenError, match=r"toy\.h5ad: expected values in X, raw or a layer, found none"):
        load_screen(toy)
    with h5py.File(toy.path, "a") as file:
        del file["obs"].attrs["_index"]
    with pytest.raises(ValueError, match=r"toy\.h5ad: obs: expected a table, which cannot be read: KeyError"):
        load_screen(toy)


# -- other forms of files ----------------------------------------------------------------------------------


def test_a_zarr_store_loads_as_the_file_does(small_adata, on_disk, tmp_path):
    good = load_screen(on_disk(small_adata()))
    small_adata().write_zarr(tmp_path / "toy.zarr")
    screen = load_screen(entry(path=str(tmp_path / "toy.zarr")))
    assert screen.fingerprint == good.fingerprint and screen.audit["file"] == "toy.zarr"
    sha256 = screen.audit["sha256"]
    assert load_screen(entry(path=str(tmp_path / "toy.zarr"), sha256=sha256)).fingerprint == good.fingerprint
    (tmp_path / "toy.zarr" / "extra").write_text("x")
    with pytest.raises(ChecksumError, match=sha256):
        load_screen(entry(path=str(tmp_path / "toy.zarr"), sha256=sha256))


@pytest.mark.parametrize(
    ("files", "said"), [((), "an empty directory"), (("a.h5ad",), "a directory with a.h5ad")]
)
def test_a_directory_that_is_no_zarr_store_is_refused(tmp_path, files, said):
    (tmp_path / "toy.zarr").mkdir()
    for name in files:
        (tmp_path / "toy.zarr" / name).touch()
    with pytest.raises(
        ValueError, match=f"toy.zarr: expected an h5ad file, or a directory that is a zarr.*, got {said}"
    ):
        load_screen(entry(path=str(tmp_path / "toy.zarr")))


@pytest.fixture
def h5mu(small_adata, on_disk, tmp_path):
    """Path of an h5mu whose modalities, all with the same cells, are named as given."""

    def write(*modalities, move=False):
        source = on_disk(small_adata())
        with h5py.File(source.path) as one, h5py.File(tmp_path / "toy.h5mu", "w") as file:
            for name in modalities:
                group = file.create_group(f"mod/{name}")
                for key in one:
                    one.copy(key, group)
            one.copy("obs", file)
            if move:  # they stand in the table of all modalities only
                group["obs"].attrs["column-order"] = np.array([], dtype=h5py.string_dtype())
        return str(tmp_path / "toy.h5mu")

    return write


@pytest.mark.parametrize(
    ("modalities", "asked"),
    [(["rna", "adt"], None), (["GEX", "crispr"], None), (["cells"], None), (["a", "b"], "b")],
)
def test_of_an_h5mu_the_modality_is_known_or_named(h5mu, small_adata, on_disk, modalities, asked):
    good = load_screen(on_disk(small_adata()))
    path = h5mu(*modalities)
    assert load_screen(entry(path=path, modality=asked)).fingerprint == good.fingerprint


def test_labels_may_stand_in_the_table_of_all_modalities(h5mu, small_adata, on_disk):
    good = load_screen(on_disk(small_adata()))
    assert load_screen(entry(path=h5mu("rna", move=True))).fingerprint == good.fingerprint


def test_a_modality_that_is_not_clear_is_refused(h5mu, small_adata, on_disk):
    path = h5mu("a", "b")
    with pytest.raises(ValueError, match=r"toy\.h5mu: modality: expected one of 'a', 'b', got none named"):
        load_screen(entry(path=path))
    with pytest.raises(ValueError, match="modality: expected one of 'a', 'b', got 'rna'"):
        load_screen(entry(path=path, modality="rna"))
    with pytest.raises(
        ValueError, match=r"modality: expected a file with modalities \(h5mu\), got one without"
    ):
        load_screen(on_disk(small_adata(), modality="rna"))


def test_a_home_directory_is_expanded(small_adata, on_disk, monkeypatch, tmp_path):
    good = load_screen(on_disk(small_adata()))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_screen(entry(path="~/toy.h5ad")).fingerprint == good.fingerprint
    assert outputs_root("~/out") == tmp_path / "out"
    monkeypatch.setenv("PERTURBRET_OUTPUTS", "~/more")
    assert outputs_root() == tmp_path / "more"


def test_a_full_disk_is_no_reason_for_simulated_cells(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("perturbret.data.sources.download", full)
    with pytest.raises(DiskFull, match="No space left on device"):
        resolve_dataset("auto", registry=without_real(monkeypatch, "http://localhost:1/x.h5ad", tmp_path))
