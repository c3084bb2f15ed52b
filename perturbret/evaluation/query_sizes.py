"""How many cells of one condition a query needs for a given hit rate."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

LEVELS = (0.5, 0.8)
_METRIC = "exact_hit@1"


def cells_needed(summary: pd.DataFrame, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """Cells per query at which exact_hit@1, macro over conditions, reaches each level.

    Hit rates are joined by straight lines over the logarithm of the size; the first crossing counts. The interval has
    the sizes whose own interval of the hit rate holds the level: it goes from where the upper ends reach the level to
    where the lower ends do. Each size has the conditions that have so many cells.

    Parameters
    ----------
    summary : pandas.DataFrame
        From `perturbret.evaluation.judge.summarise`.
    levels : sequence of float

    Returns
    -------
    pandas.DataFrame
        One row per library, scoring, pooling and level: `cells`, `low`, `high`, each infinite where no size reaches the
        level; `largest`, the largest size; `n_conditions` at it. Not for read-outs without queries of several cells.
    """
    curves = summary[(summary["metric"] == _METRIC) & (summary["average"] == "macro")]
    rows = []
    for (library, scoring), readout in curves.groupby(["library", "scoring"], sort=True):
        for pooling in sorted(set(readout["pooling"]) - {"single"}):
            curve = readout[readout["pooling"].isin(["single", pooling])].sort_values("query_size")
            sizes, last = curve["query_size"].to_numpy(float), curve.iloc[-1]
            for level in levels:
                ends = (
                    _crossing(sizes, curve[end].to_numpy(float), level)
                    for end in ("estimate", "ci_high", "ci_low")
                )
                row = {"library": library, "scoring": scoring, "pooling": pooling, "level": level}
                row |= dict(zip(("cells", "low", "high"), ends, strict=True))
                rows.append(row | {"largest": last["query_size"], "n_conditions": last["n_conditions"]})
    columns = ["library", "scoring", "pooling", "level", "cells", "low", "high", "largest", "n_conditions"]
    return pd.DataFrame(rows, columns=columns)


def cells_needed_by_condition(scores: pd.DataFrame, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """The same for every condition, without intervals: its queries of one size share cells.

    Parameters
    ----------
    scores : pandas.DataFrame
        Of one library and scoring, from `perturbret.evaluation.judge.evaluate`; single cells and one pooling.
    levels : sequence of float

    Returns
    -------
    pandas.DataFrame
        One row per condition: n_cells, its query cells; a column `<size> cells` with exact_hit@1 for each size, NaN for
        those beyond its cells; `cells for <level>` for each level, infinite where no size reaches it.
    """
    hits = scores.pivot_table(index="condition", columns="query_size", values=_METRIC, observed=True)
    sizes = hits.columns.to_numpy(float)
    table = hits.rename(columns=lambda size: f"{size} cells").rename_axis(columns=None)
    singles = scores.loc[scores["query_size"] == 1, "condition"].value_counts()
    table.insert(0, "n_cells", singles.reindex(table.index, fill_value=0))
    for level in levels:
        table[f"cells for {level:.0%}"] = [_crossing(sizes, curve, level) for curve in hits.to_numpy()]
    return table.reset_index()


def _crossing(sizes: np.ndarray, values: np.ndarray, level: float) -> float:
    """First size at which the values, joined over the log of the size, reach the level; infinite where none does."""
    known = ~np.isnan(values)
    sizes, values = sizes[known], values[known]
    reached = np.flatnonzero(values >= level)
    if not len(reached):
        return np.inf
    at = reached[0]
    if at == 0:
        return float(sizes[0])
    part = (level - values[at - 1]) / (values[at] - values[at - 1])
    return float(np.exp(np.log(sizes[at - 1]) + part * np.log(sizes[at] / sizes[at - 1])))
