"""Genes that an answer hangs on."""

import numpy as np
import toy

from perturbret.evaluation.occlusion import occlusion


def prepared():
    """Condition A is gene 0, B is gene 1, C is gene 2; gene 3 is everywhere."""
    labels, roles, counts = [], [], []
    for condition, gene in (("A", 0), ("B", 1), ("C", 2)):
        for number in range(8):
            labels.append(condition)
            roles.append("train" if number < 5 else "query")
            counts.append([9 * (gene == i) for i in range(3)] + [4, 0])
    return toy.toy_cells(labels, roles, counts=np.array(counts, float))


def test_the_gene_that_makes_a_condition_is_found_and_no_other():
    cells = prepared()
    encoder = toy.ToyEncoder(cells, lambda c: np.log1p(c.counts.toarray()))
    for scoring in ("cosine", "whitened"):
        table = occlusion(encoder, cells, ["A", "C"], library="mean", scoring=scoring, n_genes=3)
        first = table.groupby("condition").first()
        assert first["gene"].to_dict() == {"A": "gene0", "C": "gene2"} and (first["fall"] > 0.3).all()
        assert (first["expressed"] == 1).all() and (first["n_cells"] == 3).all()
        others = table[~table["gene"].isin(first["gene"])]
        assert (others["fall"].abs() < first["fall"].min() / 2).all() and len(table) == 6


def test_a_classifier_is_asked_through_its_classes():
    cells = prepared()
    weights = np.zeros((5, 3))
    weights[[0, 1, 2], [0, 1, 2]] = 1
    encoder = toy.ToyEncoder(cells, lambda c: c.counts.toarray(), weights=weights)
    table = occlusion(encoder, cells, ["B"], library="none", scoring="classifier", n_genes=2)
    assert table["gene"].iloc[0] == "gene1"
    # log p(B) - mean log p(others) is 9 with the gene and 0 without.
    assert abs(table["fall"].iloc[0] - 9) < 1e-3 and table["error"].iloc[0] == 0


def test_the_total_loses_what_the_gene_counted():
    cells, totals = prepared(), []
    encoder = toy.ToyEncoder(cells, lambda c: totals.append(c.totals.copy()) or np.log1p(c.counts.toarray()))
    occlusion(encoder, cells, ["A"], library="mean", scoring="cosine", n_genes=1)
    assert totals[-2].tolist() == [13.0] * 3 and totals[-1].tolist() == [4.0] * 3
