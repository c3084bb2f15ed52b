"""Data: from a dataset's entry to the masked cells that an encoder may see.

`load_screen` reads and checks, `make_split` gives every cell a role, `prepare` masks. What a file says is
matched, counted and put on record here, so that no later room asks again what a label or a column means.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "datasets": ["load_screen", "resolve_dataset"],
        "effects": ["Effects", "load_effects"],
        "masking": ["POLICIES", "mask_counts", "target_columns"],
        "prepared": ["Cells", "Context", "Prepared", "prepare"],
        "screen": ["Screen"],
        "simulate": ["simulate_screen"],
        "sources": ["Entry", "find_entry", "load_registry", "make_entry"],
        "splits": ["Split", "get_split", "make_split"],
        "targets": ["match_targets"],
        "tracks": ["TRACKS", "Track", "track", "uniform"],
    },
)
