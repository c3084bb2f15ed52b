"""Encoders: every simple opponent, fitted on training cells, chosen on validation cells, saved and loaded alike.

An opponent is a function under `@method(...)` in a file of its own; `fit_baseline` fits any of them by name, and
`load_encoder` reads back whatever a run saved, of this room or of a family of networks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Average", "Encoder", "compute_features", "load_encoder"],
        "baselines": ["KINDS", "fit_baseline"],
        "methods": ["METHODS", "Training", "fit_method", "method"],
    },
)
