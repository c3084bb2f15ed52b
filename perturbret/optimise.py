"""Steps of fine-tuning: which weights go at which rate, the schedule, and a loss that processes share."""

import math

import torch

from .losses import classification, contrastive
from .settings import Settings


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
