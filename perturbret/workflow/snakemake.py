"""Drive the workflow of one dataset: check the grid, run Snakemake and show its progress, build report and index."""

import fcntl
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..data.sources import Entry
from ..files.atomic import no_space, write_json
from ..files.downloads import sha256_of
from ..files.places import CHECKOUT
from ..files.provenance import code_hash
from ..runs.pipeline import fitting_code
from .grid import AUDIT, EVALUATION, REPORT, VOCAB, Grid, PlannedRun, load_grid
from .index import write_index
from .parameters import declared_parameters
from .superseded import supersede

QUIET_SECONDS = 30


@dataclass
class Progress:
    """Follows the events that executed notebooks append to a file (see `perturbret.workflow.execution`).

    Attributes
    ----------
    events, log : pathlib.Path
        The file of events, and Snakemake's log, which tells how many jobs there are.
    rules : mapping of rule to notebook
    cores : int
    say : callable
        Gets each line to show.
    begin : int
        Where in the log this call of Snakemake begins, in bytes.
    running : dict of (run, notebook) to start time
    failed : dict of (run, notebook) to (reason, path of the kept notebook or None)
    """

    events: Path
    log: Path
    rules: Mapping[str, str]
    cores: int
    say: Callable[[str], None] = print
    begin: int = 0
    running: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)
    total: Counter = field(default_factory=Counter)
    seconds: dict = field(default_factory=dict)
    _read: int = 0
    _spoke: float = field(default_factory=time.time)

    def update(self) -> None:
        """Read what is new and say it."""
        if not self.total and self.log.exists():
            text = self.log.read_bytes()[self.begin :].decode(errors="replace")
            self.total = planned(text, self.rules)
            if self.total:
                self._say(f"{counted(self.total.total(), 'notebook')} to execute, {self.cores} at a time")
        for event in self._new_events():
            self._take(event)
        if self.running and time.time() - self._spoke > QUIET_SECONDS:
            now = time.time()
            names = [f"{run} {name} ({duration(now - began)})" for (run, name), began in self.running.items()]
            self._say("running: " + ", ".join(names))

    def finish(self) -> None:
        """Count what began and never ended as killed; call this when the workflow has ended."""
        self.update()
        for run, name in list(self.running):
            reason = no_space(self.log.parent) or "was killed (out of memory, or from outside)"
            self.failed[run, name] = (reason, None)
            self._say(f"FAILED {run} {name}: {reason}")
            del self.running[run, name]

    def undone(self) -> int:
        """Notebooks that Snakemake planned and that neither ended nor failed, unless its log says that all is done.

        Events may lag behind on a network's file system; a log that says nothing of plans plans nothing.
        """
        log = self.log.read_bytes()[self.begin :] if self.log.exists() else b""
        return 0 if b"(100%) done" in log else max(self.total.total() - self._ended(), 0)

    def _ended(self) -> int:
        return len(self.failed) + sum(map(len, self.seconds.values()))

    def left(self) -> float | None:
        """Seconds that remain, about; None before anything is known."""
        everything = [second for seconds in self.seconds.values() for second in seconds]
        if not everything or not self.total:
            return None
        rest = 0.0
        for name, count in self.total.items():
            # A notebook of which none has ended yet is taken for an average one.
            known = self.seconds.get(name, [])
            failures = sum(notebook == name for _, notebook in self.failed)
            rest += max(count - len(known) - failures, 0) * statistics.fmean(known or everything)
        return rest / self.cores

    def _new_events(self) -> list[dict]:
        """Events whose lines are complete and were not read before."""
        if not self.events.exists():
            return []
        lines = self.events.read_bytes()[self._read :]
        complete = lines[: lines.rfind(b"\n") + 1]
        self._read += len(complete)
        return [json.loads(line) for line in complete.splitlines()]

    def _take(self, event: dict) -> None:
        path = Path(event["output"])
        run, name = path.parent.name, path.stem
        if event["event"] == "start":
            self.running[run, name] = event["time"]
            return
        self.running.pop((run, name), None)
        if event["event"] == "failed":
            self.failed[run, name] = (event["error"], event["kept"])
        else:
            self.seconds.setdefault(name, []).append(event["seconds"])
        done, total = self._ended(), self.total.total()
        place = f"[{done:{len(str(total))}}/{total}]" if total else f"[{done}]"
        left = self.left()
        rest = f"; about {duration(left)} left" if left and done < total else ""
        if event["event"] == "failed":
            self._say(f"{place} FAILED {run} {name}: {event['error']}")
        else:
            self._say(f"{place} {run} {name} {duration(event['seconds'])}{rest}")

    def _say(self, line: str) -> None:
        self._spoke = time.time()
        self.say(line)


def planned(log: str, rules: Mapping[str, str]) -> Counter:
    """Jobs per notebook out of the table `Job stats` of Snakemake's log; empty before it is there whole."""
    table = re.search(r"^Job stats:\n(.*?)^total +\d+", log, re.MULTILINE | re.DOTALL)
    counts = re.findall(r"^(\w+) +(\d+)$", table[1], re.MULTILINE) if table else []
    return Counter({rules[rule]: int(count) for rule, count in counts if rule in rules})


def duration(seconds: float) -> str:
    """`6 s`, `4 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def counted(n: int, noun: str) -> str:
    """`1 notebook`, `2 notebooks`."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


RULES = {"audit": AUDIT, "vocab": VOCAB, "baselines": "03_baselines", "finetune": "04_finetune"}
RULES |= {"evaluate": EVALUATION, "report": REPORT}


def run_report(
    dataset: str,
    grid: str | Path,
    *,
    cores: int,
    outputs: str | Path = "outputs",
    notebooks: str | Path = CHECKOUT / "notebooks",
    profile: str = "default",
) -> int:
    """Run the grid on a dataset; write outputs/<dataset>/ and outputs/index.html.

    Parameters
    ----------
    dataset : str
        A name, a YAML file or `auto`; see `perturbret.data.datasets.resolve_dataset`.
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
    from ..data.datasets import resolve_dataset
    from ..data.sources import fetch

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
            f"{entry.name}: {counted(len(checked.runs), 'run')}; log: {_relative(workdir / 'report' / 'workflow.log')}"
        )
        call = {"plan": plan, "workdir": workdir, "cores": cores, "profile": settings, "lock": lock}
        ended = _snakemake("all", append=False, **call)
        broken = {run for run, _ in ended.failed}
        judged = {path.parent.name for path in workdir.glob(f"*/{EVALUATION}.ipynb")}
        plan["evaluated"] = [name for name in plan["runs"] if name in judged - broken]
        if plan["evaluated"] and (ended.whole or ended.failed):
            if "failed" in declared_parameters(notebooks / f"{REPORT}.ipynb"):
                plan["report"]["failed"] = sorted(broken & set(plan["runs"]))
            only = ("--allowed-rules", "report")
            ended = ended.then(_snakemake(f"report/{REPORT}.ipynb", *only, append=True, **call))
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
        "code": {name: notebook_code(notebooks / f"{name}.ipynb") for name in sorted(names)},
        "audit": dict(grid.audit),
        "vocab": dict(grid.vocab),
        "report": dict(grid.report),
        "runs": {
            run.name: {**asdict(run), "fitting_code": _fitting_code(run, notebooks)} for run in grid.runs
        },
        "evaluated": [],
    }


def _fitting_code(run: PlannedRun, notebooks: Path) -> str:
    """Hash of the code that fits a run's method, which notebooks call by name; empty where they will refuse it."""
    default = declared_parameters(notebooks / f"{run.notebook}.ipynb").get("encoder", "")
    try:
        return fitting_code(run.parameters.get("encoder", default))
    except ValueError:
        return ""


def data_stamp(entry: Entry, file: Path | None) -> str:
    """Hash of the file's content and of what the entry says about reading it."""
    described = asdict(entry)
    for name in ("path", "url", "sha256", "citation", "license"):
        del described[name]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=list).encode())
    if file is not None:
        digest.update(bytes.fromhex(sha256_of(file)))
    return f"sha256:{digest.hexdigest()[:32]}"


def notebook_code(notebook: Path) -> str:
    """Hash of a notebook's code and of all that it runs of this package."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    code = "\n".join(line for source in sources for line in source.split("\n") if line[:1] not in ("%", "!"))
    return code_hash(source=code)


def find_profile(name: str) -> Path:
    """Directory of a Snakemake profile: a name of workflow/profiles/, or a path.

    Raises
    ------
    FileNotFoundError
        There is no such profile, or no workflow/ (perturbret was installed without its checkout).
    """
    for folder in (CHECKOUT / "workflow" / "profiles" / name, Path(name).expanduser()):
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    known = sorted(path.parent.name for path in (CHECKOUT / "workflow").glob("profiles/*/config.yaml"))
    raise FileNotFoundError(
        f"profile {name!r}: expected a directory with a config.yaml, or one of {known} in {CHECKOUT / 'workflow'}"
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
                f"{_relative(outputs)}"
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
    path = [str(CHECKOUT), os.environ.get("PYTHONPATH")]
    environment = {
        **clean_environment(),
        "PERTURBRET_OUTPUTS": str(workdir.parent),
        "PERTURBRET_EVENTS": str(events),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    command = [sys.executable, "-m", "snakemake", target, *options]
    for name, value in {
        "snakefile": CHECKOUT / "workflow" / "Snakefile",
        "directory": workdir,
        "configfile": folder / "plan.json",
        "cores": cores,
        "workflow-profile": profile,
        "runtime-source-cache-path": workdir / ".snakemake" / "sources",
    }.items():
        command += [f"--{name}", str(value)]
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
        reason = f": {full}" if full else ""
        _say("\n".join([f"the workflow itself failed{reason}; the end of its log:", *lines]))
        return
    left = f"{counted(ended.undone, 'notebook')} that it had planned, " if ended.undone else ""
    _say(
        f"the workflow ended without executing {left}and {evaluated} of {counted(asked, 'run')} are evaluated: does "
        f"the profile ask for a dry run, or for part of the work? See {_relative(log)}"
    )


def _say_end(failed: dict, finished: bool, page: Path, seconds: float) -> None:
    for (run, name), (reason, kept) in sorted(failed.items()):
        where = f"; kept: {_relative(Path(kept))}" if kept else ""
        _say(f"FAILED {run} {name}: {reason}{where}")
    state = f"{counted(len(failed), 'notebook')} failed" if failed else "NOT finished"
    _say(f"{'finished' if finished else state} after {duration(seconds)}: {_relative(page)}")


def _relative(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def _say(line: str) -> None:
    print(line, flush=True)
