"""Decoders of masked-value pretraining, by their official names: trained beside the network, then left behind."""

import torch
from torch import Tensor, nn


class ValueDecoder(nn.Module):
    """Output at a gene -> the value that was hidden there; `ExprDecoder` of scgpt 0.2.4."""

    def __init__(self, d_model: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, d_model),
            nn.LeakyReLU(),
            nn.Linear(d_model, 1),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(cells, length, d_model) -> (cells, length)."""
        return self.fc(hidden).squeeze(-1)


class CellDecoder(nn.Module):
    """Cell embedding and gene embeddings -> values; `MVCDecoder` of scgpt 0.2.4, style `inner product`."""

    def __init__(self, d_model: int):
        super().__init__()
        self.gene2query = nn.Linear(d_model, d_model)
        self.W = nn.Linear(d_model, d_model, bias=False)

    def forward(self, cells: Tensor, genes: Tensor) -> Tensor:
        """(cells, d_model), (cells, length, d_model) -> (cells, length)."""
        query = torch.sigmoid(self.gene2query(genes))
        return torch.bmm(self.W(query), cells.unsqueeze(2)).squeeze(2)


class Decoders(nn.Module):
    """Both decoders, under the names that official checkpoints give them."""

    def __init__(self, d_model: int):
        super().__init__()
        self.decoder = ValueDecoder(d_model)
        self.mvc_decoder = CellDecoder(d_model)
