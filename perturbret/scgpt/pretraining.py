"""Masked-value training: of a small scGPT on reference cells, or further on a screen's own training cells.

Source: Cui et al., scGPT, Nature Methods 2024: hidden values are predicted from the outputs at genes, and from the cell
embedding (MVC). Here a cell is shown by a random part of its genes, as many as a panel or a whole transcriptome may
have, and the cell embedding is asked for genes that the cell lacks as well, which are 0.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..alignment.gene_space import GeneSpace
from ..networks.training import TrainingFailed, read_state, schedule, write_state
from .checkpoint import save_checkpoint
from .corpus import Part
from .network import ScGPT, Shape
from .vocabulary import CLS, PAD, Vocabulary


class ValueDecoder(nn.Module):
    """Output at a gene -> the value that was hidden there; `ExprDecoder` of scgpt 0.2.4."""

    def __init__(self, d_model: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, 1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(cells, length, d_model) -> (cells, length)."""
        return self.fc(hidden).squeeze(-1)


class CellDecoder(nn.Module):
    """Cell embedding and gene embeddings -> values; `MVCDecoder` of scgpt 0.2.4, style `inner product`."""

    def __init__(self, d_model: int):
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)

    def forward(self, cells: Tensor, genes: Tensor) -> Tensor:
        """(cells, d_model), (cells, length, d_model) -> (cells, length)."""
        query = torch.sigmoid(self.gene2query(genes))
        return torch.bmm(self.W(query), cells.unsqueeze(2)).squeeze(2)


class Decoders(nn.Module):
    """Both decoders, under the names that official checkpoints give them."""

    def __init__(self, d_model: int):
        super().__init__()
        self.decoder = ValueDecoder(d_model)
        self.mvc_decoder = CellDecoder(d_model)


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


MIN_LENGTH = 16
_HELD_OUT_BATCHES = 4  # of each dataset
ARGS = {"input_style": "log1p", "n_bins": 51, "max_seq_len": 1200, "pad_value": -2, "n_layers_cls": 3}


@dataclass(frozen=True)
class Plan:
    """Size of a network and of its pretraining.

    Attributes
    ----------
    d_model, n_heads, d_hid, n_layers : int
    steps : int
    batch_cells, max_length : int
        Cells in a batch, and most genes of a cell in it; a batch draws its limit evenly in the logarithm, from 16.
    hidden_share : float
    learning_rate, weight_decay, warmup, dropout : float
    check_every : int
        Steps between two looks at held-out cells, after which the state is kept too.
    """

    d_model: int
    n_heads: int
    d_hid: int
    n_layers: int
    steps: int
    batch_cells: int = 128
    max_length: int = 256
    hidden_share: float = 0.3
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.03
    dropout: float = 0.0
    check_every: int = 250


PRESETS = {
    "tiny": Plan(
        d_model=32, n_heads=4, d_hid=64, n_layers=1, steps=300, batch_cells=64, max_length=96, check_every=50
    ),
    "full": Plan(d_model=88, n_heads=4, d_hid=176, n_layers=2, steps=3000, batch_cells=64, max_length=128),
}


@dataclass(frozen=True)
class PretrainedNetwork:
    """What pretraining gives.

    Attributes
    ----------
    network : ScGPT
    decoders : Decoders
    history : DataFrame
        Per look: `step`, `loss` of the steps before, held-out losses `gene`, `cell`, `absent`, and `mean`: of guessing
        each gene's mean over the training cells of its dataset in place of `gene` and `cell`.
    by_dataset : DataFrame
        The held-out losses of each dataset at the end.
    """

    network: ScGPT
    decoders: Decoders
    history: pd.DataFrame
    by_dataset: pd.DataFrame


def pretrain(
    corpus: Sequence[Part],
    vocabulary: Vocabulary,
    plan: Plan,
    *,
    seed: int,
    state: str | os.PathLike | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
    report: Callable[[str], None] = print,
) -> PretrainedNetwork:
    """Train a network to guess hidden values; on a GPU where there is one.

    Datasets are drawn in proportion to the square root of their numbers of training cells.

    Parameters
    ----------
    corpus : sequence of Part
    vocabulary : Vocabulary
    plan : Plan
    seed : int
    state : path, optional
        File of the state, kept at each look at held-out cells; training goes on from one of the same plan and data.
    start : mapping of str to Tensor, optional
        Weights of the network to start from, in place of random ones.
    report : callable

    Raises
    ------
    ValueError
        A dataset has no cell to train on or none held out; the plan's `max_length` is below 16.
    TrainingFailed
        The loss is not finite.
    """
    _check(corpus, plan)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pad_id = vocabulary.ids[PAD]
    shape = Shape(
        len(vocabulary), plan.d_model, plan.n_heads, plan.d_hid, plan.n_layers, plan.dropout, pad_id
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network, decoders = ScGPT(shape), Decoders(plan.d_model)
        if start is not None:
            network.load_state_dict(start)
        network, decoders = network.to(device), decoders.to(device)
        weights = [*network.parameters(), *decoders.parameters()]
        optimiser = torch.optim.AdamW(
            weights, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
        )
        key = _state_key(corpus, vocabulary, plan, seed, start)
        parts = {"network": network, "decoders": decoders, "optimiser": optimiser}
        history = _resume(state, key, parts)
        first = history[-1]["step"] if history else 0
        if history:
            report(f"resumed after step {first}")
        held_out = [_held_out(part, plan, vocabulary) for part in corpus]
        means = [part.gene_means(len(vocabulary)) for part in corpus]
        shares = np.array([np.sqrt((~part.held_out).sum()) for part in corpus])
        recent = []
        for step in range(first, plan.steps):
            # The batch of a step depends on its number alone, so that a resumed run sees the same.
            rng = np.random.default_rng([seed, step])
            part = corpus[rng.choice(len(corpus), p=shares / shares.sum())]
            batch = _draw(part, np.flatnonzero(~part.held_out), rng, plan, vocabulary)
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * schedule(step, plan.steps, plan.warmup)
            loss = sum(losses(network, decoders, batch, pad_id=pad_id).values())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            recent.append(loss.item())
            if not math.isfinite(recent[-1]):
                raise TrainingFailed(f"step {step + 1}: expected a finite loss, got {recent[-1]}")
            if (step + 1) % plan.check_every == 0 or step + 1 == plan.steps:
                found = _look(network, decoders, held_out, means, pad_id)
                row = {"step": step + 1, "loss": float(np.mean(recent)), **found.mean().to_dict()}
                history.append(row)
                recent = []
                _keep(state, key, parts, history)
                report(f"step {step + 1}/{plan.steps}  loss {row['loss']:.4f}  held out {row['gene']:.4f}")
        by_dataset = _look(network, decoders, held_out, means, pad_id)
    by_dataset.index = [part.name for part in corpus]
    return PretrainedNetwork(network.cpu().eval(), decoders.cpu().eval(), pd.DataFrame(history), by_dataset)


def _check(corpus: Sequence[Part], plan: Plan) -> None:
    if plan.max_length < MIN_LENGTH:
        raise ValueError(f"plan: max_length: expected at least {MIN_LENGTH} genes, got {plan.max_length}")
    for part in corpus:
        held_out = int(part.held_out.sum())
        if not 0 < held_out < len(part.held_out):
            raise ValueError(
                f"{part.name}: expected cells to train on and held-out cells, got {len(part.held_out) - held_out} "
                f"and {held_out}"
            )


def save_pretrained(
    directory: str | os.PathLike,
    made: PretrainedNetwork,
    vocabulary: Vocabulary,
    *,
    half: bool = False,
    official: bool = False,
    space: GeneSpace | None = None,
) -> None:
    """Write a checkpoint directory in the official layout, decoders included; see `save_checkpoint`."""
    options = {"half": half, "official": official, "space": space}
    save_checkpoint(directory, made.network, vocabulary, ARGS, decoders=made.decoders.state_dict(), **options)


def _draw(part: Part, cells: np.ndarray, rng, plan: Plan, vocabulary: Vocabulary) -> Batch:
    length = int(np.exp(rng.uniform(np.log(MIN_LENGTH), np.log(plan.max_length + 1))))
    # Short cells in larger batches, so that steps weigh alike.
    n = int(plan.batch_cells * min(4.0, max(1.0, (plan.max_length / 2) / length)))
    return draw_batch(
        part,
        rng.choice(cells, n),
        rng,
        length=length,
        hidden_share=plan.hidden_share,
        pad_id=vocabulary.ids[PAD],
        cls_id=vocabulary.ids[CLS],
    )


def _held_out(part: Part, plan: Plan, vocabulary: Vocabulary) -> list[Batch]:
    """Batches that every look uses, the same for every seed."""
    cells = np.flatnonzero(part.held_out)
    rng = np.random.default_rng(0)
    return [_draw(part, cells, rng, plan, vocabulary) for _ in range(_HELD_OUT_BATCHES)]


@torch.inference_mode()
def _look(
    network, decoders, held_out: list[list[Batch]], means: list[np.ndarray], pad_id: int
) -> pd.DataFrame:
    """Held-out losses, a row per dataset."""
    network.eval()
    rows = []
    for batches, mean in zip(held_out, means, strict=True):
        found = [
            {k: v.item() for k, v in losses(network, decoders, b, pad_id=pad_id).items()} for b in batches
        ]
        errors = np.concatenate([b.values[b.hidden] - mean[b.genes[b.hidden]] for b in batches])
        rows.append({**pd.DataFrame(found).mean().to_dict(), "mean": float(np.nanmean(errors**2))})
    network.train()
    return pd.DataFrame(rows)


def _state_key(corpus, vocabulary: Vocabulary, plan: Plan, seed: int, start) -> str:
    digest = hashlib.sha256(json.dumps([asdict(plan), seed, vocabulary.hash]).encode())
    for part in corpus:
        digest.update(f"{part.name} {part.hash} ".encode())
    for name in sorted(start or {}):
        digest.update(start[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _keep(path, key: str, parts: dict, history: list[dict]) -> None:
    states = {name: part.state_dict() for name, part in parts.items()}
    write_state(path, key, {"history": history, "random": torch.get_rng_state(), **states})


def _resume(path, key: str, parts: dict) -> list[dict]:
    """The history of a state of the same key, everything else set back to it; empty without one."""
    content = read_state(path, key)
    if content is None:
        return []
    for name, part in parts.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    return content["history"]
