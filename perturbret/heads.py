"""Heads on a cell embedding: a projection to the retrieval space, and a classifier over training conditions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """Cell embedding -> retrieval embedding -> logits of conditions.

    In mode `head`, inputs are first centred and scaled by constants taken from training cells (`set_scale`): the
    embeddings of a frozen network lie so close together that a linear layer could hardly tell them apart. Where the
    network is trained too, that hurt on validation cells, and the constants stay 0 and 1.

    Parameters
    ----------
    d_in : int
        Width of the cell embedding.
    n_classes : int
        Training conditions.
    depth : int
        Linear layers of the projection, with ReLU and dropout between them; 0: no projection.
    width, dim : int
        Of hidden layers, and of the retrieval embedding; unused at depth 0.
    dropout : float
        Of what each linear layer gets, the classifier's too.
    loss : str
        `classification`: there is a classifier; `contrastive`: there is a learnable temperature; `both`: both.
    temperature : float
        Where the learnable temperature starts.
    """

    def __init__(
        self,
        d_in: int,
        n_classes: int,
        *,
        depth: int,
        width: int,
        dim: int,
        dropout: float,
        loss: str,
        temperature: float,
    ):
        super().__init__()
        sizes = [d_in, *[width] * (depth - 1), dim] if depth else [d_in]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.dim = sizes[-1]
        self.classifier = nn.Linear(self.dim, n_classes) if loss != "contrastive" else None
        start = torch.tensor(-math.log(temperature))
        self.log_scale = nn.Parameter(start) if loss != "classification" else None
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("centre", torch.zeros(d_in))
        self.register_buffer("spread", torch.ones(d_in))

    @property
    def scale(self) -> Tensor:
        """One over the temperature, at most 100 as in CLIP (Radford et al., ICML 2021)."""
        return self.log_scale.exp().clamp(max=100.0)

    @torch.no_grad()
    def set_scale(self, embeddings: Tensor) -> None:
        """Take centre and spread of each dimension from embeddings of training cells, (n, d_in)."""
        embeddings = embeddings.double()
        spread = embeddings.std(dim=0, correction=0)
        self.centre.copy_(embeddings.mean(dim=0))
        # A dimension that does not vary stays 0 instead of being divided by rounding error.
        self.spread.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1.0))

    def forward(self, cells: Tensor, *, normalise: bool = False) -> tuple[Tensor, Tensor | None]:
        """Retrieval embeddings (n, dim) and logits (n, n_classes), None without a classifier.

        normalise : scale retrieval embeddings, which the classifier gets, to length 1.
        """
        hidden = (cells - self.centre) / self.spread
        for i, layer in enumerate(self.layers):
            hidden = layer(self.dropout(F.relu(hidden) if i else hidden))
        if normalise:
            hidden = F.normalize(hidden, dim=1)
        return hidden, self.classify(hidden)

    def classify(self, embeddings: Tensor) -> Tensor | None:
        """Logits of retrieval embeddings."""
        return None if self.classifier is None else self.classifier(self.dropout(embeddings))
