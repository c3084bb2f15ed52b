"""Encoders: from masked cells to embeddings and, where there is a head, to log-probabilities of conditions."""

import importlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, hstack, issparse
from scipy.special import log_softmax, logsumexp

from ..data.prepared import Cells, Context
from ..files.atomic import replacing
from ..files.places import PACKAGE
from ..files.plugins import load_plugins

_PACKAGE = __package__.partition(".")[0]
NAMES = ("constant", "log1p", "log1p_depth", "counts", "depth", "batch", "obsm:<key>")


def compute_features(name: str, cells: Cells, settings: Mapping) -> csr_matrix | np.ndarray:
    """Features `name` of every cell, one row per cell, each row a function of that cell alone.

    Parameters
    ----------
    name : str
        `constant`: one column of ones. `log1p`, `depth`: see the functions of that name; `log1p` takes `target_sum`
        from `settings`, and `columns` where only some genes are to be used. `log1p_depth`: the same, then the two
        columns of `depth`. `counts`: UMIs, of `columns` where given, then the cell's total. `batch`: one column per
        batch in `settings["batches"]`, 1 for the cell's own. `obsm:<key>`: the given embedding.
    cells : Cells
    settings : mapping

    Returns
    -------
    csr_matrix (for log1p, log1p_depth and counts) or ndarray, float32, shape (n, p)

    Raises
    ------
    ValueError
        Unknown name, or the cells have no such embedding.

    Examples
    --------
    >>> from scipy.sparse import csr_matrix
    >>> from perturbret.data import Cells
    >>> counts = csr_matrix(np.array([[1, 0, 3], [0, 2, 0]], np.float32))
    >>> cells = Cells(counts, np.array([4.0, 2.0]), np.array(["HBG1", "HBZ", "KLF1"]), np.array(["a", "b"]))
    >>> compute_features("counts", cells, {}).toarray()
    array([[1., 0., 3., 4.],
           [0., 2., 0., 2.]], dtype=float32)
    >>> compute_features("log1p", cells, {"target_sum": 4}).toarray().round(3)
    array([[0.693, 0.   , 1.386],
           [0.   , 1.609, 0.   ]], dtype=float32)
    """
    if name == "constant":
        return np.ones((len(cells), 1), np.float32)
    if name in ("log1p", "log1p_depth", "counts"):
        values = cells.counts if name == "counts" else log1p(cells, settings["target_sum"])
        values = values if settings.get("columns") is None else values[:, settings["columns"]]
        if name == "log1p":
            return values
        more = depth(cells) if name == "log1p_depth" else cells.totals[:, None].astype(np.float32)
        return hstack([values, csr_matrix(more)], format="csr")
    if name == "depth":
        return depth(cells)
    if name == "batch":
        return one_hot(cells, settings["batches"])
    if name.startswith("obsm:"):
        key = name.removeprefix("obsm:")
        if key not in cells.obsm:
            raise ValueError(f"obsm: expected one of {sorted(cells.obsm)}, got {key!r}")
        values = np.asarray(cells.obsm[key], np.float32)
        return values.reshape(len(cells), -1)
    raise ValueError(f"features: expected one of {NAMES}, got {name!r}")


def log1p(cells: Cells, target_sum: float) -> csr_matrix:
    """log(1 + counts / total * target_sum), the total being that of the whole transcriptome where it is known.

    On a panel of few genes the panel's own sum is a poor size factor: it cost 3 points of exact_hit@1 on real
    cells with 15 detected genes of 500 (docs/log.md).
    """
    scale = target_sum / np.where(cells.totals > 0, cells.totals, 1.0)
    values = np.log1p(cells.counts.data * np.repeat(scale, np.diff(cells.counts.indptr)))
    return csr_matrix(
        (values.astype(np.float32), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape
    )


def depth(cells: Cells) -> np.ndarray:
    """log(1 + total) and log(1 + number of detected genes): all that shows of a cell but its expression."""
    detected = np.diff(cells.counts.indptr)
    return np.log1p(np.column_stack([cells.totals, detected])).astype(np.float32)


def one_hot(cells: Cells, batches: Sequence[str]) -> np.ndarray:
    """A row of zeros for a batch that is not listed; one column of ones where the screen has no batches."""
    if cells.batch is None or not len(batches):
        return np.ones((len(cells), 1), np.float32)
    return (cells.batch[:, None] == np.asarray(batches, str)).astype(np.float32)


_CHUNK_VALUES = 8_000_000


class Transform:
    """One step from features to an embedding: a frozen dataclass whose fields are arrays or JSON values.

    Its arrays are saved as tensors, its other fields in encoder.json with its module and name, so that a new kind of
    step needs no code here.
    """

    @property
    def width(self) -> int:
        """Values per cell that it holds at a time."""
        raise NotImplementedError

    def __call__(self, values) -> np.ndarray:
        """Rows (n, p) of a csr_matrix or ndarray to rows (n, d); a row does not depend on the others."""
        raise NotImplementedError


@dataclass(frozen=True)
class Layer(Transform):
    """x -> x @ weight + bias, or x * weight + bias where `weight` is a vector; then max(0, .) where `relu`.

    Attributes
    ----------
    weight : ndarray of float32, shape (p, d) or (d,)
    bias : ndarray of float32, shape (d,)
    relu : bool
    """

    weight: np.ndarray
    bias: np.ndarray
    relu: bool = False

    def __post_init__(self):
        object.__setattr__(self, "weight", np.ascontiguousarray(self.weight, np.float32))
        object.__setattr__(self, "bias", np.ascontiguousarray(self.bias, np.float32))
        if self.weight.ndim not in (1, 2) or self.bias.shape != self.weight.shape[-1:]:
            raise ValueError(
                f"layer: expected a weight (p, d) or (d,) and a bias (d,), got {self.weight.shape} and "
                f"{self.bias.shape}"
            )

    @property
    def width(self) -> int:
        return len(self.bias)

    def __call__(self, values) -> np.ndarray:
        """Apply to a csr_matrix or ndarray (n, p), in float64: rounding to float32 afterwards then hides the order of
        sums, which depends on how many rows a matrix product gets."""
        if self.weight.ndim == 1:
            values = values.toarray() if issparse(values) else values
            values = values * self.weight.astype(np.float64)
        else:
            values = np.asarray(values.astype(np.float64) @ self.weight.astype(np.float64))
        values += self.bias
        return np.maximum(values, 0, out=values) if self.relu else values


def identity(n: int) -> Layer:
    """The layer of `n` values that changes nothing."""
    return Layer(np.ones(n), np.zeros(n))


@dataclass(frozen=True)
class Encoder:
    """Features, then layers to an embedding, then optionally a head to log-probabilities.

    Attributes
    ----------
    kind : str
        Name of the method.
    features : str
        A name that `perturbret.encoders.base.compute_features` knows.
    settings : mapping
        What the features need, and the hyperparameters chosen; JSON-able.
    layers : tuple of Transform
        None: the features are the embedding.
    head : Layer or None
        Embedding to unnormalised log-probabilities of `classes`.
    classes : tuple of str
    log_prior : ndarray of float64, shape (C,), or None
        Log share of each class among training cells; None where the head does not carry it.
    context : Context
    """

    kind: str
    features: str
    settings: Mapping
    layers: tuple[Transform, ...]
    head: Layer | None
    classes: tuple[str, ...]
    log_prior: np.ndarray | None
    context: Context

    def __post_init__(self):
        if self.head is not None and len(self.head.bias) != len(self.classes):
            raise ValueError(f"head: expected {len(self.classes)} classes, got {len(self.head.bias)}")

    def embed(self, cells: Cells) -> np.ndarray:
        """Embeddings of masked cells, float32 (n, d); a cell's does not depend on the others.

        Raises
        ------
        ValueError
            The cells have another number of genes than those the encoder was fitted on.
        """
        self.context.check_genes(cells)
        widths = [layer.width for layer in self.layers]
        step = max(64, _CHUNK_VALUES // max([512, *widths]))
        starts = range(0, max(len(cells), 1), step)
        return np.concatenate([self._embed(cells.take(np.s_[start : start + step])) for start in starts])

    def _embed(self, cells: Cells) -> np.ndarray:
        values = compute_features(self.features, cells, self.settings)
        for layer in self.layers:
            values = layer(values)
        return (values.toarray() if issparse(values) else values).astype(np.float32)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray | None:
        """Log-probabilities of `classes`, float64 (n, C); None without a head."""
        if self.head is None:
            return None
        return log_softmax(self.head(np.asarray(embeddings)), axis=1)

    def save(self, directory: str | os.PathLike) -> None:
        """Write `encoder.json` and `weights.safetensors` to `directory`, atomically."""
        from safetensors.numpy import save_file

        arrays, steps = {}, []
        for i, layer in enumerate(self.layers):
            values = {part.name: getattr(layer, part.name) for part in fields(layer)}
            plain = {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}
            arrays |= {f"layers.{i}.{name}": values[name] for name in values.keys() - plain.keys()}
            steps.append(
                {"module": type(layer).__module__, "name": type(layer).__qualname__, "fields": plain}
            )
        if self.head is not None:
            arrays |= {"head.weight": self.head.weight, "head.bias": self.head.bias}
        if self.log_prior is not None:
            arrays["log_prior"] = np.ascontiguousarray(self.log_prior, np.float64)
        description = {
            "format": "layers",
            "kind": self.kind,
            "features": self.features,
            "settings": dict(self.settings),
            "layers": steps,
            "classes": list(self.classes),
            "context": asdict(self.context),
        }
        with replacing(directory) as temporary:
            temporary.mkdir()
            save_file(arrays, temporary / "weights.safetensors")
            write_description(temporary, description)


@dataclass(frozen=True)
class Average:
    """The mean of several encoders' class probabilities; the embedding is its logarithm.

    Attributes
    ----------
    kind : str
    settings : mapping
        `chosen`: the hyperparameters; JSON-able.
    members : tuple of Encoder
        With heads, of the same classes and context.
    """

    kind: str
    settings: Mapping
    members: tuple[Encoder, ...]

    def __post_init__(self):
        if not self.members or any(member.head is None for member in self.members):
            raise ValueError("members: expected at least one encoder, each with class probabilities")
        made_for = {(member.classes, member.context) for member in self.members}
        if len(made_for) > 1:
            raise ValueError(f"members: expected the same classes and context, got {len(made_for)} of them")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.members[0].classes

    @property
    def context(self) -> Context:
        return self.members[0].context

    @property
    def log_prior(self) -> np.ndarray | None:
        """Of the first member; None where one of them does not carry it."""
        carried = all(member.log_prior is not None for member in self.members)
        return self.members[0].log_prior if carried else None

    @property
    def head(self) -> str:
        """Something: there is a classifier."""
        return "average"

    def embed(self, cells: Cells) -> np.ndarray:
        """Logarithms of the mean probabilities, float32 (n, C); errors as for `Encoder.embed`."""
        found = [member.log_proba(member.embed(cells)) for member in self.members]
        return (logsumexp(found, axis=0) - np.log(len(found))).astype(np.float32)

    def log_proba(self, embeddings: np.ndarray) -> np.ndarray:
        """Log-probabilities of `classes`, float64 (n, C)."""
        return log_softmax(np.asarray(embeddings, np.float64), axis=1)

    def save(self, directory: str | os.PathLike) -> None:
        """Write `encoder.json` and a folder per member to `directory`, atomically."""
        description = {
            "format": "average",
            "kind": self.kind,
            "settings": dict(self.settings),
            "n_members": len(self.members),
        }
        with replacing(directory) as temporary:
            temporary.mkdir()
            for i, member in enumerate(self.members):
                member.save(temporary / f"member{i}")
            write_description(temporary, description)


def write_description(directory: Path, description: dict) -> None:
    """Write encoder.json, by which `load_encoder` knows what else lies in a directory."""
    text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    (directory / "encoder.json").write_text(text, encoding="utf-8")


def load_encoder(run_directory: str | os.PathLike, name: str = "encoder", *, cache: Path | None = None):
    """The encoder that a run saved: what evaluation gets, whatever the method.

    Parameters
    ----------
    run_directory : path
        outputs/<dataset>/<run>
    name : str
        Folder within it: `encoder`, or `null_encoder` for the one fitted on permuted labels.
    cache : path, optional
        Where an encoder whose embeddings take long may keep them, found again by content.

    Returns
    -------
    Encoder, or an object with the same `embed`, `log_proba`, `classes`, `log_prior` and `context`
        Equal to the saved one, bit by bit.

    Raises
    ------
    FileNotFoundError
        There is no saved encoder.
    ValueError
        It has a format that this version does not read.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.data import make_split, prepare, simulate_screen
    >>> from perturbret.encoders import fit_baseline
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, n_genes=20, cells_per_condition=20)
    >>> prepared = prepare(screen, make_split(screen.obs, seed=0), mask="all_targets")
    >>> encoder = fit_baseline("mean_shift", prepared, seed=0).encoder
    >>> with TemporaryDirectory() as directory:
    ...     encoder.save(f"{directory}/encoder")
    ...     loaded = load_encoder(directory)
    >>> bool((loaded.embed(prepared.cells) == encoder.embed(prepared.cells)).all())
    True
    """
    directory = Path(run_directory) / name
    path = directory / "encoder.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{directory}: expected a saved encoder, found no encoder.json; fit the run first"
        )
    saved = json.loads(path.read_text(encoding="utf-8"))
    form = str(saved.get("format"))
    if form == "layers":
        return _load_layers(directory, saved)
    if form == "average":
        members = tuple(load_encoder(directory, f"member{i}") for i in range(saved["n_members"]))
        return Average(saved["kind"], saved["settings"], members)
    # A family of its own names its module, whose `load` reads it: of this package, whatever a file says.
    named = re.fullmatch(r"([a-z_]+)\.([a-z_]+)", form)
    if not named or not (PACKAGE / named[1] / f"{named[2]}.py").is_file():
        raise ValueError(
            f"{path}: expected format 'layers', 'average' or a module of {_PACKAGE}, got {saved.get('format')!r}"
        )
    return importlib.import_module(f"{_PACKAGE}.{form}").load(directory, cache=cache)


def without_cache(encoder):
    """The same encoder, computing every embedding anew."""
    return replace(encoder, cache=None) if getattr(encoder, "cache", None) else encoder


def _load_layers(directory: Path, saved: dict) -> Encoder:
    from safetensors.numpy import load_file

    arrays = load_file(directory / "weights.safetensors")
    return Encoder(
        kind=saved["kind"],
        features=saved["features"],
        settings=saved["settings"],
        layers=tuple(_load_step(step, arrays, f"layers.{i}.") for i, step in enumerate(saved["layers"])),
        head=Layer(arrays["head.weight"], arrays["head.bias"]) if "head.weight" in arrays else None,
        classes=tuple(saved["classes"]),
        log_prior=arrays.get("log_prior"),
        context=Context(**saved["context"]),
    )


def _load_step(step: dict, arrays: dict[str, np.ndarray], prefix: str) -> Transform:
    """The step that a file describes; nothing but a `Transform` of this package or of a plug-in is made."""
    package, _, module = step["module"].rpartition(".")
    where = load_plugins().get(step["module"])
    if package == __package__ and module.isidentifier():
        where = importlib.import_module(step["module"])
    found = getattr(where, step["name"], None)
    if not isinstance(found, type) or not issubclass(found, Transform):
        raise ValueError(f"layers: expected steps of {__package__}, got {step['module']}.{step['name']}")
    own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return found(**step["fields"], **own)
