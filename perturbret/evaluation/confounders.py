"""Whether batch or depth alone tell the condition: what no score of such a screen could be told from."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..data.prepared import Prepared

# A nuisance beats chance clearly when luck does not explain it and it is right for this many times as many cells as
# chance, or for this share of those that chance leaves wrong. Why these: docs/method.md.
P_VALUE, LIFT, SHARE = 0.01, 1.5, 0.1
N_FOLDS = 5


@dataclass(frozen=True)
class Guess:
    """How often a guess from one property of a held-out cell is right.

    Attributes
    ----------
    hit_rate : float
        Share of the cells that are guessed right, by the most common label among the other cells with the property.
    shuffled : float
        The same, mean over shuffled labels: what remains without any relation.
    prior : float
        Share of the most common label, which needs no property to be named.
    p_value : float
        One-sided, of guessing so well with shuffled labels.
    """

    hit_rate: float
    shuffled: float
    prior: float
    p_value: float

    @property
    def chance(self) -> float:
        """The better of two guesses that know nothing of the cell: by shuffled labels, or the most common one."""
        return max(self.shuffled, self.prior)

    @property
    def share(self) -> float:
        """Share of what chance leaves wrong that is right: 0 no better than chance, 1 always right."""
        return (self.hit_rate - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0

    @property
    def significant(self) -> bool:
        return self.p_value < P_VALUE


@dataclass(frozen=True)
class Confounding:
    """What batch and depth of the training cells tell of their condition, controls left out.

    Attributes
    ----------
    condition_from_batch, batch_from_condition : Guess or None
        None where there are fewer than two batches.
    condition_from_depth : Guess
        From bins of the total and of the number of detected genes, both after masking.
    n_conditions, n_batches : int
        `n_batches` is 0 where the screen names none.
    n_confined : int
        Conditions with two or more training cells, all of them in one batch.
    n_shared_batches : int
        Batches that hold two or more conditions.
    """

    condition_from_batch: Guess | None
    batch_from_condition: Guess | None
    condition_from_depth: Guess
    n_conditions: int
    n_batches: int
    n_confined: int
    n_shared_batches: int

    @property
    def by_batch(self) -> bool:
        """The batch alone beats chance clearly: by `LIFT`, or by `SHARE`."""
        guess = self.condition_from_batch
        return (
            guess is not None
            and guess.significant
            and (guess.hit_rate >= LIFT * guess.chance or guess.share >= SHARE)
        )

    @property
    def by_depth(self) -> bool:
        """Depth alone beats chance by `SHARE`. Less is common, since perturbations change the size of cells too."""
        return self.condition_from_depth.significant and self.condition_from_depth.share >= SHARE

    @property
    def confounded(self) -> bool:
        return self.by_batch or self.by_depth

    def table(self) -> pd.DataFrame:
        """One row per guess: guess, hit_rate, shuffled, prior, share, p_value."""
        guesses = {
            "condition from batch": self.condition_from_batch,
            "batch from condition": self.batch_from_condition,
            "condition from depth": self.condition_from_depth,
        }
        shown = ("hit_rate", "shuffled", "prior", "share", "p_value")
        return pd.DataFrame(
            {"guess": name, **{each: getattr(guess, each) for each in shown}}
            for name, guess in guesses.items()
            if guess is not None
        )

    def findings(self) -> list[str]:
        """Markdown sentences; the first is the banner where the screen is confounded."""
        lines = [self._banner()] if self.confounded else []
        return [*lines, self._batch_line(), self._depth_line()]

    def _banner(self) -> str:
        cause = " and ".join(
            name for name, is_so in (("batch", self.by_batch), ("depth", self.by_depth)) if is_so
        )
        text = (
            f"**CONFOUNDED: a cell's {cause} alone tells much of its condition.** A method that recognises {cause} "
            "and knows nothing of perturbations scores high here, so a hit rate over all candidates is no evidence "
            "that a perturbation is recognised, a null control that holds does not change that (it permutes labels "
            "within batch), and no such score may be called free of leaks."
        )
        if not self.by_batch:
            return f"{text} Read every method by its excess over the opponent `library_size`."
        if not self.n_shared_batches:
            return (
                f"{text} No batch holds two conditions: batch effects and perturbation effects cannot be separated on "
                "this screen by any method."
            )
        return (
            f"{text} {self.n_shared_batches:,} of {self.n_batches:,} batches hold two or more conditions: only "
            "rankings among the conditions of a cell's own batch (`batch_hit@1`), and the excess over the opponent "
            "`batch`, say something of perturbations."
        )

    def _batch_line(self) -> str:
        guess, back = self.condition_from_batch, self.batch_from_condition
        if guess is None or back is None:
            return (
                "All training cells are of one batch."
                if self.n_batches
                else "The entry names no batch column: whether batches tell the condition cannot be checked here."
            )
        return (
            f"Batch: naming the most common condition of a cell's batch is right for {guess.hit_rate:.1%} of held-out "
            f"training cells, with shuffled labels for {guess.shuffled:.1%} (p = {guess.p_value:.3g}); naming the most "
            f"common batch of its condition for {back.hit_rate:.1%}, shuffled {back.shuffled:.1%} "
            f"(p = {back.p_value:.3g}). {self.n_confined:,} of {self.n_conditions:,} conditions lie in one batch "
            f"only; {self.n_shared_batches:,} of {self.n_batches:,} batches hold two or more conditions."
        )

    def _depth_line(self) -> str:
        guess = self.condition_from_depth
        beats = guess.significant and guess.hit_rate > guess.prior
        tells = "tells something of the condition" if beats else "tells no more than chance"
        return (
            f"Depth {tells}: total and detected genes after masking name the condition of {guess.hit_rate:.1%} of "
            f"held-out training cells, with shuffled labels of {guess.shuffled:.1%} (p = {guess.p_value:.3g}); always "
            f"naming the most common condition is right for {guess.prior:.1%}."
        )


def confounding(prepared: Prepared, *, n_permutations: int = 499, seed: int = 0) -> Confounding:
    """Measure on training cells how far batch and depth tell the condition.

    Guesses are cross-fitted: the label that a property stands for comes from the other four fifths of the cells. Labels
    are shuffled over all cells for `shuffled` and the p-value.

    Parameters
    ----------
    prepared : Prepared
        Only cells of role `train` are read, controls are not.
    n_permutations : int
    seed : int

    Raises
    ------
    ValueError
        `n_permutations` is below 1, or there are fewer than two conditions with training cells.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> screen = simulate_screen(n_singles=3, n_doubles=0, n_genes=30, cells_per_condition=40)
    >>> screen.obs["batch"] = screen.obs["condition"]
    >>> found = confounding(prepare(screen, make_split(screen.obs, seed=0), mask="all_targets"))
    >>> found.by_batch, found.condition_from_batch.hit_rate
    (True, 1.0)
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations: expected at least 1, got {n_permutations}")
    rows = prepared.where("train")
    labels, conditions = np.unique(prepared.conditions[rows], return_inverse=True)
    if len(labels) < 2:
        raise ValueError(f"conditions: expected two or more with training cells, got {list(labels)}")
    rng = np.random.default_rng(seed)
    folds = rng.permutation(len(rows)) % N_FOLDS
    by_batch = of_batch = None
    n_batches = n_shared = n_confined = 0
    if prepared.cells.batch is not None:
        names, batch = np.unique(prepared.cells.batch[rows], return_inverse=True)
        table = np.bincount(batch * len(labels) + conditions, minlength=len(names) * len(labels))
        table = table.reshape(len(names), len(labels))
        n_batches, n_shared = len(names), int(((table > 0).sum(axis=1) > 1).sum())
        if n_batches > 1:
            n_confined = int((((table > 0).sum(axis=0) == 1) & (table.sum(axis=0) > 1)).sum())
            by_batch = _guess(batch, conditions, folds, n_permutations, rng)
            of_batch = _guess(conditions, batch, folds, n_permutations, rng)
    depth = _depth_bins(prepared.cells.totals[rows], np.diff(prepared.cells.counts.indptr)[rows], len(labels))
    return Confounding(
        condition_from_batch=by_batch,
        batch_from_condition=of_batch,
        condition_from_depth=_guess(depth, conditions, folds, n_permutations, rng),
        n_conditions=len(labels),
        n_batches=n_batches,
        n_confined=n_confined,
        n_shared_batches=n_shared,
    )


def _guess(
    key: np.ndarray, label: np.ndarray, folds: np.ndarray, n_permutations: int, rng: np.random.Generator
) -> Guess:
    """Guess the label of each cell from its key by the other folds; against shuffled labels."""
    observed = _hits(key, label, folds)
    shuffled = np.array([_hits(key, rng.permutation(label), folds) for _ in range(n_permutations)])
    p_value = (1 + (shuffled >= observed).sum()) / (1 + n_permutations)
    prior = np.bincount(label).max() / len(label)
    return Guess(observed / len(key), float(shuffled.mean() / len(key)), float(prior), float(p_value))


def _hits(key: np.ndarray, label: np.ndarray, folds: np.ndarray) -> float:
    shape = (N_FOLDS, key.max() + 1, label.max() + 1)
    table = np.bincount((folds * shape[1] + key) * shape[2] + label, minlength=int(np.prod(shape))).reshape(
        shape
    )
    others = table.sum(axis=0) - table
    # A label's share of all other cells, below any count, settles ties and stands in for keys that are seen once.
    named = (others + others.sum(axis=1, keepdims=True) / (1 + 2 * len(key))).argmax(axis=2)
    return float(np.take_along_axis(table, named[:, :, None], axis=2).sum())


def _depth_bins(totals: np.ndarray, detected: np.ndarray, n_labels: int) -> np.ndarray:
    """Number of a cell's bin: quantiles of the total, each cut at quantiles of detected genes.

    Up to 8 x 8 bins, fewer where a bin would hold fewer than about five cells of a label.
    """
    n = int(np.clip(np.sqrt(len(totals) / (5 * n_labels)), 2, 8))
    first = _quantiles(totals, n)
    second = np.empty_like(first)
    for bin_ in np.unique(first):
        inside = first == bin_
        second[inside] = _quantiles(detected[inside], n)
    return first * n + second


def _quantiles(values: np.ndarray, n: int) -> np.ndarray:
    return np.searchsorted(np.quantile(values, np.arange(1, n) / n), values, side="left")
