"""How often 95% intervals of retrieval metrics hold the truth, and how often a difference is found where there is none.

    python benchmarks/coverage.py [--repeats 500] [--candidates] [--screens 0] [--out perturbret/resources/coverage.csv]

Every repeat is a new retrieval screen: G conditions are drawn from one population, cells from the conditions, and each
condition is a candidate for the query cells of all, so that hit rates hang on who else was drawn. The truth is the mean
of the estimate over other screens of G conditions (for two fits that differ by luck alone: 0).
`--candidates` also measures the intervals that were not chosen (docs/decisions/0004-intervals.md). `--screens N` runs
simulated screens of the package through its own split, mask, encoder and evaluation N times instead.
"""

import argparse
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit, logit, ndtr, ndtri, stdtrit

from perturbret.evaluation.stats import AVERAGES, cluster_bootstrap, paired_permutation_p
from perturbret.files.atomic import write_text

CONDITIONS = (8, 15, 30, 60)
# Median strength of a condition, and the standard deviation of log numbers of cells.
POPULATIONS = {
    "strong": {"strength": 3.0, "imbalance": 0.0},
    "strong, unbalanced": {"strength": 3.0, "imbalance": 0.8},
    "weak": {"strength": 1.2, "imbalance": 0.0},
    "weak, unbalanced": {"strength": 1.2, "imbalance": 0.8},
}
METRICS = ("exact_hit@1", "mrr")
# What is estimated: a method, its lead over a weaker one, its lead over its twin.
QUANTITIES = ("single", "difference", "no difference")
LEVEL = 0.95
WIDTH, PROGRAMS = 20, 16


def draw_scores(rng: np.random.Generator, n: int, *, strength: float, imbalance: float) -> tuple:
    """Metrics of three quantities on one new screen: {quantity: (queries, metrics)}, and the queries' conditions.

    Embeddings are Gaussian with unit noise. A fifth of the conditions do nothing (they are like controls, and like
    each other); the others follow one of 16 programs with a log-normal strength, and a third of them have nothing of
    their own beside it. 10 to 40% of the cells of a condition do not respond. 40 training and 20 query cells.
    """
    programs = np.random.default_rng(0).normal(size=(PROGRAMS, WIDTH))
    programs /= np.linalg.norm(programs, axis=1, keepdims=True)
    own = rng.normal(size=(n, WIDTH)) * 0.8 / np.sqrt(WIDTH) * (rng.random((n, 1)) > 1 / 3)
    amount = strength * rng.lognormal(-0.3, 0.8, n) * (rng.random(n) > 0.2)
    effects = amount[:, None] * (programs[rng.integers(PROGRAMS, size=n)] + own)
    silent = rng.uniform(0.1, 0.4, n)
    size = np.exp(rng.normal(0, imbalance, n))

    def cells(wanted, least):
        codes = np.repeat(np.arange(n), np.maximum(np.rint(wanted * size), least).astype(int))
        responds = rng.random(len(codes)) >= silent[codes]
        return effects[codes] * responds[:, None] + rng.normal(size=(len(codes), WIDTH)), codes

    (train, labels), (queries, true) = cells(40, 8), cells(20, 2)
    first = np.arange(len(labels)) % 2 == 0
    whole, one, other = (
        _metrics(queries, true, _means(train[part], labels[part], n))
        for part in (np.ones(len(labels), bool), first, ~first)
    )
    # The weaker method knows 8 of the 20 dimensions.
    weaker = _metrics(queries[:, :8], true, _means(train[:, :8], labels, n))
    return dict(zip(QUANTITIES, (whole, whole - weaker, one - other), strict=True)), true


def _means(cells: np.ndarray, codes: np.ndarray, n: int) -> np.ndarray:
    sums = np.stack([np.bincount(codes, column, n) for column in cells.T], axis=1)
    return sums / np.bincount(codes, minlength=n)[:, None]


def _metrics(queries: np.ndarray, true: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """exact_hit@1 and mrr by cosine; scores are continuous, so that there are no ties."""
    scores = queries @ (prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)).T
    rank = 1 + (scores > scores[np.arange(len(true)), true][:, None]).sum(axis=1)
    return np.stack([rank == 1, 1 / rank], axis=1).astype(float)


def averages(values: np.ndarray, clusters: np.ndarray, average: str) -> np.ndarray:
    if average == "micro":
        return values.mean(axis=0)
    return _means(values, clusters, clusters.max() + 1).mean(axis=0)


def measure(
    draw, n: int, *, repeats: int, target_repeats: int, n_resamples: int, candidates: bool, seed: int
) -> pd.DataFrame:
    """Coverage of every interval over screens of `n` conditions from `draw(rng, n)`.

    Returns
    -------
    pandas.DataFrame
        One row per interval, average, quantity and metric: target, coverage, width (median), and for `no difference`
        rejected, the share of permutation p-values up to 1 - LEVEL.
    """
    rng, others = (np.random.default_rng(child) for child in np.random.SeedSequence([seed, n]).spawn(2))
    columns = list(product(QUANTITIES, METRICS))
    bounds = [[0, 0, -1, -1, -1, -1], [1] * 6]
    null = np.array([quantity == QUANTITIES[2] for quantity, _ in columns])
    truth = {average: [] for average in AVERAGES}
    for _ in range(target_repeats):
        found, clusters = draw(others, n)
        values = np.concatenate(list(found.values()), axis=1)
        for average in AVERAGES:
            truth[average].append(averages(values, clusters, average))
    truth = {average: np.where(null, 0, np.mean(each, axis=0)) for average, each in truth.items()}
    held, widths, rejected = {}, {}, {average: [] for average in AVERAGES}
    for _ in range(repeats):
        found, clusters = draw(rng, n)
        values = np.concatenate(list(found.values()), axis=1)
        for average in AVERAGES:
            options = {"average": average, "n_resamples": n_resamples, "level": LEVEL}
            chosen = cluster_bootstrap(values, clusters, bounds=bounds, seed=seed, **options)
            intervals = {"chosen": (chosen.low, chosen.high)}
            if candidates:
                intervals |= alternatives(values, clusters, average, n_resamples, seed)
            for name, (low, high) in intervals.items():
                low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
                held.setdefault((name, average), []).append(
                    np.where(np.isnan(low), np.nan, (low <= truth[average]) & (truth[average] <= high))
                )
                widths.setdefault((name, average), []).append(high - low)
            none = values[:, null]
            test = {"average": average, "n_permutations": 1999, "seed": seed}
            p = [paired_permutation_p(column, clusters, **test) for column in none.T]
            rejected[average].append(np.array(p) <= 1 - LEVEL)
    rows = []
    for (name, average), each in held.items():
        coverage, width = np.mean(each, axis=0), np.median(widths[name, average], axis=0)
        found = np.full(len(columns), np.nan)
        found[null] = np.mean(rejected[average], axis=0)
        for i, (quantity, metric) in enumerate(columns):
            row = {"interval": name, "n_conditions": n, "average": average, "quantity": quantity}
            row |= {"metric": metric, "target": truth[average][i], "coverage": coverage[i]}
            rows.append(row | {"width": width[i], "rejected": found[i], "n_repeats": repeats})
    return pd.DataFrame(rows)


def alternatives(values, clusters, average: str, n_resamples: int, seed: int) -> dict:
    """Intervals that were not chosen, {name: (low, high)}; the logit one for shares only, NaN elsewhere."""
    sizes = np.bincount(clusters).astype(float)
    sums = np.stack([np.bincount(clusters, column) for column in values.T], axis=1)
    if average == "macro":
        sums, sizes = sums / sizes[:, None], np.ones(len(sizes))
    n, mean = len(sizes), sums.sum(axis=0) / sizes.sum()
    tail = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    t = stdtrit(n - 1, tail[1])
    without = (sums.sum(axis=0) - sums) / (sizes.sum() - sizes)[:, None]
    off = without.mean(axis=0) - without
    error = np.sqrt((n - 1) / n * (off**2).sum(axis=0))
    shares = sizes / sizes.sum()
    form = (shares / (1 - shares))[:, None] * (np.eye(n) - shares)
    form = form.T @ form
    wide = stdtrit(np.trace(form) ** 2 / (form**2).sum(), tail[1])
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples).astype(float)
    total = (drawn @ sizes)[:, None]
    resampled = drawn @ sums / total
    low, high = np.quantile(resampled, tail, axis=0)
    factor = t / ndtri(tail[1]) * np.sqrt(n / (n - 1))
    found = {
        "percentile": (low, high),
        "percentile, t-scaled": (mean + (low - mean) * factor, mean + (high - mean) * factor),
        "jackknife-t, G - 1": (mean - t * error, mean + t * error),
        "jackknife-t, Satterthwaite": (mean - wide * error, mean + wide * error),
    }
    residual = sums - mean * sizes[:, None]
    shift = drawn @ residual / total
    square = drawn @ residual**2 - 2 * shift * (drawn @ (residual * sizes[:, None]))
    square = np.maximum(square + shift**2 * (drawn @ sizes**2)[:, None], 0)
    scale = np.sqrt((residual**2).sum(axis=0)) / sizes.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(np.sqrt(square) / total > 1e-6 * scale, shift / (np.sqrt(square) / total), np.nan)
        ends = np.nan_to_num(np.nanquantile(ratio, tail, axis=0))
        both = np.nan_to_num(np.nanquantile(np.abs(ratio), LEVEL, axis=0))
    found["bootstrap-t"] = mean - ends[1] * scale, mean - ends[0] * scale
    found["bootstrap-t, symmetric"] = mean - both * scale, mean + both * scale
    below = ((resampled < mean).mean(axis=0) + (resampled <= mean).mean(axis=0)) / 2
    bias = ndtri(np.clip(below, 1 / n_resamples, 1 - 1 / n_resamples))
    skew = (off**3).sum(axis=0) / np.maximum(6 * (off**2).sum(axis=0) ** 1.5, 1e-300)
    z = bias + ndtri(tail)[:, None]
    level = ndtr(bias + z / (1 - skew * z))
    found["BCa"] = tuple(
        np.array([np.quantile(resampled[:, i], p) for i, p in enumerate(row)]) for row in level
    )
    inside = (np.arange(values.shape[1]) < len(METRICS)) & (mean > 0) & (mean < 1)
    at = np.where(inside, mean, 0.5)
    reach = wide * error / (at * (1 - at))
    found["logit, Satterthwaite"] = tuple(
        np.where(inside, expit(logit(at) + sign * reach), np.nan) for sign in (-1, 1)
    )
    return found


def screen_scores(rng: np.random.Generator, n: int) -> tuple:
    """As `draw_scores`, of a simulated screen that goes through split, mask, encoder and evaluation of the package."""
    from perturbret.data.prepared import prepare
    from perturbret.data.simulate import simulate_screen
    from perturbret.data.splits import get_split
    from perturbret.encoders.baselines import fit_baseline
    from perturbret.evaluation.judge import evaluate

    doubles = 2 * n // 5
    screen = simulate_screen(
        n_singles=n - doubles,
        n_doubles=doubles,
        cells_per_condition=50,
        n_control=100,
        n_genes=150,
        seed=int(rng.integers(2**31)),
    )
    with tempfile.TemporaryDirectory() as folder:
        split = get_split(screen, track="in_dist", seed=0, directory=folder)
    prepared = prepare(screen, split, mask="all_targets")

    encoders = {method: fit_baseline(method, prepared, seed=0).encoder for method in ("mean_shift", "pca")}

    def scores(method, library="mean", seed=0):
        table = evaluate(
            encoders[method],
            prepared,
            query_sizes=(1,),
            libraries=(library,),
            poolings=("scores",),
            scorings=("cosine",),
            seed=seed,
        )
        return table.sort_values("query_id", ignore_index=True)

    pca = scores("pca")
    clusters = np.unique(pca["condition"], return_inverse=True)[1]
    # Twins: prototypes of cells drawn with two seeds.
    tables = (pca, scores("mean_shift"), scores("pca", "bootstrap", 1), scores("pca", "bootstrap", 2))
    whole, weaker, one, other = (table[list(METRICS)].to_numpy(float) for table in tables)
    return dict(zip(QUANTITIES, (whole, whole - weaker, one - other), strict=True)), clusters


def packaged(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `measured_coverage`: mean and range over populations, metrics and quantities."""
    chosen = table[table["interval"] == "chosen"]
    chosen = chosen.assign(paired=chosen["quantity"] != QUANTITIES[0])
    groups = chosen.groupby(["n_conditions", "average", "paired"])
    rows = groups["coverage"].agg(measured="mean", lowest="min", highest="max").reset_index()
    rows["nominal"] = LEVEL
    rows["n_repeats"] = groups["n_repeats"].first().to_numpy()
    rejected = groups["rejected"].mean().to_numpy()
    rows["rejected"] = rejected
    order = ["n_conditions", "average", "paired", "nominal", "measured", "lowest", "highest"]
    return rows[[*order, "rejected", "n_repeats"]].round(4)


def markdown(rows: pd.DataFrame) -> str:
    lines = [
        "| conditions | average | estimate | held the truth | lowest to highest | p ≤ .05 without a difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.itertuples():
        kind = "difference" if row.paired else "one method"
        rejected = f"{row.rejected:.3f}" if row.paired else ""
        span = f"{row.lowest:.3f} to {row.highest:.3f}"
        lines.append(
            f"| {row.n_conditions} | {row.average} | {kind} | {row.measured:.3f} | {span} | {rejected} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--candidates", action="store_true")
    parser.add_argument("--screens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="packaged table, CSV; default: not written")
    parser.add_argument("--full", type=Path, help="table of every population, metric and interval, CSV")
    options = parser.parse_args()
    began, tables = time.process_time(), []
    common = {"n_resamples": options.resamples, "candidates": options.candidates, "seed": options.seed}
    populations = POPULATIONS
    if options.screens:
        tables.append(
            measure(
                screen_scores, 15, repeats=options.screens, target_repeats=options.screens, **common
            ).assign(population="simulated screens")
        )
        populations = {}
    for (name, population), n in product(populations.items(), CONDITIONS):

        def draw(rng, n, population=population):
            return draw_scores(rng, n, **population)

        found = measure(draw, n, repeats=options.repeats, target_repeats=2 * options.repeats, **common)
        tables.append(found.assign(population=name))
        print(f"{name}, {n} conditions: {time.process_time() - began:.0f} s", flush=True)
    table = pd.concat(tables, ignore_index=True)
    shown = table.groupby(["interval", "population", "n_conditions", "average"], sort=False)
    print(shown[["coverage", "width"]].agg(["mean", "min"]).round(3).to_string())
    rows = packaged(table)
    print(markdown(rows))
    if options.full:
        write_text(options.full, table.to_csv(index=False))
    if options.out:
        write_text(options.out, rows.to_csv(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
