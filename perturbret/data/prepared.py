"""Screen + split + mask policy -> the cells that an encoder may see, and the context they stand in."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.sparse import csr_matrix

from ..files.hashing import mix, name_seeds
from .conditions import CTRL
from .masking import mask_counts, mask_totals
from .screen import Screen
from .splits import Split
from .tracks import find_track

# Role of training cells whose labels are put aside, to see what fewer labels do.
UNLABELLED = "unlabelled"


class ContextMismatch(ValueError):
    """An encoder met data, a split, a mask or a gene panel that it was not made with."""


@dataclass(frozen=True)
class Context:
    """What an encoder was fitted on; saved with it and compared before it is evaluated."""

    dataset: str
    fingerprint: str
    split_id: str
    split_hash: str
    mask: str
    n_genes: int
    gene_hash: str
    train_share: float = 1.0
    cells_hash: str = ""

    def check(self, other: "Context", ablation: Sequence[str] = ()) -> None:
        """Raise unless `other` equals this context in every field that is not a declared ablation.

        Whatever differs changes the cells, so their hash is not compared where an ablation is declared.

        Parameters
        ----------
        other : Context
            The context of the data at hand.
        ablation : sequence of str
            Names of fields that are meant to differ.

        Raises
        ------
        ContextMismatch
            Names the first differing field and both values.
        """
        for name, mine in asdict(self).items():
            if name == "cells_hash" and ablation:
                continue
            if name not in ablation and mine != getattr(other, name):
                raise ContextMismatch(
                    f"{name}: the encoder was fitted with {mine!r}, the data at hand has {getattr(other, name)!r}; "
                    f"evaluate with the same {name}, or declare the ablation {[name]}"
                )

    def check_genes(self, cells: "Cells") -> None:
        """ValueError where the cells have another number of genes than those the encoder was fitted on."""
        if cells.counts.shape[1] != self.n_genes:
            raise ValueError(f"cells: expected {self.n_genes} genes, got {cells.counts.shape[1]}")


@dataclass(frozen=True)
class Cells:
    """Masked cells as an encoder sees them: no labels.

    Attributes
    ----------
    counts : csr_matrix, shape (n, n_genes)
        Masked UMI counts.
    totals : ndarray, shape (n,)
        UMIs of the cell over the transcriptome, masked counts left out.
    genes, names : ndarray of str
    batch : ndarray of str, shape (n,), or None
    obsm : mapping of str to ndarray (n, d)

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> counts = csr_matrix(np.array([[1, 0], [2, 3], [0, 4]], np.float32))
    >>> cells = Cells(counts, np.array([1.0, 5.0, 4.0]), np.array(["HBG1", "HBZ"]), np.array(["a", "b", "c"]))
    >>> cells.take([2, 0]).names.tolist()
    ['c', 'a']
    >>> cells.pool([[0, 1], [2]]).counts.toarray()
    array([[3., 3.],
           [0., 4.]], dtype=float32)
    """

    counts: csr_matrix
    totals: np.ndarray
    genes: np.ndarray
    names: np.ndarray
    batch: np.ndarray | None = None
    obsm: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.counts.shape[0]

    def take(self, index) -> "Cells":
        """The cells at `index` (int or bool array), in that order."""
        return Cells(
            self.counts[index],
            self.totals[index],
            self.genes,
            self.names[index],
            None if self.batch is None else self.batch[index],
            {key: value[index] for key, value in self.obsm.items()},
        )

    def pool(self, members: Sequence[np.ndarray]) -> "Cells":
        """One pseudo-bulk per entry of `members`: counts and totals are summed, `obsm` averaged.

        The batch of a pseudo-bulk is that of most of its cells (the first in name order among equals).
        """
        sizes = np.array([len(group) for group in members])
        indptr = np.concatenate([[0], np.cumsum(sizes)])
        flat = np.concatenate(members) if len(members) else np.empty(0, int)
        ones = np.ones(len(flat), np.float32)
        sums = csr_matrix((ones, flat, indptr), shape=(len(members), len(self)))
        batch = None
        if self.batch is not None:
            batch = np.array([_most_common(self.batch[group]) for group in members], dtype=self.batch.dtype)
        means = sums.multiply(1.0 / np.maximum(sizes, 1)[:, None]).tocsr()
        return Cells(
            (sums @ self.counts).tocsr(),
            sums @ self.totals,
            self.genes,
            np.array([f"pool{i}" for i in range(len(members))]),
            batch,
            {key: np.asarray(means @ value) for key, value in self.obsm.items()},
        )


@dataclass(frozen=True)
class Prepared:
    """Masked cells with their labels and roles.

    Attributes
    ----------
    cells : Cells
    conditions, roles : ndarray of str, shape (n,)
    candidates : tuple of str
        Sorted conditions with at least one training cell, controls left out.
    columns : mapping of condition to int array
        Measured target columns of every condition, as the mask policy used them.
    context : Context
    truth : object or None
        Generating parameters of a simulated screen.
    candidate_sets : tuple of str
        Of the split's track: `Track.candidates`.
    """

    cells: Cells
    conditions: np.ndarray
    roles: np.ndarray
    candidates: tuple[str, ...]
    columns: Mapping[str, np.ndarray]
    context: Context
    truth: object | None = None
    candidate_sets: tuple[str, ...] = ("train",)

    def for_fitting(self) -> "Prepared":
        """The same without cells in the roles `query` and `unused`: what no fit holds, no fit depends on."""
        kept = np.flatnonzero(~np.isin(self.roles, ("query", "unused")))
        return replace(
            self, cells=self.cells.take(kept), conditions=self.conditions[kept], roles=self.roles[kept]
        )

    def where(self, role: str, *, controls: bool = False) -> np.ndarray:
        """Positions of the cells in `role`; control cells only when `controls`."""
        chosen = self.roles == role
        if not controls:
            chosen &= self.conditions != CTRL
        return np.flatnonzero(chosen)


def prepare(
    screen: Screen,
    split: Split,
    *,
    mask: str,
    conditions: np.ndarray | None = None,
    train_share: float = 1.0,
) -> Prepared:
    """Mask a screen's counts and attach roles.

    Parameters
    ----------
    screen : Screen
    split : Split
        Must cover every cell of the screen.
    mask : str
        A policy of `perturbret.data.masking.POLICIES`.
    conditions : ndarray of str, shape (n_cells,), optional
        Labels to use in place of the screen's own: the null control masks and trains by permuted labels.
    train_share : float
        Of the training cells of each condition, how many keep their role, at least one; the others get the role
        `unlabelled`. Smaller shares are parts of larger ones.

    Raises
    ------
    ValueError
        The split lacks cells of the screen, or `mask` or `train_share` is out of range.

    Examples
    --------
    >>> from perturbret.data import make_split, simulate_screen
    >>> screen = simulate_screen(n_singles=3, n_doubles=1, n_genes=30, cells_per_condition=20)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> prepared.candidates == tuple(screen.conditions)
    True
    >>> hidden = np.unique(np.concatenate([*prepared.columns.values()]))
    >>> int(screen.counts[:, hidden].sum()) > 0, int(prepared.cells.counts[:, hidden].sum())
    (True, 0)
    """
    absent = ~screen.obs.index.isin(split.roles.index)
    if absent.any():
        raise ValueError(
            f"split {split.id}: expected a role for all {screen.n_cells} cells of {screen.name}, "
            f"{int(absent.sum())} have none (first: {screen.obs.index[absent][0]!r})"
        )
    roles = split.roles.reindex(screen.obs.index).to_numpy(str)
    labels = screen.obs["condition"].to_numpy(str) if conditions is None else np.asarray(conditions, str)
    if not 0 < train_share <= 1:
        raise ValueError(f"train_share: expected a share above 0 and up to 1, got {train_share!r}")
    if train_share < 1:
        roles = _put_aside(roles, labels, screen.obs.index.to_numpy(str), train_share, split.seed)
    masked = mask_counts(screen.counts, labels, screen.target_columns, mask)
    totals = mask_totals(screen.obs["total"].to_numpy(np.float64), screen.counts, masked)
    cells = Cells(
        masked,
        totals,
        screen.genes,
        screen.obs.index.to_numpy(str),
        screen.obs["batch"].to_numpy(str) if "batch" in screen.obs else None,
        dict(screen.obsm),
    )
    candidates = tuple(sorted(set(labels[(roles == "train")]) - {CTRL}))
    context = Context(
        dataset=screen.name,
        fingerprint=screen.fingerprint,
        split_id=split.id,
        split_hash=split.hash,
        mask=mask,
        n_genes=screen.n_genes,
        gene_hash=hashlib.sha256("\0".join(map(str, screen.genes)).encode()).hexdigest()[:16],
        train_share=float(train_share),
        cells_hash=_hash_cells(cells, labels, roles, screen.target_columns),
    )
    return Prepared(
        cells,
        labels,
        roles,
        candidates,
        screen.target_columns,
        context,
        screen.truth,
        find_track(split.track).candidates,
    )


def _hash_cells(cells: Cells, labels: np.ndarray, roles: np.ndarray, columns: Mapping) -> str:
    """sha256, cut to 16 digits, of all that a fit may read: whatever made it, equal cells give equal fits."""
    digest = hashlib.sha256()
    counts = cells.counts if cells.counts.has_sorted_indices else cells.counts.sorted_indices()
    arrays = [counts.indptr.astype(np.int64), counts.indices.astype(np.int64), counts.data, cells.totals]
    for array in (*arrays, *(columns[condition] for condition in sorted(columns))):
        digest.update(np.ascontiguousarray(array).tobytes() + b"\0")
    for texts in (labels, roles, cells.names, sorted(columns)):
        digest.update("\0".join(map(str, texts)).encode() + b"\1")
    return digest.hexdigest()[:16]


def _put_aside(
    roles: np.ndarray, labels: np.ndarray, names: np.ndarray, share: float, seed: int
) -> np.ndarray:
    """Roles with all but a share of each condition's training cells made `unlabelled`, by a hash of seed and name."""
    roles = roles.astype("<U16")
    order = mix(name_seeds(f"{seed} {name}" for name in names))
    for label in np.unique(labels[roles == "train"]):
        cells = np.flatnonzero((roles == "train") & (labels == label))
        kept = max(1, round(share * len(cells)))
        roles[cells[np.argsort(order[cells])[kept:]]] = UNLABELLED
    return roles


def _most_common(values: np.ndarray) -> str:
    names, counts = np.unique(values, return_counts=True)
    return names[np.argmax(counts)]
