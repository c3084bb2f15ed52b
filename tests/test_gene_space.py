"""A common order of genes: a checkpoint with another one is refused by name."""

from dataclasses import replace

import pandas as pd
import pytest
from toy import gene_space as space

from perturbret.alignment.gene_space import (
    GeneSpace,
    GeneSpaceMismatch,
    check_gene_space,
    hash_genes,
    place_panel,
)


def test_an_unchanged_space_passes_and_a_hash_tells_order():
    check_gene_space(space(), ["C", "A", "B"])
    check_gene_space(["C", "A", "B"], space(ensembl_ids=(None,) * 3))
    check_gene_space(pd.Index(["C", "A", "B"]), space())
    assert hash_genes("CAB") == space().hash != hash_genes("ABC")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["C", "X", "Y"], "position 1: A against X, position 2: B against Y; take weights"),
        (["A", "B", "C"], "position 0: C against A.*the genes are the same in another order"),
        (pd.Index(["C", "A", "X"]), "position 2: B against X"),
        (
            ["C", "A"],
            "the checkpoint has 3 genes, the data 2.*from position 2 on only the checkpoint has genes: B",
        ),
        (["C", "A", "B", "D"], "from position 3 on only the data has genes: D"),
    ],
)
def test_another_gene_space_is_refused_and_the_first_genes_named(data, said):
    with pytest.raises(GeneSpaceMismatch, match=said):
        check_gene_space(space(), data)


def test_only_the_first_genes_are_named():
    with pytest.raises(GeneSpaceMismatch) as caught:
        check_gene_space([f"a{i}" for i in range(2000)], [f"b{i}" for i in range(2000)])
    assert "position 4: a4" in str(caught.value) and "position 5" not in str(caught.value)


class TestPanel:
    """Which gene of a space each column of a panel is."""

    def of(self, names, ids=None):
        """A space of the given genes that was made for no panel of these tests."""
        n = len(names)
        columns = replace(
            space().maps["a"], columns=tuple((i,) for i in range(n)), column_names=tuple((name,) for name in names),
            n_columns=n, mean=(0.0,) * n, variance=(0.0,) * n, n_detected=(0,) * n, genes_sha256="",
        )  # fmt: skip
        return GeneSpace(tuple(names), ids or (None,) * n, {"a": columns}, {}, {})

    def test_a_panel_that_the_space_was_made_for_is_placed_by_its_map(self):
        assert place_panel(space(), list("ABCD")) == ["A", "B", "C", None]
        # Names in the file stand for what the map says, whatever HGNC would make of them.
        renamed = replace(space().maps["a"], genes_sha256=hash_genes(["TP53", "X", "Y", "Z"]))
        assert place_panel(space(maps={"a": renamed}), ["TP53", "X", "Y", "Z"]) == ["A", "B", "C", None]
        with pytest.raises(GeneSpaceMismatch, match="2 columns of b are C, expected one; remap"):
            place_panel(space(), list("CxxbxC"))

    @pytest.mark.parametrize(
        ("names", "ids", "panel"),
        [
            (["TP53", "GAPDH"], None, ["TP53", "GAPDH"]),
            (["TP53", "NALF1"], None, ["TP53", "FAM155A"]),
            (
                ["TP53", "GAPDH"],
                ("ENSG00000141510", "ENSG00000111640"),
                ["ENSG00000141510.4", "ENSG00000111640"],
            ),
            # An old name kept its own gene, since the panel has both names.
            (["FAM155A", "NALF1"], None, ["FAM155A", "NALF1"]),
            # Names of the first dataset, genes matched by id.
            (["TP53", "FAM155A"], ("ENSG00000141510", "ENSG00000204442"), ["TP53", "NALF1"]),
        ],
    )
    def test_the_space_itself_under_other_names(self, names, ids, panel):
        assert place_panel(self.of(names, ids), panel) == names

    def test_other_genes_and_other_orders_are_refused_by_name(self):
        with pytest.raises(GeneSpaceMismatch, match="position 0: TP53 against GAPDH.*another order"):
            place_panel(self.of(["TP53", "GAPDH"]), ["GAPDH", "TP53"])
        with pytest.raises(GeneSpaceMismatch, match="position 1: GAPDH against NALF1"):
            place_panel(self.of(["TP53", "GAPDH"]), ["TP53", "FAM155A"])
        with pytest.raises(
            GeneSpaceMismatch, match="from position 1 on only the checkpoint has genes: GAPDH"
        ):
            place_panel(self.of(["TP53", "GAPDH"]), ["TP53"])
