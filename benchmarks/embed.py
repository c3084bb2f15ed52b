"""Cells per second of `perturbret.networks.embedding.embed` against the scgpt package, same weights and cells.

    PERTURBRET_DATA=... python benchmarks/embed.py [--device cpu|cuda] [--precision float32|bfloat16] [--cells 6]

The network has the shape of the whole-human checkpoint (12 layers, 8 heads, d = 512, 60,697 tokens) and random weights,
on which time does not depend. Cells: 10x PBMC with about 1,300 detected genes, cut to 1,200 tokens, and a panel of 303
genes. Contestants take turns (A B C A B C ...); medians are printed, of seconds and of the ratios within a round, so
that other work on the machine slows all alike. Each begins with counts and ends with embeddings; files, weights and the
matching of genes are read before.

- `perturbret`: `tokenize`, then `embed`.
- `embed_data`: `scgpt.tasks.embed_data` as it is installed, timed from where its weights are loaded. It draws ties and
  the genes of long cells at random, so its embeddings are near ours and not equal; given our way with ties, they are
  equal on cells that are not cut, which is checked.
- `stock encoder`: the official network (`torch.nn.TransformerEncoder`, on its fused path) on our tokens in our batches:
  what is left when tokens and batches are the same.

What scgpt's import needs and does not find is stood in for as in tests/scgpt_oracle.py: torchtext's table of tokens,
and two names of `datasets`. Flash attention is not used by either side.
"""

import argparse
import contextlib
import io
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import torch

from perturbret.data.prepared import Cells
from perturbret.networks import embedding as embeddings
from perturbret.networks.embedding import embed
from perturbret.networks.inputs import like_batches
from perturbret.scgpt.checkpoint import load_checkpoint, save_checkpoint
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.tokens import bin_values, tokenize
from perturbret.scgpt.vocabulary import PAD, load_vocabulary, map_genes

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = {"PBMC": "pretrain/pbmc_10x_soupx.h5ad", "303-gene panel": "papalexi2021_thp1_303genes.h5ad"}
PANEL_CELLS = 16  # cells of the panel for each of PBMC: they are so much shorter
ARGS = {"n_bins": 51, "max_seq_len": 1200, "pad_value": -2, "n_layers_cls": 3, "input_style": "binned"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--cells", type=int, default=6, help=f"PBMC; of the panel {PANEL_CELLS} times as many"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    data = Path(os.environ.get("PERTURBRET_DATA") or "PERTURBRET_DATA is unset")
    missing = [name for name in WORKLOADS.values() if not (data / name).is_file()]
    if missing:
        print(f"not measured: expected {' and '.join(missing)} in PERTURBRET_DATA, got {data}")
        return 0
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*(nested tensor|torch.cuda.amp|pin_memory).*")
    print(
        f"{machine(options.device)}; torch {torch.__version__}, {options.threads} threads, {options.precision}"
    )
    if options.precision == "bfloat16" and options.device == "cpu" and not has_bfloat16():
        print(
            "this CPU has neither avx512_bf16 nor amx_bf16: bfloat16 is emulated, and its speed says nothing"
        )
    with tempfile.TemporaryDirectory() as folder:
        directory = write_checkpoint(Path(folder) / "whole-human-shape")
        ours = load_checkpoint(directory, report=lambda line: None)
        ours.network.to(options.device)
        for name, file in WORKLOADS.items():
            n_cells = options.cells * (1 if name == "PBMC" else PANEL_CELLS)
            cells, token_ids = read_cells(data / file, n_cells, ours.vocabulary)
            compare(name, cells, token_ids, ours, directory, options)
        reading_again(data / WORKLOADS["303-gene panel"], ours, Path(folder) / "cache")
    if options.device == "cuda":
        share_of_peak(ours.network)
    return 0


def write_checkpoint(directory: Path) -> Path:
    """A checkpoint in the official layout with the shape of the whole-human one, from seed 0."""
    vocabulary = load_vocabulary()
    torch.manual_seed(0)
    network = ScGPT(Shape(len(vocabulary), 512, 8, 512, 12, 0.2, vocabulary.ids[PAD]))
    save_checkpoint(directory, network, vocabulary, ARGS)
    # embed_data reads this name alone.
    torch.save(network.state_dict(), directory / "best_model.pt")
    (directory / "best_model.safetensors").unlink()
    return directory


def read_cells(path: Path, n_cells: int, vocabulary) -> tuple[Cells, np.ndarray]:
    """Random cells of a file, reduced to the genes that have a token, and these tokens."""
    adata = anndata.read_h5ad(path)
    chosen = np.sort(np.random.default_rng(0).choice(adata.n_obs, min(n_cells, adata.n_obs), replace=False))
    adata = adata[chosen].copy()
    counts = adata.X.tocsr()
    genes = adata.var_names.to_numpy(str)
    token_ids = map_genes(genes, vocabulary).token_ids
    known = np.flatnonzero(token_ids >= 0)
    totals = np.asarray(counts.sum(axis=1)).ravel()
    names = adata.obs_names.to_numpy(str)
    return Cells(counts[:, known].tocsr(), totals, genes[known], names), token_ids[known]


def compare(name, cells, token_ids, ours, directory, options) -> None:
    """Time the contestants on one workload, and compare what they give."""
    tokens = tokenize(cells, token_ids, ours.vocabulary, **ours.token_settings)
    lengths = tokens.lengths
    print(f"\n{name}: {len(cells)} cells, {np.mean(lengths):.0f} tokens per cell, longest {lengths.max()}")
    official = Official(directory, options.device)
    adata = official_input(cells, token_ids, ours.vocabulary)

    def perturbret():
        made = tokenize(cells, token_ids, ours.vocabulary, **ours.token_settings)
        return embed(ours.network, made, normalise=True, precision=options.precision)

    contestants = {
        "perturbret": lambda: timed(perturbret),
        "embed_data": lambda: official.embed_data(adata),
        "stock encoder": lambda: timed(official.encode, tokens),
    }
    seconds = {contestant: [] for contestant in contestants}
    results = {}
    for _ in range(options.rounds):
        for contestant, run in contestants.items():
            results[contestant], took = run()
            seconds[contestant].append(took)
    print(f"  {'':16s} {'cells/s':>8s}   {'seconds':24s} perturbret is faster by")
    for contestant, took in seconds.items():
        listed = " ".join(f"{second:.2f}" for second in took)
        # Within a round, since other work on the machine comes and goes.
        faster = statistics.median(np.divide(took, seconds["perturbret"]))
        rate = len(cells) / statistics.median(took)
        print(f"  {contestant:16s} {rate:8.2f}   {listed:24s} {faster:.2f} x")
    mine = results["perturbret"]
    print(f"  largest difference to the stock encoder: {np.abs(mine - results['stock encoder']).max():.1e}")
    print(f"  for comparison, between any two cells at least: {nearest_pair(mine):.1e}")
    print(f"  cosine to embed_data, ties and genes drawn at random: {cosines(mine, results['embed_data'])}")
    whole = np.flatnonzero(lengths < ARGS["max_seq_len"])
    same, _ = official.embed_data(adata[whole].copy(), ties=bin_values)
    difference = np.abs(mine[whole] - same).max()
    print(f"  largest difference to embed_data with our ties, {len(whole)} cells not cut: {difference:.1e}")
    other = "float32" if options.precision == "bfloat16" else "bfloat16"
    few = tokenize(
        cells.take(np.arange(min(8, len(cells)))), token_ids, ours.vocabulary, **ours.token_settings
    )
    pair = [embed(ours.network, few, normalise=True, precision=kind) for kind in (options.precision, other)]
    print(f"  cosine of float32 to bfloat16, {len(few)} cells: {cosines(*pair)}")


def official_input(cells: Cells, token_ids: np.ndarray, vocabulary) -> anndata.AnnData:
    """The same cells as embed_data takes them: log1p of counts per 10,000, genes by the names of their tokens."""
    scaled = cells.counts.astype(np.float32)
    scaled.data = np.log1p(
        scaled.data / np.repeat(cells.totals / 1e4, np.diff(scaled.indptr)).astype(np.float32)
    )
    adata = anndata.AnnData(scaled)
    adata.obs_names = cells.names
    adata.var["feature_name"] = [vocabulary.tokens[i] for i in token_ids]
    return adata


class Official:
    """The scgpt package on one checkpoint."""

    def __init__(self, directory: Path, device: str):
        sys.path.insert(0, str(ROOT / "tests"))
        from scgpt_oracle import scgpt

        logging.getLogger("scGPT").setLevel(logging.WARNING)
        self.module = scgpt.tasks.cell_emb
        self.collator = scgpt.data_collator
        self.directory, self.device = directory, torch.device(device)
        self.seen = []

    def embed_data(self, adata: anndata.AnnData, ties=None) -> tuple[np.ndarray, float]:
        """Embeddings, and the seconds after the weights were loaded.

        ties: bins of values in place of scgpt's, which spreads equal values at random.
        """
        inner, binning = self.module.get_batch_cell_embeddings, self.collator.binning

        def observed(*arguments, **keywords):
            self.network = keywords["model"]
            self.seen.append(timed(inner, *arguments, **keywords))
            return self.seen[-1][0]

        def settled(row, n_bins):
            ends = np.array([0, len(row)])
            return torch.from_numpy(bin_values(row.numpy(), ends, n_bins).astype(np.int64))

        self.module.get_batch_cell_embeddings = observed
        if ties is not None:
            self.collator.binning = settled
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
                self.module.embed_data(
                    adata.copy(), self.directory, device=self.device, use_fast_transformer=False
                )
        finally:
            self.module.get_batch_cell_embeddings, self.collator.binning = inner, binning
        return self.seen[-1]

    def encode(self, tokens, batch_tokens: int = 16384) -> np.ndarray:
        """The official network on our tokens and batches, scaled to length 1."""
        found = np.empty((len(tokens), 512), np.float32)
        with torch.no_grad():
            for index in like_batches(tokens.lengths, batch_tokens):
                genes, values, padding = tokens.padded(index)
                padding = np.zeros(genes.shape, bool) if padding is None else padding
                block = (torch.from_numpy(array).to(self.device) for array in (genes, values, padding))
                found[index] = self.network._encode(*block)[:, 0].cpu().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def reading_again(path: Path, ours, directory: Path) -> None:
    """Seconds of a second `cached_embed` on a whole screen; the first gets noise for embeddings, to be there sooner."""
    cells, token_ids = read_cells(path, 10**9, ours.vocabulary)
    tokens = tokenize(cells, token_ids, ours.vocabulary, **ours.token_settings)
    noise = np.random.default_rng(0).standard_normal((len(cells), 512), dtype=np.float32)
    original, embeddings.embed = embeddings.embed, lambda *arguments, **keywords: noise
    try:
        embeddings.cached_embed(ours.network, tokens, directory=directory, normalise=True)
    finally:
        embeddings.embed = original
    found, took = timed(embeddings.cached_embed, ours.network, tokens, directory=directory, normalise=True)
    same = "the same bits" if found.tobytes() == noise.tobytes() else "OTHER BITS"
    print(f"\ncached_embed, second call, {len(cells):,} cells x 512: {took:.2f} s, {same}")


def share_of_peak(network: ScGPT) -> None:
    """Floating-point operations per second in bfloat16, as a share of what one large matrix product reaches.

    A token costs 2 (4 d^2 + 2 d d_hid) + 4 L d in each layer, L being the length of its cell: projections of queries,
    keys, values and output, the feed-forward part, then the products of attention. Of the last layer, only what leads
    to `<cls>` is computed: for all rows 6 d^2, for one the rest. Norms, values' encoder and lookups count as nothing.
    """
    shape, device = network.shape, "cuda"
    d, d_hid, layers = shape.d_model, shape.d_hid, shape.n_layers
    left = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    peak = 2 * 8192**3 / seconds_on_device(lambda: left @ left)
    print(f"\nbfloat16 product of 8192 x 8192 matrices: {peak / 1e12:.0f} TFLOP/s")
    for length in (400, 800, 1200):
        n_cells = 131072 // length
        genes = torch.randint(0, 60000, (n_cells, length), device=device)
        values = torch.randint(1, 51, (n_cells, length), device=device).float()
        every = n_cells * length * (2 * (4 * d * d + 2 * d * d_hid) + 4 * length * d)
        last = n_cells * (length * 6 * d * d + 4 * length * d + 2 * d * d + 4 * d * d_hid)

        def forward(genes=genes, values=values):
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                network(genes, values)

        took = seconds_on_device(forward)
        rate = (every * (layers - 1) + last) / took
        print(
            f"{length} tokens: {n_cells / took:.0f} cells/s, {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of it"
        )


def seconds_on_device(step, repeats: int = 10) -> float:
    """Median seconds of `step` on the GPU, after two runs that do not count."""
    taken = []
    for _ in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[2:])


def timed(step, *arguments, **keywords):
    """The result of `step`, and its seconds."""
    started = time.perf_counter()
    result = step(*arguments, **keywords)
    return result, time.perf_counter() - started


def cosines(left: np.ndarray, right: np.ndarray) -> str:
    found = (left * right).sum(axis=1)
    return f"median {np.median(found):.5f}, lowest {found.min():.5f}"


def nearest_pair(cells: np.ndarray) -> float:
    """Largest difference in any number between the two cells in which it is smallest."""
    apart = [np.abs(cells[i + 1 :] - cells[i]).max(axis=1).min() for i in range(len(cells) - 1)]
    return float(min(apart))


def has_bfloat16() -> bool:
    """Whether Linux says that the CPU multiplies bfloat16."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


def machine(device: str) -> str:
    return (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    sys.exit(main())
