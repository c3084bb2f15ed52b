"""Combinations: which two genes were perturbed, from effects of conditions and no cells.

`make_task` sets the question, a `Composer` scores pairs of singles, `compare` judges all of them on doubles that
share no gene with what they were fitted to or chosen by. Nothing here knows cells, encoders or runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ceiling": ["detectability", "half_against_half", "read_distances"],
        "compare": ["by_shared_genes", "differences", "summarise"],
        "composers": ["COMPOSERS", "LEARNED", "Composer"],
        "judge": ["gene_interval"],
        "nested": ["nested_scores"],
        "task": ["CANDIDATE_SETS", "PairTask", "make_task"],
    },
)
