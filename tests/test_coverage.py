"""Coverage by a vocabulary: hand-worked shares, and sentences that say what the tables say."""

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

from perturbret.data.conditions import CTRL
from perturbret.data.datasets import load_screen
from perturbret.data.genes import SymbolResolver
from perturbret.data.screen import Screen
from perturbret.report import coverage
from perturbret.report.coverage import (
    findings,
    highly_variable,
    mapped_genes,
    measure_coverage,
    write_coverage,
)
from perturbret.scgpt.vocabulary import SPECIALS, Vocabulary, load_vocabulary

RESOLVER = SymbolResolver(
    [
        ("BMAL2", "", ("ARNTL2",), ()),
        ("NALF1", "", ("OLD",), ()),
        ("CLECL1P", "", ("OLD",), ()),
        ("KLF1", "", (), ("EKLF",)),
    ]
)
GENES = ("BMAL2", "EKLF", "ACTB", "OLD", "NOVEL")
VOCABULARY = Vocabulary(("ACTB", "ARNTL2", "KLF1", "NALF1", "CLECL1P", *SPECIALS), "toy tokens")
# Cells of KLF1, KLF1, ARNTL2+GONE, ctrl; UMIs per gene 10, 4, 60, 6, 20 of 100.
COUNTS = [[2, 2, 16, 0, 0], [3, 1, 16, 0, 0], [5, 0, 9, 3, 13], [0, 1, 19, 3, 7]]
CONDITIONS = ("KLF1", "KLF1", "ARNTL2+GONE", CTRL)


def make_screen(counts=COUNTS, conditions=CONDITIONS, genes=GENES):
    counts = csr_matrix(np.array(counts, np.float32))
    total = np.asarray(counts.sum(axis=1)).ravel().astype(float)
    names = [f"cell{i}" for i in range(counts.shape[0])]
    obs = pd.DataFrame({"condition": conditions, "total": total}, index=names)
    return Screen("toy", counts, np.array(genes), obs)


@pytest.fixture
def covered():
    return measure_coverage(make_screen(), VOCABULARY, resolver=RESOLVER)


def test_shares_before_and_after_mapping(covered):
    rows = covered.summary.set_index("set")
    whole = rows.loc["all genes"]
    assert whole[["n", "before", "after", "umis"]].tolist() == [5, 1, 3, 100]
    assert whole[["share_before", "share_after"]].tolist() == [0.2, 0.6]
    assert whole[["umi_share_before", "umi_share_after"]].tolist() == [0.6, 0.74]
    assert rows.loc["highly variable genes"].tolist() == whole.tolist()
    # ARNTL2 and KLF1 are tokens, GONE is none. Measured as BMAL2 and EKLF, of 10 and 4 UMIs, neither by own name.
    named = rows.loc["targets"]
    assert named[["n", "before", "after", "umis"]].tolist() == [3, 2, 2, 14]
    assert named[["umi_share_before", "umi_share_after"]].tolist() == [0, 1]


def test_targets_are_listed_with_what_measures_them(covered):
    table = covered.targets.set_index("target")
    assert table["token"].to_dict() == {"ARNTL2": "ARNTL2", "GONE": None, "KLF1": "KLF1"}
    assert table["measured"].to_dict() == {"ARNTL2": "BMAL2", "GONE": "", "KLF1": "EKLF"}
    assert table["n_conditions"].tolist() == [1, 1, 1]
    assert covered.genes.query("target")["gene"].tolist() == ["BMAL2", "EKLF"]


def test_conditions_that_lose_a_target_or_umis_are_affected(covered):
    table = covered.conditions.set_index("condition")
    assert table.index.tolist() == ["ARNTL2+GONE", "KLF1"]
    assert table["n_cells"].tolist() == [1, 2]
    assert table["without_token"].tolist() == ["GONE", ""]
    assert table["umi_share_before"].tolist() == pytest.approx([9 / 30, 32 / 40])
    assert table["umi_share_after"].tolist() == pytest.approx([14 / 30, 1])
    assert table["affected"].tolist() == [True, False]


def test_umis_alone_make_a_condition_affected():
    counts = [[2, 2, 16, 0, 0], [1, 1, 16, 0, 1], [5, 0, 15, 0, 0], [0, 0, 9, 0, 9]]
    conditions = ("KLF1", "KLF1", "BMAL2", "ACTB")
    table = measure_coverage(make_screen(counts, conditions), VOCABULARY, resolver=RESOLVER).conditions
    assert table.set_index("condition")["affected"].to_dict() == {"ACTB": True, "BMAL2": False, "KLF1": False}


def test_what_was_found_and_what_is_left_is_listed_by_umis(covered):
    assert mapped_genes(covered).values.tolist() == [
        ["BMAL2", "ARNTL2", "previous", 10],
        ["EKLF", "KLF1", "alias", 4],
    ]
    left = coverage.genes_without_token(covered)
    assert left.values.tolist() == [
        ["NOVEL", "missing", "", 20, False],
        ["OLD", "ambiguous", "NALF1, CLECL1P", 6, False],
    ]


def test_sentences_warn_and_name_the_affected(covered):
    text = findings(covered)
    assert "**1 → 3 of 5 genes** have a token" in text and "20.0% → 60.0%; of the UMIs 60.0% → 74.0%" in text
    assert "Mapping found 1 by previous symbol, 1 by alias." in text
    assert "2 → 2 of 3 targets have a token; the panel measures 2" in text
    assert "1 gene whose name may mean several tokens or genes: OLD." in text
    assert "1 gene that the vocabulary does not know: NOVEL." in text
    assert (
        "**Warning:** coverage is below 95% after mapping: all genes 60.0% by number; all genes 74.0% by UMIs"
        in text
    )
    assert "targets 66.7% by number" in text and "targets 100.0%" not in text
    assert "1 of 2 conditions: ARNTL2+GONE." in text


def test_sentences_do_not_warn_where_nothing_is_missing():
    screen = make_screen([[1, 2, 3], [3, 2, 1]], ("KLF1", CTRL), ("BMAL2", "KLF1", "ACTB"))
    text = findings(measure_coverage(screen, VOCABULARY, resolver=RESOLVER))
    assert "Warning" not in text and "left out of scGPT's input" not in text
    assert "Coverage is 95% or more for every set, and no condition is affected." in text


def test_sentences_say_when_a_low_share_affects_no_condition():
    screen = make_screen([[40, 59, 1], [40, 59, 1]], ("KLF1", CTRL), ("KLF1", "ACTB", "NOVEL"))
    text = findings(measure_coverage(screen, VOCABULARY, resolver=RESOLVER))
    assert "**Warning:** coverage is below 95% after mapping: all genes 66.7% by number; highly" in text
    assert (
        "No condition has a target without token, and each keeps at least 99.0% of its cells' UMIs." in text
    )


def test_sentences_name_a_condition_that_good_coverage_leaves_out():
    genes = [f"G{i}" for i in range(40)]
    among = Vocabulary((*genes, *SPECIALS), "toy tokens")
    labels = [*genes[:20], "GONE"]
    screen = make_screen(np.ones((21, 40)), labels, genes)
    text = findings(measure_coverage(screen, among, resolver=RESOLVER))
    assert "Warning" not in text and "still affected are 1 of 21 conditions: GONE." in text


def test_long_lists_are_cut_with_their_number():
    genes = ["ACTB", *(f"G{i:02d}" for i in range(13))]
    text = findings(
        measure_coverage(make_screen(np.ones((1, 14)), ("KLF1",), genes), VOCABULARY, resolver=RESOLVER)
    )
    assert "13 genes that the vocabulary does not know: G00, " in text and "G09 and 3 more." in text


def test_conditions_without_any_umi_have_no_share():
    screen = make_screen([[0, 0, 0, 0, 0], [0, 0, 9, 0, 0]], ("KLF1", "ACTB"))
    found = measure_coverage(screen, VOCABULARY, resolver=RESOLVER)
    assert found.conditions["umi_share_after"].isna().tolist() == [False, True]
    assert "nan" not in findings(found)


def test_a_screen_of_controls_has_no_targets():
    screen = make_screen([[0, 0, 9, 0, 0]], (CTRL,))
    found = measure_coverage(screen, VOCABULARY, resolver=RESOLVER)
    assert len(found.targets) == len(found.conditions) == 0
    assert "The screen names no targets." in findings(found) and "nan" not in findings(found)


def test_variable_genes_are_those_that_vary_beyond_depth():
    rng = np.random.default_rng(0)
    level = np.exp(rng.uniform(1, 4, 200))
    depth = rng.choice([1, 19], 300)[:, None]
    counts = rng.poisson(level * depth)
    # As many in a shallow cell as in a deep one; after scaling their mean is that of others of their level.
    planted = np.array([4, 5, 6, 80, 81, 82])
    counts[:, planted] = rng.poisson(level[planted] * 1.9, (300, len(planted)))
    screen = make_screen(counts, ["KLF1"] * 300, [f"G{i}" for i in range(200)])
    chosen = np.flatnonzero(highly_variable(screen, 12))
    assert len(chosen) == 12 and set(planted) <= set(chosen)
    assert (screen.counts.toarray() == counts).all()


def test_a_small_panel_counts_as_variable_as_a_whole():
    assert highly_variable(make_screen(), 5).all()
    with pytest.raises(ValueError, match="n_hvg: expected at least 1, got 0"):
        highly_variable(make_screen(), 0)


def test_tables_are_written_and_read_back(covered, tmp_path):
    write_coverage(covered, tmp_path / "vocab")
    files = sorted(path.name for path in (tmp_path / "vocab").iterdir())
    assert files == ["collisions.csv", "conditions.csv", "coverage.csv", "genes.csv", "targets.csv"]
    genes = pd.read_csv(tmp_path / "vocab" / "genes.csv")
    assert genes["token_id"].tolist() == [1, 2, 0, -1, -1] and genes["gene"].tolist() == list(GENES)
    written = pd.read_csv(tmp_path / "vocab" / "coverage.csv")
    pd.testing.assert_frame_equal(written, covered.summary, check_dtype=False)


def test_the_table_of_the_page_says_before_and_after(covered):
    from perturbret.report.tables import coverage_table

    shown = coverage_table(covered.summary)
    assert shown.loc["all genes"].tolist() == ["1 → 3 of 5", "20.0% → 60.0%", "60.0% → 74.0%", "100"]
    empty = measure_coverage(make_screen([[0, 0, 9, 0, 0]], (CTRL,)), VOCABULARY, resolver=RESOLVER).summary
    assert coverage_table(empty).loc["targets"].tolist() == ["0 → 0 of 0", "–", "–", "0"]


def test_the_figure_shows_both_shares_of_each_set(covered):
    from perturbret.report.figures import vocab_coverage

    figure = vocab_coverage(covered.summary, warn_below=0.95)
    for axis, kind in zip(figure.axes, ("share", "umi_share"), strict=True):
        shown = [line.get_xdata().tolist() for line in axis.lines[:2]]
        assert shown == [covered.summary[f"{kind}_{when}"][::-1].tolist() for when in ("before", "after")]
        low, high = axis.get_xlim()
        assert low <= min(map(min, shown)) and high >= max(map(max, shown))


def test_real_screen_is_covered_after_mapping(real_data):
    found = measure_coverage(load_screen("norman_subset"), load_vocabulary())
    for row in found.summary.iloc[:2].itertuples():
        assert (row.n, row.before, row.after) == (500, 491, 500)
        assert 0.999 < row.umi_share_before < 1 and row.umi_share_after == 1
    assert found.summary["after"].iloc[2] == found.summary["n"].iloc[2] == 31
    assert not found.conditions["affected"].any()
    assert "**491 → 500 of 500 genes**" in findings(found) and "Warning" not in findings(found)
