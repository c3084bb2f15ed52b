"""Parameters of notebooks: what a notebook declares, what a YAML file or the command line gives, whether they fit."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.names import nearest

NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
_EXPECTED[dict] = "a mapping"


class ParameterError(ValueError):
    """A parameter that the notebook does not declare, or a value of another type than it declares."""


def declared_parameters(notebook: str | Path) -> dict[str, Any]:
    """Name and default of every parameter in the cell tagged `parameters`, in order; empty without such a cell.

    Raises
    ------
    FileNotFoundError
        There is no such notebook.
    ParameterError
        The cell holds something other than `name = literal` (papermill would not update a derived value).
    """
    path = Path(notebook)
    if not path.is_file():
        raise FileNotFoundError(f"notebook: expected a file at {path}, found none")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) > 1:
        raise ParameterError(f"{path.name}: expected one cell tagged 'parameters', found {len(tagged)}")
    return parameter_cell("".join(tagged[0]["source"]), where=path.name) if tagged else {}


def parameter_cell(source: str, *, where: str) -> dict[str, Any]:
    """Name and value of every assignment in the source of a parameters cell.

    Raises
    ------
    ParameterError
        The cell holds something other than `name = literal`.
    """
    declared = {}
    for statement in ast.parse(source).body:
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        try:
            if not isinstance(statement, ast.Assign | ast.AnnAssign) or not isinstance(targets[0], ast.Name):
                raise ValueError("not an assignment to a name")
            if len(targets) > 1:
                raise ValueError("several names share a value")
            declared[targets[0].id] = ast.literal_eval(statement.value)
        except ValueError as error:
            raise ParameterError(
                f"{where}: parameters cell, line {statement.lineno}: expected `name = literal`, "
                f"got `{ast.unparse(statement)}`"
            ) from error
    return declared


def check_parameters(given: Mapping[str, Any], declared: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The given values in the declared types.

    Parameters
    ----------
    given : mapping of name to value
    declared : mapping of name to default
        See `declared_parameters`. A default of None accepts any value; a list of values of one type asks for a
        list of that type; a whole number is accepted where a float is declared, and becomes one.
    where : str
        What messages begin with.

    Raises
    ------
    ParameterError
        An unknown name (with the nearest known ones), or a value of another type.

    Examples
    --------
    >>> declared = {"mask": "all_targets", "seed": 0, "train_share": 1.0}
    >>> check_parameters({"train_share": 1, "seed": 3}, declared, where="grid")
    {'train_share': 1.0, 'seed': 3}
    >>> check_parameters({"sead": 3}, declared, where="grid")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    perturbret.workflow.parameters.ParameterError: grid: unknown parameter 'sead'; nearest: 'seed'; ...
    """
    for name in given:
        if name not in declared:
            raise ParameterError(f"{where}: unknown parameter {name!r}; {nearest(str(name), list(declared))}")
    return {name: _fit(value, declared[name], f"{where}: {name}") for name, value in given.items()}


def check_given() -> None:
    """Refuse, in a notebook at work, parameters that its parameters cell does not declare, or values of other types.

    For the cell after the parameters. papermill hands over whatever it is given: `-p overwrite no` is a text, which
    counts as true. What the notebook declares is the first of the executed cells that holds nothing but
    `name = literal`; values get the declared types (`1e3` becomes a whole number where one is declared). Outside a
    notebook there is nothing to check.

    Raises
    ------
    ParameterError
        Names the parameter, what was expected and what was got.
    """
    import IPython

    shell = IPython.get_ipython()
    # Without a history (as under nbval, which gives no parameters) nothing says what was declared.
    if shell is None or not any(shell.user_ns["In"]):
        return
    literal = [cell for cell in map(_literals, shell.user_ns["In"]) if cell]
    if not literal:
        raise ParameterError("parameters: expected an executed cell of `name = literal`, found none")
    declared = literal[0]
    # papermill's own cell follows that of the parameters and begins with this line.
    injected = [_literals(source) for source in shell.user_ns["In"] if source.startswith("# Parameters\n")]
    given = {name: shell.user_ns[name] for cell in [declared, *injected] for name in cell}
    try:
        shell.user_ns.update(check_parameters(given, declared, where="parameters"))
    except ParameterError as error:
        texts = any(isinstance(value, str) for cell in injected for value in cell.values())
        hint = "; what papermill's -p cannot read as a number, True, False or None is text: use -y"
        raise ParameterError(f"{error}{hint if texts else ''}") from None


def _literals(source: str) -> dict[str, Any]:
    """What a cell of nothing but `name = literal` assigns; empty for any other cell."""
    try:
        return parameter_cell(source, where="cell")
    except (ParameterError, SyntaxError):
        return {}


def parse_text(name: str, text: str, declared: Mapping[str, Any], *, where: str) -> Any:
    """The value that `text` from a command line stands for: as it is where text is declared, else read as YAML."""
    if isinstance(declared.get(name), str) or name not in declared:
        return text
    return load_yaml(text, where=f"{where}: {name}")


def load_yaml(text: str, *, where: str) -> Any:
    """Read YAML; `1e4` and `1.5e3` are numbers (to PyYAML they are texts), a key given twice is an error.

    Raises
    ------
    ParameterError
        Not YAML, or a key is given twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ParameterError(
                        f"{where}: line {node.start_mark.line + 1}: key {key!r} is given twice"
                    )
            return super().construct_mapping(node, deep=deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^{NUMBER.pattern}$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ParameterError(f"{where}: expected YAML, got {error}") from error


def load_parameters(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file of parameters.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ParameterError
        The file holds something else than one mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"parameters: expected a YAML file at {path}, found none")
    content = load_yaml(path.read_text(encoding="utf-8"), where=path.name)
    if not isinstance(content, dict):
        raise ParameterError(
            f"{path.name}: expected a mapping of names to values, got {type(content).__name__}"
        )
    return content


def _fit(value: Any, default: Any, where: str) -> Any:
    kind = type(default)
    if kind in (int, float) and type(value) in (int, float):
        # 1e4 is how people write a whole number, too.
        if kind is float or float(value).is_integer():
            return kind(value)
    elif default is not None and type(value) is not kind:
        pass
    elif kind is list and default and len({type(item) for item in default}) == 1:
        return [_fit(item, default[0], f"{where}[{i}]") for i, item in enumerate(value)]
    else:
        _refuse_numbers_as_text(value, where)
        return value
    got = _EXPECTED.get(type(value), type(value).__name__)
    raise ParameterError(f"{where}: expected {_EXPECTED[kind]} (default {default!r}), got {got}: {value!r}")


def _refuse_numbers_as_text(value: Any, where: str) -> None:
    """Within lists and mappings no type is declared: a number in quotes there is nearly always a mistake."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_numbers_as_text([item], f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, str) and NUMBER.fullmatch(item):
                raise ParameterError(
                    f"{where}: expected a number, got the text {item!r}; write it without quotes"
                )
            _refuse_numbers_as_text(item, where)
