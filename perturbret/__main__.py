"""Command line: execute one notebook, or run the whole workflow of a dataset."""

import argparse
import codecs
import locale
import os
import sys
from pathlib import Path

from . import __version__
from .workflow.execution import NotebookFailed, execute
from .workflow.parameters import ParameterError, declared_parameters, load_parameters, load_yaml, parse_text


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 where a notebook failed, or 2 where what was asked for cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        return options.do(options)
    except NotebookFailed as failure:
        print(f"FAILED {failure}; kept: {failure.kept}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perturbret", description=__doc__)
    parser.add_argument("--version", action="version", version=f"perturbret {__version__}")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("execute", help="execute a notebook, write it and its HTML page")
    one.add_argument("notebook", type=Path)
    one.add_argument("output", type=Path, help="the executed notebook; the page is written beside it")
    one.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter"
    )
    one.add_argument(
        "-f", type=Path, action="append", default=[], metavar="FILE", help="YAML file of parameters"
    )
    one.add_argument("-y", action="append", default=[], metavar="YAML", help="YAML or JSON of parameters")
    one.set_defaults(do=_execute)
    report = commands.add_parser("report", help="run the grid on a dataset, write OUTPUTS/index.html")
    report.add_argument(
        "--dataset", default="auto", help="name in params/datasets.yaml, YAML file, or auto (default)"
    )
    report.add_argument(
        "--grid", type=Path, default=Path("params/ablation.yaml"), help="default: %(default)s"
    )
    report.add_argument(
        "--cores", type=int, default=os.cpu_count(), help="notebooks at a time; default: %(default)s"
    )
    report.add_argument("--outputs", type=Path, default=Path("outputs"), help="default: %(default)s")
    report.add_argument(
        "--profile", default="default", help="of workflow/profiles/, e.g. slurm, or a directory"
    )
    report.add_argument("--notebooks", type=Path, help="default: the notebooks of this checkout")
    report.set_defaults(do=_report)
    return parser


def _execute(options: argparse.Namespace) -> int:
    declared = declared_parameters(options.notebook.expanduser())
    given = {}
    for path in options.f:
        given |= load_parameters(path.expanduser())
    for text in options.y:
        values = load_yaml(text, where="-y")
        if not isinstance(values, dict):
            raise ParameterError(f"-y: expected a mapping of names to values, got {values!r}")
        given |= values
    for name, text in options.p:
        given[name] = parse_text(name, text, declared, where="-p")
    page = execute(options.notebook, options.output, given)
    print(page)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .workflow.snakemake import run_report

    place = {} if options.notebooks is None else {"notebooks": options.notebooks}
    return run_report(
        options.dataset,
        options.grid,
        cores=options.cores,
        outputs=options.outputs,
        profile=options.profile,
        **place,
    )


def _speak_utf8() -> None:
    """Start again in UTF-8 mode where the locale has another encoding; print as escapes what cannot be shown."""
    if not sys.flags.utf8_mode and codecs.lookup(locale.getencoding()).name != "utf-8":
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "PYTHONUTF8": "1"})
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    _speak_utf8()
    sys.exit(main())
