"""A family that knows nothing of tokens goes through every mode, proof and notebook step that scGPT goes through."""

import subprocess
import sys

import numpy as np
import pytest
import toy
import toy_mlp

from perturbret.encoders.base import load_encoder
from perturbret.networks.families import NETWORKS, Family
from perturbret.networks.fit import fit_network
from perturbret.report.compare import role_of
from perturbret.runs.pipeline import evaluate_run, fit_run
from perturbret.runs.runs import open_run

TINY = {"batch_size": 16, "epochs": 3, "rank": 2, "head_dim": 8, "lr_head": 0.02, "lr_backbone": 0.01}
MODES = {
    "frozen": {},
    "head": {"members": 2, "loss": "both", "head_depth": 1},
    "lora_head": {},
    "lora above": {"mode": "lora_head", "lora_layers": [1, 2]},
    "last_n": {"last_layers": 1},
    "full": {},
}


class Toy(Family):
    settings, backbone = toy_mlp.MLPSettings, toy_mlp.MLPBackbone


@pytest.fixture
def registered(monkeypatch):
    """The family in the registry."""
    monkeypatch.setitem(
        NETWORKS, "toy_mlp", Toy("toy", "networks.settings:Settings", "networks.fit:fit_network")
    )


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_fitted_proved_and_reloaded(tiny_prepared, tmp_path, registered, mode):
    settings = {"mode": mode, **TINY, **MODES[mode]}
    fitted = fit_network(
        toy_mlp.MLPBackbone, tiny_prepared, seed=0, settings=settings, cache=tmp_path / "cache", report=print
    )
    proofs = [found for name, found in fitted.checks.items() if name.startswith("member")]
    assert len(proofs) == (0 if mode == "frozen" else settings.get("members", 1))
    for found in proofs:
        assert (found["embedding_change"] > 0) == (mode not in ("frozen", "head"))
        assert (found["merged_difference"] is None) == (not mode.startswith("lora"))
    fitted.encoder.save(tmp_path / "encoder")
    cells = tiny_prepared.cells.take(np.arange(30))
    loaded = load_encoder(tmp_path)
    np.testing.assert_array_equal(loaded.embed(cells), load_encoder(tmp_path).embed(cells))
    np.testing.assert_allclose(loaded.embed(cells), fitted.encoder.embed(cells), atol=1e-5)
    assert loaded.kind == "toy_mlp" and loaded.backbone.origin == {"init": "random"}
    NETWORKS.pop("toy_mlp")
    with pytest.raises(ValueError, match="expected an encoder of scgpt, got 'toy_mlp'"):
        load_encoder(tmp_path)


def test_a_run_is_fitted_judged_and_compared_as_a_network(tmp_path, registered):
    request = {"encoder": "toy_mlp", "mask": "all_targets", "seed": 0}
    settings = {"mode": "head", **TINY, "epochs": 1}
    run = open_run(toy.tiny_screen(), **request, settings=settings, outputs=str(tmp_path))
    assert run.directory.name == "toy_mlp_head-all_targets-seed0"
    fit_run(run)
    scores, _, _ = evaluate_run(run, libraries=["mean"], query_sizes=[1], poolings=["scores"], n_resamples=20)
    assert len(scores) and role_of("toy_mlp", "all_targets") == "tuned"


def test_every_registered_family_opens_and_bears_its_name():
    for name, family in NETWORKS.items():
        assert family.backbone.family == name and family.backbone.settings is family.settings


def test_simple_opponents_never_wait_for_torch():
    code = (
        "import sys; from perturbret.runs import pipeline; from perturbret.networks.families import NETWORKS;"
        "NETWORKS['scgpt'].settings; pipeline.fit_code({'encoder': 'pca', 'search': {}});"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
