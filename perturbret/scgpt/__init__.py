"""scGPT: tokens, network, checkpoints, adapters, fine-tuning and its proofs, and masked-value training.

`fit_scgpt` fits a mode on a screen's training cells and returns an encoder like any other. The network is made of plain
modules with the official names; its checkpoints are those of the official layout.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoint": ["load_checkpoint", "save_checkpoint"],
        "encoder": ["ScGPTEncoder"],
        "modes": ["fit_scgpt"],
        "network": ["ScGPT", "Shape"],
        "settings": ["Settings", "read_settings"],
        "tokens": ["tokenize"],
        "vocabulary": ["Vocabulary", "load_vocabulary", "map_genes"],
    },
)
