"""A user's own method and metric in a file outside of the package: fitted, saved, loaded, judged like any other."""

import sys

import numpy as np
import pandas as pd
import pytest
from toy import ToyEncoder, from_obsm, toy_cells, toy_screen

from perturbret.data.simulate import simulate_screen
from perturbret.encoders.base import load_encoder
from perturbret.encoders.baselines import fit_baseline
from perturbret.encoders.methods import METHODS
from perturbret.evaluation.judge import null_control
from perturbret.evaluation.metrics import METRICS, metric_columns
from perturbret.files import plugins
from perturbret.runs.pipeline import _code, evaluate_run
from perturbret.runs.runs import open_run

OWN = '''
from dataclasses import dataclass

import numpy as np

from perturbret.encoders import method
from perturbret.encoders.base import Transform
from perturbret.encoders.methods import whole
from perturbret.evaluation import metric


@dataclass(frozen=True)
class Fold(Transform):
    """Genes added up in `n` groups."""

    n: int

    @property
    def width(self):
        return self.n

    def __call__(self, values):
        values = np.asarray(values.todense())
        return np.stack([values[:, i :: self.n].sum(axis=1) for i in range(self.n)], axis=1)


@method("fold", n=whole(5, 20))
def fit_fold(training, grid):
    for chosen in grid:
        yield training.encoder("log1p", (Fold(chosen["n"]),), None, chosen, target_sum=1e4)


@metric("top_half", controlled=True)
def top_half(ranking):
    """Whether the query's own condition is in the upper half."""
    half = len(ranking.ranks) // 2
    return ranking.of_exact(ranking.mean(np.ones_like(ranking.ranks), half))


@metric("places_lost", better="lower", bounds=(0, None), controlled=True, tabled=False)
def places_lost(ranking):
    """Conditions that stand above the query's own one."""
    return ranking.of_exact(ranking.mean(ranking.ranks - 1), absent=len(ranking.ranks))
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file that registers a method and two metrics, for one test."""
    path = tmp_path / "fold_plugin.py"
    path.write_text(OWN)
    monkeypatch.setenv("PERTURBRET_PLUGINS", str(path))
    before = dict(METHODS), dict(METRICS)
    yield path
    for register, kept in zip((METHODS, METRICS), before, strict=True):
        register.clear()
        register.update(kept)
    plugins._loaded.pop(path, None)
    sys.modules.pop("fold_plugin", None)


def test_a_method_and_a_metric_of_ones_own_go_through_every_step(own, tmp_path):
    plugins.load_plugins()
    screen = simulate_screen(
        n_singles=6, n_doubles=2, cells_per_condition=40, n_control=40, n_genes=60, seed=1
    )
    run = open_run(screen, encoder="fold", mask="all_targets", seed=0, outputs=str(tmp_path))
    scores, summary, null = evaluate_run(
        run, libraries=["mean"], query_sizes=[1, 5], poolings=["scores"], n_resamples=50
    )
    assert pd.read_csv(run.directory / "selection.csv")["n"].tolist() == [5, 20]
    assert load_encoder(run.directory).layers[0].n in (5, 20)
    expected = (scores["rank"] <= scores["n_candidates"] / 2).mean()
    assert scores["top_half"].mean() == pytest.approx(expected, abs=0.02)
    assert (scores["places_lost"] == scores["rank"] - 1).all()
    rows = (
        summary.query("query_size == 1 and average == 'micro'")
        .groupby("metric")[["estimate", "chance"]]
        .first()
    )
    assert rows.loc["top_half", "chance"] == pytest.approx(0.5)
    assert rows.loc["places_lost", "chance"] == pytest.approx(3.5)
    assert [name for name in scores if name in METRICS][-3:] == ["margin", "top_half", "places_lost"]
    for name, luck in (("top_half", 0.5), ("places_lost", 3.5)):
        assert np.allclose(null[f"{name}_luck"], luck, rtol=0.15)
        assert null[f"{name}_p_value"].between(1e-4, 1).all() and (null[f"{name}_p_value"] > 0.001).all()
    assert {"top_half", "places_lost"} <= set(metric_columns("compared"))
    assert "top_half" in metric_columns("tabled") and "places_lost" not in metric_columns("tabled")


def test_a_metric_that_is_given_the_label_away_has_the_smallest_p_value(own):
    parts = toy_screen(conditions=("A", "B", "C", "D"))
    codes = np.unique(parts["conditions"], return_inverse=True)[1]
    prepared = toy_cells(**parts, obsm={"x": np.eye(5)[codes] + 0.1})
    null = null_control(ToyEncoder(prepared, from_obsm()), prepared, libraries=("mean",), n_permutations=99)
    assert (null["places_lost"] == 0).all() and (null["top_half"] == 1).all()
    assert (null[["places_lost_p_value", "top_half_p_value", "p_value"]] == 1 / 100).all(axis=None)


def test_the_code_of_a_plug_in_is_part_of_a_fit(own):
    module = plugins.load_plugins()["fold_plugin"]
    code = _code(METHODS["fold"].fit)
    own.write_text(OWN.replace("sum(axis=1)", "mean(axis=1)"))
    _code.cache_clear()
    assert _code(module.fit_fold) != code
    own.write_text(OWN + "\n# a comment\n")
    _code.cache_clear()
    assert _code(module.fit_fold) == code


def test_what_is_no_file_or_has_a_module_s_name_is_refused(own, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="encoder: expected one of .*, got 'fold'"):
        fit_baseline("fold", None, seed=0)
    for name, message in (
        ("gone.py", "expected Python files, got"),
        ("json.py", "expected a name that no module"),
    ):
        (tmp_path / "json.py").write_text("")
        monkeypatch.setenv("PERTURBRET_PLUGINS", str(tmp_path / name))
        with pytest.raises(ValueError, match=f"PERTURBRET_PLUGINS: {message}"):
            plugins.load_plugins()
