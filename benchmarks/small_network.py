"""What a training step of the shipped checkpoint costs, and what its dropout and its parts of like length save.

    PERTURBRET_DATA=... python benchmarks/small_network.py [--rounds 15]

Everything is trained on batches of 64 random cells of a panel of 303 genes: forward, cross-entropy, backward, clipping
and AdamW. Ways take turns (A B C A B C ...); medians are printed, of CPU seconds and of the ratios within a round.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F

from perturbret.data.datasets import load_screen
from perturbret.data.prepared import prepare
from perturbret.data.sources import find_checkpoint
from perturbret.data.splits import get_split
from perturbret.networks import heads
from perturbret.networks.adapters import trainable
from perturbret.networks.encoder import build_network
from perturbret.networks.inputs import to_device
from perturbret.networks.training import classification, make_optimiser
from perturbret.scgpt.backbone import backbone_for
from perturbret.scgpt.network import Dropout
from perturbret.scgpt.settings import ScGPTSettings
from perturbret.scgpt.tokens import tokenize

FILE = "papalexi2021_thp1_303genes.h5ad"
N_CLASSES = 25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not (Path(os.environ.get("PERTURBRET_DATA") or "unset") / FILE).is_file():
        print(f"not measured: expected {FILE} in PERTURBRET_DATA")
        return 0
    torch.set_num_threads(1)
    screen = load_screen("thp1")
    with tempfile.TemporaryDirectory() as folder:
        split = get_split(screen, track="in_dist", seed=0, directory=folder)
    prepared = prepare(screen, split, mask="all_targets")
    settings = ScGPTSettings.read({"mode": "full"})
    backbone = backbone_for(
        prepared.cells.genes,
        checkpoint=find_checkpoint("small"),
        init="pretrained",
        seed=0,
        dropout=settings.dropout,
        report=print,
    )
    tokens = tokenize(prepared.cells, backbone.token_ids, backbone.vocabulary, **backbone.token_settings)
    torch.manual_seed(0)
    network = build_network(backbone, settings, N_CLASSES).train()
    weights = trainable(network)
    optimiser = make_optimiser(weights, settings)
    rng = np.random.default_rng(0)

    def step():
        cells = rng.choice(len(tokens), settings.batch_size, replace=False)
        _, logits = network(*to_device(tokens.padded(cells), "cpu"))
        classification(logits, torch.arange(len(cells)) % N_CLASSES, 0.1).backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip)
        optimiser.step()
        optimiser.zero_grad()

    def torchs(self, values):
        return F.dropout(values, self.p, self.training)

    ways = {
        "perturbret": (Dropout.forward, heads.PART_TOKENS),
        "torch's dropout": (torchs, heads.PART_TOKENS),
        "whole batches": (Dropout.forward, 10**9),
        "both": (torchs, 10**9),
    }
    seconds = {way: [] for way in ways}
    for number in range(options.rounds + 2):
        for way, (dropout, part) in ways.items():
            with patch.object(Dropout, "forward", dropout), patch.object(heads, "PART_TOKENS", part):
                before = time.process_time()
                step()
                if number > 1:  # the first ones warm up
                    seconds[way].append(time.process_time() - before)
    for way, took in seconds.items():
        ratio = statistics.median(np.divide(took, seconds["perturbret"]))
        rate = settings.batch_size / statistics.median(took)
        print(f"{way:16s} {rate:7.0f} cells per CPU second   {ratio:.2f} x the CPU time of perturbret")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
