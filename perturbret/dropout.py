"""Dropout whose random numbers cost less on a CPU than torch's: one byte for each value, where torch draws a double."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 256


class Dropout(nn.Module):
    """In training, values become 0 with probability p and the others grow so that the mean stays; else nothing happens.

    On a CPU, p is rounded to 256ths (0.1 becomes 26/256), the scale of what is kept with it; anything above 0 is at
    least 1/256. Random bytes come from torch's global generator. Elsewhere this is torch's dropout.

    Parameters
    ----------
    p : float
        In [0, 1).
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: expected a probability from 0 to below 1, got {p}")
        self.p = p

    def forward(self, values: Tensor) -> Tensor:
        """Values of the same shape."""
        if not self.training or not self.p:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.p, training=True)
        dropped = min(max(round(self.p * STEPS), 1), STEPS - 1)
        words = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        bytes_ = words.view(torch.int8)[: values.numel()].view(values.shape)
        kept = (bytes_ >= dropped - STEPS // 2).to(values.dtype)
        return values * kept.mul_(STEPS / (STEPS - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"
