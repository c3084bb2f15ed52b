"""Workflow: parameters, grids, papermill, Snakemake, HTML pages and the index; free of science.

`execute` runs one notebook whole or not at all, `run_report` a grid of them; parameters are checked against what a
notebook declares before anything starts.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "execution": ["execute"],
        "grid": ["Grid", "load_grid"],
        "html": ["render"],
        "index": ["write_index"],
        "parameters": ["check_given", "check_parameters"],
        "snakemake": ["run_report"],
    },
)
