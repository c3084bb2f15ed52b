"""What follows from the tables, in Markdown sentences computed from them."""

import numpy as np
import pandas as pd

from ..data.conditions import CTRL
from ..data.masking import UNSAFE
from ..data.prepared import Prepared
from ..data.tracks import find_track
from ..evaluation.composition import composable
from ..evaluation.confidence import COVERAGE, NONCONFORMITY
from ..evaluation.nulls import null_limits
from ..evaluation.readouts import readout_name
from ..evaluation.scoring import candidate_names, candidate_sets
from ..evaluation.stats import measured_coverage
from ..runs.runs import Run
from .ablation import Report, validity
from .audit import targets_findings
from .compare import CEILING, LEAK_FREE, MIN_REPEATS
from .wording import bullets, percent, plain, span

MASK_MEANING = {
    "none": "nothing is masked: a measured target may give its condition away",
    "own_targets": "every cell's own targets are zeroed. **Unsafe:** the zeros tell which genes were perturbed",
    "all_targets": "the columns matched to targets of all conditions are removed from every cell",
}


def setting(run: Run) -> str:
    """Mask, split and candidates of a run."""
    prepared, policy = run.prepared, run.params["mask"]
    removed = len({int(column) for columns in prepared.columns.values() for column in columns})
    train, val, query = (len(prepared.where(role)) for role in ("train", "val", "query"))
    return bullets(
        [
            f"**Mask `{policy}`**: {MASK_MEANING[policy]}. {removed} of {run.screen.n_genes:,} panel genes are targets "
            "of some condition or are masked with one.",
            *targets_findings(run.screen),
            f"**Split `{run.split.id}`** ({run.split.hash[:12]}): {train:,} training, {val:,} validation and {query:,} "
            f"query cells with a perturbation; {int((prepared.conditions == CTRL).sum()):,} controls. Queries are of "
            f"{find_track(run.split.track).holds_out}.",
            f"**Candidates `{prepared.candidate_sets[0]}`**: {_candidates(prepared)}.",
        ]
    )


def _candidates(prepared: Prepared) -> str:
    """What queries are ranked among, in words."""
    trained = f"the {len(prepared.candidates)} conditions seen in training"
    names = candidate_names(prepared, prepared.candidate_sets[0], "query")
    more = len(set(names) - set(prepared.candidates))
    if not more:
        return trained
    line = (
        f"{trained} and {more} that no fit sees, by prototypes of other cells of theirs (role `gallery`). A "
        "classifier has no class for these: its embeddings are compared, as any others"
    )
    if "predicted" in candidate_sets(prepared):
        composed = len(composable(prepared, "query"))
        line += f". As `predicted`, {composed} held-out combinations stand as their genes alone predict them"
    return line


def fit_summary(run: Run, validation: pd.DataFrame, library: str, scoring: str) -> str:
    """What the fit chose and reached on validation cells."""
    row = _one(validation, library, scoring)
    chosen = run.manifest["fit"]["chosen"]
    if "settings" in run.params:  # dozens, of which most are as the recipe says
        chosen = {name: chosen[name] for name in ("mode", "init", *run.params["search"], "stop_epochs")}
    settings = ", ".join(f"{name} = {value}" for name, value in chosen.items()) or "nothing to choose"
    return bullets(
        [
            f"Settings chosen on validation: {settings}.",
            f"Best read-out there: {readout_name(scoring, library)}, exact_hit@1 **{percent(row.estimate)}** "
            f"{span(row.ci_low, row.ci_high)}; chance {percent(row.chance)}.",
            f"Notebook 05 judges the encoder and its null twin on query cells, given the same dataset and "
            f"`run` {run.directory.name}.",
        ]
    )


def evaluation_summary(
    run: Run, summary: pd.DataFrame, null: pd.DataFrame, library: str, scoring: str
) -> str:
    """What one evaluation shows: single cells, pooled cells, null control."""
    single = summary[summary["query_size"] == 1]
    row, macro = (_one(single, library, scoring, average) for average in ("micro", "macro"))
    lines = [
        f"Single cells, {readout_name(scoring, library)}: the true condition is first for **{percent(row.estimate)}** "
        f"{span(row.ci_low, row.ci_high)} (macro {percent(macro.estimate)}); chance {percent(row.chance)}."
    ]
    pooled = summary[(summary["query_size"] > 1) & (summary["pooling"] == "scores")]
    if len(pooled):
        top = _one(pooled.sort_values("query_size", ascending=False), library, scoring)
        lines.append(
            f"Pools of {top.query_size} cells, scores pooled: {percent(top.estimate)} "
            f"{span(top.ci_low, top.ci_high)} over {top.n_conditions} conditions."
        )
    control = null[(null["library"] == library) & (null["scoring"] == scoring)].iloc[0]
    state = "above luck" if control.p_value < 0.01 else "in line with luck"
    lines.append(
        f"Null control: shuffled labels reach {percent(control.estimate)} {span(control.ci_low, control.ci_high)}, "
        f"luck {percent(control.luck)} (p = {control.p_value:.3g}): {state}. {null_limits(control)}"
    )
    if run.params["mask"] in UNSAFE:
        lines.append(
            f"**`{run.params['mask']}` is unsafe**: this page shows the leak; its hit rates are no evidence."
        )
    return bullets(lines)


def confidence(run: Run, table: pd.DataFrame) -> str:
    """What the probabilities of a run are worth: calibration, abstention, candidate sets, held-out conditions.

    table : of `perturbret.evaluation.confidence.Confidence`.
    """
    if not len(table):
        return "No validation cell could be ranked right, so nothing is calibrated."
    rows = {row.quantity: row for row in table.itertuples()}

    def shown(name: str, written=lambda value: f"{value:.3f}") -> str:
        row = rows[name]
        return f"{written(row.estimate)} [{written(row.ci_low)}, {written(row.ci_high)}]"

    accuracy = rows["accuracy"].estimate
    lines = [
        f"**Probabilities**: temperature {rows['temperature'].estimate:.3g}, chosen on {rows['temperature'].n:,} "
        f"validation cells. On {rows['accuracy'].n:,} query cells the condition ranked first has a probability of "
        f"{percent(accuracy + rows['overconfidence'].estimate)} on average and is right for {percent(accuracy)}. ECE "
        f"{shown('ece')}, before calibration {rows['ece_uncalibrated'].estimate:.3f}; a perfectly calibrated method "
        f"shows {rows['ece_if_calibrated'].estimate:.3f} by luck.",
        f"**Coverage and accuracy**: area under the curve {shown('coverage_area')} by probability, "
        f"{shown('coverage_area_margin')} by margin; what says nothing has {accuracy:.3f}.",
    ]
    for name in (name for name in rows if name.startswith("threshold@")):
        asked = name.removeprefix("threshold@")
        line = f"**Answering only where {percent(float(asked))} would be right**: "
        if np.isnan(rows[name].estimate):
            line += "no threshold reaches that on validation cells."
        elif f"accuracy@{asked}" not in rows:
            line += f"from probability {rows[name].estimate:.2f} on; no query cell has that."
        else:
            line += (
                f"from probability {rows[name].estimate:.2f} on, {shown(f'answered@{asked}', percent)} of query cells "
                f"are answered, and {shown(f'accuracy@{asked}', percent)} of these are right."
            )
        lines.append(line)
    n_candidates = len(candidate_names(run.prepared, run.prepared.candidate_sets[0], "query"))
    sets = "; ".join(
        f"{kind.upper()} {shown(f'conformal_{kind}_coverage', percent)}, with "
        f"{rows[f'conformal_{kind}_size'].estimate:.1f} of {n_candidates} conditions on average"
        for kind in NONCONFORMITY
    )
    line = f"**Conformal sets** made to hold the true condition for {percent(COVERAGE)} of cells hold it for: {sets}."
    if run.split.track != "in_dist":
        line += (
            f" **Nothing promises that share here**: queries are of {find_track(run.split.track).holds_out}, so that "
            "they and validation cells are not exchangeable."
        )
    lines.append(line)
    if "unknown_auroc_probability" in rows:
        found = ", ".join(
            f"{shown(f'unknown_auroc_{name}')} by {words}"
            for name, words in (("probability", "probability"), ("margin", "margin"), ("score", "best score"))
        )
        lines.append(
            f"**Is the true condition in the library at all?** Ranked among the conditions of training alone "
            "(candidates `train`), no query here can be answered right. AUROC of telling that from a ranking with the "
            f"cell's own condition in it: {found}; 0.5 says nothing."
        )
    return bullets(lines)


def headline(report: Report, *, material: float = 0.02) -> str:
    """The answer, in Markdown: warnings, which method to use, who is first and against whom, what the checks say.

    material : a difference in exact_hit@1 that would be worth a network's cost; see `decision`.
    """
    lines = [line if line.startswith("**") else f"**{line}**" for line in report.warnings]
    lines += [*decision(report, material), *_best_lines(report)]
    single = report.single().set_index("encoder")["estimate"]
    for estimate in single[single.index == CEILING]:
        lines.append(f"**Bayes ceiling** (exact ranking of the true simulated model): {percent(estimate)}.")
    lines += [*_null_lines(report), *_interval_lines(report)]
    if report.missing:
        lines.append(f"**Missing**: {', '.join(report.missing)} did not finish.")
    return bullets(lines)


def decision(report: Report, material: float) -> list[str]:
    """Which method to use, and whether that holds on every track, in Markdown; empty where nothing may be concluded.

    A network is named where it is better than the best simple opponent (the verdict) and its interval lies above
    `material`; else the opponent is, with what the intervals leave open.
    """
    if report.suspect or report.confounded:
        return []
    parts = [part for part in [report, *report.others] if part.train_share == report.train_share]
    named = {f"{part.track}, {part.candidates}": _choice(part, material) for part in parts}
    named = {where: choice for where, choice in named.items() if choice}
    if report.baseline is None or not named:
        return []
    here, *others = named.items()
    lines = [f"**Which method to use (`{here[0]}`): {here[1][0]}**; {here[1][1]}."]
    if others:
        told = "; ".join(f"`{where}`: {method}, {why}" for where, (method, why) in others)
        lines.append(f"**Where more is held out:** {told}.")
    return lines


def _choice(report: Report, material: float) -> tuple[str, str] | None:
    """The method to use on one track, and why; None where there is nothing to choose from."""
    if report.baseline is None:
        return None
    modes = report.readouts.query("role == 'tuned' and mask == @LEAK_FREE")["encoder"]
    against = report.asked("baseline")
    own = against[against.index.isin(modes)]
    if own.empty:
        return plain(
            report.baseline
        ), "the best simple opponent on validation cells; no network was compared with it"
    first = own[(own["verdict"] == "better") & (own["low"] >= material)].sort_values("difference").tail(1)
    for row in first.itertuples():
        gain = f"{percent(row.difference, True)} {span(row.low, row.high, True)}"
        return plain(
            row.Index
        ), f"{gain} over {plain(report.baseline)}, at least {percent(material)} for sure"
    if own["high"].isna().all():
        return plain(report.baseline), "no mode of scGPT could be compared with it"
    most = own.loc[own["high"].idxmax()]
    left = (
        f"gains of {percent(material)} or more are excluded"
        if most["high"] < material
        else f"up to {percent(most['high'], True)} is left open for {plain(most.name)}"
    )
    return (
        plain(report.baseline),
        f"no mode of scGPT is better by at least {percent(material)} for sure, and {left}",
    )


def _best_lines(report: Report) -> list[str]:
    """The method that validation puts first, and what it is to be read against."""
    luck = (
        f"chance is {percent(report.chance['exact_hit@1'])}, always naming the most common condition "
        f"{percent(report.prior)}"
    )
    if report.best is None:
        return [
            f"**No method that reads expression was run** with mask `{LEAK_FREE}`: nothing is compared; {luck}."
        ]
    row = _row(report, report.best)
    at = f"{row.n_queries:,} query cells, {row.n_conditions} conditions, {_times(row.n_repeats, 'seed')}"
    reasons = [("suspect", "labels may be given away"), ("confounded", "batches and conditions go together")]
    if reason := "; ".join(f"{name} ({why})" for name, why in reasons if getattr(report, name)):
        line = f"**No method is named best: {reason}.** Mask `{LEAK_FREE}`, {at}; {luck}."
        return [line, _nuisance_line(report, excess=False)]
    macro = report.single(average="macro").set_index("encoder").loc[row.encoder]
    choice = report.readouts.query("encoder == @row.encoder and mask == @LEAK_FREE").iloc[0]
    best_of = f", best of {choice.n_readouts} read-outs" if choice.n_readouts > 1 else ""
    return [
        f"**First on validation cells, mask `{LEAK_FREE}`: {plain(row.encoder)}** "
        f"({readout_name(row.scoring, row.library)}{best_of}). On query cells it ranks the right condition first for "
        f"**{percent(row.estimate)}** of single cells {span(row.ci_low, row.ci_high)}, macro over conditions "
        f"{percent(macro.estimate)}; {luck}. {at}.",
        _baseline_line(report),
        _nuisance_line(report, excess=True),
        *_tuned_lines(report),
    ]


def _baseline_line(report: Report) -> str:
    """Every method's verdict against the baseline, in lists."""
    if report.baseline is None:
        return "No simple opponent was run: there is no baseline, and scGPT's modes have nothing to be judged by."
    lists = [
        f"{verdict}: {', '.join(map(plain, part.index))}"
        for verdict, part in report.asked("baseline").groupby("verdict", sort=True)
    ]
    return (
        f"**Against {plain(report.baseline)}**, the best simple opponent on validation cells, on the same query "
        f"cells and at one read-out for both: {'; '.join(lists) or 'no other method was run'}."
    )


def _nuisance_line(report: Report, *, excess: bool) -> str:
    """What reads no expression and still hits; with `excess`, how much more the best method does."""
    if report.nuisance is None:
        return "No nuisance opponent (batch, library size, prior) was run: what they reach is not known."
    line = f"**{plain(report.nuisance)}, which reads no expression**, reaches "
    line += percent(_row(report, report.nuisance).estimate)
    asked = report.asked("nuisance")
    if excess and report.best in asked.index:
        found = asked.loc[report.best]
        line += f"; {plain(report.best)} {percent(found.difference, True)} {span(found.low, found.high, True)} more"
    return f"{line}."


def _tuned_lines(report: Report) -> list[str]:
    """scGPT's best mode against the baseline, against frozen, and against random weights."""
    if report.tuned is None:
        return []
    row, parts = _row(report, report.tuned), []
    named = {"baseline": "{}", "adapting": "frozen ({})", "pretraining": "random weights ({})"}
    for question, name in named.items():
        asked = report.asked(question)
        for one in asked[asked.index == report.tuned].itertuples():
            parts.append(
                f"against {name.format(plain(one.against))} {percent(one.difference, True)} "
                f"{span(one.low, one.high, True)} at {readout_name(one.scoring, one.library)}, {one.verdict}"
            )
    return [
        f"**scGPT's best mode** on validation cells is {plain(report.tuned)}, "
        f"{readout_name(row.scoring, row.library)}, {percent(row.estimate)}{': ' if parts else ''}{'; '.join(parts)}."
    ]


def _null_lines(report: Report) -> list[str]:
    """What the null control found and could find; of the unsafe mask, how much it leaks."""
    found = validity(report)
    safe, unsafe = found[~found["mask"].isin(UNSAFE)], found[found["mask"].isin(UNSAFE)]
    bad, runs = safe[safe["verdict"] == "INVALID"], int(safe["runs"].sum())
    own = report.verdicts[~report.verdicts["mask"].isin(UNSAFE)]
    weakest = own.loc[own["detectable"].fillna(np.inf).idxmax()]
    line = (
        f"**Null control** (labels permuted, same pipeline; masks {', '.join(sorted(set(safe['mask'])))}): holds in "
        f"{runs - int(safe['not holding'].sum())} of {_times(runs, 'run')}. {null_limits(weakest, runs)}"
    )
    if len(bad):
        names = ", ".join(f"{plain(row.encoder)} under {row.mask}" for row in bad.itertuples())
        line += f" **INVALID: {names}.**"
    lines = [line]
    if not len(bad) and not report.warnings:
        ran = ", ".join([*report.checks, "null control"])
        lines.append(f"**No leak was found by the checks that were run**: {ran}.")
    if unsafe["not holding"].any():
        worst = unsafe.loc[(unsafe["estimate"] - unsafe["luck"]).idxmax()]
        broken, among = int(unsafe["not holding"].sum()), _times(int(unsafe["runs"].sum()), "run")
        lines.append(
            f"**`{worst['mask']}` leaks the label** in {broken} of {among}, so its numbers are no evidence: with "
            f"labels that mean nothing, {plain(worst['encoder'])} still reaches {percent(worst['estimate'])} "
            f"{span(worst['ci_low'], worst['ci_high'])} where luck gives {percent(worst['luck'])}."
        )
    return lines


def _interval_lines(report: Report) -> list[str]:
    """How often intervals of this kind hold the truth with so many conditions, and what a verdict takes."""
    n_conditions = report.single()["n_conditions"].iloc[0]
    if n_conditions < 2:
        return ["There are no intervals: a single condition was asked for."]
    alone, paired = (measured_coverage(n_conditions, "micro", paired=kind) for kind in (False, True))
    return [
        f"**Intervals** (95%) are over {n_conditions} conditions and the seeds. On simulated screens of "
        f"{alone.n_conditions} conditions such intervals held the truth in {percent(alone.measured)} of cases, "
        f"those of differences in {percent(paired.measured)} (at worst {percent(alone.lowest)} and "
        f"{percent(paired.lowest)}). A verdict takes a Holm-adjusted paired p below 0.05, an interval without 0, and "
        f"{MIN_REPEATS} seeds."
    ]


def track_line(report: Report) -> str:
    """What one further track holds out, and how its methods compare, in Markdown."""
    held_out = find_track(report.track).holds_out
    return bullets([f"Queries are of {held_out}.", *_best_lines(report)])


def conclusion(report: Report, encoder: str, conditions: pd.DataFrame) -> str:
    """What follows for somebody who must act on it: how far hit rates differ, what pooling and a short list bring."""
    worst, median, top = (conditions["estimate"].quantile(q) for q in (0, 0.5, 1))
    named = plain(conditions.loc[conditions["estimate"].idxmax(), "condition"])
    five = report.single(metric="exact_hit@5").set_index("encoder").loc[encoder]
    lines = [
        f"Hit rates of {plain(encoder)} per condition run from {percent(worst)} to {percent(top)} ({named}), half of "
        f"them above {percent(median)}.",
        f"A list of five conditions holds the right one for {percent(five.estimate)} {span(five.ci_low, five.ci_high)} "
        f"of single cells; chance is {percent(report.chance['exact_hit@5'])}.",
    ]
    pooled = report.rows(average="macro", pooling="scores", encoder=encoder, primary=True)
    for row in pooled.sort_values("query_size").tail(1).itertuples():
        lines.append(
            f"Pools of {row.query_size} cells of one condition, scores pooled: {percent(row.estimate)} "
            f"{span(row.ci_low, row.ci_high)} (macro, {row.n_queries} queries of the {row.n_conditions} conditions "
            f"with so many query cells)."
        )
    return bullets(lines)


def _row(report: Report, encoder: str):
    return report.single().query("encoder == @encoder").iloc[0]


def _times(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _one(table: pd.DataFrame, library: str, scoring: str, average: str = "micro"):
    """The first row of exact_hit@1 at a read-out."""
    wanted = {"library": library, "scoring": scoring, "metric": "exact_hit@1", "average": average}
    return table[np.logical_and.reduce([table[column] == value for column, value in wanted.items()])].iloc[0]
