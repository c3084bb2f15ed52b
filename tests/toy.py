"""Prepared cells and an encoder small enough to reason about, for tests of scoring and evaluation."""

import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from socket import socket

import numpy as np
from scipy.sparse import csr_matrix

from perturbret.data.conditions import CTRL
from perturbret.data.prepared import Cells, Context, Prepared


def toy_cells(conditions, roles, *, counts=None, batch=None, obsm=None, names=None) -> Prepared:
    """Cells with the given labels and roles; by default each is named by its number and counts one UMI."""
    conditions, roles = np.asarray(conditions, str), np.asarray(roles, "U8")
    n = len(conditions)
    counts = np.ones((n, 1)) if counts is None else np.asarray(counts)
    cells = Cells(
        csr_matrix(counts.astype(np.float32)),
        counts.sum(axis=1).astype(float),
        np.array([f"gene{i}" for i in range(counts.shape[1])]),
        np.array([f"cell{i:05d}" for i in range(n)]) if names is None else np.asarray(names, str),
        None if batch is None else np.asarray(batch, str),
        {} if obsm is None else obsm,
    )
    context = Context("toy", "data", "in_dist-seed0", "split", "all_targets", counts.shape[1], "genes")
    candidates = tuple(sorted(set(conditions[roles == "train"]) - {CTRL}))
    return Prepared(cells, conditions, roles, candidates, {}, context)


def toy_screen(n_train=20, n_query=10, conditions=("A", "A+B", "B", "C", "D"), controls=5, batches=0):
    """Labels, roles and batches of a balanced screen with some controls."""
    labels, roles = [], []
    for condition in conditions:
        labels += [condition] * (n_train + n_query)
        roles += ["train"] * n_train + ["query"] * n_query
    labels += [CTRL] * 2 * controls
    roles += ["train"] * controls + ["query"] * controls
    batch = [f"batch{i % batches}" for i in range(len(labels))] if batches else None
    return {"conditions": np.array(labels), "roles": np.array(roles), "batch": batch}


def reordered(prepared: Prepared, order: np.ndarray) -> Prepared:
    """The same cells in another order."""
    conditions, roles = prepared.conditions[order], prepared.roles[order]
    return Prepared(
        prepared.cells.take(order), conditions, roles, prepared.candidates, prepared.columns, prepared.context
    )


class ToyEncoder:
    """Embeds by a function of Cells; `weights` (d, C) make a softmax head."""

    kind = "toy"

    def __init__(self, prepared: Prepared, embed, *, weights=None, log_prior=None):
        self.context, self.classes = prepared.context, prepared.candidates
        self.function, self.head, self.log_prior = embed, weights, log_prior

    def embed(self, cells: Cells) -> np.ndarray:
        return np.asarray(self.function(cells), np.float32)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        logits = embeddings.astype(np.float64) @ self.head
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def from_obsm(key: str = "x"):
    """An embedding that is stored with the cells."""
    return lambda cells: cells.obsm[key]


def tiny_screen(*, cells_per_condition: int = 36, seed: int = 0):
    """A simulated screen: 5 conditions, 24 genes, effects that even a tiny network learns."""
    from perturbret.data.simulate import simulate_screen

    return simulate_screen(
        n_singles=4,
        n_doubles=1,
        n_genes=24,
        cells_per_condition=cells_per_condition,
        n_control=10,
        n_batches=1,
        effect=3.0,
        unresponsive=0.0,
        measured_targets=0.5,
        seed=seed,
    )


def tiny_prepared(
    *, mask: str = "all_targets", cells_per_condition: int = 36, seed: int = 0, train_share: float = 1.0
) -> Prepared:
    """Masked cells of `tiny_screen`."""
    from perturbret.data.prepared import prepare
    from perturbret.data.splits import make_split

    screen = tiny_screen(cells_per_condition=cells_per_condition, seed=seed)
    split = make_split(screen.obs, track="in_dist", seed=0)
    return prepare(screen, split, mask=mask, train_share=train_share)


def gene_space(**changes):
    """Three genes of two datasets: one with a column each, the other with a summed gene and one not measured."""
    from perturbret.alignment.gene_space import ColumnMap, GeneSpace, hash_genes

    one = ColumnMap(
        ((2,), (0,), (1,)), (("C",), ("A",), ("B",)), 4, hash_genes("ABCD"), 7, "all", "f0", 0.1,
        (0.1, 1 / 3, 1e-300), (0.2, 2 / 3, 5e300), (1, 2, 7),
    )  # fmt: skip
    other = ColumnMap(
        ((0, 5), (), (3,)), (("C", "C"), (), ("b",)), 6, hash_genes("CxxbxC"), 9, "train", "f1", 1 / 7,
        (1.5, None, 2.0), (0.0, None, 2.5), (3, None, 0),
    )  # fmt: skip
    table = {"dispersion": (1 / 3, 0.1, 2.0), "rank": (1, None, 2), "perturbed": (True, False, True)}
    ids, maps = ("ENSG00000000003", None, None), {"a": one, "b": other}
    return replace(GeneSpace(("C", "A", "B"), ids, maps, table, {"screen": "a"}, ("few",)), **changes)


def write_tiny_checkpoint(directory, genes, *, seed: int = 0, n_layers: int = 2):
    """A checkpoint of random weights in the official layout: some genes and the special tokens, d = 16."""
    import torch

    from perturbret.scgpt.checkpoint import save_checkpoint
    from perturbret.scgpt.network import ScGPT, Shape
    from perturbret.scgpt.vocabulary import PAD, SPECIALS, Vocabulary

    vocabulary = Vocabulary((*sorted(map(str, genes)), *SPECIALS), "toy")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ScGPT(Shape(len(vocabulary), 16, 2, 16, n_layers, 0.1, vocabulary.ids[PAD]))
        for weight in network.parameters():
            # Larger than torch makes them, so that cells of random networks differ by more than rounding.
            weight.data.add_(torch.empty_like(weight).uniform_(-0.3, 0.3))
    save_checkpoint(
        directory, network, vocabulary, {"n_bins": 51, "max_seq_len": 1200, "input_style": "binned"}
    )
    return directory


def tiny_tokens(n_cells: int = 32, *, seed: int = 0):
    """Sequences of 3 to 8 random tokens of a vocabulary of 20 genes and 3 special tokens."""
    from perturbret.scgpt.tokens import Tokens

    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 9, n_cells)
    genes = np.concatenate([[21, *rng.permutation(20)[: n - 1]] for n in lengths])
    values = np.concatenate([[-2, *rng.integers(1, 50, n - 1)] for n in lengths])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(genes.astype(np.int32), values.astype(np.float32), indptr, 23, 20, -2)


def tiny_model(
    loss: str, *, layers=(), start: int | None = 0, n_classes: int = 4, dropout=0.0, head_dropout=0.0
):
    """A network for `tiny_tokens` with adapters that have an effect, and a head; always the same weights."""
    import torch

    from perturbret.networks.adapters import add_lora, freeze, trainable
    from perturbret.networks.heads import Head, HeadedNetwork
    from perturbret.scgpt.network import ScGPT, Shape

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ScGPT(Shape(23, 16, 2, 16, 2, dropout, 20))
        freeze(network)
        add_lora(network, targets=["Wqkv", "linear2"], layers=layers, rank=2, alpha=4.0, dropout=0.0)
        for name, weight in trainable(network).items():
            if "lora_B" in name:
                torch.nn.init.uniform_(weight, -0.3, 0.3)
        head = Head(16, n_classes, depth=1, width=8, dim=6, dropout=head_dropout, loss=loss, temperature=0.2)
    return HeadedNetwork(network, head, pooling="cls", normalise=False, start=start)


def run_two(script, *arguments):
    """Run a script as two processes on the CPU that torch.distributed joins; both must end well."""
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    tests = Path(__file__).parent
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)


def labelled(obs, groups=None):
    """Names and labels as a track gets them."""
    from perturbret.data.tracks import Labelled

    return Labelled(obs, groups)


def environment(**changes):
    """Of a new process that finds this package."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **changes}


def with_other_queries(screen, split):
    """The same screen with other counts in the query cells."""
    query = (split.roles == "query").to_numpy()
    counts = screen.counts.toarray()
    counts[query] = np.random.default_rng(0).poisson(3.0, counts[query].shape)
    return replace(screen, counts=csr_matrix(counts.astype(np.float32)), fingerprint=screen.fingerprint)
