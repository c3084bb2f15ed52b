"""Draw screens from a known model, so that the best possible ranking can be computed (docs/simulation.md)."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, vstack

from ..files.places import RESOURCES
from .conditions import CTRL, canonical_condition
from .screen import Screen

# Factor on the summed effects of a double's two targets. The kinds take turns over the doubles.
INTERACTIONS = {"additive": 1.0, "synergy": 1.5, "buffering": 0.5}

# Log fold change that a fully effective guide makes at its own target.
SELF_EFFECTS = {"activation": 2.0, "knockdown": -1.5, None: 0.0}

_TARGETS = """
KLF1 CEBPA CEBPB GATA1 GATA2 GATA3 SPI1 RUNX1 RUNX3 TAL1 LMO2 MYB MYC MAX IRF1 IRF4 IRF7 IRF8 STAT1 STAT3
STAT5A NFKB1 REL RELA JUN JUNB FOSB EGR1 ETS1 ETS2 ELF1 FLI1 IKZF1 IKZF3 TBX21 EOMES RORC FOXP3 BCL6 PRDM1
BATF MAF TCF7 LEF1 TOX NR4A1 KLF2 KLF4 BHLHE40 ZEB2 ID2 ID3 HOXA9 MEIS1 FOXO1 TP53 BRD4 EZH2 KMT2A DNMT3A
""".split()

_MEASURED = RESOURCES / "simulated_genes.txt"


@dataclass(frozen=True)
class Truth:
    """The parameters that a screen was drawn with.

    A cell of condition c with guide j in batch b has counts x_g ~ NB(mean = s * `means`[b, g] * exp(f_g),
    variance = mean + `dispersion`[g] * mean**2), independent over genes given (c, j, b, s): f =
    `log_fold_changes`[c, j] when the cell responds, 0 when it does not or is a control. s = R /
    `reference_exposure`; R, the UMIs outside the panel, is drawn independently of the condition.
    """

    genes: np.ndarray  # (G,)
    conditions: tuple[str, ...]  # C of them, sorted, controls left out
    batches: tuple[str, ...]  # B of them
    means: np.ndarray  # (B, G), UMIs of a control cell at the reference exposure, batch effects included
    dispersion: np.ndarray  # (G,)
    log_fold_changes: np.ndarray  # (C, J, G), natural log; efficacy, interaction and self-effect included
    guide_weights: np.ndarray  # (C, J), probability of each guide given the condition
    targets: tuple[str, ...]  # T of them
    efficacies: np.ndarray  # (T, J), of the guides of each target
    unresponsive: np.ndarray  # (C,), probability that a cell of the condition does not respond
    prior: np.ndarray  # (C,), share of each condition among perturbed cells
    interactions: dict[str, str]  # double -> key of INTERACTIONS
    reference_exposure: float
    cells: pd.DataFrame  # index: cell names; condition, guide (index j), responsive: what was drawn


def simulate_screen(
    *,
    name: str = "simulated",
    n_singles: int = 14,
    n_doubles: int = 10,
    cells_per_condition: int = 100,
    n_control: int | None = None,
    n_genes: int = 500,
    n_batches: int = 2,
    guides_per_target: int = 2,
    effect: float = 1.0,
    self_activation: str | None = "activation",
    measured_targets: float = 0.7,
    unresponsive: float = 0.2,
    dispersion: float = 0.3,
    depth: float = 150.0,
    batch_effect: float = 0.2,
    imbalance: float = 0.3,
    null: bool = False,
    seed: int = 0,
) -> Screen:
    """Draw a screen whose generating parameters are known.

    Parameters and cells come from two random streams of `seed`: screens that differ in `cells_per_condition`
    or `n_control` alone share all parameters but the rounding of class sizes.

    Parameters
    ----------
    name : str
        Of the screen.
    n_singles, n_doubles : int
        Conditions with one and with two targets; both targets of a double are singles too.
    cells_per_condition : int
        On average; see `imbalance`.
    n_control : int, optional
        Control cells; by default twice `cells_per_condition`.
    n_genes, n_batches, guides_per_target : int
    effect : float
        Standard deviation of the log fold changes of the genes in a program.
    self_activation : {'activation', 'knockdown', None}
        What a guide does to its own target's expression.
    measured_targets : float
        Share of the targets that are among the measured genes.
    unresponsive : float
        Mean probability that a perturbed cell looks like a control; conditions have 0.5 to 1.5 times it.
    dispersion : float
        Median of the genes' NB dispersions.
    depth : float
        Mean UMIs on the panel of a control cell at the reference exposure.
    batch_effect : float
        Standard deviation of log batch effects per gene.
    imbalance : float
        Class sizes are uniform within this fraction of `cells_per_condition`.
    null : bool
        No guide does anything.
    seed : int

    Returns
    -------
    Screen
        With `simulated=True` and `truth` set. `obs.total` is R plus the cell's UMIs on the panel, hence R is
        known exactly from masked counts and masked total under every mask policy.

    Raises
    ------
    ValueError
        Names an argument outside its range.

    Examples
    --------
    >>> screen = simulate_screen(n_singles=3, n_doubles=2, n_genes=40, cells_per_condition=10, seed=1)
    >>> screen.n_genes, len(screen.conditions), screen.simulated
    (40, 5, True)
    >>> sum("+" in condition for condition in screen.conditions)
    2
    """
    n_pairs = n_singles * (n_singles - 1) // 2
    n_measured = round(measured_targets * n_singles)
    kinds = f"one of {list(SELF_EFFECTS)}"
    _check("n_singles", n_singles >= 1, "at least 1", n_singles)
    _check("n_doubles", 0 <= n_doubles <= n_pairs, f"0 to {n_pairs}, the pairs of singles", n_doubles)
    _check("cells_per_condition", cells_per_condition >= 1, "at least 1", cells_per_condition)
    _check("n_control", n_control is None or n_control >= 0, "at least 0", n_control)
    _check("n_genes", n_genes >= max(1, n_measured), f"at least {max(1, n_measured)}", n_genes)
    _check("n_batches", n_batches >= 1, "at least 1", n_batches)
    _check("guides_per_target", guides_per_target >= 1, "at least 1", guides_per_target)
    _check("self_activation", self_activation in SELF_EFFECTS, kinds, self_activation)
    _check("measured_targets", 0 <= measured_targets <= 1, "0 to 1", measured_targets)
    _check("unresponsive", 0 <= unresponsive <= 2 / 3, "0 to 2/3", unresponsive)
    _check("dispersion", dispersion > 0, "above 0", dispersion)
    _check("depth", depth > 0, "above 0", depth)
    _check("imbalance", 0 <= imbalance < 1, "0 or more, below 1", imbalance)

    parameters, draws = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    targets, genes = _symbols(parameters, n_singles, n_measured, n_genes)

    # Log-normal means: few abundant genes, many near zero, as in droplet data.
    base = parameters.lognormal(0.0, 1.6, n_genes)
    base *= depth / base.sum()
    means = base * np.exp(parameters.normal(0.0, batch_effect, (n_batches, n_genes)))
    gene_dispersion = dispersion * parameters.lognormal(0.0, 0.4, n_genes)

    efficacies = parameters.uniform(0.35, 0.75, (n_singles, guides_per_target))
    efficacies[:, 0] = parameters.uniform(0.85, 1.0, n_singles)
    programs = _single_effects(parameters, n_singles, n_genes) * effect
    pairs = list(combinations(range(n_singles), 2))
    doubles = [pairs[i] for i in parameters.permutation(len(pairs))[:n_doubles]]
    kinds = [list(INTERACTIONS)[i % len(INTERACTIONS)] for i in range(n_doubles)]

    own = np.zeros((n_singles, n_genes))
    column = {symbol: i for i, symbol in enumerate(genes)}
    for t, symbol in enumerate(targets):
        if symbol in column:
            own[t, column[symbol]] = SELF_EFFECTS[self_activation]
    changes, interactions = {}, {}
    for members, kind in [*(((t,), "additive") for t in range(n_singles)), *zip(doubles, kinds, strict=True)]:
        condition = canonical_condition("+".join(targets[t] for t in members), control_label=CTRL)
        # Guide j of one target comes with guide j of the other.
        strength = efficacies[list(members)].T
        changes[condition] = strength @ (INTERACTIONS[kind] * programs[list(members)] + own[list(members)])
        if len(members) == 2:
            interactions[condition] = kind
    conditions = tuple(sorted(changes))
    log_fold_changes = np.stack([changes[condition] for condition in conditions])

    n_conditions = len(conditions)
    sizes = np.rint(cells_per_condition * parameters.uniform(1 - imbalance, 1 + imbalance, n_conditions))
    sizes = np.maximum(sizes, 1).astype(int)
    truth = {
        "genes": genes,
        "conditions": conditions,
        "batches": tuple(f"batch{b + 1}" for b in range(n_batches)),
        "means": means,
        "dispersion": gene_dispersion,
        "log_fold_changes": log_fold_changes * (0.0 if null else 1.0),
        "guide_weights": parameters.dirichlet(np.full(guides_per_target, 10.0), n_conditions),
        "efficacies": efficacies,
        "targets": targets,
        "unresponsive": unresponsive * parameters.uniform(0.5, 1.5, n_conditions),
        "prior": sizes / sizes.sum(),
        "interactions": interactions,
        "reference_exposure": 14_000.0,
    }
    n_control = 2 * cells_per_condition if n_control is None else n_control
    return _draw(draws, name, truth, sizes, n_control)


def _draw(rng, name: str, truth: dict, sizes: np.ndarray, n_control: int) -> Screen:
    """Draw the cells; controls are class -1."""
    n_guides = truth["guide_weights"].shape[1]
    # Shuffled, so that neither order nor names of cells say anything about their conditions.
    classes = np.repeat(np.append(np.arange(len(sizes)), -1), np.append(sizes, n_control))
    classes = rng.permutation(classes)
    n_cells = len(classes)
    control = classes < 0
    weights = np.where(control[:, None], 1 / n_guides, truth["guide_weights"][classes])
    guides = (rng.random(n_cells)[:, None] > np.cumsum(weights, axis=1)[:, :-1]).sum(axis=1)
    responsive = (rng.random(n_cells) >= truth["unresponsive"][classes]) & ~control
    batches = rng.integers(len(truth["batches"]), size=n_cells)
    reference = truth["reference_exposure"]
    exposure = np.maximum(np.rint(reference * rng.lognormal(-0.1 * batches, 0.4)), 1)

    blocks = []
    for rows in np.array_split(np.arange(n_cells), 1 + n_cells * len(truth["genes"]) // 2_000_000):
        change = truth["log_fold_changes"][classes[rows], guides[rows]] * responsive[rows, None]
        mean = (exposure[rows] / reference)[:, None] * truth["means"][batches[rows]] * np.exp(change)
        counts = rng.poisson(rng.gamma(1 / truth["dispersion"], truth["dispersion"] * mean))
        blocks.append(csr_matrix(counts.astype(np.float32)))
    counts = vstack(blocks, format="csr")

    index = pd.Index([f"cell{i:06d}" for i in range(n_cells)], name="cell")
    labels = np.where(control, CTRL, np.array(truth["conditions"])[classes])
    guide_names = {c: [_guide(c, j) for j in range(n_guides)] for c in [CTRL, *truth["conditions"]]}
    obs = pd.DataFrame(
        {
            "condition": labels,
            "total": exposure + np.asarray(counts.sum(axis=1), np.float64).ravel(),
            "batch": np.array(truth["batches"])[batches],
            "guide": [guide_names[c][j] for c, j in zip(labels, guides, strict=True)],
        },
        index=index,
    )
    cells = pd.DataFrame({"condition": labels, "guide": guides, "responsive": responsive}, index=index)
    return Screen(name, counts, truth["genes"], obs, simulated=True, truth=Truth(**truth, cells=cells))


def _symbols(rng, n_targets: int, n_measured: int, n_genes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Target symbols, and the sorted panel, of which the first `n_measured` targets are part.

    Real symbols as far as the lists reach, then `SIM00001`, `SIM00002`, ...
    """
    lines = _MEASURED.read_text(encoding="utf-8").splitlines()
    known = " ".join(line for line in lines if not line.startswith("#")).split()
    others = [known[i] for i in rng.permutation(len(known))]
    others += [f"SIM{i + 1:05d}" for i in range(max(0, n_targets + n_genes - len(known)))]
    targets = ([_TARGETS[i] for i in rng.permutation(len(_TARGETS))] + others)[:n_targets]
    rest = [symbol for symbol in others if symbol not in set(targets)]
    return tuple(targets), np.array(sorted(targets[:n_measured] + rest[: n_genes - n_measured]))


def _single_effects(rng, n_singles: int, n_genes: int) -> np.ndarray:
    """Log fold changes (n_singles, n_genes) in units of `effect`.

    About three targets share a program, which makes them hard to tell apart: what tells them apart is the
    program's strength and some genes of each target's own, weaker for some targets than for others.
    """
    n_programs = -(-n_singles // 3)
    programs = rng.normal(size=(n_programs, n_genes)) * (rng.random((n_programs, n_genes)) < 0.12)
    private = rng.normal(size=(n_singles, n_genes)) * (rng.random((n_singles, n_genes)) < 0.06)
    strength = rng.uniform(0.7, 1.3, (n_singles, 1))
    distinctness = rng.uniform(0.2, 1.0, (n_singles, 1))
    return strength * programs[np.arange(n_singles) % n_programs] + distinctness * private


def _guide(condition: str, j: int) -> str:
    return "+".join(f"{symbol}_g{j + 1}" for symbol in condition.split("+"))


def _check(name: str, holds: bool, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
