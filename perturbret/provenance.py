"""Where a result came from: hashes of code and artefacts, versions, commit, device."""

import ast
import hashlib
import platform
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
RECORDED_PACKAGES = (
    "numpy", "scipy", "pandas", "scikit-learn", "anndata", "scanpy", "torch", "peft", "accelerate", "safetensors",
    "perturbret",
)  # fmt: skip


def code_hash(*modules: str, without: Collection[str] = ()) -> str:
    """sha256, cut to 16 digits, over package modules, all that they import at any depth, and the data these name.

    Comments, docstrings and layout are left out: they change no result.

    Parameters
    ----------
    modules : str
        Names of the package's modules.
    without : collection of str
        Modules that are neither read nor followed: those whose results are hashed in another way.
    """
    files = modules_behind("\n".join(f"import perturbret.{name}" for name in modules), without)
    digest = hashlib.sha256()
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(files)}
    for path, source in sources.items():
        digest.update(path.name.encode() + b"\0" + _bare(source).encode())
    for path in data_files():
        if any(path.name in source for source in sources.values()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_files() -> list[Path]:
    """Files of the package that are read as data."""
    return sorted(
        path for path in (PACKAGE / "data").rglob("[!.]*") if path.is_file() and path.suffix != ".md"
    )


def modules_behind(source: str, without: Collection[str] = ()) -> set[Path]:
    """Files of the package's modules that `source` imports, directly or through one another."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        for name in _imported_modules(waiting.pop()) - set(without):
            path = PACKAGE / f"{name}.py"
            if path.is_file() and path not in found:
                found.add(path)
                waiting.append(path.read_text(encoding="utf-8"))
    return found


def _bare(source: str) -> str:
    """A module's code without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree)


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
