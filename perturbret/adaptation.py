"""What adapting scGPT brings, and what its pretraining is worth: paired differences between its own modes."""

import numpy as np
import pandas as pd

from .compare import LEAK_FREE
from .contenders import best_baseline, best_tuned
from .report import Report
from .stats import paired_difference
from .wording import percent, span

METRICS = ("exact_hit@1", "mrr")
COLUMNS = [
    "method",
    "against",
    "question",
    *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")),
]


def adaptation(report: Report, *, n_resamples: int = 1000) -> pd.DataFrame:
    """Paired differences on single query cells under the leak-free mask, of each mode's primary read-out.

    Parameters
    ----------
    report : Report
    n_resamples : int
        Bootstrap resamples of conditions.

    Returns
    -------
    pandas.DataFrame
        One row per comparison: `method`, `against`, `question` (`adapting`: against the frozen network from the same
        weights; `pretraining`: against the same mode from random weights; `baseline`: against the best simple
        opponent), and for exact_hit@1 and mrr the difference with `_low` and `_high`. Empty without such runs.
    """
    modes = report.readouts[report.readouts["primary"] & (report.readouts["mask"] == LEAK_FREE)]
    modes = modes[modes["tuned"]]
    baseline = best_baseline(report.readouts, LEAK_FREE)
    rows = []
    for one in modes.itertuples():
        frozen = modes[(modes["mode"] == "frozen") & (modes["init"] == one.init)]
        random = modes[
            (modes["mode"] == one.mode) & (modes["init"] == "random") & (modes["members"] == one.members)
        ]
        asked = []
        if one.mode != "frozen":
            asked += [("adapting", name) for name in frozen["encoder"]]
        if one.init != "random":
            asked += [("pretraining", name) for name in random["encoder"]]
        if baseline != one.encoder:
            asked.append(("baseline", baseline))
        for question, other in asked:
            rows.append({"method": one.encoder, "against": other, "question": question})
            for metric in METRICS:
                found = _difference(report, one.encoder, other, metric, n_resamples)
                for end, value in zip(("", "_low", "_high"), found, strict=True):
                    rows[-1][f"{metric}{end}"] = value
    table = pd.DataFrame(rows, columns=COLUMNS)
    order = {"baseline": 0, "adapting": 1, "pretraining": 2}
    return table.sort_values(
        ["question", "exact_hit@1"],
        key=lambda c: c.map(order) if c.name == "question" else -c,
        ignore_index=True,
    )


def _difference(report: Report, one: str, other: str, metric: str, n_resamples: int) -> tuple:
    """Estimate and interval over the queries of the seeds that both have."""
    scores = report.scores
    scores = scores[scores["primary"] & (scores["mask"] == LEAK_FREE) & (scores["query_size"] == 1)]
    a, b = (
        scores[scores["encoder"] == name].set_index(["seed", "query_id"])[[metric, "condition"]]
        for name in (one, other)
    )
    both = a.join(b[[metric]], rsuffix="_other", how="inner")
    found = paired_difference(
        both[metric].to_numpy(),
        both[f"{metric}_other"].to_numpy(),
        both["condition"],
        n_resamples=n_resamples,
        seed=0,
    )
    return tuple(float(np.ravel(value)[0]) for value in (found.estimate, found.low, found.high))


def tuned_lines(report: Report) -> list[str]:
    """scGPT's best mode against the best simple opponent, against frozen, and against random weights."""
    best = best_tuned(report.readouts, LEAK_FREE)
    if best is None:
        return []
    table = adaptation(report)
    named = {"baseline": "the best simple baseline", "adapting": "frozen", "pretraining": "random weights"}
    parts = []
    for record in table[table["method"] == best].to_dict("records"):
        low, high = record["exact_hit@1_low"], record["exact_hit@1_high"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        parts.append(
            f"against {named[record['question']]} ({record['against']}) {percent(record['exact_hit@1'], True)} "
            f"{span(low, high, True)}, {verdict}"
        )
    row = report.single().set_index("encoder").loc[best]
    return [
        f"**scGPT's best mode** (chosen on validation cells) is {best}, {row.scoring}, {percent(row.estimate)}: "
        f"{'; '.join(parts)}."
    ]
