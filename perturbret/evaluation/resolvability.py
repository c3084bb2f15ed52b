"""Which conditions a given number of cells tells apart at all: from controls, and from each other.

Energy tests between the cells of two conditions, before any method. Formulas: docs/method.md.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from zlib import crc32

import numpy as np
import pandas as pd
from scipy.special import gammainc, gammaincc, ndtr

from ..data.conditions import CTRL

SIZES = (10, 20, 50, 100, 200)
FDR = 0.05
# Pairs are tested where there are at most so many (about 280 conditions); else conditions against controls only.
MAX_PAIRS = 40_000
# With fewer permutations than this as extreme as the observed cells, the tail of a fitted distribution is read.
_FEW = 10


def tell_apart(
    points: np.ndarray,
    conditions: np.ndarray,
    *,
    batch: np.ndarray | None = None,
    sizes: Sequence[int] = SIZES,
    n_permutations: int = 499,
    seed: int = 0,
) -> pd.DataFrame:
    """Test every condition against controls and against every other one, by some cells of each.

    The statistic is the energy distance of two samples (Szekely & Rizzo 2013, "Energy statistics: a class of statistics
    based on distances", J Stat Plan Inference 143:1249). Its p-value is that of labels permuted among the two
    conditions' cells, within batch: cells of a batch that holds one of the two only never move, and conditions without
    a batch in common have p = 1. Where fewer than ten permutations are as extreme, the tail is that of a Pearson type
    III distribution with the permutations' mean, variance and skewness (Winkler et al. 2016, "Faster permutation
    inference in brain imaging", NeuroImage 141:502). False discoveries are controlled by Benjamini & Hochberg (1995),
    among the tests of one size against controls, and among those between conditions.

    Parameters
    ----------
    points : ndarray, shape (n, d)
        Cells of the library, none of them a query; in the order of their names, so that nothing hangs on file order.
    conditions : ndarray of str, shape (n,)
        With `ctrl` for controls.
    batch : ndarray of str, shape (n,), optional
    sizes : sequence of int
        Cells of each condition, drawn once in an order in which smaller sizes are part of larger ones; all of a
        condition that has fewer. Sizes beyond the largest condition are cut to it. Of controls, which all conditions
        are compared with, as many as the largest size asks for, so that no few of them decide.
    n_permutations : int
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per test: n_cells, as asked; condition, other (`ctrl` for controls); n_condition, n_other, cells used;
        distance; p_value; q_value, adjusted for the false discovery rate; apart, whether that is at most `FDR`. No rows
        against controls where there are fewer than two of them, or of pairs where these are more than `MAX_PAIRS`.

    Raises
    ------
    ValueError
        There are fewer than two conditions, lengths differ, or a number is below its least.
    """
    from scipy.stats import false_discovery_control  # slow to import

    points, conditions = np.asarray(points, np.float64), np.asarray(conditions, str)
    if points.ndim != 2 or any(len(part) != len(points) for part in (conditions, batch) if part is not None):
        raise ValueError(f"points: expected a row for each of {len(conditions)} cells, got {points.shape}")
    names = sorted(set(conditions) - {CTRL})
    if len(names) < 2:
        raise ValueError(f"conditions: expected two or more, got {names}")
    if min(sizes, default=0) < 2 or n_permutations < 100:
        raise ValueError(f"expected sizes from 2, 100 permutations; got {tuple(sizes)}, {n_permutations}")
    strata = np.zeros(len(points), int) if batch is None else np.unique(batch, return_inverse=True)[1]
    drawn = {}
    for name in [*names, *([CTRL] if (conditions == CTRL).sum() > 1 else [])]:
        rng = np.random.default_rng([seed, crc32(name.encode())])
        drawn[name] = rng.permutation(np.flatnonzero(conditions == name))
    families = [[(name, CTRL) for name in names if CTRL in drawn], list(combinations(names, 2))]
    families = [pairs for pairs in families if 0 < len(pairs) <= MAX_PAIRS]
    largest = max(len(drawn[name]) for name in names)
    tables = []
    for size in sorted({min(size, largest) for size in sizes}):
        for pairs in families:
            rows = []
            for one, other in pairs:
                parts = drawn[one][:size], drawn[other][: max(sizes) if other == CTRL else size]
                found = _energy_test(points, strata, *parts, n_permutations, seed)
                rows.append((size, one, other, *map(len, parts), *found))
            columns = ["n_cells", "condition", "other", "n_condition", "n_other", "distance", "p_value"]
            table = pd.DataFrame(rows, columns=columns)
            table["q_value"] = false_discovery_control(table["p_value"])
            tables.append(table.assign(apart=table["q_value"] <= FDR))
    return pd.concat(tables, ignore_index=True)


def merge_alike(tests: pd.DataFrame, names: Sequence[str], n_cells: int | None = None) -> pd.DataFrame:
    """Which conditions count as one with each condition, since a test does not tell them apart.

    Not an equivalence: A may be like B, and B like C, while A and C are told apart. What was not tested stays by
    itself; without tests of pairs, conditions that are not told from controls are alike.

    Parameters
    ----------
    tests : pandas.DataFrame
        From `tell_apart`.
    names : sequence of str
        Conditions of the rows and columns.
    n_cells : int, optional
        The size whose tests count; by default the largest.

    Returns
    -------
    pandas.DataFrame of bool
        Symmetric, true on the diagonal.
    """
    at = tests[tests["n_cells"] == (tests["n_cells"].max() if n_cells is None else n_cells)]
    alike, pairs = at[~at["apart"]], at["other"] != CTRL
    place = pd.Index(names)
    merged = np.eye(len(place), dtype=bool)
    if pairs.any():
        ends = [place.get_indexer(alike.loc[pairs, side]) for side in ("condition", "other")]
        known = (ends[0] >= 0) & (ends[1] >= 0)
        rows, columns = (end[known] for end in ends)
        merged[rows, columns] = merged[columns, rows] = True
    else:
        weak = np.isin(place, alike["condition"])
        merged |= np.outer(weak, weak)
    return pd.DataFrame(merged, index=place, columns=place)


def apart_by_size(tests: pd.DataFrame) -> pd.DataFrame:
    """How much is told apart by how many cells.

    Returns
    -------
    pandas.DataFrame
        One row per size: n_cells; n_conditions; from_controls, the number of conditions told from controls; pairs, the
        share of pairs told apart; alike, the median number of other conditions that a condition is not told from;
        alone, the number of conditions told from all others. NaN where there were no such tests.
    """
    names = _tested(tests)
    rows = []
    for size, part in tests.groupby("n_cells", sort=True):
        control = part["other"] == CTRL
        row = {"n_cells": size, "n_conditions": len(names)}
        row["from_controls"] = part.loc[control, "apart"].sum() if control.any() else np.nan
        others = merge_alike(tests, names, size).to_numpy().sum(axis=1) - 1
        row["pairs"] = part.loc[~control, "apart"].mean()
        if not control.all():
            row |= {"alike": np.median(others), "alone": (others == 0).sum()}
        rows.append(row)
    columns = ["n_cells", "n_conditions", "from_controls", "pairs", "alike", "alone"]
    return pd.DataFrame(rows, columns=columns)


def apart_by_condition(tests: pd.DataFrame) -> pd.DataFrame:
    """What each condition is told from.

    Returns
    -------
    pandas.DataFrame
        One row per condition: n_cells, used at the largest size; distance, p_value and q_value against controls at it;
        cells_from_controls, the smallest size from which on all sizes tell it from controls (NaN: not even the
        largest); n_alike and alike, the other conditions that the largest size does not tell it from.
    """
    names, merged = _tested(tests), merge_alike(tests, _tested(tests))
    control, largest = tests[tests["other"] == CTRL], tests[tests["n_cells"] == tests["n_cells"].max()]
    n_cells = dict(zip(largest["other"], largest["n_other"], strict=True))
    n_cells |= dict(zip(largest["condition"], largest["n_condition"], strict=True))
    rows = []
    for name in names:
        row = {"condition": name, "n_cells": n_cells[name]}
        own = control[control["condition"] == name].sort_values("n_cells", ascending=False)
        if len(own):
            row |= own.iloc[0][["distance", "p_value", "q_value"]].to_dict()
            row["cells_from_controls"] = own.loc[own["apart"].astype(int).cummin() == 1, "n_cells"].min()
        others = [other for other in names if merged.loc[name, other] and other != name]
        rows.append(row | {"n_alike": len(others), "alike": "|".join(others)})
    return pd.DataFrame(rows)


def _tested(tests: pd.DataFrame) -> list[str]:
    return sorted({*tests["condition"], *tests["other"]} - {CTRL})


def _energy_test(
    points: np.ndarray, strata: np.ndarray, one: np.ndarray, other: np.ndarray, n_permutations: int, seed: int
) -> tuple[float, float]:
    """Energy distance of the cells `one` and `other` (positions), and its p-value."""
    cells, first = np.concatenate([one, other]), np.repeat([True, False], [len(one), len(other)])
    order = np.lexsort((~first, strata[cells]))
    cells, first = cells[order], first[order]
    held = strata[cells]
    layout = tuple((int(first[held == s].sum()), int((~first[held == s]).sum())) for s in np.unique(held))
    found = _energy(_shuffled(layout, n_permutations, seed), _distances(points[cells]))
    observed, permuted = float(found[0]), found[1:]
    extreme = int((permuted >= observed - 1e-6 * abs(observed)).sum())
    if extreme >= _FEW:
        return observed, (1 + extreme) / (1 + n_permutations)
    return observed, _pearson_tail(observed, permuted)


@lru_cache(maxsize=32)
def _shuffled(layout: tuple[tuple[int, int], ...], n_permutations: int, seed: int) -> np.ndarray:
    """Who is of the first sample, float32 (1 + n_permutations, n): as it is, then permuted within strata.

    `layout` has the number of cells of the first and of the other sample in each stratum, in which order cells stand.
    """
    rng = np.random.default_rng(seed)
    rows = [np.repeat(np.float32([1, 0]), counts) for counts in layout]
    parts = [np.vstack([row, rng.permuted(np.tile(row, (n_permutations, 1)), axis=1)]) for row in rows]
    return np.concatenate(parts, axis=1)


def _distances(points: np.ndarray) -> np.ndarray:
    """Euclidean distances, float32 (n, n)."""
    squares = np.einsum("ij,ij->i", points, points)
    squared = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(np.maximum(squared, 0)).astype(np.float32)


def _energy(first: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Energy distance for each row of `first` (b, n), 1 for cells of the first sample and 0 for the others."""
    sums, n_first = distances.sum(axis=1, dtype=np.float64), first[0].sum(dtype=np.float64)
    n_other = len(distances) - n_first
    within = np.einsum("ij,ij->i", first @ distances, first, dtype=np.float64)
    reached = first @ sums
    between, rest = reached - within, sums.sum() - 2 * reached + within
    return 2 * between / (n_first * n_other) - within / n_first**2 - rest / n_other**2


def _pearson_tail(observed: float, permuted: np.ndarray) -> float:
    """Probability of at least `observed` under a Pearson type III distribution with the moments of `permuted`."""
    centred = permuted - permuted.mean()
    spread = np.sqrt(np.mean(centred**2))
    if spread <= 1e-6 * max(abs(observed), np.abs(permuted).max()):  # nothing moves
        return 1.0
    z, skewness = (observed - permuted.mean()) / spread, np.mean(centred**3) / spread**3
    shape = 4 / max(skewness**2, 1e-6)
    place = max(shape + np.sign(skewness) * z * np.sqrt(shape), 0.0)
    tail = (
        ndtr(-z)
        if abs(skewness) < 1e-3
        else gammaincc(shape, place)
        if skewness > 0
        else gammainc(shape, place)
    )
    return max(float(tail), np.finfo(float).tiny)
