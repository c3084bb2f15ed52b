"""Cells per second of LoRA training against peft on the official network: same weights, cells, batches and loss.

    PERTURBRET_DATA=... python benchmarks/finetune.py [--device cpu|cuda] [--precision float32|bfloat16] [--cells 8]

The network has the shape of the whole-human checkpoint (12 layers, 8 heads, d = 512) over the tokens of the panel, and
random weights, on which time does not depend. Adapters of rank 16 sit on all four projections of every layer; a linear
classifier on `<cls>` is trained with them. One step is forward, cross-entropy, backward, clipping and AdamW. Cells: a
panel of 303 genes, and 10x PBMC cut to 400 tokens. Contestants take turns (A B A B ...); medians are printed, of
seconds and of the ratios within a round, so that other work on the machine slows both alike. On a crowded machine the
ratio of CPU seconds is the better guide.

- `perturbret`: the network and the adapters that `perturbret.networks.fit` trains.
- `peft on stock`: scgpt's own network (`torch.nn.TransformerEncoder`), adapters by peft on its `self_attn` (whose two
  projections peft's wrapper adapts together), `linear1` and `linear2`, cells padded to the longest of the batch as the
  official collator does. Dropout 0 on both sides, which peft asks for there.

Before timing, losses and gradients of the two are compared. peft 0.21.2 adds the adapter of out_proj twice there: its
`MultiheadAttention.merge` adds the product, then calls out_proj's own merge, which adds it again, without a gradient. B
is halved on its side, so that both compute the same; A then has half the gradient.
"""

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from perturbret.data.prepared import Cells
from perturbret.networks.adapters import add_lora, freeze, trainable
from perturbret.networks.embedding import autocast
from perturbret.networks.heads import Head, HeadedNetwork
from perturbret.networks.inputs import to_device
from perturbret.networks.training import classification
from perturbret.scgpt.backbone import restrict
from perturbret.scgpt.network import ScGPT, Shape
from perturbret.scgpt.tokens import Tokens, tokenize
from perturbret.scgpt.vocabulary import PAD, Vocabulary, load_vocabulary, map_genes

ROOT = Path(__file__).resolve().parents[1]
# Cells of a batch for each of --cells, longest sequence.
WORKLOADS = {
    "303-gene panel": ("papalexi2021_thp1_303genes.h5ad", 4, 1200),
    "PBMC, cut to 400": ("pretrain/pbmc_10x_soupx.h5ad", 1, 400),
}
SIZES = {"d_model": 512, "n_heads": 8, "d_hid": 512, "n_layers": 12}
RANK, ALPHA, N_CLASSES = 16, 32.0, 100
LENGTHS = (400, 1024)  # of the share of peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--cells", type=int, default=8, help="PBMC in a batch; of the panel 4 times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    data = Path(os.environ.get("PERTURBRET_DATA") or "PERTURBRET_DATA is unset")
    missing = [file for file, _, _ in WORKLOADS.values() if not (data / file).is_file()]
    if missing:
        print(f"not measured: expected {' and '.join(missing)} in PERTURBRET_DATA, got {data}")
        return 0
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*(nested tensor|torch.cuda.amp|pin_memory).*")
    name = (
        torch.cuda.get_device_name() if options.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    print(f"{name}; torch {torch.__version__}, {options.threads} threads, {options.precision}")
    if options.precision == "bfloat16" and options.device == "cpu" and not has_bfloat16():
        print(
            "this CPU has neither avx512_bf16 nor amx_bf16: bfloat16 is emulated, and its speed says nothing"
        )
    for name, (file, times, longest) in WORKLOADS.items():
        tokens, vocabulary = read_tokens(data / file, options.cells * times, longest)
        compare(name, tokens, vocabulary, options)
    if options.device == "cuda":
        share_of_peak()
    return 0


def read_tokens(path: Path, n_cells: int, longest: int) -> tuple[Tokens, Vocabulary]:
    """Random cells of a file, as tokens of a vocabulary that has those of the file's genes alone."""
    adata = anndata.read_h5ad(path)
    chosen = np.sort(np.random.default_rng(0).choice(adata.n_obs, n_cells, replace=False))
    adata = adata[chosen].copy()
    whole = load_vocabulary()
    genes = adata.var_names.to_numpy(str)
    token_ids = map_genes(genes, whole).token_ids
    known = np.flatnonzero(token_ids >= 0)
    vocabulary, rows = restrict(whole, token_ids)
    counts = adata.X.tocsr()
    totals = np.asarray(counts.sum(axis=1)).ravel()
    cells = Cells(counts[:, known].tocsr(), totals, genes[known], adata.obs_names.to_numpy(str))
    ids = np.searchsorted(rows, token_ids[known])
    return tokenize(cells, ids, vocabulary, max_seq_len=longest), vocabulary


class Stock(nn.Module):
    """The official network with a classifier on `<cls>`, called as `perturbret.networks.heads.HeadedNetwork` is."""

    def __init__(self, network: nn.Module, head: Head):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, genes, values, padding):
        padding = torch.zeros_like(genes, dtype=torch.bool) if padding is None else padding
        return self.head(self.network._encode(genes, values, padding)[:, 0])


def contestants(vocabulary: Vocabulary, device: str) -> dict[str, nn.Module]:
    """Both networks with the same weights, adapters and classifier."""
    sys.path.insert(0, str(ROOT / "tests"))
    from scgpt_oracle import scgpt

    torch.manual_seed(0)
    ours = ScGPT(Shape(len(vocabulary), **SIZES, dropout=0.0, pad_id=vocabulary.ids[PAD]))
    sizes = [SIZES[name] for name in ("d_model", "n_heads", "d_hid", "n_layers")]
    theirs = scgpt.model.TransformerModel(
        len(vocabulary), *sizes, vocab=vocabulary.ids, dropout=0.0, pad_value=-2
    )
    state = {name.replace("Wqkv.", "in_proj_"): value for name, value in ours.state_dict().items()}
    assert not theirs.load_state_dict(state, strict=False).unexpected_keys
    for network in (ours, theirs):
        freeze(network)
    add_lora(ours, targets=tuple(ScGPT.lora_targets), layers=(), rank=RANK, alpha=ALPHA, dropout=0.0)
    pattern = r"transformer_encoder\.layers\.\d+\.(self_attn|linear1|linear2)"
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=pattern), theirs)
    adapters = trainable(theirs)
    for name, weight in trainable(ours).items():
        nn.init.uniform_(weight, -0.02, 0.02)
        adapters[as_stock(name)].data.copy_(weight.data / (2 if "out_proj.lora_B" in name else 1))
    assert len(adapters) == len(trainable(ours)) == 2 * 4 * SIZES["n_layers"]
    head = Head(
        512, N_CLASSES, depth=0, width=1, dim=512, dropout=0.0, loss="classification", temperature=0.1
    )
    made = {
        "perturbret": HeadedNetwork(ours, copy.deepcopy(head), pooling="cls", normalise=False),
        "peft on stock": Stock(theirs, copy.deepcopy(head)),
    }
    return {name: model.to(device).train() for name, model in made.items()}


def as_stock(name: str) -> str:
    """What peft calls an adapter on the official network."""
    return name.replace("self_attn.Wqkv.", "self_attn.").replace(
        "self_attn.out_proj.", "self_attn.base_layer.out_proj."
    )


def compare(name: str, tokens: Tokens, vocabulary: Vocabulary, options) -> None:
    """Time steps of both on one batch, and compare what they compute."""
    block = to_device(tokens.padded(np.arange(len(tokens))), options.device)
    labels = torch.arange(len(tokens), device=options.device) % N_CLASSES
    print(
        f"\n{name}: {len(tokens)} cells, {tokens.lengths.mean():.0f} tokens, longest {tokens.lengths.max()}"
    )
    models = contestants(vocabulary, options.device)

    def loss_of(model):
        with autocast(torch.device(options.device), options.precision):
            _, logits = model(*block)
        return classification(logits, labels, 0.1)

    losses = {contestant: loss_of(model) for contestant, model in models.items()}
    for loss in losses.values():
        loss.backward()
    mine, theirs = (trainable(model) for model in models.values())
    apart = 0.0
    for own, weight in mine.items():
        other = theirs[as_stock(own)].grad * (2 if "out_proj.lora_A" in own else 1)
        apart = max(apart, float((weight.grad - other).norm() / weight.grad.norm()))
    print(
        f"  losses {', '.join(f'{loss.item():.6f}' for loss in losses.values())}; gradients differ by {apart:.0e}"
    )
    optimisers = {c: torch.optim.AdamW(trainable(model).values(), 1e-4) for c, model in models.items()}

    def step(contestant):
        weights = trainable(models[contestant]).values()
        optimisers[contestant].zero_grad()
        loss_of(models[contestant]).backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimisers[contestant].step()

    seconds, cpu = ({contestant: [] for contestant in models} for _ in range(2))
    for number in range(options.rounds + 1):
        for contestant in models:
            before = time.process_time()
            took = timed(step, contestant, options.device)
            if number:  # the first round warms up
                seconds[contestant].append(took)
                cpu[contestant].append(time.process_time() - before)
    print(f"  {'':16s} {'cells/s':>8s}   {'seconds':24s} perturbret is faster by; in CPU seconds")
    for contestant, took in seconds.items():
        faster, less = (
            statistics.median(np.divide(each[contestant], each["perturbret"])) for each in (seconds, cpu)
        )
        listed = " ".join(f"{second:.3g}" for second in took)
        rate = len(tokens) / statistics.median(took)
        print(f"  {contestant:16s} {rate:8.2f}   {listed:24s} {faster:.2f} x; {less:.2f} x")


def share_of_peak() -> None:
    """Floating-point operations per second of training in bfloat16, as a share of a large matrix product's.

    Of a cell of L tokens, a layer costs forwards L (8 d^2 + 4 d d_hid) for its projections and 4 L^2 d for the products
    of attention. Backwards, the projections cost as much again, since frozen weights need no gradient of their own, and
    attention twice as much. The first layer's Wqkv (6 d^2 a token) has nothing to train below it, and of the last layer
    only what leads to `<cls>` is computed: L 6 d^2 + 4 L d + 2 d^2 + 4 d d_hid forwards. An adapter of rank r between
    widths a and b costs 2 r (a + b) a token forwards and twice that backwards. What is computed again, as flash
    attention does backwards, and norms, lookups, classifier and optimiser count as nothing.
    """
    d, d_hid, layers = SIZES["d_model"], SIZES["d_hid"], SIZES["n_layers"]
    left = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / median_seconds(lambda: left @ left)
    print(f"\nbfloat16 product of 8192 x 8192 matrices: {peak / 1e12:.0f} TFLOP/s")
    whole = load_vocabulary()
    model = contestants(whole, "cuda")["perturbret"]
    optimiser = torch.optim.AdamW(trainable(model).values(), 1e-4)
    for length in LENGTHS:
        n_cells = 131072 // length
        genes = torch.randint(0, 60000, (n_cells, length), device="cuda")
        values = torch.randint(1, 51, (n_cells, length), device="cuda").float()
        labels = torch.arange(n_cells, device="cuda") % N_CLASSES

        def step(genes=genes, values=values, labels=labels):
            optimiser.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                _, logits = model(genes, values, None)
            classification(logits, labels, 0.1).backward()
            optimiser.step()

        took = median_seconds(step)
        adapters = 2 * RANK * (4 * d + 2 * d + 2 * (d + d_hid))
        every = 2 * length * (8 * d * d + 4 * d * d_hid) + 12 * length**2 * d + 3 * length * adapters
        last = 2 * (length * 6 * d * d + 2 * d * d + 4 * d * d_hid) + 12 * length * d
        last += 3 * length * 2 * RANK * 4 * d
        cost = n_cells * ((layers - 1) * every + last - length * 6 * d * d)
        rate = cost / took
        print(
            f"{length} tokens: {n_cells / took:.0f} cells/s, {rate / 1e12:.0f} TFLOP/s, {rate / peak:.0%} of it"
        )


def median_seconds(step, repeats: int = 10) -> float:
    """Median seconds of `step` on the GPU, after two runs that do not count."""
    return statistics.median([timed(step, None, "cuda") for _ in range(repeats + 2)][2:])


def timed(step, argument, device: str) -> float:
    started = time.perf_counter()
    step() if argument is None else step(argument)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def has_bfloat16() -> bool:
    """Whether Linux says that the CPU multiplies bfloat16."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    return "avx512_bf16" in text or "amx_bf16" in text


if __name__ == "__main__":
    sys.exit(main())
