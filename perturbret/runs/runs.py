"""One run = one encoder under one mask, split and seed: its directory, its manifest, reuse without surprises."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from ..data.prepared import Prepared, prepare
from ..data.screen import Screen
from ..data.splits import Split, get_split
from ..files.atomic import replacing
from ..files.places import CHECKOUT
from ..networks.families import NETWORKS

# The run of somebody who tries things in JupyterLab: replaced by the next one, read by no report.
SCRATCH = "scratch"


class RunExists(ValueError):
    """A run of that name was made with other parameters."""


@dataclass(frozen=True)
class Identity:
    """What was asked for of a run: two runs with equal identities are the same fit, made twice.

    For reading results; whether a fit is stale is decided by its parameters, cells and code (`fit_run`).

    Attributes
    ----------
    dataset, method, mask, seed, track, train_share
        `method` is the recipe's name, or the encoder's with its mode (`method_name`) where there was no recipe.
    candidates : str
        Conditions that queries are ranked among; see docs/method.md.
    options : tuple of (str, str)
        Everything else that was asked for, `search.<name>` and `settings.<name>` among it, with values as JSON.

    Examples
    --------
    >>> params = {"dataset": "simulated", "encoder": "pca", "mask": "none", "seed": 0, "search": {"n_components": [5]}}
    >>> identity = Identity.of(params)
    >>> identity.method, identity.arena
    ('pca', ('in_dist', 1.0, 'train'))
    >>> identity.request
    {'encoder': '"pca"', 'search.n_components': '[5]'}
    >>> Identity.read({"identity": identity.as_json()}) == identity
    True
    """

    dataset: str
    method: str
    mask: str
    seed: int
    track: str = "in_dist"
    train_share: float = 1.0
    candidates: str = "train"
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, params: dict, *, train_share: float = 1.0, candidates: str = "train", recipe: str = ""
    ) -> "Identity":
        """The identity of a run with these resolved parameters."""
        named = {"dataset", "mask", "seed", "track"}
        options = {
            name: value for name, value in params.items() if name not in {*named, "search", "settings"}
        }
        for group in ("search", "settings"):
            options |= {f"{group}.{name}": value for name, value in (params.get(group) or {}).items()}
        return cls(
            method=recipe or method_name(params["encoder"], params.get("settings")),
            train_share=float(train_share),
            candidates=candidates,
            options=tuple((name, json.dumps(options[name], sort_keys=True)) for name in sorted(options)),
            **{name: params[name] for name in named if name in params},
        )

    @classmethod
    def read(cls, manifest: dict) -> "Identity":
        """The identity that a manifest holds; what follows from its fit where it was written before there was one."""
        if "identity" in manifest:
            stored = manifest["identity"]
            return cls(**{**stored, "options": tuple(sorted(stored["options"].items()))})
        fit = manifest["fit"]
        return cls.of(fit["params"], train_share=fit["context"].get("train_share", 1.0))

    def as_json(self) -> dict:
        """For the manifest; `read` gives it back."""
        return {**asdict(self), "options": dict(self.options)}

    @property
    def arena(self) -> tuple[str, float, str]:
        """Track, share of the training labels, candidates: only within one are methods compared or seeds averaged."""
        return self.track, self.train_share, self.candidates

    @property
    def request(self) -> dict[str, str]:
        """All that tells apart two runs of one method in one arena under one mask and seed: name to JSON."""
        return dict(self.options)


@dataclass(frozen=True)
class Run:
    """A run directory with everything needed to fit or evaluate in it.

    Attributes
    ----------
    directory : pathlib.Path
        outputs/<dataset>/<run>/
    params : dict
        Resolved parameters; equal parameters on equal data give equal results.
    identity : Identity
    screen : Screen
    split : Split
    prepared : Prepared
    """

    directory: Path
    params: dict
    identity: Identity
    screen: Screen
    split: Split
    prepared: Prepared

    @property
    def manifest(self) -> dict:
        """Content of manifest.json; empty where there is none yet."""
        return read_manifest(self.directory)


def outputs_root(outputs: str = "") -> Path:
    """The outputs directory: the argument, else PERTURBRET_OUTPUTS, else `outputs` of the checkout.

    Examples
    --------
    >>> outputs_root("/data/results").name
    'results'
    """
    named = outputs or os.environ.get("PERTURBRET_OUTPUTS", "")
    if named:
        return Path(named).expanduser().resolve()
    return (CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()) / "outputs"


def run_name(
    encoder: str,
    mask: str,
    seed: int,
    settings: dict | None = None,
    train_share: float = 1.0,
    track: str = "in_dist",
) -> str:
    """Directory name of a run, e.g. `logreg-all_targets-seed0`, `scgpt_lora_head-all_targets-seed0-unseen_gene`.

    Examples
    --------
    >>> run_name("logreg", "all_targets", 0)
    'logreg-all_targets-seed0'
    >>> run_name("scgpt", "all_targets", 1, settings={"mode": "lora_head"}, train_share=0.1, track="unseen_gene")
    'scgpt_lora_head-all_targets-seed1-unseen_gene-share0.1'
    """
    share = f"-share{train_share:g}" if train_share != 1 else ""
    held_out = f"-{track}" if track != "in_dist" else ""
    return f"{method_name(encoder, settings).replace(':', '.')}-{mask}-seed{seed}{held_out}{share}"


def method_name(encoder: str, settings: dict | None = None) -> str:
    """Name of a method that no recipe names, e.g. `logreg`, `scgpt_lora_head`, `scgpt_full_random`."""
    settings = settings or {}
    random = "random" if settings.get("init") == "random" else ""
    return "_".join(filter(None, [encoder, settings.get("mode"), random]))


def open_run(
    screen: Screen,
    *,
    encoder: str,
    mask: str,
    seed: int,
    track: str = "in_dist",
    search: dict | None = None,
    settings: dict | None = None,
    train_share: float | None = None,
    recipe: str = "",
    run: str = "",
    outputs: str = "",
    overwrite: bool = False,
) -> Run:
    """Make ready the directory, split and masked cells of a run.

    Parameters
    ----------
    screen : Screen
    encoder, mask, track : str
    seed : int
        Seeds the split, the fit and the null control.
    search : dict, optional
        Hyperparameter values to choose among on validation, name to list.
    settings : dict, optional
        Of an encoder that has some (`perturbret.networks.families`); None: those of the run that is there. For
        05, which only judges.
    train_share : float, optional
        Share of each condition's training cells whose labels are used; None: that of the run that is there, else all.
    recipe : str
        Name of the method in comparisons; empty: that of the run that is there, else `method_name(...)`.
    run : str
        Name of the directory; empty for `run_name(...)`.
    outputs : str
        See `outputs_root`.
    overwrite : bool
        Allow a run of the same name with other parameters to be replaced.

    Raises
    ------
    RunExists
        The directory holds a run with other parameters or other data, and `overwrite` is false.
    SplitMismatch
        The split that is there belongs to other data or settings.
    ValueError
        An encoder with settings was asked for without them where none was fitted; unknown mask or track.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> from perturbret.data import simulate_screen
    >>> screen = simulate_screen(n_singles=2, n_doubles=0, n_genes=20, cells_per_condition=20)
    >>> with TemporaryDirectory() as outputs:
    ...     run = open_run(screen, encoder="prior", mask="all_targets", seed=0, outputs=outputs)
    >>> run.directory.name, run.manifest
    ('prior-all_targets-seed0', {})
    """
    root = outputs_root(outputs) / screen.name
    directory = root / (run or run_name(encoder, mask, seed, settings, train_share or 1.0, track))
    manifest = read_manifest(directory)
    made = manifest.get("fit")
    if train_share is None:
        train_share = made["context"].get("train_share", 1.0) if made and not overwrite else 1.0
    split = get_split(screen, track=track, seed=seed, directory=root / "splits")
    prepared = prepare(screen, split, mask=mask, train_share=train_share)
    params = {"dataset": screen.name, "encoder": encoder, "mask": mask, "track": track, "seed": int(seed)}
    params["search"] = search or {}
    if settings is None and made and made["params"]["encoder"] == encoder:
        settings = made["params"].get("settings")
    if settings is not None:
        params["settings"] = settings
    elif encoder in NETWORKS:
        there = sorted(path.parent.name for path in root.glob(f"{encoder}_*/manifest.json"))
        raise ValueError(
            f"{directory.name}: expected a run of {encoder} that notebook 04 fitted, got none; in {root}: "
            f"{', '.join(there) or 'no such run'}. Name one with run="
        )
    params = json.loads(json.dumps(params))  # as the manifest gives them back: a tuple is a list
    if made and not overwrite:
        asked = {**params, **asdict(prepared.context)}
        there = {**made["params"], **made["context"]}
        for name, value in asked.items():
            if there.get(name) != value:
                raise RunExists(
                    f"{directory.name}: the run there has {name}={there.get(name)!r}, asked for {value!r}; "
                    f"give another run name, or overwrite=True to replace it"
                )
    if not recipe and made and made["params"] == params:
        recipe = Identity.read(manifest).method
    identity = Identity.of(
        params, train_share=train_share, candidates=prepared.candidate_sets[0], recipe=recipe
    )
    return Run(directory, params, identity, screen, split, prepared)


def read_manifest(directory: Path) -> dict:
    """Content of a run's manifest.json; empty where there is none."""
    path = Path(directory) / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV atomically, floats with enough digits to read back what matters (9)."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g")


def announce(screen: Screen) -> None:
    """Show what data this notebook works on; a simulated screen puts a banner on the page."""
    show_data(
        f"**{screen.name}**: {screen.n_cells:,} cells × {screen.n_genes:,} genes, {len(screen.conditions)} conditions; "
        f"fingerprint `{screen.fingerprint[:12]}`",
        simulated=screen.simulated,
    )


def show_data(line: str, *, simulated: bool) -> None:
    """Show a line of Markdown on the data of a notebook; simulated ones put a banner on the page."""
    from IPython.display import display

    bundle = {"text/markdown": line, "application/vnd.perturbret+json": {"simulated": simulated}}
    if simulated:
        bundle["text/markdown"] = "**SIMULATED DATA** — " + line
    display(bundle, raw=True)
