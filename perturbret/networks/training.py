"""Fine-tuning: batches, losses, optimiser, validation after each epoch, early stopping, resuming.

Runs on the CPU, one GPU or several processes (accelerate). Batches depend on labels, settings, seed and epoch alone, so
that all processes plan the same ones and compute a share each; gradients and losses are those of the joint batch.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..data.prepared import Cells, Prepared
from ..evaluation.embedding_shape import spread
from ..evaluation.scoring import by_name, library_cells
from ..evaluation.validation import best_readout
from ..files.atomic import replacing
from .adapters import trainable
from .embedding import autocast, embed_rows
from .heads import HeadedNetwork
from .inputs import to_device
from .settings import Settings

SAMPLERS = ("random", "balanced")


def plan_batches(
    labels: np.ndarray, *, sampler: str, batch_size: int, cells_per_condition: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of one epoch, as positions in `labels`.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
        Class of each training cell.
    sampler : str
        `random`: each cell once, in random order; large classes fill more of each batch. `balanced`: every batch
        has `cells_per_condition` cells of each of `batch_size / cells_per_condition` conditions, and conditions take
        turns; cells of a condition take turns too, so that those of a rare one come several times in an epoch. No cell
        is twice in a batch, unless its condition has fewer than `cells_per_condition`.
    batch_size : int
        Cells in a batch; all cells make one batch where there are fewer. What is left over at the end of an epoch is
        left out of it, so that all batches weigh the same.
    cells_per_condition : int
    seed, epoch : int
        Another epoch has another plan.

    Raises
    ------
    ValueError
        A setting is out of range, or fewer conditions are there than a balanced batch needs.
    """
    labels = np.asarray(labels)
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if not 1 <= batch_size or not len(labels):
        raise ValueError(
            f"batch_size: expected 1 or more for cells to train on, got {batch_size}, {len(labels)} cells"
        )
    rng = np.random.default_rng([seed, epoch])
    if sampler == "random":
        order = rng.permutation(len(labels))
        size = min(batch_size, len(labels))
        return [order[start : start + size] for start in range(0, len(labels) - size + 1, size)]
    classes = np.unique(labels)
    if cells_per_condition < 2 or batch_size % cells_per_condition:
        raise ValueError(
            f"cells_per_condition: expected 2 or more and a divisor of batch_size, got {cells_per_condition} for "
            f"{batch_size}"
        )
    # No more conditions than there are: a small screen gets smaller batches rather than a condition twice.
    n_conditions = min(batch_size // cells_per_condition, len(classes))
    if n_conditions < 2:
        raise ValueError(
            f"batch_size: expected room for 2 conditions of {cells_per_condition} cells in a balanced batch, got "
            f"{batch_size} and {len(classes)} conditions"
        )
    turns = _turns(classes, rng, n_conditions)
    cells = {}
    for label in classes:
        own = np.flatnonzero(labels == label)
        cells[label] = _turns(own, rng, min(cells_per_condition, len(own)))
    n_batches = max(1, len(labels) // (n_conditions * cells_per_condition))
    return [
        np.concatenate([np.resize(next(cells[label]), cells_per_condition) for label in next(turns)])
        for _ in range(n_batches)
    ]


def share(batch: np.ndarray, rank: int, n_processes: int) -> np.ndarray:
    """The part of a batch that one of several processes computes; parts are of one size, a remainder is left out.

    ValueError where the batch has fewer cells than there are processes.
    """
    size = len(batch) // n_processes
    if not size:
        raise ValueError(
            f"batch: expected a cell for each of {n_processes} processes, got {len(batch)} cells"
        )
    return batch[rank * size : (rank + 1) * size]


def _turns(values: np.ndarray, rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    """Groups of `size` distinct values without end: all are used before one comes again, apart from what a group
    needs to be full."""
    deck = rng.permutation(values)
    while True:
        if len(deck) < size:
            rest = rng.permutation(np.setdiff1d(values, deck))
            used, rest = rest[: size - len(deck)], rest[size - len(deck) :]
            group, deck = np.concatenate([deck, used]), rng.permutation(np.concatenate([rest, deck]))
        else:
            group, deck = deck[:size], deck[size:]
            if not len(deck):
                deck = rng.permutation(values)
        yield group


def contrastive(embeddings: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE with all cells of an anchor's condition as positives, averaged over anchors that have one.

    For an anchor i with positives P(i): minus the mean over p in P(i) of
    log(exp(s z_i z_p) / sum over a != i of exp(s z_i z_a)); embeddings z are scaled to length 1, s is one over the
    temperature. Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, equation 2.

    Parameters
    ----------
    embeddings : Tensor, shape (n, d)
    labels : Tensor of int, shape (n,)
    scale : Tensor, scalar

    Returns
    -------
    Tensor, scalar
        0, with a gradient of 0, where no anchor has a positive: such a batch says nothing.
    """
    z = F.normalize(embeddings.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (scale * (z @ z.T)).masked_fill(itself, float("-inf"))
    positive = (labels[:, None] == labels) & ~itself
    log_share = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    counts = positive.sum(dim=1)
    anchors = counts > 0
    if not anchors.any():
        return (embeddings.sum() + scale) * 0.0
    return -(log_share.sum(dim=1)[anchors] / counts[anchors]).mean()


def classification(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits (n, C) against labels (n,) of which `label_smoothing` is spread over all classes."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def carried_log_prior(shares: np.ndarray, label_smoothing: float) -> np.ndarray:
    """What a classifier trained by `classification` gives an uninformative cell: the log of the mean label, (C,).

    Not the log of the classes' `shares` (C,) of training cells: smoothing gives rare classes more than that, so that
    taking the shares out again would favour them, by as much as a shallow cell's whole evidence.
    """
    return np.log((1 - label_smoothing) * shares + label_smoothing / len(shares))


def make_optimiser(weights: dict, settings: Settings) -> torch.optim.AdamW:
    """AdamW with a group for the network and one for the head; vectors are not decayed.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019.
    """
    groups = []
    for part, rate in (("backbone", settings.lr_backbone), ("head", settings.lr_head)):
        for matrices in (True, False):
            chosen = [w for name, w in weights.items() if part_of(name) == part and (w.ndim > 1) == matrices]
            decay = settings.weight_decay if matrices else 0.0
            if chosen:
                groups.append(
                    {"params": chosen, "lr": rate, "peak": rate, "part": part, "weight_decay": decay}
                )
    return torch.optim.AdamW(groups)


def n_epochs(settings: Settings, n_steps: int) -> int:
    """Most epochs of `n_steps` steps each: `epochs`, or the number that comes nearest to `steps`."""
    return max(1, min(settings.epochs, round(settings.steps / n_steps)))


def schedule(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine down to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def joint_loss(accelerator, wrapped, embeddings, logits, labels, settings):
    """What to call backward on, and the loss over the batch of all processes.

    Gradients are averaged over processes afterwards. The contrastive loss compares a process's cells with those of all
    others, which stay constants here: n times its gradient, averaged over n processes, is that of the joint batch.
    """
    n, rank = accelerator.num_processes, accelerator.process_index
    head = accelerator.unwrap_model(wrapped).head
    loss, value = 0.0, 0.0
    if logits is not None:
        loss = classification(logits, labels, settings.label_smoothing)
        value += accelerator.reduce(loss.detach(), reduction="mean").item()
    if head.log_scale is not None:
        scale = head.scale
        if n > 1:
            parts = list(accelerator.gather(embeddings.detach()).split(len(embeddings)))
            parts[rank] = embeddings
            embeddings, labels = torch.cat(parts), accelerator.gather(labels)
            # The temperature's gradient is whole in every process already.
            scale = scale / n + scale.detach() * (1 - 1 / n)
        pulled = contrastive(embeddings, labels, scale)
        loss, value = loss + n * pulled, value + pulled.item()
    return loss, value


def part_of(name: str) -> str:
    """`head` or `backbone`: the part of the model that a parameter of this name belongs to."""
    return "head" if name.startswith("head.") else "backbone"


def rates(optimiser) -> dict[str, float]:
    """Learning rate of each part now."""
    return {f"lr_{group['part']}": group["lr"] for group in optimiser.param_groups}


def norms_by_part(norms: dict[str, float]) -> dict[str, float]:
    """Norm of the gradient of each part, from the mean norms of its tensors."""
    squares: dict[str, float] = {}
    for name, norm in norms.items():
        squares[f"grad_{part_of(name)}"] = squares.get(f"grad_{part_of(name)}", 0.0) + norm**2
    return {part: math.sqrt(total) for part, total in squares.items()}


COLLAPSED = 1e-5  # spread of embeddings over their length, below which they count as all alike


class TrainingFailed(RuntimeError):
    """Training came to a state that going on cannot mend."""


@dataclass(frozen=True)
class Validation:
    """What is measured after each epoch: `score` of (embeddings, logits) of the cells at `index` gives
    (exact_hit@1, loss).
    """

    index: np.ndarray
    score: Callable[[np.ndarray, np.ndarray | None], tuple[float, float]]


@dataclass(frozen=True)
class Outcome:
    """What training left beside the weights.

    Attributes
    ----------
    history : DataFrame, one row per epoch
        `epoch`, `loss`, `val_loss`, `val_exact_hit@1`, `lr_backbone`, `lr_head`, `grad_backbone`, `grad_head` (mean
        norm before clipping), `spread` of the validation embeddings.
    best_epoch : int
        Whose weights the model has now.
    gradients : dict of name to float
        Mean norm of the gradient of each trained tensor over all steps.
    n_steps : int
        How many these were.
    """

    history: pd.DataFrame
    best_epoch: int
    gradients: dict[str, float]
    n_steps: int


def train(
    model: HeadedNetwork,
    source,
    index: np.ndarray,
    labels: np.ndarray,
    *,
    settings: Settings,
    seed: int,
    validation: Validation | None,
    stop_epoch: int = 0,
    state: str | os.PathLike | None = None,
    key: str = "",
    report: Callable[[str], None] = print,
) -> Outcome:
    """Train what is trainable in a model, in place; it is left with the weights of the best epoch.

    Parameters
    ----------
    model : HeadedNetwork
        Weights that require a gradient are trained: those of the head by `lr_head`, others by `lr_backbone`.
    source : Inputs, Hidden or Rows
        Cells in the form that the model starts from.
    index : ndarray of int, shape (n,)
        Training cells.
    labels : ndarray of int, shape (n,)
        Their classes.
    settings : Settings
    seed : int
        Of batches and dropout.
    validation : Validation or None
        None: nothing is measured, and the weights of `stop_epoch` are kept.
    stop_epoch : int
        Epoch to stop after, on the schedule of all `n_epochs`; 0: the last.
    state : path, optional
        File that the state is kept in after each epoch, and training goes on from where one of the same `key` lies.
    key : str
        Names everything that the result depends on.
    report : callable
        Gets a line of text per epoch.

    Raises
    ------
    TrainingFailed
        The loss is not finite, or all embeddings have become alike.
    """
    # Precision is that of the settings, whatever the machine's accelerate is configured to.
    accelerator = Accelerator(mixed_precision="no")
    main = accelerator.is_main_process
    weights = trainable(model)
    optimiser = make_optimiser(weights, settings)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    sizes = {"batch_size": settings.batch_size, "cells_per_condition": settings.cells_per_condition}

    def plan_epoch(epoch):
        return plan_batches(labels, sampler=settings.sampler, **sizes, seed=seed, epoch=epoch)

    n_steps = len(plan_epoch(0)) // settings.accumulate
    if not n_steps:
        raise ValueError(
            f"accumulate: expected no more than the batches of an epoch, got {settings.accumulate}"
        )
    settings = settings.model_copy(update={"epochs": n_epochs(settings, n_steps)})
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1_000_003 * accelerator.process_index)
        history, sums, best = _resume(state, key, accelerator, weights, optimiser)
        if history and main:
            report(f"resumed after epoch {len(history)}")
        last = stop_epoch or settings.epochs
        while len(history) < last and not (
            best and validation and len(history) - best["epoch"] >= settings.patience
        ):
            epoch = len(history)
            model.train()
            plan = plan_epoch(epoch)[: n_steps * settings.accumulate]
            loss, norms = _epoch(
                accelerator, wrapped, optimiser, weights, source, index, labels, plan, settings, epoch
            )
            for name, norm in norms.items():
                sums[name] = sums.get(name, 0.0) + norm
            row = {"epoch": epoch + 1, "loss": loss, **rates(optimiser), **norms_by_part(norms)}
            if not math.isfinite(loss):
                raise TrainingFailed(
                    f"epoch {epoch + 1}: expected a finite loss, got {loss}; lower the learning rates"
                )
            if validation is not None:
                embeddings, logits = _embed_shared(
                    accelerator, model, source, validation.index, settings.precision
                )
                row["spread"] = spread(embeddings)
                if row["spread"] < COLLAPSED:
                    raise TrainingFailed(
                        f"epoch {epoch + 1}: all embeddings are alike (spread {row['spread']:.1e} of their length, "
                        f"expected above {COLLAPSED:.0e}): the network has collapsed; lower the learning rates"
                    )
                row["val_exact_hit@1"], row["val_loss"] = validation.score(embeddings, logits)
            history.append(row)
            if validation is None or best is None or _better(row, history[best["epoch"] - 1]):
                best = {
                    "epoch": epoch + 1,
                    "weights": {n: w.detach().cpu().clone() for n, w in weights.items()},
                }
            _keep(state, key, accelerator, weights, optimiser, history, sums, best)
            if main:
                hit = f"  validation exact_hit@1 {row['val_exact_hit@1']:.4f}" if validation else ""
                report(f"epoch {epoch + 1}/{settings.epochs}  loss {loss:.4f}{hit}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(best["weights"][name])
    model.eval()
    table = pd.DataFrame(history)
    gradients = {name: total / len(history) for name, total in sums.items()}
    return Outcome(table, best["epoch"], gradients, len(history) * n_steps)


def _epoch(accelerator, wrapped, optimiser, weights, source, index, labels, plan, settings, epoch):
    """One pass over the batches of `plan`: mean loss, and mean gradient norm of each tensor."""
    n_steps = len(plan) // settings.accumulate
    total, norms = 0.0, torch.zeros(len(weights), device=accelerator.device)
    for step in range(n_steps):
        factor = schedule(epoch * n_steps + step, settings.epochs * n_steps, settings.warmup)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        for batch in plan[step * settings.accumulate : (step + 1) * settings.accumulate]:
            mine = share(batch, accelerator.process_index, accelerator.num_processes)
            block = to_device(source.padded(index[mine]), accelerator.device)
            targets = torch.from_numpy(labels[mine]).long().to(accelerator.device)
            with autocast(accelerator.device, settings.precision):
                embeddings, logits = wrapped(*block)
            loss, value = joint_loss(accelerator, wrapped, embeddings, logits, targets, settings)
            accelerator.backward(loss / settings.accumulate)
            total += value
        norms += torch.stack([_norm(weight.grad, accelerator.device) for weight in weights.values()])
        torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip)
        optimiser.step()
        optimiser.zero_grad()
    return total / len(plan), dict(zip(weights, (norms / n_steps).tolist(), strict=True))


def _norm(gradient: torch.Tensor | None, device) -> torch.Tensor:
    """0 where no gradient came: what to make of that is for the proof to say."""
    return torch.zeros((), device=device) if gradient is None else gradient.norm()


def _embed_shared(accelerator, model: HeadedNetwork, source, index: np.ndarray, precision: str):
    """Embeddings and logits of cells, each process doing a share."""
    mine = np.array_split(index, accelerator.num_processes)[accelerator.process_index]
    embeddings, logits = embed_rows(model, source, mine, precision=precision)
    parts = gather_object([(embeddings, logits)])
    embeddings, logits = zip(*parts, strict=True)
    return np.concatenate(embeddings), None if logits[0] is None else np.concatenate(logits)


def _better(row: dict, than: dict) -> bool:
    """More hits, or as many at a lower loss; rounded, so that sums of hits in another order are equal."""
    mine, other = ((round(each["val_exact_hit@1"], 9), -each["val_loss"]) for each in (row, than))
    return mine > other


def _keep(path, key, accelerator, weights, optimiser, history, sums, best) -> None:
    """Write the state after an epoch, all processes' random states with it."""
    if path is None:
        return
    random = gather_object([torch.get_rng_state()])
    if not accelerator.is_main_process:
        return
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    content = {"history": history, "sums": sums, "best": best, "random": random, "random_cuda": cuda}
    content["weights"] = {name: weight.detach() for name, weight in weights.items()}
    write_state(path, f"{key} {accelerator.num_processes}", {**content, "optimiser": optimiser.state_dict()})


def _resume(path, key, accelerator, weights, optimiser) -> tuple[list[dict], dict, dict | None]:
    """History, gradient sums and best weights of a state of the same key, everything else set back to it."""
    content = read_state(path, f"{key} {accelerator.num_processes}")
    if content is None:
        return [], {}, None
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(content["weights"][name])
    optimiser.load_state_dict(content["optimiser"])
    torch.set_rng_state(content["random"][accelerator.process_index])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])
    return content["history"], content["sums"], content["best"]


def write_state(path: str | os.PathLike | None, key: str, content: dict) -> None:
    """Keep the state of a training that may be interrupted; None: nowhere."""
    if path is not None:
        with replacing(path) as temporary:
            torch.save({"key": key, **content}, temporary)


def read_state(path: str | os.PathLike | None, key: str) -> dict | None:
    """What `write_state` kept under the same key, or None."""
    if path is None or not Path(path).exists():
        return None
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content if content["key"] == key else None


class _Live:
    """The encoder that a model is at the moment, with embeddings of some cells, found by name."""

    kind = "in training"
    log_prior = None

    def __init__(self, names: np.ndarray, embeddings: np.ndarray, model: HeadedNetwork, prepared: Prepared):
        self._rows = pd.Series(np.arange(len(names)), index=names)
        self._embeddings, self._model = embeddings, model
        self.head, self.classes, self.context = model.head.classifier, prepared.candidates, prepared.context

    def embed(self, cells: Cells) -> np.ndarray:
        return self._embeddings[self._rows.loc[cells.names].to_numpy()]

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = self._model.head.classify(
                torch.from_numpy(embeddings).to(self._model.head.centre.device)
            )
            return logits.cpu().double().log_softmax(dim=1).numpy()


def make_validation(prepared: Prepared, model: HeadedNetwork, options: Settings, seed: int) -> Validation:
    """exact_hit@1 by the code of notebook 05, and the loss, of single validation cells.

    Read-out: the classifier; without one, or where the track holds out conditions, cosine to the mean of library cells.
    """
    # Cells of conditions without training cells are ranked too, and have no loss.
    val = by_name(prepared, prepared.where("val"))
    trained = np.isin(prepared.conditions[val], prepared.candidates)
    val, others = val[trained], val[~trained]
    labels = np.searchsorted(prepared.candidates, prepared.conditions[val])
    by_class = options.loss != "contrastive" and prepared.candidate_sets[0] == "train"
    library = np.empty(0, int) if by_class else library_cells(prepared, prepared.candidate_sets[0], "val")
    index = np.concatenate([val, others, library])
    sizes = {"batch_size": options.batch_size, "cells_per_condition": options.cells_per_condition}
    plan = plan_batches(labels, sampler=options.sampler, **sizes, seed=seed, epoch=0) if len(val) else []

    def score(embeddings: np.ndarray, logits: np.ndarray | None) -> tuple[float, float]:
        model.eval()
        live = _Live(prepared.cells.names[index], embeddings, model, prepared)
        _, hit = best_readout(live, prepared, seed=seed, scorings=("classifier" if by_class else "cosine",))
        z, targets = torch.from_numpy(embeddings[: len(val)]), torch.from_numpy(labels)
        losses = []
        with torch.inference_mode():
            for batch in plan:
                loss = 0.0
                if logits is not None:
                    loss += classification(
                        torch.from_numpy(logits[batch]), targets[batch], options.label_smoothing
                    ).item()
                if model.head.log_scale is not None:
                    loss += contrastive(z[batch], targets[batch], model.head.scale.cpu()).item()
                losses.append(loss)
        return hit, float(np.mean(losses)) if losses else np.nan

    return Validation(index, score)
