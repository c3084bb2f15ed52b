"""Losses against plain loops, and at their edges."""

import numpy as np
import pytest
import torch

from perturbret.networks.training import carried_log_prior, classification, contrastive


def batch(labels, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(len(labels), d, generator=generator, dtype=torch.float32).requires_grad_()
    return z, torch.tensor(labels)


def by_loop(embeddings, labels, scale):
    """Equation 2 of Khosla et al., cell by cell."""
    z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        if not positives:
            continue
        total = sum(np.exp(scale * z[i] @ z[a]) for a in others)
        losses.append(-np.mean([np.log(np.exp(scale * z[i] @ z[p]) / total) for p in positives]))
    return np.mean(losses)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 2, 2, 0], [3, 3], [0, 1, 2, 0, 5, 6], [1, 1, 1, 1]])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_contrastive_equals_a_plain_loop(labels, scale):
    z, y = batch(labels)
    found = contrastive(z, y, torch.tensor(scale)).item()
    np.testing.assert_allclose(found, by_loop(z.detach().double().numpy(), labels, scale), atol=2e-6)


def test_anchors_without_positives_are_left_out_and_stay_negatives():
    z, y = batch([0, 0, 1, 2])
    scale = torch.tensor(2.0)
    alone = contrastive(z[:2], y[:2], scale).item()
    both = contrastive(z, y, scale).item()
    assert alone == pytest.approx(0.0, abs=1e-6) and both > 0.1
    np.testing.assert_allclose(both, by_loop(z.detach().double().numpy(), [0, 0, 1, 2], 2.0), atol=1e-6)


def test_without_any_positive_loss_and_gradients_are_zero():
    z, y = batch([0, 1, 2])
    scale = torch.tensor(3.0, requires_grad=True)
    loss = contrastive(z, y, scale)
    loss.backward()
    assert loss.item() == 0.0
    # Zeros and not None: processes that share gradients wait for each of them.
    assert (z.grad == 0).all() and scale.grad == 0


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 1, 2], [1, 1, 1, 1]])
@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_gradients_are_finite(labels, scale):
    z, y = batch(labels)
    with torch.no_grad():
        z[1] = z[0]  # a cell that is its positive's twin
    scale = torch.tensor(scale, requires_grad=True)
    contrastive(z, y, scale).backward()
    assert torch.isfinite(z.grad).all() and torch.isfinite(scale.grad)
    if scale.item() < 1:
        assert z.grad.abs().sum() > 0


def test_contrastive_is_lower_where_positives_are_near():
    y = torch.tensor([0, 0, 1, 1])
    near = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    far = near[[0, 2, 1, 3]]
    scale = torch.tensor(5.0)
    assert contrastive(near, y, scale) + 1 < contrastive(far, y, scale)


def test_length_of_embeddings_does_not_matter():
    z, y = batch([0, 0, 1, 1])
    scale = torch.tensor(5.0)
    torch.testing.assert_close(contrastive(z * 7, y, scale), contrastive(z, y, scale))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_equals_plain_cross_entropy(smoothing):
    logits, y = batch([0, 4, 2], d=5)
    log_p = logits.detach().double().log_softmax(dim=1).numpy()
    wanted = np.full((3, 5), smoothing / 5)
    wanted[np.arange(3), y.numpy()] += 1 - smoothing
    np.testing.assert_allclose(
        classification(logits, y, smoothing).item(), -(wanted * log_p).sum(axis=1).mean(), atol=1e-6
    )


def test_losses_are_computed_in_float32():
    z, y = batch([0, 0, 1, 1])
    assert contrastive(z.bfloat16(), y, torch.tensor(2.0)).dtype == torch.float32
    assert classification(z.bfloat16(), y, 0.1).dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_the_carried_prior_is_where_a_classifier_without_input_ends(smoothing):
    y = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)
    shares = np.bincount(y) / len(y)
    prior = carried_log_prior(shares, smoothing)
    assert np.exp(prior).sum() == pytest.approx(1)
    bias = torch.tensor(prior, dtype=torch.float32).requires_grad_()
    classification(bias.expand(len(y), 3), y, smoothing).backward()
    np.testing.assert_allclose(bias.grad, 0, atol=1e-6)
    np.testing.assert_array_equal(carried_log_prior(shares, 0.0), np.log(shares))
