"""Columns that name a perturbation all by themselves: guide captures, vector barcodes, targets under another name.

A mask works on names, and names can be wrong. This guard does not read them: it asks of every column of the masked
counts, and of every dimension of a given embedding, how well that column alone says which training cells are of one
condition. A gene that a perturbation moves seldom does; a trace of the guide does. Measure and threshold:
docs/method.md, "Columns that tell the condition".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csc_matrix, hstack

from ..data.conditions import targets
from ..data.prepared import Prepared
from .nulls import permute_conditions

# Matthews correlation from which a column nearly names the cells of a group. A column that is on in half of the
# group's cells and in no others has .71.
THRESHOLD = 0.7
# Cells of a group, below which it is not asked for; cells of a condition, above which more would tell nothing new.
MIN_CELLS, MAX_CELLS = 10, 200
# Columns just below the threshold that are listed for comparison.
N_SHOWN = 3
SHOWN = ["column", "tells", "by", "phi", "precision", "recall", "luck", "within_batch", "verdict"]
COUNT_LEVELS, EMBEDDING_LEVELS = 14, 32
_CHUNK = 4_000_000


def guard_columns(
    prepared: Prepared, *, accepted: Sequence[str] = (), n_permutations: int = 9, seed: int = 0
) -> pd.DataFrame:
    """Columns of the masked training cells that nearly name a condition, and the next best for comparison.

    For each column and each group of cells (a condition, or all conditions of one target) the cells that belong to
    the group are told by the column's level alone, with any set of levels: chosen on one half of the cells, judged
    on the other, and the other way round. At most `MAX_CELLS` cells of a condition are used, controls are not.

    Parameters
    ----------
    prepared : Prepared
        Only cells of role `train` are read.
    accepted : sequence of str
        Columns that the dataset's entry accepts by name (`accepted_columns`); `*` accepts all, for labels that are no
        perturbations (cell types), whose markers are what one looks for.
    n_permutations : int
        Times that all labels are shuffled for `luck`.
    seed : int

    Returns
    -------
    pandas.DataFrame
        One row per column whose best group reaches `THRESHOLD` and exceeds `luck`, then the best `N_SHOWN` of the
        others, most telling first: column (a gene, or `obsm:KEY[dimension]`, or `obsm:KEY` for an embedding as a
        whole), tells (the group), by (`high` values, `low` ones, or `value`, neither), phi (Matthews correlation of
        told and true, held out), precision, recall, luck (the largest phi of any column and group with shuffled
        labels), within_batch (mean phi of the same column and group with labels permuted within batch: what the
        batch alone explains; NaN without batches), verdict (`suspect`, `accepted`, `below`). For an embedding as a
        whole phi, precision and recall are medians over conditions, told by ridge regression on all dimensions. No
        row where no group has `MIN_CELLS` training cells.

    Raises
    ------
    ValueError
        `n_permutations` is below 1, or fewer than two conditions have training cells.

    Examples
    --------
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> screen = simulate_screen(n_singles=3, n_doubles=0, n_genes=30, cells_per_condition=60)
    >>> screen.obsm["score"] = (screen.obs["condition"] == screen.conditions[0]).to_numpy(float)[:, None]
    >>> found = guard_columns(prepare(screen, make_split(screen.obs, seed=0), mask="all_targets"))
    >>> found.loc[0, ["column", "verdict"]].tolist()
    ['obsm:score[0]', 'suspect']
    """
    if n_permutations < 1:
        raise ValueError(f"n_permutations: expected at least 1, got {n_permutations}")
    rng = np.random.default_rng(seed)
    rows = _some_cells(prepared, rng)
    conditions = prepared.conditions[rows]
    groups = _Groups.of(conditions)
    if not groups.names:
        return pd.DataFrame(columns=SHOWN)
    names, levels = _columns(prepared, rows)
    folds = _halves(groups.codes, rng)
    table = _best_groups(levels, groups, groups.codes, folds)
    shuffled = (rng.permutation(groups.codes) for _ in range(n_permutations))
    luck = max(_best_groups(levels, groups, codes, folds)["phi"].max() for codes in shuffled)
    least = max(THRESHOLD, np.nextafter(luck, 1))
    table["column"] = names
    table.loc[len(prepared.cells.genes) :, "by"] = "value"
    table = table.sort_values("phi", ascending=False, kind="stable")
    table = table.iloc[: int((table["phi"] >= least).sum()) + N_SHOWN]
    within = _within_batch(prepared, rows, groups, folds, levels, table, seed)
    table = table.assign(within_batch=within, tells=np.array(groups.names, object)[table["group"]])
    whole = [_whole_embedding(key, value[rows], groups, folds) for key, value in prepared.cells.obsm.items()]
    table = pd.concat([table, pd.DataFrame(whole)], ignore_index=True)
    fine = table["column"].isin(list(accepted)) | ("*" in accepted)
    known = np.where(fine, "accepted", "suspect")
    table["verdict"], table["luck"] = np.where(table["phi"] >= least, known, "below"), luck
    return table.sort_values("phi", ascending=False, kind="stable")[SHOWN].reset_index(drop=True)


def suspect(table: pd.DataFrame, encoder: str | None = None) -> list[str]:
    """Names of the columns that make a run suspect: telling and not accepted.

    `table` is from `guard_columns`. A run reads the genes, or the embedding `obsm:KEY` that its `encoder` is named
    after; None asks for all columns.
    """
    names = table.loc[table["verdict"] == "suspect", "column"]
    if encoder is None:
        return list(names)
    given = encoder if encoder.startswith("obsm:") else None
    own = (
        names.str.startswith("obsm:")
        if given is None
        else (names == given) | names.str.startswith(f"{given}[")
    )
    return list(names[~own] if given is None else names[own])


def guard_findings(table: pd.DataFrame, accepted: Sequence[str] = ()) -> list[str]:
    """What the table says, in Markdown sentences; `accepted` as given to `guard_columns`."""
    if table.empty:
        return [
            f"No condition has {MIN_CELLS} training cells: whether a single column tells it **was not checked**."
        ]
    lines = []
    bad, fine = (table[table["verdict"] == verdict] for verdict in ("suspect", "accepted"))
    if len(bad):
        listed = "; ".join(
            f"`{row.column}` tells {row.tells} (right for {row.precision:.0%} of the cells it names, finds "
            f"{row.recall:.0%} of them)"
            for row in bad.head(10).itertuples()
        )
        more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
        lines.append(
            f"**SUSPECT: {len(bad)} {'column nearly names' if len(bad) == 1 else 'columns nearly name'} a perturbation "
            f"without any other gene**: {listed}{more}. Guide captures, vector barcodes and targets under another "
            "name look like this, and so may a gene that one perturbation alone switches on. Leave such a column out, "
            "mask it (`extra_masked_genes`), or, where it is known to be an effect, name it in the dataset's entry: "
            f"`accepted_columns: [{', '.join(bad['column'].head(10))}]`. Until then no score counts as free of leaks."
        )
    else:
        top = table[table["verdict"] == "below"].head(1)
        nearest = "".join(
            f" The most telling of the others is `{row.column}` for {row.tells} (phi {row.phi:.2f}; {THRESHOLD} would "
            f"be suspect, shuffled labels reach {row.luck:.2f})."
            for row in top.itertuples()
        )
        which = "No column" if fine.empty else "No column but those below"
        lines.append(f"{which} of the masked cells nearly names a perturbation by itself.{nearest}")
    if len(fine):
        lines.append(f"Accepted by the dataset's entry although they do: {', '.join(fine['column'])}.")
    idle = sorted(set(accepted) - set(fine["column"]))
    if idle:
        lines.append(
            f"`accepted_columns` names {', '.join(idle)}, which no mask here leaves as telling columns."
        )
    return lines


@dataclass(frozen=True)
class _Groups:
    """Groups of cells that a column may name: each condition, and all conditions that share a target."""

    names: tuple[str, ...]
    codes: np.ndarray  # (n,), condition of each cell
    member: np.ndarray  # (conditions, groups), 1 where the condition is of the group

    @classmethod
    def of(cls, conditions: np.ndarray) -> "_Groups":
        labels, codes = np.unique(conditions, return_inverse=True)
        by_target: dict[str, list[int]] = {}
        for i, label in enumerate(labels):
            for gene in targets(str(label)):
                by_target.setdefault(gene, []).append(i)
        groups = {str(label): [i] for i, label in enumerate(labels)}
        groups |= {
            f"target {gene} ({len(rows)} conditions)": rows
            for gene, rows in by_target.items()
            if 1 < len(rows) < len(labels)
        }
        sizes = np.bincount(codes)
        groups = {name: rows for name, rows in groups.items() if sizes[rows].sum() >= MIN_CELLS}
        if len(labels) < 2:
            raise ValueError(
                f"conditions: expected two or more with training cells, got {list(map(str, labels))}"
            )
        member = np.zeros((len(labels), len(groups)), np.float32)
        for column, rows in enumerate(groups.values()):
            member[rows, column] = 1
        return cls(tuple(groups), codes, member)


def _some_cells(prepared: Prepared, rng: np.random.Generator) -> np.ndarray:
    """Positions of at most MAX_CELLS training cells of every condition."""
    rows = rng.permutation(prepared.where("train"))
    place = pd.Series(prepared.conditions[rows]).groupby(prepared.conditions[rows]).cumcount().to_numpy()
    return np.sort(rows[place < MAX_CELLS])


def _halves(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """0 or 1 for every cell; each condition is cut in two at random."""
    order = rng.permutation(len(codes))
    folds = np.empty(len(codes), int)
    folds[order] = pd.Series(codes[order]).groupby(codes[order]).cumcount().to_numpy() % 2
    return folds


def _columns(prepared: Prepared, rows: np.ndarray) -> tuple[list[str], csc_matrix]:
    """Names of all columns, and the level of each cell in them: of genes, then of every dimension in obsm.

    Counts of 0, 1, 2-3, 4-7, ... have the levels 0, 1, 2, 3, ...; values of embeddings are cut at quantiles.
    """
    counts = csc_matrix(prepared.cells.counts[rows])
    counts.data = np.minimum(np.frexp(counts.data)[1], COUNT_LEVELS - 1).astype(np.int8)
    names, blocks = list(map(str, prepared.cells.genes)), [counts]
    for key, value in prepared.cells.obsm.items():
        value = np.asarray(value)[rows].reshape(len(rows), -1)
        names += [f"obsm:{key}[{i}]" for i in range(value.shape[1])]
        blocks.append(csc_matrix(np.stack([_quantile_levels(column) for column in value.T], axis=1)))
    return names, hstack(blocks, format="csc") if len(blocks) > 1 else counts


def _quantile_levels(values: np.ndarray) -> np.ndarray:
    distinct = np.unique(values)
    if len(distinct) > EMBEDDING_LEVELS:
        distinct = np.unique(
            np.quantile(values, np.arange(EMBEDDING_LEVELS) / EMBEDDING_LEVELS, method="lower")
        )
    return (np.searchsorted(distinct, values, side="right") - 1).astype(np.int8)


def _best_groups(levels: csc_matrix, groups: _Groups, codes: np.ndarray, folds: np.ndarray) -> pd.DataFrame:
    """The group that each column tells best: group (its number), phi, precision, recall, by."""
    best = {name: np.zeros(levels.shape[1]) for name in ("phi", "precision", "recall")}
    best |= {"group": np.zeros(levels.shape[1], int), "by": np.full(levels.shape[1], "high", object)}
    for columns, told in _told(levels, groups, codes, folds):
        group = told.phi.argmax(axis=1)
        at = (np.arange(len(columns)), group)
        best["group"][columns], best["phi"][columns] = group, told.phi[at]
        best["precision"][columns] = told.hits[at] / np.maximum(told.named[at], 1)
        best["recall"][columns] = told.hits[at] / np.maximum(told.size[group], 1)
        best["by"][columns] = np.where(told.with_zero[at], "low", "high")
    return pd.DataFrame(best)


@dataclass(frozen=True)
class _Told:
    """Cells that columns name as a group's (`named`), and rightly so (`hits`), (columns, groups); `size` (groups,)."""

    hits: np.ndarray
    named: np.ndarray
    with_zero: np.ndarray
    size: np.ndarray
    n: float

    @property
    def phi(self) -> np.ndarray:
        return _phi(self.hits, self.named, self.size, self.n)


def _phi(hits: np.ndarray, named: np.ndarray, size: np.ndarray, n: float) -> np.ndarray:
    """Matthews correlation where `named` of n cells are named and `hits` of them are among the group's `size`."""
    spread = np.sqrt(np.maximum(named * (n - named), 0) * np.maximum(size * (n - size), 0))
    return np.divide(hits * n - named * size, spread, out=np.zeros(np.shape(spread)), where=spread > 0)


def _told(
    levels: csc_matrix, groups: _Groups, codes: np.ndarray, folds: np.ndarray
) -> Iterator[tuple[np.ndarray, _Told]]:
    """Blocks of columns with what they tell. Empty columns are left out."""
    n_conditions, n_groups = groups.member.shape
    filled = np.flatnonzero(np.diff(levels.indptr))
    top = np.maximum.reduceat(levels.data, levels.indptr[filled]).astype(int) if len(filled) else filled
    order = np.argsort(top, kind="stable")
    cells = np.stack([np.bincount(codes[folds == fold], minlength=n_conditions) for fold in (0, 1)])
    # Columns of few levels are cheap: they come in larger blocks.
    width = 2 * (np.sort(top) + 1) * max(n_conditions, n_groups)
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * width[stop] <= _CHUNK:
            stop += 1
        columns, n_levels = filled[order[start:stop]], int(top[order[stop - 1]]) + 1
        block = levels[:, columns]
        place = np.repeat(np.arange(len(columns)), np.diff(block.indptr))
        key = (folds[block.indices] * len(columns) + place) * n_levels + block.data
        shape = (2, len(columns), n_levels, n_conditions)
        key = key * n_conditions + codes[block.indices]
        table = np.bincount(key, minlength=int(np.prod(shape))).reshape(shape).astype(np.float32)
        table[:, :, 0] = cells[:, None] - table.sum(axis=2)
        yield columns, _cross_fitted(table, groups.member, cells.astype(np.float32))
        start = stop


def _cross_fitted(table: np.ndarray, member: np.ndarray, cells: np.ndarray) -> _Told:
    """Choose the levels that tell each group on one half of the cells and count hits on the other; twice.

    `table` (2, columns, levels, conditions) counts cells, `cells` (2, conditions) sums over its levels. The best set of
    levels for any group takes them in order of the group's share, so only as many sets as levels are tried.
    """
    inside, every = table @ member, table.sum(axis=3)[..., None]
    sizes, totals = cells @ member, cells.sum(axis=1)
    hits, named, with_zero = 0.0, 0.0, True
    for fit, test in ((0, 1), (1, 0)):
        share = np.divide(inside[fit], every[fit], out=np.full_like(inside[fit], -1), where=every[fit] > 0)
        order = np.argsort(-share, axis=1, kind="stable")

        def first(values, order=order):
            return np.cumsum(np.take_along_axis(np.broadcast_to(values, order.shape), order, axis=1), axis=1)

        chosen = _phi(first(inside[fit]), first(every[fit]), sizes[fit], totals[fit]).argmax(axis=1)[:, None]
        hits = hits + np.take_along_axis(first(inside[test]), chosen, axis=1)[:, 0]
        named = named + np.take_along_axis(first(every[test]), chosen, axis=1)[:, 0]
        with_zero = with_zero & (np.argmin(order, axis=1) <= chosen[:, 0])
    return _Told(hits, named, with_zero, sizes.sum(axis=0), float(totals.sum()))


def _within_batch(
    prepared: Prepared,
    rows: np.ndarray,
    groups: _Groups,
    folds: np.ndarray,
    levels: csc_matrix,
    table: pd.DataFrame,
    seed: int,
    repeats: int = 5,
) -> np.ndarray:
    """Mean phi of the listed columns for their groups when labels are permuted within batch."""
    if prepared.cells.batch is None or table.empty:
        return np.full(len(table), np.nan)
    batch, part, phi = prepared.cells.batch[rows], levels[:, table.index.to_numpy()], np.zeros(len(table))
    labels = np.unique(prepared.conditions[rows])
    for repeat in range(repeats):
        permuted = permute_conditions(
            prepared.conditions[rows], prepared.roles[rows], batch, seed=seed + repeat
        )
        for columns, told in _told(part, groups, np.searchsorted(labels, permuted), folds):
            phi[columns] += told.phi[np.arange(len(columns)), table["group"].to_numpy()[columns]] / repeats
    return phi


def _whole_embedding(
    key: str, values: np.ndarray, groups: _Groups, folds: np.ndarray
) -> Mapping[str, object]:
    """How well all dimensions of an embedding together tell the conditions, in the median over them."""
    true = np.eye(groups.codes.max() + 1)[groups.codes]
    values = np.asarray(values, np.float64).reshape(len(true), -1)
    told = np.zeros_like(true)
    for fit, test in ((folds == 0, folds == 1), (folds == 1, folds == 0)):
        centre, spread = values[fit].mean(axis=0), values[fit].std(axis=0)
        x = (values - centre) / np.where(spread > 0, spread, 1.0)
        gram = x[fit].T @ x[fit] / fit.sum()
        gram[np.diag_indices_from(gram)] += 1e-3
        weights = np.linalg.solve(gram, x[fit].T @ (true[fit] - true[fit].mean(axis=0)) / fit.sum())
        scores = x[test] @ weights + true[fit].mean(axis=0)
        told[np.flatnonzero(test), scores.argmax(axis=1)] = 1
    hits, named, size = (told * true).sum(axis=0), told.sum(axis=0), true.sum(axis=0)
    middle = {
        "phi": np.median(_phi(hits, named, size, len(true))),
        "precision": np.median(hits / np.maximum(named, 1)),
        "recall": np.median(hits / size),
    }
    return {"column": f"obsm:{key}", "tells": "half of all conditions", "by": "value", **middle}
