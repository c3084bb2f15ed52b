"""What fine-tuning minimises: supervised contrastive loss, classification, or both."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive(embeddings: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE with all cells of an anchor's condition as positives, averaged over anchors that have one.

    For an anchor i with positives P(i): minus the mean over p in P(i) of
    log(exp(s z_i z_p) / sum over a != i of exp(s z_i z_a)); embeddings z are scaled to length 1, s is one over the
    temperature. Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, equation 2.

    Parameters
    ----------
    embeddings : Tensor, shape (n, d)
    labels : Tensor of int, shape (n,)
    scale : Tensor, scalar

    Returns
    -------
    Tensor, scalar
        0, with a gradient of 0, where no anchor has a positive: such a batch says nothing.
    """
    z = F.normalize(embeddings.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (scale * (z @ z.T)).masked_fill(itself, float("-inf"))
    positive = (labels[:, None] == labels) & ~itself
    log_share = logits.log_softmax(dim=1).masked_fill(~positive, 0.0)
    counts = positive.sum(dim=1)
    anchors = counts > 0
    if not anchors.any():
        return (embeddings.sum() + scale) * 0.0
    return -(log_share.sum(dim=1)[anchors] / counts[anchors]).mean()


def classification(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy against labels of which `label_smoothing` is spread evenly over all classes.

    Parameters
    ----------
    logits : Tensor, shape (n, C)
    labels : Tensor of int, shape (n,)
    label_smoothing : float
    """
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def carried_log_prior(shares: np.ndarray, label_smoothing: float) -> np.ndarray:
    """What a classifier trained by `classification` says of a cell that tells it nothing: the log of the mean label.

    Not of the classes' shares: smoothing gives rare classes more than that, and whoever takes the shares out again
    favours them, by as much as all that a shallow cell says.

    Parameters
    ----------
    shares : ndarray of float, shape (C,)
        Of training cells.
    label_smoothing : float
    """
    return np.log((1 - label_smoothing) * shares + label_smoothing / len(shares))
