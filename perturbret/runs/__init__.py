"""Runs: one encoder under one mask, split and seed, in a directory with a manifest that vouches for it.

`open_run` finds or makes the directory, `fit_run` and `evaluate_run` fill it, and what is there is used again only
when request, cells and fitting code are the same.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "limits": ["told_apart"],
        "pipeline": ["evaluate_run", "fit", "fit_code", "fit_run", "notebook_run", "open_saved", "save_run"],
        "runs": ["Identity", "Run", "open_run", "outputs_root", "run_name"],
    },
)
