"""Forests on log1p expression and depth: extremely randomised trees and boosted trees, grown by scikit-learn."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix, issparse

from .base import Encoder, Transform, identity
from .methods import Training, above_zero, at_least_zero, method, part, whole

# Settings of extra trees are compared on forests of this many trees; the chosen one is grown in full.
_DRAFT_TREES = 60
# A larger screen gives each tree a bootstrap sample of this many cells: 300 trees see all of them many times over.
_TREE_CELLS = 5000
# Features are made dense: this many genes take 0.6 GB for 70,000 cells.
_TREE_GENES = 2000
_BLOCK_PATHS = 500_000


@dataclass(frozen=True)
class Forest(Transform):
    """Trees one after another in arrays; a cell goes left, to the next node, where its value is at most the threshold.

    Attributes
    ----------
    roots : ndarray of int32, shape (T,)
        First node of each tree.
    feature : ndarray of int32, shape (N,)
        What an inner node looks at; -1 for a leaf.
    threshold : ndarray of float32, shape (N,)
    right : ndarray of int32, shape (N,)
        Node for values above the threshold.
    sizes : ndarray, shape (L,)
        Entries of each leaf, in the order of the leaves.
    columns, entries : ndarrays, shape (sum of sizes,)
        The leaves' classes and what they say of them: numbers of training cells where `votes`, else summands.
    base : ndarray of float64, shape (C,)
        Added to the sum over trees. Where trees vote, class shares: one tree more, that never splits; no class is
        ever impossible.
    votes : bool
        A leaf's entries count as shares of their sum, and the logarithm of the forest's sum is returned.
    """

    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    right: np.ndarray
    sizes: np.ndarray
    columns: np.ndarray
    entries: np.ndarray
    base: np.ndarray
    votes: bool

    @property
    def width(self) -> int:
        return max(len(self.roots), int(self.feature.max()) + 1)

    def __call__(self, values) -> np.ndarray:
        values = np.asarray(values.toarray() if issparse(values) else values)
        reached = np.concatenate(
            [
                self._leaves(values[start : start + self._step])
                for start in range(0, max(len(values), 1), self._step)
            ]
        )
        ones = np.ones(reached.size)
        chosen = csr_matrix(
            (ones, reached.ravel(), np.arange(0, reached.size + 1, len(self.roots))),
            shape=(len(values), len(self.sizes)),
        )
        sums = (chosen @ self._leaf_entries).toarray() + self.base
        return np.log(sums) if self.votes else sums

    @property
    def _step(self) -> int:
        return max(1, _BLOCK_PATHS // len(self.roots))

    @cached_property
    def _leaf_entries(self) -> csr_matrix:
        """What each leaf says, float64 (L, C)."""
        starts = np.concatenate([[0], np.cumsum(self.sizes, dtype=np.int64)])
        entries = self.entries.astype(np.float64)
        if self.votes:
            entries /= np.repeat(np.add.reduceat(entries, starts[:-1]), self.sizes)
        return csr_matrix((entries, self.columns, starts), shape=(len(self.sizes), len(self.base)))

    def _leaves(self, values: np.ndarray) -> np.ndarray:
        """Number of the leaf that each row (n, p) reaches in each tree, (n, T)."""
        number = np.cumsum(self.feature < 0) - 1
        node = np.tile(self.roots, len(values))
        row = np.repeat(np.arange(len(values)), len(self.roots))
        going = np.arange(len(node))
        while len(going):
            at = node[going]
            looks = self.feature[at]
            inner = looks >= 0
            going, at, looks = going[inner], at[inner], looks[inner]
            above = values[row[going], looks] > self.threshold[at]
            node[going] = np.where(above, self.right[at], at + 1)
        return number[node].reshape(len(values), len(self.roots))


@method(
    "extra_trees",
    scorings=("classifier",),
    drafts=True,
    target_sum=above_zero(10000),
    n_trees=whole(300),
    min_samples_leaf=whole(20, 10, 5, 3),
    max_features=part(0.05, 0.2),
)
def fit_extra_trees(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Extremely randomised trees (Geurts, Ernst & Wehenkel 2006, Mach. Learn. 63) on log1p expression and depth; the
    embedding is the logarithm of the mean of the trees' class shares."""
    from sklearn.ensemble import ExtraTreesClassifier

    n_classes = len(training.classes)
    for chosen in grid:
        settings, values = _features(training, chosen)
        sampled = len(values) > _TREE_CELLS
        model = ExtraTreesClassifier(
            min(_DRAFT_TREES, chosen["n_trees"]) if training.draft else chosen["n_trees"],
            min_samples_leaf=chosen["min_samples_leaf"],
            max_features=float(chosen["max_features"]),
            bootstrap=sampled,
            max_samples=_TREE_CELLS if sampled else None,
            random_state=training.seed,
        ).fit(values, training.labels)
        trees = []
        for each in model.estimators_:
            tree = each.tree_
            cells = np.rint(tree.value[:, 0] * tree.weighted_n_node_samples[:, None])
            trees.append((tree.children_left, tree.children_right, tree.feature, tree.threshold, cells))
        forest = _plant(trees, training.shares, votes=True)
        yield training.encoder("log1p_depth", (forest,), identity(n_classes), chosen, **settings)


@method(
    "boosted_trees",
    scorings=("classifier",),
    target_sum=above_zero(10000),
    n_rounds=whole(30, 60),
    learning_rate=above_zero(0.1),
    max_leaves=whole(4, 8, least=2),
    max_features=part(0.2),
    l2=at_least_zero(10.0),
)
def fit_boosted_trees(training: Training, grid: list[dict]) -> Iterator[Encoder]:
    """Gradient-boosted trees on histograms (scikit-learn's, after Ke et al. 2017, LightGBM, NeurIPS) on log1p
    expression and depth; the embedding is the logits. A tree per class and round: minutes where others take seconds."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    n_classes = len(training.classes)
    for chosen in grid:
        settings, values = _features(training, chosen)
        model = HistGradientBoostingClassifier(
            max_iter=chosen["n_rounds"],
            learning_rate=float(chosen["learning_rate"]),
            max_leaf_nodes=chosen["max_leaves"],
            max_features=float(chosen["max_features"]),
            l2_regularization=float(chosen["l2"]),
            max_bins=64,
            early_stopping=False,
            random_state=training.seed,
        ).fit(values, training.labels)
        trees = []
        for grown in model._predictors:
            for column, each in enumerate(grown):
                nodes = each.nodes
                leaf = nodes["is_leaf"].astype(bool)
                entries = np.zeros((len(nodes), n_classes))
                # Of two classes scikit-learn grows the second's trees alone.
                entries[:, column if len(grown) > 1 else 1] = nodes["value"]
                feature = np.where(leaf, -1, nodes["feature_idx"])
                trees.append((nodes["left"], nodes["right"], feature, nodes["num_threshold"], entries))
        base = np.zeros(n_classes)
        base[-model._baseline_prediction.size :] = model._baseline_prediction.ravel()
        forest = _plant(trees, base, votes=False)
        yield training.encoder("log1p_depth", (forest,), identity(n_classes), chosen, **settings)


def _features(training: Training, chosen: dict) -> tuple[dict, np.ndarray]:
    settings = {"target_sum": chosen["target_sum"]}
    settings |= training.most_variable(_TREE_GENES, **settings)
    return settings, training.features("log1p_depth", **settings).toarray()


def _plant(trees: list[tuple], base: np.ndarray, *, votes: bool) -> Forest:
    """A forest from trees of (left, right, feature, threshold, what each node says of each class)."""
    roots, parts = [], []
    for left, right, feature, threshold, entries in trees:
        leaf = np.asarray(feature) < 0
        inner = np.flatnonzero(~leaf)
        if not np.array_equal(np.asarray(left)[inner], inner + 1):
            raise RuntimeError(
                "trees: expected each left child right after its parent, scikit-learn stored others"
            )
        roots.append(sum(len(part[0]) for part in parts[-1:]) + (roots[-1] if roots else 0))
        # A leaf may say nothing at all: it keeps one entry, so that every leaf has some.
        entries = entries[leaf]
        kept = entries != 0
        kept[:, 0] |= ~kept.any(axis=1)
        parts.append(
            (
                np.where(leaf, -1, feature).astype(np.int32),
                np.where(leaf, 0, _rounded_down(np.asarray(threshold, np.float64))).astype(np.float32),
                np.where(leaf, 0, np.asarray(right) + roots[-1]).astype(np.int32),
                kept.sum(axis=1),
                np.nonzero(kept)[1],
                entries[kept],
            )
        )
    feature, threshold, right, sizes, columns, entries = map(np.concatenate, zip(*parts, strict=True))
    small = np.min_scalar_type(max(len(base), 1))
    return Forest(
        roots=np.array(roots, np.int32),
        feature=feature,
        threshold=threshold,
        right=right,
        sizes=sizes.astype(small),
        columns=columns.astype(small),
        entries=entries.astype(np.min_scalar_type(int(entries.max())) if votes else np.float32),
        base=np.asarray(base, np.float64),
        votes=votes,
    )


def _rounded_down(threshold: np.ndarray) -> np.ndarray:
    """The largest float32 that is at most the threshold: float32 values fall on the same side of both."""
    rounded = threshold.astype(np.float32)
    return np.where(rounded > threshold, np.nextafter(rounded, np.float32(-np.inf)), rounded)
