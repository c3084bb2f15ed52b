"""Which weights of the network a mode trains: none, adapters of low rank, the last layers, or all.

Source: Hu et al., LoRA, ICLR 2022; peft injects the adapters into the network's own Linear modules, whose forward is
called in training and in evaluation alike.
"""

import re
from collections.abc import Sequence

from torch import nn

from .backbone import Network


def freeze(network: Network) -> None:
    """Let no weight of the network be trained."""
    for weight in network.parameters():
        weight.requires_grad = False


def unfreeze(network: Network) -> int:
    """Let every weight be trained, those below the layers too; returns 0, the position of the lowest layer."""
    for weight in network.parameters():
        weight.requires_grad = True
    return 0


def unfreeze_last(network: Network, n: int) -> int:
    """Let the last `n` layers be trained; returns the position of the first of them.

    Raises
    ------
    ValueError
        The network has fewer layers.
    """
    layers = network.layers
    if not 1 <= n <= len(layers):
        raise ValueError(f"last_layers: expected 1 to the network's {len(layers)} layers, got {n}")
    for layer in layers[-n:]:
        for weight in layer.parameters():
            weight.requires_grad = True
    return len(layers) - n


def add_lora(
    network: Network,
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
    network : Network
    targets : sequence of str
        Some of the network's `lora_targets`.
    layers : sequence of int
        Positions of layers, from 0; empty for all of them.
    rank, alpha, dropout
        An adapter adds alpha / rank x B A x, where A gets its input through dropout. B starts at 0.

    Raises
    ------
    ValueError
        A target or layer is unknown, or the rank or alpha is out of range.
    """
    from peft import LoraConfig, inject_adapter_in_model

    known, n_layers = network.lora_targets, len(network.layers)
    if not targets or not set(targets) <= set(known):
        raise ValueError(f"lora_targets: expected some of {', '.join(known)}, got {list(targets)}")
    chosen = sorted(set(layers)) or list(range(n_layers))
    if chosen[0] < 0 or chosen[-1] >= n_layers:
        raise ValueError(f"lora_layers: expected positions from 0 to {n_layers - 1}, got {list(layers)}")
    linear = [layer.get_submodule(path) for layer in network.layers for path in known.values()]
    width = min(min(module.in_features, module.out_features) for module in linear)
    if not 1 <= rank <= width or not alpha > 0:
        raise ValueError(
            f"lora: expected a rank from 1 to the least width {width} and alpha above 0, got {rank}, {alpha}"
        )
    adapted = [network.layers[i].get_submodule(known[name]) for i in chosen for name in targets]
    names = [name for name, module in network.named_modules() if any(module is each for each in adapted)]
    # A pattern of whole names: peft takes a list for endings, which other modules may share.
    pattern = "|".join(map(re.escape, names))
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern)
    inject_adapter_in_model(config, network)
    found = sum(1 for module in network.modules() if is_adapter(module))
    if found != len(adapted):
        raise RuntimeError(f"lora: expected {len(adapted)} adapted modules, peft made {found}")
    return chosen[0]


def is_adapter(module: nn.Module) -> bool:
    """Whether peft put an adapter around this module."""
    return hasattr(module, "lora_A")


def merge_lora(network: Network) -> None:
    """Add every adapter's product to the weight that it adapts, in place, and take the adapter away."""
    for name, module in list(network.named_modules()):
        if is_adapter(module):
            module.merge(safe_merge=True)
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, module.get_base_layer())


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a training step may change, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
