"""The task of pretraining: cells with some values hidden, and the losses of guessing them.

Source: Cui et al., scGPT, Nature Methods 2024: hidden values are predicted from the outputs at genes, and from the cell
embedding (MVC). Here a cell is shown by a random part of its genes, as many as a panel or a whole transcriptome may
have, and the cell embedding is asked for genes that the cell lacks as well, which are 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .corpus import Part
from .decoders import Decoders
from .network import ScGPT

HIDDEN = -1.0  # value of a hidden gene, as upstream
PAD_VALUE = -2.0


@dataclass(frozen=True)
class Batch:
    """Padded cells of one dataset.

    Attributes
    ----------
    genes : ndarray of int64, shape (cells, length)
        `<cls>` first.
    values : ndarray of float32, shape (cells, length)
    hidden : ndarray of bool, shape (cells, length)
        Which values are to be guessed.
    absent : ndarray of int64, shape (cells, m)
        Genes that the dataset measures and the cell lacks; padded.
    """

    genes: np.ndarray
    values: np.ndarray
    hidden: np.ndarray
    absent: np.ndarray


def draw_batch(
    part: Part,
    positions: Sequence[int],
    rng: np.random.Generator,
    *,
    length: int,
    hidden_share: float,
    pad_id: int,
    cls_id: int,
) -> Batch:
    """Cells with at most `length` random genes each, of which a random `hidden_share` is hidden.

    `positions` are those of the cells in `part`; `pad_id` and `cls_id` token ids of the vocabulary.
    """
    shown, numbers, lacking = [], [], []
    for position in positions:
        genes, values = part.cell(position)
        tried = part.measured[rng.integers(0, len(part.measured), max(4, min(length, len(genes)) // 2))]
        lacking.append(np.setdiff1d(tried, genes))
        if len(genes) > length:
            kept = rng.choice(len(genes), length, replace=False)
            genes, values = genes[kept], values[kept]
        shown.append(genes)
        numbers.append(values)
    width = 1 + max(len(genes) for genes in shown)
    batch = Batch(
        np.full((len(shown), width), pad_id, np.int64),
        np.full((len(shown), width), PAD_VALUE, np.float32),
        np.zeros((len(shown), width), bool),
        np.full((len(shown), max(1, *(len(genes) for genes in lacking))), pad_id, np.int64),
    )
    batch.genes[:, 0] = cls_id
    for i, (genes, values, absent) in enumerate(zip(shown, numbers, lacking, strict=True)):
        batch.genes[i, 1 : 1 + len(genes)] = genes
        batch.values[i, 1 : 1 + len(genes)] = values
        batch.hidden[i, 1 : 1 + len(genes)] = rng.random(len(genes)) < hidden_share
        batch.absent[i, : len(absent)] = absent
    return batch


def losses(network: ScGPT, decoders: Decoders, batch: Batch, *, pad_id: int) -> dict[str, Tensor]:
    """Mean squared errors of hidden values, in units of log(1 + counts per 10,000).

    Returns
    -------
    dict
        `gene`: from the outputs at genes; `cell`: from the cell embedding, once that of `<cls>`, once the
        mean over tokens, averaged; `absent`: the same of genes that the cell lacks, whose value is 0. 0 where a
        batch has none of these.
    """
    device = network.encoder.embedding.weight.device
    genes, values, hidden, absent = (
        torch.from_numpy(array).to(device)
        for array in (batch.genes, batch.values, batch.hidden, batch.absent)
    )
    padding = genes == pad_id
    shown = values.masked_fill(hidden, HIDDEN)
    outputs = network.run(network.inputs(genes, shown), padding if padding.any() else None)
    real = (~padding).unsqueeze(2).to(outputs.dtype)
    cells = (outputs[:, 0], (outputs * real).sum(dim=1) / real.sum(dim=1))
    present, lacking = network.encoder(genes), network.encoder(absent)
    is_absent = absent != pad_id
    by_cell = [decoders.mvc_decoder(cell, present)[hidden] - values[hidden] for cell in cells]
    zeros = [decoders.mvc_decoder(cell, lacking)[is_absent] for cell in cells]
    return {
        "gene": _mean_square(decoders.decoder(outputs)[hidden] - values[hidden]),
        "cell": torch.stack([_mean_square(error) for error in by_cell]).mean(),
        "absent": torch.stack([_mean_square(error) for error in zeros]).mean(),
    }


def _mean_square(errors: Tensor) -> Tensor:
    """0 where there are none: cells that have every gene lack none."""
    return errors.square().mean() if errors.numel() else errors.sum()
