"""Figures of the notebooks: tables in, matplotlib figures out; no arithmetic beyond what is drawn."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .compare import CEILING, LEAK_FREE, display_name

MASK_COLOURS = {"all_targets": "#1b6ca8", "none": "#8a8a8a", "own_targets": "#c1440e"}
MASK_NAMES = {"all_targets": "all_targets", "none": "none", "own_targets": "own_targets (unsafe)"}
_CURVE = {"ms": 4, "lw": 1.6}
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,  # labels may hold a dollar sign
}


def new_figure(width: float = 8.0, height: float = 4.0, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A styled figure with `columns` axes in a row, sizes in inches."""
    _use_page()
    mpl.rcdefaults()  # whatever the user's matplotlibrc says
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


def _use_page() -> None:
    """In a notebook, draw into the page: MPLBACKEND or a matplotlibrc may name a backend that draws nowhere."""
    import IPython

    shell = IPython.get_ipython()
    # The backends of Jupyter (inline, ipympl, ...), one of which the user may have chosen there, come as modules.
    names = ("module://", "inline", "ipympl", "nbagg", "widget", "notebook")
    if hasattr(shell, "kernel") and not mpl.get_backend().lower().startswith(names):
        shell.enable_matplotlib("inline")


def method_ladder(
    table: pd.DataFrame, roles: dict[str, str], *, chance: float, prior: float, metric: str = "exact_hit@1"
) -> Figure:
    """Dots with 95% intervals, one row per method, best at the top; chance and class prior as lines.

    `roles` are those of `perturbret.report.compare.role_of`: hollow dots read no expression, diamonds know the truth.
    """
    rows = table.sort_values("estimate")
    figure, (axis,) = new_figure(8, 0.9 + 0.27 * len(rows))
    for y, row in enumerate(rows.itertuples()):
        role = roles[row.encoder]
        colour = {"ceiling": "#3f8f4f", "nuisance": "#8a8a8a"}.get(role, MASK_COLOURS[LEAK_FREE])
        fill = "white" if role == "nuisance" else colour
        axis.plot([row.ci_low, row.ci_high], [y, y], color=colour, lw=2, alpha=0.6)
        axis.plot(row.estimate, y, "D" if role == "ceiling" else "o", color=colour, ms=6, mfc=fill)
    axis.set_yticks(range(len(rows)), [display_name(name) for name in rows["encoder"]])
    apart = abs(prior - chance) > 1e-3
    _line(axis, chance, "chance", ":", side="right" if apart else "center")
    if apart:
        _line(axis, prior, "class prior", "--", side="left")
    for bound in rows.loc[rows["encoder"] == CEILING, "estimate"]:
        _line(axis, bound, "Bayes ceiling", "-.")
    axis.set(xlabel=f"{metric}, single cells", xlim=(0, None), ylim=(-0.7, len(rows) - 0.3))
    axis.grid(axis="x", alpha=0.25)
    figure.suptitle(
        "Each method at its read-out chosen on validation; hollow: reads no expression; bars: 95% intervals",
        fontsize=9.5, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def masking_effect(table: pd.DataFrame, verdicts: pd.DataFrame) -> Figure:
    """Left: exact_hit@1 under each mask. Right: the null control under each mask against its luck level."""
    table = table[table["encoder"] != CEILING]
    order = table[table["mask"] == LEAK_FREE].sort_values("estimate")["encoder"].tolist()
    figure, (left, right) = new_figure(9.5, 1.3 + 0.36 * len(order), columns=2)
    masks = [mask for mask in MASK_COLOURS if mask in set(table["mask"])]
    for shift, mask in zip(np.linspace(0.22, -0.22, len(masks)), masks, strict=True):
        style = {"color": MASK_COLOURS[mask], "label": MASK_NAMES[mask]}
        for axis, source in ((left, table), (right, _mean_null(verdicts))):
            part = source.query("mask == @mask").set_index("encoder").reindex(order)
            y = np.arange(len(order)) + shift
            spread = [part["estimate"] - part["ci_low"], part["ci_high"] - part["estimate"]]
            axis.errorbar(
                part["estimate"], y, xerr=np.clip(spread, 0, None), fmt="o", ms=4.5, lw=1.5, **style
            )
            if axis is right:
                label = "luck level" if mask == masks[-1] else None
                axis.plot(part["luck"], y, "|", color="black", ms=9, label=label)
    left.set(xlabel="exact_hit@1, true labels", xlim=(0, None), title="What each mask shows")
    right.set(
        xlabel="exact_hit@1, permuted labels", xlim=(0, None), title="Null control: nothing to find here"
    )
    for axis, names in ((left, order), (right, [])):
        axis.set_yticks(range(len(order)), names or [""] * len(order))
        axis.grid(axis="x", alpha=0.25)
        axis.set_ylim(-0.6, len(order) - 0.4)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def paired_differences(table: pd.DataFrame) -> Figure:
    """Differences with 95% intervals, one panel per question; see `perturbret.report.compare.contrasts`.

    Filled where the verdict is better or worse, hollow where there is no clear difference or none was judged.
    """
    titles = {
        "baseline": "against the best\nsimple opponent",
        "adapting": "adapted\nagainst frozen",
        "pretraining": "pretrained\nagainst random",
    }
    questions = [question for question in titles if question in set(table["question"])]
    tallest = table["question"].value_counts().max()
    width = 2.8 + 0.075 * table["encoder"].str.len().max()
    figure, axes = new_figure(width * len(questions), 1.1 + 0.26 * tallest, columns=len(questions))
    colour = MASK_COLOURS[LEAK_FREE]
    for axis, question in zip(axes, questions, strict=True):
        part = table[table["question"] == question].sort_values("difference")
        for y, row in enumerate(part.itertuples()):
            axis.plot([row.low, row.high], [y, y], color=colour, lw=2, alpha=0.6)
            fill = colour if row.verdict in ("better", "worse") else "white"
            axis.plot(row.difference, y, "o", color=colour, ms=6, mfc=fill)
        axis.axvline(0, color="#555", lw=1, ls=":")
        axis.set_yticks(range(len(part)), [display_name(name) for name in part["encoder"]])
        opponents = part["against"].unique()
        named = f" ({opponents[0]})" if question == "baseline" and len(opponents) == 1 else ""
        axis.set(
            title=titles[question] + named, xlabel="difference of exact_hit@1", ylim=(-0.7, tallest - 0.3)
        )
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.25)
    return figure


def top_k_curves(table: pd.DataFrame, chance: dict[str, float]) -> Figure:
    """exact_hit@k and relevant_hit@k over k = 1, 5, 8, 10 for every method, with chance."""
    figure, axes = new_figure(9.5, 3.9, columns=2)
    ks = (1, 5, 8, 10)
    for axis, kind in zip(axes, ("exact_hit", "relevant_hit"), strict=True):
        rows = table[table["metric"].str.startswith(f"{kind}@")]
        wide = rows.pivot(index="encoder", columns="metric", values="estimate")
        for colour, (name, values) in zip(_palette(len(wide)), wide.iterrows(), strict=True):
            found = [k for k in ks if f"{kind}@{k}" in values]
            axis.plot(found, [values[f"{kind}@{k}"] for k in found], "o-", color=colour, label=name, **_CURVE)
        found = [k for k in ks if f"{kind}@{k}" in chance]
        axis.plot(found, [chance[f"{kind}@{k}"] for k in found], "k:", lw=1.2, label="chance")
        axis.set(xlabel="k (length of the ranked list)", ylabel=f"{kind}@k", xticks=ks, ylim=(0, 1))
        axis.grid(alpha=0.25)
    axes[0].set_title("The exact condition is among the first k")
    axes[1].set_title("A condition sharing a target is among the first k")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def query_size_curves(table: pd.DataFrame, chance: float) -> Figure:
    """exact_hit@1 against cells per query, one panel per way of pooling."""
    poolings = [name for name in ("scores", "embeddings", "expression") if name in set(table["pooling"])]
    figure, axes = new_figure(10, 3.6, columns=max(len(poolings), 1))
    encoders = sorted(set(table["encoder"]))
    for axis, pooling in zip(axes, poolings or ["single"], strict=True):
        part = table[table["pooling"].isin([pooling, "single"])].sort_values("query_size")
        for colour, encoder in zip(_palette(len(encoders)), encoders, strict=True):
            rows = part.query("encoder == @encoder")
            sizes = rows["query_size"]
            axis.fill_between(sizes, rows["ci_low"], rows["ci_high"], color=colour, alpha=0.1, lw=0)
            axis.plot(sizes, rows["estimate"], "o-", color=colour, label=encoder, **_CURVE)
        axis.axhline(chance, color="black", ls=":", lw=1, label="chance")
        sizes = sorted(set(part["query_size"]))
        axis.set_xscale("log")
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.set(xlabel="cells per query", ylim=(0, 1), title=f"pooled {pooling}")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact_hit@1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def condition_hits(table: pd.DataFrame, chance: float, title: str) -> Figure:
    """Per-condition exact_hit@1 with intervals, sorted; at most the 20 best and 20 worst conditions."""
    rows = table.sort_values("estimate")
    if len(rows) > 40:
        rows = pd.concat([rows.head(20), rows.tail(20)])
    figure, (axis,) = new_figure(8, 0.9 + 0.2 * len(rows))
    y = np.arange(len(rows))
    axis.hlines(y, rows["ci_low"], rows["ci_high"], color=MASK_COLOURS[LEAK_FREE], alpha=0.5, lw=2)
    axis.plot(rows["estimate"], y, "o", color=MASK_COLOURS[LEAK_FREE], ms=4.5)
    axis.set_yticks(y, rows["condition"])
    _line(axis, chance, "chance", ":")
    axis.set(xlabel="exact_hit@1, single cells", xlim=(0, 1))
    axis.set_title(title, pad=16)
    axis.margins(y=0.02)
    return figure


def confusion_heatmap(confusion: pd.DataFrame, title: str) -> Figure:
    """Row-normalised confusion: rows true conditions, columns the conditions ranked first."""
    figure, (axis,) = new_figure(3.2 + 0.42 * len(confusion.columns), 2.0 + 0.34 * len(confusion))
    _heatmap(axis, confusion, top=float(confusion.to_numpy().max()))
    for (row, column), value in np.ndenumerate(confusion.to_numpy()):
        dark = value > 0.6 * confusion.to_numpy().max()
        place = {"ha": "center", "va": "center", "size": 7.5}
        axis.text(column + 0.5, row + 0.5, f"{value:.2f}", color="white" if dark else "black", **place)
    axis.set(xlabel="ranked first", ylabel="true condition", title=title)
    return figure


def coverage_curves(curves: dict[str, pd.DataFrame]) -> Figure:
    """Accuracy among the most confident share of queries, one line per method."""
    figure, (axis,) = new_figure(7, 3.6)
    for colour, (name, curve) in zip(_palette(len(curves)), curves.items(), strict=True):
        axis.plot(curve["coverage"], curve["accuracy"], lw=1.6, color=colour, label=name)
    axis.set(xlabel="share of queries answered, most confident first", ylabel="exact_hit@1 among them")
    axis.set_ylim(0, None)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right center")
    return figure


def reliability_diagram(table: pd.DataFrame) -> Figure:
    """Accuracy against probability of the condition ranked first; `perturbret.evaluation.confidence.Confidence`."""
    figure, (axis,) = new_figure(6, 4.2)
    top = min(1.0, 1.1 * max([0.1, *table["probability"], *table["accuracy"]]))
    axis.plot([0, top], [0, top], color="black", ls=":", lw=1, label="perfectly calibrated")
    looks = {"uncalibrated": ("#8a8a8a", "white"), "calibrated": (MASK_COLOURS[LEAK_FREE],) * 2}
    for stage, part in table.groupby("stage", sort=False):
        colour, fill = looks[stage]
        if stage == "calibrated":
            axis.vlines(part["probability"], part["ci_low"], part["ci_high"], color=colour, lw=2, alpha=0.5)
        axis.plot(part["probability"], part["accuracy"], "o-", color=colour, mfc=fill, label=stage, **_CURVE)
    axis.set(xlabel="probability of the condition ranked first", ylabel="share of cells it is right for")
    axis.set(xlim=(0, top), ylim=(0, top))
    axis.grid(alpha=0.25)
    figure.legend(loc="outside right center")
    figure.suptitle(
        "Each dot a tenth of the cells; below the dotted line answers are too sure. Bars: 95% intervals",
        fontsize=9.5, x=0.01, ha="left",
    )  # fmt: skip
    return figure


def audit_distributions(totals: np.ndarray, detected: np.ndarray, sizes: pd.Series) -> Figure:
    """UMIs per cell, detected genes per cell, cells per condition."""
    figure, axes = new_figure(10, 3, columns=3)
    for axis, values, name in (
        (axes[0], totals, "UMIs per cell"),
        (axes[1], detected, "genes detected per cell, this panel"),
        (axes[2], sizes.to_numpy(), "cells per condition"),
    ):
        axis.hist(values, bins=40, color=MASK_COLOURS[LEAK_FREE], alpha=0.8)
        axis.axvline(np.median(values), color="black", lw=1)
        axis.set(xlabel=name, title=f"median {np.median(values):,.0f}")
    return figure


def batch_heatmap(table: pd.DataFrame) -> Figure:
    """Share of every condition's cells by batch."""
    figure, (axis,) = new_figure(2.5 + 0.9 * table.shape[1], 1.5 + 0.22 * len(table))
    _heatmap(axis, table, label="share of the condition's cells")
    axis.set(xlabel="batch")
    return figure


def vocab_coverage(summary: pd.DataFrame, *, warn_below: float) -> Figure:
    """Share of every set of genes that has a token, before and after mapping: left by number, right by UMIs."""
    rows = summary.iloc[::-1]
    figure, axes = new_figure(9.5, 1.5 + 0.4 * len(rows), columns=2)
    y = np.arange(len(rows))
    for axis, kind, name in zip(axes, ("share", "umi_share"), ("genes", "UMIs"), strict=True):
        before, after = rows[f"{kind}_before"], rows[f"{kind}_after"]
        axis.hlines(y, before, after, color=MASK_COLOURS[LEAK_FREE], lw=2, alpha=0.5)
        axis.plot(before, y, "o", color=MASK_COLOURS[LEAK_FREE], mfc="white", ms=6, label="own name only")
        axis.plot(after, y, "o", color=MASK_COLOURS[LEAK_FREE], ms=6, label="after mapping")
        _line(axis, warn_below, f"{warn_below:.0%}", "--")
        lowest = np.nanmin([before.min(), after.min(), warn_below])
        left = max(lowest - 0.05, 0) if lowest > 0.5 else 0
        axis.set(xlabel=f"share of {name} with a token", xlim=(left, 1.01), ylim=(-0.6, len(rows) - 0.4))
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(y, [f"{row.set} ({row.n:,})" for row in rows.itertuples()])
    axes[1].set_yticks(y, [])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _heatmap(axis, table: pd.DataFrame, *, top: float = 1.0, label: str = "") -> None:
    """A table of shares as colours from 0 to `top`, first row on top."""
    drawn = axis.pcolormesh(table.to_numpy(), cmap="Blues", vmin=0, vmax=top)
    axis.figure.colorbar(drawn, ax=axis, label=label)
    axis.set_xticks(np.arange(table.shape[1]) + 0.5, [str(name) for name in table.columns], rotation=90)
    axis.set_yticks(np.arange(len(table)) + 0.5, [str(name) for name in table.index])
    axis.tick_params(length=0)
    axis.invert_yaxis()


def _palette(n: int) -> list:
    return [plt.get_cmap("tab20" if n > 10 else "tab10")(i) for i in range(n)]


def _line(axis, x: float, name: str, style: str, side: str = "center") -> None:
    axis.axvline(x, color="black", ls=style, lw=1)
    axis.annotate(name, (x, 1), xycoords=("data", "axes fraction"), ha=side, va="bottom", fontsize=8)


def _mean_null(verdicts: pd.DataFrame) -> pd.DataFrame:
    columns = ["estimate", "ci_low", "ci_high", "luck"]
    return verdicts.groupby(["encoder", "mask"], as_index=False)[columns].mean()
