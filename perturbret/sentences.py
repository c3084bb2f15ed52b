"""What follows from the tables, in Markdown sentences computed from them."""

import pandas as pd

from .adaptation import tuned_lines
from .audit import targets_findings
from .compare import LEAK_FREE
from .conditions import CTRL
from .contenders import CEILING, best_baseline, best_method
from .masking import UNSAFE
from .metrics import coverage_area
from .nulls import null_limits
from .report import Report, validity
from .runs import Run
from .wording import bullets, percent, span

MASK_MEANING = {
    "none": "nothing is masked: a measured target may give its condition away",
    "own_targets": "every cell's own targets are zeroed. **Unsafe:** the zeros tell which genes were perturbed",
    "all_targets": "the targets of all conditions are removed from every cell, so no gene tells the condition by name",
}


def setting(run: Run) -> str:
    """Mask, split and candidates of a run."""
    prepared, policy = run.prepared, run.params["mask"]
    removed = len({int(column) for columns in prepared.columns.values() for column in columns})
    train, val, query = (len(prepared.where(role)) for role in ("train", "val", "query"))
    lines = [
        f"**Mask `{policy}`**: {MASK_MEANING[policy]}. {removed} of {run.screen.n_genes:,} panel genes are targets "
        "of some condition or are masked with one.",
        *targets_findings(run.screen),
        f"**Split `{run.split.id}`** ({run.split.hash[:12]}): {train:,} training, {val:,} validation and {query:,} "
        f"query cells with a perturbation; {int((prepared.conditions == CTRL).sum()):,} controls.",
        f"**Candidates `train`**: the {len(prepared.candidates)} conditions seen in training.",
    ]
    return bullets(lines)


def fit_summary(run: Run, validation: pd.DataFrame, library: str, scoring: str) -> str:
    """What the fit chose and reached on validation cells."""
    row = _one(validation, library, scoring, "exact_hit@1", "micro")
    chosen = run.manifest["fit"]["chosen"]
    if "settings" in run.params:  # dozens, of which most are as the recipe says
        chosen = {name: chosen[name] for name in ("mode", "init", *run.params["search"], "stop_epochs")}
    settings = ", ".join(f"{name} = {value}" for name, value in chosen.items()) or "nothing to choose"
    lines = [
        f"Settings chosen on validation: {settings}.",
        f"Best read-out there: {_named(library, scoring)}, exact_hit@1 **{percent(row.estimate)}** "
        f"{span(row.ci_low, row.ci_high)}; chance {percent(row.chance)}.",
        f"The encoder and its null twin are saved in `{run.directory.name}/`. Notebook 05 judges them on query cells, "
        f"given the same dataset, mask, seed and search, `encoder` {run.params['encoder']} and `run` "
        f"{run.directory.name}.",
    ]
    return bullets(lines)


def evaluation_summary(
    run: Run, summary: pd.DataFrame, null: pd.DataFrame, library: str, scoring: str
) -> str:
    """What one evaluation shows: single cells, pooled cells, null control."""
    single = summary[summary["query_size"] == 1]
    row = _one(single, library, scoring, "exact_hit@1", "micro")
    macro = _one(single, library, scoring, "exact_hit@1", "macro")
    lines = [
        f"Single cells, {_named(library, scoring)}: the true condition is first for **{percent(row.estimate)}** "
        f"{span(row.ci_low, row.ci_high)} (macro {percent(macro.estimate)}); chance {percent(row.chance)}."
    ]
    pooled = summary.query("metric == 'exact_hit@1' and average == 'micro' and query_size > 1")
    pooled = pooled[(pooled["library"] == library) & (pooled["scoring"] == scoring)]
    pooled = pooled[pooled["pooling"] == "scores"]
    if len(pooled):
        top = pooled.sort_values("query_size").iloc[-1]
        lines.append(
            f"Pools of {top.query_size} cells, {top.pooling} pooled: {percent(top.estimate)} "
            f"{span(top.ci_low, top.ci_high)} over {top.n_conditions} conditions."
        )
    control = null[(null["library"] == library) & (null["scoring"] == scoring)].iloc[0]
    state = "above luck" if control.p_value < 0.01 else "in line with luck"
    lines.append(
        f"Null control: shuffled labels reach {percent(control.estimate)} {span(control.ci_low, control.ci_high)}, "
        f"luck {percent(control.luck)} (p = {control.p_value:.3g}): {state}."
    )
    lines.append(null_limits(control))
    if run.params["mask"] in UNSAFE:
        lines.append(
            f"**`{run.params['mask']}` is unsafe**: this page shows the leak; its hit rates are no evidence."
        )
    return bullets(lines)


def confidence(margin: pd.Series, hit: pd.Series) -> str:
    """Area under the coverage-accuracy curve against what an uninformative margin gives."""
    area, accuracy = coverage_area(margin.to_numpy(), hit.to_numpy()), hit.mean()
    gain = "tells right from wrong" if area > 1.1 * accuracy else "tells little"
    return (
        f"Area under the curve: {area:.3f}; a margin that says nothing has {accuracy:.3f}, the accuracy over all "
        f"queries. The margin {gain}."
    )


def best_encoder(report: Report) -> str:
    """The encoder that validation puts first under the leak-free mask."""
    return best_method(report.readouts, LEAK_FREE)


def conclusion(report: Report, conditions: pd.DataFrame) -> str:
    """What follows from the whole report, for somebody who must act on it."""
    best = best_encoder(report)
    row = _row(report, best)
    clear = conditions[conditions["ci_low"] > conditions["base_rate"]]
    easiest = conditions.loc[(conditions["estimate"] - conditions["base_rate"]).idxmax(), "condition"]
    lines = [
        f"{len(clear)} of {len(conditions)} conditions are ranked first by {best} for their own cells more often than "
        f"for cells of other conditions, each taken by itself (95% intervals); the easiest is {easiest}.",
        *_pooling_lines(report, best),
    ]
    five = report.single(metric="exact_hit@5").set_index("encoder").loc[best]
    lines.append(
        f"A list of five conditions holds the right one for {percent(five.estimate)} of single cells; chance is "
        f"{percent(report.chance['exact_hit@5'])}."
    )
    others = report.single()
    others = others[(others["encoder"] != CEILING) & (others["encoder"] != row.baseline)]
    proven = (others["p_holm"] < 0.05) & ((others["diff_high"] < 0) | (others["diff_low"] > 0))
    for text, chosen in (
        (
            f"Clearly behind the baseline {row.baseline} (Holm-adjusted p < 0.05)",
            proven & (others["difference"] < 0),
        ),
        (
            f"Clearly ahead of {row.baseline} on query cells",
            proven & (others["difference"] > 0),
        ),
        (f"Not told apart from {row.baseline} by these cells", ~proven),
    ):
        if chosen.any():
            lines.append(f"{text}: {', '.join(others.loc[chosen, 'encoder'])}.")
    n = int(row.n_conditions)
    if len(others) * 2 / 2**n >= 0.05:
        lines.append(f"{n} conditions are too few for the paired test to prove any difference.")
    return bullets(lines)


def _pooling_lines(report: Report, best: str) -> list[str]:
    """Single cells against the largest pools, on the conditions that have such pools; scores are pooled."""
    scores = report.scores
    own = scores[scores["primary"] & (scores["encoder"] == best) & (scores["mask"] == LEAK_FREE)]
    pooled = own[own["pooling"] == "scores"]
    if pooled.empty:
        return []
    size = int(pooled["query_size"].max())
    pooled = pooled[pooled["query_size"] == size]
    single = own[(own["query_size"] == 1) & own["condition"].isin(pooled["condition"])]
    before, after = (part.groupby("condition")["exact_hit@1"].mean().mean() for part in (single, pooled))
    return [
        f"Pooling the scores of {size} cells of one condition takes {best} from {percent(before)} to {percent(after)} "
        f"(macro, the {pooled['condition'].nunique()} conditions with so many query cells)."
    ]


def headline(report: Report) -> str:
    """The answer, in Markdown: best method, its lead, what masking changes, whether the null control holds."""
    lines = [_best_line(report), *_lead_lines(report), *_ceiling_lines(report), *_mask_lines(report)]
    lines += [*tuned_lines(report), *_null_lines(report), *_missing_lines(report)]
    return bullets(lines)


def _best_line(report: Report) -> str:
    row = _row(report, best_encoder(report))
    macro = report.single(average="macro").set_index("encoder").loc[row.encoder]
    verdicts = validity(report).set_index(["encoder", "mask"])["verdict"]
    invalid = (
        " **INVALID: its null control does not hold.**" if verdicts[row.encoder, LEAK_FREE] != "holds" else ""
    )
    return (
        f"**Best method under the leak-free mask: {row.encoder}** (read-out: {_readout(row)}; chosen on validation "
        f"cells). It ranks the right condition first for **{percent(row.estimate)}** of single cells "
        f"{span(row.ci_low, row.ci_high)}, macro over conditions {percent(macro.estimate)}. "
        f"Chance is {percent(report.chance['exact_hit@1'])}, always naming the most common condition "
        f"{percent(report.prior)}. {row.n_seeds} {'seed' if row.n_seeds == 1 else 'seeds'}, "
        f"{row.n_queries:,} queries, {row.n_conditions} conditions.{invalid}"
    )


def _lead_lines(report: Report) -> list[str]:
    """The best method against the best simple opponent, or, where that is it, against the next."""
    best = best_encoder(report)
    row, sign = _row(report, best), 1
    try:
        if row.baseline == best:
            row, sign = _row(report, best_baseline(report.readouts, LEAK_FREE, without=best)), -1
    except ValueError:
        return []
    other = _row(report, row.baseline) if sign == 1 else row
    low, high = sorted((sign * row.diff_low, sign * row.diff_high))
    proven = row.p_holm < 0.05 and (low > 0 or high < 0)
    verdict = (
        ("a lead" if low > 0 else "the other is ahead on query cells") if proven else "not a proven lead"
    )
    which = "best simple baseline" if sign == 1 else "best other baseline"
    return [
        f"**Against the {which}** ({other.encoder}, {_readout(other)}, {percent(other.estimate)}): difference "
        f"**{percent(sign * row.difference, True)}** {span(low, high, True)} on the same queries, Holm-adjusted p = "
        f"{row.p_holm:.3g}: {verdict}."
    ]


def _ceiling_lines(report: Report) -> list[str]:
    ceiling = report.single()
    ceiling = ceiling[ceiling["encoder"] == CEILING]
    if ceiling.empty:
        return []
    top = ceiling.iloc[0]
    return [
        f"**Bayes ceiling** (exact ranking of the true simulated model): {percent(top.estimate)}; the best method "
        f"reaches {percent(_row(report, best_encoder(report)).estimate / top.estimate)} of it."
    ]


def _mask_lines(report: Report) -> list[str]:
    rows = report.deltas[report.deltas["encoder"] == best_encoder(report)]
    found = validity(report)
    leaks = (
        found["mask"].isin(UNSAFE) & (found["encoder"] == best_encoder(report)) & (found["not holding"] > 0)
    )
    lines, leaks = [], bool(leaks.any())
    for row in rows.itertuples():
        changes = row.ci_low > 0 or row.ci_high < 0
        note = "; part of that is the leak below" if row.mask in UNSAFE and changes and leaks else ""
        lines.append(
            f"**Mask `{row.mask}` instead of `{LEAK_FREE}`** changes {row.encoder} by {percent(row.delta, True)} "
            f"{span(row.ci_low, row.ci_high, True)}: {'a change' if changes else 'no proven change'}{note}."
        )
    return lines


def _null_lines(report: Report) -> list[str]:
    found = validity(report)
    safe, unsafe = found[~found["mask"].isin(UNSAFE)], found[found["mask"].isin(UNSAFE)]
    bad = safe[safe["verdict"] == "INVALID"]
    lines = [
        f"**Null control** (labels permuted, same pipeline), masks {', '.join(sorted(set(safe['mask'])))}: holds in "
        f"{int(safe['runs'].sum() - safe['not holding'].sum())} of {int(safe['runs'].sum())} runs"
        + (f"; INVALID: {', '.join(bad['encoder'] + ' under ' + bad['mask'])}." if len(bad) else ".")
    ]
    if len(unsafe):
        worst = unsafe.loc[(unsafe["estimate"] - unsafe["luck"]).idxmax()]
        lines.append(
            f"**`own_targets` leaks the label** in {int(unsafe['not holding'].sum())} of {int(unsafe['runs'].sum())} "
            f"runs: with labels that mean nothing, {worst['encoder']} still reaches {percent(worst['estimate'])} "
            f"{span(worst['ci_low'], worst['ci_high'])} where luck gives {percent(worst['luck'])} (class prior "
            f"{percent(worst['class_prior'])}). Numbers under `own_targets` are not evidence."
            if unsafe["not holding"].any()
            else "`own_targets` shows no measurable leak here; it stays unsafe."
        )
    return lines


def _missing_lines(report: Report) -> list[str]:
    return [f"**Missing**: {', '.join(report.missing)} did not finish."] if report.missing else []


def _row(report: Report, encoder: str):
    return report.single().query("encoder == @encoder").iloc[0]


def _readout(row) -> str:
    return _named(row.library, row.scoring)


def _named(library: str, scoring: str) -> str:
    return scoring if library == "none" else f"{scoring}, {library} library"


def _one(table: pd.DataFrame, library: str, scoring: str, metric: str, average: str):
    wanted = {"library": library, "scoring": scoring, "metric": metric, "average": average}
    for column, value in wanted.items():
        table = table[table[column] == value]
    return table.iloc[0]
