"""What can be chosen about fine-tuning scGPT, beside what every family has."""

from typing import ClassVar, Literal

from ..networks.settings import Names, Rate, Settings, within

LORA_TARGETS = ("Wqkv", "out_proj", "linear1", "linear2")


class ScGPTSettings(Settings):
    """Settings of scGPT; the defaults were chosen on validation cells for the small checkpoint of the package.

    Attributes
    ----------
    adapt : str
        `none`, or `mlm`: before labels are used, the network goes on guessing hidden values, on the screen's own
        training cells.
    adapt_steps, lr_adapt
        For how many batches, and at which learning rate.
    pooling : str
        `cls` or `mean`.
    values : str
        What tokens carry: `bins`, `log1p`, or as the checkpoint was trained.

    Examples
    --------
    >>> ScGPTSettings.read({"mode": "frozen"}).checkpoint
    'small'
    >>> ScGPTSettings.read({"pooling": "max"})
    Traceback (most recent call last):
        ...
    ValueError: pooling: expected one of cls, mean, got 'max'
    """

    targets: ClassVar[tuple[str, ...]] = LORA_TARGETS

    checkpoint: str = "small"
    adapt: Literal["none", "mlm"] = "none"
    adapt_steps: within(1, 1_000_000) = 600
    lr_adapt: Rate = 1e-3
    pooling: Literal["cls", "mean"] = "mean"
    values: Literal["checkpoint", "bins", "log1p"] = "checkpoint"
    lora_targets: Names = LORA_TARGETS
