"""What pretraining is worth: scGPT from random weights, from the shipped checkpoint, and adapted to the screen.

    python docs/experiments/pretraining.py --dataset norman_subset --jobs 2

Each network is tuned on 10, 25, 50 and 100% of the training cells' labels; read-outs and epochs are chosen on
validation cells, then the query cells are looked at once. Writes pretraining_<dataset>.csv, .svg and .md beside itself.
A fit that today's code made on the same data, of the same settings, is not made again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from perturbret.data.datasets import load_screen
from perturbret.data.prepared import prepare
from perturbret.data.screen import Screen
from perturbret.data.splits import get_split
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation.judge import evaluate
from perturbret.evaluation.stats import cluster_bootstrap
from perturbret.evaluation.validation import best_readout
from perturbret.files.atomic import replacing, write_text
from perturbret.files.provenance import code_hash, environment
from perturbret.networks.embedding import device_name
from perturbret.report.figures import new_figure
from perturbret.runs.runs import outputs_root
from perturbret.scgpt.backbone import fit_scgpt

HERE = Path(__file__).parent
STARTS = {
    "random": {"init": "random"},
    "shipped": {},
    "shipped + mlm": {"adapt": "mlm", "adapt_steps": 200},
}
MODES = ("frozen", "head", "lora_head")
SEEDS, SHARES = (0, 1, 2), (0.1, 0.25, 0.5, 1.0)
OPPONENTS = ("logreg", "pca")
COLOURS = {"random": "#8a8a8a", "shipped": "#1b6ca8", "shipped + mlm": "#c1440e"}
CODE = (
    "data.datasets",
    "data.prepared",
    "data.splits",
    "encoders.baselines",
    "evaluation.judge",
    "evaluation.validation",
    "networks.fit",
    "scgpt.backbone",
)

load = cache(load_screen)


def results(screen: Screen) -> Path:
    """Where fits of today's code on this screen are kept, a file each."""
    key = json.dumps([code_hash(*CODE), screen.fingerprint, STARTS])
    return outputs_root() / screen.name / "pretraining" / hashlib.sha256(key.encode()).hexdigest()[:16]


def fit(method: str, prepared, seed: int, directory: Path):
    """The encoder of `<mode> <start>` or of an opponent."""
    mode, _, start = method.partition(" ")
    if not start:
        return fit_baseline(mode, prepared, seed=seed).encoder
    settings = {"mode": mode, **STARTS[start]}
    return fit_scgpt(
        prepared, seed=seed, settings=settings, cache=directory, report=lambda line: None
    ).encoder


def measure(dataset: str, seed: int, share: float, methods: list[str]) -> pd.DataFrame:
    """Hits of every query of one split under every method; what is kept is read."""
    screen = load(dataset)
    root = outputs_root() / screen.name
    folder = results(screen)
    prepared = None
    tables = []
    for method in methods:
        path = folder / f"{method.replace(' ', '_')}_{share:g}_{seed}.csv"
        if not path.exists():
            started = time.perf_counter()
            if prepared is None:
                split = get_split(screen, track="in_dist", seed=seed, directory=root / "splits")
                prepared = prepare(screen, split, mask="all_targets", train_share=share)
            encoder = fit(method, prepared, seed, root / "cache")
            readout, validation = best_readout(encoder, prepared, seed=seed)
            scores = evaluate(
                encoder,
                prepared,
                role="query",
                libraries=("mean",),
                query_sizes=(1,),
                poolings=("scores",),
                scorings=(readout,),
                seed=seed,
            )
            row = {"seed": seed, "share": share, "method": method}
            row |= {"readout": readout, "validation": validation}
            found = scores[["query_id", "condition", "exact_hit@1", "mrr"]].round(4).assign(**row)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                found.to_csv(temporary, index=False, compression=None)
            print(
                f"seed {seed} share {share} {method}: {readout} validation {validation:.4f} "
                f"query {found['exact_hit@1'].mean():.4f} ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
        tables.append(pd.read_csv(path))
    return pd.concat(tables, ignore_index=True)


def measure_all(
    dataset: str, seeds: list[int], shares: list[float], methods: list[str], jobs: int = 1
) -> pd.DataFrame:
    """Every seed and share, the largest shares first, in as many processes as `jobs`."""
    asked = [(dataset, seed, share, methods) for share in sorted(shares, reverse=True) for seed in seeds]
    if jobs == 1:
        return pd.concat([measure(*one) for one in asked], ignore_index=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return pd.concat(pool.map(measure, *zip(*asked, strict=True)), ignore_index=True)


def difference(table: pd.DataFrame, method: str, other: str, share: float) -> tuple[float, float, float]:
    """Paired difference of exact_hit@1 on the same queries with its interval over conditions."""
    part = table[table["share"] == share]
    keys = ["seed", "query_id", "condition"]
    wide = part.pivot_table(index=keys, columns="method", values="exact_hit@1")[[method, other]].dropna()
    found = cluster_bootstrap(
        (wide[method] - wide[other]).to_numpy(), wide.index.get_level_values("condition"), seed=0
    )
    return tuple(float(np.ravel(value)[0]) for value in (found.estimate, found.low, found.high))


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel per mode: exact_hit@1 over the share of labels, a line per start, opponents dashed."""
    mean = table.groupby(["share", "method"])["exact_hit@1"].mean().unstack()
    modes = [mode for mode in MODES if any(method.startswith(f"{mode} ") for method in mean)]
    figure, axes = new_figure(3.5 * len(modes), 3.6, columns=len(modes))
    for axis, mode in zip(axes, modes, strict=True):
        for start, colour in COLOURS.items():
            if f"{mode} {start}" not in mean:
                continue
            line = mean[f"{mode} {start}"].dropna()
            axis.plot(line.index, line, "o-", color=colour, label=start, ms=4)
        for opponent, style in zip(OPPONENTS, ("--", ":"), strict=True):
            axis.plot(mean.index, mean[opponent], style, color="#3f8f4f", lw=1.2, label=opponent)
        axis.set(
            title=mode,
            xscale="log",
            xlabel="share of training labels",
            ylim=(0, float(mean.max().max()) * 1.1),
        )
        axis.set_xticks(mean.index, [f"{share:.0%}" for share in mean.index], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("exact_hit@1, single query cells")
    axes[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg")


def said(value: float, low: float, high: float) -> str:
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict(low, high)}"


def verdict(low: float, high: float) -> str:
    return "more" if low > 0 else "less" if high < 0 else "no clear difference"


def more_with_few(table: pd.DataFrame, mode: str) -> tuple[float, float, float] | None:
    """What pretraining is worth with the smallest share of labels less what it is worth with the largest, paired."""
    few, many = table["share"].min(), table["share"].max()
    keys = ["seed", "query_id", "condition"]
    wide = table.pivot_table(index=keys, columns=["method", "share"], values="exact_hit@1")
    needed = [(f"{mode} {start}", share) for start in ("shipped", "random") for share in (few, many)]
    if few == many or not set(needed) <= set(wide.columns):
        return None
    wide = wide[needed].dropna()
    worth = {share: wide[f"{mode} shipped", share] - wide[f"{mode} random", share] for share in (few, many)}
    found = cluster_bootstrap(
        (worth[few] - worth[many]).to_numpy(), wide.index.get_level_values("condition"), seed=0
    )
    return tuple(float(np.ravel(value)[0]) for value in (found.estimate, found.low, found.high))


def comparisons(table: pd.DataFrame) -> pd.DataFrame:
    """Every paired difference of the page: `what`, `mode`, `share`, `estimate`, `low`, `high`."""
    rows = []
    methods = table.groupby("share")["method"].agg(set)
    for what, one, other in (("pretraining", "shipped", "random"), ("adapting", "shipped + mlm", "shipped")):
        for mode in MODES:
            for share, there in methods.items():
                pair = (f"{mode} {one}", f"{mode} {other}")
                if set(pair) <= there:
                    rows.append((what, mode, share, *difference(table, *pair, share)))
    validation = table.groupby(["method", "share"])["validation"].mean().unstack()
    validation = validation[[" " in method for method in validation.index]]
    for share in methods.index:
        best = validation[share].idxmax()
        rows.append(("best", best, share, *difference(table, best, "logreg", share)))
    return pd.DataFrame(rows, columns=["what", "mode", "share", "estimate", "low", "high"])


def conclusion(table: pd.DataFrame, found: pd.DataFrame) -> str:
    """What follows from the intervals, whichever way it falls."""
    lines = []
    for what, name in (("pretraining", "Pretraining"), ("adapting", "Adapting to unlabelled training cells")):
        part = found[found["what"] == what]
        for mode in MODES:
            rows = part[part["mode"] == mode]
            if len(rows):
                counts = rows.apply(lambda row: verdict(row["low"], row["high"]), axis=1).value_counts()
                more, less = (counts.get(word, 0) for word in ("more", "less"))
                lines.append(
                    f"{name}, {mode}: clearly more hits at {more} of {len(rows)} shares of labels, clearly fewer at "
                    f"{less} ({rows['estimate'].min():+.3f} to {rows['estimate'].max():+.3f})."
                )
    for mode in MODES:
        values = more_with_few(table, mode)
        if values:
            few, many = table["share"].min(), table["share"].max()
            pays = {"more": "It pays more", "less": "It pays less"}.get(
                verdict(*values[1:]), "It is not shown to pay more"
            )
            lines.append(
                f"{pays} with {few:.0%} of labels than with {many:.0%}, {mode}: difference of the differences "
                f"{values[0]:+.3f} [{values[1]:+.3f}, {values[2]:+.3f}]."
            )
    best = found[found["what"] == "best"]
    above, below = (best["low"] > 0).sum(), (best["high"] < 0).sum()
    lines.append(
        f"Against logistic regression, the best of these on validation cells is clearly better at {above} of "
        f"{len(best)} shares and clearly worse at {below}."
    )
    return "\n".join(f"- {line}" for line in lines)


def report(table: pd.DataFrame, dataset: str) -> str:
    """The page: conclusions, a table of means, and paired differences in computed sentences."""
    seeds, shares = sorted(table["seed"].unique()), sorted(table["share"].unique())
    mean = table.groupby(["method", "share"])["exact_hit@1"].mean().unstack().round(3)
    lines = [f"# What pretraining is worth: {dataset}", ""]
    lines.append(
        f"exact_hit@1 of single query cells, mask all_targets, in_dist, mean of seeds {', '.join(map(str, seeds))}; "
        f"read-outs and epochs chosen on validation cells. Made by "
        f"`python docs/experiments/pretraining.py --dataset {dataset}{asked(table)}`."
    )
    found = comparisons(table)
    lines += ["", f"![curves](pretraining_{dataset}.svg)", "", conclusion(table, found), ""]
    lines += [
        f"| method | {' | '.join(f'{share:.0%}' for share in shares)} |",
        "| --- |" + " --- |" * len(shares),
    ]
    for method, row in mean.iterrows():
        lines.append(f"| {method} | {' | '.join('–' if np.isnan(v) else f'{v:.3f}' for v in row)} |")
    lines += ["", "Paired differences on the same queries, 95% intervals over conditions:", ""]
    titles = {
        "pretraining": "Pretraining, {mode}, {share:.0%} of labels",
        "adapting": "Adapting to unlabelled training cells, {mode}, {share:.0%} of labels",
        "best": "{share:.0%} of labels: the best of these on validation cells, {mode}, against logistic regression",
    }
    for row in found.itertuples():
        title = titles[row.what].format(mode=row.mode, share=row.share)
        lines.append(f"- {title}: {said(row.estimate, row.low, row.high)}.")
    made = environment(device_name())
    lines += ["", f"perturbret {made['packages']['perturbret']}, Python {made['python']}, {made['device']}."]
    return "\n".join(lines) + "\n"


def asked(table: pd.DataFrame) -> str:
    """Options of the command that makes this table, where they are not the defaults."""
    tuned = [method.split(" ", 1) for method in table["method"].unique() if " " in method]
    modes, starts = ({part[i] for part in tuned} for i in (0, 1))
    given = {
        "--seeds": (sorted(table["seed"].unique()), list(SEEDS)),
        "--shares": (sorted(table["share"].unique()), list(SHARES)),
        "--modes": ([mode for mode in MODES if mode in modes], list(MODES)),
        "--starts": (
            [f"'{start}'" for start in STARTS if start in starts],
            [f"'{start}'" for start in STARTS],
        ),
    }
    return "".join(
        f" {name} {' '.join(map(str, got))}" for name, (got, usual) in given.items() if got != usual
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="norman_subset")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--jobs", type=int, default=1, help="processes, each fitting other seeds and shares")
    options = parser.parse_args()
    methods = [*OPPONENTS, *(f"{mode} {start}" for mode in options.modes for start in options.starts)]
    table = measure_all(options.dataset, options.seeds, options.shares, methods, options.jobs)
    summary = table.groupby(["seed", "share", "method", "readout"])[["validation", "exact_hit@1", "mrr"]]
    with replacing(HERE / f"pretraining_{options.dataset}.csv") as temporary:
        summary.mean().round(4).reset_index().to_csv(temporary, index=False)
    draw(table, HERE / f"pretraining_{options.dataset}.svg")
    write_text(HERE / f"pretraining_{options.dataset}.md", report(table, options.dataset))


if __name__ == "__main__":
    main()
