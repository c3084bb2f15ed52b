"""Networks: whatever fine-tunes a pretrained network, whichever family it is of.

`families` names the families; `backbone` says what one must give. For it, this room has heads, losses, batches,
training with early stopping, adapters, proofs, and an encoder like any other.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "backbone": ["Backbone", "Inputs", "Network"],
        "embedding": ["best_device", "cached_embed", "device_name", "fingerprint"],
        "encoder": ["TunedEncoder"],
        "families": ["NETWORKS", "Family"],
        "fit": ["fit_network"],
        "inputs": ["Rows"],
        "settings": ["Settings"],
    },
)
