"""Where a result came from: hashes of code and artefacts, versions, commit, device."""

import ast
import hashlib
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECORDED_PACKAGES = (
    "numpy", "scipy", "pandas", "scikit-learn", "anndata", "scanpy", "torch", "peft", "accelerate", "safetensors",
    "perturbret",
)  # fmt: skip


def code_hash(*modules: str) -> str:
    """sha256 over package modules, all package modules that they import at any depth, and the packaged data."""
    files = modules_behind("\n".join(f"import perturbret.{name}" for name in modules))
    digest = hashlib.sha256()
    for path in sorted([*files, *data_files()]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_files() -> list[Path]:
    """Files of the package that are read as data."""
    return sorted(
        path for path in (PACKAGE / "data").rglob("[!.]*") if path.is_file() and path.suffix != ".md"
    )


def modules_behind(source: str) -> set[Path]:
    """Files of the package's modules that `source` imports, directly or through one another."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        for name in _imported_modules(waiting.pop()):
            path = PACKAGE / f"{name}.py"
            if path.is_file() and path not in found:
                found.add(path)
                waiting.append(path.read_text(encoding="utf-8"))
    return found


def _imported_modules(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("perturbret.")
            }
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level:
                module = ["perturbret", *filter(None, module)]
            if module[0] == "perturbret":
                names |= {module[1]} if len(module) > 1 else {alias.name for alias in node.names}
    return names


def directory_hash(directory: Path) -> str:
    """sha256 over names and contents of the files in a directory."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(device: str = "cpu") -> dict:
    """Package versions, commit, device and time, for the manifest.

    device : where it was computed, `perturbret.model.device_name()` where a network was.
    """
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": f"{device} ({platform.machine()})",
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*words: str) -> str:
    checkout = Path(__file__).resolve().parents[1]
    done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
