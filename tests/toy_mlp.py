"""A second network family, as small as one can be: log1p counts -> dense layers -> an embedding of length 1."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from perturbret.networks.backbone import Backbone
from perturbret.networks.inputs import Rows
from perturbret.networks.settings import Names, Settings


class MLPSettings(Settings):
    targets: ClassVar = ("dense",)
    lora_targets: Names = ("dense",)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden):
        return F.relu(self.dense(hidden))


class MLP(nn.Module):
    lora_targets: ClassVar = {"dense": "dense"}

    def __init__(self, n_genes, width=16, n_layers=3):
        super().__init__()
        self.n_genes, self.width = n_genes, width
        self.first = nn.Linear(n_genes, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(n_layers))

    def check(self, inputs):
        if inputs.values.shape[1] != self.n_genes:
            raise ValueError(f"inputs: expected {self.n_genes} genes, got {inputs.values.shape[1]}")

    def inputs(self, first, values):
        return self.first(first)

    def run(self, hidden, padding, start=0, stop=None):
        for layer in self.layers[start:stop]:
            hidden = layer(hidden)
        return hidden

    def pool(self, hidden, padding, *, pooling, start=0):
        return F.normalize(self.run(hidden, padding, start), dim=1)


@dataclass(frozen=True)
class MLPBackbone(Backbone):
    family: ClassVar = "toy_mlp"
    settings: ClassVar = MLPSettings

    network: MLP
    origin: dict

    @classmethod
    def make(cls, prepared, options, *, seed, report):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(MLP(len(prepared.cells.genes)).eval(), {"init": "random"})

    def inputs(self, cells, *, directory=None):
        scaled = cells.counts.toarray() / np.maximum(cells.totals, 1)[:, None] * 1e4
        return Rows(np.log1p(scaled).astype(np.float32))

    def describe(self):
        return {"n_genes": self.network.n_genes, "origin": self.origin}

    @classmethod
    def load(cls, description, weights, directory):
        network = MLP(description["n_genes"]).eval()
        network.load_state_dict(weights)
        return cls(network, description["origin"])
