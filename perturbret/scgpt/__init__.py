"""scGPT: tokens, network, checkpoints, masked-value training, and its backbone for `perturbret.networks`.

`fit_scgpt` fits a mode on a screen's training cells and returns an encoder like any other. The network is made of plain
modules with the official names; its checkpoints are those of the official layout.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backbone": ["ScGPTBackbone", "backbone_for", "fit_scgpt"],
        "checkpoint": ["load_checkpoint", "save_checkpoint"],
        "network": ["ScGPT", "Shape"],
        "settings": ["ScGPTSettings"],
        "tokens": ["tokenize"],
        "vocabulary": ["Vocabulary", "load_vocabulary", "map_genes"],
    },
)
