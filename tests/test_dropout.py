"""Dropout drops the share that it should, keeps the mean, and is off in evaluation."""

import pytest
import torch

from perturbret.scgpt.network import Dropout


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_dropped_share_and_scale(p):
    torch.manual_seed(0)
    values = Dropout(p)(torch.ones(1003, 997))
    dropped = (values == 0).double().mean().item()
    nearest = min(max(round(p * 256), 1), 255) / 256
    assert dropped == pytest.approx(nearest, abs=5 * (nearest * (1 - nearest) / values.numel()) ** 0.5)
    assert values.unique().tolist() == pytest.approx([0, 1 / (1 - nearest)])


def test_values_are_dropped_independently():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(100_000, 16)) == 0).double()
    together = torch.corrcoef(dropped.T) - torch.eye(16)
    assert together.abs().max() < 0.02
    assert dropped.mean(dim=0) == pytest.approx([0.5] * 16, abs=0.01)


def test_gradient_follows_what_was_kept():
    torch.manual_seed(0)
    values = torch.randn(7, 5, requires_grad=True)
    kept = Dropout(0.4)(values)
    kept.sum().backward()
    assert torch.equal(values.grad == 0, kept == 0)
    torch.testing.assert_close(values.grad * values, kept)
    assert 0 < (kept == 0).sum() < kept.numel()


def test_the_global_generator_decides():
    drop, values = Dropout(0.5), torch.ones(64, 3)
    torch.manual_seed(1)
    first, second = drop(values), drop(values)
    torch.manual_seed(1)
    assert torch.equal(drop(values), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 2, 5)])
def test_shapes(shape):
    assert Dropout(0.3)(torch.ones(shape)).shape == shape


def test_evaluation_and_zero_change_nothing():
    values = torch.randn(4, 3)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_no_probability(p):
    with pytest.raises(ValueError, match=r"from 0 to below 1, got"):
        Dropout(p)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    values = Dropout(0.25)(torch.ones(1000, 1000, device="cuda"))
    assert (values == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
