"""A network with adapters or tuned layers, and heads, as an encoder; and how it is saved and loaded."""

import copy
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, logsumexp

from ..data.prepared import Cells, Context
from ..files.atomic import replacing
from .adapters import add_lora, freeze, trainable, unfreeze, unfreeze_last
from .backbone import Backbone
from .embedding import cached_embed
from .families import NETWORKS
from .heads import Head, HeadedNetwork
from .settings import Settings


@dataclass(frozen=True)
class TunedEncoder:
    """Masked cells -> what the network reads -> network -> head.

    Attributes
    ----------
    kind : str
        Name of the family.
    settings : mapping
        `chosen`: all settings, and after which epoch each member's training stopped.
    options : Settings
    backbone : Backbone
        With the network before anything was trained.
    members : tuple of HeadedNetwork
        Trained from different random numbers; embeddings are put side by side, probabilities averaged.
    classes : tuple of str
    log_prior : ndarray of float64, shape (C,), or None
        Log of what the classifier gives each class before it sees a cell; None where all classes get the same.
    context : Context
    cache : pathlib.Path or None
        Where inputs and embeddings are kept; None: nowhere.
    """

    kind: str
    settings: dict
    options: Settings
    backbone: Backbone
    members: tuple[HeadedNetwork, ...]
    classes: tuple[str, ...]
    log_prior: np.ndarray | None
    context: Context
    cache: Path | None = None

    @property
    def head(self):
        """Something where there is a classifier, else None."""
        head = self.members[0].head
        return None if head is None else head.classifier

    def embed(self, cells: Cells) -> np.ndarray:
        """Embeddings of masked cells, float32 (n, d); a cell's does not depend on the others beyond rounding (1e-5).

        Raises
        ------
        ValueError
            The cells have another number of genes than those the encoder was fitted on.
        """
        self.context.check_genes(cells)
        inputs = self.backbone.inputs(cells, directory=self.cache)
        options = {"normalise": False, "pooling": self.options.pooling, "precision": self.options.precision}
        found, parts = {}, []
        for member in self.members:
            network = member.network
            if id(network) not in found:
                found[id(network)] = cached_embed(network, inputs, directory=self.cache, **options)
            parts.append(_retrieval(member, found[id(network)]))
        return np.concatenate(parts, axis=1)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray | None:
        """Log of the members' mean probabilities of `classes`, float64 (n, C); None without a classifier."""
        if self.head is None:
            return None
        found = []
        for member, part in zip(
            self.members, np.split(np.asarray(embeddings), len(self.members), axis=1), strict=True
        ):
            with torch.inference_mode():
                part = torch.from_numpy(np.ascontiguousarray(part, np.float32))
                logits = member.eval().head.classify(part.to(member.head.centre.device)).cpu()
            found.append(log_softmax(logits.double().numpy(), axis=1))
        return logsumexp(found, axis=0) - np.log(len(found))

    def save(self, directory: str | os.PathLike) -> None:
        """Write `encoder.json`, `network.safetensors` (before training) and the trained tensors of each member."""
        description = {
            "format": "networks.encoder",
            "kind": self.kind,
            "settings": self.settings,
            "options": self.options.model_dump(),
            "backbone": self.backbone.describe(),
            "n_members": len(self.members),
            "classes": list(self.classes),
            "log_prior": None if self.log_prior is None else self.log_prior.tolist(),
            "context": asdict(self.context),
        }
        with replacing(directory) as temporary:
            temporary.mkdir()
            save_file(_plain(self.backbone.network.state_dict()), temporary / "network.safetensors")
            for i, member in enumerate(self.members):
                save_file(_plain(_own_tensors(member)), temporary / f"member{i}.safetensors")
            text = json.dumps(description, indent=2, allow_nan=False) + "\n"
            (temporary / "encoder.json").write_text(text, encoding="utf-8")


def build_network(backbone: Backbone, options: Settings, n_classes: int) -> HeadedNetwork:
    """The network of a mode with its head, what is to be trained marked so; random numbers from torch's generator."""
    frozen = options.mode in ("frozen", "head")
    network = backbone.network if frozen else copy.deepcopy(backbone.network)
    freeze(network)
    start: int | None = None
    if options.mode == "lora_head":
        start = add_lora(
            network,
            targets=options.lora_targets,
            layers=options.lora_layers,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.lora_dropout,
        )
    elif options.mode == "last_n":
        start = unfreeze_last(network, options.last_layers)
    elif options.mode == "full":
        start = unfreeze(network)
    head = None
    if options.mode != "frozen":
        head = Head(
            network.width,
            n_classes,
            depth=options.head_depth,
            width=options.head_width,
            dim=options.head_dim,
            dropout=options.head_dropout,
            loss=options.loss,
            temperature=options.temperature,
        )
    whole = HeadedNetwork(network, head, pooling=options.pooling, normalise=options.normalise, start=start)
    return whole.to(next(network.parameters()).device)


def load(directory: str | os.PathLike, *, cache: Path | None = None) -> TunedEncoder:
    """Read what `TunedEncoder.save` wrote; equal to the saved one, bit by bit.

    Raises
    ------
    ValueError
        The family is unknown; a file lacks a tensor, or has one that the settings do not call for.
    """
    directory = Path(directory)
    saved = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    family = NETWORKS.get(saved["kind"])
    if family is None:
        raise ValueError(f"{directory}: expected an encoder of {', '.join(NETWORKS)}, got {saved['kind']!r}")
    options = family.settings.read(saved["options"])
    weights = load_file(directory / "network.safetensors")
    backbone = family.backbone.load(saved["backbone"], weights, directory)
    members = []
    for i in range(saved["n_members"]):
        model = build_network(backbone, options, len(saved["classes"]))
        own, found = _own_tensors(model), load_file(directory / f"member{i}.safetensors")
        if own.keys() != found.keys():
            odd = sorted(own.keys() ^ found.keys())
            raise ValueError(
                f"{directory}: expected the tensors of mode {options.mode} in member {i}, odd: {odd[:5]}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        members.append(model.eval())
    return TunedEncoder(
        kind=saved["kind"],
        settings=saved["settings"],
        options=options,
        backbone=backbone,
        members=tuple(members),
        classes=tuple(saved["classes"]),
        log_prior=None if saved["log_prior"] is None else np.array(saved["log_prior"]),
        context=Context(**saved["context"]),
        cache=cache,
    )


def _retrieval(member: HeadedNetwork, cells: np.ndarray) -> np.ndarray:
    if member.head is None:
        lengths = np.linalg.norm(cells, axis=1, keepdims=True) if member.normalise else 1.0
        return (cells / lengths).astype(np.float32)
    with torch.inference_mode():
        cells = torch.from_numpy(cells).to(member.head.centre.device)
        return member.eval().head(cells, normalise=member.normalise)[0].cpu().numpy()


def _own_tensors(model: HeadedNetwork) -> dict[str, torch.Tensor]:
    """Trained tensors of a member, and the constants of its head."""
    buffers = {} if model.head is None else {f"head.{n}": b for n, b in model.head.named_buffers()}
    return {**trainable(model), **buffers}


def _plain(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
