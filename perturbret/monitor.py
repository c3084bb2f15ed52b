"""What early stopping looks at: validation cells, ranked by the same code as queries are."""

import numpy as np
import pandas as pd
import torch

from .batches import plan_batches
from .finetune import Validation
from .losses import classification, contrastive
from .model import Model
from .prepare import Cells, Prepared
from .queries import by_name
from .settings import Settings
from .validation import best_readout


class _Live:
    """The encoder that a model is at the moment, knowing the embeddings of some cells by name."""

    kind = "scgpt"
    log_prior = None

    def __init__(self, names: np.ndarray, embeddings: np.ndarray, model: Model, prepared: Prepared):
        self._rows = pd.Series(np.arange(len(names)), index=names)
        self._embeddings, self._model = embeddings, model
        self.head, self.classes, self.context = model.head.classifier, prepared.candidates, prepared.context

    def embed(self, cells: Cells) -> np.ndarray:
        return self._embeddings[self._rows.loc[cells.names].to_numpy()]

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = self._model.head.classify(
                torch.from_numpy(embeddings).to(self._model.head.centre.device)
            )
            return logits.cpu().double().log_softmax(dim=1).numpy()


def make_validation(prepared: Prepared, model: Model, options: Settings, seed: int) -> Validation:
    """exact_hit@1 by the code of notebook 05, and the loss, of single validation cells.

    Read-out: the classifier; without one, cosine to the mean of training cells.
    """
    # Cells of conditions without training cells are ranked too, and have no loss.
    val = by_name(prepared, prepared.where("val"))
    trained = np.isin(prepared.conditions[val], prepared.candidates)
    val, others = val[trained], val[~trained]
    labels = np.searchsorted(prepared.candidates, prepared.conditions[val])
    by_class = options.loss != "contrastive"
    train_cells = np.empty(0, int) if by_class else prepared.where("train")
    index = np.concatenate([val, others, train_cells])
    sizes = {"batch_size": options.batch_size, "cells_per_condition": options.cells_per_condition}
    plan = plan_batches(labels, sampler=options.sampler, **sizes, seed=seed, epoch=0)

    def score(embeddings: np.ndarray, logits: np.ndarray | None) -> tuple[float, float]:
        model.eval()
        live = _Live(prepared.cells.names[index], embeddings, model, prepared)
        _, hit = best_readout(live, prepared, seed=seed, scorings=("classifier" if by_class else "cosine",))
        z, targets = torch.from_numpy(embeddings[: len(val)]), torch.from_numpy(labels)
        losses = []
        with torch.inference_mode():
            for batch in plan:
                loss = 0.0
                if logits is not None:
                    loss += classification(
                        torch.from_numpy(logits[batch]), targets[batch], options.label_smoothing
                    ).item()
                if model.head.log_scale is not None:
                    loss += contrastive(z[batch], targets[batch], model.head.scale.cpu()).item()
                losses.append(loss)
        return hit, float(np.mean(losses))

    return Validation(index, score)
