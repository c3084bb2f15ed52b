"""Where a result came from: hashes of the code that made it and of artefacts, versions, commit, device."""

import ast
import hashlib
import platform
import subprocess
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .places import CHECKOUT, PACKAGE

RECORDED_PACKAGES = (
    "numpy", "scipy", "pandas", "scikit-learn", "anndata", "scanpy", "torch", "peft", "accelerate", "safetensors",
    "perturbret",
)  # fmt: skip


def code_hash(*starts: str, source: str = "", without: Collection[str] = ()) -> str:
    """sha256, cut to 16 digits, over the definitions that run, at any depth, and the data files that these name.

    Followed by name through the package's modules: a function that nothing here calls does not count, nor do comments,
    docstrings and layout. Where a name can stand for a whole module, all of that module counts.

    Parameters
    ----------
    starts : str
        `room.module`, or `room.module:name` for one definition of it.
    source : str
        Code from outside of the package, such as a notebook's, that counts and is followed as well.
    without : collection of str
        Rooms and modules that are not followed, `room` or `room.module`, since their results are hashed in another way.
        A module that is a start itself is followed all the same.

    Raises
    ------
    ValueError
        A start is not a module or definition of the package.

    Examples
    --------
    >>> digest = code_hash("files.hashing:mix")
    >>> len(digest), digest == code_hash("files.hashing:mix"), digest == code_hash("files.hashing")
    (16, True, False)
    """
    kept = {start.partition(":")[0] for start in starts}
    waiting = [(module, name) for module, _, name in (start.partition(":") for start in starts)]
    for module, name in waiting:
        if not _path(module).is_file() or (name and name not in _module(module).defined):
            raise ValueError(f"code_hash: expected {module}:{name} to be in the package, it is not there")
    texts = set()
    if source:
        outer = _Module("", source)
        for statement in outer.statements():
            waiting += outer.mentioned(statement)
            texts.add(outer.text(statement))
    seen = set()
    while waiting:
        module, name = waiting.pop()
        left_out = module not in kept and any(f"{module}.".startswith(f"{each}.") for each in without)
        if left_out or (module, name) in seen:
            continue
        seen.add((module, name))
        found = _module(module)
        if name and name in found.imported:  # handed on, as by a room's __init__
            waiting.append(found.imported[name])
        for statement in found.statements(name):
            waiting += found.mentioned(statement)
            texts.add(f"{module}: {found.text(statement)}")
    digest = hashlib.sha256("\0".join(sorted(texts)).encode())
    for path in data_files():
        if any(path.name in text for text in texts):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def data_files() -> list[Path]:
    """Tables and lists that come with the package; checkpoints are hashed by content elsewhere."""
    return sorted(path for path in (PACKAGE / "resources").glob("[!.]*.*") if path.suffix != ".md")


class _Module:
    """One module's code, without docstrings: its top-level statements by the names that they bind, and its imports.

    Attributes
    ----------
    defined : dict
        Name -> the statements that bind it; "" -> those that bind none.
    imported : dict
        Name -> (module of the package, name in it); an empty name in it stands for the whole module.
    """

    def __init__(self, name: str, source: str):
        self.name = name
        self.defined: dict[str, list[ast.stmt]] = {"": []}
        self.imported: dict[str, tuple[str, str]] = {}
        self._texts: dict[ast.stmt, str] = {}
        self._mentioned: dict[ast.stmt, list[tuple[str, str]]] = {}
        tree = _without_docstrings(ast.parse(source))
        for node in _statements(tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._note(node)
        if _path(name).name == "__init__.py":
            for node in ast.walk(tree):
                if isinstance(node, ast.keyword) and node.arg == "submod_attrs":  # a room's door
                    for module, names in ast.literal_eval(node.value).items():
                        self.imported |= {each: (f"{name}.{module}", each) for each in names}
        for statement in tree.body:
            if not isinstance(statement, ast.Import | ast.ImportFrom):
                for bound in _bound(statement) | self._registers(statement) or {""}:
                    self.defined.setdefault(bound, []).append(statement)

    def _note(self, node: ast.Import | ast.ImportFrom) -> None:
        """Remember what an import binds, where it is the package's."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("perturbret."):
                    self.imported[alias.asname or "perturbret"] = (alias.name.partition(".")[2], "")
            return
        words = (node.module or "").split(".")
        if node.level:
            here = self.name.split(".") + ["__init__"] * (_path(self.name).name == "__init__.py")
            words = [*here[: len(here) - node.level], *filter(None, words)]
        elif words[0] == "perturbret":
            words = words[1:]
        else:
            return
        for alias in node.names:
            inner = ".".join([*words, alias.name])
            target = (inner, "") if _path(inner).is_file() else (".".join(words), alias.name)
            if _path(target[0]).is_file():
                self.imported[alias.asname or alias.name] = target

    def _registers(self, statement: ast.stmt) -> set[str]:
        """Names that decorators of this module mention: where a register is used, what registers in it counts."""
        called = {
            node.func.id
            for node in getattr(statement, "decorator_list", [])
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        parts = [part for name in called for part in self.defined.get(name, [])]
        nodes = [node for part in parts for node in ast.walk(part)]
        return {node.id for node in nodes if isinstance(node, ast.Name) and node.id in self.defined}

    def statements(self, name: str = "") -> list[ast.stmt]:
        """What runs for `name`: its own statements and those that bind none; every statement without a name."""
        if name:
            return [*self.defined.get(name, []), *self.defined[""]]
        return [statement for statements in self.defined.values() for statement in statements]

    def text(self, statement: ast.stmt) -> str:
        """A statement's code in one layout."""
        if statement not in self._texts:
            self._texts[statement] = ast.unparse(statement)
        return self._texts[statement]

    def mentioned(self, statement: ast.stmt) -> list[tuple[str, str]]:
        """(module, name) of everything of the package that a statement names; an empty name is a whole module."""
        if statement not in self._mentioned:
            self._mentioned[statement] = self._find_mentioned(list(ast.walk(statement)))
        return self._mentioned[statement]

    def _find_mentioned(self, nodes: list[ast.AST]) -> list[tuple[str, str]]:
        members = {}  # metrics.chance stands for `chance`, where metrics is a module
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module, name = self.imported.get(node.value.id, ("", "whole"))
                if not name and node.attr in {*_module(module).defined, *_module(module).imported}:
                    members[node.value] = (module, node.attr)
        names = [node for node in nodes if isinstance(node, ast.Name) and node not in members]
        own = [(self.name, node.id) for node in names if self.name and node.id in self.defined]
        others = [self.imported[node.id] for node in names if node.id in self.imported]
        return [*own, *others, *members.values()]


def _path(module: str) -> Path:
    """File of a module, `room.module` or `room`."""
    path = PACKAGE.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _module(name: str) -> _Module:
    """A module of the package, read anew and parsed once."""
    return _parsed(name, _path(name).read_text(encoding="utf-8"))


@cache
def _parsed(name: str, source: str) -> _Module:
    return _Module(name, source)


def _bound(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    nodes = list(ast.walk(statement))
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return stored | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in [tree, *_statements(tree.body)]:
        described = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if described and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def _statements(body: list[ast.AST]) -> Iterator[ast.AST]:
    """Statements at any depth, without looking into expressions, which is most of a walk."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from _statements(getattr(node, part, []))


def directory_hash(directory: Path) -> str:
    """sha256 over names and contents of the files in a directory.

    Examples
    --------
    >>> from pathlib import Path
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as directory:
    ...     _ = Path(directory, "a.txt").write_text("one")
    ...     first = directory_hash(Path(directory))
    ...     _ = Path(directory, "a.txt").rename(Path(directory, "b.txt"))
    ...     print(first == directory_hash(Path(directory)))
    False
    """
    digest = hashlib.sha256()
    for path in sorted(Path(directory).rglob("*")):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(device: str = "cpu") -> dict:
    """Package versions, commit, device and time, for the manifest.

    device : where it was computed, `perturbret.model.device_name()` where a network was.

    Examples
    --------
    >>> sorted(environment())
    ['device', 'finished', 'git_commit', 'git_dirty', 'packages', 'python']
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
    done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
