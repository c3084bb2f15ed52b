"""What hit rates are to be read against: what a screen tells apart at all, and limits.csv of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..data.prepared import Prepared, prepare
from ..data.screen import Screen
from ..data.splits import get_split
from ..encoders.base import log1p
from ..encoders.bayes import fit_bayes
from ..encoders.spectrum import spectrum
from ..evaluation.embedding_shape import depth_r2, effective_rank, hubness, spread
from ..evaluation.limits import duplicate_hits, merged_hits, replicates, share_of_range
from ..evaluation.metrics import rank_top
from ..evaluation.query_sizes import cells_needed
from ..evaluation.readouts import choose_pooling
from ..evaluation.resolvability import merge_alike, tell_apart
from ..evaluation.retrieval import LIBRARY_SCORINGS
from ..evaluation.scoring import Scored, by_name, candidate_names, library_cells, score_queries, whitening
from ..evaluation.stats import cluster_bootstrap, cluster_mean
from ..files.cache import cached
from ..files.provenance import code_hash
from .runs import Run

# Components of log1p expression in which cells are compared.
_COMPONENTS = 50
_SHARES = (0.5, 1.0)
COLUMNS = (
    *("about", "name", "library", "scoring", "pooling", "query_size", "average", "level"),
    *("estimate", "ci_low", "ci_high", "chance", "n_queries", "n_conditions"),
)


def told_apart(screen: Screen, *, mask: str, root: Path, track: str = "in_dist") -> pd.DataFrame:
    """The tests of `perturbret.evaluation.resolvability.tell_apart` on a screen, made once for each mask and track.

    On the library cells of the split of seed 0: masked, log(1 + counts per 10,000), 50 principal components of the
    training cells. No query cell of the track is read, whatever the seed of a run.

    Parameters
    ----------
    screen : Screen
    mask, track : str
    root : pathlib.Path
        outputs/<dataset>; has the splits and the cache.
    """
    split = get_split(screen, track=track, seed=0, directory=root / "splits")
    key = {
        "cells": screen.fingerprint,
        "split": split.hash,
        "mask": mask,
        "masked": {name: columns.tolist() for name, columns in screen.target_columns.items()},
        "code": code_hash("data.prepared:prepare", "runs.limits:_test", without=("files",)),
    }

    def make(directory: Path) -> None:
        _test(prepare(screen, split, mask=mask)).to_parquet(directory / "tests.parquet", index=False)

    return pd.read_parquet(cached(root / "cache", "told_apart", key, make, verify=True) / "tests.parquet")


def _test(prepared: Prepared) -> pd.DataFrame:
    role = "train" if prepared.candidate_sets[0] == "train" else "gallery"
    train, rows = (by_name(prepared, prepared.where(each, controls=True)) for each in ("train", role))
    values = log1p(prepared.cells.take(rows), 10_000)
    leading = spectrum(log1p(prepared.cells.take(train), 10_000), _COMPONENTS)
    points = values @ leading.vectors - leading.mean @ leading.vectors
    batch = None if prepared.cells.batch is None else prepared.cells.batch[rows]
    return tell_apart(points, prepared.conditions[rows], batch=batch)


def find_limits(
    run: Run,
    encoder,
    embeddings: np.ndarray,
    summary: pd.DataFrame,
    *,
    library: str,
    scoring: str,
    query_sizes: Sequence[int],
    poolings: Sequence[str],
    n_resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Everything that the run's hit rates are to be read against, one number in a row.

    Parameters
    ----------
    run : Run
    encoder : Encoder
    embeddings : ndarray, shape (n, d)
        Of all cells of the run.
    summary : pandas.DataFrame
        From `perturbret.evaluation.judge.summarise`, of query cells.
    library, scoring : str
        The read-out that validation cells chose.
    query_sizes, poolings : sequence
        As the run was evaluated with.
    n_resamples, seed : int

    Returns
    -------
    pandas.DataFrame
        Columns `COLUMNS`; what each value of `about` means is in docs/method.md, "How many cells, and how far".
    """
    prepared, options = run.prepared, {"n_resamples": n_resamples, "seed": seed}
    readout = {"libraries": ("mean" if library == "none" else library,), "scorings": (scoring,), "seed": seed}
    readout["candidates"] = prepared.candidate_sets[0]
    scored = list(
        score_queries(
            encoder, prepared, role="query", query_sizes=query_sizes, poolings=("scores",), **readout
        )
    )
    at = {"library": library, "scoring": scoring}
    tables = [_needed(summary[(summary["library"] == library) & (summary["scoring"] == scoring)])]
    tables.append(_pooling(encoder, prepared, query_sizes, poolings, readout).assign(**at))
    tables.append(_merged(run, scored, options).assign(**at))
    tables += [_replicates(run, encoder, embeddings, options), _duplicates(prepared, embeddings, options)]
    # Elsewhere queries are not drawn as the posterior takes them to be: other guides, or held-out conditions only.
    if prepared.truth is not None and run.params["track"] == "in_dist":
        tables.append(_bound(prepared, scored, options).assign(**at))
    tables.append(_shape(prepared, embeddings, scored).assign(**at))
    return pd.DataFrame([row for table in tables for row in table.to_dict("records")], columns=COLUMNS)


def pooling_to_use(limits: pd.DataFrame) -> str | None:
    """How cells of one query are to be put together, as validation cells chose; else a way that was asked for."""
    chosen = limits[(limits["about"] == "pooling on validation") & (limits["name"] == "chosen")]
    asked = limits[limits["about"] == "cells needed"].sort_values("pooling", ascending=False)
    return next(iter([*chosen["pooling"], *asked["pooling"]]), None)


def _needed(summary: pd.DataFrame) -> pd.DataFrame:
    table = cells_needed(summary).rename(columns={"cells": "estimate", "low": "ci_low", "high": "ci_high"})
    return table.rename(columns={"largest": "query_size"}).assign(
        about="cells needed", name="cells", average="macro"
    )


def _pooling(encoder, prepared: Prepared, query_sizes, poolings, readout: dict) -> pd.DataFrame:
    """Hits of validation cells pooled in each way, at the largest size that half of their conditions reach."""
    reached = pd.Series(prepared.conditions[prepared.where("val")]).value_counts().median()
    sizes = [size for size in query_sizes if 1 < size <= reached]
    if not sizes or not poolings:
        return pd.DataFrame()
    names = candidate_names(prepared, prepared.candidate_sets[0], "val")
    scored = list(
        score_queries(encoder, prepared, role="val", query_sizes=(max(sizes),), poolings=poolings, **readout)
    )
    pools = pd.concat(
        [
            pd.DataFrame(
                {
                    "condition": each.queries.conditions,
                    "pooling": each.pooling,
                    "exact_hit@1": _hits(each, names),
                }
            )
            for each in scored
        ]
    )
    rows = pools.groupby("pooling", as_index=False).agg(
        estimate=("exact_hit@1", "mean"),
        n_queries=("exact_hit@1", "size"),
        n_conditions=("condition", "nunique"),
    )
    chosen = np.where(rows["pooling"] == choose_pooling(pools), "chosen", "tried")
    return rows.assign(about="pooling on validation", name=chosen, query_size=max(sizes), average="micro")


def _merged(run: Run, scored: list[Scored], options: dict) -> pd.DataFrame:
    prepared, rows = run.prepared, []
    names = candidate_names(prepared, prepared.candidate_sets[0], "query")
    tests = told_apart(
        run.screen, mask=run.params["mask"], track=run.params["track"], root=run.directory.parent
    )
    alike = merge_alike(tests, run.screen.conditions)
    for each in scored:
        hits = merged_hits(each.scores, each.queries.conditions, names, alike)
        for average in ("micro", "macro"):
            row = _mean(hits["merged_hit@1"], each.queries.conditions, average, options)
            row["chance"] = cluster_mean(hits["chance"], each.queries.conditions, average=average)[0]
            rows.append({**_of(each), **row, "average": average})
    return pd.DataFrame(rows).assign(about="alike merged", name="merged_hit@1")


def _replicates(run: Run, encoder, embeddings: np.ndarray, options: dict) -> pd.DataFrame:
    """Replicates among query cells, by cosine and whitened cosine of mean embeddings."""
    prepared = run.prepared
    rows, known = by_name(prepared, prepared.where("query")), by_name(prepared, prepared.where("train"))
    batch = None if prepared.cells.batch is None else prepared.cells.batch[rows]
    guide = run.screen.obs["guide"].to_numpy(str)[rows] if "guide" in run.screen.obs else None
    tables = []
    for scoring in LIBRARY_SCORINGS:
        space = whitening(encoder, prepared, known, embeddings[known]) if scoring == "whitened" else None
        found = replicates(
            embeddings[rows], prepared.conditions[rows], batch=batch, guide=guide, whiten=space, **options
        )
        tables.append(found.assign(scoring=scoring))
    table = pd.concat(tables).rename(columns={"n_cells": "query_size"})
    return table.assign(about="replicates", library="mean", pooling="embeddings", average="macro")


def _duplicates(prepared: Prepared, embeddings: np.ndarray, options: dict) -> pd.DataFrame:
    asked = by_name(prepared, prepared.where("query"))
    known = library_cells(prepared, prepared.candidate_sets[0], "query")
    rows = []
    for share in _SHARES:
        hits = duplicate_hits(
            embeddings[asked],
            prepared.conditions[asked],
            embeddings[known],
            prepared.conditions[known],
            share=share,
            seed=options["seed"],
        )
        rows.append(
            {"level": share, "estimate": hits.mean() if len(hits) else np.nan, "n_queries": len(hits)}
        )
    return pd.DataFrame(rows).assign(
        about="positive control",
        name="library cell mixed in",
        library="raw_cell",
        scoring="cosine",
        query_size=1,
    )


def _bound(prepared: Prepared, scored: list[Scored], options: dict) -> pd.DataFrame:
    """The exact posterior on the same queries, and the share of the range from chance to it that the run reaches.

    Micro of single cells by the posterior; macro, and pools, as if conditions were equally frequent.
    """
    names = candidate_names(prepared, prepared.candidate_sets[0], "query")
    exact = score_queries(
        fit_bayes(prepared),
        prepared,
        role="query",
        libraries=("mean",),
        query_sizes=[each.queries.size for each in scored],
        poolings=("scores",),
        scorings=("classifier", "classifier_corrected"),
        candidates=prepared.candidate_sets[0],
        seed=options["seed"],
    )
    best = {(each.scoring, each.queries.size): _hits(each, names) for each in exact}
    rows = []
    for each in scored:
        clusters, size = each.queries.conditions, each.queries.size
        chance = np.full(len(clusters), 1 / len(names))
        for average in ("micro", "macro") if size == 1 else ("macro",):
            bound = best["classifier" if average == "micro" else "classifier_corrected", size]
            of, more = _of(each) | {"average": average}, {"average": average, **options}
            rows.append({**of, "name": "exact posterior", **_mean(bound, clusters, average, options)})
            rows[-1]["chance"] = chance[0]
            found = share_of_range(_hits(each, names), bound, chance, clusters, **more)
            share = {"estimate": found.estimate[0], "ci_low": found.low[0], "ci_high": found.high[0]}
            rows.append({**of, "name": "share of the range from chance", **share})
    return pd.DataFrame(rows).assign(about="bound")


def _shape(prepared: Prepared, embeddings: np.ndarray, scored: list[Scored]) -> pd.DataFrame:
    """The shape of the embedding on training cells; hubs among the rankings of single query cells."""
    rows = by_name(prepared, prepared.where("train"))
    values = {
        "spread": spread(embeddings[rows]),
        "effective rank": effective_rank(embeddings[rows]),
        "R2 of log total": depth_r2(embeddings[rows], np.maximum(prepared.cells.totals[rows], 1)),
    }
    for each in scored:
        if each.queries.size == 1:
            found = hubness(rank_top(each.scores))
            values |= {"hubs: skewness": found["skewness"], "hubs: largest share": found["largest"]}
            values |= {"hubs: never first": found["never"]}
    return pd.DataFrame({"name": values.keys(), "estimate": values.values()}).assign(about="embedding")


def _hits(scored: Scored, names: Sequence[str]) -> np.ndarray:
    """exact_hit@1 of every query, ties in expectation."""
    place = pd.Index(names).get_indexer(scored.queries.conditions)
    return np.where(place >= 0, rank_top(scored.scores)[np.arange(len(place)), place], 0.0)


def _of(scored: Scored) -> dict:
    return {"pooling": scored.pooling, "query_size": scored.queries.size}


def _mean(hits, conditions: np.ndarray, average: str, options: dict) -> dict:
    found = cluster_bootstrap(np.asarray(hits), conditions, average=average, bounds=(0, 1), **options)
    row = {"estimate": found.estimate[0], "ci_low": found.low[0], "ci_high": found.high[0]}
    return row | {"n_queries": len(hits), "n_conditions": len(np.unique(conditions))}
