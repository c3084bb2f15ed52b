"""Pretraining: a run of masked-value training on reference cells, resumable, in the official layout.

`open_pretraining` finds or makes its directory, `run_pretraining` trains and writes the checkpoint that a run of
`perturbret.scgpt` may start from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["open_pretraining", "read_pretrained", "run_pretraining"],
    },
)
