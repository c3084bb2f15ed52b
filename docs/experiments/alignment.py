"""What aligned genes are worth to pretraining, on SIMULATED cells whose gene programs are known.

    python docs/experiments/alignment.py --jobs 2

Reference cells and a screen are drawn from the same gene programs; the reference lists its genes in another order. Both
are aligned (`perturbret.alignment.panels`), the reference is remapped into their gene space, and one small scGPT is
pretrained on it. It is read in two ways: tokens are the genes of the space, or what the screen has at the number of the
reference's column, as if both listed the same genes. A third has random weights. Read-outs and epochs are chosen on
validation cells, then the query cells are looked at once. Writes alignment.csv, .svg and .md beside itself. A seed that
today's code made of the same design is not made again.
"""

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from perturbret.alignment.chunks import ChunkedCounts, chunked_in_space
from perturbret.alignment.gene_space import GeneSpace
from perturbret.alignment.panels import align_screen
from perturbret.alignment.remapping import verify_alignment
from perturbret.data.prepared import Prepared, prepare
from perturbret.data.screen import Screen
from perturbret.data.simulate import Truth, simulate_screen
from perturbret.data.splits import make_split
from perturbret.encoders.baselines import fit_baseline
from perturbret.encoders.bayes import fit_bayes
from perturbret.evaluation.judge import evaluate
from perturbret.evaluation.stats import cluster_bootstrap
from perturbret.evaluation.validation import best_readout
from perturbret.files.atomic import replacing, write_text
from perturbret.files.provenance import code_hash, environment
from perturbret.networks.embedding import device_name
from perturbret.report.figures import new_figure
from perturbret.runs.runs import outputs_root
from perturbret.scgpt.backbone import fit_scgpt
from perturbret.scgpt.corpus import make_corpus
from perturbret.scgpt.pretraining import Plan, pretrain, save_pretrained
from perturbret.scgpt.vocabulary import SPECIALS, Vocabulary

HERE = Path(__file__).parent
# Settings of each mode, and values that each arm chooses from on its own validation cells.
MODES = {
    "frozen": ({}, {}),
    "head": ({"batch_size": 16}, {"lr_head": [0.003, 0.01, 0.03]}),
    "lora_head": (
        {"batch_size": 16, "lr_head": 0.01, "epochs": 32, "patience": 10},
        {"lr_backbone": [0.001, 0.004]},
    ),
}
ARMS = {"aligned": "#1b6ca8", "shuffled": "#c1440e", "random": "#8a8a8a"}
ARM_NAMES = {
    "aligned": "pretrained, genes by name",
    "shuffled": "pretrained, genes by column number",
    "random": "not pretrained",
}
PAIRS = (("aligned", "shuffled"), ("aligned", "random"), ("shuffled", "random"))
OPPONENTS = ("logreg", "pca")
CEILING = "bayes_ceiling"
CODE = (
    "alignment.panels",
    "alignment.remapping",
    "encoders.baselines",
    "encoders.bayes",
    "evaluation.judge",
    "evaluation.validation",
    "data.simulate",
    "scgpt.corpus",
    "networks.fit",
    "scgpt.backbone",
    "scgpt.pretraining",
)


@dataclass(frozen=True)
class Design:
    """Sizes of the simulation and of the network.

    `state` and `effect` are standard deviations of a program's log activity: over reference cells, and over the
    conditions of the screen.
    """

    n_programs: int = 5
    genes_per_program: int = 10
    n_conditions: int = 12
    n_train: int = 5  # labelled cells per condition; likewise those below
    n_val: int = 15
    n_query: int = 100
    n_reference: int = 3000
    state: float = 1.0
    effect: float = 0.3
    counts_per_gene: float = 6.0
    dispersion: float = 0.1
    plan: Plan = Plan(
        d_model=32, n_heads=4, d_hid=64, n_layers=2, steps=1000, batch_cells=32, max_length=50,
        learning_rate=3e-3,
    )  # fmt: skip


def draw_truth(design: Design, rng: np.random.Generator, seed: int) -> tuple[Truth, np.ndarray]:
    """Parameters of the screen, and what a unit of each program's log activity does to each gene, (programs, genes)."""
    n_genes = design.n_programs * design.genes_per_program
    base = simulate_screen(
        n_singles=design.n_conditions, n_doubles=0, cells_per_condition=1, n_genes=n_genes, n_batches=1,
        guides_per_target=1, measured_targets=0.0, unresponsive=0.0, imbalance=0.0, seed=seed,
    ).truth  # fmt: skip
    program = rng.permutation(np.arange(n_genes) % design.n_programs)
    loadings = np.zeros((design.n_programs, n_genes))
    loadings[program, np.arange(n_genes)] = rng.uniform(0.7, 1.3, n_genes)
    activity = rng.normal(0, design.effect, (design.n_conditions, design.n_programs))
    truth = dataclasses.replace(
        base,
        means=design.counts_per_gene * rng.lognormal(0, 0.7, (1, n_genes)),
        dispersion=np.full(n_genes, design.dispersion),
        log_fold_changes=(activity @ loadings)[:, None],
    )
    return truth, loadings


def draw_cells(rng: np.random.Generator, truth: Truth, change: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """Counts and totals of cells with the given log fold changes, (cells, genes)."""
    exposure = np.rint(truth.reference_exposure * rng.lognormal(0, 0.3, len(change)))
    mean = (exposure / truth.reference_exposure)[:, None] * truth.means[0] * np.exp(change)
    counts = rng.poisson(rng.gamma(1 / truth.dispersion, truth.dispersion * mean)).astype(np.float32)
    return csr_matrix(counts), exposure + counts.sum(axis=1, dtype=np.float64)


def draw(design: Design, seed: int) -> tuple[Prepared, ChunkedCounts, GeneSpace]:
    """A prepared screen with few labels, reference cells of the same programs in another order, their gene space."""
    rng = np.random.default_rng([seed, 8])
    truth, loadings = draw_truth(design, rng, seed)
    sizes = np.array([design.n_train, design.n_val, design.n_query])
    classes = rng.permutation(np.repeat(np.arange(design.n_conditions), sizes.sum()))
    counts, totals = draw_cells(rng, truth, truth.log_fold_changes[classes, 0])
    names = pd.Index([f"cell{i:06d}" for i in range(len(classes))], name="cell")
    labels = np.array(truth.conditions)[classes]
    cells = pd.DataFrame({"condition": labels, "guide": 0, "responsive": True}, index=names)
    screen = Screen(
        f"alignment{seed}",
        counts,
        truth.genes,
        pd.DataFrame({"condition": labels, "total": totals, "batch": truth.batches[0]}, index=names),
        simulated=True,
        truth=dataclasses.replace(truth, cells=cells),
    )
    split = make_split(screen.obs, seed=seed, fractions=tuple(sizes / sizes.sum()))

    states = rng.normal(0, design.state, (design.n_reference, design.n_programs))
    order = rng.permutation(len(truth.genes))
    theirs, their_totals = draw_cells(rng, truth, states @ loadings)
    theirs = theirs[:, order].tocsr()

    def read(size):
        for start in range(0, design.n_reference, size):
            yield theirs[start : start + size], their_totals[start : start + size]

    reference = ChunkedCounts("reference", truth.genes[order], None, design.n_reference, read)
    with warnings.catch_warnings(action="ignore"):  # fewer genes than asked for
        space = align_screen(screen, [reference], split=split)
    verify_alignment(
        space, {screen.name: (screen.counts, screen.genes), "reference": (theirs, reference.genes)}
    )
    return prepare(screen, split, mask="all_targets"), reference, space


def write_checkpoints(
    design: Design, seed: int, genes: np.ndarray, reference: ChunkedCounts, space: GeneSpace, directory: Path
) -> dict:
    """Pretrain once and write the network under both namings of its tokens; the last row of its history."""
    by_name = Vocabulary((*space.names, *SPECIALS), "genes of the space")
    numbers = [column for (column,) in space.maps[reference.name].columns]
    by_column = Vocabulary((*map(str, genes[numbers]), *SPECIALS), "genes of the screen, by column number")
    corpus = make_corpus([chunked_in_space(reference, space)], by_name, directory=directory)
    made = pretrain(corpus, by_name, design.plan, seed=seed, report=lambda line: None)
    save_pretrained(directory / "aligned", made, by_name, space=space)
    save_pretrained(directory / "shuffled", made, by_column)
    return made.history.iloc[-1].to_dict()


def methods() -> list[str]:
    return [CEILING, *OPPONENTS, *(f"{mode} {arm}" for mode in MODES for arm in ARMS)]


def fit(method: str, prepared: Prepared, seed: int, directory: Path):
    """The encoder of `<mode> <arm>`, of an opponent or of the ceiling."""
    if method == CEILING:
        return fit_bayes(prepared)
    mode, _, arm = method.partition(" ")
    if not arm:
        return fit_baseline(mode, prepared, seed=seed).encoder
    start = {"checkpoint": str(directory / ("aligned" if arm == "random" else arm))}
    if arm == "random":
        start["init"] = "random"
    settings, search = MODES[mode]
    return fit_scgpt(
        prepared,
        seed=seed,
        settings={"mode": mode, **settings, **start},
        search=search,
        cache=directory / "cache",
        report=lambda line: None,
    ).encoder


def measure_seed(design: Design, seed: int, report=print) -> pd.DataFrame:
    """Hits of the query cells of each condition under every method."""
    prepared, reference, space = draw(design, seed)
    tables = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        started = time.perf_counter()
        last = write_checkpoints(design, seed, prepared.cells.genes, reference, space, directory)
        report(
            f"seed {seed}: pretrained, error of hidden values {last['gene']:.3f}, of gene means {last['mean']:.3f} "
            f"({time.perf_counter() - started:.0f} s)"
        )
        for method in methods():
            started = time.perf_counter()
            encoder = fit(method, prepared, seed, directory)
            readout, validation = (
                ("classifier", np.nan) if method == CEILING else best_readout(encoder, prepared, seed=seed)
            )
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
            found = scores.groupby("condition")["exact_hit@1"].agg(["sum", "size"]).reset_index()
            found = found.set_axis(["condition", "hits", "queries"], axis=1)
            row = {"seed": seed, "method": method, "readout": readout, "validation": validation}
            row |= {"hidden_error": last["gene"], "mean_error": last["mean"]}
            tables.append(found.assign(**row))
            report(
                f"seed {seed} {method}: {readout} validation {validation:.4f} query "
                f"{found['hits'].sum() / found['queries'].sum():.4f} ({time.perf_counter() - started:.0f} s)"
            )
    return pd.concat(tables, ignore_index=True)


def results(design: Design) -> Path:
    """Where seeds of today's code and this design are kept, a file each."""
    key = f"{code_hash(*CODE)} {design} {MODES}"
    return outputs_root() / "experiments" / f"alignment-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def kept_seed(design: Design, seed: int) -> pd.DataFrame:
    """`measure_seed`, or what is kept of it."""
    path = results(design) / f"{seed}.csv"
    if not path.exists():
        found = measure_seed(design, seed, report=lambda line: print(line, flush=True)).round(4)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            found.to_csv(temporary, index=False, compression=None)
    return pd.read_csv(path)


def measure(design: Design, seeds: list[int], jobs: int = 1) -> pd.DataFrame:
    """All seeds, in as many processes as `jobs`."""
    if jobs == 1:
        return pd.concat([kept_seed(design, seed) for seed in seeds], ignore_index=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return pd.concat(pool.map(partial(kept_seed, design), seeds), ignore_index=True)


def hits(table: pd.DataFrame, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exact_hit@1 of every query of a method, its condition in its seed, and its seed.

    Each query gets the mean of its condition: on their sum alone means and clustered intervals depend.
    """
    part = table[table["method"] == method].sort_values(["seed", "condition"])
    n = part["queries"].to_numpy(int)
    clusters = [
        f"{seed} {condition}" for seed, condition in zip(part["seed"], part["condition"], strict=True)
    ]
    values = part["hits"].to_numpy(float) / n
    return np.repeat(values, n), np.repeat(clusters, n), np.repeat(part["seed"].to_numpy(), n)


def chance(table: pd.DataFrame) -> float:
    return float((1 / table.groupby("seed")["condition"].nunique()).mean())


def level(table: pd.DataFrame, method: str) -> tuple[float, float, float]:
    """Mean exact_hit@1 with its interval over the conditions of all seeds."""
    values, clusters, _ = hits(table, method)
    return _numbers(cluster_bootstrap(values, clusters, seed=0))


def difference(table: pd.DataFrame, one: str, other: str) -> tuple[float, float, float]:
    """Paired difference with its interval over the conditions of all seeds."""
    (a, clusters, _), (b, _, _) = hits(table, one), hits(table, other)
    return _numbers(cluster_bootstrap(a - b, clusters, seed=0))


def by_seed(table: pd.DataFrame, one: str, other: str) -> np.ndarray:
    """The difference of each seed."""
    (a, _, seeds), (b, _, _) = hits(table, one), hits(table, other)
    return pd.Series(a - b).groupby(seeds).mean().to_numpy()


def _numbers(found) -> tuple[float, float, float]:
    return tuple(float(np.ravel(value)[0]) for value in (found.estimate, found.low, found.high))


def plot(table: pd.DataFrame, path: Path) -> None:
    """Left: exact_hit@1 of each arm in each mode. Right: what alignment adds, a small dot for each seed."""
    figure, (left, right) = new_figure(10.5, 4.0, columns=2)
    for shift, (arm, colour) in zip((-0.2, 0, 0.2), ARMS.items(), strict=True):
        for x, mode in enumerate(MODES):
            mean, low, high = level(table, f"{mode} {arm}")
            label = ARM_NAMES[arm] if x == 0 else None
            left.bar(x + shift, mean, 0.18, color=colour, alpha=0.75, label=label)
            left.plot([x + shift] * 2, [low, high], color="black", lw=1.2)
    lines = {
        "Bayes ceiling": (level(table, CEILING)[0], "-."),
        "logistic regression": (level(table, "logreg")[0], "--"),
        "chance": (chance(table), ":"),
    }
    for name, (value, style) in lines.items():
        left.axhline(value, ls=style, color="black", lw=1)
        left.text(len(MODES) - 0.6, value, f" {name}", ha="left", va="center", fontsize=8)
    left.set(
        ylabel="exact_hit@1, single query cells", ylim=(0, 1.25 * max(value for value, _ in lines.values()))
    )
    left.set_xlim(-0.4, len(MODES) - 0.6)
    left.legend(fontsize=8, loc="upper left")
    for shift, (one, other) in zip((-0.12, 0.12), PAIRS[:2], strict=True):
        for x, mode in enumerate(MODES):
            mean, low, high = difference(table, f"{mode} {one}", f"{mode} {other}")
            colour = ARMS[other]
            label = f"aligned − {other}" if x == 0 else None
            right.errorbar(
                x + shift, mean, [[mean - low], [high - mean]], fmt="o", color=colour, ms=6, label=label
            )
            seeds = by_seed(table, f"{mode} {one}", f"{mode} {other}")
            right.plot(np.full(len(seeds), x + shift + 0.08), seeds, ".", color=colour, alpha=0.5, ms=5)
    right.axhline(0, color="black", lw=0.8)
    right.set(ylabel="difference of exact_hit@1 on the same cells")
    right.set_ylim(bottom=right.get_ylim()[0] - 0.1)
    right.legend(fontsize=8, loc="lower left")
    for axis in (left, right):
        axis.set_xticks(range(len(MODES)), list(MODES))
        axis.grid(axis="y", alpha=0.25)
    figure.suptitle("SIMULATED DATA; bars: 95% intervals over the conditions of all seeds", fontsize=9.5)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def said(table: pd.DataFrame, one: str, other: str) -> str:
    value, low, high = difference(table, one, other)
    seeds = by_seed(table, one, other)
    verdict = "more" if low > 0 else "less" if high < 0 else "no clear difference"
    return (
        f"{value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}; above 0 in {(seeds > 0).sum()} of {len(seeds)} seeds "
        f"({seeds.min():+.3f} to {seeds.max():+.3f})"
    )


def conclusion(table: pd.DataFrame) -> str:
    """In which modes alignment matters, and how much of what pretraining adds is lost without it."""
    clear = {
        mode: [difference(table, f"{mode} {one}", f"{mode} {other}")[1] > 0 for one, other in PAIRS[:2]]
        for mode in MODES
    }
    against, beats = ([mode for mode, found in clear.items() if found[i]] for i in (0, 1))
    text = f"Alignment matters in {len(against)} of {len(MODES)} modes"
    text += f" ({', '.join(against)})" if against else ""
    text += f"; pretraining with aligned genes beats no pretraining in {len(beats)}"
    text += f" ({', '.join(beats)}).\n" if beats else "."
    for mode in beats:
        aligned, shuffled, none = (
            level(table, f"{mode} {arm}")[0] for arm in ("aligned", "shuffled", "random")
        )
        lost = (aligned - shuffled) / (aligned - none)
        text += (
            f"\n- {mode}: {aligned:.3f} aligned, {shuffled:.3f} by column number, {none:.3f} without pretraining: "
            f"the wrong index costs {lost:.0%} of what pretraining adds."
        )
    return text


def page(table: pd.DataFrame, design: Design) -> str:
    """The page: what was designed, a table of means, paired differences in computed sentences."""
    seeds = sorted(table["seed"].unique())
    plan = design.plan
    first = table.groupby("seed")[["hidden_error", "mean_error"]].first().mean()
    n_genes = design.n_programs * design.genes_per_program
    lines = ["# What aligned genes are worth to pretraining", ""]
    lines.append(
        "**SIMULATED DATA.** No biology follows from these numbers: the simulation was designed so that pretraining "
        "has something true to learn. Made by `python docs/experiments/alignment.py`."
    )
    lines += ["", "![hits and differences](alignment.svg)", "", conclusion(table), ""]
    lines += [
        "## Design",
        "",
        f"- **Programs.** {n_genes} genes in {design.n_programs} programs of {design.genes_per_program}. The log "
        "activity of a program adds to the log expression of its genes, weighted by 0.7 to 1.3; counts are negative "
        "binomial.",
        f"- **Reference.** {design.n_reference} cells without labels, as of many cell types: each program's log "
        f"activity is N(0, {design.state:g}²) in each cell. Its columns are in another order than the screen's.",
        f"- **Screen.** {design.n_conditions} conditions; each moves the same programs by N(0, {design.effect:g}²). "
        f"Per condition {design.n_train} labelled cells, {design.n_val} validation cells, {design.n_query} query "
        "cells. No target is measured, so that masks hide nothing.",
        f"- **Network.** scGPT of width {plan.d_model} and {plan.n_layers} layers, pretrained on hidden values for "
        f"{plan.steps} steps. On held-out reference cells its mean squared error is {first['hidden_error']:.3f}; "
        f"that of guessing each gene's mean is {first['mean_error']:.3f}.",
        "- **Arms.** *aligned*: tokens are the genes of the space that both data sets were aligned in, verified by "
        "value. *shuffled*: the same weights, tokens by column number, so that nearly all genes get the embedding of "
        "another gene. *random*: the same shape, not pretrained. All choose among the same settings, each on its own "
        "validation scores.",
        f"- **Seeds** {', '.join(map(str, seeds))}: each draws programs, conditions, cells, order and weights anew. "
        "Sizes and strengths were chosen on another seed.",
        "",
        "## exact_hit@1 of single query cells",
        "",
        f"Read-outs and epochs were chosen on validation cells. Chance is {chance(table):.3f}.",
        "",
        f"| mode | {' | '.join(ARM_NAMES.values())} |",
        "| --- |" + " --- |" * len(ARMS),
    ]
    for mode in MODES:
        cells = [level(table, f"{mode} {arm}") for arm in ARMS]
        shown = " | ".join(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in cells)
        lines.append(f"| {mode} | {shown} |")
    others = {"logistic regression": "logreg", "PCA": "pca", "the Bayes ceiling": CEILING}
    known = [f"{name} {level(table, method)[0]:.3f}" for name, method in others.items()]
    lines += ["", f"On the same cells: {', '.join(known)}.", ""]
    lines += ["## Paired differences", ""]
    lines.append(
        "On the same query cells; 95% intervals over the conditions of all seeds. Conditions of one seed share one "
        "pretraining, so that the range over seeds belongs beside each interval."
    )
    lines.append("")
    for mode in MODES:
        for one, other in PAIRS:
            lines.append(
                f"- {mode}, {one} against {other}: {said(table, f'{mode} {one}', f'{mode} {other}')}."
            )
        against = said(table, f"{mode} aligned", "logreg")
        lines.append(f"- {mode}, aligned against logistic regression: {against}.")
    made = environment(device_name())
    lines += ["", f"perturbret {made['packages']['perturbret']}, Python {made['python']}, {made['device']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with other seeds")
    options = parser.parse_args()
    design = Design()
    table = measure(design, options.seeds, options.jobs)
    with replacing(HERE / "alignment.csv") as temporary:
        table.to_csv(temporary, index=False)
    plot(table, HERE / "alignment.svg")
    write_text(HERE / "alignment.md", page(table, design))


if __name__ == "__main__":
    main()
