"""Fit scGPT in one of its modes: trunk, tokens, what is computed once, training, proof, encoder."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data.prepared import UNLABELLED, Prepared
from ..data.sources import find_checkpoint
from ..data.splits import cells_of_role
from ..evaluation.scoring import by_name
from ..evaluation.validation import Fitted, best_readout
from .checkpoint import Trunk, make_trunk
from .encoder import ScGPTEncoder, build_model, cached_embed
from .model import Model, Rows, best_device, embed, run_lower
from .network import fingerprint
from .pretraining import adapt_trunk
from .proofs import prove
from .settings import Settings, read_settings
from .tokens import Tokens, tokenize
from .training import Outcome, carried_log_prior, make_validation, train

_PROOF_CELLS = 256


def fit_scgpt(
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
    prepared : Prepared
    seed : int
        Of weights, batches and dropout.
    settings : mapping, optional
        Names and values of `perturbret.scgpt.settings.Settings`.
    search : mapping of str to list, optional
        Values to try for some settings, simplest first; the best micro exact_hit@1 on single validation cells wins, the
        first of equals.
    fixed : mapping, optional
        `chosen` of an earlier fit: the same settings for as many epochs; validation cells have no influence.
    cache : path, optional
        Directory for tokens and embeddings.
    state : path, optional
        Directory where training keeps its state, and goes on from; for other code, give another.
    report : callable
        Gets lines of text.

    Raises
    ------
    ValueError
        A setting is unknown or out of range; no training cells, or no validation cells to choose on.
    """
    if len(prepared.candidates) < 2:
        raise ValueError(
            f"prepared: expected training cells of 2 conditions or more, got {len(prepared.candidates)}"
        )
    if fixed is not None:
        stops = fixed["stop_epochs"]
        options = read_settings({name: value for name, value in fixed.items() if name != "stop_epochs"})
        encoder, history, checks = _fit(prepared, options, seed, stops, cache, state, report)
        row = {**_shown(options, search), "epochs": _said(stops), "exact_hit@1": np.nan, "chosen": True}
        return Fitted(encoder, pd.DataFrame([row]), dict(fixed), history, checks)
    if not np.isin(prepared.conditions[prepared.where("val")], prepared.candidates).any():
        raise ValueError(
            "prepared: expected validation cells of trained conditions to choose epochs on, got none"
        )
    rows, fits = [], []
    for options in _combinations(settings or {}, search or {}):
        encoder, history, checks = _fit(prepared, options, seed, None, cache, state, report)
        readout, hit = best_readout(encoder, prepared, seed=seed)
        stops = encoder.settings["chosen"]["stop_epochs"]
        rows.append(
            {**_shown(options, search), "epochs": _said(stops), "exact_hit@1": hit, "readout": readout}
        )
        fits.append((encoder, history, checks))
    selection = pd.DataFrame(rows)
    best = int(selection["exact_hit@1"].to_numpy(float).round(9).argmax())
    selection["chosen"] = np.arange(len(rows)) == best
    encoder, history, checks = fits[best]
    return Fitted(encoder, selection, dict(encoder.settings["chosen"]), history, checks)


def _tell_of_foreign_cells(prepared: Prepared, trunk: Trunk, report) -> None:
    """Say it where cells that are no training cells of this split had a say in the genes of the checkpoint's space."""
    context = prepared.context
    cells = trunk.origin.get("gene_space", {}).get("cells", {}).get(context.dataset)
    if cells not in (None, cells_of_role("train", context.split_id, context.split_hash)):
        report(
            f"WARNING: the checkpoint's genes were chosen on these cells of {context.dataset}: {cells}. Others than "
            f"training cells of {context.split_id} may be among them: make the space with this split (02, seed)"
        )


def _fit(
    prepared: Prepared,
    options: Settings,
    seed: int,
    stops: list[int] | None,
    cache: Path | None,
    state: Path | None,
    report: Callable[[str], None],
) -> tuple[ScGPTEncoder, pd.DataFrame | None, dict]:
    """Encoder, history and checks of one choice of settings."""
    trunk = make_trunk(
        prepared.cells.genes,
        checkpoint=find_checkpoint(options.checkpoint),
        init=options.init,
        seed=seed,
        dropout=options.dropout,
        report=report,
    )
    _tell_of_foreign_cells(prepared, trunk, report)
    trunk.network.to(best_device())
    if options.values != "checkpoint":
        trunk = dataclasses.replace(trunk, token_settings={**trunk.token_settings, "values": options.values})
    if options.adapt == "mlm":
        roles = np.isin(prepared.roles, ("train", UNLABELLED))
        own = prepared.cells.take(roles)
        trunk = adapt_trunk(
            trunk, own, steps=options.adapt_steps, learning_rate=options.lr_adapt, seed=seed, report=report
        )
    sha256 = fingerprint(trunk.network)
    tokens = tokenize(
        prepared.cells, trunk.token_ids, trunk.vocabulary, directory=cache, **trunk.token_settings
    )
    index = by_name(prepared, prepared.where("train"))
    labels = np.searchsorted(prepared.candidates, prepared.conditions[index])
    classes = prepared.candidates
    members, outcomes, checks = [], [], {"network_sha256": sha256}
    for m in range(options.members if options.mode != "frozen" else 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1000 * m)
            model = build_model(trunk, options, len(classes))
        if options.mode != "frozen":
            stop = stops[m] if stops else 0
            key = _key(prepared, trunk, options, seed, m, stop, labels, sha256)
            # Named by the key: what was tried before a kill is found again, and not trained anew.
            place = None if state is None else Path(state) / f"training-{key[:16]}.pt"
            outcomes.append(
                _train(
                    prepared,
                    model,
                    tokens,
                    index,
                    labels,
                    options,
                    seed + 1000 * m,
                    stop,
                    cache,
                    place,
                    key,
                    report,
                )
            )
            proof = index[np.linspace(0, len(index) - 1, min(_PROOF_CELLS, len(index))).astype(int)]
            checks[f"member{m}"] = prove(model, trunk.network, sha256, tokens, proof, outcomes[-1], options)
        model.start = 0
        members.append(model.eval())
    shares = np.bincount(labels, minlength=len(classes)) / len(labels)
    carries = options.mode != "frozen" and options.loss != "contrastive" and options.sampler == "random"
    chosen = {**dataclasses.asdict(options), "stop_epochs": [outcome.best_epoch for outcome in outcomes]}
    encoder = ScGPTEncoder(
        kind="scgpt",
        settings={"chosen": chosen},
        options=options,
        trunk=trunk,
        members=tuple(members),
        classes=classes,
        log_prior=carried_log_prior(shares, options.label_smoothing) if carries else None,
        context=prepared.context,
        cache=cache,
    )
    history = [outcome.history.assign(member=m) for m, outcome in enumerate(outcomes)]
    return encoder, pd.concat(history, ignore_index=True) if history else None, checks


def _train(
    prepared: Prepared,
    model: Model,
    tokens: Tokens,
    index,
    labels,
    options: Settings,
    seed,
    stop,
    cache,
    place,
    key,
    report,
) -> Outcome:
    """Train a model from the lowest layer that changes; what lies below is computed once."""
    source = tokens
    if model.start is None:
        arguments = {"normalise": False, "pooling": options.pooling, "precision": options.precision}
        make = embed if cache is None else cached_embed
        source = Rows(
            make(model.network, tokens, **arguments, **({} if cache is None else {"directory": cache}))
        )
        model.head.set_scale(torch.from_numpy(source.values[index]))
    elif model.start > 0:
        source = run_lower(model.network, tokens, model.start, precision=options.precision, directory=cache)
    validation = None if stop else make_validation(prepared, model, options, seed)
    return train(
        model,
        source,
        index,
        labels,
        settings=options,
        seed=seed,
        validation=validation,
        stop_epoch=stop,
        state=place,
        key=key,
        report=report,
    )


def _combinations(settings: Mapping, search: Mapping) -> list[Settings]:
    if both := sorted(set(settings) & set(search)):
        raise ValueError(f"search: {both[0]} is fixed by the settings; give it in one place")
    for name, values in search.items():
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"search: expected a list of values for {name}, got {values!r}")
    return [
        read_settings({**settings, **dict(zip(search, values, strict=True))})
        for values in itertools.product(*search.values())
    ]


def _shown(options: Settings, search: Mapping | None) -> dict:
    names = dict.fromkeys(["mode", "init", *(search or {})])
    return {name: getattr(options, name) for name in names}


def _said(stops: list[int]) -> str:
    return ", ".join(map(str, stops)) or "none"


def _key(prepared, trunk: Trunk, options: Settings, seed, m, stop, labels, sha256) -> str:
    """A hash of everything but code that training depends on."""
    parts = [
        dataclasses.asdict(prepared.context),
        dataclasses.asdict(options),
        seed,
        m,
        stop,
        sha256,
        trunk.token_settings,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(labels.tobytes())
    return digest.hexdigest()
