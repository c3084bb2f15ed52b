"""Tables as the notebooks show them: estimates with their intervals in one cell, best first."""

import pandas as pd

from .compare import LEAK_FREE
from .contenders import CEILING
from .figures import method_name
from .gene_space import GeneSpace
from .metrics import coverage_area
from .report import Report, validity
from .wording import from_to


def interval_table(summary: pd.DataFrame, metrics: list[str], *, rows: list[str]) -> pd.DataFrame:
    """Estimates as `0.181 [0.150, 0.215]`, metrics as columns, sorted by the first metric.

    Parameters
    ----------
    summary : pandas.DataFrame
        With columns metric, estimate, ci_low, ci_high and those named in `rows`.
    metrics : list of str
        Metrics to show, in order; those that the table lacks are left out.
    rows : list of str
        Columns that make up the index.
    """
    shown = [metric for metric in metrics if metric in set(summary["metric"])]
    part = summary[summary["metric"].isin(shown)]
    order = part[part["metric"] == shown[0]].sort_values("estimate", ascending=False)
    text = part.assign(text=[with_interval(row) for row in part.itertuples()])
    wide = text.pivot(index=rows, columns="metric", values="text")
    return wide.reindex(pd.MultiIndex.from_frame(order[rows]) if len(rows) > 1 else order[rows[0]])[shown]


def coverage_table(summary: pd.DataFrame) -> pd.DataFrame:
    """What of each set of genes has a token, before and after mapping, in a row; see `perturbret.coverage`."""
    rows = list(summary.itertuples())
    return pd.DataFrame(
        {
            "with a token": [f"{row.before:,} → {row.after:,} of {row.n:,}" for row in rows],
            "by number": [from_to(row.share_before, row.share_after) for row in rows],
            "by UMIs": [from_to(row.umi_share_before, row.umi_share_after) for row in rows],
            "UMIs": [f"{row.umis:,.0f}" for row in rows],
        },
        index=summary["set"].tolist(),
    )


def gene_space_lines(space: GeneSpace) -> list[str]:
    """What was aligned, in Markdown sentences computed from the space."""
    settings, forced = space.settings, [i for i, kept in enumerate(space.table["perturbed"]) if kept]
    few = sum(space.table["n_datasets"][i] < settings["min_datasets"] for i in forced)
    counted = ", ".join(f"{n:,} in ≥ {k}" for k, n in settings["genes_in_at_least_n_datasets"].items())
    whose = settings["screen"] or "any data set"
    asked, by = settings["n"], settings["matched_by"]
    return [
        f"**{len(space):,} genes in a common order** (asked for: {asked:,}), matched by {by}; sha256 "
        f"`{space.hash[:12]}`.",
        f"Genes of {whose} by the number of data sets that measure them: {counted}; at least "
        f"{settings['min_datasets']} were asked for.",
        f"Perturbed genes among them: {len(forced)}, of which {few} are in fewer data sets than that.",
        *(f"**Note:** {note}." for note in space.notes),
    ]


def gene_space_table(space: GeneSpace, verified: pd.DataFrame) -> pd.DataFrame:
    """A row per data set: its cells, how many chosen genes it measures and under which names, what was verified."""
    rows = {}
    checked = verified.set_index("dataset")
    for name, columns in space.maps.items():
        pairs = list(zip(space.names, columns.column_names, strict=True))
        n_genes, n_counted, n_cells = checked.loc[name, ["n_genes", "n_counted", "n_cells"]]
        rows[name] = {
            "cells": f"{columns.n_cells:,} ({columns.cells.split(' (')[0]})",
            "its genes": f"{columns.n_columns:,}",
            "chosen genes": sum(len(names) > 0 for _, names in pairs),
            "under another name": sum(any(other != gene for other in names) for gene, names in pairs),
            "10,000 / UMIs": f"{columns.noise:.2f}",
            "compared by value": f"{n_genes} genes ({n_counted} with counts) × {n_cells:,} cells",
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def comparison_table(report: Report) -> pd.DataFrame:
    """Every method on single cells under the leak-free mask, against the best baseline."""
    rows = report.rows(query_size=1).sort_values("estimate", ascending=False)
    macro = report.rows(average="macro", query_size=1).set_index(["encoder", "scoring"])["estimate"]
    verdicts = validity(report)
    verdicts = verdicts[verdicts["mask"] == LEAK_FREE].set_index("encoder")["verdict"]
    unmasked = set(report.readouts.loc[report.readouts["unmasked"], "encoder"])
    table = pd.DataFrame(
        {
            "method": [method_name(row.encoder, row.scoring) for row in rows.itertuples()],
            "library": rows["library"].to_numpy(),
            "chosen read-out": ["yes" if primary else "" for primary in rows["primary"]],
            "exact_hit@1": [with_interval(row) for row in rows.itertuples()],
            "macro": [f"{macro[row.encoder, row.scoring]:.3f}" for row in rows.itertuples()],
            "difference": [_difference(row) for row in rows.itertuples()],
            "null control": [
                verdicts[row.encoder] + ("; computed before masking" if row.encoder in unmasked else "")
                for row in rows.itertuples()
            ],
            "p_holm": ["" if pd.isna(row.p_holm) else f"{row.p_holm:.2g}" for row in rows.itertuples()],
        }
    )
    return table.set_index("method")


def difference_table(table: pd.DataFrame) -> pd.DataFrame:
    """Paired differences with their intervals; see `perturbret.adaptation.adaptation`."""
    return pd.DataFrame(
        {
            "method": table["method"],
            "against": table["against"],
            "question": table["question"],
            **{
                metric: [
                    f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
                    for value, low, high in table[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy(float)
                ]
                for metric in ("exact_hit@1", "mrr")
            },
        }
    )


def metric_table(report: Report, metrics: list[str]) -> pd.DataFrame:
    """Primary read-outs on single cells under the leak-free mask, several metrics, with chance as last row."""
    rows = pd.concat([report.single(metric=metric) for metric in metrics])
    table = interval_table(rows, metrics, rows=["encoder"]).rename(index={CEILING: "Bayes ceiling"})
    table.loc["chance"] = [f"{report.chance[metric]:.3f}" for metric in table.columns]
    return table


def area_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Area under each encoder's coverage-accuracy curve, beside the accuracy over all queries (an empty margin's)."""
    rows = {}
    for encoder, part in scores.groupby("encoder"):
        margin, hit = part["margin"].to_numpy(), part["exact_hit@1"].to_numpy()
        rows[encoder] = {"area": coverage_area(margin, hit), "accuracy over all queries": hit.mean()}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("area", ascending=False)


def with_interval(row) -> str:
    """`0.181 [0.150, 0.215]` from a row with estimate, ci_low and ci_high."""
    return f"{row.estimate:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"


def _difference(row) -> str:
    if row.encoder == row.baseline and row.primary:
        return "the baseline"
    return f"{row.difference:+.3f} [{row.diff_low:+.3f}, {row.diff_high:+.3f}]"
