"""Tables as the notebooks show them: estimates with their intervals in one cell, best first."""

import pandas as pd

from ..alignment.gene_space import GeneSpace
from ..evaluation.confidence import COVERAGE
from ..evaluation.metrics import metric_columns
from ..evaluation.readouts import readout_name
from .ablation import Report, validity
from .compare import LEAK_FREE, SHOWN, display_name
from .wording import difference, from_to, spread, with_interval, with_p


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
    """What of each set of genes has a token, before and after mapping, in a row; see `perturbret.report.coverage`."""
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


def method_table(report: Report) -> pd.DataFrame:
    """Every method on single cells, mask all_targets: by itself, over the nuisance, against the baseline."""
    mrr = report.single(metric="mrr").set_index("encoder")["estimate"]
    nulls = validity(report).set_index(["encoder", "mask"])["verdict"]
    chosen = report.readouts.query("mask == @LEAK_FREE").set_index("encoder")
    against, excess = report.asked("baseline"), report.asked("nuisance")
    alone = {
        "nuisance": "reads no expression",
        "ceiling": "ceiling",
        "precomputed": "computed before masking",
    }
    table = []
    for row in report.single().itertuples():
        name, choice = row.encoder, chosen.loc[row.encoder]
        stable = f"; best of {choice.n_readouts}, {choice.stability:.0%}" if choice.n_readouts > 1 else ""
        cells = {"method": display_name(name), "exact_hit@1": with_interval(row)}
        cells |= {"spread": spread(row.spread, row.n_repeats), "mrr": f"{mrr[name]:.3f}"}
        if report.nuisance:
            cells[f"over {report.nuisance}"] = difference(excess.loc[name]) if name in excess.index else ""
        verdict = "the baseline" if name == report.baseline else alone.get(choice.role, "")
        paired = ""
        if name in against.index:
            found = against.loc[name]
            paired = f"{difference(found)} at {readout_name(found.scoring, found.library)}"
            verdict = with_p(found)
        if nulls[name, LEAK_FREE] != "holds":
            verdict = "; ".join(filter(None, [verdict, "INVALID: null control"]))
        cells |= {"against the baseline": paired, "verdict": verdict}
        table.append({**cells, "read-out": readout_name(row.scoring, row.library) + stable})
    return pd.DataFrame(table).set_index("method").rename_axis(None)


def track_table(report: Report) -> pd.DataFrame:
    """exact_hit@1 of every method wherever it was run: a column per track and share of labels, each with its own
    candidates.

    The verdict is that against the track's own baseline. What is not comparable between columns is the level: read each
    against its chance, the last row.
    """
    columns = {}
    for part in [report, *report.others]:
        verdicts = {**part.asked("baseline")["verdict"], part.baseline: "the baseline"}
        cells = {
            row.encoder: "; ".join(filter(None, [with_interval(row), verdicts.get(row.encoder, "")]))
            for row in part.single().itertuples()
        }
        share = "" if part.train_share == 1 else f", {part.train_share:.0%} of the labels"
        columns[f"{part.track}{share} ({part.candidates})"] = {
            **cells,
            "chance": f"{part.chance['exact_hit@1']:.3f}",
        }
    table = pd.DataFrame(columns).fillna("")
    order = [name for name in table.index if name != "chance"]
    return table.loc[[*order, "chance"]].rename(index=display_name)


def readout_table(report: Report) -> pd.DataFrame:
    """exact_hit@1 of every method at the same read-outs, single cells; `chosen`: best of k on validation cells."""
    rows = report.rows(query_size=1)
    at = [readout_name(row.scoring, row.library) for row in rows.itertuples()]
    order = report.single()["encoder"]
    wide = rows.assign(at=at, text=[*map(with_interval, rows.itertuples())])
    wide = wide.pivot(index="encoder", columns="at", values="text").reindex(order)
    wide = wide[[name for name in (readout_name(*pair) for pair in SHOWN) if name in wide]].fillna("")
    chosen = report.readouts.query("mask == @LEAK_FREE").set_index("encoder").loc[order]
    wide["chosen"] = [readout_name(row.scoring, row.library) for row in chosen.itertuples()]
    wide["among"] = chosen["n_readouts"]
    wide["chosen again"] = [f"{value:.0%}" for value in chosen["stability"]]
    return wide.rename(index=display_name).rename_axis(index=None, columns=None)


def pool_table(report: Report) -> pd.DataFrame:
    """exact_hit@1 by cells per query, scores pooled, in the order of the single cells; few queries, wide intervals."""
    rows = report.rows(primary=True)
    rows = rows[rows["pooling"].isin(["single", "scores"])]
    columns = [f"{size} ({n:,} queries)" for size, n in rows.groupby("query_size")["n_queries"].max().items()]
    text = rows.assign(text=[*map(with_interval, rows.itertuples())])
    wide = text.pivot(index="encoder", columns="query_size", values="text")
    wide = wide.reindex(report.single()["encoder"])
    return wide.set_axis(columns, axis=1).fillna("").rename(index=display_name).rename_axis(None)


def metric_table(report: Report, metrics: list[str] | None = None) -> pd.DataFrame:
    """Chosen read-outs on single cells, mask all_targets: several metrics and macro exact_hit@1, with chance last.

    metrics : those registered as `tabled`, unless given.
    """
    metrics = metrics or [name for name in metric_columns("tabled") if name in report.chance]
    rows = pd.concat([report.single(metric=metric) for metric in metrics])
    table = interval_table(rows, metrics, rows=["encoder"])
    macro = report.single(average="macro").set_index("encoder").loc[table.index]
    chance = [f"{report.chance[metric]:.3f}" for metric in table.columns]
    table["exact_hit@1, macro"] = [with_interval(row) for row in macro.itertuples()]
    table = table.rename(index=display_name).rename_axis(index=None, columns=None)
    table.loc["chance"] = [*chance, ""]
    return table


def null_table(report: Report) -> pd.DataFrame:
    """The null control by method and mask, with the smallest leak that it would find."""
    found = validity(report)
    return pd.DataFrame(
        {
            "method": [display_name(name) for name in found["encoder"]],
            "mask": found["mask"],
            "runs": found["runs"],
            "not holding": found["not holding"],
            "exact_hit@1, permuted labels": [with_interval(row) for row in found.itertuples()],
            "luck": [f"{value:.3f}" for value in found["luck"]],
            "verdict": found["verdict"],
            "finds leaks from": [f"{value:.3f}" for value in found["detectable"]],
        }
    )


def confidence_table(report: Report) -> pd.DataFrame:
    """How far single answers can be trusted, mask all_targets: means over seeds of estimates and of interval ends.

    Each run at the read-out that its own validation cells chose. Methods in the order of the single cells.
    """
    rows = report.confidence[report.confidence["mask"] == LEAK_FREE]
    means = rows.groupby(["quantity", "encoder"])[["estimate", "ci_low", "ci_high"]].mean()
    shown = {
        "ece": ("ECE", with_interval),
        "ece_if_calibrated": ("ECE by luck", lambda row: f"{row.estimate:.3f}"),
        "conformal_lac_coverage": (f"{COVERAGE:.0%} sets hold the truth", with_interval),
        "conformal_lac_size": ("conditions in a set", lambda row: f"{row.estimate:.1f}"),
        "coverage_area": ("area", with_interval),
        "answered@0.5": ("answered where 50% would be right", lambda row: f"{row.estimate:.1%}"),
    }
    found = [name for name in report.single()["encoder"] if name in set(rows["encoder"])]
    table = {
        title: [written(means.loc[quantity, name]) for name in found]
        for quantity, (title, written) in shown.items()
    }
    return pd.DataFrame(table, index=[display_name(name) for name in found])
