"""Which weights of the network a mode trains: none, adapters of low rank, the last layers, or all.

Source: Hu et al., LoRA, ICLR 2022; peft injects the adapters into the network's own Linear modules, whose forward is
called in training and in evaluation alike.
"""

import re
from collections.abc import Sequence

from torch import nn

from .network import ScGPT

# Module within a layer, by the name that a user gives.
TARGETS = {
    "Wqkv": "self_attn.Wqkv",
    "out_proj": "self_attn.out_proj",
    "linear1": "linear1",
    "linear2": "linear2",
}


def freeze(network: ScGPT) -> None:
    """Let no weight of the network be trained."""
    for weight in network.parameters():
        weight.requires_grad = False


def unfreeze(network: ScGPT) -> int:
    """Let every weight be trained, the genes' embeddings too; returns 0, the position of the lowest layer."""
    for weight in network.parameters():
        weight.requires_grad = True
    return 0


def unfreeze_last(network: ScGPT, n: int) -> int:
    """Let the last `n` transformer layers be trained; returns the position of the first of them.

    Raises
    ------
    ValueError
        The network has fewer layers.
    """
    layers = network.transformer_encoder["layers"]
    if not 1 <= n <= len(layers):
        raise ValueError(f"last_layers: expected 1 to the network's {len(layers)} layers, got {n}")
    for layer in layers[-n:]:
        for weight in layer.parameters():
            weight.requires_grad = True
    return len(layers) - n


def add_lora(
    network: ScGPT,
    *,
    targets: Sequence[str],
    layers: Sequence[int],
    rank: int,
    alpha: float,
    dropout: float,
) -> int:
    """Put adapters into the network, in place; returns the position of the lowest layer that has one.

    Parameters
    ----------
    network : ScGPT
    targets : sequence of str
        Some of `TARGETS`.
    layers : sequence of int
        Positions of transformer layers, from 0; empty for all of them.
    rank, alpha, dropout
        An adapter adds alpha / rank x B A x, where A gets its input through dropout. B starts at 0.

    Raises
    ------
    ValueError
        A target or layer is unknown, or the rank or alpha is out of range.
    """
    from peft import LoraConfig, inject_adapter_in_model

    n_layers = len(network.transformer_encoder["layers"])
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise ValueError(f"lora_targets: expected some of {', '.join(TARGETS)}, got {list(targets)}")
    chosen = sorted(set(layers)) or list(range(n_layers))
    if chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ValueError(f"lora_layers: expected positions from 0 to {n_layers - 1}, got {list(layers)}")
    width = min(network.shape.d_model, network.shape.d_hid)
    if not 1 <= rank <= width or not alpha > 0:
        raise ValueError(
            f"lora: expected a rank from 1 to the least width {width} and alpha above 0, got {rank}, {alpha}"
        )
    # Anchored at both ends: bare names would also hit value_encoder.linear1 and linear2.
    names = "|".join(re.escape(TARGETS[name]) for name in targets)
    pattern = rf"transformer_encoder\.layers\.({'|'.join(map(str, chosen))})\.({names})"
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    inject_adapter_in_model(config, network)
    expected = len(chosen) * len(targets)
    found = sum(1 for module in network.modules() if is_adapter(module))
    if found != expected:
        raise RuntimeError(f"lora: expected {expected} adapted modules, peft made {found}")
    return chosen[0]


def is_adapter(module: nn.Module) -> bool:
    """Whether peft put an adapter around this module."""
    return hasattr(module, "lora_A")


def merge_lora(network: ScGPT) -> None:
    """Add every adapter's product to the weight that it adapts, in place, and take the adapter away."""
    for name, module in list(network.named_modules()):
        if is_adapter(module):
            module.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, module.get_base_layer())


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a training step may change, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
