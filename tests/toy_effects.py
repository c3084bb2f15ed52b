"""A small screen of effects whose truth is known, as a table and as a file."""

from itertools import combinations

import numpy as np
import pandas as pd

from perturbret.data.effects import Effects
from perturbret.data.masking import target_columns


def toy_effects(
    n_singles=10, n_doubles=16, n_genes=60, *, noise=0.02, dominance=(1.0, 1.0), own=2.0, seed=0
) -> Effects:
    """Doubles are c1 s1 + c2 s2 with s1 the single of the larger effect; each single raises its own target by `own`."""
    rng = np.random.default_rng(seed)
    singles = [f"T{i:02d}" for i in range(n_singles)]
    genes = np.array([*singles, *(f"G{i:03d}" for i in range(n_genes))])
    effects = rng.normal(size=(n_singles, len(genes))) * rng.uniform(0.2, 1, (n_singles, 1))
    effects[:, :n_singles] = own * np.eye(n_singles)
    pairs = [
        list(combinations(range(n_singles), 2))[i] for i in rng.permutation(n_singles * (n_singles - 1) // 2)
    ]
    size, rows = np.linalg.norm(effects[:, n_singles:], axis=1), dict(zip(singles, effects, strict=True))
    for pair in pairs[:n_doubles]:
        strong, weak = sorted(pair, key=lambda single: -size[single])
        both = dominance[0] * effects[strong] + dominance[1] * effects[weak]
        rows["+".join(singles[i] for i in sorted(pair))] = both
    conditions = tuple(sorted(rows))
    values = np.array([rows[condition] for condition in conditions])
    halves = values + noise * rng.normal(size=(2, *values.shape))
    columns = target_columns(conditions, genes)
    return Effects("toy", halves.mean(axis=0), conditions, genes, columns, halves, simulated=True)


def write_effects(effects: Effects, path, *, labels=None, column=None, layers=(), values=None) -> None:
    """An h5ad whose rows are named by conditions; with `column`, those names are in obs."""
    import anndata

    labels = list(effects.conditions if labels is None else labels)
    values = effects.values if values is None else values
    names = [f"row{i}" for i in range(len(labels))] if column else labels
    obs = pd.DataFrame({column: labels} if column else {}, index=names)
    adata = anndata.AnnData(np.asarray(values, np.float32), obs, pd.DataFrame(index=effects.genes))
    for name, half in zip(layers, effects.halves, strict=False):
        adata.layers[name] = half
    adata.write_h5ad(path)
