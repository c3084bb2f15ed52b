"""The Bayes-optimal ranking of a simulated screen: the ceiling of every encoder (docs/simulation.md)."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy.special import logsumexp

from ..data.masking import POLICIES
from ..data.prepared import Cells, Context, Prepared
from ..data.simulate import Truth
from ..files.atomic import replacing
from .base import write_description

# Log-likelihood of a candidate that the model excludes, from that of the least likely other one: finite, so
# that any read-out can work on embeddings, and exp(-1000) is exactly 0.
EXCLUDED = -1000.0

_ARRAYS = ("means", "dispersion", "log_fold_changes", "weights", "hidden", "own", "log_prior")


@dataclass(frozen=True)
class BayesCeiling:
    """The true model as an encoder: the embedding of a cell is its log-likelihood under every candidate.

    `means`, `dispersion`, `batches` and `reference_exposure` are those of `perturbret.data.simulate.Truth`.
    """

    classes: tuple[str, ...]
    batches: tuple[str, ...]
    means: np.ndarray  # (B, G)
    dispersion: np.ndarray  # (G,)
    log_fold_changes: np.ndarray  # (K, G), a row per mixture component; that of unresponsive cells is 0
    weights: np.ndarray  # (C, K), mixture weights of every candidate; rows sum to 1
    hidden: np.ndarray  # (G,) bool, columns removed from every cell
    own: np.ndarray  # (C, G) bool, columns removed from the cells of one candidate alone
    log_prior: np.ndarray  # (C,)
    reference_exposure: float
    context: Context | None = None  # None when used on bare arrays

    kind: ClassVar[str] = "bayes_ceiling"
    head: ClassVar[str] = "posterior"  # stands for "has a classifier", as in other encoders

    def log_likelihood(self, counts, totals: np.ndarray, batch: np.ndarray | None = None) -> np.ndarray:
        """Log-likelihood ratio of every candidate to an unperturbed cell, float64 (n, C).

        Genes that no candidate changes add exactly 0. Always finite: candidates that the model excludes lie
        `EXCLUDED` below the least likely other one.

        Parameters
        ----------
        counts : csr_matrix, shape (n, G)
            UMI counts, masked as the model expects.
        totals : ndarray, shape (n,)
            Masked totals (`perturbret.data.masking.mask_totals`).
        batch : ndarray of str, shape (n,), optional
            May be left out when there is one batch.

        Raises
        ------
        ValueError
            A batch, the number of columns or an exposure is not of the model.
        """
        n, n_genes = counts.shape
        if n_genes != len(self.dispersion):
            raise ValueError(f"counts: expected {len(self.dispersion)} columns, got {n_genes}")
        exposure = np.asarray(totals, np.float64) - np.asarray(counts.sum(axis=1), np.float64).ravel()
        if n and not exposure.min() > 0:
            raise ValueError(
                f"totals: expected above the row sums of counts, got {exposure.min():g} above them"
            )
        codes = self._batch_codes(batch, n)
        scale = exposure / self.reference_exposure
        out = np.empty((n, len(self.classes)))
        step = max(1, 2_000_000 // max(n_genes, 1))
        for b in range(len(self.batches)):
            rows = np.flatnonzero(codes == b)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                x = counts[part].toarray().astype(np.float64)
                out[part] = self._ratios(x, scale[part], self.means[b])
        return out

    def embed(self, cells: Cells) -> np.ndarray:
        """`log_likelihood` of masked cells, float32 (n, C).

        Exact for single cells. A pseudo-bulk of summed counts is not a draw from the model of one cell: its
        embedding is an approximation and no ceiling; pool the scores of its cells instead.
        """
        return self.log_likelihood(cells.counts, cells.totals, cells.batch).astype(np.float32)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        """Log posterior of the candidates, float64 (n, C)."""
        joint = np.asarray(embeddings, np.float64) + self.log_prior
        return joint - logsumexp(joint, axis=1, keepdims=True)

    def save(self, directory: str | os.PathLike) -> None:
        """Write `encoder.json` and `weights.safetensors` to `directory`, atomically."""
        description = {
            "format": "encoders.bayes",
            "kind": self.kind,
            "classes": list(self.classes),
            "batches": list(self.batches),
            "reference_exposure": self.reference_exposure,
            "context": None if self.context is None else asdict(self.context),
        }
        with replacing(directory) as temporary:
            temporary.mkdir()
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
            save_file(arrays, temporary / "weights.safetensors")
            write_description(temporary, description)

    def _ratios(self, x: np.ndarray, scale: np.ndarray, means: np.ndarray) -> np.ndarray:
        """Ratios (n, C) of cells of one batch; x (n, G) dense, scale (n,), means (G,)."""
        shape = 1 / self.dispersion
        # NB, mean m, variance m + m**2 / r: log p(x) = x log m - (x + r) log(1 + m / r) + terms without m.
        rate = scale[:, None] * (means * self.dispersion)
        reference = np.log1p(rate)
        ratios = np.empty((len(x), len(self.log_fold_changes)))
        for k, change in enumerate(self.log_fold_changes):
            columns = np.flatnonzero((change != 0) & ~self.hidden)
            seen = x[:, columns]
            growth = np.log1p(rate[:, columns] * np.exp(change[columns])) - reference[:, columns]
            ratios[:, k] = seen @ change[columns] - ((seen + shape[columns]) * growth).sum(axis=1)

        out = np.empty((len(x), len(self.classes)))
        excluded = np.zeros(out.shape, bool)
        for c, weights in enumerate(self.weights):
            used = np.flatnonzero(weights)
            terms = ratios[:, used]
            columns = np.flatnonzero(self.own[c])
            if len(columns):
                # The model of candidate c says 0 for sure at these columns: take out the term log p(0) that
                # `ratios` and its reference hold for them.
                grown = rate[:, None, columns] * np.exp(self.log_fold_changes[np.ix_(used, columns)])
                terms = terms + (np.log1p(grown) * shape[columns]).sum(axis=2)
                excluded[:, c] = (x[:, columns] > 0).any(axis=1)
            out[:, c] = logsumexp(terms + np.log(weights[used]), axis=1)
        least = np.where(excluded, np.inf, out).min(axis=1, keepdims=True)
        return np.where(excluded, np.where(np.isfinite(least), least, 0.0) + EXCLUDED, out)

    def _batch_codes(self, batch: np.ndarray | None, n: int) -> np.ndarray:
        if batch is None:
            if len(self.batches) > 1:
                raise ValueError(f"batch: expected one of {list(self.batches)} per cell, got None")
            return np.zeros(n, int)
        codes = pd.Index(self.batches).get_indexer(batch)
        if (codes < 0).any():
            got = str(batch[np.argmax(codes < 0)])
            raise ValueError(f"batch: expected one of {list(self.batches)} per cell, got {got!r}")
        return codes


def fit_bayes(prepared: Prepared) -> BayesCeiling:
    """The ceiling of a prepared simulated screen, for its mask, candidates and context.

    Where labels are not those the cells were drawn with (the null control's permuted ones), expression does
    not depend on the label: every candidate has the same mixture over all conditions, and only columns zeroed
    by label tell candidates apart. That is the exact ceiling of the permuted screen.

    Raises
    ------
    ValueError
        The screen was not simulated, or cells are not of its truth.
    """
    truth = prepared.truth
    if not isinstance(truth, Truth):
        raise ValueError(f"prepared: expected the truth of a simulated screen, got {type(truth).__name__}")
    drawn = truth.cells["condition"].reindex(prepared.cells.names)
    if drawn.isna().any():
        name = prepared.cells.names[drawn.isna().to_numpy()][0]
        raise ValueError(f"prepared: expected cells of the simulated screen, got {str(name)!r}")
    permuted = bool((drawn.to_numpy(str) != prepared.conditions).any())
    context, genes = prepared.context, prepared.cells.genes
    return make_ceiling(
        truth,
        mask=context.mask,
        columns=prepared.columns,
        candidates=prepared.candidates,
        genes=genes,
        permuted=permuted,
        context=context,
    )


def load(directory: str | os.PathLike, *, cache: Path | None = None) -> BayesCeiling:
    """Read what `BayesCeiling.save` wrote; bit-exact; nothing needs a cache. ValueError for another format."""
    path = Path(directory) / "encoder.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["format"] != "encoders.bayes":
        raise ValueError(f"{path}: expected format 'encoders.bayes', got {saved['format']!r}")
    return BayesCeiling(
        classes=tuple(saved["classes"]),
        batches=tuple(saved["batches"]),
        reference_exposure=saved["reference_exposure"],
        context=saved["context"] and Context(**saved["context"]),
        **load_file(path.with_name("weights.safetensors")),
    )


def make_ceiling(
    truth: Truth,
    *,
    mask: str = "none",
    columns: Mapping[str, np.ndarray] | None = None,
    candidates: Sequence[str] | None = None,
    genes: np.ndarray | None = None,
    permuted: bool = False,
    context: Context | None = None,
) -> BayesCeiling:
    """The true model as it sees masked cells; guides and non-response are summed out, batch and exposure are given.

    Parameters
    ----------
    truth : Truth
    mask : str
    columns : mapping of condition to int array, optional
        Target columns that the mask acts on; needed unless it is `none`.
    candidates : sequence of str, optional
        By default all conditions of `truth`.
    genes : ndarray of str, shape (G,), optional
        Symbols of the cells' columns, where their order is not that of `truth`.
    permuted : bool
        Labels are not those that the cells were drawn with.
    context : Context, optional
        What it is evaluated in; None for use on bare arrays.

    Raises
    ------
    ValueError
        An unknown mask or candidate; genes other than those of `truth`; missing `columns`.
    """
    if mask not in POLICIES:
        raise ValueError(f"mask: expected one of {list(POLICIES)}, got {mask!r}")
    if mask != "none" and columns is None:
        raise ValueError(f"columns: expected target columns per condition for mask {mask!r}, got None")
    candidates = truth.conditions if candidates is None else tuple(candidates)
    unknown = sorted(set(candidates) - set(truth.conditions))
    if unknown:
        raise ValueError(f"candidates: expected conditions of the simulated screen, got {unknown[0]!r}")
    genes = truth.genes if genes is None else np.asarray(genes, str)
    if sorted(genes) != sorted(truth.genes):
        raise ValueError(
            f"genes: expected the {len(truth.genes)} of the simulated screen, got {len(genes)} others"
        )
    place = {symbol: i for i, symbol in enumerate(truth.genes)}
    order = np.array([place[symbol] for symbol in genes])
    rows = [truth.conditions.index(condition) for condition in candidates]

    # Components: every condition x guide, then one for unresponsive cells, which all conditions share.
    n_conditions, n_guides, n_genes = truth.log_fold_changes.shape
    changes = np.vstack([truth.log_fold_changes.reshape(-1, n_genes)[:, order], np.zeros((1, n_genes))])
    weights = np.zeros((n_conditions, len(changes)))
    for c in range(n_conditions):
        weights[c, c * n_guides : (c + 1) * n_guides] = truth.guide_weights[c] * (1 - truth.unresponsive[c])
    weights[:, -1] = truth.unresponsive
    prior = truth.prior[rows] / truth.prior[rows].sum()
    weights = weights[rows]
    if permuted:
        weights = np.tile(prior @ weights, (len(rows), 1))

    hidden, own = np.zeros(n_genes, bool), np.zeros((len(rows), n_genes), bool)
    if mask == "all_targets":
        hidden[np.concatenate(list(columns.values())).astype(int)] = True
    elif mask == "own_targets":
        for c, condition in enumerate(candidates):
            own[c, columns[condition]] = True
    return BayesCeiling(
        classes=candidates,
        batches=truth.batches,
        means=truth.means[:, order],
        dispersion=truth.dispersion[order],
        log_fold_changes=changes,
        weights=weights,
        hidden=hidden,
        own=own,
        log_prior=np.log(prior),
        reference_exposure=truth.reference_exposure,
        context=context,
    )
