"""How many cells, how far from what is possible, and what is told apart at all: tables and sentences of 01 and 05."""

import numpy as np
import pandas as pd

from ..evaluation.readouts import Choice, readout_name
from ..evaluation.resolvability import FDR, apart_by_condition, apart_by_size
from ..runs.limits import pooling_to_use
from .wording import Shown, bullets, listed, percent, plain, span, with_interval

_REPLICATES = {
    "halves": "halves of a condition's query cells",
    "halves of batches": "halves of other batches",
    "halves of batches, dealt out": "the same numbers of cells, whatever the batch",
    "guides": "each guide against the condition's others",
    "guides, dealt out": "the same numbers of cells, whatever the guide",
}


def recommendation(choice: Choice, limits: pd.DataFrame) -> str:
    """The setting to use, chosen on validation cells, and why, in Markdown."""
    line = (
        f"**Setting to use**: {readout_name(choice.scoring, choice.library)}. On validation cells it ranks the right "
        f"condition first for {percent(choice.validation)} of single cells"
    )
    if choice.n_readouts > 1:
        most = f"the best of {choice.n_readouts} read-outs"
        line += (
            f", {most}"
            if choice.validation == choice.best
            else f"; {most} has {percent(choice.best)}, no more than one standard error above, and this one is simpler"
        )
        line += f" (chosen again in {choice.stability:.0%} of resamples of conditions)"
    pools = limits[limits["about"] == "pooling on validation"]
    if len(pools) > 1:
        chosen = pools[pools["name"] == "chosen"].iloc[0]
        others = [
            f"{row.pooling} {percent(row.estimate)}" for row in pools.itertuples() if row.name != "chosen"
        ]
        line += (
            f". Of several cells of one condition, pool the **{chosen.pooling}**: right for {percent(chosen.estimate)} "
            f"of validation pools of {chosen.query_size:.0f} cells, against {', '.join(others)}; the first of scores, "
            "embeddings and expression that is within one standard error of the best"
        )
    return f"{line}."


def needed_table(limits: pd.DataFrame) -> pd.DataFrame:
    """Cells per query for each level and way of pooling, with intervals."""
    rows = [
        {
            "pooled": row.pooling,
            "exact_hit@1": f"{row.level:.0%}",
            "cells needed": _cells(row.estimate, row.query_size),
            "95% interval": f"{_cells(row.ci_low, row.query_size)} to {_cells(row.ci_high, row.query_size)}",
            "largest size": f"{row.query_size:.0f} ({row.n_conditions:.0f} conditions)",
        }
        for row in limits[limits["about"] == "cells needed"].itertuples()
    ]
    return pd.DataFrame(rows)


def needed_by_condition(table: pd.DataFrame) -> pd.DataFrame:
    """cells_needed.csv as it is shown, those conditions first that need fewest."""
    levels = [name for name in table if name.startswith("cells for")]
    shown = table.sort_values([*levels, "condition"])
    return Shown(shown.assign(**{level: [_cells(value) for value in shown[level]] for level in levels}))


def reference_table(limits: pd.DataFrame) -> pd.DataFrame:
    """What hit rates are to be read against. Only the exact posterior of a simulated screen is a bound."""
    rows = []
    for row in limits.itertuples():
        if row.about == "bound":
            what, kind = (
                f"{row.name}, {row.average}",
                "bound" if row.name == "exact posterior" else "of the run",
            )
        elif row.about == "replicates":
            what, kind = _REPLICATES[row.name], f"{row.scoring} of mean embeddings, no bound"
        elif row.about == "positive control":
            what, kind = (
                f"queries that are {row.level:.0%} a library cell",
                "cosine, raw_cell, positive control",
            )
        else:
            continue
        text = f"{row.estimate:.3f}" if pd.isna(row.ci_low) else with_interval(row)
        chance = "" if pd.isna(row.chance) else f"{row.chance:.3f}"
        found = {"reference": what, "read-out": kind, "cells": f"{row.query_size:.0f}"}
        rows.append({**found, "exact_hit@1": text, "chance": chance})
    return pd.DataFrame(rows)


def limit_lines(limits: pd.DataFrame) -> str:
    """What follows from limits.csv for one run, in Markdown."""
    lines, pooling = [], pooling_to_use(limits)
    for row in limits[(limits["about"] == "cells needed") & (limits["pooling"] == pooling)].itertuples():
        line = f"**{row.level:.0%} right** (macro over conditions, {pooling} pooled) "
        interval = f"95% interval {_cells(row.ci_low)} to {_cells(row.ci_high)}"
        if np.isfinite(row.estimate):
            lines.append(f"{line}takes {_cells(row.estimate)} cells per query ({interval}).")
        else:
            more = f" ({interval})" if np.isfinite(row.ci_low) else ""
            lines.append(f"{line}is not reached with up to {row.query_size:.0f} cells per query{more}.")
    for row in limits[limits["name"] == "share of the range from chance"].itertuples():
        of = "single cells" if row.query_size == 1 else f"pools of {row.query_size:.0f}"
        lines.append(
            f"**{percent(row.estimate)}** {span(row.ci_low, row.ci_high)} of the range from chance to the exact "
            f"posterior is reached ({of}, {row.average})."
        )
    if "bound" not in set(limits["about"]):
        lines.append(
            "No bound is known on real cells: replicates are read-outs that other methods may exceed, and no share of "
            "a range is given."
        )
    return bullets(lines)


def alike_lines(tests: pd.DataFrame, limits: pd.DataFrame | None = None) -> str:
    """What can be told apart at all, and what a run reaches when alike conditions count as one, in Markdown."""
    sizes, table = apart_by_size(tests).iloc[-1], apart_by_condition(tests)
    lines = []
    if not np.isnan(sizes.from_controls):
        weak = table.loc[table["cells_from_controls"].isna(), "condition"]
        names = f": {listed(map(plain, weak))} are not" if len(weak) else ""
        lines.append(
            f"With {sizes.n_cells:.0f} cells of each, **{sizes.from_controls:.0f} of {sizes.n_conditions:.0f} "
            f"conditions are told from controls** (energy test, false discovery rate {FDR:.0%}){names}."
        )
    if not np.isnan(sizes.pairs):
        lines.append(
            f"{percent(sizes.pairs)} of all pairs of conditions are told apart; {sizes.alone:.0f} conditions are told "
            f"from all others, and a condition is alike to {sizes.alike:g} others in the median. Not told apart does "
            "not say equal: more cells may show a difference."
        )
    if limits is not None:
        merged = limits[(limits["about"] == "alike merged") & (limits["average"] == "micro")]
        for row in merged[merged["query_size"] == 1].itertuples():
            lines.append(
                f"Where any condition that is alike counts, the first is right for {percent(row.estimate)} "
                f"{span(row.ci_low, row.ci_high)} of single cells, by chance for {percent(row.chance)}."
            )
    return bullets(lines)


def shape_lines(limits: pd.DataFrame) -> str:
    """Collapse, hubs and depth of one embedding, in Markdown."""
    value = limits[limits["about"] == "embedding"].set_index("name")["estimate"]
    lines = [
        f"**Collapse**: the spread of training cells is {value['spread']:.2g} of their length (0: all alike), in "
        f"{value['effective rank']:.1f} effective dimensions."
    ]
    if "hubs: skewness" in value:
        lines.append(
            f"**Hubs**: the candidate that is ranked first most often is so for "
            f"{percent(value['hubs: largest share'])} of the single query cells, "
            f"{percent(value['hubs: never first'])} of the candidates never are; skewness "
            f"{value['hubs: skewness']:.2f}."
        )
    if not np.isnan(value["R2 of log total"]):
        lines.append(
            f"**Depth**: the embedding tells {percent(max(value['R2 of log total'], 0))} of the variance of log total "
            "UMIs (training cells, cross-validated)."
        )
    return bullets(lines)


def _cells(value: float, largest: float | None = None) -> str:
    if np.isfinite(value):
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
    return "not reached" if largest is None else f"not with {largest:.0f}"
