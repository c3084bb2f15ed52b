"""A pretraining run: its directory, reuse, resuming, manifest."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .atomic import write_json, write_text
from .checkpoint import load_checkpoint
from .chunks import ChunkedCounts, chunked_screen
from .corpus import Part, choose_vocabulary, make_corpus
from .decoders import Decoders
from .model import device_name
from .pretraining import PRESETS, Plan, PretrainedNetwork, pretrain, save_pretrained
from .provenance import code_hash, directory_hash, environment
from .reference_cells import load_references
from .runs import RunExists, outputs_root, read_manifest, write_table
from .vocabulary import Vocabulary, load_vocabulary

CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run with everything that it needs.

    Attributes
    ----------
    directory : pathlib.Path
        outputs/pretrain/<preset>-seed<seed>/
    plan : Plan
    seed : int
    simulated : bool
        No reference cells were found: simulated ones stand in, to try the code out.
    references : tuple of ChunkedCounts
    vocabulary : Vocabulary
    corpus : list of Part
    params : dict
    """

    directory: Path
    plan: Plan
    seed: int
    simulated: bool
    references: tuple[ChunkedCounts, ...]
    vocabulary: Vocabulary
    corpus: list[Part]
    params: dict


def open_pretraining(
    preset: str,
    *,
    references: str = "",
    names: list | None = None,
    steps: int = 0,
    seed: int = 0,
    outputs: str = "",
    overwrite: bool = False,
) -> Pretraining:
    """Find reference cells, choose their vocabulary and put their tokens on disk.

    Parameters
    ----------
    preset : str
        One of `perturbret.pretraining.PRESETS`.
    references : str
        YAML file of reference datasets; empty for `params/references.yaml`.
    names : list of str, optional
        Only these of them.
    steps : int
        In place of the preset's; 0: those.
    seed : int
    outputs : str
        See `perturbret.runs.outputs_root`.
    overwrite : bool
        Allow a run of the same name with other parameters to be replaced.

    Raises
    ------
    ValueError
        The preset is unknown.
    RunExists
        The directory holds a run with other parameters, and `overwrite` is false.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    plan = dataclasses.replace(PRESETS[preset], **({"steps": steps} if steps else {}))
    root = outputs_root(outputs) / "pretrain"
    found = load_references(references, names=names or [], required=bool(names))
    simulated = not found
    if simulated:
        from .datasets import load_screen

        found = [chunked_screen(load_screen("simulated"))]
    vocabulary = choose_vocabulary(found, load_vocabulary())
    corpus = make_corpus(found, vocabulary, directory=root / "corpus")
    params = {
        "preset": preset,
        "plan": dataclasses.asdict(plan),
        "seed": seed,
        "simulated": simulated,
        "references": {part.name: part.hash for part in corpus},
        "vocabulary": vocabulary.hash,
    }
    directory = root / f"{preset}-seed{seed}"
    made = read_manifest(directory)
    if made and not overwrite:
        for name, value in params.items():
            if made["params"].get(name) != value:
                raise RunExists(
                    f"{directory.name}: the run there has {name}={made['params'].get(name)!r}, asked for {value!r}; "
                    f"give another outputs directory, or overwrite=True to replace it"
                )
    return Pretraining(directory, plan, seed, simulated, tuple(found), vocabulary, corpus, params)


def run_pretraining(run: Pretraining, *, report=print) -> PretrainedNetwork:
    """Pretrain, or read what was made with the same parameters and code; writes checkpoint, tables and manifest."""
    code = code_hash("pretraining", "corpus")
    made = read_manifest(run.directory)
    place = run.directory / CHECKPOINT
    if made and made["params"] == run.params and made["code"] == code and place.is_dir():
        if directory_hash(place) == made["checkpoint_sha256"]:
            return read_pretrained(run.directory)
    started = time.perf_counter()
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "manifest.json").unlink(missing_ok=True)
    # Named by the code: what other code began is not gone on with.
    state = run.directory / f"training-{code[:12]}.pt"
    result = pretrain(run.corpus, run.vocabulary, run.plan, seed=run.seed, state=state, report=report)
    save_pretrained(place, result, run.vocabulary)
    write_table(run.directory / "history.csv", result.history)
    write_table(run.directory / "by_dataset.csv", result.by_dataset.reset_index(names="dataset"))
    content = {
        "params": run.params,
        "code": code,
        "checkpoint_sha256": directory_hash(place),
        "wall_s": round(time.perf_counter() - started, 1),
        "environment": environment(device_name()),
    }
    write_json(run.directory / "manifest.json", content)
    for left in run.directory.glob("training-*.pt"):
        left.unlink(missing_ok=True)
    return result


def read_pretrained(directory: Path) -> PretrainedNetwork:
    """What `run_pretraining` wrote."""
    from safetensors.torch import load_file

    place = directory / CHECKPOINT
    network = load_checkpoint(place, report=lambda text: None).network
    decoders = Decoders(network.shape.d_model)
    tensors = load_file(place / "best_model.safetensors")
    decoders.load_state_dict({name: tensors[name] for name in decoders.state_dict()})
    by_dataset = pd.read_csv(directory / "by_dataset.csv", index_col="dataset").rename_axis(None)
    return PretrainedNetwork(network, decoders.eval(), pd.read_csv(directory / "history.csv"), by_dataset)


def ship(directory: Path, target: Path) -> None:
    """Write a finished run's checkpoint in half precision to `target`, as the package carries it; a card stays."""
    made, card = read_pretrained(directory), target / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else None
    save_pretrained(target, made, load_vocabulary(directory / CHECKPOINT), half=True)
    if text is not None:
        write_text(card, text)


def _main(arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[0] != "ship":
        raise SystemExit("usage: python -m perturbret.pretraining_run ship RUN_DIRECTORY TARGET_DIRECTORY")
    ship(Path(arguments[1]), Path(arguments[2]))


if __name__ == "__main__":
    _main(sys.argv[1:])
