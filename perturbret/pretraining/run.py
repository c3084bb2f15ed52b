"""A pretraining run: its directory, reuse, resuming, manifest."""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..alignment.chunks import ChunkedCounts, chunked_in_space, chunked_screen
from ..alignment.gene_space import SPACE_FILE, GeneSpace, content_hash, read_gene_space
from ..alignment.reference_cells import load_references
from ..alignment.remapping import verify_alignment
from ..data.sources import find_checkpoint
from ..files.atomic import write_json, write_text
from ..files.provenance import code_hash, directory_hash, environment
from ..networks.embedding import device_name
from ..runs.progress import Progress
from ..runs.runs import RunExists, outputs_root, read_manifest, write_table
from ..scgpt.checkpoint import load_checkpoint, read_tensors, save_checkpoint
from ..scgpt.corpus import Part, choose_vocabulary, make_corpus
from ..scgpt.pretraining import PRESETS, Decoders, Plan, PretrainedNetwork, pretrain, save_pretrained
from ..scgpt.vocabulary import SPECIALS, Vocabulary, load_vocabulary

CHECKPOINT = "checkpoint"
_VERIFIED = 500  # cells of each reference that are compared by value


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
    space : GeneSpace or None
        That tokens are genes of; None: tokens are found by the names of genes alone.
    """

    directory: Path
    plan: Plan
    seed: int
    simulated: bool
    references: tuple[ChunkedCounts, ...]
    vocabulary: Vocabulary
    corpus: list[Part]
    params: dict
    space: GeneSpace | None = None


def open_pretraining(
    preset: str,
    *,
    references: str = "",
    names: list | None = None,
    gene_space: str = "",
    steps: int = 0,
    seed: int = 0,
    outputs: str = "",
    overwrite: bool = False,
) -> Pretraining:
    """Find reference cells, choose their vocabulary and put their tokens on disk.

    Parameters
    ----------
    preset : str
        One of `perturbret.scgpt.pretraining.PRESETS`.
    references : str
        YAML file of reference datasets; empty for `params/references.yaml`.
    names : list of str, optional
        Only these of them.
    gene_space : str
        cross_dataset_hvg_info.json of notebook 02, or its directory: tokens are the genes of that space and no others,
        reference cells are remapped into it and verified by value, and the checkpoint keeps it. Empty: all genes that
        the references measure and scGPT has a token for.
    steps : int
        In place of the preset's; 0: those.
    seed : int
    outputs : str
        See `perturbret.runs.runs.outputs_root`.
    overwrite : bool
        Allow a run of the same name with other parameters to be replaced.

    Raises
    ------
    ValueError
        The preset is unknown.
    GeneSpaceError
        A reference is not in the space, or is there with other columns.
    RunExists
        The directory holds a run with other parameters, and `overwrite` is false.

    Examples
    --------
    >>> open_pretraining("huge")
    Traceback (most recent call last):
        ...
    ValueError: preset: expected one of tiny, full, got 'huge'
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
    plan = dataclasses.replace(PRESETS[preset], **({"steps": steps} if steps else {}))
    root = outputs_root(outputs) / "pretrain"
    found = load_references(references, names=names or [], required=bool(names))
    simulated = not found
    if simulated:
        from ..data.datasets import load_screen

        found = [chunked_screen(load_screen("simulated"))]
    space = read_gene_space(gene_space) if gene_space else None
    if space is None:
        vocabulary = choose_vocabulary(found, load_vocabulary())
    else:
        found = _into_space(found, space)
        vocabulary = Vocabulary((*space.names, *SPECIALS), f"{len(space)} genes of a common space")
    corpus = make_corpus(found, vocabulary, directory=root / "corpus")
    params = {
        "preset": preset,
        "plan": dataclasses.asdict(plan),
        "seed": seed,
        "simulated": simulated,
        "references": {part.name: part.hash for part in corpus},
        "vocabulary": vocabulary.hash,
        "gene_space": content_hash(space) if space else None,
    }
    directory = root / (f"{preset}-seed{seed}" + (f"-space-{params['gene_space'][:8]}" if space else ""))
    made = read_manifest(directory)
    if made and not overwrite:
        for name, value in params.items():
            if made["params"].get(name) != value:
                raise RunExists(
                    f"{directory.name}: the run there has {name}={made['params'].get(name)!r}, asked for {value!r}; "
                    f"give another outputs directory, or overwrite=True to replace it"
                )
    return Pretraining(directory, plan, seed, simulated, tuple(found), vocabulary, corpus, params, space)


def _into_space(references: list[ChunkedCounts], space: GeneSpace) -> list[ChunkedCounts]:
    """The references in the common order, after some cells of each were compared by value."""
    remapped = [chunked_in_space(reference, space) for reference in references]
    some = {r.name: (next(r.chunks(_VERIFIED))[0], r.genes, r.ensembl_ids) for r in references}
    verify_alignment(space, some)
    return remapped


def run_pretraining(run: Pretraining, *, report=None) -> PretrainedNetwork:
    """Pretrain, or read what was made with the same parameters and code; writes checkpoint, tables and manifest."""
    code = code_hash("scgpt.pretraining", "scgpt.corpus")
    made = read_manifest(run.directory)
    place = run.directory / CHECKPOINT
    if made and made["params"] == run.params and made["code"] == code and place.is_dir():
        if directory_hash(place) == made["checkpoint_sha256"]:
            return read_pretrained(run.directory)
    started = time.perf_counter()
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "manifest.json").unlink(missing_ok=True)
    # Named by the code: what other code began is not continued.
    state = run.directory / f"training-{code[:12]}.pt"
    report = report or Progress()
    result = pretrain(run.corpus, run.vocabulary, run.plan, seed=run.seed, state=state, report=report)
    save_pretrained(place, result, run.vocabulary, official=True, space=run.space)
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
    place = directory / CHECKPOINT
    network = load_checkpoint(place, report=lambda text: None).network
    decoders = Decoders(network.shape.d_model)
    tensors = read_tensors(place)
    decoders.load_state_dict({name: tensors[name] for name in decoders.state_dict()})
    by_dataset = pd.read_csv(directory / "by_dataset.csv", index_col="dataset").rename_axis(None)
    return PretrainedNetwork(network, decoders.eval(), pd.read_csv(directory / "history.csv"), by_dataset)


def ship(directory: Path, target: Path) -> None:
    """Write a finished run's checkpoint in half precision to `target`, as the package carries it; a card stays."""
    card = target / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else None
    _convert(directory / CHECKPOINT, target, half=True)
    if text is not None:
        write_text(card, text)


def export(checkpoint: str, target: Path) -> None:
    """Write a checkpoint, by name or path, as the official package reads it: with `best_model.pt`.

    Raises
    ------
    FileExistsError
        There is something at `target`.
    """
    if target.exists():
        raise FileExistsError(f"expected a directory that does not exist yet, got {target}")
    _convert(find_checkpoint(checkpoint), target, official=True)


def _convert(place: Path, target: Path, **form: bool) -> None:
    loaded = load_checkpoint(place, report=lambda text: None)
    names = Decoders(loaded.network.shape.d_model).state_dict()
    decoders = {name: tensor for name, tensor in read_tensors(place).items() if name in names}
    space = read_gene_space(place) if (place / SPACE_FILE).exists() else None
    # Its own args: what it reads of a cell is not for this to say.
    save_checkpoint(
        target, loaded.network, loaded.vocabulary, loaded.args, decoders=decoders, space=space, **form
    )


def _main(arguments: list[str]) -> None:
    match arguments:
        case ["ship", directory, target]:
            ship(Path(directory), Path(target))
        case ["export", checkpoint, target]:
            export(checkpoint, Path(target))
        case _:
            raise SystemExit(
                "usage: python -m perturbret.pretraining.run ship RUN_DIRECTORY TARGET | export CHECKPOINT TARGET"
            )


if __name__ == "__main__":
    _main(sys.argv[1:])
