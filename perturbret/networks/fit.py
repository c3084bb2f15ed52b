"""Fit a network in one of its modes: backbone, inputs, what is computed once, training, proof, encoder."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data.prepared import Prepared
from ..evaluation.scoring import by_name
from ..evaluation.validation import Fitted, best_readout, can_choose
from .backbone import Backbone, Inputs
from .embedding import cached_embed, fingerprint, run_lower
from .encoder import TunedEncoder, build_network
from .heads import HeadedNetwork
from .inputs import Rows
from .proofs import prove
from .settings import Settings
from .training import Outcome, carried_log_prior, make_validation, train

_PROOF_CELLS = 256


def fit_network(
    family: type[Backbone],
    prepared: Prepared,
    *,
    seed: int,
    settings: Mapping | None = None,
    search: Mapping | None = None,
    fixed: Mapping | None = None,
    cache: Path | None = None,
    state: Path | None = None,
    report: Callable[[str], None] = print,
) -> Fitted:
    """Fit one mode on the cells in role `train`, epochs and searched settings chosen on those in role `val`.

    Parameters
    ----------
    family : type of Backbone
    prepared : Prepared
    seed : int
        Of weights, batches and dropout.
    settings : mapping, optional
        Names and values of the family's `settings`.
    search : mapping of str to list, optional
        Values to try for some settings, simplest first; the best micro exact_hit@1 on single validation cells wins, the
        first of equals.
    fixed : mapping, optional
        `chosen` of an earlier fit: the same settings for as many epochs; validation cells have no influence.
    cache : path, optional
        Directory for inputs and embeddings.
    state : path, optional
        Directory where training keeps its state, and goes on from; for other code, give another.
    report : callable
        Gets lines of text.

    Raises
    ------
    ValueError
        A setting is unknown or out of range; no training cells, or no validation cells to choose on.
    """
    prepared = prepared.for_fitting()
    if len(prepared.candidates) < 2:
        raise ValueError(
            f"prepared: expected training cells of 2 conditions or more, got {len(prepared.candidates)}"
        )
    if fixed is not None:
        stops = fixed["stop_epochs"]
        options = family.settings.read(
            {name: value for name, value in fixed.items() if name != "stop_epochs"}
        )
        encoder, history, checks = _fit(family, prepared, options, seed, stops, cache, state, report)
        row = {**_row(options, search), "epochs": _epochs(stops), "exact_hit@1": np.nan, "chosen": True}
        return Fitted(encoder, pd.DataFrame([row]), dict(fixed), history, checks)
    if not can_choose(prepared):
        raise ValueError("prepared: expected validation cells of candidates to choose epochs on, got none")
    rows, fits = [], []
    for options in _combinations(family.settings, settings or {}, search or {}):
        encoder, history, checks = _fit(family, prepared, options, seed, None, cache, state, report)
        readout, hit = best_readout(encoder, prepared, seed=seed)
        stops = encoder.settings["chosen"]["stop_epochs"]
        rows.append(
            {**_row(options, search), "epochs": _epochs(stops), "exact_hit@1": hit, "readout": readout}
        )
        fits.append((encoder, history, checks))
    selection = pd.DataFrame(rows)
    best = int(selection["exact_hit@1"].to_numpy(float).round(9).argmax())
    selection["chosen"] = np.arange(len(rows)) == best
    encoder, history, checks = fits[best]
    return Fitted(encoder, selection, dict(encoder.settings["chosen"]), history, checks)


@dataclass(frozen=True)
class _Task:
    """What all members of a fit share: the start, the cells, and where things are kept."""

    prepared: Prepared
    options: Settings
    backbone: Backbone
    sha256: str
    inputs: Inputs
    index: np.ndarray
    labels: np.ndarray
    cache: Path | None
    state: Path | None
    report: Callable[[str], None]

    def key(self, seed: int, member: int, stop: int) -> str:
        """A hash of everything but code that a member's training depends on."""
        context, options = asdict(self.prepared.context), self.options.model_dump()
        parts = [context, options, seed, member, stop, self.sha256, self.backbone.describe()]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()


def _fit(
    family: type[Backbone],
    prepared: Prepared,
    options: Settings,
    seed: int,
    stops: list[int] | None,
    cache: Path | None,
    state: Path | None,
    report: Callable[[str], None],
) -> tuple[TunedEncoder, pd.DataFrame | None, dict]:
    """Encoder, history and checks of one choice of settings."""
    backbone = family.make(prepared, options, seed=seed, report=report)
    sha256 = fingerprint(backbone.network)
    inputs = backbone.inputs(prepared.cells, directory=cache)
    index = by_name(prepared, prepared.where("train"))
    classes = prepared.candidates
    labels = np.searchsorted(classes, prepared.conditions[index])
    task = _Task(prepared, options, backbone, sha256, inputs, index, labels, cache, state, report)
    members, outcomes, checks = [], [], {"network_sha256": sha256}
    for m in range(options.members if options.mode != "frozen" else 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1000 * m)
            model = build_network(backbone, options, len(classes))
        if options.mode != "frozen":
            outcomes.append(_train(task, model, seed, m, stops[m] if stops else 0))
            proof = index[np.linspace(0, len(index) - 1, min(_PROOF_CELLS, len(index))).astype(int)]
            checks[f"member{m}"] = prove(
                model, backbone.network, sha256, inputs, proof, outcomes[-1], options
            )
        model.start = 0
        members.append(model.eval())
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    carries = options.mode != "frozen" and options.loss != "contrastive" and options.sampler == "random"
    chosen = {**options.model_dump(), "stop_epochs": [outcome.best_epoch for outcome in outcomes]}
    encoder = TunedEncoder(
        kind=family.family,
        settings={"chosen": chosen},
        options=options,
        backbone=backbone,
        members=tuple(members),
        classes=classes,
        log_prior=carried_log_prior(shares, options.label_smoothing) if carries else None,
        context=prepared.context,
        cache=cache,
    )
    history = [outcome.history.assign(member=m) for m, outcome in enumerate(outcomes)]
    return encoder, pd.concat(history, ignore_index=True) if history else None, checks


def _train(task: _Task, model: HeadedNetwork, seed: int, member: int, stop: int) -> Outcome:
    """Train a member from the lowest layer that changes; what lies below is computed once."""
    options, source = task.options, task.inputs
    if model.start is None:
        how = {"normalise": False, "pooling": options.pooling, "precision": options.precision}
        source = Rows(cached_embed(model.network, source, directory=task.cache, **how))
        model.head.set_scale(torch.from_numpy(source.values[task.index]))
    elif model.start > 0:
        source = run_lower(
            model.network, source, model.start, precision=options.precision, directory=task.cache
        )
    key, own_seed = task.key(seed, member, stop), seed + 1000 * member
    return train(
        model,
        source,
        task.index,
        task.labels,
        settings=options,
        seed=own_seed,
        validation=None if stop else make_validation(task.prepared, model, options, own_seed),
        stop_epoch=stop,
        # Named by the key: what was tried before a kill is found again, and not trained anew.
        state=None if task.state is None else Path(task.state) / f"training-{key[:16]}.pt",
        key=key,
        report=task.report,
    )


def _combinations(kind: type[Settings], settings: Mapping, search: Mapping) -> list[Settings]:
    if both := sorted(set(settings) & set(search)):
        raise ValueError(f"search: {both[0]} is fixed by the settings; give it in one place")
    for name, values in search.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"search: expected a list of values for {name}, got {values!r}")
    return [
        kind.read({**settings, **dict(zip(search, values, strict=True))})
        for values in itertools.product(*search.values())
    ]


def _row(options: Settings, search: Mapping | None) -> dict:
    names = dict.fromkeys(["mode", "init", *(search or {})])
    return {name: getattr(options, name) for name in names}


def _epochs(stops: list[int]) -> str:
    return ", ".join(map(str, stops)) or "none"
