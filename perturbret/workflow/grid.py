"""The grid of runs: which recipes, under which masks and seeds, with which parameters for which notebook."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.sources import Entry
from ..data.tracks import find_track
from ..files.names import nearest
from ..files.places import CHECKOUT
from .parameters import ParameterError, check_parameters, declared_parameters, load_parameters

AUDIT, VOCAB = "01_data_audit", "02_vocab_coverage"
EVALUATION, REPORT = "05_retrieval_eval", "06_ablation_report"
COMBINATIONS = "08_combinations"
# Parameters of notebooks that are not a run's fit, by their key in a grid.
SECTIONS, SECTION_NOTEBOOKS = ("audit", "vocab", "evaluation", "report"), (AUDIT, VOCAB, EVALUATION, REPORT)
# Set for every notebook that declares them; a grid or recipe that sets them too would be overruled.
OWN_NAMES = ("dataset", "recipe", "run", "outputs", "overwrite", "runs", "failed")
NEEDS = ("batch_key", "guide_key", "control_label", "simulate")


class GridError(ValueError):
    """A grid or recipe file that cannot be used as it is written."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be made: a recipe under one choice of what varies.

    Attributes
    ----------
    name : str
        `<recipe>-<mask>-seed<seed>`, then `-<name>=<value>` of whatever else varies, the default track left out; the
        name of its directory.
    recipe : str
    varied : mapping of name to value
        Mask and seed, then whatever else varies.
    notebook : str
        Name of the notebook that fits, without .ipynb.
    parameters, evaluation : mapping of name to value
        For the fitting notebook, and for 05_retrieval_eval; checked against what they declare.
    """

    name: str
    recipe: str
    varied: Mapping[str, Any]
    notebook: str
    parameters: Mapping[str, Any]
    evaluation: Mapping[str, Any]


@dataclass(frozen=True)
class Grid:
    """All runs of one report.

    Attributes
    ----------
    runs : tuple of PlannedRun
    skipped : tuple of (recipe, reason)
        Recipes and tracks that do not apply to the dataset.
    audit, vocab, report : mapping of name to value
        Parameters of 01_data_audit, 02_vocab_coverage and 06_ablation_report.
    """

    runs: tuple[PlannedRun, ...]
    skipped: tuple[tuple[str, str], ...]
    audit: Mapping[str, Any]
    vocab: Mapping[str, Any]
    report: Mapping[str, Any]


def load_grid(
    path: str | Path,
    entry: Entry,
    *,
    dataset: str | None = None,
    notebooks: str | Path = CHECKOUT / "notebooks",
) -> Grid:
    """Read a grid file and check all of it against the notebooks that will get its parameters.

    A recipe is a YAML file of parameters beside the grid file or in `params/`.

    Parameters
    ----------
    path : path
        Of a file like params/ablation.yaml.
    entry : Entry
        Of the dataset; recipes and tracks that need what it does not have are skipped.
    dataset : str, optional
        What the notebooks get as `dataset`; the entry's name by default.
    notebooks : path
        Directory of the notebooks.

    Raises
    ------
    FileNotFoundError
        There is no such grid, recipe or notebook.
    GridError, ParameterError
        Names the file, the key, what was expected and what was got.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.data import make_entry
    >>> from perturbret.files import write_json
    >>> block = {"notebook": "03_baselines", "recipes": ["pca"], "vary": {"mask": ["none"], "seed": [0, 1]}}
    >>> with TemporaryDirectory() as directory:
    ...     write_json(f"{directory}/grid.yaml", {"runs": [block]})  # JSON is YAML
    ...     grid = load_grid(f"{directory}/grid.yaml", make_entry({"name": "simulated", "simulate": {}}))
    >>> [run.name for run in grid.runs]
    ['pca-none-seed0', 'pca-none-seed1']
    """
    path, notebooks = Path(path), Path(notebooks)
    content = load_parameters(path)
    _check_keys(content, ("runs", *SECTIONS), path.name)
    declared = {name: declared_parameters(notebooks / f"{name}.ipynb") for name in SECTION_NOTEBOOKS}
    blocks = content.get("runs")
    if not isinstance(blocks, list) or not blocks:
        raise GridError(f"{path.name}: runs: expected a list of blocks, got {blocks!r}")
    given = {}
    for key, notebook in zip(SECTIONS, SECTION_NOTEBOOKS, strict=True):
        values = _check_own(content.get(key) or {}, f"{path.name}: {key}")
        given[key] = check_parameters(values, declared[notebook], where=f"{path.name}: {key} ({notebook})")
    runs: list[PlannedRun] = []
    skipped: list[tuple[str, str]] = []
    for number, block in enumerate(blocks, start=1):
        where = f"{path.name}: runs, block {number}"
        _check_keys(block, ("notebook", "recipes", "vary"), where)
        notebook, recipes, vary = block.get("notebook"), block.get("recipes"), block.get("vary") or {}
        if not isinstance(notebook, str) or not isinstance(recipes, list):
            raise GridError(
                f"{where}: expected notebook: a name, and recipes: a list; got {notebook!r}, {recipes!r}"
            )
        declared[notebook] = declared_parameters(notebooks / f"{notebook}.ipynb")
        _check_vary(vary, where)
        for item in recipes:
            recipe, need = _recipe(item, where)
            if need and not _has(entry, need):
                skipped.append((recipe, f"needs {need}, which the dataset {entry.name} does not have"))
                continue
            source = _find_recipe(recipe, path)
            fixed = _check_own(load_parameters(source), source.name)
            for values in itertools.product(*vary.values()):
                varied = dict(zip(vary, values, strict=True))
                held_out = find_track(varied["track"]).needs if "track" in varied else ""
                if held_out and not _has(entry, f"{held_out}_key"):
                    reason = f"needs {held_out}_key, which the dataset {entry.name} does not have"
                    skipped.append((f"track {varied['track']}", reason))
                    continue
                if both := sorted(set(varied) & set(fixed)):
                    raise GridError(f"{where}: {both[0]!r} varies, but the recipe {source.name} sets it")
                asked = check_parameters(
                    {**fixed, **varied}, declared[notebook], where=f"{where}: {source.name} ({notebook})"
                )
                runs.append(_make(recipe, notebook, asked, list(vary), declared, given["evaluation"], where))
    _check_names(runs, path.name)
    dataset = dataset or entry.name
    report = {"runs": [run.name for run in runs], **given["report"]}
    return Grid(
        tuple(_with_own(run, dataset, declared) for run in runs),
        tuple(dict.fromkeys(skipped)),
        _declared_only({"dataset": dataset}, declared[AUDIT]) | given["audit"],
        _declared_only({"dataset": dataset}, declared[VOCAB]) | given["vocab"],
        _declared_only({"dataset": dataset, **report}, declared[REPORT]),
    )


def _make(recipe, notebook, asked, vary, declared, evaluation, where) -> PlannedRun:
    values = {**declared[notebook], **asked}
    # 05 gets what the fit got, defaults included, so that the two cannot disagree.
    shared = {
        name: value
        for name, value in values.items()
        if name in declared[EVALUATION] and name not in OWN_NAMES
    }
    if both := sorted(set(shared) & set(evaluation)):
        raise GridError(f"{where}: {both[0]!r} belongs to the fit ({notebook}); evaluation cannot set it")
    judged = check_parameters(shared, declared[EVALUATION], where=f"{where}: {recipe} ({EVALUATION})")
    varied = {key: values[key] for key in ("mask", "seed") if key in values} | {
        key: asked[key] for key in vary
    }
    texts = {"mask": "{}", "seed": "seed{}"}
    parts = [
        _clean(texts[key].format(varied[key])) if key in texts else f"{key}={_written(varied[key])}"
        for key in varied
        # The same run in every grid: one that varies tracks, and one that does not.
        if key != "track" or varied[key] != declared[notebook].get("track")
    ]
    return PlannedRun(
        "-".join([_clean(recipe), *parts]), recipe, varied, notebook, asked, {**judged, **evaluation}
    )


def _clean(text: str) -> str:
    return re.sub(r"[^\w.+]+", "_", text).strip("_")


def _written(value: Any) -> str:
    """A value within a directory's name; with a hash where it cannot stand there as it is, so that two stay two."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    clean = _clean(text)[:40]
    return clean if clean == text else f"{clean}_{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("_")


def _with_own(run: PlannedRun, dataset: str, declared: Mapping[str, Mapping]) -> PlannedRun:
    """The run with what the workflow sets itself. Snakemake decides what is stale: what is there may be replaced."""
    own = {"dataset": dataset, "recipe": run.recipe, "run": run.name}
    fit = _declared_only({**own, "overwrite": True}, declared[run.notebook])
    judge = _declared_only(own, declared[EVALUATION])
    return replace(run, parameters={**fit, **run.parameters}, evaluation={**judge, **run.evaluation})


def _declared_only(values: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in declared}


def _recipe(item: Any, where: str) -> tuple[str, str | None]:
    """Name and need of one entry of `recipes`: a name, or `{recipe: name, needs: key}`."""
    if isinstance(item, str):
        return item, None
    _check_keys(item, ("recipe", "needs"), f"{where}: recipes")
    recipe, need = item.get("recipe"), item.get("needs")
    if not isinstance(recipe, str):
        raise GridError(f"{where}: recipes: expected a name or {{recipe: name, needs: key}}, got {item!r}")
    if need is not None and need not in NEEDS:
        raise GridError(f"{where}: {recipe}: needs: expected one of {', '.join(NEEDS)}, got {need!r}")
    return recipe, need


def _has(entry: Entry, need: str) -> bool:
    if need == "batch_key" and entry.simulated:
        return entry.simulate.get("n_batches", 2) != 1
    if need in ("guide_key", "control_label") and entry.simulated:
        return True
    return getattr(entry, need) is not None


def _find_recipe(recipe: str, grid: Path) -> Path:
    folders = list(dict.fromkeys([grid.resolve().parent, CHECKOUT / "params"]))
    for folder in folders:
        if (folder / f"{recipe}.yaml").is_file():
            return folder / f"{recipe}.yaml"
    known = {path.stem for folder in folders for path in folder.glob("*.yaml")}
    known -= {grid.stem, "datasets", "references", "checkpoints"}
    raise FileNotFoundError(
        f"{grid.name}: recipe {recipe!r}: found no {recipe}.yaml; {nearest(recipe, sorted(known))}"
    )


def _check_keys(content: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(content, dict):
        raise GridError(f"{where}: expected a mapping with {', '.join(known)}, got {content!r}")
    for key in content:
        if key not in known:
            raise GridError(f"{where}: unknown key {key!r}; {nearest(str(key), list(known))}")


def _check_own(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise GridError(f"{where}: expected a mapping of names to values, got {values!r}")
    for name in values:
        if name in OWN_NAMES:
            raise ParameterError(f"{where}: {name}: is set by the workflow for every run; leave it out here")
    return values


def _check_vary(vary: Any, where: str) -> None:
    for name, values in _check_own(vary, f"{where}: vary").items():
        if not isinstance(values, list) or not values:
            raise GridError(f"{where}: vary: {name}: expected a list of values, got {values!r}")


def _check_names(runs: list[PlannedRun], where: str) -> None:
    if not runs:
        raise GridError(f"{where}: no recipe of this grid applies to the dataset")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise GridError(f"{where}: two runs are named {name!r}; each recipe and value may be listed once")
        if name in ("audit", "vocab", "report", "combinations", "splits", "cache", "scratch", "superseded"):
            raise GridError(f"{where}: a run cannot be named {name!r}: that directory has another use")
