"""The official scgpt package, imported as an oracle.

Its own requirements do not install beside a current torch: torchtext is archived and its extension does not load.
All that scgpt takes from torchtext is a table of tokens, and from `datasets` two names that only its training data
use. Stand-ins take their places while it is imported, and are gone afterwards.

    from scgpt_oracle import scgpt, load_official
"""

import importlib
import json
import sys
import types
import warnings
from importlib.util import find_spec

import pytest


class Vocab:
    """Tokens and their ids, with those methods of `torchtext.vocab.Vocab` that scgpt calls."""

    def __init__(self, tokens):
        tokens = tokens.get_itos() if hasattr(tokens, "get_itos") else list(tokens)
        self._tokens, self._default = tokens, None
        self._ids = {token: i for i, token in enumerate(tokens)}

    @property
    def vocab(self):
        return self

    def __len__(self):
        return len(self._tokens)

    def __contains__(self, token):
        return token in self._ids

    def __getitem__(self, token):
        return self._ids[token] if self._default is None else self._ids.get(token, self._default)

    def __call__(self, tokens):
        return [self[token] for token in tokens]

    def insert_token(self, token, index):
        if index != len(self) or token in self:
            raise ValueError(f"{token!r} at {index}: expected a new token at {len(self)}")
        self._ids[token] = index
        self._tokens.append(token)

    def append_token(self, token):
        self.insert_token(token, len(self))

    def set_default_index(self, index):
        self._default = index

    def get_itos(self):
        return list(self._tokens)

    def get_stoi(self):
        return dict(self._ids)


def _import():
    if find_spec("scgpt") is None:
        pytest.skip("scgpt, the oracle, is not installed", allow_module_level=True)
    torchtext, vocab, datasets = map(types.ModuleType, ("torchtext", "torchtext.vocab", "datasets"))
    vocab.Vocab, torchtext.vocab = Vocab, vocab
    vocab.vocab = lambda counts, min_freq=1: Vocab(token for token, n in counts.items() if n >= min_freq)
    datasets.Dataset = datasets.load_dataset = None
    standins = {module.__name__: module for module in (torchtext, vocab, datasets)}
    before = {name: sys.modules.get(name) for name in standins}
    sys.modules.update(standins)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("scgpt")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


scgpt = _import()


def official_model(n_genes=100, d_model=32, n_heads=4, d_hid=48, n_layers=3, dropout=0.2, seed=0):
    """An official network in evaluation mode and its vocabulary; no weight is left at 0 or 1, where errors hide."""
    import torch

    vocab = {f"g{i}": i for i in range(n_genes)}
    vocab |= {"<pad>": n_genes, "<cls>": n_genes + 1, "<eoc>": n_genes + 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = scgpt.model.TransformerModel(
            len(vocab),
            d_model,
            n_heads,
            d_hid,
            n_layers,
            vocab=vocab,
            dropout=dropout,
            pad_value=-2,
            do_mvc=True,
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return model.eval(), vocab


def load_official(directory):
    """The official model with the weights of a directory in the official layout, read by the official loader."""
    import torch

    args, ids = (json.loads((directory / name).read_text()) for name in ("args.json", "vocab.json"))
    model = scgpt.model.TransformerModel(
        ntoken=len(ids), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"], n_cls=1, vocab=Vocab(list(ids)), dropout=args["dropout"],
        pad_token=args["pad_token"], pad_value=args["pad_value"], do_mvc=True, use_fast_transformer=False,
    )  # fmt: skip
    weights = torch.load(directory / "best_model.pt", weights_only=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scgpt.utils.load_pretrained(model, weights, verbose=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # Norms start as what they may still be after a few steps.
    assert len(changed) >= len(weights) - 5
    return model.eval()
