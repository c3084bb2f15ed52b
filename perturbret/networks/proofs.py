"""Proof that training changed what it should and nothing else, made for every fine-tuned encoder."""

import copy

import numpy as np
import torch

from .adapters import is_adapter, merge_lora, trainable
from .backbone import Inputs, Network
from .embedding import embed_rows, fingerprint
from .heads import HeadedNetwork
from .settings import Settings
from .training import Outcome

MERGE_TOLERANCE = 1e-4  # of the largest embedding value; merging sums the same products in another order


class ProofFailed(RuntimeError):
    """A trained encoder is not what its mode says."""


def prove(
    model: HeadedNetwork,
    original: Network,
    original_sha256: str,
    inputs: Inputs,
    index: np.ndarray,
    outcome: Outcome,
    options: Settings,
) -> dict:
    """Check one trained member against the network that it started from.

    Parameters
    ----------
    model : HeadedNetwork
    original : Network
        The network before training.
    original_sha256 : str
        Its fingerprint, taken before training.
    inputs : Inputs
    index : ndarray of int
        Cells to compare embeddings of.
    outcome : Outcome
        Of its training.
    options : Settings

    Returns
    -------
    dict, for the manifest
        `gradient_norms`; `embedding_change`: mean absolute difference between the cell embeddings of the tuned and the
        original network in evaluation mode, over the mean absolute value of the original's; `merged_difference`:
        largest absolute difference after merging adapters, over the largest absolute value; `frozen_unchanged`:
        number of tensors found equal bit for bit.

    Raises
    ------
    ProofFailed
        A trained tensor never got a gradient; the embedding did not change although the network was trained, or did
        although it was not; merging changes the embedding; a frozen weight changed.
    """
    trained, gradients = trainable(model), outcome.gradients
    silent = sorted(name for name in trained if not gradients.get(name, 0.0) > 0)
    if outcome.n_steps == 1:
        # An adapter's A gets its gradient through B, which is 0 until the first step is made.
        silent = [name for name in silent if ".lora_A." not in name]
    if silent:
        raise ProofFailed(
            f"expected a gradient in each of {len(trained)} trained tensors, {len(silent)} never got one: "
            f"{', '.join(silent[:5])}"
        )
    before = _cells(original, model, inputs, index, options)
    after = _cells(model.network, model, inputs, index, options)
    change = float(np.abs(after - before).mean() / np.abs(before).mean())
    tunes_network = any(name.startswith("network.") for name in trained)
    if tunes_network and not change > 0:
        raise ProofFailed(
            "expected the trained network to embed cells otherwise than before, found no difference"
        )
    if not tunes_network and change != 0:
        raise ProofFailed(
            f"expected the frozen network to embed cells as before, they differ by {change:.2e}"
        )
    return {
        "gradient_norms": gradients,
        "embedding_change": change,
        "merged_difference": _merged_difference(model, after, inputs, index, options),
        "frozen_unchanged": _frozen_unchanged(model, original, original_sha256),
    }


def _cells(
    network: Network, model: HeadedNetwork, inputs: Inputs, index: np.ndarray, options: Settings
) -> np.ndarray:
    whole = HeadedNetwork(network, None, pooling=model.pooling, normalise=False, start=0).eval()
    return embed_rows(whole, inputs, index, precision=options.precision)[0]


def _merged_difference(model: HeadedNetwork, after: np.ndarray, inputs, index, options) -> float | None:
    """None where there are no adapters."""
    if not any(is_adapter(module) for module in model.network.modules()):
        return None
    merged = copy.deepcopy(model.network)
    merge_lora(merged)
    difference = np.abs(_cells(merged, model, inputs, index, options) - after).max() / np.abs(after).max()
    # bfloat16 keeps 8 bits: rounding of merged weights is of that size.
    if difference > (MERGE_TOLERANCE if options.precision == "float32" else 0.05):
        raise ProofFailed(
            f"expected merged adapters to embed cells as unmerged ones do, they differ by {difference:.2e}"
        )
    return float(difference)


def _frozen_unchanged(model: HeadedNetwork, original: Network, original_sha256: str) -> int:
    if fingerprint(original) != original_sha256:
        raise ProofFailed("expected the weights that training started from to be as they were, they changed")
    trained = {name.removeprefix("network.") for name in trainable(model)}
    weights = original.state_dict()
    unchanged = set()
    for name, tensor in model.network.state_dict().items():
        # peft renames the weight that an adapter stands around.
        own = name.replace(".base_layer.", ".")
        if name in trained or own not in weights:
            continue
        if not torch.equal(tensor.cpu(), weights[own].cpu()):
            raise ProofFailed(f"expected the frozen {own} to be as it was, it changed")
        unchanged.add(own)
    if lost := sorted(set(weights) - trained - unchanged):
        raise ProofFailed(
            f"expected the network to have its frozen tensors still, {', '.join(lost[:5])} are gone"
        )
    return len(unchanged)
