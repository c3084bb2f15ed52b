"""Steps of fine-tuning; run as a script, this file is one of two processes that share a batch."""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toy import run_two, tiny_model, tiny_tokens

from perturbret.networks.adapters import trainable
from perturbret.networks.inputs import to_device
from perturbret.networks.training import (
    Validation,
    joint_loss,
    make_optimiser,
    norms_by_part,
    part_of,
    rates,
    schedule,
    share,
    train,
)
from perturbret.scgpt.settings import ScGPTSettings

LOSSES = ("classification", "contrastive", "both")
LABELS = np.random.default_rng(5).integers(0, 4, 32)
SETTINGS = {"head_dropout": 0.0, "batch_size": 16, "epochs": 2, "lr_backbone": 0.01, "lr_head": 0.01}


def gradients(loss):
    """Loss of one joint batch of 24 cells, and the gradient of every trained tensor."""
    accelerator, settings = Accelerator(mixed_precision="no"), ScGPTSettings(loss=loss)
    model = tiny_model(loss)
    wrapped = accelerator.prepare(model)
    mine = share(np.arange(24), accelerator.process_index, accelerator.num_processes)
    block = to_device(tiny_tokens().padded(mine), accelerator.device)
    z, logits = wrapped(*block)
    total, value = joint_loss(accelerator, wrapped, z, logits, torch.from_numpy(LABELS[mine]), settings)
    accelerator.backward(total)
    return {"value": torch.tensor(value), **{name: w.grad for name, w in trainable(model).items()}}


def trained(loss):
    """Weights and history of a short training."""
    model, tokens = tiny_model(loss), tiny_tokens()
    settings = ScGPTSettings(loss=loss, **SETTINGS)

    def score(embeddings, logits):
        return 0.0, float(np.square(embeddings).sum())

    outcome = train(
        model,
        tokens,
        np.arange(32),
        LABELS,
        settings=settings,
        seed=0,
        validation=Validation(np.arange(9), score),
        report=lambda line: None,
    )
    numbers = outcome.history[["loss", "val_loss", "grad_backbone", "grad_head"]].to_numpy(np.float32)
    return {"history": torch.from_numpy(numbers), **trainable(model)}


def every():
    return {
        f"{step.__name__}/{loss}/{name}": tensor.detach().clone()
        for step in (gradients, trained)
        for loss in LOSSES
        for name, tensor in step(loss).items()
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What two processes on the CPU got, from the first of them."""
    folder = tmp_path_factory.mktemp("two")
    run_two(__file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_give_the_gradients_of_the_joint_batch(of_two, loss):
    for name, expected in gradients(loss).items():
        for found in of_two:
            torch.testing.assert_close(found[f"gradients/{loss}/{name}"], expected, atol=1e-6, rtol=1e-5)
        assert expected.abs().sum() > 0, name


def test_the_temperatures_gradient_is_among_them(of_two):
    named = [name for name in of_two[0] if "log_scale" in name and name.startswith("gradients")]
    assert len(named) == 2


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_to_the_weights_of_one(of_two, loss):
    # AdamW divides by the size of gradients, so that rounding of the smallest is all that is left of it.
    for name, expected in trained(loss).items():
        for found in of_two:
            torch.testing.assert_close(found[f"trained/{loss}/{name}"], expected, atol=2e-4, rtol=2e-4)


def test_schedule_rises_then_falls_to_zero():
    shares = [schedule(step, 100, 0.1) for step in range(100)]
    np.testing.assert_allclose(shares[:10], np.arange(1, 11) / 10)
    assert shares[10] == 1.0 and np.all(np.diff(shares[10:]) < 0) and shares[-1] < 1e-3
    assert schedule(55, 100, 0.1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert schedule(0, 1, 0.0) == 1.0 and schedule(0, 1, 0.9) == 1.0


def test_each_weight_is_in_the_group_of_its_part():
    model = tiny_model("both")
    settings = ScGPTSettings(lr_backbone=0.003, lr_head=0.02, weight_decay=0.1)
    optimiser = make_optimiser(trainable(model), settings)
    where = {id(w): group for group in optimiser.param_groups for w in group["params"]}
    assert len(where) == sum(len(group["params"]) for group in optimiser.param_groups)
    for name, weight in trainable(model).items():
        group = where[id(weight)]
        assert group["lr"] == (0.02 if name.startswith("head.") else 0.003), name
        assert group["weight_decay"] == (0.1 if weight.ndim > 1 else 0.0), name
    assert rates(optimiser) == {"lr_backbone": 0.003, "lr_head": 0.02}
    assert isinstance(optimiser, torch.optim.AdamW)


def test_parts():
    assert part_of("head.classifier.weight") == "head" and part_of("network.head.x") == "backbone"
    found = norms_by_part({"head.a": 3.0, "head.b": 4.0, "network.c": 2.0})
    assert found == {"grad_head": 5.0, "grad_backbone": 2.0}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(every(), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
