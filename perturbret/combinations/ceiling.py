"""What the best composition could reach, and which doubles nobody could tell from others."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..data.conditions import CTRL, canonical_condition
from .judge import METRICS, judge
from .opponents import cosines
from .task import PairTask


def half_against_half(task: PairTask) -> pd.DataFrame:
    """Doubles asked by one half of their cells, against candidates from the other half.

    `measured`: a measured double stands for itself, as if its composition were perfect; other candidates are sums of
    singles. `composed`: all are sums. By cosine both, each half asking once, metrics averaged. It is the ceiling of
    compositions read out by cosine at half of the cells, and no bound for other read-outs.

    Returns
    -------
    DataFrame
        As of `judge`, with `way` in front and without `first`; empty where the halves are not known.
    """
    if task.halves is None:
        return pd.DataFrame(columns=["way", "query", "candidates", "rank", *METRICS])
    n, everyone, tables = len(task.genes), np.arange(len(task.queries)), []
    for asked, library in (task.halves, task.halves[::-1]):
        values = np.concatenate([library[:n], asked[n:]])
        composed = cosines(task, values @ values.T, everyone)
        measured = composed.copy()
        measured[:, task.true] = _unit(asked[n:]) @ _unit(library[n:]).T
        for way, scores in (("measured", measured), ("composed", composed)):
            tables.append(judge(task, scores).drop(columns="first").assign(way=way))
    keys = ["way", "candidates", "query"]
    return pd.concat(tables).groupby(keys, sort=False).mean().reset_index()


def read_distances(path: str | Path, delimiter: str = "_") -> pd.DataFrame:
    """A square table of distances between conditions, as scPerturb publishes E-distances, by canonical names.

    Raises
    ------
    ValueError
        Rows and columns are not the same conditions, or one is there twice.
    """
    table = pd.read_csv(path, index_col=0)
    names = [
        [canonical_condition(label, control_label=("control", CTRL), delimiter=delimiter) for label in axis]
        for axis in (table.index, table.columns)
    ]
    if sorted(names[0]) != sorted(names[1]) or len(set(names[0])) < len(names[0]):
        raise ValueError(
            f"{path}: expected a square table of distances, each condition once, got shape {table.shape}"
        )
    table.index, table.columns = names
    return table.loc[table.index, table.index]


def detectability(task: PairTask, table: pd.DataFrame, distances: pd.DataFrame | None = None) -> pd.DataFrame:
    """What of a double could explain that it is found, beside whether it is.

    Parameters
    ----------
    task : PairTask
    table : DataFrame
        Of `judge`, of one method and candidate set.
    distances : DataFrame, optional
        From `read_distances`.

    Returns
    -------
    DataFrame, by query
        `exact_hit@1`, `relevant_hit@1` and `first` of `table`; `size`, length of its effect; `weaker`, length of the
        smaller of its singles' effects; `additivity`, cosine with their sum; `distance`, to controls; `to_first`,
        distance of a wrong first answer to the double, where that answer was measured; `nearer`, share of all other
        measured doubles that are nearer to it than that answer: 0.5 were the answer drawn at random.
    """
    found = table.set_index("query").loc[list(task.queries), ["exact_hit@1", "relevant_hit@1", "first"]]
    singles = np.linalg.norm(task.effects, axis=1)
    found["size"] = np.linalg.norm(task.values, axis=1)
    found["weaker"] = singles[task.members].min(axis=1)
    found["additivity"] = np.sum(_unit(task.values) * _unit(task.effects[task.members].sum(axis=1)), axis=1)
    if distances is None:
        return found
    known = set(distances.index)
    doubles = [query for query in task.queries if query in known]
    found["distance"] = distances[CTRL].reindex(found.index) if CTRL in known else np.nan
    for query, first in found["first"].items():
        if first != query and first in known and query in known:
            others = distances.loc[query, [double for double in doubles if double not in (query, first)]]
            found.loc[query, "to_first"] = distances.loc[query, first]
            found.loc[query, "nearer"] = (others < distances.loc[query, first]).mean()
    return found


def by_quarter(found: pd.DataFrame, column: str) -> pd.DataFrame:
    """Hits by quarters of the doubles, from the smallest values of a column of `detectability` to the largest."""
    quarter = (
        pd.qcut(found[column].rank(method="first"), min(4, found[column].notna().sum()), labels=False) + 1
    )
    groups = found.assign(quarter=quarter).groupby("quarter")
    return groups.agg(
        doubles=(column, "size"), lowest=(column, "min"), highest=(column, "max"),
        exact=("exact_hit@1", "mean"), one_gene=("relevant_hit@1", "mean"),
    ).rename(columns={"exact": "exact_hit@1", "one_gene": "relevant_hit@1"}).reset_index()  # fmt: skip


def _unit(values: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(lengths > 0, lengths, np.inf)
