"""The scGPT network as plain modules: every weight that a cell passes through is in a module that is called.

`torch.nn.TransformerEncoder`, which the official code uses, reads raw weights on its fused path in eval mode and
forgets adapters wrapped around them. Here each projection is an `nn.Linear` whose forward runs in training and in
evaluation alike. Names of modules are those of the official checkpoints.

Source: Cui et al., scGPT, Nature Methods 2024; scgpt 0.2.4, `scgpt.model.TransformerModel`, which tests compare with.
"""

from dataclasses import dataclass
from typing import ClassVar

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


POOLINGS = ("cls", "mean")
MAX_VALUE = 512  # larger values are cut, as upstream does


@dataclass(frozen=True)
class Shape:
    """Sizes of a network.

    Attributes
    ----------
    n_tokens : int
        Genes and special tokens of the vocabulary.
    d_model, n_heads, d_hid, n_layers : int
        Width, attention heads, width of the feed-forward part, transformer layers.
    dropout : float
    pad_id : int
        Token of padding; its embedding gets no gradient.

    Examples
    --------
    >>> shape = Shape(n_tokens=23, d_model=16, n_heads=2, d_hid=16, n_layers=2, dropout=0.1, pad_id=20)
    >>> len(ScGPT(shape).layers)
    2
    """

    n_tokens: int
    d_model: int
    n_heads: int
    d_hid: int
    n_layers: int
    dropout: float
    pad_id: int

    def __post_init__(self):
        sizes = (self.n_tokens, self.d_model, self.n_heads, self.d_hid, self.n_layers)
        if min(sizes) < 1 or self.d_model % self.n_heads:
            raise ValueError(
                f"shape: expected sizes of 1 or more and d_model a multiple of n_heads, got {self}"
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.pad_id < self.n_tokens:
            raise ValueError(
                f"shape: expected dropout in [0, 1) and pad_id among {self.n_tokens} tokens, got {self}"
            )


class GeneEncoder(nn.Module):
    """Token ids -> normalised embeddings."""

    def __init__(self, shape: Shape):
        super().__init__()
        # Where nothing is initialised, torch would import its compiler (2 s) to do so.
        meta = torch.get_default_device().type == "meta"
        given = {"_weight": torch.empty(shape.n_tokens, shape.d_model)} if meta else {}
        self.embedding = nn.Embedding(shape.n_tokens, shape.d_model, padding_idx=shape.pad_id, **given)
        self.enc_norm = nn.LayerNorm(shape.d_model)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.enc_norm(self.embedding(ids))


class ValueEncoder(nn.Module):
    """Values, bins or continuous -> normalised embeddings; without the dropout that follows."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.linear1 = nn.Linear(1, shape.d_model)
        self.linear2 = nn.Linear(shape.d_model, shape.d_model)
        self.norm = nn.LayerNorm(shape.d_model)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.linear1(values.clamp(max=MAX_VALUE).unsqueeze(-1))
        return self.norm(self.linear2(F.relu(hidden)))


class SelfAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values, in that order."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.n_heads = shape.n_heads
        self.Wqkv = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.out_proj = nn.Linear(shape.d_model, shape.d_model)

    def forward(self, hidden: Tensor, real: Tensor | None, rows: int | None) -> Tensor:
        cells, length, width = hidden.shape
        parts = self.Wqkv(hidden).view(cells, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind()  # each (cells, heads, length, width / heads)
        # Attention weights are not dropped: that takes torch off its fused kernel, three times the time on a CPU.
        mixed = F.scaled_dot_product_attention(query[:, :, :rows], key, value, attn_mask=real)
        return self.out_proj(mixed.transpose(1, 2).reshape(cells, -1, width))


class TransformerLayer(nn.Module):
    """Transformer layer: attention, then a feed-forward part, each added to its input and normalised after."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.self_attn = SelfAttention(shape)
        self.linear1 = nn.Linear(shape.d_model, shape.d_hid)
        self.linear2 = nn.Linear(shape.d_hid, shape.d_model)
        self.norm1 = nn.LayerNorm(shape.d_model)
        self.norm2 = nn.LayerNorm(shape.d_model)
        self.dropout = Dropout(shape.dropout)

    def forward(self, hidden: Tensor, real: Tensor | None, rows: int | None = None) -> Tensor:
        """(cells, length, d_model) -> (cells, rows, d_model); `rows`: only the first so many, by default all."""
        attended = self.dropout(self.self_attn(hidden, real, rows))
        hidden = self.norm1(hidden[:, :rows] + attended)
        inner = self.dropout(F.relu(self.linear1(hidden)))
        return self.norm2(hidden + self.dropout(self.linear2(inner)))


class ScGPT(nn.Module):
    """Gene tokens and their values -> one embedding per cell, not normalised.

    `inputs`, `run` and `pool` are the three parts of `forward`; frozen lower layers can thus be computed once.
    Initialised as torch does (embeddings: uniform in ±0.1, as upstream), from torch's global generator.

    Examples
    --------
    >>> import torch
    >>> network = ScGPT(Shape(n_tokens=23, d_model=16, n_heads=2, d_hid=16, n_layers=2, dropout=0.1, pad_id=20))
    >>> genes, values = torch.tensor([[21, 3, 7]]), torch.tensor([[-2.0, 5.0, 1.0]])
    >>> network(genes, values).shape
    torch.Size([1, 16])
    """

    lora_targets: ClassVar[dict[str, str]] = {
        "Wqkv": "self_attn.Wqkv", "out_proj": "self_attn.out_proj", "linear1": "linear1", "linear2": "linear2"
    }  # fmt: skip

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.encoder = GeneEncoder(shape)
        self.value_encoder = ValueEncoder(shape)
        self.dropout = Dropout(shape.dropout)
        self.transformer_encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(TransformerLayer(shape) for _ in range(shape.n_layers))}
        )

    @property
    def width(self) -> int:
        """Of a cell's embedding."""
        return self.shape.d_model

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer layers, the lowest first."""
        return self.transformer_encoder["layers"]

    def check(self, tokens) -> None:
        """Raise ValueError for tokens of another vocabulary."""
        ours, theirs = (self.shape.n_tokens, self.shape.pad_id), (tokens.n_tokens, tokens.pad_id)
        if ours != theirs:
            raise ValueError(
                f"tokens: expected a vocabulary of {ours[0]} with padding {ours[1]}, got one of {theirs[0]} with "
                f"padding {theirs[1]}"
            )

    def forward(
        self, genes: Tensor, values: Tensor, padding: Tensor | None = None, *, pooling: str = "cls"
    ) -> Tensor:
        """Embeddings, (cells, d_model).

        Parameters
        ----------
        genes : Tensor of int64, shape (cells, length)
            The first of each cell is `<cls>`.
        values : Tensor of float32, shape (cells, length)
        padding : Tensor of bool, shape (cells, length), optional
            True where there is no token.
        pooling : str
            `cls`: the output at `<cls>`; `mean`: the mean over all real tokens, `<cls>` included.
        """
        return self.pool(self.inputs(genes, values), padding, pooling=pooling)

    def inputs(self, genes: Tensor, values: Tensor) -> Tensor:
        """What the first layer gets, (cells, length, d_model)."""
        return _each(self.encoder, genes) + self.dropout(_each(self.value_encoder, values))

    def run(self, hidden: Tensor, padding: Tensor | None, start: int = 0, stop: int | None = None) -> Tensor:
        """Outputs of the layers from `start` to before `stop`, (cells, length, d_model); padding holds nonsense."""
        real = _real(padding)
        for layer in self.layers[start:stop]:
            hidden = layer(hidden, real)
        return hidden

    def pool(self, hidden: Tensor, padding: Tensor | None, *, pooling: str = "cls", start: int = 0) -> Tensor:
        """Embeddings from what layer `start` gets, (cells, d_model).

        Raises
        ------
        ValueError
            `pooling` is unknown.
        """
        if pooling == "mean":
            hidden = self.run(hidden, padding, start)
            if padding is None:
                return hidden.mean(dim=1)
            weights = (~padding).to(hidden.dtype).unsqueeze(-1)
            return hidden.masked_fill(padding.unsqueeze(-1), 0).sum(dim=1) / weights.sum(dim=1)
        if pooling != "cls":
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if start < len(self.layers):
            # Nothing reads the other rows of the last layer.
            hidden = self.run(hidden, padding, start, len(self.layers) - 1)
            hidden = self.layers[-1](hidden, _real(padding), rows=1)
        return hidden[:, 0]


def _each(module: nn.Module, ids: Tensor) -> Tensor:
    """module(ids), computed once for each distinct id: of bins there are fifty in a batch of many thousands."""
    distinct, positions = torch.unique(ids, return_inverse=True)
    return F.embedding(positions, module(distinct))


def _real(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else ~padding[:, None, None, :]
