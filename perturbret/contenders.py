"""Which method stands for what in a report: the best of all, and the best simple opponent."""

import pandas as pd

CEILING = "bayes_ceiling"
# They read no expression: what they reach is the screen's design, not biology.
NUISANCE = ("prior", "library_size", "batch")


def best_method(readouts: pd.DataFrame, mask: str, without: str = "") -> str:
    """Name of the encoder with the best primary read-out on validation cells under `mask`.

    The ceiling is no method, and an embedding that was computed before masking (`unmasked`) stands for no mask
    but `none`.

    Parameters
    ----------
    readouts : pandas.DataFrame
        From `perturbret.compare.choose_readouts`.
    mask : str
    without : str
        An encoder to leave out.

    Raises
    ------
    ValueError
        There is none.
    """
    return _first(_contenders(readouts, mask, without), mask)


def best_baseline(readouts: pd.DataFrame, mask: str, without: str = "") -> str:
    """The same among simple opponents: networks that were tuned do not count, unless there is nothing else."""
    rows = _contenders(readouts, mask, without)
    simple = rows[~rows["tuned"]]
    return _first(simple if len(simple) else rows, mask)


def best_tuned(readouts: pd.DataFrame, mask: str) -> str | None:
    """The same among scGPT's modes; None without any."""
    rows = _contenders(readouts, mask, "")
    rows = rows[rows["tuned"]]
    return _first(rows, mask) if len(rows) else None


def _contenders(readouts: pd.DataFrame, mask: str, without: str) -> pd.DataFrame:
    rows = readouts[readouts["primary"] & (readouts["mask"] == mask)]
    return rows[~rows["encoder"].isin([CEILING, without]) & ~(rows["unmasked"] & (mask != "none"))]


def _first(rows: pd.DataFrame, mask: str) -> str:
    if rows.empty:
        raise ValueError(f"mask: expected at least one finished run under {mask!r}, found none")
    return rows.sort_values(["validation", "encoder"], ascending=[False, True])["encoder"].iloc[0]
