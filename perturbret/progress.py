"""Show how a workflow comes along: which notebook ended, how many are left, how long that will take."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .atomic import no_space

QUIET_SECONDS = 30


@dataclass
class Progress:
    """Follows the events that executed notebooks append to a file (see `perturbret.execute`).

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
        ended = len(self.failed) + sum(map(len, self.seconds.values()))
        return 0 if b"(100%) done" in log else max(self.total.total() - ended, 0)

    def left(self) -> float | None:
        """Seconds that remain, about; None before anything is known."""
        everything = [second for seconds in self.seconds.values() for second in seconds]
        if not everything or not self.total:
            return None
        rest = 0.0
        for name, count in self.total.items():
            # A notebook of which none has ended yet is taken for an average one.
            known = self.seconds.get(name, [])
            mean = sum(known or everything) / len(known or everything)
            rest += max(count - len(known) - self._failures(name), 0) * mean
        return rest / self.cores

    def _failures(self, notebook: str) -> int:
        return sum(name == notebook for _, name in self.failed)

    def _new_events(self) -> list[dict]:
        if not self.events.exists():
            return []
        with open(self.events, "rb") as file:
            file.seek(self._read)
            lines = file.read()
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
        done = len(self.failed) + sum(map(len, self.seconds.values()))
        total = self.total.total()
        place = f"[{done:{len(str(total))}}/{total}]" if total else f"[{done}]"
        if event["event"] == "failed":
            self._say(f"{place} FAILED {run} {name}: {event['error']}")
            return
        left = self.left()
        rest = f"; about {duration(left)} left" if left and done < total else ""
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
