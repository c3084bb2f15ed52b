"""What notebook 08 shows of combinations: sentences, tables and figures."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..combinations.compare import BASELINE, written
from ..combinations.composers import Composer
from ..combinations.judge import gene_interval
from ..combinations.task import CANDIDATE_SETS, PairTask
from ..data.effects import Effects
from ..runs.runs import show_data
from .figures import LEAK_FREE, MASK_COLOURS, new_figure
from .wording import bullets, percent, plain, span, with_interval

SETS = {
    "doubles": "the measured doubles",
    "singles+doubles": "singles and measured doubles",
    "pairs": "all pairs of singles",
}
_COLUMNS = ("exact_hit@1", "exact_hit@8", "relevant_hit@1", "both_genes@4", "mrr")
_FOUND, _MISSED = MASK_COLOURS[LEAK_FREE], "#c1440e"


def answer(task: PairTask, summary: pd.DataFrame, gains: pd.DataFrame, learned: str) -> str:
    """The answer to the notebook's question in words, from its own tables; `learned` is the method that it proposes."""
    rows = summary.query("candidates == 'pairs' and metric == 'exact_hit@1'").set_index("method")
    one = summary.query("candidates == 'pairs' and metric == 'relevant_hit@1'").set_index("method")[
        "estimate"
    ]
    gain = gains.query("candidates == 'pairs' and metric == 'exact_hit@1' and method == @learned").iloc[0]
    best, base = rows.loc[learned], rows.loc[BASELINE]
    clear = gain["low"] > 0 or gain["high"] < 0
    n_pairs = len(task.candidate_set("pairs"))
    return (
        f"Of {len(task.queries)} measured doubles of {plain(task.name)}, each asked against all {n_pairs:,} pairs of "
        f"its {len(task.genes)} singles under mask `{task.mask}`, **{plain(learned)}** names both genes first for "
        f"**{percent(best['estimate'])}** {span(best['ci_low'], best['ci_high'])}, and at least one of them for "
        f"{percent(one[learned])}. The sum of two singles with the cosine names both for {percent(base['estimate'])} "
        f"{span(base['ci_low'], base['ci_high'])}; the paired difference is {percent(gain['difference'], True)} "
        f"{span(gain['low'], gain['high'], True)}, {'clear of' if clear else 'not clear of'} zero. A ranking at random "
        f"names both for {1 / n_pairs:.2%}. Intervals (95%) resample genes, not doubles."
    )


def introduce(effects: Effects) -> None:
    """Show what effects this notebook works on; simulated ones put a banner on the page."""
    show_data(
        f"**{plain(effects.name)}**: effects of {len(effects.conditions)} conditions on {len(effects.genes):,} genes; "
        f"fingerprint `{effects.fingerprint[:12]}`",
        simulated=effects.simulated,
    )


def method_table(summary: pd.DataFrame, gains: pd.DataFrame, which: str) -> pd.DataFrame:
    """Methods, best first, with intervals, among one candidate set; and the paired difference to the baseline."""
    part = summary[(summary["candidates"] == which) & summary["metric"].isin(_COLUMNS)]
    texts = part.assign(text=[with_interval(row) for row in part.itertuples()])
    table = texts.pivot(index="method", columns="metric", values="text")[list(_COLUMNS)]
    order = part[part["metric"] == "exact_hit@1"].sort_values("estimate", ascending=False)["method"]
    gain = gains[(gains["candidates"] == which) & (gains["metric"] == "exact_hit@1")].set_index("method")
    told = {
        row.Index: f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in gain.itertuples()
    }
    table[f"exact_hit@1 against {BASELINE}"] = pd.Series(told)
    return table.loc[order].reset_index()


def ladder(summary: pd.DataFrame, ceiling: pd.DataFrame, metric: str = "exact_hit@1") -> Figure:
    """Each method among each candidate set, with 95% intervals; dashed, the ceiling where halves are known."""
    rows = summary[summary["metric"] == metric]
    order = rows[rows["candidates"] == "pairs"].sort_values("estimate")["method"].tolist()
    figure, axes = new_figure(10.5, 1.2 + 0.3 * len(order), columns=len(CANDIDATE_SETS))
    for axis, which in zip(axes, CANDIDATE_SETS, strict=True):
        part = rows[rows["candidates"] == which].set_index("method").loc[order]
        axis.hlines(range(len(order)), part["ci_low"], part["ci_high"], color=_FOUND, lw=2, alpha=0.6)
        axis.plot(part["estimate"], range(len(order)), "o", color=_FOUND, ms=6)
        bound = ceiling.query("way == 'measured' and candidates == @which")[metric]
        if len(bound):
            axis.axvline(bound.mean(), color="#555", ls="--", lw=1)
        axis.set_yticks(range(len(order)), order if axis is axes[0] else [""] * len(order))
        axis.set(title=SETS[which], xlabel=metric, xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
        axis.grid(axis="x", alpha=0.25)
    return figure


def found_and_missed(found: pd.DataFrame, column: str) -> Figure:
    """Doubles by the smaller of their singles' effects and by their own; filled where both genes are named first."""
    figure, (left, right) = new_figure(9.5, 3.6, columns=2)
    groups = ((1, "both genes", _FOUND), (0.5, "one gene", "#d9a441"), (0, "neither", _MISSED))
    level = np.where(found["exact_hit@1"] > 0.5, 1, np.where(found["relevant_hit@1"] > 0.5, 0.5, 0))
    for value, label, colour in groups:
        part = found[level == value]
        left.plot(
            part["weaker"], part[column], "o", color=colour, ms=5, alpha=0.8, label=f"{label} ({len(part)})"
        )
    left.set(xlabel="length of the smaller single effect", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("")
    left.set_ylabel(AXES[column].removeprefix("the "))
    left.legend(title="first answer names")
    if "nearer" in found and found["nearer"].notna().any():
        right.hist(found["nearer"].dropna(), np.linspace(0, 1, 11), color=_MISSED, alpha=0.8)
        right.set(xlabel="share of measured doubles nearer than the wrong answer", ylabel="wrong answers")
    else:
        for value, _, colour in groups:
            right.hist(
                found.loc[level == value, "additivity"], np.linspace(-1, 1, 21), color=colour, alpha=0.6
            )
        right.set(xlabel="cosine with the sum of its singles", ylabel="doubles")
    return figure


AXES = {
    "size": "the length of the double's effect",
    "distance": "the E-distance of the double to controls",
    "weaker": "the length of the smaller single effect",
    "additivity": "the cosine of the double with the sum of its singles",
}


def most_chosen(chosen: pd.DataFrame, composer: Composer) -> int:
    """Number of the setting at which most doubles were scored; the first where none was chosen."""
    counts = chosen[chosen["method"] == composer.name].set_index("setting")["doubles"]
    return max(range(len(composer.settings)), key=lambda i: counts.get(written(composer.settings[i]), 0))


def shared_table(task: PairTask, shared: pd.DataFrame) -> pd.DataFrame:
    """Means by number of shared genes, with intervals."""
    rows = []
    for number, part in shared.groupby("shared"):
        members = task.members[[task.queries.index(query) for query in part["query"]]]
        row = {"shared": number, "doubles": len(part)}
        for name, mean, low, high in zip(
            _COLUMNS, *gene_interval(part[list(_COLUMNS)], members), strict=True
        ):
            row[name] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(row)
    return pd.DataFrame(rows, columns=["shared", "doubles", *_COLUMNS])


def limits(task: PairTask, found: pd.DataFrame, distances: pd.DataFrame | None) -> str:
    """What the page cannot say, as bullets."""
    exact, one = found["exact_hit@1"].mean(), found["relevant_hit@1"].mean()
    lines = [
        f"Of the doubles that are missed, {percent((one - exact) / max(1 - exact, 1e-9))} are named with one right "
        "gene: what is hard is the second one.",
        "Which pairs were measured is no accident: their genes were chosen. Hit rates hold for doubles like these.",
    ]
    if task.halves is None:
        lines.append(
            "Halves of the cells are not known (layers half1 and half2), so that no ceiling can be given."
        )
    if task.left_out:
        lines.append(f"Without one of their singles, and so not asked: {plain(', '.join(task.left_out))}.")
    if distances is not None:
        nearer = found["nearer"].dropna()
        if len(nearer):
            lines.append(
                f"{len(nearer)} wrong answers are themselves measured; the median share of doubles that lie nearer to "
                f"the truth is {percent(nearer.median())} (50% were they drawn at random)."
            )
    return bullets(lines)
