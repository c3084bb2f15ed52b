"""What a network family is: three protocols. Whoever fulfils them gets the heads, losses, training, adapters and
proofs of this room, and a line in `perturbret.networks.families`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from torch import Tensor, nn

from ..data.prepared import Cells, Prepared
from .settings import Settings


class Inputs(Protocol):
    """What a network reads of some cells.

    Attributes
    ----------
    lengths : ndarray of int, shape (n_cells,)
        How much of a batch each cell fills: its tokens. Batches hold cells of like length, up to a sum.
    hash : str
        sha256 of the content.
    """

    lengths: np.ndarray
    hash: str

    def __len__(self) -> int: ...

    def padded(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """The cells at `index` as (first, values, padding); padding is True where nothing is, None where all is."""
        ...


class Network(Protocol):
    """An `nn.Module` whose embedding of a cell is made in three parts: inputs, layers, pooling.

    Attributes
    ----------
    width : int
        Of the cell embedding.
    layers : sequence of Module
        From the lowest up: what `last_n` counts, and where adapters go.
    lora_targets : mapping of str to str
        Linear modules within a layer that can get an adapter: name that a user gives -> path within the layer.
    """

    width: int
    layers: nn.ModuleList
    lora_targets: Mapping[str, str]

    def check(self, inputs: Any) -> None:
        """Raise ValueError for inputs that were made for another network."""
        ...

    def inputs(self, first: Tensor, values: Tensor | None) -> Tensor:
        """What the lowest layer gets: (cells, length, d), or (cells, d) where a cell is no sequence."""
        ...

    def run(self, hidden: Tensor, padding: Tensor | None, start: int = 0, stop: int | None = None) -> Tensor:
        """Outputs of the layers from `start` to before `stop`."""
        ...

    def pool(self, hidden: Tensor, padding: Tensor | None, *, pooling: str, start: int = 0) -> Tensor:
        """Cell embeddings (cells, width) from what layer `start` gets."""
        ...


class Backbone(Protocol):
    """A network that is ready for a panel of genes, and how cells become what it reads.

    Attributes
    ----------
    family : str
        Its name in `perturbret.networks.families.NETWORKS`.
    settings : type of Settings
        All that can be chosen.
    network : Network
        In evaluation mode, before anything is trained.
    origin : dict
        Where it is from, for the manifest; JSON-able.
    """

    family: ClassVar[str]
    settings: ClassVar[type[Settings]]
    network: Any
    origin: dict

    @classmethod
    def make(cls, prepared: Prepared, options: Settings, *, seed: int, report: Callable[[str], None]) -> Self:
        """The backbone of a run, on the device that computes; no label and no query cell may have influence."""
        ...

    def inputs(self, cells: Cells, *, directory: Path | None = None) -> Inputs:
        """What the network reads of masked cells; kept in `directory` where one is given."""
        ...

    def describe(self) -> dict:
        """All but the weights, JSON-able, `origin` included."""
        ...

    @classmethod
    def load(cls, description: Mapping, weights: dict[str, Tensor], directory: Path) -> Self:
        """The backbone that `describe` described, with these weights; `directory` is where they were."""
        ...
