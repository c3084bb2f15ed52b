"""Drive the workflow of one dataset: check the grid, run Snakemake on it, build report and index from what is there."""

import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .atomic import no_space, write_json
from .download import sha256_of
from .grid import AUDIT, EVALUATION, REPORT, ROOT, VOCAB, Grid, load_grid
from .index import write_index
from .parameters import declared_parameters
from .progress import Progress, counted, duration
from .provenance import data_files, modules_behind
from .registry import Entry
from .superseded import supersede

PACKAGE = Path(__file__).resolve().parent
RULES = {"audit": AUDIT, "vocab": VOCAB, "baselines": "03_baselines", "finetune": "04_finetune"}
RULES |= {"evaluate": EVALUATION, "report": REPORT}


def run_report(
    dataset: str,
    grid: str | Path,
    *,
    cores: int,
    outputs: str | Path = "outputs",
    notebooks: str | Path = ROOT / "notebooks",
    profile: str = "default",
) -> int:
    """Run the grid on a dataset; write outputs/<dataset>/ and outputs/index.html.

    Parameters
    ----------
    dataset : str
        A name, a YAML file or `auto`; see `perturbret.datasets.resolve_dataset`.
    grid : path
        A file like params/ablation.yaml.
    cores : int
        Notebooks executed at the same time; each uses one core.
    outputs, notebooks : path
    profile : str
        A directory of workflow/profiles/, or the path of one.

    Returns
    -------
    int
        0 where every run was evaluated and reported; 1 where a notebook failed, though the others finished and the
        index is there, or where the workflow did not do its work.

    Raises
    ------
    ValueError, FileNotFoundError
        Anything that is wrong with dataset or grid; nothing was executed.
    """
    from .datasets import resolve_dataset
    from .fetch import fetch

    if cores < 1:
        raise ValueError(f"cores: expected at least 1, got {cores}")
    started = time.time()
    grid, outputs, notebooks = (Path(path).expanduser() for path in (grid, outputs, notebooks))
    outputs = outputs.resolve()
    settings = find_profile(profile)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        entry = resolve_dataset(dataset)
    for note in notes:
        _say(f"note: {note.message}")
    asked = str(Path(dataset).expanduser().resolve()) if dataset.endswith((".yaml", ".yml")) else entry.name
    checked = load_grid(grid, entry, dataset=asked, notebooks=notebooks)
    for recipe, reason in checked.skipped:
        _say(f"skipped {recipe}: {reason}")
    file = None if entry.simulated else fetch(entry)
    with exclusive(outputs) as lock:
        workdir = outputs / entry.name
        plan = make_plan(entry, checked, file=file, workdir=workdir, notebooks=notebooks)
        supersede(entry, plan["data"], workdir, say=_say)
        _say(
            f"{entry.name}: {counted(len(checked.runs), 'run')}; log: {_short(workdir / 'report' / 'workflow.log')}"
        )
        call = {"plan": plan, "workdir": workdir, "cores": cores, "profile": settings, "lock": lock}
        ended = _snakemake("all", append=False, **call)
        broken = {run for run, _ in ended.failed}
        plan["evaluated"] = [
            name
            for name in plan["runs"]
            if name not in broken and (workdir / name / f"{EVALUATION}.ipynb").exists()
        ]
        if plan["evaluated"] and (ended.whole or ended.failed):
            if "failed" in declared_parameters(notebooks / f"{REPORT}.ipynb"):
                plan["report"]["failed"] = sorted(broken & set(plan["runs"]))
            ended = ended.then(
                _snakemake(
                    "report/06_ablation_report.ipynb", "--allowed-rules", "report", append=True, **call
                )
            )
        page = write_index(outputs)
    reported = (workdir / "report" / f"{REPORT}.html").exists()
    finished = ended.whole and reported and set(plan["evaluated"]) == set(plan["runs"])
    if not finished and not ended.failed:
        _say_why(workdir, ended, len(plan["evaluated"]), len(plan["runs"]))
    _say_end(ended.failed, finished, page, time.time() - started)
    return 0 if finished else 1


def make_plan(entry: Entry, grid: Grid, *, file: Path | None, workdir: Path, notebooks: Path) -> dict:
    """What the Snakefile works from: JSON-able, paths relative to `workdir`."""
    notebooks = notebooks.resolve()
    names = {AUDIT, VOCAB, EVALUATION, REPORT, *(run.notebook for run in grid.runs)}
    return {
        "dataset": entry.name,
        "simulated": entry.simulated,
        "data": data_stamp(entry, file),
        "python": sys.executable,
        "notebooks": os.path.relpath(notebooks, workdir),
        "code": {name: _hash_of(imported_files(notebooks / f"{name}.ipynb")) for name in sorted(names)},
        "audit": dict(grid.audit),
        "vocab": dict(grid.vocab),
        "report": dict(grid.report),
        "runs": {
            run.name: {
                "recipe": run.recipe,
                "notebook": run.notebook,
                "parameters": dict(run.parameters),
                "evaluation": dict(run.evaluation),
            }
            for run in grid.runs
        },
        "evaluated": [],
    }


def data_stamp(entry: Entry, file: Path | None) -> str:
    """Hash of the file's content and of what the entry says about reading it."""
    described = asdict(entry)
    for name in ("path", "url", "sha256", "citation", "license"):
        del described[name]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=list).encode())
    if file is not None:
        digest.update(bytes.fromhex(sha256_of(file)))
    return f"sha256:{digest.hexdigest()[:32]}"


def imported_files(notebook: Path) -> list[Path]:
    """Files of this package that a notebook's code imports, directly or through others; its data files, too."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = "\n".join(line for source in sources for line in source.split("\n") if line[:1] not in ("%", "!"))
    found = modules_behind(code)
    if not found:
        return []
    return sorted([*found, PACKAGE / "__init__.py", *data_files()])


def _hash_of(files: list[Path]) -> str:
    """Of hundreds of input files a job, Snakemake would ask the sizes each time that it looks for work."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def find_profile(name: str) -> Path:
    """Directory of a Snakemake profile: a name of workflow/profiles/, or a path.

    Raises
    ------
    FileNotFoundError
        There is no such profile, or no workflow/ (perturbret was installed without its checkout).
    """
    for folder in (ROOT / "workflow" / "profiles" / name, Path(name).expanduser()):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(path.parent.name for path in (ROOT / "workflow").glob("profiles/*/config.yaml"))
    raise FileNotFoundError(
        f"profile {name!r}: expected a directory with a config.yaml, or one of {known} in {ROOT / 'workflow'}"
    )


@contextmanager
def exclusive(outputs: Path):
    """Hold outputs/.lock, waiting for whoever holds it; yields the open file.

    Snakemake and its jobs get the file as their standard input, and hand it on to their kernels: the lock is
    free when the last of them has ended, even if this process was killed and they were not.
    """
    outputs.mkdir(parents=True, exist_ok=True)
    with open(outputs / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            _say(
                f"waiting: process {lock.read().strip() or '?'}, or notebooks that outlived it, still work in "
                f"{_short(outputs)}"
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield lock


@dataclass(frozen=True)
class Ended:
    """How Snakemake ended.

    Attributes
    ----------
    code : int
        Its exit status.
    failed : dict of (run, notebook) to (reason, path of the kept notebook or None)
    undone : int
        Notebooks that it planned to execute and did not, though none had failed.
    """

    code: int
    failed: dict
    undone: int

    @property
    def whole(self) -> bool:
        """Everything that was planned was done."""
        return not (self.code or self.failed or self.undone)

    def then(self, other: "Ended") -> "Ended":
        """Both calls together."""
        return Ended(self.code or other.code, {**self.failed, **other.failed}, self.undone + other.undone)


def clean_environment() -> dict[str, str]:
    """This process's environment without what would change how Snakemake works or texts are encoded.

    Settings of the user's own workflows (SNAKEMAKE_PROFILE and the like) are not for this one; `--profile` is.
    """
    foreign = [name for name in os.environ if name.startswith("SNAKEMAKE_")]
    kept = {name: value for name, value in os.environ.items() if name not in [*foreign, "PYTHONIOENCODING"]}
    return {**kept, "PYTHONUTF8": "1"}


def _snakemake(target: str, *options: str, plan, workdir, cores, profile, lock, append) -> Ended:
    """Bring `target` up to date."""
    folder = workdir / "report"
    log, events = folder / "workflow.log", folder / "events.jsonl"
    write_json(folder / "plan.json", plan)
    for path in (events,) if append else (events, log):
        path.unlink(missing_ok=True)
    path = [str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {
        **clean_environment(),
        "PERTURBRET_OUTPUTS": str(workdir.parent),
        "PERTURBRET_EVENTS": str(events),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(ROOT / "workflow" / "Snakefile")]
    command += ["--directory", str(workdir), "--configfile", str(folder / "plan.json"), "--cores", str(cores)]
    command += ["--workflow-profile", str(profile), *options]
    command += ["--runtime-source-cache-path", str(workdir / ".snakemake" / "sources")]
    with open(log, "ab") as output:
        begin = output.tell()
        process = subprocess.Popen(
            command, stdin=lock, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=workdir
        )
    progress = Progress(events, log, RULES, cores, say=_say, begin=begin)
    try:
        with _terminating(process):
            while process.poll() is None:
                progress.update()
                time.sleep(0.2)
    except KeyboardInterrupt:
        _say("interrupted: letting the notebooks at work stop; start again to go on from here")
        process.wait()
        raise
    progress.finish()
    return Ended(process.returncode, progress.failed, progress.undone())


@contextmanager
def _terminating(process: subprocess.Popen):
    """Pass SIGTERM on to Snakemake, which then starts nothing more."""

    def stop(number, frame):
        process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_why(workdir: Path, ended: Ended, evaluated: int, asked: int) -> None:
    """What is wrong though no notebook failed."""
    log = workdir / "report" / "workflow.log"
    if ended.code:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
        full = no_space(workdir)
        _say(
            "\n".join(
                [f"the workflow itself failed{f': {full}' if full else ''}; the end of its log:", *lines]
            )
        )
        return
    left = f"{counted(ended.undone, 'notebook')} that it had planned, " if ended.undone else ""
    _say(
        f"the workflow ended without executing {left}and {evaluated} of {counted(asked, 'run')} are evaluated: does "
        f"the profile ask for a dry run, or for part of the work? See {_short(log)}"
    )


def _say_end(failed: dict, finished: bool, page: Path, seconds: float) -> None:
    for (run, name), (reason, kept) in sorted(failed.items()):
        where = f"; kept: {_short(Path(kept))}" if kept else ""
        _say(f"FAILED {run} {name}: {reason}{where}")
    state = f"{counted(len(failed), 'notebook')} failed" if failed else "NOT finished"
    _say(f"{'finished' if finished else state} after {duration(seconds)}: {_short(page)}")


def _short(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _say(line: str) -> None:
    print(line, flush=True)
