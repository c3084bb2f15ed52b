"""A network with its head, as it is trained and as it embeds cells, from tokens or from what was computed before."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from .network import PRECISIONS, ScGPT
from .tokens import Tokens, block_positions, like_batches


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


BATCH_TOKENS = 16384
PART_TOKENS = (
    1024  # on a CPU; smaller parts cost more in calls than they save in padding and in trips to memory
)


@dataclass(frozen=True)
class Hidden:
    """What a network's frozen lower layers give, sequence by sequence, end to end.

    Attributes
    ----------
    values : ndarray of float32, shape (n, d_model)
    indptr : ndarray of int64, shape (n_cells + 1,)
        Cell i is the slice from indptr[i] to before indptr[i + 1].
    """

    values: np.ndarray
    indptr: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, None, np.ndarray | None]:
        """The cells at `index` as a block (cells, longest, d_model), no values, and padding (None where none is)."""
        # Padding holds copies of the first token: attention leaves them out, whatever they are.
        at, padding = block_positions(self.indptr, index)
        return self.values[at], None, padding if padding.any() else None


@dataclass(frozen=True)
class Rows:
    """Embeddings of cells, computed once: what a head is trained on alone.

    Attributes
    ----------
    values : ndarray of float32, shape (n_cells, d_model)
    """

    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, None, None]:
        """The cells at `index`, no values, no padding."""
        return self.values[index], None, None


class Model(nn.Module):
    """Network and head; called with a block of `Tokens`, `Hidden` or `Rows`, according to `start`.

    Parameters
    ----------
    network : ScGPT
    head : Head or None
        None: the cell embedding is the retrieval embedding, and there are no logits.
    pooling : str
    normalise : bool
        Scale retrieval embeddings, which the classifier gets too, to length 1.
    start : int or None
        First layer that runs: 0 for tokens, more for `Hidden`, None for `Rows`.
    """

    def __init__(
        self, network: ScGPT, head: Head | None, *, pooling: str, normalise: bool, start: int | None = 0
    ):
        super().__init__()
        self.network, self.head = network, head
        self.pooling, self.normalise, self.start = pooling, normalise, start

    def cells(self, first: Tensor, values: Tensor | None, padding: Tensor | None) -> Tensor:
        """Cell embeddings, (cells, d_model), as the network gives them."""
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
            return (nn.functional.normalize(cells, dim=1) if self.normalise else cells), None
        return self.head(cells, normalise=self.normalise)


def blocks(
    source: Tokens | Hidden | Rows, index: np.ndarray, device, *, batch_tokens: int = BATCH_TOKENS
) -> Iterator:
    """The cells at `index` in blocks of like length: positions in `index`, and what `Model` is called with."""
    index = np.asarray(index)
    lengths = np.ones(len(index), int) if isinstance(source, Rows) else np.diff(source.indptr)[index]
    for chosen in like_batches(lengths, batch_tokens):
        yield chosen, to_device(source.padded(index[chosen]), device)


def best_device() -> torch.device:
    """Where this process computes: its GPU where there is one, as accelerate sees it, else the CPU."""
    return PartialState().device


def device_name() -> str:
    """The same for the record: `cpu`, or a GPU by its name."""
    device = best_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def to_device(block: tuple, device) -> tuple[Tensor | None, ...]:
    """A padded block as tensors."""
    return tuple(None if array is None else torch.from_numpy(array).to(device) for array in block)


def embed(
    network: ScGPT,
    tokens: Tokens,
    *,
    normalise: bool,
    pooling: str = "cls",
    precision: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """Embeddings of cells in evaluation mode, on the device that the network is on.

    Cells of like length share a batch, so that little is computed for padding. In float32 a cell's embedding does
    not depend, beyond rounding, on the cells beside it.

    Parameters
    ----------
    network : ScGPT
    tokens : Tokens
    normalise : bool
        Scale each embedding to length 1, as the official cell embedding is.
    pooling : str
        `cls` or `mean`.
    precision : str
        `float32`, or `bfloat16` for matrix products; sums and norms stay float32.
    batch_tokens : int
        Tokens in a batch, padding included.

    Returns
    -------
    ndarray of float32, shape (len(tokens), d_model)

    Raises
    ------
    ValueError
        `precision` or `pooling` is unknown, a token is not in the network's vocabulary, or the tokens' padding is not
        the network's.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    shape = network.shape
    if tokens.n_tokens != shape.n_tokens or tokens.pad_id != shape.pad_id:
        raise ValueError(
            f"tokens: expected a vocabulary of {shape.n_tokens} with padding {shape.pad_id}, got one of "
            f"{tokens.n_tokens} with padding {tokens.pad_id}"
        )
    if not len(tokens):
        return np.empty((0, shape.d_model), np.float32)
    model = Model(network, None, pooling=pooling, normalise=normalise).train(network.training)
    return embed_rows(model, tokens, np.arange(len(tokens)), precision=precision, batch_tokens=batch_tokens)[
        0
    ]


def embed_rows(
    model: Model,
    source: Tokens | Hidden | Rows,
    index: np.ndarray,
    *,
    precision: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Retrieval embeddings and logits of the cells at `index` in evaluation mode, float32."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    embeddings, logits = None, None
    try:
        with torch.inference_mode(), autocast(device, precision):
            for chosen, block in blocks(source, index, device, batch_tokens=batch_tokens):
                z, scores = model(*block)
                if embeddings is None:
                    embeddings = np.empty((len(index), z.shape[1]), np.float32)
                    logits = None if scores is None else np.empty((len(index), scores.shape[1]), np.float32)
                embeddings[chosen] = z.float().cpu().numpy()
                if logits is not None:
                    logits[chosen] = scores.float().cpu().numpy()
    finally:
        model.train(was_training)
    return embeddings, logits


def run_lower(
    network: ScGPT, tokens: Tokens, stop: int, *, precision: str = "float32", directory: Path | None = None
) -> Hidden:
    """Outputs of the layers before `stop` for all cells, in evaluation mode.

    directory : where an unnamed file may hold them, gone with the result: they are d_model numbers per token, for large
    screens more than fits in memory. None: they are in memory.
    """
    device = network.encoder.embedding.weight.device
    size = (len(tokens.genes), network.shape.d_model)
    if directory is None:
        values = np.empty(size, np.float32)
    else:
        with tempfile.TemporaryFile(dir=directory) as file:
            values = np.memmap(file, np.float32, "w+", shape=size)
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            for chosen, (genes, numbers, padding) in blocks(tokens, np.arange(len(tokens)), device):
                hidden = network.run(network.inputs(genes, numbers), padding, 0, stop).float().cpu().numpy()
                for cell, rows in zip(chosen, hidden, strict=True):
                    begin, end = tokens.indptr[cell], tokens.indptr[cell + 1]
                    values[begin:end] = rows[: end - begin]
    finally:
        network.train(was_training)
    return Hidden(values, np.asarray(tokens.indptr))


def autocast(device: torch.device, precision: str):
    """Matrix products in the given precision; float32 changes nothing."""
    kind = PRECISIONS[precision]
    return torch.autocast(device.type, kind or torch.bfloat16, enabled=kind is not None)
