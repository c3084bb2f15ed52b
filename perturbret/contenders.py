"""Which method stands for what in a report: the first of all, the baseline, the nuisance that all must exceed."""

import pandas as pd

CEILING = "bayes_ceiling"
# They read no expression: what they reach is the screen's design, not biology.
NUISANCE = ("prior", "library_size", "batch")
ROLES = ("simple", "tuned", "nuisance", "ceiling", "precomputed")


def role_of(encoder: str, mask: str, tuned: str = "scgpt") -> str:
    """What an encoder can stand for.

    Returns
    -------
    str
        `tuned`: a mode of scGPT; `nuisance`: it reads no expression; `ceiling`: it knows the simulated truth;
        `precomputed`: an embedding that was made before the mask acted; `simple`: any other opponent.
    """
    if encoder.startswith("obsm:") and mask != "none":
        return "precomputed"
    named = {tuned: "tuned", CEILING: "ceiling"} | dict.fromkeys(NUISANCE, "nuisance")
    return named.get(encoder, "simple")


def first_of(readouts: pd.DataFrame, mask: str, *roles: str) -> str | None:
    """The method of these roles whose best read-out hits most validation cells under `mask`; None without any.

    The best method is the first of `simple` and `tuned`, the baseline the first of `simple`: a nuisance opponent is
    neither.

    Parameters
    ----------
    readouts : pandas.DataFrame
        From `perturbret.compare.choose_readouts`.
    mask : str
    roles : str
        Some of `ROLES`.
    """
    rows = readouts[(readouts["mask"] == mask) & readouts["role"].isin(roles)]
    rows = rows.assign(best=rows["best"].round(9)).sort_values(["best", "encoder"], ascending=[False, True])
    return rows["encoder"].iloc[0] if len(rows) else None


def shown(encoder: str) -> str:
    """Name of a method in tables and figures."""
    return "Bayes ceiling" if encoder == CEILING else encoder
