"""Embeddings computed once and kept on disk, found again by what they were made from.

A file is taken for a result only when everything that the result depends on is the same and its checksum fits;
whatever else lies there is computed anew.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np

from .atomic import replacing, write_json
from .model import embed
from .network import ScGPT, fingerprint
from .tokens import Tokens

_CODE = ("model.py", "network.py", "tokens.py")  # from tokens to embeddings
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
    """`perturbret.model.embed`, read from `directory` where the same was computed before.

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
        Of `perturbret.model.embed`.

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
    here = Path(__file__)
    code = b"\0".join(here.with_name(name).read_bytes() for name in _CODE)
    return {
        "weights": fingerprint(network),
        "modules": hashlib.sha256(json.dumps(_modules(network)).encode()).hexdigest(),
        "tokens": tokens.hash,
        "pooling": pooling,
        "normalise": bool(normalise),
        "precision": precision,
        "code": hashlib.sha256(code).hexdigest(),
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
