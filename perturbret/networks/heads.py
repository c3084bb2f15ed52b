"""What stands on a network: the head that is trained with it, and both together."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Network
from .inputs import BATCH_TOKENS

PART_TOKENS = 1024  # on a CPU; smaller parts cost more in calls than they save in padding and memory traffic


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


class HeadedNetwork(nn.Module):
    """Network and head; called with a block of what the network reads, of `Hidden` or of `Rows`, according to `start`.

    Parameters
    ----------
    network : Network
    head : Head or None
        None: the cell embedding is the retrieval embedding, and there are no logits.
    pooling : str
    normalise : bool
        Scale retrieval embeddings, which the classifier gets too, to length 1.
    start : int or None
        First layer that runs: 0 for what the network reads, more for outputs of lower layers, None for embeddings.
    """

    def __init__(
        self, network: Network, head: Head | None, *, pooling: str, normalise: bool, start: int | None = 0
    ):
        super().__init__()
        self.network, self.head = network, head
        self.pooling, self.normalise, self.start = pooling, normalise, start

    def cells(self, first: Tensor, values: Tensor | None, padding: Tensor | None) -> Tensor:
        """Cell embeddings, (cells, width), as the network gives them."""
        if self.start is None:
            return first
        size = PART_TOKENS if first.device.type == "cpu" else BATCH_TOKENS
        if padding is None or padding.numel() < 2 * size:
            return self._run(first, values, padding)
        # A batch drawn at random holds short and long cells: computed in parts of like length, without most padding.
        lengths = (~padding).sum(dim=1)
        order = lengths.argsort()
        done = []
        for part in order.chunk(padding.numel() // size):
            width = int(lengths[part[-1]])
            cut = [None if whole is None else whole[part, :width] for whole in (first, values)]
            done.append(self._run(*cut, None if lengths[part[0]] == width else padding[part, :width]))
        return torch.cat(done)[order.argsort()]

    def _run(self, first: Tensor, values: Tensor | None, padding: Tensor | None) -> Tensor:
        hidden = first if self.start else self.network.inputs(first, values)
        return self.network.pool(hidden, padding, pooling=self.pooling, start=self.start)

    def forward(
        self, first: Tensor, values: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Retrieval embeddings (cells, dim) and logits (cells, n_classes), None without a classifier."""
        cells = self.cells(first, values, padding)
        if self.head is None:
            return (F.normalize(cells, dim=1) if self.normalise else cells), None
        return self.head(cells, normalise=self.normalise)
