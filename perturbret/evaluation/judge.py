"""Evaluate an encoder: metrics of every query, their summary with intervals and chance, the null control."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..data.prepared import Prepared
from .metrics import (
    chance,
    find_metric,
    metric_by_label,
    metric_columns,
    per_query,
    rank_top,
    relevance,
    top_conditions,
)
from .nulls import ALPHAS, detectable_leak, luck, luck_p_values
from .retrieval import LIBRARY_KINDS
from .scoring import ALL_SCORINGS, POOLINGS, Scored, candidate_names, library_cells, score_queries
from .stats import AVERAGES, cluster_bootstrap, cluster_mean, query_bootstrap

QUERY_SIZES = (1, 5, 10, 20, 50, 100, 200)
READOUT = ["library", "query_size", "pooling", "candidates", "scoring"]


def evaluate(
    encoder,
    prepared: Prepared,
    *,
    role: str = "query",
    libraries: Sequence[str] = LIBRARY_KINDS,
    query_sizes: Sequence[int] = QUERY_SIZES,
    poolings: Sequence[str] = POOLINGS,
    scorings: Sequence[str] = ALL_SCORINGS,
    candidates: str = "",
    seed: int = 0,
    ablation: Sequence[str] = (),
) -> pd.DataFrame:
    """Score the cells in `role` with every library x scoring x query size x pooling.

    Every cell is embedded once. Sizes that no condition reaches have no rows, and neither have classifier
    scorings of an encoder without a head.

    Parameters
    ----------
    encoder : Encoder
    prepared : Prepared
        Cells with the mask, split and genes that the encoder was fitted with.
    role : str
        Whose cells are the queries.
    libraries : sequence of str
        Kinds of `perturbret.evaluation.retrieval`, for the scorings `cosine` and `whitened`.
    query_sizes : sequence of int
        Cells per query.
    poolings : sequence of str
        For sizes above 1. `scores`: the mean of the cells' cosine scores, or the sum of their
        log-probabilities. `embeddings`: the mean embedding is scored. `expression`: summed counts are
        embedded.
    scorings : sequence of str
        `classifier_corrected` is log p - log prior, summed over the cells of a query.
    candidates : {'train', 'observed', 'predicted'}, optional
        Rank the conditions with training cells; or those with gallery cells too; or those with training cells and the
        held-out combinations, as their genes alone predict them (the libraries are then
        `perturbret.evaluation.composition.COMPOSITIONS`). By default as the track is read
        (first of `Prepared.candidate_sets`).
    seed : int
        Of the pseudo-bulks and the bootstrap library: the same for all encoders that are compared.
    ablation : sequence of str
        Fields of the context that are meant to differ.

    Returns
    -------
    pandas.DataFrame
        One row per query and read-out: query_id, condition, batch (where the screen has one), library (`none`
        for classifier scorings), query_size, pooling (`single` for size 1), candidates, scoring, the columns
        of `metrics.per_query`, n_candidates, n_relevant (candidates of relevance 1 or 2), top10 (joined by
        `|`). Where the screen has batches, for single cells, batch_n_candidates, the number of candidates with
        library cells in the query's batch, and batch_hit@1, the chance that the true condition is first among
        them; both NaN where they are fewer than two or the true condition is not one of them.

    Raises
    ------
    ContextMismatch
        The encoder was fitted on other data, or under another split, mask or gene panel.
    ValueError
        An unknown name, no cells in a role, no scoring that the encoder has, or, for a classifier, candidates
        that it has no class for.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> from perturbret.encoders import fit_baseline
    >>> screen = simulate_screen(n_singles=3, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> encoder = fit_baseline("mean_shift", prepared, seed=0).encoder
    >>> scores = evaluate(encoder, prepared, libraries=("mean",), query_sizes=(1, 3), poolings=("scores",))
    >>> scores[["scoring", "query_size"]].drop_duplicates().values.tolist()
    [['cosine', 1], ['cosine', 3], ['whitened', 1], ['whitened', 3]]
    """
    encoder.context.check(prepared.context, ablation)
    candidates = candidates or prepared.candidate_sets[0]
    names = candidate_names(prepared, candidates, role)
    scored = score_queries(
        encoder,
        prepared,
        role=role,
        libraries=libraries,
        query_sizes=query_sizes,
        poolings=poolings,
        scorings=scorings,
        candidates=candidates,
        seed=seed,
    )
    tables, of_size = [], {}
    in_batch = _conditions_by_batch(prepared, library_cells(prepared, candidates, role))
    for readout in scored:
        queries = readout.queries
        if queries.size not in of_size:
            of_size[queries.size] = relevance(queries.conditions, names)
        levels = of_size[queries.size]
        columns = {"query_id": queries.ids.astype(object), "condition": queries.conditions.astype(object)}
        if queries.batch is not None:
            columns["batch"] = queries.batch.astype(object)
        columns |= {"library": readout.library, "query_size": queries.size, "pooling": readout.pooling}
        columns |= {"candidates": candidates, "scoring": readout.scoring}
        columns |= dict(per_query(readout.scores, levels))
        if queries.size == 1 and queries.batch is not None:
            columns |= _batch_hits(readout, names, in_batch)
        columns |= {"n_candidates": len(names), "n_relevant": (levels > 0).sum(axis=1)}
        columns["top10"] = ["|".join(row) for row in top_conditions(readout.scores, names, 10).tolist()]
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def summarise(scores: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means over queries, with intervals that treat conditions as drawn and with chance.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `evaluate`.
    n_resamples : int
        Bootstrap resamples of conditions.
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per library, query_size, pooling, candidates, scoring, metric and average (micro: over
        queries; macro: over the conditions' means): estimate, ci_low, ci_high, n_queries, n_conditions,
        chance. Chance is the same average of what equal scores for all candidates get on the same queries.
        There is no row for the rank, or another metric that is NaN there, where a query's condition is not among the
        candidates, and none for the margin, whose unit depends on the scoring.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> from perturbret.encoders import fit_baseline
    >>> screen = simulate_screen(n_singles=4, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> summary = summarise(evaluate(fit_baseline("prior", prepared, seed=0).encoder, prepared, query_sizes=(1,)))
    >>> asked = summary.query("metric == 'exact_hit@1' and average == 'macro' and scoring == 'cosine'")
    >>> asked[["library", "estimate", "chance"]].values.tolist()
    [['bootstrap', 0.25, 0.25], ['mean', 0.25, 0.25], ['raw_cell', 0.25, 0.25]]
    """
    known, absent = set(metric_columns("summarised")), scores[scores["rank"].isna()]
    metrics = [name for name in scores.columns if name in known and not absent[name].isna().any()]
    values, equal = scores[metrics].to_numpy(np.float64), _chance_levels(scores, metrics)
    conditions = scores["condition"].to_numpy(str)
    limits = [find_metric(name).limits(scores["n_candidates"].max()) for name in metrics]
    bounds = np.array(limits).reshape(-1, 2).T
    tables = []
    for key, rows in scores.groupby(READOUT, sort=True).indices.items():
        clusters = conditions[rows]
        for average in AVERAGES:
            options = {"average": average, "n_resamples": n_resamples, "seed": seed}
            found = cluster_bootstrap(values[rows], clusters, bounds=bounds, **options)
            columns = dict(zip(READOUT, key, strict=True))
            columns |= {"metric": metrics, "average": average}
            columns |= {"estimate": found.estimate, "ci_low": found.low, "ci_high": found.high}
            columns |= {"n_queries": len(rows), "n_conditions": len(np.unique(clusters))}
            columns["chance"] = cluster_mean(equal[rows], clusters, average=average)
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def within_batch(scores: pd.DataFrame, *, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How often single cells are ranked right among the conditions of their own batch: what no batch effect helps.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `evaluate`, of one run or of several with columns `encoder` and `mask`.
    n_resamples : int
        Bootstrap resamples of conditions.
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per encoder, mask (where there are such columns), library and scoring: `estimate`, mean batch_hit@1;
        `chance`, mean of 1 / batch_n_candidates over the same queries; `excess`, their difference, with `ci_low` and
        `ci_high` (95%, conditions resampled); n_queries, n_conditions, n_candidates (mean). No row where no batch
        holds two candidates.

    Examples
    --------
    >>> scores = pd.DataFrame({"condition": ["A", "A", "B", "B"], "query_size": 1, "library": "mean"})
    >>> scores = scores.assign(scoring="cosine", batch_n_candidates=2, **{"batch_hit@1": [1, 1, 0, 1]})
    >>> within_batch(scores)[["estimate", "chance", "excess"]].values.tolist()
    [[0.75, 0.5, 0.25]]
    """
    keys = [name for name in ("encoder", "mask", "library", "candidates", "scoring") if name in scores]
    rows = []
    if "batch_hit@1" in scores:
        judged = scores[(scores["query_size"] == 1) & scores["batch_hit@1"].notna()]
        for key, part in judged.groupby(keys, sort=True):
            hit, n = part["batch_hit@1"].to_numpy(float), part["batch_n_candidates"].to_numpy(float)
            found = cluster_bootstrap(
                hit - 1 / n, part["condition"].to_numpy(str), n_resamples=n_resamples, seed=seed
            )
            row = dict(zip(keys, key, strict=True)) | {"estimate": hit.mean(), "chance": (1 / n).mean()}
            row |= {"excess": found.estimate[0], "ci_low": found.low[0], "ci_high": found.high[0]}
            row |= {"n_queries": len(part), "n_conditions": part["condition"].nunique()}
            rows.append(row | {"n_candidates": n.mean()})
    columns = [*keys, "estimate", "chance", "excess", "ci_low", "ci_high", "n_queries", "n_conditions"]
    return pd.DataFrame(rows, columns=[*columns, "n_candidates"])


def null_control(
    encoder,
    prepared: Prepared,
    *,
    role: str = "query",
    libraries: Sequence[str] = LIBRARY_KINDS,
    scorings: Sequence[str] = ALL_SCORINGS,
    candidates: str = "",
    seed: int = 0,
    n_resamples: int = 1000,
    n_permutations: int = 9999,
) -> pd.DataFrame:
    """exact_hit@1 of an encoder that was fitted and is scored on permuted labels, against luck.

    Parameters
    ----------
    encoder : Encoder
        Fitted on `prepared` with the settings of the encoder that it controls.
    prepared : Prepared
        Cells whose labels were permuted within role and batch (`nulls.permute_conditions`) before masking.
    role, libraries, scorings, candidates, seed
        As in `evaluate`.
    n_resamples : int
        Bootstrap resamples of queries: permuted labels leave nothing that queries of one condition share.
    n_permutations : int

    Returns
    -------
    pandas.DataFrame
        One row per library and scoring, for single cells: estimate, ci_low, ci_high; chance; class_prior, the
        share of the most common condition among the queries; luck, what the same predictions hit on average
        when the query labels are permuted within batch; p_value, one-sided, of hitting so often by luck;
        n_queries; `detectable@ALPHA` for each of `nulls.ALPHAS`, the smallest share of queries whose label would
        have to be given away for p < ALPHA with 80% power. Of every metric registered as `controlled`: its mean, and
        `<metric>_luck` and `<metric>_p_value` likewise. A small p-value says that masking or another part of the
        pipeline gave the labels away.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> from perturbret.encoders import fit_baseline
    >>> from perturbret.evaluation import permute_conditions
    >>> screen = simulate_screen(n_singles=4, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> split = make_split(screen.obs, seed=0)
    >>> labels = permute_conditions(screen.obs["condition"].to_numpy(str), split.roles.to_numpy(str), seed=0)
    >>> permuted = prepare(screen, split, mask="all_targets", conditions=labels)
    >>> null = null_control(fit_baseline("prior", permuted, seed=0).encoder, permuted, n_permutations=99)
    >>> null.loc[0, ["estimate", "chance", "p_value"]].astype(float).tolist()
    [0.25, 0.25, 1.0]
    """
    encoder.context.check(prepared.context)
    candidates = candidates or prepared.candidate_sets[0]
    readouts = list(
        score_queries(
            encoder,
            prepared,
            role=role,
            libraries=libraries,
            query_sizes=(1,),
            poolings=POOLINGS,
            scorings=scorings,
            candidates=candidates,
            seed=seed,
        )
    )
    queries = readouts[0].queries
    column = {name: i for i, name in enumerate(candidate_names(prepared, candidates, role))}
    true = np.array([column.get(condition, -1) for condition in queries.conditions])
    tops = [rank_top(readout.scores) for readout in readouts]
    hits = [np.where(true >= 0, top[np.arange(len(true)), true], 0.0) for top in tops]
    found = query_bootstrap(np.stack(hits, axis=1), n_resamples=n_resamples, seed=seed)
    shuffles = {"n_permutations": n_permutations, "seed": seed}
    table = {
        "library": [readout.library for readout in readouts],
        "scoring": [readout.scoring for readout in readouts],
        "candidates": candidates,
        "estimate": found.estimate,
        "ci_low": found.low,
        "ci_high": found.high,
        "chance": (true >= 0).mean() / len(column),
        "class_prior": np.unique(queries.conditions, return_counts=True)[1].max() / len(queries),
        "luck": [luck(top, true, queries.batch) for top in tops],
        "p_value": luck_p_values(tops, true, queries.batch, **shuffles),
        "n_queries": len(queries),
    }
    for alpha in ALPHAS:
        table[f"detectable@{alpha}"] = [
            detectable_leak(top, true, queries.batch, alpha=alpha, n_permutations=n_permutations)
            for top in tops
        ]
    return pd.DataFrame(table | _null_metrics(readouts, list(column), shuffles))


def _null_metrics(readouts: list[Scored], names: list[str], shuffles: dict) -> dict[str, list | np.ndarray]:
    """Columns of the metrics that are `controlled`: mean, luck and p-value of each read-out."""
    queries, table = readouts[0].queries, {}
    labels, true = np.unique(queries.conditions, return_inverse=True)
    for name in metric_columns("controlled"):
        levels = relevance(labels, names)
        values = [metric_by_label(name, readout.scores, levels) for readout in readouts]
        if np.isnan(values).any():
            raise ValueError(f"null control: expected numbers from metric {name!r}, got NaN")
        sign = 1 if find_metric(name).better == "higher" else -1
        table[name] = [each[np.arange(len(true)), true].mean() for each in values]
        table[f"{name}_luck"] = [luck(each, true, queries.batch) for each in values]
        signed = [sign * each for each in values]
        table[f"{name}_p_value"] = luck_p_values(signed, true, queries.batch, **shuffles)
    return table


def _conditions_by_batch(prepared: Prepared, cells: np.ndarray) -> dict[str, np.ndarray]:
    """Sorted conditions with library cells in each batch; empty where the screen names no batches."""
    if prepared.cells.batch is None:
        return {}
    table = pd.DataFrame({"batch": prepared.cells.batch[cells], "condition": prepared.conditions[cells]})
    return {str(name): np.unique(part.to_numpy(str)) for name, part in table.groupby("batch")["condition"]}


def _batch_hits(
    readout: Scored, names: Sequence[str], in_batch: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Columns batch_hit@1 and batch_n_candidates of single-cell queries; ties in expectation."""
    queries = readout.queries
    hit, n = np.full(len(queries), np.nan), np.full(len(queries), np.nan)
    for batch, conditions in in_batch.items():
        rows = np.flatnonzero((queries.batch == batch) & np.isin(queries.conditions, conditions))
        if len(conditions) < 2 or not len(rows):
            continue
        first = rank_top(readout.scores[np.ix_(rows, np.searchsorted(names, conditions))])
        hit[rows] = first[np.arange(len(rows)), np.searchsorted(conditions, queries.conditions[rows])]
        n[rows] = len(conditions)
    return {"batch_hit@1": hit, "batch_n_candidates": n}


def _chance_levels(scores: pd.DataFrame, metrics: list[str]) -> np.ndarray:
    """Metrics (n, m) of equal scores: they depend on how many candidates there are of each relevance only."""
    shape = np.stack([scores["n_candidates"], scores["n_relevant"], scores["rank"].notna()], axis=1)
    shapes, code = np.unique(shape.astype(int), axis=0, return_inverse=True)
    levels = []
    for n_candidates, n_relevant, has_exact in shapes:
        level = (np.arange(n_candidates) < n_relevant).astype(np.int8)
        level[0] += has_exact
        levels.append(chance(level[None])[metrics].to_numpy(np.float64)[0])
    return np.array(levels)[code]
