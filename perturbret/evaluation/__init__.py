"""Evaluation: queries, scores, metrics, intervals, null control, and what else could explain a score.

It knows an encoder by its methods alone and stands below the encoders, which choose their settings through it.
Everything is a function of embeddings, scores or metrics; nothing here is fitted to labels of query cells.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "column_guard": ["guard_columns"],
        "confidence": ["judge_confidence"],
        "confounders": ["confounding"],
        "embedding_shape": ["depth_r2", "effective_rank", "hubness", "spread"],
        "judge": ["evaluate", "null_control", "summarise", "within_batch"],
        "limits": ["duplicate_hits", "merged_hits", "replicates", "share_of_range"],
        "metrics": ["METRICS", "Ranking", "chance", "metric", "per_query"],
        "nulls": ["permute_conditions"],
        "query_sizes": ["cells_needed", "cells_needed_by_condition"],
        "readouts": ["choose_pooling", "choose_readout"],
        "resolvability": ["apart_by_condition", "apart_by_size", "merge_alike", "tell_apart"],
        "retrieval": ["Library", "build_library", "match"],
        "scoring": ["make_queries", "score_queries"],
        "stats": [
            "Estimates",
            "cluster_bootstrap",
            "holm",
            "paired_permutation_p",
            "repeated_difference",
            "repeated_mean",
        ],
        "validation": ["best_readout"],
        "whitening": ["whitener"],
    },
)
