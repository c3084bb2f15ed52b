"""The training loop: what it changes, what it records, when it stops, and that it goes on after a kill."""

import numpy as np
import pandas as pd
import pytest
import torch
from toy import tiny_model, tiny_tokens

from perturbret.evaluation.embedding_shape import spread
from perturbret.networks import training as finetune
from perturbret.networks.adapters import trainable
from perturbret.networks.embedding import embed_rows, run_lower
from perturbret.networks.training import (
    COLLAPSED,
    TrainingFailed,
    Validation,
    n_epochs,
    schedule,
    train,
)
from perturbret.scgpt.settings import ScGPTSettings

TOKENS = tiny_tokens(80)
INDEX = np.arange(64)
LABELS = TOKENS.genes[TOKENS.indptr[INDEX] + 1] % 4  # of the first gene
LOSSES = ("classification", "contrastive", "both")
OPTIONS = {"head_dropout": 0.0, "batch_size": 16, "epochs": 4, "lr_backbone": 0.004, "lr_head": 0.02}


def validation(hits=None):
    """Hits as given, one per epoch; by default none, so that the loss decides."""
    scores = iter(hits or [])

    def score(embeddings, logits):
        return (next(scores) if hits else 0.0), float(np.square(embeddings).mean())

    return Validation(np.arange(64, 80), score)


def run(model=None, source=TOKENS, *, val="default", report=lambda line: None, seed=0, **options):
    arguments = {name: options.pop(name) for name in ("state", "key", "stop_epoch") if name in options}
    settings = ScGPTSettings(**{**OPTIONS, **options})
    model = tiny_model(settings.loss) if model is None else model
    outcome = train(
        model,
        source,
        INDEX,
        LABELS,
        settings=settings,
        seed=seed,
        validation=validation() if val == "default" else val,
        report=report,
        **arguments,
    )
    return model, outcome


def weights(model):
    return {name: weight.detach().clone() for name, weight in trainable(model).items()}


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_trainable_moves_and_nothing_else(loss):
    before = tiny_model(loss)
    model, outcome = run(loss=loss, val=None)
    names = set(trainable(before))
    for name, tensor in before.state_dict().items():
        assert (tensor != model.state_dict()[name]).any() == (name in names), name
    assert set(outcome.gradients) == names and min(outcome.gradients.values()) > 0
    assert not model.training


@pytest.mark.parametrize(
    ("loss", "sampler", "fall"),
    [("classification", "random", 0.1), ("contrastive", "balanced", 0.05), ("both", "balanced", 0.2)],
)
def test_the_loss_falls(loss, sampler, fall):
    _, outcome = run(loss=loss, sampler=sampler, epochs=15, val=None)
    losses = outcome.history["loss"]
    assert losses.iloc[-1] < losses.iloc[0] - fall


def test_learning_rates_are_those_of_the_running_optimiser(monkeypatch):
    made = []
    inner = finetune.make_optimiser

    def observed(*arguments):
        optimiser = inner(*arguments)
        optimiser.register_step_pre_hook(
            lambda running, *_: made.append({group["part"]: group["lr"] for group in running.param_groups})
        )
        return optimiser

    monkeypatch.setattr(finetune, "make_optimiser", observed)
    _, outcome = run(warmup=0.25)
    assert len(made) == 4 * 4  # epochs x batches
    for step, found in enumerate(made):
        share = schedule(step, 16, 0.25)
        assert found == pytest.approx({"backbone": 0.004 * share, "head": 0.02 * share})
    last = [made[4 * epoch + 3] for epoch in range(4)]
    np.testing.assert_allclose(outcome.history["lr_backbone"], [rates["backbone"] for rates in last])
    np.testing.assert_allclose(outcome.history["lr_head"], [rates["head"] for rates in last])


@pytest.mark.parametrize(
    ("still", "moving"), [("lr_backbone", "head."), ("lr_head", "network.")], ids=["head", "backbone"]
)
def test_each_rate_moves_its_own_part(still, moving):
    before = weights(tiny_model("both"))
    model, _ = run(loss="both", val=None, **{still: 0.0})
    for name, weight in weights(model).items():
        assert (weight != before[name]).any() == name.startswith(moving), name


def test_gradients_are_clipped_to_the_norm_that_was_given(monkeypatch):
    norms = []
    inner = torch.nn.utils.clip_grad_norm_

    def observed(parameters, *arguments):
        found = inner(parameters, *arguments)
        norms.append((found.item(), inner(parameters, float("inf")).item()))
        return found

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", observed)
    _, outcome = run(clip=0.01)
    assert len(norms) == 16 and min(before for before, _ in norms) > 0.01
    np.testing.assert_allclose([after for _, after in norms], 0.01, rtol=1e-3)
    assert outcome.history["grad_head"].min() > 0.01  # recorded before clipping


def test_accumulated_batches_equal_one_large_batch():
    small, _ = run(batch_size=16, accumulate=2, val=None)
    large, _ = run(batch_size=32, val=None)
    for name, weight in weights(small).items():
        torch.testing.assert_close(weight, weights(large)[name], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="accumulate: expected no more than the batches of an epoch, got 5"):
        run(accumulate=5)


def test_lower_layers_computed_once_give_the_same_training():
    """All of the difference is rounding, which AdamW makes larger."""
    whole, from_tokens = run(tiny_model("both", layers=[1]), loss="both")
    model = tiny_model("both", layers=[1], start=1)
    model, from_hidden = run(model, run_lower(model.network, TOKENS, 1), loss="both")
    pd.testing.assert_frame_equal(from_hidden.history, from_tokens.history, rtol=1e-3)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(whole)[name], atol=1e-4, rtol=1e-3)
    model.start = 0
    found, expected = (embed_rows(each, TOKENS, INDEX)[0] for each in (model, whole))
    np.testing.assert_allclose(found, expected, atol=1e-3)


class Killed(Exception):
    pass


@pytest.mark.parametrize(("epoch", "loss"), [(1, "both"), (3, "classification")])
def test_resumes_after_a_kill_to_the_same_bits(tmp_path, epoch, loss):
    options = {"dropout": 0.2, "head_dropout": 0.3}

    def model():
        return tiny_model(loss, **options)

    def kill(line):
        if line.startswith(f"epoch {epoch}/"):
            raise Killed

    hits = [0.1, 0.3, 0.2, 0.3]
    expected, whole = run(model(), val=validation(hits), loss=loss)
    state = tmp_path / "training.pt"
    with pytest.raises(Killed):
        run(model(), val=validation(hits), state=state, key="a", report=kill, loss=loss)
    lines = []
    found, resumed = run(
        model(), val=validation(hits[epoch:]), state=state, key="a", report=lines.append, loss=loss
    )
    assert lines[0] == f"resumed after epoch {epoch}" and len(lines) == 1 + 4 - epoch
    pd.testing.assert_frame_equal(resumed.history, whole.history, check_exact=True)
    assert (resumed.best_epoch, resumed.gradients) == (whole.best_epoch, whole.gradients)
    assert_equal(weights(found), weights(expected))
    lines.clear()
    again, _ = run(model(), val=None, state=state, key="a", report=lines.append, loss=loss)
    assert lines == ["resumed after epoch 4"]  # nothing is left to train
    assert_equal(weights(again), weights(expected))


def test_another_seed_trains_otherwise():
    assert (run(seed=1)[1].history["loss"] != run(seed=0)[1].history["loss"]).all()


def test_a_state_of_another_key_is_ignored(tmp_path):
    state = tmp_path / "training.pt"
    run(state=state, key="a", lr_head=0.1)
    lines = []
    found, _ = run(state=state, key="b", report=lines.append)
    assert lines[0].startswith("epoch 1/4")
    assert_equal(weights(found), weights(run()[0]))


def test_the_best_epoch_is_kept_and_training_stops_when_none_is_better():
    model, outcome = run(val=validation([0.1, 0.4, 0.3, 0.2, 0.4, 0.9]), epochs=6, patience=2)
    assert outcome.best_epoch == 2 and len(outcome.history) == 4
    assert outcome.history["val_exact_hit@1"].tolist() == [0.1, 0.4, 0.3, 0.2]
    stopped, other = run(val=None, epochs=6, stop_epoch=2)
    assert len(other.history) == 2 and other.best_epoch == 2
    assert_equal(weights(model), weights(stopped))


def test_of_equal_hits_the_lower_loss_is_better():
    losses = iter([3.0, 1.0, 2.0, 1.0])
    val = Validation(np.arange(64, 80), lambda z, logits: (0.5, next(losses)))
    assert run(val=val)[1].best_epoch == 2


def test_validation_gets_embeddings_and_logits_of_its_cells_in_evaluation_mode():
    seen = []
    val = Validation(np.array([70, 64]), lambda z, logits: (seen.append((z, logits)), (0.0, 0.0))[1])
    model, _ = run(tiny_model("both", dropout=0.5, head_dropout=0.5), val=val, epochs=1, loss="both")
    z, logits = embed_rows(model, TOKENS, np.array([70, 64]))
    np.testing.assert_array_equal(seen[0][0], z)
    np.testing.assert_array_equal(seen[0][1], logits)


def test_collapse_stops_the_run():
    model = tiny_model("classification")
    with torch.no_grad():
        model.head.layers[0].weight.zero_()
    with pytest.raises(TrainingFailed, match="epoch 1: all embeddings are alike .*the network has collapsed"):
        run(model, lr_head=0.0, lr_backbone=0.0)


def test_spread():
    far = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    assert 0.9 < spread(far) < 1.1
    assert spread(far * 1e-7 + 1) < COLLAPSED < spread(far * 1e-3 + 1)
    assert spread(np.ones((5, 3))) == spread(np.zeros((5, 3))) == 0.0


def test_a_loss_that_is_not_finite_stops_the_run():
    model = tiny_model("classification")
    with torch.no_grad():
        model.head.layers[0].bias[0] = float("nan")
    with pytest.raises(TrainingFailed, match="epoch 1: expected a finite loss, got nan; lower"):
        run(model)


def test_a_weight_that_nothing_calls_gets_no_gradient_and_no_crash():
    model = tiny_model("classification")
    model.network.extra = torch.nn.Linear(3, 3)
    _, outcome = run(model)
    assert outcome.gradients["network.extra.weight"] == 0.0


def test_batches_without_positives_do_no_harm():
    """Four cells of as many conditions: the contrastive loss has nothing to say, the temperature no gradient."""
    model = tiny_model("contrastive")
    settings = ScGPTSettings(**{**OPTIONS, "loss": "contrastive", "batch_size": 4})
    outcome = train(
        model,
        TOKENS,
        np.arange(4),
        np.arange(4),
        settings=settings,
        seed=0,
        validation=None,
        report=lambda line: None,
    )
    assert outcome.history["loss"].eq(0).all() and set(outcome.gradients.values()) == {0.0}


def test_bfloat16_trains_to_about_the_same():
    exact, reference = run(tiny_model("both", layers=[1]), loss="both", epochs=8)
    model, outcome = run(tiny_model("both", layers=[1]), loss="both", epochs=8, precision="bfloat16")
    assert outcome.history["loss"].iloc[-1] < outcome.history["loss"].iloc[0]
    assert (outcome.history["loss"] != reference.history["loss"]).all()
    assert all(weight.dtype == torch.float32 for weight in trainable(model).values())
    z, _ = embed_rows(exact, TOKENS, INDEX)
    for precision in ("float32", "bfloat16"):
        near, _ = embed_rows(model, TOKENS, INDEX, precision=precision)
        cosine = (z * near).sum(axis=1) / np.linalg.norm(z, axis=1) / np.linalg.norm(near, axis=1)
        assert cosine.min() >= 0.99


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (9, 2), (11, 3), (1000, 5)])
def test_steps_limit_epochs(steps, epochs):
    settings = ScGPTSettings(**{**OPTIONS, "epochs": 5, "steps": steps})
    assert n_epochs(settings, 4) == epochs
    _, outcome = run(val=None, epochs=5, steps=steps)
    assert len(outcome.history) == epochs
    # The schedule ends with them.
    assert outcome.history["lr_head"].iloc[-1] < 0.5 * settings.lr_head or epochs == 1
