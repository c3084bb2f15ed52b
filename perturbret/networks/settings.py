"""Everything about a fine-tuning run that can be chosen, checked before anything is computed."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator


def _as_tuple(value):
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Positions = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]
Share = Annotated[float, Field(ge=0, le=0.9)]
Rate = Annotated[float, Field(ge=0, le=1)]


def within(low, high):
    """A whole number of these limits, inclusive."""
    return Annotated[int, Field(ge=low, le=high)]


class Settings(BaseModel):
    """What `perturbret.networks.fit` is asked to do; a family adds its own, and other defaults, in a subclass.

    Attributes
    ----------
    mode : str
        What is trained: `frozen` nothing, `head` the head, `lora_head` adapters and the head, `last_n` the last
        layers and the head, `full` everything.
    init : str
        `pretrained`: the checkpoint's weights; `random`: the same shape without them.
    checkpoint : str
        Name in params/checkpoints.yaml or directory.
    pooling : str
        How outputs of the last layer become one embedding, where the network leaves a choice.
    normalise : bool
        Scale retrieval embeddings to length 1.
    dropout : float
        Of the network while it is trained.
    last_layers : int
        The n of `last_n`.
    lora_targets : tuple of str
        Modules of a layer that get adapters, some of the family's.
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
        See `perturbret.networks.training.plan_batches`.
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

    Examples
    --------
    >>> Settings.read({"mode": "head"}).epochs, Settings.read({"mode": "lora_head"}).epochs
    (60, 16)
    >>> Settings.read({"epochs": "1e2"})
    Traceback (most recent call last):
        ...
    ValueError: epochs: expected a whole number, got '1e2'; YAML takes 1e4 for a text, write 1.0e4
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    # Names of modules that can get adapters.
    targets: ClassVar[tuple[str, ...]] = ()
    # What a mode needs otherwise than adapters do: these start at no effect and take larger steps; a head is cheap.
    mode_defaults: ClassVar[Mapping[str, dict]] = {
        "last_n": {"lr_backbone": 1e-3, "steps": 1200},
        "full": {"lr_backbone": 1e-3, "steps": 1200},
        "head": {"epochs": 60, "steps": 100_000, "patience": 15, "lr_head": 2e-3},
    }

    mode: Literal["frozen", "head", "lora_head", "last_n", "full"] = "lora_head"
    init: Literal["pretrained", "random"] = "pretrained"
    checkpoint: str = ""
    pooling: str = "mean"
    normalise: bool = False
    dropout: Share = 0.1
    last_layers: within(1, 3) = 2
    lora_targets: Names = ()
    lora_layers: Positions = ()
    rank: within(1, 256) = 16
    alpha: float = Field(32.0, ge=1e-3, le=1e4)
    lora_dropout: Share = 0.0
    head_depth: within(0, 8) = 0
    head_width: within(1, 8192) = 256
    head_dim: within(2, 8192) = 64
    head_dropout: Share = 0.2
    loss: Literal["classification", "contrastive", "both"] = "classification"
    label_smoothing: Share = 0.1
    # Below 0.01 a temperature is cut there by the head, and would never get a gradient.
    temperature: float = Field(0.1, ge=0.02, le=10)
    sampler: Literal["random", "balanced"] = "random"
    batch_size: within(4, 65536) = 64
    cells_per_condition: within(2, 64) = 4
    accumulate: within(1, 1024) = 1
    epochs: within(1, 10000) = 16
    steps: within(1, 100_000_000) = 1600
    patience: within(1, 10000) = 6
    lr_backbone: Rate = 3e-3
    lr_head: Rate = 1e-3
    weight_decay: float = Field(0.01, ge=0, le=10)
    warmup: Share = 0.05
    clip: float = Field(1.0, ge=1e-6, le=1e6)
    members: within(1, 32) = 1
    precision: Literal["float32", "bfloat16"] = "float32"

    @field_validator("lora_targets")
    @classmethod
    def _known_targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not set(value) <= set(cls.targets) or len(set(value)) < len(value):
            raise ValueError(f"expected some of {', '.join(cls.targets)}, each once")
        return value

    @classmethod
    def read(cls, given: Mapping) -> Self:
        """Settings from names and values, each of the type and in the range that it must have.

        Raises
        ------
        ValueError
            Names the setting, what was expected and what was got: an unknown name, a number given as text (`1e4` is a
            text to YAML: write 1.0e4), a value out of range.
        """
        mode = given.get("mode", cls.model_fields["mode"].default)
        try:
            settings = cls(**{**(cls.mode_defaults.get(mode, {}) if isinstance(mode, str) else {}), **given})
        except ValidationError as error:
            raise ValueError(cls._sentence(error.errors()[0], given)) from None
        if settings.sampler == "balanced" and settings.batch_size % settings.cells_per_condition:
            raise ValueError(
                f"batch_size: expected a multiple of cells_per_condition {settings.cells_per_condition}, got "
                f"{settings.batch_size}"
            )
        return settings

    @classmethod
    def _sentence(cls, error: dict, given: Mapping) -> str:
        """One of pydantic's errors as this package says it: name, expected, got."""
        name, kind = error["loc"][0], error["type"]
        if kind == "extra_forbidden":
            return f"settings: expected some of {', '.join(cls.model_fields)}, got {name!r}"
        field, value = cls.model_fields[name], given[name]
        if kind == "value_error":
            expected = str(error["ctx"]["error"])
        elif kind == "literal_error":
            expected = f"expected one of {', '.join(get_args(field.annotation))}"
        elif kind in ("greater_than_equal", "less_than_equal"):
            limits = {type(limit).__name__: limit for limit in field.metadata}
            expected = f"expected {limits['Ge'].ge} to {limits['Le'].le}"
        elif field.annotation in (int, float):
            hint = "; YAML takes 1e4 for a text, write 1.0e4" if isinstance(value, str) else ""
            whole = "whole " if field.annotation is int else ""
            return f"{name}: expected a {whole}number, got {value!r}{hint}"
        elif field.annotation in (bool, str):
            expected = f"expected {field.annotation.__name__}"
        else:
            expected = f"expected a list of {get_args(field.annotation)[0].__name__}"
        return f"{name}: {expected}, got {value!r}"
