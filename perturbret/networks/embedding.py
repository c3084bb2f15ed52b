"""Embeddings of cells: computed in evaluation mode, or read where they were computed before."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from ..files.cache import cached
from ..files.provenance import code_hash
from .backbone import Inputs, Network
from .heads import HeadedNetwork
from .inputs import BATCH_TOKENS, Hidden, Rows, blocks

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
_SETTING = (bool, int, float, str, type(None))


def best_device() -> torch.device:
    """Where this process computes: its GPU where there is one, as accelerate sees it, else the CPU."""
    return PartialState().device


def device_name() -> str:
    """The same for the record: `cpu`, or a GPU by its name."""
    device = best_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def embed(
    network: Network,
    inputs: Inputs,
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
    network : Network
    inputs : Inputs
    normalise : bool
        Scale each embedding to length 1.
    pooling : str
        One that the network knows.
    precision : str
        `float32`, or `bfloat16` for matrix products; sums and norms stay float32.
    batch_tokens : int
        Sum of lengths in a batch, padding included.

    Returns
    -------
    ndarray of float32, shape (len(inputs), network.width)

    Raises
    ------
    ValueError
        `precision` or `pooling` is unknown, or the inputs were made for another network.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    network.check(inputs)
    if not len(inputs):
        return np.empty((0, network.width), np.float32)
    whole = HeadedNetwork(network, None, pooling=pooling, normalise=normalise).train(network.training)
    every = np.arange(len(inputs))
    return embed_rows(whole, inputs, every, precision=precision, batch_tokens=batch_tokens)[0]


def embed_rows(
    model: HeadedNetwork,
    source: Inputs | Hidden | Rows,
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
    network: Network, inputs: Inputs, stop: int, *, precision: str = "float32", directory: Path | None = None
) -> Hidden | Rows:
    """Outputs of the layers before `stop` for all cells, in evaluation mode: `Rows` where a cell is no sequence.

    directory : where an unnamed file may hold them, gone with the result: they are d numbers per token, for large
    screens more than fits in memory. None: they are in memory.
    """
    device = next(network.parameters()).device
    indptr = np.concatenate([[0], np.cumsum(inputs.lengths)])
    values, sequences = None, True
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            for chosen, (first, numbers, padding) in blocks(inputs, np.arange(len(inputs)), device):
                hidden = network.run(network.inputs(first, numbers), padding, 0, stop).float().cpu().numpy()
                if values is None:
                    sequences = hidden.ndim == 3
                    size = (int(indptr[-1]) if sequences else len(inputs), hidden.shape[-1])
                    values = _room_for(size, directory)
                if not sequences:
                    values[chosen] = hidden
                    continue
                for cell, rows in zip(chosen, hidden, strict=True):
                    begin, end = indptr[cell], indptr[cell + 1]
                    values[begin:end] = rows[: end - begin]
    finally:
        network.train(was_training)
    return Hidden(values, indptr) if sequences else Rows(values)


def _room_for(size: tuple[int, int], directory: Path | None) -> np.ndarray:
    """An array of float32 in memory, or in a file of `directory` that is gone with it."""
    if directory is None:
        return np.empty(size, np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory) as file:
        return np.memmap(file, np.float32, "w+", shape=size)


def autocast(device: torch.device, precision: str):
    """Matrix products in the given precision; float32 changes nothing."""
    kind = PRECISIONS[precision]
    return torch.autocast(device.type, kind or torch.bfloat16, enabled=kind is not None)


def cached_embed(
    network: Network,
    inputs: Inputs,
    *,
    directory: str | os.PathLike | None,
    normalise: bool,
    pooling: str = "cls",
    precision: str = "float32",
    batch_tokens: int = BATCH_TOKENS,
) -> np.ndarray:
    """`embed`, read from `directory` where the same was computed before; None: computed.

    The same: `embedding_key`. Not part of it are `batch_tokens`, the device and the number of threads, on which
    embeddings depend by rounding alone; the second call gives the bits that the first one got. Errors as of
    `embed`, `embedding_key` and `perturbret.files.cache.cached`.
    """
    options = {"normalise": normalise, "pooling": pooling, "precision": precision}

    def make(folder: Path) -> None:
        made = embed(network, inputs, **options, batch_tokens=batch_tokens)
        np.save(folder / "embeddings.npy", made, allow_pickle=False)

    if directory is None:
        return embed(network, inputs, **options, batch_tokens=batch_tokens)
    folder = cached(directory, "embeddings", embedding_key(network, inputs, **options), make, verify=True)
    return np.load(folder / "embeddings.npy", allow_pickle=False)


def embedding_key(
    network: Network, inputs: Inputs, *, normalise: bool, pooling: str = "cls", precision: str = "float32"
) -> dict[str, str | bool]:
    """All that embeddings depend on, by name.

    `weights`: names, shapes and bytes; `modules`: classes and settings of the modules, such as the number of heads or
    an adapter's scale, which no weight shows; `inputs`: their content; `code`: what runs between these and embeddings,
    the network's own module included; `normalise`, `pooling`, `precision`.

    Raises
    ------
    ValueError
        A module has forward hooks: what they do cannot be told from its weights and settings.
    """
    return {
        "weights": fingerprint(network),
        "modules": hashlib.sha256(json.dumps(_modules(network)).encode()).hexdigest(),
        "inputs": inputs.hash,
        "pooling": pooling,
        "normalise": bool(normalise),
        "precision": precision,
        "code": _code(type(network).__module__),
    }


def _code(module: str) -> str:
    package = __package__.partition(".")[0]
    own = [module.removeprefix(f"{package}.")] if module.startswith(f"{package}.") else []
    return code_hash("networks.embedding:embed", *own)


def _modules(network: Network) -> list:
    """Name, class and settings of each module."""
    described = []
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"network: expected no forward hooks, on which embeddings would depend unseen; got some on {name!r}"
            )
        settings = {key: kept for key, value in vars(module).items() if (kept := _setting(value)) is not None}
        settings.pop("training", None)  # embed leaves training mode for as long as it takes
        described.append([name, f"{type(module).__module__}.{type(module).__qualname__}", settings])
    return described


def _setting(value) -> str | None:
    """A plain value, or a collection of such, as text; None for whatever has no fixed text, such as modules."""
    if isinstance(value, _SETTING):
        return repr(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, _SETTING) for item in value):
        return repr(list(value))
    if isinstance(value, dict) and value and all(isinstance(item, _SETTING) for item in value.values()):
        return repr(sorted((str(key), item) for key, item in value.items()))
    return None


def fingerprint(network: nn.Module) -> str:
    """sha256 over names, shapes, types and bytes of a network's weights, wherever they lie.

    Examples
    --------
    >>> from torch import nn
    >>> network = nn.Linear(2, 2)
    >>> before = fingerprint(network)
    >>> _ = nn.init.zeros_(network.bias)
    >>> fingerprint(network) == before
    False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
