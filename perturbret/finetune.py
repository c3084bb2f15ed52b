"""The training loop of fine-tuning: batches, loss, optimiser, validation after each epoch, and resuming.

Runs on the CPU, one GPU or several processes (accelerate): each process computes its share of every batch, and
gradients and losses are those of the joint batch.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from .adapters import trainable
from .atomic import replacing
from .batches import plan_batches, share
from .model import Model, autocast, embed_rows, to_device
from .optimise import joint_loss, make_optimiser, n_epochs, norms_by_part, rates, schedule
from .settings import Settings

COLLAPSED = 1e-5  # spread of embeddings over their length, below which they count as all alike


class TrainingFailed(RuntimeError):
    """Training came to a state that going on cannot mend."""


@dataclass(frozen=True)
class Validation:
    """What is looked at after each epoch.

    Attributes
    ----------
    index : ndarray of int
        Cells whose embeddings are needed.
    score : callable
        (embeddings, logits) of these cells -> (exact_hit@1, loss).
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
    model: Model,
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
    model : Model
        Weights that require a gradient are trained: those of the head by `lr_head`, others by `lr_backbone`.
    source : Tokens, Hidden or Rows
        Cells in the form that the model starts from.
    index : ndarray of int, shape (n,)
        Training cells.
    labels : ndarray of int, shape (n,)
        Their classes.
    settings : Settings
    seed : int
        Of batches and dropout.
    validation : Validation or None
        None: nothing is looked at, and the weights of `stop_epoch` are kept.
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
    n_steps = len(_plan(labels, settings, seed, 0)) // settings.accumulate
    if not n_steps:
        raise ValueError(
            f"accumulate: expected no more than the batches of an epoch, got {settings.accumulate}"
        )
    settings = replace(settings, epochs=n_epochs(settings, n_steps))
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1_000_003 * accelerator.process_index)
        history, sums, best = _resume(Path(state) if state else None, key, accelerator, weights, optimiser)
        if history and main:
            report(f"resumed after epoch {len(history)}")
        last = stop_epoch or settings.epochs
        while len(history) < last and not _patience_over(history, settings, validation):
            epoch = len(history)
            model.train()
            plan = _plan(labels, settings, seed, epoch)[: n_steps * settings.accumulate]
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
            _keep(Path(state) if state else None, key, accelerator, weights, optimiser, history, sums, best)
            if main:
                report(_line(row, settings))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(best["weights"][name])
    model.eval()
    table = pd.DataFrame(history)
    gradients = {name: total / len(history) for name, total in sums.items()}
    return Outcome(table, best["epoch"], gradients, len(history) * n_steps)


def spread(embeddings: np.ndarray) -> float:
    """Root mean square distance from the mean embedding, over the root mean square length."""
    values = embeddings.astype(np.float64)
    length = math.sqrt(np.square(values).sum(axis=1).mean())
    return math.sqrt(np.square(values - values.mean(axis=0)).sum(axis=1).mean()) / length if length else 0.0


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


def _plan(labels: np.ndarray, settings: Settings, seed: int, epoch: int) -> list[np.ndarray]:
    return plan_batches(
        labels,
        sampler=settings.sampler,
        batch_size=settings.batch_size,
        cells_per_condition=settings.cells_per_condition,
        seed=seed,
        epoch=epoch,
    )


def _embed_shared(accelerator, model: Model, source, index: np.ndarray, precision: str):
    """Embeddings and logits of cells, each process doing a share."""
    mine = np.array_split(index, accelerator.num_processes)[accelerator.process_index]
    embeddings, logits = embed_rows(model, source, mine, precision=precision)
    if accelerator.num_processes == 1:
        return embeddings, logits
    parts = gather_object([(embeddings, logits)])
    return np.concatenate([z for z, _ in parts]), None if logits is None else np.concatenate(
        [x for _, x in parts]
    )


def _better(row: dict, than: dict) -> bool:
    """More hits, or as many at a lower loss; rounded, so that sums of hits in another order are equal."""
    return (round(row["val_exact_hit@1"], 9), -row["val_loss"]) > (
        round(than["val_exact_hit@1"], 9),
        -than["val_loss"],
    )


def _patience_over(history: list[dict], settings: Settings, validation: Validation | None) -> bool:
    if validation is None or not history:
        return False
    best = 0
    for i, row in enumerate(history):
        if _better(row, history[best]):
            best = i
    return len(history) - 1 - best >= settings.patience


def _line(row: dict, settings: Settings) -> str:
    found = f"  validation exact_hit@1 {row['val_exact_hit@1']:.4f}" if "val_exact_hit@1" in row else ""
    return f"epoch {row['epoch']}/{settings.epochs}  loss {row['loss']:.4f}{found}"


def _keep(path, key, accelerator, weights, optimiser, history, sums, best) -> None:
    """Write the state after an epoch, all processes' random states with it."""
    if path is None:
        return
    random = gather_object([torch.get_rng_state()])
    if not accelerator.is_main_process:
        return
    content = {
        "key": key,
        "n_processes": accelerator.num_processes,
        "weights": {name: weight.detach() for name, weight in weights.items()},
        "optimiser": optimiser.state_dict(),
        "history": history,
        "sums": sums,
        "best": best,
        "random": random,
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _resume(path, key, accelerator, weights, optimiser) -> tuple[list[dict], dict, dict | None]:
    """History, gradient sums and best weights of a state of the same key, everything else set back to it."""
    if path is None or not path.exists():
        return [], {}, None
    content = torch.load(path, map_location="cpu", weights_only=True)
    if content["key"] != key or content["n_processes"] != accelerator.num_processes:
        return [], {}, None
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(content["weights"][name])
    optimiser.load_state_dict(content["optimiser"])
    torch.set_rng_state(content["random"][accelerator.process_index])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])
    return content["history"], content["sums"], content["best"]
