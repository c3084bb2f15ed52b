"""Columns that tell the condition, under names that a plain comparison misses: masked, left out, or refused."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from perturbret.data.annotations import ScreenError
from perturbret.data.conditions import CTRL
from perturbret.data.counts import CountsError
from perturbret.data.datasets import ingest
from perturbret.data.genes import SymbolResolver
from perturbret.data.h5ad import from_anndata
from perturbret.data.masking import mask_counts
from perturbret.data.sources import make_entry
from perturbret.report import audit
from perturbret.report.wording import plain

TARGETS = ("HLA-A", "NKX2-1", "KLF1", "BAK1")
OTHERS = "CEBPA IRF1 TP53 GATA1 MYC JUN FOS SPI1 RUNX1 TAL1 LMO2 ACTB GAPDH B2M MT-CO1 PTMA".split()
N = 25


def planted(labels=None, columns=None, extra=(), ctrl="ctrl"):
    """AnnData whose target columns, and whose columns `extra` for KLF1, are 20 times higher in cells of the target."""
    import anndata

    genes = [*TARGETS, *OTHERS]
    shown = [ctrl, *(labels or TARGETS)]
    x = np.random.default_rng(0).poisson(3, (N * len(shown), len(genes) + len(extra)))
    for i, target in enumerate(TARGETS, start=1):
        x[i * N : (i + 1) * N, genes.index(target)] = 60
    x[3 * N : 4 * N, len(genes) :] = 60
    names = [*(map(columns, genes) if columns else genes), *extra]
    obs = pd.DataFrame({"condition": np.repeat(shown, N)}, index=[f"c{i}" for i in range(len(x))])
    return anndata.AnnData(csr_matrix(x.astype(np.float32)), obs, pd.DataFrame(index=names))


def loaded(adata, **keys):
    content = {"name": "toy", "path": "toy.h5ad", "condition_key": "condition", "control_label": "ctrl"}
    return ingest(from_anndata(adata), make_entry(content | keys))


def telling(screen):
    """Columns that differ between conditions under the default mask."""
    masked = mask_counts(
        screen.counts, screen.obs["condition"].to_numpy(str), screen.target_columns, "all_targets"
    )
    means = pd.DataFrame(masked.toarray()).groupby(screen.obs["condition"].to_numpy(str)).mean()
    return [str(screen.genes[i]) for i in np.flatnonzero(means.max() > 20)]


def sound(screen):
    json.dumps(dict(screen.audit), allow_nan=False)
    return telling(screen) == []


def test_the_plain_screen_leaks_without_and_not_with_its_mask():
    screen = loaded(planted())
    assert sound(screen) and screen.conditions == sorted(TARGETS)
    labels = screen.obs["condition"].to_numpy(str)
    unmasked = mask_counts(screen.counts, labels, screen.target_columns, "none")
    assert (unmasked != screen.counts).nnz == 0 and (screen.counts.toarray() == 60).sum() >= 4 * N


# -- spelled alike: read as the same name ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: name.replace("-", "\u2011"),
        lambda name: name.replace("-", "–"),
        lambda name: f"\u00a0{name} ",
        lambda name: f"{name}\u200b",
    ],
)
def test_odd_dashes_and_blanks_are_read_as_ordinary_ones(spell):
    assert loaded(planted(labels=[spell(name) for name in TARGETS])).conditions == sorted(TARGETS)
    assert sound(loaded(planted(columns=spell)))


@pytest.mark.parametrize("made_unique", ["-1", ".1", "-1-1"])
def test_columns_made_unique_are_masked_with_their_gene(made_unique):
    assert sound(loaded(planted(columns=lambda name: name + made_unique)))
    both = loaded(planted(extra=[f"KLF1{made_unique}"]))
    assert sound(both) and both.audit["targets"][2]["columns"] == ["KLF1", f"KLF1{made_unique}"]


def test_a_name_that_ends_in_a_number_is_a_gene_of_its_own():
    screen = loaded(planted(labels=["NKX2-1", "B2M", "KLF1", "BAK1"], extra=["NKX2-2", "HLA-B"]))
    row = next(row for row in screen.audit["targets"] if row["target"] == "NKX2-1")
    assert row["columns"] == ["NKX2-1"] and row["also_masked"] == []
    assert telling(screen) == ["HLA-A", "NKX2-2", "HLA-B"]  # no target's: they stay


def test_ensembl_ids_on_either_side_and_beside_the_symbols():
    ids = SymbolResolver.from_package().ensembl_ids
    assert sound(loaded(planted(labels=[f"{ids[name]}.7" for name in TARGETS])))
    assert sound(loaded(planted(columns=lambda name: ids[name])))
    probes = planted(columns=lambda name: f"probe-{sum(map(ord, name))}")
    probes.var["ids"] = [ids[name] for name in (*TARGETS, *OTHERS)]
    assert sound(loaded(probes))


# -- spelled otherwise: refused, with the key that settles it ----------------------------------------------

LABELS = {
    "lower": (str.lower, "target_map: nearest", {"target_map": "nearest"}),
    "mouse": (str.capitalize, "Klf1: KLF1", {"target_map": "nearest"}),
    "dots": (lambda name: name.replace("-", "."), "HLA.A: HLA-A", {"target_map": "nearest"}),
    "sg": (lambda name: f"sg{name}_1", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "_sg1": (lambda name: f"{name}_sg1", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "_1": (lambda name: f"{name}_1", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "-g2": (lambda name: f"{name}-g2", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "(1)": (lambda name: f"{name}(1)", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "P1P2": (lambda name: f"{name}_P1P2", "strip_guide_suffix: true", {"strip_guide_suffix": True}),
    "oligo": (lambda name: f"{name}_oligo3", "target_map", {"strip_guide_suffix": r"_oligo\d$"}),
    "A_B": (lambda name: f"{name}_MYC", 'combo_delimiter: "_"', {"combo_delimiter": "_"}),
    "sgA_1|sgB_2": (
        lambda name: f"sg{name}_1|sgMYC_2",
        r'combo_delimiter: "\|"',
        {"combo_delimiter": "|", "strip_guide_suffix": True},
    ),
}
IDENTIFIER = r"ENS[A-Z]*G\d+(?:\.\d+)?"
COLUMNS = {
    "lower": (str.lower, "target_map: nearest", {"target_map": "nearest"}),
    "mouse": (str.capitalize, "KLF1: Klf1", {"target_map": "nearest"}),
    "dots": (lambda name: name.replace("-", "."), "HLA-A: HLA.A", {"target_map": "nearest"}),
    "no dashes": (lambda name: name.replace("-", ""), "NKX2-1: NKX21", {"target_map": "nearest"}),
    "_1": (lambda name: f"{name}_1", "KLF1: KLF1_1", {"target_map": "nearest"}),
    "genome": (
        lambda name: f"GRCh38_{name}",
        r"gene_symbol_pattern: '\^GRCh38_\(\.\+\)\$'",
        {"gene_symbol_pattern": "^GRCh38_(.+)$"},
    ),
    "id first": (
        lambda name: f"ENSG{sum(map(ord, name)):011d}_{name}",
        "gene_symbol_pattern",
        {"gene_symbol_pattern": f"^{IDENTIFIER}[_|:-](.+)$"},
    ),
    "id last": (
        lambda name: f"{name}_ENSG{sum(map(ord, name)):011d}.3",
        "gene_symbol_pattern",
        {"gene_symbol_pattern": f"^(.+?)[_|:-]{IDENTIFIER}$"},
    ),
}


@pytest.mark.parametrize(("spell", "said", "keys"), LABELS.values(), ids=LABELS)
def test_labels_in_another_spelling_are_refused_until_the_entry_reads_them(spell, said, keys):
    adata = planted(labels=[spell(name) for name in TARGETS])
    with pytest.raises(ScreenError, match=f"targets have no column of their own.*{said}"):
        loaded(adata)
    assert sound(loaded(adata, **keys))


@pytest.mark.parametrize(("spell", "said", "keys"), COLUMNS.values(), ids=COLUMNS)
def test_columns_in_another_spelling_are_refused_until_the_entry_reads_them(spell, said, keys):
    adata = planted(columns=spell)
    with pytest.raises(ScreenError, match=f"targets have no column of their own.*{said}"):
        loaded(adata)
    assert sound(loaded(adata, **keys))


def test_one_target_in_another_spelling_is_enough_for_a_refusal():
    adata = planted(labels=["HLA-A", "NKX2-1", "klf1", "BAK1"])
    with pytest.raises(ScreenError, match=r"1 of 4 targets.*'klf1' \(nearest column 'KLF1'\).*klf1: KLF1"):
        loaded(adata)
    screen = loaded(adata, target_map={"klf1": "KLF1"})
    assert sound(screen) and screen.conditions == sorted(TARGETS)


def test_a_date_of_a_spreadsheet_is_seen_on_either_side():
    dated = planted(labels=["HLA-A", "NKX2-1", "MARCH1", "BAK1"], extra=["1-Mar"])
    with pytest.raises(ScreenError, match=r"'MARCH1' \(nearest column '1-Mar'\)"):
        loaded(dated)
    labelled = planted(labels=["HLA-A", "NKX2-1", "1-Mar", "BAK1"], extra=["MARCHF1"])
    with pytest.raises(ScreenError, match=r"'1-Mar' \(nearest column 'MARCHF1'\)"):
        loaded(labelled)


def test_a_delimiter_within_names_of_genes_splits_none_of_them():
    assert loaded(planted(), combo_delimiter="-").conditions == sorted(TARGETS)
    pairs = planted(labels=[f"{name}-MYC" for name in TARGETS])
    screen = loaded(pairs, combo_delimiter="-")
    assert screen.conditions == ["BAK1+MYC", "HLA-A+MYC", "KLF1+MYC", "MYC+NKX2-1"] and sound(screen)


def test_accepting_targets_as_unmeasured_still_masks_the_near_columns():
    screen = loaded(planted(labels=[name.lower() for name in TARGETS]), unmeasured_targets="accept")
    assert sound(screen)
    assert any("as the dataset's YAML states" in line for line in audit.targets_findings(screen))
    with pytest.raises(ScreenError, match="unmeasured_targets: expected targets of the screen, got 'KLF2'"):
        loaded(planted(), unmeasured_targets=["KLF2"])


def test_names_of_columns_that_nothing_knows_are_refused():
    adata = planted(columns=lambda name: str([*TARGETS, *OTHERS].index(name) + 1000))
    with pytest.raises(ScreenError, match="only 0 of 20 columns have names that HGNC knows.*gene_symbol_key"):
        loaded(adata)


def test_a_panel_without_the_targets_is_no_error_and_says_so():
    screen = loaded(planted(labels=["PTEN", "BRAF", "KRAS", "EGFR"]))
    assert {row["status"] for row in screen.audit["targets"]} == {"known gene, not measured"}
    (line,) = audit.targets_findings(screen)
    assert line == (
        "Targets: 0 matched, 4 known gene, not measured, 0 name unknown to HGNC. No target is in the panel: masks "
        "take out nothing of a target's own."
    )


def test_a_few_unknown_names_are_shown_with_their_conditions():
    screen = loaded(planted(labels=["HLA-A", "NKX2-1", "KLF1", "<b>x|y</b>"]))
    lines = audit.targets_findings(screen)
    assert lines[0].startswith("Targets: 3 matched, 0 known gene, not measured, 1 name unknown to HGNC.")
    assert "**Warning:** 1 of 4 conditions" in lines[1] and "no column of a similar name" in lines[1]
    assert "<b>" not in lines[1] and "&#60;b&#62;x&#124;y&#60;/b&#62;" in lines[1]
    with pytest.raises(ScreenError, match=r"3 of 4 targets have no column .*no column of a similar name"):
        loaded(planted(labels=["foo1", "foo2", "KLF1", "foo3"]))


def test_mouse_symbols_on_both_sides_match_and_unmeasured_ones_are_known():
    labels = ["Nkx2-1", "Pten", "Klf1", "Braf"]
    screen = loaded(planted(labels=labels, columns=str.capitalize))
    status = {row["target"]: row["status"] for row in screen.audit["targets"]}
    assert status == dict(
        zip(labels, ["matched", "known gene, not measured"] * 2, strict=True)
    ) and "Klf1" not in telling(screen)


def test_labels_that_are_symbols_are_not_taken_for_names():
    with pytest.raises(ScreenError, match="combo_delimiter: null says .* but 4 of 4 are symbols of genes"):
        loaded(planted(), combo_delimiter=None)
    screen = loaded(planted(labels=["B cell", "T cell", "NK cell", "Monocyte"]), combo_delimiter=None)
    assert "targets" not in screen.audit and audit.targets_findings(screen) == []


# -- columns beside a target, and columns that are no genes --------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["KLF1-AS1", "KLF1-DT", "KLF1-OT1", "KLF1-IT1", "KLF1.AS1", "KLF1-MYC", "MYC-KLF1", "EKLF-AS1"]
    + ["KLF1_intron", "KLF1 (probe 2)", "mm10_Klf1", "KLF1_1", "klf1"],
)
def test_columns_beside_a_target_are_masked_with_it(name):
    screen = loaded(planted(extra=[name]))
    assert sound(screen) and screen.audit["targets"][2]["also_masked"] == [name]
    assert any(plain(name) in line for line in audit.targets_findings(screen)[1:])


@pytest.mark.parametrize(
    "name",
    "KLF1_sg1 sgKLF1 KLF1_gRNA KLF1-g2 KLF1_P1P2 CRISPR_KLF1 NegCtrl0 BFP TagBFP-Puro dCas9 mCherry".split(),
)
def test_columns_that_are_no_genes_are_left_out_and_listed(name):
    screen = loaded(planted(extra=[name]))
    assert name not in screen.genes and name in screen.audit["columns_left_out"] and sound(screen)
    assert f"columns are left out, since they are no genes: {name}" in audit.targets_findings(screen)[-1]
    assert (screen.obs["total"] == np.asarray(screen.counts.sum(1)).ravel()).all()


def test_feature_types_decide_and_the_entry_decides_over_them():
    adata = planted(extra=["GUIDE7", "CD86"])
    adata.var["feature_types"] = ["Gene Expression"] * 20 + ["CRISPR Guide Capture", "Antibody Capture"]
    screen = loaded(adata)
    assert sound(screen) and screen.audit["columns_left_out"] == {
        "GUIDE7": "feature type CRISPR Guide Capture",
        "CD86": "feature type Antibody Capture",
    }
    assert telling(loaded(adata, keep_columns=["CD86"])) == ["CD86"]
    assert "MYC" not in loaded(adata, drop_columns=["MYC"]).genes
    with pytest.raises(ScreenError, match="drop_columns: expected columns of the file, got 'MYB'"):
        loaded(adata, drop_columns=["MYB"])


def test_guide_labels_that_equal_guide_columns_do_not_hide_the_gene():
    names = [f"{name}_1" for name in TARGETS]
    assert sound(loaded(planted(labels=names, extra=names)))


# -- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [
        "nan",
        "NaN",
        "None",
        "NA",
        "<NA>",
        "",
        "  ",
        "unassigned",
        "negative",
        "Multiplet",
        "doublet",
        "unknown",
    ]
    + ["ambiguous", "Not assigned", "nan+nan", "KLF1+None"],
)
def test_labels_that_say_nothing_leave_their_cells_out(label):
    screen = loaded(planted(labels=["HLA-A", "NKX2-1", label, "BAK1"]))
    assert screen.conditions == ["BAK1", "HLA-A", "NKX2-1"] and screen.audit["unlabelled_cells"] == N
    assert screen.audit["unlabelled_labels"] == {label: N}
    (line,) = audit.label_findings(screen)
    assert line.startswith(f"{N} cells are left out, since their label names no perturbation")


@pytest.mark.parametrize(
    "label",
    "NegCtrl1 non-targeting NT NTC-3 scramble safe-harbor AAVS1 intergenic_2 luciferase eGFP mock untreated sgNTC_1 "
    "Non_Targeting_Human_0001 BAK1+NegCtrl0".split(),
)
def test_controls_that_the_entry_does_not_name_are_refused(label):
    adata = planted(labels=["HLA-A", "NKX2-1", "KLF1", label])
    with pytest.raises(ScreenError, match="look like controls .* set control_label: \\['ctrl', "):
        loaded(adata)
    name = label.removeprefix("BAK1+")
    screen = loaded(adata, control_label=["ctrl", name])
    assert (screen.obs["condition"] == CTRL).sum() == (N if "+" in label else 2 * N)
    assert screen.conditions == sorted(["HLA-A", "NKX2-1", "KLF1", *(["BAK1"] if "+" in label else [])])
    assert sound(loaded(adata, drop_labels=[label]))


def test_genes_whose_names_resemble_controls_are_genes():
    assert "NT5E" in loaded(planted(labels=["NT5E", "WT1", "KLF1", "BAK1"])).conditions


def test_numbered_controls_are_one_control_when_guides_are_taken_off():
    adata = planted(labels=["HLA-A_1", "non-targeting_001", "KLF1_2", "BAK1_1"], ctrl="non-targeting_002")
    screen = loaded(adata, control_label="non-targeting", strip_guide_suffix=True)
    assert (screen.obs["condition"] == CTRL).sum() == 2 * N and screen.conditions == ["BAK1", "HLA-A", "KLF1"]


def test_every_control_that_the_entry_names_must_occur():
    with pytest.raises(ScreenError, match="control_label: expected cells labelled 'NegCtrl7'"):
        loaded(planted(), control_label=["ctrl", "NegCtrl7"])


@pytest.mark.parametrize("codes", [np.int32, np.float64, str])
def test_bare_numbers_as_conditions_are_refused_until_mapped(codes):
    adata = planted()
    adata.obs["condition"] = np.repeat(np.arange(5), N).astype(codes)
    with pytest.raises(ScreenError, match="got numbers in 4 of 5 labels.*codes of a factor.*target_map"):
        loaded(adata, control_label="0")
    mapped = dict(zip(range(1, 5), TARGETS, strict=True))
    assert sound(loaded(adata, control_label="0", target_map=mapped))


def test_numbers_left_by_a_delimiter_are_refused():
    adata = planted(labels=[f"{name}_1" for name in TARGETS])
    with pytest.raises(ScreenError, match="the number is a guide's: set strip_guide_suffix: true"):
        loaded(adata, combo_delimiter="_")
    assert sound(loaded(adata, combo_delimiter="_", strip_guide_suffix=True))


def test_dropped_labels_are_exact_and_must_occur():
    screen = loaded(planted(), drop_labels=["KLF1"])
    assert "KLF1" not in screen.conditions and screen.audit["dropped_labels"] == {"KLF1": N}
    with pytest.raises(ScreenError, match="drop_labels: expected labels .* got 'KLF'; nearest: 'KLF1'"):
        loaded(planted(), drop_labels=["KLF"])
    with pytest.raises(ScreenError, match="target_map: expected labels .* got 'KLF'"):
        loaded(planted(), target_map={"KLF": "KLF1"})


# -- values ------------------------------------------------------------------------------------------------


def cells(n_cells=200, n_genes=600, seed=0):
    """Counts of cells whose depths differ as those of real ones do."""
    rng = np.random.default_rng(seed)
    depth = 4000 * rng.lognormal(0, 0.5, (n_cells, 1))
    share = rng.lognormal(0, 1.5, n_genes)
    return rng.poisson(depth * share / share.sum()).astype(np.float32)


def as_screen(x):
    import anndata

    names = [*TARGETS, *OTHERS, *(f"LINC{i:05d}" for i in range(x.shape[1] - 20))]
    labels = np.resize([*TARGETS, "ctrl"], len(x))
    return anndata.AnnData(
        csr_matrix(x),
        pd.DataFrame({"condition": labels}, index=[f"c{i}" for i in range(len(x))]),
        pd.DataFrame(index=names),
    )


# A part of the genes at the cells' own scale shows neither gaps nor equal totals: it is not among these.
@pytest.mark.parametrize(
    ("target", "part"),
    [(t, slice(None)) for t in (1e4, 1e6, "median")] + [(t, slice(0, 300)) for t in (1e4, 1e6)],
)
def test_rounded_normalised_values_are_refused(target, part):
    x = cells(1200)
    sums = x.sum(1, keepdims=True)
    rounded = np.rint(x / sums * (np.median(sums) if target == "median" else target))[:, part]
    with pytest.raises(CountsError, match="look normalised and then rounded.*scaled_counts: accept"):
        loaded(as_screen(rounded))
    loaded(as_screen(rounded), scaled_counts="accept", unmeasured_targets="accept")


def test_counts_of_cells_and_counts_drawn_down_to_one_depth_are_counts():
    x = cells()
    loaded(as_screen(x))
    rng = np.random.default_rng(1)
    deep = x[x.sum(1) > 1500].astype(int)
    drawn = np.array([rng.multivariate_hypergeometric(row, 1500) for row in deep], np.float32)
    assert (drawn.sum(1) == 1500).all()
    loaded(as_screen(drawn))
    loaded(as_screen(rng.poisson(2.0, x.shape).astype(np.float32)))
