"""What each track holds out, whatever the screen: by names and labels, for every seed, and in all that is fitted."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbret.data.conditions import CTRL, targets
from perturbret.data.prepared import prepare
from perturbret.data.splits import make_split
from perturbret.data.tracks import TRACKS, Track, TrackError, genes_seen, track, uniform
from perturbret.encoders.baselines import fit_baseline
from perturbret.evaluation.judge import evaluate, null_control, summarise
from perturbret.evaluation.scoring import candidate_names, library_cells

GENES = [f"G{i:02d}" for i in range(12)]
DOUBLES = ["G00+G01", "G00+G02", "G03+G04", "G05+G06", "G07+G08", "G02+G09", "G10+G11", "G01+G05"]


@st.composite
def screens(draw, *, n_batches=(2, 6), n_guides=(2, 5)):
    """obs of singles, doubles and controls, with batches and guides."""
    singles = draw(st.lists(st.sampled_from(GENES), min_size=4, unique=True))
    doubles = draw(st.lists(st.sampled_from(DOUBLES), min_size=3, unique=True))
    batches, guides, cells = (draw(st.integers(*limits)) for limits in (n_batches, n_guides, (6, 20)))
    conditions = np.repeat([CTRL, *sorted(singles), *sorted(doubles)], cells)
    number = np.arange(len(conditions))
    obs = pd.DataFrame({"condition": conditions}, index=[f"cell{i}" for i in number])
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    obs["batch"] = [f"b{i}" for i in rng.integers(0, batches, len(obs))]
    obs["guide"] = [f"{c}-{i % guides}" for c, i in zip(conditions, number, strict=True)]
    return obs


def conditions_of(obs, split, role):
    return set(obs["condition"][split.roles == role]) - {CTRL}


@pytest.mark.parametrize("name", [*TRACKS])
@settings(max_examples=25)
@given(obs=screens(), seed=st.integers(0, 20), random=st.randoms(use_true_random=False))
def test_roles_follow_names_and_query_cells_the_track_alone(name, obs, seed, random):
    split, other = make_split(obs, track=name, seed=seed), make_split(obs, track=name, seed=seed + 1)
    order = random.sample(range(len(obs)), len(obs))
    assert make_split(obs.iloc[order], track=name, seed=seed).hash == split.hash
    assert ((split.roles == "query") == (other.roles == "query")).all()
    assert (split.roles == "query").any() and (split.roles == "train").any() and (split.roles == "val").any()


@settings(max_examples=25)
@given(obs=screens(), seed=st.integers(0, 20))
def test_batches_are_held_out_whole(obs, seed):
    roles = make_split(obs, track="batch_disjoint", seed=seed).roles
    batches = {role: set(obs["batch"][roles == role]) for role in ("train", "val", "query")}
    assert not batches["query"] & (batches["train"] | batches["val"])
    for condition in set(obs["condition"]):
        own = obs["condition"] == condition
        trained, val = (set(obs["batch"][own & (roles == role)]) for role in ("train", "val"))
        assert not trained & val or obs["batch"].nunique() == 2
    assert set(obs["condition"][roles == "query"]) <= set(obs["condition"][roles == "train"])


def test_seeds_hold_out_batches_in_turn():
    obs = pd.DataFrame({"condition": list("AB") * 30, "batch": [f"b{i % 3}" for i in range(60)]})
    obs.index = [f"c{i}" for i in range(60)]
    val = [
        obs["batch"][make_split(obs, track="batch_disjoint", seed=seed).roles == "val"] for seed in range(3)
    ]
    named = [set(part) for part in val]
    assert all(len(part) == 1 for part in named) and named[0] != named[1] and named[0] == named[2]


@settings(max_examples=25)
@given(obs=screens(n_guides=(1, 5)), seed=st.integers(0, 20))
def test_guides_are_held_out_whole(obs, seed):
    if obs["guide"].nunique() == obs["condition"].nunique():
        with pytest.raises(TrackError, match="two guides or more"):
            make_split(obs, track="guide_disjoint", seed=seed)
        return
    roles = make_split(obs, track="guide_disjoint", seed=seed).roles
    guides = {role: set(obs["guide"][roles == role]) for role in ("train", "val", "query")}
    assert not guides["query"] & (guides["train"] | guides["val"])
    per_condition = obs.groupby("condition")["guide"].nunique().max()
    assert not guides["train"] & guides["val"] or per_condition == 2
    assert set(obs["condition"][roles == "query"]) == set(obs["condition"][roles == "train"])


def test_a_condition_with_one_guide_is_trained_on_and_cells_without_a_guide_are_not_used():
    obs = pd.DataFrame(
        {"condition": ["A"] * 6 + ["B"] * 9, "guide": ["a"] * 6 + ["b1", "b2", "unassigned"] * 3}
    )
    obs.index = [f"c{i}" for i in range(len(obs))]
    roles = make_split(obs, track="guide_disjoint", seed=0).roles
    # Two guides leave none for validation, which then takes cells of those that are trained on.
    assert set(roles[obs["condition"] == "A"]) == {"train", "val"}
    assert set(roles[obs["guide"] == "unassigned"]) == {"unused"}
    assert len({roles[obs["guide"] == guide].eq("query").all() for guide in ("b1", "b2")}) == 2


@pytest.mark.parametrize("name", ["unseen_combo", "unseen_gene"])
@settings(max_examples=40)
@given(obs=screens(), seed=st.integers(0, 20))
def test_held_out_conditions_are_never_trained_on(name, obs, seed):
    split = make_split(obs, track=name, seed=seed)
    trained, query = conditions_of(obs, split, "train"), conditions_of(obs, split, "query")
    val, gallery = conditions_of(obs, split, "val"), conditions_of(obs, split, "gallery")
    assert query and val and not query & val and not trained & (query | val)
    assert gallery == set(obs["condition"]) - {CTRL}
    if name == "unseen_combo":
        assert all(len(targets(condition)) == 2 for condition in query | val)
    else:
        held = [{gene for each in part for gene in targets(each)} - {g for c in trained for g in targets(c)}
                for part in (query, val)]  # fmt: skip
        assert all(held)
        assert len(query) <= max(
            round(0.2 * obs["condition"].nunique()), min(map(len, by_gene(obs).values()))
        )
    made = pd.crosstab(obs["condition"], split.roles == "gallery")
    assert (made[True] == np.ceil(0.2 * made.sum(axis=1))).all()


def by_gene(obs):
    known = set(obs["condition"]) - {CTRL}
    return {gene: {c for c in known if gene in targets(c)} for c in known for gene in targets(c)}


def test_combinations_are_asked_about_by_how_many_genes_were_seen():
    """Ring of 40 doubles over 40 singles: enough of each kind for the asked shares of 8 queries, 2 + 2 + 4."""
    genes = [f"R{i:02d}" for i in range(40)]
    doubles = ["+".join(sorted((a, b))) for a, b in zip(genes, [*genes[1:], genes[0]], strict=True)]
    obs = pd.DataFrame({"condition": np.repeat([*genes, *doubles, CTRL], 4)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    split = make_split(obs, track="unseen_combo", seed=0)
    trained = conditions_of(obs, split, "train")
    seen = [genes_seen(name, trained) for name in conditions_of(obs, split, "query")]
    # What validation holds out may make a gene of a query unseen, too, and never the reverse.
    assert len(seen) == 8 and seen.count(0) >= 1 and seen.count(1) >= 2 and seen.count(2) >= 2


@pytest.mark.parametrize("name", [*TRACKS])
def test_copies_of_a_cell_are_in_one_role(name):
    obs = pd.DataFrame({"condition": np.repeat([CTRL, *GENES, *DOUBLES], 12)})
    obs.index = [f"cell{i}" for i in range(len(obs))]
    obs["batch"] = [f"b{i % 5}" for i in range(len(obs))]
    obs["guide"] = [f"{c}-{i % 4}" for i, c in enumerate(obs["condition"])]
    groups = np.random.default_rng(0).integers(0, len(obs) // 2, len(obs))
    roles = make_split(obs, track=name, seed=0, groups=groups).roles.to_numpy()
    for group in np.unique(groups):
        assert len(set(roles[groups == group]) - {"unused"}) <= 1
    assert all((roles == role).sum() > 3 for role in ("train", "val", "query"))


def test_roles_are_the_same_in_another_process():
    code = (
        "import pandas as pd; from perturbret.data.splits import make_split; from perturbret.data.tracks import TRACKS;"
        "c = [x for x in ('ctrl', 'A', 'B', 'C', 'D', 'A+B', 'C+D', 'B+C') for _ in range(9)];"
        "o = pd.DataFrame({'condition': c, 'batch': [f'b{i % 4}' for i in range(72)]}, [f'c{i}' for i in range(72)]);"
        "o['guide'] = o['condition'] + [str(i % 3) for i in range(72)];"
        "print([make_split(o, track=t, seed=1).hash for t in ('in_dist', 'batch_disjoint', 'guide_disjoint',"
        "'unseen_combo', 'unseen_gene')])"
    )
    options = {"capture_output": True, "text": True, "check": True}
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env=toy.environment(PYTHONHASHSEED=seed), **options
        ).stdout
        for seed in ("0", "7")
    }
    assert len(found) == 1 and len(found.pop()) > 300


@pytest.mark.parametrize(
    ("name", "obs", "message"),
    [
        ("batch_disjoint", {}, "expected a screen with a batch.*batch_key"),
        ("guide_disjoint", {}, "expected a screen with a guide.*guide_key"),
        ("batch_disjoint", {"batch": "b"}, "expected two batches or more, got .*'b'"),
        ("unseen_combo", {}, "expected two conditions or more that combine genes, got 0"),
    ],
)
def test_a_screen_without_what_a_track_holds_out_is_refused(name, obs, message):
    cells = pd.DataFrame({"condition": list("AABB"), **obs}, index=list("wxyz"))
    with pytest.raises(TrackError, match=message):
        make_split(cells, track=name, seed=0)


def test_an_unknown_track_a_taken_name_and_an_unknown_role_are_refused():
    cells = pd.DataFrame({"condition": list("AABB")}, index=list("wxyz"))
    with pytest.raises(ValueError, match="expected one of in_dist, batch_disjoint.*got 'random'"):
        make_split(cells, track="random", seed=0)
    with pytest.raises(ValueError, match="track 'in_dist': expected a new name"):
        track("in_dist", candidates="train", holds_out="")(lambda *_: None)
    with pytest.raises(ValueError, match="expected a role of .* got 4 and ..test.."):
        Track("mine", lambda *_: np.array(["train", "test", "val", "query"]), "train", "").roles(
            toy.labelled(cells), 0, (0.6, 0.2, 0.2)
        )


def test_uniform_numbers_are_of_the_name():
    names = [f"n{i}" for i in range(4000)]
    numbers = uniform(names, "salt")
    assert abs(numbers.mean() - 0.5) < 0.02 and 0 <= numbers.min() and numbers.max() < 1
    assert (uniform(names[::-1], "salt")[::-1] == numbers).all() and (
        uniform(names, "other") != numbers
    ).all()


@pytest.mark.parametrize("name", [*TRACKS])
@pytest.mark.parametrize("encoder", ["pca", "logreg", "mlp", "mean_shift"])
def test_a_method_is_chosen_and_judged_under_every_track(wide, name, encoder):
    prepared = prepare(wide, make_split(wide.obs, track=name, seed=0), mask="all_targets")
    search = {"mlp": {"weight_decay": [1.0]}, "logreg": {"C": [0.1], "scale": [False]}}.get(encoder)
    fitted = fit_baseline(encoder, prepared, seed=0, search=search)
    assert fitted.selection["exact_hit@1"].notna().all()
    scores = evaluate(fitted.encoder, prepared, query_sizes=(1, 5), poolings=("scores",))
    assert set(scores["candidates"]) == {TRACKS[name].candidates[0]}
    assert set(scores["condition"]) == set(prepared.conditions[prepared.where("query")])
    if TRACKS[name].candidates[0] == "observed":
        # No held-out condition has a class: what is ranked goes by prototypes, and every query can be ranked right.
        assert set(scores["scoring"]) == {"cosine", "whitened"}
    assert scores["rank"].notna().all()
    rows = summarise(scores, n_resamples=20).query(
        "metric == 'exact_hit@1' and average == 'micro' and query_size == 5 and scoring == 'whitened'"
    )
    if encoder == "pca":
        assert (rows["estimate"] > 2 * rows["chance"]).all()


@pytest.mark.parametrize("name", ["unseen_combo", "unseen_gene"])
def test_validation_ranks_its_own_held_out_conditions_and_none_of_the_queries(wide, name):
    prepared = prepare(wide, make_split(wide.obs, track=name, seed=0), mask="all_targets")
    asked = set(prepared.conditions[prepared.where("query")])
    known = set(candidate_names(prepared, "observed", "val"))
    assert set(prepared.conditions[prepared.where("val")]) <= known and not known & asked
    assert set(prepared.conditions[library_cells(prepared, "observed", "query")]) >= asked | known


def saved_files(encoder, directory):
    encoder.save(directory)
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def fitted_on(screen, split, fit, directory):
    """All bytes that a fit leaves, prototypes among them; the hash of all cells is put aside."""
    prepared = prepare(screen, split, mask="all_targets")
    prepared = replace(prepared, context=replace(prepared.context, cells_hash=""))
    fitted = fit(prepared)
    library = library_cells(prepared, prepared.candidate_sets[0], "query")
    prototypes = fitted.encoder.embed(prepared.cells.take(library)).tobytes()
    return fitted, (saved_files(fitted.encoder, directory), prototypes, fitted.selection.to_csv())


@pytest.mark.parametrize("name", [*TRACKS])
@pytest.mark.parametrize("encoder", ["pca", "lda", "average"])
def test_nothing_fitted_depends_on_a_query_cell(wide, tmp_path, name, encoder):
    """Other counts in the query cells change no bit of what is saved, nor of what is chosen."""
    split = make_split(wide.obs, track=name, seed=0)
    search = {"average": {"methods": ["logreg+lda_low_rank"]}}.get(encoder)

    def fit(prepared):
        return fit_baseline(encoder, prepared, seed=0, search=search)

    screens_ = (wide, toy.with_other_queries(wide, split))
    (fitted, mine), (_, theirs) = (
        fitted_on(s, split, fit, tmp_path / str(i)) for i, s in enumerate(screens_)
    )
    assert mine == theirs
    ranks = [
        evaluate(
            fitted.encoder, prepare(s, split, mask="all_targets"), query_sizes=(1,), ablation=["cells_hash"]
        )["rank"]
        for s in screens_
    ]
    assert not ranks[0].equals(ranks[1])


@pytest.mark.parametrize("name", ["in_dist", "unseen_combo"])
@pytest.mark.parametrize("mode", ["frozen", "head", "lora_head"])
def test_nothing_fitted_in_a_network_depends_on_a_query_cell(wide, tmp_path, name, mode):
    from perturbret.scgpt.backbone import fit_scgpt

    split = make_split(wide.obs, track=name, seed=0)
    checkpoint = toy.write_tiny_checkpoint(tmp_path / "checkpoint", wide.genes)
    settings_ = {"checkpoint": str(checkpoint), "mode": mode}
    if mode != "frozen":
        settings_ |= {"epochs": 2, "batch_size": 64, "head_dim": 8, "rank": 2}
    made = [
        fitted_on(
            screen,
            split,
            lambda prepared: fit_scgpt(prepared, seed=0, settings=settings_, report=lambda line: None),
            tmp_path / str(number),
        )[1]
        for number, screen in enumerate((wide, toy.with_other_queries(wide, split)))
    ]
    assert made[0] == made[1]


def test_the_null_control_holds_on_held_out_conditions(wide):
    from perturbret.evaluation.nulls import permute_conditions

    split = make_split(wide.obs, track="unseen_gene", seed=0)
    labels = permute_conditions(
        wide.obs["condition"].to_numpy(str),
        split.roles.to_numpy(str),
        batch=wide.obs["batch"].to_numpy(str),
        seed=0,
    )
    twin = prepare(wide, split, mask="all_targets", conditions=labels)
    table = null_control(fit_baseline("pca", twin, seed=0).encoder, twin, n_permutations=199)
    assert (table["p_value"] > 0.01).all() and set(table["candidates"]) == {"observed"}


def test_a_report_has_a_column_for_each_track_and_candidate_set(wide, tmp_path):
    from perturbret.report import sentences, tables
    from perturbret.report.ablation import build_report
    from perturbret.runs.pipeline import evaluate_run
    from perturbret.runs.runs import open_run

    settings_ = {"libraries": ["mean"], "query_sizes": [1, 5], "poolings": ["scores"], "n_resamples": 50}
    for encoder, search in (("pca", {"n_components": [10]}), ("logreg", {"C": [0.1], "scale": [False]})):
        for name in ("in_dist", "unseen_combo"):
            run = open_run(
                wide,
                encoder=encoder,
                mask="all_targets",
                seed=0,
                track=name,
                search=search,
                outputs=str(tmp_path),
            )
            evaluate_run(run, **settings_)
            text = sentences.setting(run)
            assert TRACKS[name].holds_out in text and ("`predicted`" in text) == (name == "unseen_combo")
    report = build_report(wide, outputs=str(tmp_path), n_resamples=50)
    parts = [(part.track, part.candidates) for part in (report, *report.others)]
    assert parts == [("in_dist", "train"), ("unseen_combo", "observed"), ("unseen_combo", "predicted")]
    table = tables.track_table(report)
    assert list(table.columns) == [f"{track} ({candidates})" for track, candidates in parts]
    assert set(table.index) == {"pca", "logreg", "chance"} and (table != "").all(axis=None)
    assert set(report.others[1].readouts["library"]) <= {"added", "scaled", "added_expression"}
    assert "Where more is held out" in sentences.headline(report)
    written = pd.read_csv(report.directory / "comparison.csv")
    assert set(zip(written["track"], written["candidates"], strict=True)) == set(parts)
    for part in report.others:
        assert "Queries are of" in sentences.track_line(part) and len(tables.method_table(part)) == 2
