"""Paired differences between methods, each at one read-out fixed beforehand, and the verdicts that they allow."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from .compare import LEAK_FREE, repeats
from .contenders import first_of
from .readouts import common_readout
from .stats import holm, repeated_difference

# Refits that a verdict needs: the spread between them is part of the interval.
MIN_REPEATS = 3
NO_DIFFERENCE = "no clear difference"
# Questions whose verdicts form one Holm family each; `nuisance` is an excess with an interval, without a verdict.
FAMILIES = (("baseline", "adapting", "pretraining"), ("mask",))
SHOWN = ("exact_hit@1", "mrr")


def contrasts(
    scores: pd.DataFrame, readouts: pd.DataFrame, *, n_resamples: int = 1000, no_verdict: str = ""
) -> pd.DataFrame:
    """All paired differences of a report, on the same single query cells.

    Parameters
    ----------
    scores : pandas.DataFrame
        From `perturbret.compare.kept_scores`, of one track and share of labels.
    readouts : pandas.DataFrame
        From `perturbret.compare.choose_readouts`, of the same.
    n_resamples : int
        Of the bootstrap behind intervals; ten sign patterns of paired tests for each.
    no_verdict : str
        Why nothing may be concluded on this screen; every verdict then says so.

    Returns
    -------
    pandas.DataFrame
        One row per comparison: `question` (`baseline`: against the best simple opponent; `adapting`: against the
        frozen network from the same weights; `pretraining`: against the same mode from random weights; `mask`: against
        the same method under the mask of the headline; `nuisance`: over the best nuisance opponent), `encoder`, `mask`,
        `against`, `scoring` and `library` (of both sides; `own` where each side has the one chosen for it, as
        `nuisance` has), the two sides' exact_hit@1 as `estimate` and `other`, `difference` with `low` and `high`,
        `spread` between repeats, `p_value` (paired permutation), `p_holm` (adjusted within `FAMILIES`), `verdict`,
        `mrr`, `mrr_low`, `mrr_high`, `n_repeats`.
    """
    columns = [
        "question",
        "encoder",
        "mask",
        "against",
        "scoring",
        "library",
        "estimate",
        "other",
        "difference",
    ]
    columns += ["low", "high", "spread", "p_value", "mrr", "mrr_low", "mrr_high", "n_repeats"]
    single = scores[scores["query_size"] == 1]
    parts = dict(list(single.groupby(["encoder", "mask", "scoring", "library"], observed=True)))
    by_name = readouts.set_index(["encoder", "mask"])
    rows = []
    for question, one, other in _pairs(readouts):
        a, b = by_name.loc[one], by_name.loc[other]
        shared = common_readout(a["available"], b["available"])
        sides = [shared, shared]
        if question == "nuisance":
            shared, sides = ("own", "own"), [(a["scoring"], a["library"]), (b["scoring"], b["library"])]
        tables = [parts.get((*name, *side)) for name, side in zip((one, other), sides, strict=True) if side]
        if len(tables) == 2 and all(table is not None for table in tables):
            against = other[0] if question != "mask" else other[1]
            found = _difference(*tables, n_resamples)
            rows.append({"question": question, "encoder": one[0], "mask": one[1], "against": against})
            rows[-1] |= {"scoring": shared[0], "library": shared[1], **found}
    table = pd.DataFrame(rows, columns=columns)
    table["p_holm"], table["verdict"] = np.nan, ""
    for family in FAMILIES:
        judged = (
            table["question"].isin(family) & (table["n_repeats"] >= MIN_REPEATS) & table["p_value"].notna()
        )
        table.loc[judged, "p_holm"] = holm(table.loc[judged, "p_value"].to_numpy()) if judged.any() else []
    table["verdict"] = [
        ""
        if row.question == "nuisance"
        else no_verdict or verdict(row.n_repeats, row.p_holm, row.low, row.high)
        for row in table.itertuples()
    ]
    return table


def verdict(n_repeats: int, p_holm: float, low: float, high: float) -> str:
    """`better`, `worse`, `no clear difference`, or why it is not judged.

    It takes an adjusted p below 0.05, an interval (which the spread between repeats widens) without 0, and at least
    `MIN_REPEATS` repeats.
    """
    if n_repeats < MIN_REPEATS:
        return f"not judged: {n_repeats} repeat{'s' if n_repeats != 1 else ''}"
    if p_holm < 0.05 and (low > 0 or high < 0):
        return "better" if low > 0 else "worse"
    return NO_DIFFERENCE


def _pairs(readouts: pd.DataFrame) -> Iterator[tuple[str, tuple[str, str], tuple[str, str]]]:
    """Question and the two (encoder, mask) of every comparison."""
    baseline, nuisance = (first_of(readouts, LEAK_FREE, role) for role in ("simple", "nuisance"))
    under = readouts[readouts["mask"] == LEAK_FREE]
    tuned = under[under["role"] == "tuned"]
    for one in under.itertuples():
        name = (one.encoder, LEAK_FREE)
        if nuisance and one.encoder != nuisance:
            yield "nuisance", name, (nuisance, LEAK_FREE)
        if baseline and one.encoder != baseline and one.role in ("simple", "tuned"):
            yield "baseline", name, (baseline, LEAK_FREE)
        if one.role == "tuned" and one.mode != "frozen":
            other = _closest(one, tuned[(tuned["mode"] == "frozen") & (tuned["init"] == one.init)])
            if other:
                yield "adapting", name, (other, LEAK_FREE)
        if one.role == "tuned" and one.init != "random":
            same = (
                (tuned["mode"] == one.mode) & (tuned["init"] == "random") & (tuned["members"] == one.members)
            )
            if other := _closest(one, tuned[same]):
                yield "pretraining", name, (other, LEAK_FREE)
        if one.role not in ("ceiling", "precomputed"):
            for mask in sorted(readouts.loc[readouts["encoder"] == one.encoder, "mask"]):
                if mask != LEAK_FREE:
                    yield "mask", (one.encoder, mask), (one.encoder, LEAK_FREE)


def _closest(one, others: pd.DataFrame) -> str | None:
    """The one that was asked for most alike, by the number of parameters that differ."""
    differ = [
        (sum(one.request.get(key) != asked.get(key) for key in {*one.request, *asked}), name)
        for name, asked in zip(others["encoder"], others["request"], strict=True)
    ]
    return min(differ)[1] if differ else None


def _difference(one: pd.DataFrame, other: pd.DataFrame, n_resamples: int) -> dict:
    """Over the seeds that both have."""
    seeds = set(one["seed"]) & set(other["seed"])
    if not seeds:
        return {"n_repeats": 0}
    (a, queries), (b, others) = (
        repeats(part[part["seed"].isin(seeds)], list(SHOWN)) for part in (one, other)
    )
    if not queries.equals(others):
        raise ValueError(
            f"{one['encoder'].iloc[0]} and {other['encoder'].iloc[0]}: expected the same query cells, got others"
        )
    hit, mrr = (
        repeated_difference(
            x, y, queries["condition"], n_resamples=n_resamples, n_permutations=10 * n_resamples, seed=0
        )
        for x, y in zip(a, b, strict=True)
    )
    found = {"estimate": a[0].mean(), "other": b[0].mean(), "difference": hit.estimate}
    found |= {"low": hit.low, "high": hit.high, "spread": hit.spread, "p_value": hit.p_value}
    found |= {"mrr": mrr.estimate, "mrr_low": mrr.low, "mrr_high": mrr.high}
    return found | {"n_repeats": hit.n_repeats}
