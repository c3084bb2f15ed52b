"""scGPT as an encoder: a network with adapters or tuned layers, and heads; its embeddings are computed once and kept.

A file is taken for a result only when everything that the result depends on is the same and its checksum fits;
whatever else lies there is computed anew.
"""

import copy
import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax, logsumexp

from ..data.prepared import Cells, Context
from ..files.atomic import replacing, write_json
from ..files.provenance import code_hash
from .adapters import add_lora, freeze, trainable, unfreeze, unfreeze_last
from .checkpoint import Trunk
from .model import Head, Model, best_device, embed
from .network import ScGPT, Shape, fingerprint
from .settings import Settings, read_settings
from .tokens import Tokens, tokenize
from .vocabulary import Vocabulary

_SETTING = (bool, int, float, str, type(None))


def cached_embed(
    network: ScGPT,
    tokens: Tokens,
    *,
    directory: str | os.PathLike,
    normalise: bool,
    pooling: str = "cls",
    precision: str = "float32",
    batch_tokens: int = 16384,
) -> np.ndarray:
    """`perturbret.scgpt.model.embed`, read from `directory` where the same was computed before.

    The same: `embedding_key`. Not part of it are `batch_tokens`, the device and the number of threads, on which
    embeddings depend by rounding alone; the second call gives the bits that the first one got. Several processes may
    use one directory at once.

    Parameters
    ----------
    network : ScGPT
    tokens : Tokens
    directory : path
        Gets `embeddings-<key>.npy` and `embeddings-<key>.json`.
    normalise, pooling, precision, batch_tokens
        Of `perturbret.scgpt.model.embed`.

    Returns
    -------
    ndarray of float32, shape (len(tokens), d_model)

    Raises
    ------
    ValueError
        As `embedding_key` and `embed` do.
    OSError
        The directory cannot be written to.
    """
    key = embedding_key(network, tokens, normalise=normalise, pooling=pooling, precision=precision)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = Path(directory) / f"embeddings-{digest[:16]}.npy"
    found = _read(path, key, (len(tokens), network.shape.d_model))
    if found is not None:
        return found
    made = embed(
        network, tokens, normalise=normalise, pooling=pooling, precision=precision, batch_tokens=batch_tokens
    )
    buffer = io.BytesIO()
    np.save(buffer, made, allow_pickle=False)
    content = buffer.getvalue()
    # Two processes at once: where the array of one ends up beside the record of the other, checksums differ unless
    # the bits are equal, and the next call computes again.
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    write_json(
        path.with_suffix(".json"),
        {"key": key, "shape": list(made.shape), "sha256": hashlib.sha256(content).hexdigest()},
    )
    return made


def embedding_key(
    network: ScGPT, tokens: Tokens, *, normalise: bool, pooling: str = "cls", precision: str = "float32"
) -> dict[str, str | bool]:
    """All that embeddings depend on, by name.

    `weights`: names, shapes and bytes; `modules`: classes and settings of the modules, such as the number of heads or
    an adapter's scale, which no weight shows; `tokens`: their content; `code`: the modules of perturbret between tokens
    and embeddings; `normalise`, `pooling`, `precision`.

    Raises
    ------
    ValueError
        A module has forward hooks: what they do cannot be told from its weights and settings.
    """
    return {
        "weights": fingerprint(network),
        "modules": hashlib.sha256(json.dumps(_modules(network)).encode()).hexdigest(),
        "tokens": tokens.hash,
        "pooling": pooling,
        "normalise": bool(normalise),
        "precision": precision,
        "code": code_hash("scgpt.model:embed", "scgpt.network"),
    }


def _modules(network: ScGPT) -> list:
    """Name, class and settings of each module."""
    described = []
    for name, module in network.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                f"network: expected no forward hooks, on which embeddings would depend unseen; got some on {name!r}"
            )
        settings = {key: kept for key, value in vars(module).items() if (kept := _setting(value)) is not None}
        settings.pop("training", None)  # embed leaves training mode for as long as it takes
        described.append([name, f"{type(module).__module__}.{type(module).__qualname__}", settings])
    return described


def _setting(value) -> str | None:
    """A plain value, or a collection of such, as text; None for whatever has no fixed text, such as modules."""
    if isinstance(value, _SETTING):
        return repr(value)
    if isinstance(value, list | tuple) and value and all(isinstance(item, _SETTING) for item in value):
        return repr(list(value))
    if isinstance(value, dict) and value and all(isinstance(item, _SETTING) for item in value.values()):
        return repr(sorted((str(key), item) for key, item in value.items()))
    return None


def _read(path: Path, key: dict, shape: tuple[int, int]) -> np.ndarray | None:
    """The kept embeddings, or None where there are none, or none that are whole and of this key."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        content = path.read_bytes()
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("key") != key:
        return None
    if record.get("sha256") != hashlib.sha256(content).hexdigest():
        return None
    found = np.load(io.BytesIO(content), allow_pickle=False)
    return found if found.shape == shape and found.dtype == np.float32 else None


@dataclass(frozen=True)
class ScGPTEncoder:
    """Masked cells -> tokens -> network -> head.

    Attributes
    ----------
    kind : str
    settings : mapping
        `chosen`: all settings, and after which epoch each member's training stopped.
    options : Settings
    trunk : Trunk
        The network before anything was trained.
    members : tuple of Model
        Trained from different random numbers; embeddings are put side by side, probabilities averaged.
    classes : tuple of str
    log_prior : ndarray of float64, shape (C,), or None
        Log of what the classifier gives each class before it sees a cell; None where all classes get the same.
    context : Context
    cache : pathlib.Path or None
        Where tokens and embeddings are kept; None: nowhere.
    """

    kind: str
    settings: dict
    options: Settings
    trunk: Trunk
    members: tuple[Model, ...]
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
        if cells.counts.shape[1] != self.context.n_genes:
            raise ValueError(f"cells: expected {self.context.n_genes} genes, got {cells.counts.shape[1]}")
        tokens = tokenize(
            cells,
            self.trunk.token_ids,
            self.trunk.vocabulary,
            directory=self.cache,
            **self.trunk.token_settings,
        )
        options = {"normalise": False, "pooling": self.options.pooling, "precision": self.options.precision}
        found, parts = {}, []
        for member in self.members:
            network = member.network
            if id(network) not in found:
                if self.cache is None:
                    found[id(network)] = embed(network, tokens, **options)
                else:
                    found[id(network)] = cached_embed(network, tokens, directory=self.cache, **options)
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
        trunk = self.trunk
        description = {
            "format": "scgpt.encoder",
            "kind": self.kind,
            "settings": self.settings,
            "options": asdict(self.options),
            "shape": asdict(trunk.network.shape),
            "vocabulary": list(trunk.vocabulary.tokens),
            "token_ids": trunk.token_ids.tolist(),
            "token_settings": trunk.token_settings,
            "origin": trunk.origin,
            "n_members": len(self.members),
            "classes": list(self.classes),
            "log_prior": None if self.log_prior is None else self.log_prior.tolist(),
            "context": asdict(self.context),
        }
        with replacing(directory) as temporary:
            temporary.mkdir()
            save_file(_plain(trunk.network.state_dict()), temporary / "network.safetensors")
            for i, member in enumerate(self.members):
                save_file(_plain(_own_tensors(member)), temporary / f"member{i}.safetensors")
            text = json.dumps(description, indent=2, allow_nan=False) + "\n"
            (temporary / "encoder.json").write_text(text, encoding="utf-8")


def build_model(trunk: Trunk, options: Settings, n_classes: int) -> Model:
    """The network of a mode with its head, what is to be trained marked so; random numbers from torch's generator."""
    frozen = options.mode in ("frozen", "head")
    network = trunk.network if frozen else copy.deepcopy(trunk.network)
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
            network.shape.d_model,
            n_classes,
            depth=options.head_depth,
            width=options.head_width,
            dim=options.head_dim,
            dropout=options.head_dropout,
            loss=options.loss,
            temperature=options.temperature,
        )
    model = Model(network, head, pooling=options.pooling, normalise=options.normalise, start=start)
    return model.to(network.encoder.embedding.weight.device)


def load(directory: str | os.PathLike, *, cache: Path | None = None) -> ScGPTEncoder:
    """Read what `ScGPTEncoder.save` wrote; equal to the saved one, bit by bit.

    Raises
    ------
    ValueError
        A file lacks a tensor, or has one that the settings do not call for.
    """
    directory = Path(directory)
    saved = json.loads((directory / "encoder.json").read_text(encoding="utf-8"))
    options = read_settings(saved["options"])
    network = ScGPT(Shape(**saved["shape"])).eval()
    network.load_state_dict(load_file(directory / "network.safetensors"))
    network.to(best_device())
    trunk = Trunk(
        network,
        Vocabulary(tuple(saved["vocabulary"]), str(directory)),
        np.array(saved["token_ids"], np.int64),
        saved["token_settings"],
        saved["origin"],
    )
    members = []
    for i in range(saved["n_members"]):
        model = build_model(trunk, options, len(saved["classes"]))
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
    return ScGPTEncoder(
        kind=saved["kind"],
        settings=saved["settings"],
        options=options,
        trunk=trunk,
        members=tuple(members),
        classes=tuple(saved["classes"]),
        log_prior=None if saved["log_prior"] is None else np.array(saved["log_prior"]),
        context=Context(**saved["context"]),
        cache=cache,
    )


def _retrieval(member: Model, cells: np.ndarray) -> np.ndarray:
    if member.head is None:
        lengths = np.linalg.norm(cells, axis=1, keepdims=True) if member.normalise else 1.0
        return (cells / lengths).astype(np.float32)
    with torch.inference_mode():
        cells = torch.from_numpy(cells).to(member.head.centre.device)
        return member.eval().head(cells, normalise=member.normalise)[0].cpu().numpy()


def _own_tensors(model: Model) -> dict[str, torch.Tensor]:
    """Trained tensors of a member, and the constants of its head."""
    buffers = {} if model.head is None else {f"head.{n}": b for n, b in model.head.named_buffers()}
    return {**trainable(model), **buffers}


def _plain(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
