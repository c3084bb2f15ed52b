"""Checkpoint directories in the official scGPT layout.

The official loader drops every tensor whose name or shape does not fit, and says nothing. Here each tensor is
accounted for, and what is not expected is an error.
"""

import json
import os
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..alignment.gene_space import SPACE_FILE, GeneSpace, to_json
from ..files.atomic import replacing, write_json
from .network import ScGPT, Shape
from .vocabulary import PAD, Vocabulary, load_vocabulary

WEIGHTS = ("best_model.pt", "best_model.safetensors")
# Parts of official checkpoints that no cell embedding passes through: decoders of the training tasks, and the flag of
# generative training.
UNUSED = ("decoder.", "cls_decoder.", "mvc_decoder.", "flag_encoder.")
# Settings that would make another network than the one here.
STYLE = {"input_emb_style": "continuous", "pre_norm": False, "domain_spec_batchnorm": False}
INPUTS = {"binned": "bins", "log1p": "log1p"}  # theirs -> values of perturbret.scgpt.tokens.tokenize
SIZES = {"d_model": "embsize", "n_heads": "nheads", "d_hid": "d_hid", "n_layers": "nlayers"}


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be."""


@dataclass(frozen=True)
class Account:
    """What became of the tensors of a checkpoint, by name.

    Attributes
    ----------
    loaded, unused, missing : tuple of str
        `unused` are those of known parts that embeddings do not need; `missing` is empty for a checkpoint that loads.
    n_values : int
        Numbers in the loaded tensors.
    """

    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    n_values: int

    def __str__(self) -> str:
        parts = Counter(name.partition(".")[0] for name in self.unused)
        unused = ", ".join(f"{part} {n}" for part, n in sorted(parts.items()))
        return (
            f"loaded {len(self.loaded)} tensors ({self.n_values:,} values); unused {len(self.unused)}"
            f"{f' ({unused})' if unused else ''}; missing {len(self.missing)}"
            f"{': ' + ', '.join(self.missing) if self.missing else ''}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A network with what belongs to it.

    Attributes
    ----------
    network : ScGPT
        In evaluation mode, float32, on the CPU.
    vocabulary : Vocabulary
    args : dict
        Content of args.json.
    account : Account
    """

    network: ScGPT
    vocabulary: Vocabulary
    args: dict
    account: Account

    @property
    def token_settings(self) -> dict:
        """Settings of `perturbret.scgpt.tokens.tokenize` for the tokens that this network was trained on."""
        names = ("n_bins", "max_seq_len", "pad_value")
        settings = {name: self.args[name] for name in names if name in self.args}
        return {"values": INPUTS[self.args.get("input_style", "binned")], **settings}


def load_checkpoint(directory: str | os.PathLike, *, report=print) -> Checkpoint:
    """Read a checkpoint directory, official or written by `save_checkpoint`.

    Attention weights may have the names of flash-attention builds (`Wqkv`) or of torch builds (`in_proj_`).

    Parameters
    ----------
    directory : path
    report : callable
        Gets the account of loaded, unused and missing tensors as one line of text.

    Raises
    ------
    FileNotFoundError
        A file of the layout is missing.
    CheckpointError
        args.json lacks a size or asks for another kind of network; there are several weight files, or one that holds
        anything but named tensors; a tensor is missing, unknown, of another shape than args.json and vocab.json say,
        or not of floating point.
    """
    directory = Path(directory)
    args = _read_args(directory / "args.json")
    vocabulary = load_vocabulary(directory)
    shape = _read_shape(args, vocabulary)
    path = _weights_file(directory)
    tensors = {}
    for name, tensor in _read_tensors(path).items():
        ours = name.replace("self_attn.in_proj_", "self_attn.Wqkv.")
        if ours in tensors:
            raise CheckpointError(f"{path}: expected one of {ours} and its torch name {name}, got both")
        tensors[ours] = tensor
    with torch.device("meta"):  # nothing is initialised that is replaced at once
        network = ScGPT(shape)
    wanted = network.state_dict()
    unused = tuple(sorted(name for name in tensors if name.startswith(UNUSED) and name not in wanted))
    unknown = sorted(set(tensors) - set(wanted) - set(unused))
    account = Account(
        loaded=tuple(name for name in wanted if name in tensors),
        unused=unused,
        missing=tuple(name for name in wanted if name not in tensors),
        n_values=sum(tensors[name].numel() for name in wanted if name in tensors),
    )
    if unknown or account.missing:
        raise CheckpointError(f"{path}: {account}; unknown {len(unknown)}: {', '.join(unknown[:10])}")
    for name, expected in wanted.items():
        if tensors[name].shape != expected.shape:
            raise CheckpointError(
                f"{path}: expected {name} of shape {tuple(expected.shape)} by args.json and the vocabulary of "
                f"{len(vocabulary)} tokens, got {tuple(tensors[name].shape)}"
            )
        if not tensors[name].is_floating_point():
            raise CheckpointError(
                f"{path}: expected numbers of floating point in {name}, got {tensors[name].dtype}"
            )
    network.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    report(f"{path}: {account}")
    return Checkpoint(network.eval(), vocabulary, args, account)


def save_checkpoint(
    directory: str | os.PathLike,
    network: ScGPT,
    vocabulary: Vocabulary,
    args: Mapping | None = None,
    *,
    decoders: Mapping[str, torch.Tensor] | None = None,
    half: bool = False,
    official: bool = False,
    space: GeneSpace | None = None,
) -> None:
    """Write a network as `args.json`, `vocab.json` and `best_model.safetensors`, atomically.

    Parameters
    ----------
    directory : path
        Replaced as a whole where it exists.
    network : ScGPT
    vocabulary : Vocabulary
    args : mapping, optional
        Further settings for args.json, `n_bins` and `max_seq_len` among them; sizes are taken from the network.
    decoders : mapping of str to Tensor, optional
        Tensors of the training tasks' decoders, under their official names.
    half : bool
        In half precision.
    official : bool
        Weights as `best_model.pt`, which the official package reads, in place of safetensors.
    space : GeneSpace, optional
        That the weights were trained in: its file goes with them, and other panels are refused.

    Raises
    ------
    CheckpointError
        The vocabulary is not that of the network.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.scgpt import ScGPT, Shape, Vocabulary
    >>> vocabulary = Vocabulary(("HBG1", "KLF1", "<pad>", "<cls>", "<eoc>"), "two genes")
    >>> network = ScGPT(Shape(5, d_model=16, n_heads=2, d_hid=16, n_layers=1, dropout=0.1, pad_id=2))
    >>> with TemporaryDirectory() as directory:
    ...     save_checkpoint(f"{directory}/tiny", network, vocabulary)
    ...     loaded = load_checkpoint(f"{directory}/tiny", report=str)
    >>> loaded.vocabulary.genes
    ('HBG1', 'KLF1')
    """
    shape = network.shape
    if (len(vocabulary), vocabulary.ids[PAD]) != (shape.n_tokens, shape.pad_id):
        raise CheckpointError(
            f"vocabulary: expected {shape.n_tokens} tokens with {PAD} at {shape.pad_id}, got {len(vocabulary)} with "
            f"{PAD} at {vocabulary.ids[PAD]}"
        )
    sizes = {theirs: getattr(shape, ours) for ours, theirs in SIZES.items()}
    content = {**STYLE, "pad_token": PAD, **(args or {}), **sizes, "dropout": shape.dropout}
    tensors = {
        name: tensor.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()
        for name, tensor in {**network.state_dict(), **(decoders or {})}.items()
    }
    with replacing(directory) as temporary:
        temporary.mkdir()
        for name, value in (("args.json", content), ("vocab.json", vocabulary.ids)):
            (temporary / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        if space is not None:
            write_json(temporary / SPACE_FILE, to_json(space))
        if official:
            torch.save(tensors, temporary / "best_model.pt")
        else:
            save_file(tensors, temporary / "best_model.safetensors")


def _read_shape(args: Mapping, vocabulary: Vocabulary) -> Shape:
    """Sizes of the network that args.json describes.

    Raises
    ------
    CheckpointError
        A size is missing or impossible, or the network is of another kind.
    """
    missing = [name for name in (*SIZES.values(), "dropout") if name not in args]
    if missing:
        raise CheckpointError(f"args.json: expected {', '.join(missing)}")
    for name, expected in STYLE.items():
        if args.get(name, expected) != expected:
            raise CheckpointError(f"args.json: expected {name} {expected!r}, got {args[name]!r}")
    if args.get("pad_token", PAD) != PAD:
        raise CheckpointError(f"args.json: expected pad_token {PAD!r}, got {args['pad_token']!r}")
    if args.get("input_style", "binned") not in INPUTS:
        raise CheckpointError(
            f"args.json: expected input_style {' or '.join(INPUTS)}, got {args['input_style']!r}"
        )
    sizes = {ours: args[theirs] for ours, theirs in SIZES.items()}
    wrong = [f"{SIZES[ours]} {size!r}" for ours, size in sizes.items() if type(size) is not int]
    if wrong:
        raise CheckpointError(f"args.json: expected whole numbers, got {', '.join(wrong)}")
    try:
        return Shape(n_tokens=len(vocabulary), **sizes, dropout=args["dropout"], pad_id=vocabulary.ids[PAD])
    except ValueError as error:
        raise CheckpointError(f"args.json: {error}") from error


def _read_args(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: expected args.json, found none at {path}")
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(args, dict):
        raise CheckpointError(f"{path}: expected an object of settings, got {str(args)[:80]}")
    return args


def read_tensors(directory: str | os.PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory by their names in the file; errors as of `load_checkpoint`."""
    return _read_tensors(_weights_file(Path(directory)))


def _weights_file(directory: Path) -> Path:
    found = [name for name in WEIGHTS if (directory / name).is_file()]
    if not found:
        raise FileNotFoundError(f"checkpoint: expected {' or '.join(WEIGHTS)} in {directory}, found neither")
    if len(found) > 1:
        raise CheckpointError(f"{directory}: expected one file of weights, found {' and '.join(found)}")
    return directory / found[0]


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: expected named tensors and nothing else; {first}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected named tensors, got {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: expected named tensors, got {type(value).__name__} as {name!r}")
    return dict(content)
