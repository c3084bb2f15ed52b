"""Heads have the layers that were asked for, scale what they get, and classify what they return."""

import pytest
import torch
import torch.nn.functional as F

from perturbret.networks.heads import Head


def make(loss="both", depth=2, width=7, dim=3, dropout=0.0, temperature=0.1, d_in=6, n_classes=4):
    torch.manual_seed(0)
    return Head(
        d_in,
        n_classes,
        depth=depth,
        width=width,
        dim=dim,
        dropout=dropout,
        loss=loss,
        temperature=temperature,
    ).eval()


@pytest.mark.parametrize(
    ("depth", "sizes"),
    [(0, []), (1, [(6, 3)]), (2, [(6, 7), (7, 3)]), (4, [(6, 7), (7, 7), (7, 7), (7, 3)])],
)
def test_depth_width_and_dim(depth, sizes):
    head = make(depth=depth)
    assert [(layer.in_features, layer.out_features) for layer in head.layers] == sizes
    z, logits = head(torch.randn(5, 6))
    assert z.shape == (5, 3 if depth else 6) == (5, head.dim) and logits.shape == (5, 4)


def test_forward_by_hand():
    head = make()
    cells = torch.randn(5, 6)
    first, last = head.layers
    z, logits = head(cells)
    torch.testing.assert_close(z, last(F.relu(first(cells))))
    torch.testing.assert_close(logits, head.classifier(z))


@pytest.mark.parametrize(
    ("loss", "parts"),
    [("classification", (True, False)), ("contrastive", (False, True)), ("both", (True, True))],
)
def test_each_loss_has_its_parts(loss, parts):
    head = make(loss)
    assert (head.classifier is not None, head.log_scale is not None) == parts
    assert (head(torch.randn(2, 6))[1] is not None) == parts[0]


def test_temperature_starts_as_given_learns_and_has_a_floor():
    head = make(temperature=0.05)
    torch.testing.assert_close(head.scale, torch.tensor(20.0))
    head.scale.backward()
    assert head.log_scale.grad > 0
    with torch.no_grad():
        head.log_scale.fill_(9.0)
    assert head.scale == 100.0


def test_inputs_are_centred_and_scaled_by_what_was_set():
    head = make(depth=0)
    cells = torch.randn(50, 6) * torch.tensor([1e-4, 2e-4, 3e-4, 1e-4, 2e-4, 0]) + 5
    head.set_scale(cells)
    z, _ = head(cells)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(6), atol=2e-2, rtol=0)
    torch.testing.assert_close(z[:, :5].std(dim=0, correction=0), torch.ones(5), atol=1e-2, rtol=0)
    assert (z[:, 5] == 0).all()  # does not vary, and is not blown up
    assert {"centre", "spread"} <= set(head.state_dict())


def test_normalised_embeddings_are_what_is_classified():
    head = make()
    z, logits = head(torch.randn(5, 6), normalise=True)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(logits, head.classifier(z))


def test_dropout_acts_in_training_alone():
    head, cells = make(dropout=0.5), torch.randn(5, 6)
    torch.testing.assert_close(head(cells)[0], make()(cells)[0])
    head.train()
    assert (head(cells)[0] != head(cells)[0]).any()
