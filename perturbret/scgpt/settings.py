"""Everything about a fine-tuning run that can be chosen, checked before anything is computed."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real

MODES = ("frozen", "head", "lora_head", "last_n", "full")
CHOICES = {
    "mode": MODES,
    "init": ("pretrained", "random"),
    "adapt": ("none", "mlm"),
    "pooling": ("cls", "mean"),
    "values": ("checkpoint", "bins", "log1p"),
    "loss": ("classification", "contrastive", "both"),
    "sampler": ("random", "balanced"),
    "precision": ("float32", "bfloat16"),
}
LORA_TARGETS = ("Wqkv", "out_proj", "linear1", "linear2")
# Inclusive limits of numbers. A temperature below 0.01 is cut there by the head, and would never get a gradient.
LIMITS = {
    "last_layers": (1, 3),
    "rank": (1, 256),
    "alpha": (1e-3, 1e4),
    "lora_dropout": (0, 0.9),
    "head_depth": (0, 8),
    "head_width": (1, 8192),
    "head_dim": (2, 8192),
    "head_dropout": (0, 0.9),
    "dropout": (0, 0.9),
    "label_smoothing": (0, 0.9),
    "temperature": (0.02, 10),
    "batch_size": (4, 65536),
    "cells_per_condition": (2, 64),
    "accumulate": (1, 1024),
    "epochs": (1, 10000),
    "patience": (1, 10000),
    "steps": (1, 100_000_000),
    "adapt_steps": (1, 1_000_000),
    "lr_adapt": (0, 1),
    "lr_backbone": (0, 1),
    "lr_head": (0, 1),
    "weight_decay": (0, 10),
    "warmup": (0, 0.9),
    "clip": (1e-6, 1e6),
    "members": (1, 32),
}


# What a mode needs otherwise than adapters do: these start at no effect and take larger steps; a head alone is cheap.
MODE_DEFAULTS = {
    "last_n": {"lr_backbone": 1e-3, "steps": 1200},
    "full": {"lr_backbone": 1e-3, "steps": 1200},
    "head": {"epochs": 60, "steps": 100_000, "patience": 15, "lr_head": 2e-3},
}


@dataclass(frozen=True)
class Settings:
    """What `perturbret.scgpt.training` is asked to do.

    The defaults were chosen on validation cells for the small checkpoint that the package ships; those of a mode in
    `MODE_DEFAULTS` go before them.

    Attributes
    ----------
    mode : str
        What is trained: `frozen` nothing, `head` the head, `lora_head` adapters and the head, `last_n` the last
        layers and the head, `full` everything.
    init : str
        `pretrained`: the checkpoint's weights; `random`: the same shape without them.
    checkpoint : str
        Name in params/checkpoints.yaml or directory.
    adapt : str
        `none`, or `mlm`: before labels are used, the network goes on guessing hidden values, on the screen's own
        training cells.
    adapt_steps, lr_adapt
        For how many batches, and at which learning rate.
    pooling : str
        `cls` or `mean`.
    values : str
        What tokens carry: `bins`, `log1p`, or as the checkpoint was trained.
    normalise : bool
        Scale retrieval embeddings to length 1.
    dropout : float
        Of the network while it is trained.
    last_layers : int
        The n of `last_n`.
    lora_targets : tuple of str
        Modules of a layer that get adapters.
    lora_layers : tuple of int
        Layers that do, counted from 0; empty for all.
    rank, alpha, lora_dropout
        Of adapters.
    head_depth, head_width, head_dim, head_dropout
        Of the projection.
    loss : str
        `classification` (cross-entropy of candidates), `contrastive` (supervised, between cells) or their sum, `both`.
    label_smoothing : float
        Of classification: this share of each label is spread evenly over all candidates.
    temperature : float
        Of the contrastive loss, where its training starts.
    sampler, batch_size, cells_per_condition
        See `perturbret.scgpt.training.plan_batches`.
    accumulate : int
        Batches between two steps of the optimiser.
    epochs, patience : int
        Most epochs, and how many without a better one are waited for: higher exact_hit@1 on validation cells, or the
        same at a lower loss.
    steps : int
        Most steps of the optimiser, to the nearest whole epoch: a large screen needs fewer epochs than a small one.
    lr_backbone, lr_head : float
        Highest learning rates.
    weight_decay, warmup, clip : float
        AdamW's; share of all steps in which rates rise; largest norm of the gradient.
    members : int
        How many times what the mode trains is trained on the same cells, from other random numbers each; embeddings are
        joined and class probabilities averaged. Without effect in `frozen`.
    precision : str
        `float32`, or `bfloat16` for the products of the network.
    """

    mode: str = "lora_head"
    init: str = "pretrained"
    checkpoint: str = "small"
    adapt: str = "none"
    adapt_steps: int = 600
    lr_adapt: float = 1e-3
    pooling: str = "mean"
    values: str = "checkpoint"
    normalise: bool = False
    dropout: float = 0.1
    last_layers: int = 2
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_layers: tuple[int, ...] = ()
    rank: int = 16
    alpha: float = 32.0
    lora_dropout: float = 0.0
    head_depth: int = 0
    head_width: int = 256
    head_dim: int = 64
    head_dropout: float = 0.2
    loss: str = "classification"
    label_smoothing: float = 0.1
    temperature: float = 0.1
    sampler: str = "random"
    batch_size: int = 64
    cells_per_condition: int = 4
    accumulate: int = 1
    epochs: int = 16
    steps: int = 1600
    patience: int = 6
    lr_backbone: float = 3e-3
    lr_head: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    members: int = 1
    precision: str = "float32"


def read_settings(given: Mapping) -> Settings:
    """Settings from names and values, each of the type and in the range that it must have.

    Raises
    ------
    ValueError
        Names the setting, what was expected and what was got: an unknown name, a number given as text (`1e4` is a
        text to YAML: write 1.0e4), a value out of range.
    """
    defaults = Settings()
    mode = given.get("mode", defaults.mode)
    values = dict(MODE_DEFAULTS.get(mode, {})) if isinstance(mode, str) else {}
    for name, value in given.items():
        if name not in {field.name for field in dataclasses.fields(Settings)}:
            known = ", ".join(field.name for field in dataclasses.fields(Settings))
            raise ValueError(f"settings: expected some of {known}, got {name!r}")
        values[name] = _checked(name, value, getattr(defaults, name))
    settings = dataclasses.replace(defaults, **values)
    if settings.sampler == "balanced" and settings.batch_size % settings.cells_per_condition:
        raise ValueError(
            f"batch_size: expected a multiple of cells_per_condition {settings.cells_per_condition}, got "
            f"{settings.batch_size}"
        )
    return settings


def _checked(name: str, value, default):
    if name in CHOICES:
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: expected one of {', '.join(CHOICES[name])}, got {value!r}")
        return value
    if isinstance(default, tuple):
        kind = int if name == "lora_layers" else str
        if not isinstance(value, list | tuple) or any(type(part) is not kind for part in value):
            raise ValueError(f"{name}: expected a list of {kind.__name__}, got {value!r}")
        if name == "lora_targets" and (
            not value or not set(value) <= set(LORA_TARGETS) or len(set(value)) < len(value)
        ):
            raise ValueError(f"{name}: expected some of {', '.join(LORA_TARGETS)}, each once, got {value!r}")
        return tuple(value)
    if isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            raise ValueError(f"{name}: expected {type(default).__name__}, got {value!r}")
        return value
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else Real) or not math.isfinite(value):
        hint = "; YAML takes 1e4 for a text, write 1.0e4" if isinstance(value, str) else ""
        raise ValueError(f"{name}: expected a {'whole ' if whole else ''}number, got {value!r}{hint}")
    low, high = LIMITS[name]
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value!r}")
    return value if whole else float(value)
