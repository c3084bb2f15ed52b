"""The question: singles that may be composed, measured doubles that ask, and the candidates that may answer."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..data.conditions import JOIN, targets
from ..data.effects import Effects

# What a query is ranked among, the smallest set first.
CANDIDATE_SETS = ("doubles", "singles+doubles", "pairs")


@dataclass(frozen=True)
class PairTask:
    """Which two genes was this?

    Candidates are pairs of rows of `effects`; a single is a pair of a row with itself. No prototype of a double is
    its own measurement: every candidate is composed of singles.

    Attributes
    ----------
    name, mask : str
        Of the dataset, and of the columns that were taken out.
    genes : tuple of str, length n
        Perturbed genes that were measured alone.
    effects : ndarray of float, shape (n, G)
        Of the singles.
    queries : tuple of str, length q
        Measured doubles of two such genes.
    values : ndarray of float, shape (q, G)
        Their effects.
    members : ndarray of int, shape (q, 2)
        Rows of their two singles, in ascending order.
    own : ndarray of float, shape (n + q, n)
        Effect on each single's own target, of all singles and queries, NaN where it is not measured or masked.
    left_out : tuple of str
        Measured doubles without one of their singles; they neither ask nor answer.
    halves : ndarray of float, shape (2, n + q, G), or None
        Singles, then queries, from disjoint halves of cells.
    """

    name: str
    mask: str
    genes: tuple[str, ...]
    effects: np.ndarray
    queries: tuple[str, ...]
    values: np.ndarray
    members: np.ndarray
    own: np.ndarray
    left_out: tuple[str, ...] = ()
    halves: np.ndarray | None = None

    @cached_property
    def candidates(self) -> np.ndarray:
        """All pairs of rows i < j in that order, then each row with itself, int (c, 2)."""
        n = len(self.genes)
        return np.concatenate([np.stack(np.triu_indices(n, 1), 1), np.repeat(np.arange(n)[:, None], 2, 1)])

    @cached_property
    def names(self) -> np.ndarray:
        """Conditions of the candidates, (c,)."""
        genes = np.array(self.genes, object)
        return np.array([JOIN.join(dict.fromkeys(pair)) for pair in genes[self.candidates]], str)

    @cached_property
    def true(self) -> np.ndarray:
        """Candidate that each query is, int (q,)."""
        i, j = self.members.T
        return i * (2 * len(self.genes) - i - 1) // 2 + j - i - 1

    @cached_property
    def gram(self) -> np.ndarray:
        """Inner products of the effects of singles, then queries, float (n + q, n + q)."""
        values = np.concatenate([self.effects, self.values])
        return values @ values.T

    def candidate_set(self, which: str) -> np.ndarray:
        """Candidates of one of `CANDIDATE_SETS`, sorted int."""
        n_pairs = len(self.candidates) - len(self.genes)
        sets = {
            "doubles": np.sort(self.true),
            "singles+doubles": np.r_[np.sort(self.true), n_pairs : len(self.candidates)],
            "pairs": np.arange(n_pairs),
        }
        return sets[which]

    def without(self, excluded) -> np.ndarray:
        """Queries that hold none of the singles in `excluded` (rows), int."""
        return np.flatnonzero(~np.isin(self.members, list(excluded)).any(axis=1))


def make_task(effects: Effects, mask: str = "all_targets") -> PairTask:
    """The task of a screen under a mask of columns.

    Raises
    ------
    ValueError
        Unknown mask; fewer than three singles, or no double of two of them.
    """
    shown = effects.masked(mask)
    row = {condition: i for i, condition in enumerate(shown.conditions)}
    genes = tuple(condition for condition in shown.conditions if len(targets(condition)) == 1)
    doubles = [condition for condition in shown.conditions if len(targets(condition)) == 2]
    known = [double for double in doubles if set(targets(double)) <= set(genes)]
    if len(genes) < 3 or not known:
        raise ValueError(
            f"{effects.name}: expected three singles and a double of two of them at least, got {len(genes)} "
            f"singles and {len(doubles)} doubles, {len(known)} of them of two measured singles"
        )
    at = {gene: i for i, gene in enumerate(genes)}
    rows = [row[condition] for condition in (*genes, *known)]
    own = np.full((len(rows), len(genes)), np.nan)
    for i, gene in enumerate(genes):
        columns = shown.target_columns[gene]
        if len(columns):
            own[:, i] = shown.values[np.ix_(rows, columns)].mean(axis=1)
    return PairTask(
        effects.name, mask, genes, shown.values[rows[: len(genes)]], tuple(known), shown.values[rows[len(genes) :]],
        np.array([sorted(at[gene] for gene in targets(double)) for double in known]), own,
        tuple(double for double in doubles if double not in known),
        None if shown.halves is None else shown.halves[:, rows],
    )  # fmt: skip
