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

from perturbret.atomic import replacing, write_text
from perturbret.baselines import fit_baseline
from perturbret.datasets import load_screen
from perturbret.evaluate import evaluate
from perturbret.figures import new_figure
from perturbret.model import device_name
from perturbret.modes import fit_scgpt
from perturbret.prepare import prepare
from perturbret.provenance import code_hash, environment
from perturbret.runs import outputs_root
from perturbret.screen import Screen
from perturbret.splits import get_split
from perturbret.stats import paired_difference
from perturbret.validation import best_readout

HERE = Path(__file__).parent
STARTS = {
    "random": {"init": "random"},
    "shipped": {},
    "shipped + mlm": {"adapt": "mlm", "adapt_steps": 200},
}
MODES = ("frozen", "head", "lora_head")
OPPONENTS = ("logreg", "pca")
COLOURS = {"random": "#8a8a8a", "shipped": "#1b6ca8", "shipped + mlm": "#c1440e"}
CODE = ("datasets", "splits", "prepare", "evaluate", "validation", "baselines", "modes")

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
    found = paired_difference(
        wide[method].to_numpy(), wide[other].to_numpy(), wide.index.get_level_values("condition"), seed=0
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
    verdict = "more" if low > 0 else "less" if high < 0 else "no clear difference"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}"


def report(table: pd.DataFrame, dataset: str) -> str:
    """The page: a table of means, and paired differences in computed sentences."""
    seeds, shares = sorted(table["seed"].unique()), sorted(table["share"].unique())
    mean = table.groupby(["method", "share"])["exact_hit@1"].mean().unstack().round(3)
    done = {method.split(" ", 1)[0] for method in mean.index}
    asked = "" if done >= set(MODES) else f" --modes {' '.join(mode for mode in MODES if mode in done)}"
    lines = [f"# What pretraining is worth: {dataset}", ""]
    lines.append(
        f"exact_hit@1 of single query cells, mask all_targets, in_dist, mean of seeds {', '.join(map(str, seeds))}; "
        f"read-outs and epochs chosen on validation cells. Made by "
        f"`python docs/experiments/pretraining.py --dataset {dataset}{asked}`."
    )
    lines += ["", f"![curves](pretraining_{dataset}.svg)", ""]
    lines += [
        f"| method | {' | '.join(f'{share:.0%}' for share in shares)} |",
        "| --- |" + " --- |" * len(shares),
    ]
    for method, row in mean.iterrows():
        lines.append(f"| {method} | {' | '.join('–' if np.isnan(v) else f'{v:.3f}' for v in row)} |")
    if mean.isna().any(axis=None):
        lines += ["", "–: not run."]
    lines += ["", "Paired differences on the same queries, 95% intervals over conditions:", ""]
    for title, one, other in (
        ("Pretraining", "shipped", "random"),
        ("Adapting to unlabelled training cells", "shipped + mlm", "shipped"),
    ):
        for mode in MODES:
            for share in shares:
                methods = set(table.loc[table["share"] == share, "method"])
                pair = (f"{mode} {one}", f"{mode} {other}")
                if set(pair) <= methods:
                    lines.append(
                        f"- {title}, {mode}, {share:.0%} of labels: {said(*difference(table, *pair, share))}."
                    )
    validation = table.groupby(["method", "share"])["validation"].mean().unstack()
    validation = validation[[" " in method for method in validation.index]]
    for share in shares:
        best = validation[share].idxmax()
        lines.append(
            f"- {share:.0%} of labels: the best of these on validation cells, {best}, against logistic regression: "
            f"{said(*difference(table, best, 'logreg', share))}."
        )
    made = environment(device_name())
    lines += ["", f"perturbret {made['packages']['perturbret']}, Python {made['python']}, {made['device']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="norman_subset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
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
