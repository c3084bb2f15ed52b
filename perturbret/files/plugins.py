"""Files of a user, outside of the package, that register methods and metrics of their own."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_loaded: dict[Path, ModuleType] = {}


def load_plugins() -> dict[str, ModuleType]:
    """Run the Python files that the variable PERTURBRET_PLUGINS names, joined as in PATH, each once.

    Returns
    -------
    dict of str to module
        Those loaded so far, by module name: the file's name without `.py`.

    Raises
    ------
    ValueError
        There is no such file, or another module has its name.
    """
    for name in filter(None, os.environ.get("PERTURBRET_PLUGINS", "").split(os.pathsep)):
        path = Path(name).expanduser().resolve()
        if path in _loaded:
            continue
        if path.suffix != ".py" or not path.is_file():
            raise ValueError(f"PERTURBRET_PLUGINS: expected Python files, got {name}")
        if path.stem in sys.modules:
            raise ValueError(f"PERTURBRET_PLUGINS: expected a name that no module has, got {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = _loaded[path] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem], _loaded[path]
            raise
    return {module.__name__: module for module in _loaded.values()}
