"""All ways to compose, judged on the same doubles: per query, as means by gene, and as paired differences."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..files.hashing import mix, name_seeds
from .composers import COMPOSERS, Composer
from .judge import METRICS, gene_interval, judge
from .nested import nested_scores
from .task import PairTask

BASELINE = "additive"
SEEDS = (0, 1, 2)


def compare(
    task: PairTask, composers: Sequence[Composer] = COMPOSERS, *, seeds: Sequence[int] = SEEDS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Judge every composer that can be asked under the task's mask, and a ranking at random.

    A composer with something to learn or choose is scored once for each dealing of genes into blocks, one per seed,
    and its metrics are averaged; `first` is that of the first seed.

    Returns
    -------
    table : DataFrame
        `method` and the columns of `perturbret.combinations.judge.judge`; the method `chance` is a ranking at random.
    chosen : DataFrame
        `method`, `setting`, and how many `doubles`, over all dealings, were scored at it.
    """
    tables = [judge(task, np.zeros((len(task.queries), len(task.candidates)))).assign(method="chance")]
    settings = []
    for composer in composers:
        if task.mask in composer.masks:
            dealt = seeds if composer.learns or len(composer.settings) > 1 else seeds[:1]
            found = [nested_scores(task, composer, seed=seed) for seed in dealt]
            judged = [judge(task, nested.scores) for nested in found]
            numbers = ["rank", *METRICS]
            judged[0][numbers] = np.mean([each[numbers] for each in judged], axis=0)
            tables.append(judged[0].assign(method=composer.name))
            settings += [
                (composer.name, written(setting)) for nested in found for setting in nested.chosen if setting
            ]
    table = pd.concat(tables, ignore_index=True)
    chosen = (
        pd.DataFrame(settings, columns=["method", "setting"]).value_counts().rename("doubles").reset_index()
    )
    return table[["method", *table.columns.drop("method")]], chosen.sort_values(
        ["method", "doubles"], ascending=[True, False]
    )


def summarise(task: PairTask, table: pd.DataFrame) -> pd.DataFrame:
    """Means over doubles: `method`, `candidates`, `metric`, `estimate`, `ci_low`, `ci_high`; see `gene_interval`.

    table : of `compare`.
    """
    rows = []
    for (method, which), part in table.groupby(["method", "candidates"], sort=False):
        values = part.set_index("query").loc[list(task.queries), list(METRICS)].to_numpy()
        rows += [
            (method, which, *row) for row in zip(METRICS, *gene_interval(values, task.members), strict=True)
        ]
    return pd.DataFrame(rows, columns=["method", "candidates", "metric", "estimate", "ci_low", "ci_high"])


def differences(task: PairTask, table: pd.DataFrame, against: str = BASELINE) -> pd.DataFrame:
    """Paired differences to one method: `difference`, `low`, `high`; `gained`, `lost`: sums over doubles."""
    rows, metrics = [], ["exact_hit@1", "exact_hit@8", "mrr"]
    for which, part in table.groupby("candidates", sort=False):
        by = {
            method: each.set_index("query").loc[list(task.queries), metrics]
            for method, each in part.groupby("method", sort=False)
        }
        for method in by.keys() - {against, "chance"}:
            gain = (by[method] - by[against]).to_numpy()
            sums = gain.clip(0).sum(axis=0), (-gain).clip(0).sum(axis=0)
            rows += [
                (method, which, *row)
                for row in zip(metrics, *gene_interval(gain, task.members), *sums, strict=True)
            ]
    names = ["method", "candidates", "metric", "difference", "low", "high", "gained", "lost"]
    return pd.DataFrame(rows, columns=names).assign(against=against).sort_values(names[:3], ignore_index=True)


def by_shared_genes(task: PairTask, composer: Composer, setting: dict, *, seed: int = 0) -> pd.DataFrame:
    """Metrics of a composer that learned from doubles with both, one or none of the query's genes.

    Asked are doubles whose two genes both occur in other doubles. `both`: it learned from these and from others; `one`:
    from those of one gene and others, each gene in turn, averaged; `none`: from others only. All three learn
    from equally many doubles, as many as hold neither gene; others are dropped by a hash of seed and name.

    Returns
    -------
    DataFrame
        `shared` (2, 1, 0), then as `judge`, among all pairs.
    """
    order = np.argsort(mix(name_seeds(f"{seed} {query}" for query in task.queries)))
    asked, scores = [], {2: [[]], 1: [[], []], 0: [[]]}
    for q, pair in enumerate(task.members):
        holds = [np.setdiff1d(np.flatnonzero((task.members == gene).any(axis=1)), [q]) for gene in pair]
        free = task.without(pair)
        if min(map(len, holds)) == 0 or len(free) <= sum(map(len, holds)):
            continue
        asked.append(q)
        for shared, extras in ((2, [np.concatenate(holds)]), (1, holds), (0, [holds[0][:0]])):
            for extra, rows in zip(extras, scores[shared], strict=True):
                others = order[np.isin(order, free)][: len(free) - len(extra)]
                train = np.sort(np.concatenate([extra, others]))
                rows.append(composer.score(task, train, np.array([q]), **setting)[0])
    if not asked:
        return pd.DataFrame(columns=["shared", "query", "rank", *METRICS])
    tables = [
        judge(task, np.array(rows), asked).query("candidates == 'pairs'").assign(shared=shared)
        for shared, parts in scores.items()
        for rows in parts
    ]
    table = pd.concat(tables).drop(columns=["first", "candidates"])
    return table.groupby(["shared", "query"], sort=False).mean().reset_index()


def written(setting: Mapping) -> str:
    """A setting as text."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())
