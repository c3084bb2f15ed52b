"""Say whether the running Python has the packages of requirements.lock: `make ... ENV=active` asks this first."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements.lock"
INSTALL = "install them into this environment with: make env ENV=active"
PIN = re.compile(r'(?P<name>[\w.-]+)==(?P<version>[\w.]+)(; sys_platform == "(?P<platform>\w+)")?')


def read_lock(path: Path = LOCK, platform: str = sys.platform) -> dict[str, str]:
    """Pinned version by package name, for one platform.

    Raises
    ------
    ValueError
        A line is neither a comment nor `name==version`, with or without a platform.
    """
    pins = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line or line.startswith("#"):
            continue
        pin = PIN.fullmatch(line)
        if not pin:
            raise ValueError(f"{path.name} line {number}: expected name==version, got {line!r}")
        if pin["platform"] in (None, platform):
            pins[pin["name"]] = pin["version"]
    return pins


def compare(pins: dict[str, str]) -> tuple[list[str], list[str]]:
    """What is missing, and what is there in another version; a build tag such as +cpu counts as the same."""
    missing, other = [], []
    for name, pinned in pins.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        if found.split("+")[0] != pinned:
            other.append(f"{name} {found} (lock: {pinned})")
    return missing, other


def main() -> int:
    """Print the differences to stderr; 1 where packages are missing, 0 otherwise."""
    missing, other = compare(read_lock())
    if find_spec("perturbret") is None:
        missing.append("perturbret itself")
    if other:
        print(
            f"warning: {len(other)} packages differ from requirements.lock: {', '.join(other)}",
            file=sys.stderr,
        )
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        print(f"{sys.prefix}: missing {shown}; {INSTALL}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
