"""Alignment: one order of genes for several datasets.

Genes are matched by Ensembl id or symbol, ranked by dispersion within each dataset, and written down as a gene space;
counts are remapped into it in chunks and verified by value.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "panels": ["align", "align_screen"],
        "chunks": ["chunked_h5ad", "chunked_in_space", "chunked_screen"],
        "gene_space": ["GeneSpace", "check_gene_space", "read_gene_space", "write_gene_space"],
        "reference_cells": ["load_references", "read_references"],
        "remapping": ["remap", "verify_alignment"],
    },
)
