"""What notebooks 03 to 05 show of single cells: settings in force, a map, one ranking, the commonest mix-ups."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..evaluation.metrics import relevance
from ..evaluation.readouts import VARIANT, Choice, choose_readout
from ..evaluation.validation import Fitted
from .figures import new_figure
from .wording import plain

RELATIONS = {2: "the true condition", 1: "shares a target", 0: ""}
_COLOURS = 9  # conditions that a map tells apart; more colours look alike


def settings_line(fitted: Fitted) -> str:
    """The settings in force, defaults included, in Markdown."""
    listed = ", ".join(f"{plain(name)} = {plain(value)}" for name, value in fitted.chosen.items())
    return f"**Effective settings:** {listed or 'there is nothing to set'}."


def best_readout(scores: pd.DataFrame) -> Choice:
    """The read-out that validation cells choose, from `evaluate` on them."""
    return choose_readout(scores[scores["scoring"] != VARIANT], n_resamples=1)


def at_readout(scores: pd.DataFrame, library: str, scoring: str) -> pd.DataFrame:
    """The single cells among scores, at one read-out."""
    return scores.query("query_size == 1 and library == @library and scoring == @scoring")


def ranking(scores: pd.DataFrame, query: str) -> pd.DataFrame:
    """The ten conditions ranked first for one query.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `evaluate`, at one read-out (`at_readout`).
    query : str
        A `query_id`.
    """
    (row,) = scores[scores["query_id"] == query].itertuples()
    names = row.top10.split("|")
    levels = relevance(np.array([row.condition]), names)[0]
    table = {"rank": range(1, len(names) + 1), "condition": names}
    return pd.DataFrame({**table, "": [RELATIONS[int(level)] for level in levels]})


def confusions(scores: pd.DataFrame, n: int = 10) -> pd.DataFrame:
    """The `n` commonest pairs of a condition and another one that is ranked first in its place.

    `share`: of the condition's queries.
    """
    first = scores["top10"].str.split("|").str[0]
    sizes = scores["condition"].value_counts()
    wrong = pd.DataFrame({"condition": scores["condition"], "ranked first": first})
    wrong = wrong[wrong["condition"] != wrong["ranked first"]]
    pairs = wrong.value_counts().rename("queries").reset_index()
    pairs = pairs.sort_values(["queries", "condition", "ranked first"], ascending=[False, True, True]).head(n)
    pairs["share"] = pairs["queries"] / pairs["condition"].map(sizes)
    both = zip(pairs["condition"], pairs["ranked first"], strict=True)
    related = [relevance(np.array([true]), [found])[0, 0] for true, found in both]
    return pairs.assign(relation=[RELATIONS[int(level)] for level in related]).reset_index(drop=True)


def embedding_map(embeddings: np.ndarray, conditions: np.ndarray) -> Figure:
    """The first two principal components of embeddings (n, d), the conditions with most cells in colour."""
    centred = np.nan_to_num(embeddings - embeddings.mean(axis=0)).astype(float)
    places, shares = _principal_components(centred)
    counts = pd.Series(conditions).value_counts()
    coloured = sorted(counts.index[:_COLOURS])
    figure, (axis,) = new_figure(7.5, 4.2)
    others = ~np.isin(conditions, coloured)
    if others.any():
        rest = f"{len(counts) - len(coloured)} others"
        axis.scatter(*places[others].T, s=6, color="#d0d0d0", linewidths=0, label=rest)
    for i, name in enumerate(coloured):
        axis.scatter(*places[conditions == name].T, s=12, color=f"C{i}", linewidths=0, label=name)
    axis.set(
        title=f"{len(conditions):,} cells by condition",
        xlabel=f"first component ({shares[0]:.0%} of the variance)",
        ylabel=f"second ({shares[1]:.0%})",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _principal_components(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First two principal components (n, 2) of centred rows (n, d), and their shares of the variance.

    By the Gram matrix of the shorter side: to import scikit-learn for this takes longer than most fits.
    """
    wide = centred.shape[1] > len(centred)
    values, vectors = np.linalg.eigh(centred @ centred.T if wide else centred.T @ centred)
    first = np.argsort(values)[::-1][:2]
    places, shares = np.zeros((len(centred), 2)), np.zeros(2)
    found = vectors[:, first] * np.sqrt(np.maximum(values[first], 0)) if wide else centred @ vectors[:, first]
    places[:, : len(first)] = found
    shares[: len(first)] = np.maximum(values[first], 0) / max(
        np.sum(np.maximum(values, 0)), np.finfo(float).tiny
    )
    return places, shares
