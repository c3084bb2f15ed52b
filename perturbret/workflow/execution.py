"""Execute one notebook with papermill and put the result and its HTML page in place, whole or not at all."""

import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files.atomic import no_space, write_text
from ..files.places import CHECKOUT
from .parameters import check_parameters, declared_parameters

FAILED = "failed"
INLINE = "module://matplotlib_inline.backend_inline"


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; `kept` is the path of the partly executed notebook."""

    def __init__(self, message: str, kept: Path):
        super().__init__(message)
        self.kept = kept


def execute(notebook: str | Path, output: str | Path, parameters: Mapping[str, Any] | None = None) -> Path:
    """Execute a notebook in its own directory, and write it and its HTML page beside each other.

    The executed notebook is renamed into place last: where it stands, everything of it is complete. When the
    notebook fails, nothing is put in place; the notebook as far as it came, with its traceback, and its page
    are kept in `failed/` beside `output`, until it succeeds.

    Parameters
    ----------
    notebook : path
    output : path
        Must end in .ipynb; the page has the same name with .html.
    parameters : mapping of name to value, optional
        Names must be declared in the notebook's cell tagged `parameters`.

    Returns
    -------
    Path
        Of the HTML page.

    Raises
    ------
    FileNotFoundError
        There is no such notebook.
    ParameterError
        An unknown parameter or a value of the wrong type; nothing was executed.
    NotebookFailed
        A cell raised, or the kernel died.
    DiskFull
        There was no space for the notebook or its page.
    """
    notebook, output = (Path(path).expanduser().resolve() for path in (notebook, output))
    if output.suffix != ".ipynb":
        raise ValueError(f"output: expected a name ending in .ipynb, got {output.name!r}")
    given = check_parameters(parameters or {}, declared_parameters(notebook), where=notebook.stem)
    _remove_leftovers(output)
    started = time.time()
    _note(output, "start")
    try:
        page = _execute(notebook, output, given)
    except (NotebookFailed, OSError) as failure:
        kept = str(failure.kept) if isinstance(failure, NotebookFailed) else None
        error = str(failure) if kept else f"{type(failure).__name__}: {failure}"
        with suppress(OSError):  # on a full disk; what is raised is the failure itself
            _note(output, "failed", seconds=time.time() - started, error=error, kept=kept)
        raise
    _note(output, "done", seconds=time.time() - started)
    return page


def _execute(notebook: Path, output: Path, parameters: dict[str, Any]) -> Path:
    # Optional parts of jsonschema and papermill, for address formats and Hadoop, that take longer to import than
    # all the rest (1.3 of 2 s).
    with _unimportable("rfc3987_syntax", "pyarrow"):
        import nbformat
        import papermill  # noqa: F401

    from .html import render

    page = output.with_suffix(".html")
    kept = output.parent / FAILED / output.name
    output.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="perturbret-"))
    try:
        error = _papermill(notebook, directory / output.name, parameters, directory)
        node = nbformat.read(directory / output.name, 4)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    # papermill notes absolute paths, the temporary one among them.
    node.metadata.papermill.update(input_path=notebook.name, output_path=output.name)
    if error:
        write_text(kept.with_suffix(".html"), render(node, name=notebook.stem, error=error, home=_home(kept)))
        write_text(kept, nbformat.writes(node))
        raise NotebookFailed(error, kept)
    write_text(page, render(node, name=notebook.stem, home=_home(output)))
    write_text(output, nbformat.writes(node))
    for path in (kept, kept.with_suffix(".html")):
        path.unlink(missing_ok=True)
    if kept.parent.is_dir() and not any(kept.parent.iterdir()):
        kept.parent.rmdir()
    return page


def _papermill(notebook: Path, output: Path, parameters: dict[str, Any], directory: Path) -> str | None:
    """Execute into `output`; None, or in one line what stopped it. `directory` is for the kernel's sockets."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, output)),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            cwd=str(notebook.parent),
            progress_bar=False,
            kernel_manager_class=_kernel_manager(str(directory)),
            shutdown_kernel="immediate",  # all is done by then; to be asked to leave takes a kernel half a second
        )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}".strip().partition("\n")[0]
    except DeadKernelError:
        return no_space(directory) or "the kernel died, which mostly means that the machine ran out of memory"
    return None


def _kernel_manager(directory: str) -> type:
    """A kernel manager for this very interpreter, whatever kernels are registered on the machine.

    It talks through sockets in `directory`: with ports, notebooks that start at the same moment may pick the
    same one. The kernel also holds the caller's lock (see `perturbret.workflow.snakemake`), so that whoever waits for
    the lock waits for kernels that outlive this process, too.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    # Figures lay themselves out: to be cropped, each would be drawn a second time.
    uncropped = "--InlineBackend.print_figure_kwargs={'bbox_inches': None}"
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", uncropped]

    class CurrentPython(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=argv, display_name="Python 3", language="python")

        def __init__(self, **kwargs):
            super().__init__(
                transport="ipc", connection_file=os.path.join(directory, "kernel.json"), **kwargs
            )

        async def _async_launch_kernel(self, command, *, env, **kwargs):
            # Of the caller's environment, what would change the page: figures go into it whatever backend is the
            # caller's, and checks are made under -O, too.
            env = {**env, "MPLBACKEND": INLINE}
            env.pop("PYTHONOPTIMIZE", None)
            if (CHECKOUT / "pyproject.toml").exists():
                # A checkout that is not installed: the kernel does not run where it would be found.
                path = [str(CHECKOUT), env.get("PYTHONPATH")]
                env = {**env, "PYTHONPATH": os.pathsep.join(filter(None, path))}
            if stat.S_ISREG(os.fstat(0).st_mode):
                kwargs["pass_fds"] = (os.dup(0),)
            await super()._async_launch_kernel(command, env=env, **kwargs)

    return CurrentPython


@contextmanager
def _unimportable(*names: str):
    """Within the block, modules that are not imported yet cannot be."""
    blocked = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]


def _remove_leftovers(output: Path) -> None:
    """Remove temporaries that an execution killed before its end left beside `output`."""
    for path in output.parent.glob(f".{output.stem}.*.tmp.*"):
        path.unlink(missing_ok=True)


def _home(path: Path) -> str | None:
    """Relative address of the index of all runs, when the page is one of them."""
    outputs = Path(os.environ.get("PERTURBRET_OUTPUTS", "")).expanduser().resolve()
    if not os.environ.get("PERTURBRET_OUTPUTS") or outputs not in path.parents:
        return None
    return os.path.relpath(outputs / "index.html", path.parent)


def _note(output: Path, event: str, **details) -> None:
    """Append a line to the events that the driver follows; short appends of several processes do not mix."""
    path = os.environ.get("PERTURBRET_EVENTS")
    if path:
        line = json.dumps({"output": str(output), "event": event, "time": time.time(), **details}) + "\n"
        with open(path, "a", encoding="utf-8") as events:
            events.write(line)
