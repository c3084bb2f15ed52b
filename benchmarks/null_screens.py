"""Do intervals cover chance where there is nothing to find? Simulated screens without effect, on every track.

    python benchmarks/null_screens.py [--repeats 50] [--csv coverage.csv]

Each repeat draws a screen without effect, fits PCA and logistic regression on each track and judges them with all
candidate sets, scorings, libraries, poolings and two query sizes. A row of the table: in what share of repeats the
95% interval of exact_hit@1 or mrr held chance, over all read-outs of that track, candidate set and query size; `low`
is the read-out that did least.
"""

import argparse
import itertools
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from perturbret.data.prepared import prepare
from perturbret.data.simulate import simulate_screen
from perturbret.data.splits import make_split
from perturbret.data.tracks import TRACKS
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation.judge import evaluate, summarise
from perturbret.evaluation.scoring import candidate_sets

SEARCH = {"pca": {"n_components": [8]}, "logreg": {"C": [0.1], "scale": [False]}}
KEYS = ["track", "candidates", "encoder", "library", "scoring", "query_size", "pooling", "metric", "average"]


def repeat(seed: int) -> pd.DataFrame:
    """A row per read-out, metric and average: whether its interval holds chance."""
    screen = simulate_screen(
        n_singles=9, n_doubles=9, n_genes=40, cells_per_condition=24, n_control=24, n_batches=5,
        guides_per_target=5, imbalance=0.0, null=True, seed=seed,
    )  # fmt: skip
    tables = []
    for track, encoder in itertools.product(TRACKS, SEARCH):
        prepared = prepare(screen, make_split(screen.obs, track=track, seed=0), mask="all_targets")
        fitted = fit_baseline(encoder, prepared, seed=0, search=SEARCH[encoder]).encoder
        for candidates in candidate_sets(prepared):
            scores = evaluate(fitted, prepared, candidates=candidates, query_sizes=(1, 5))
            scores = scores[scores["rank"].notna()]
            found = summarise(scores, n_resamples=200, seed=seed)
            found = found[found["metric"].isin(["exact_hit@1", "mrr"])]
            held = (found["ci_low"] <= found["chance"] + 1e-12) & (
                found["chance"] <= found["ci_high"] + 1e-12
            )
            tables.append(
                found.assign(track=track, encoder=encoder, held=held)[[*KEYS, "held", "estimate", "chance"]]
            )
    return pd.concat(tables, ignore_index=True)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Coverage by track, candidate set, query size and metric, micro average, and the read-out that covers least."""
    rows = rows[rows["average"] == "micro"]
    each = rows.groupby([key for key in KEYS if key != "average"], as_index=False).agg(
        held=("held", "mean"), n=("held", "size"), estimate=("estimate", "mean"), chance=("chance", "mean")
    )
    by = ["track", "candidates", "query_size", "metric"]
    lowest = each.loc[each.groupby(by)["held"].idxmin()].set_index(by)
    table = each.groupby(by).agg(held=("held", "mean"), repeats=("n", "max"))
    table["low"] = lowest["held"]
    table["read-out"] = lowest[["encoder", "library", "scoring", "pooling"]].agg(" ".join, axis=1)
    table["its mean"], table["chance"] = lowest["estimate"], lowest["chance"]
    return table.reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with ProcessPoolExecutor(asked.jobs) as pool:
        rows = pd.concat(pool.map(repeat, range(asked.repeats)), ignore_index=True)
    if asked.csv:
        rows.to_csv(asked.csv, index=False)
    print(summary(rows).round(3).to_string(index=False))
    print(
        f"95% of {asked.repeats} repeats within {2 * np.sqrt(0.95 * 0.05 / asked.repeats):.3f} is in line with 0.95"
    )


if __name__ == "__main__":
    main()
