"""Parameters of notebooks: declared, read from YAML and the command line, checked."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from perturbret.workflow.parameters import (
    ParameterError,
    check_given,
    check_parameters,
    declared_parameters,
    load_parameters,
    load_yaml,
    parse_text,
)

DECLARED = {
    "seed": 0,
    "rate": 0.1,
    "encoder": "pca",
    "fast": False,
    "ks": [1, 5],
    "masks": ["none"],
    "search": {},
    "free": None,
}


@pytest.fixture
def notebook(tmp_path):
    """Maker of a notebook file with the given sources of cells tagged `parameters`."""

    def write(*sources):
        cells = [{"cell_type": "code", "metadata": {}, "source": "a = 1"}]
        cells += [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": s} for s in sources]
        path = tmp_path / "03_toy.ipynb"
        path.write_text(json.dumps({"cells": cells}))
        return path

    return write


def test_declared_are_the_literals_of_the_tagged_cell(notebook):
    source = [
        "# what to run\n",
        "seed = 0\n",
        "rate: float = -1e-3\n",
        "ks = [1, 5]  # sizes\n",
        "x = None\n",
    ]
    assert declared_parameters(notebook(source)) == {"seed": 0, "rate": -0.001, "ks": [1, 5], "x": None}
    assert declared_parameters(notebook()) == {}


@pytest.mark.parametrize(
    "line", ["x = y", "x = 1 + z", "import os", "a = b = 1", "x += 1", "a, b = 1, 2", "x: int"]
)
def test_a_line_that_is_no_literal_is_named(notebook, line):
    with pytest.raises(
        ParameterError, match="03_toy.ipynb: parameters cell, line 2: expected `name = literal`"
    ):
        declared_parameters(notebook(f"ok = 1\n{line}"))


def test_two_tagged_cells_and_no_file_are_errors(notebook, tmp_path):
    with pytest.raises(ParameterError, match="expected one cell tagged 'parameters', found 2"):
        declared_parameters(notebook("a = 1", "b = 2"))
    with pytest.raises(FileNotFoundError, match="04_none.ipynb"):
        declared_parameters(tmp_path / "04_none.ipynb")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ParameterError, match="03: unknown parameter 'encodr'; nearest: 'encoder'"):
        check_parameters({"seed": 1, "encodr": "pca"}, DECLARED, where="03")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": 1e4}, {"seed": 10_000}),
        ({"rate": 1}, {"rate": 1.0}),
        ({"ks": [1, 1e1]}, {"ks": [1, 10]}),
        ({"ks": []}, {"ks": []}),
        ({"free": "x"}, {"free": "x"}),
        ({"search": {"C": [0.1, 1]}}, {"search": {"C": [0.1, 1]}}),
        ({"fast": True, "encoder": ""}, {"fast": True, "encoder": ""}),
    ],
)
def test_values_come_out_in_the_declared_type(given, expected):
    found = check_parameters(given, DECLARED, where="03")
    assert found == expected and repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": "7"}, r"03: seed: expected a whole number \(default 0\), got text: '7'"),
        ({"seed": 0.5}, "seed: expected a whole number"),
        ({"seed": True}, "seed: expected a whole number"),
        ({"seed": float("inf")}, "seed: expected a whole number"),
        ({"rate": "1e-3"}, r"rate: expected a number \(default 0.1\), got text: '1e-3'"),
        ({"rate": None}, "rate: expected a number"),
        ({"encoder": 5}, "encoder: expected text"),
        ({"fast": 1}, "fast: expected true or false"),
        ({"ks": 5}, "ks: expected a list"),
        ({"ks": [1, "5"]}, r"ks\[1\]: expected a whole number"),
        ({"masks": ["none", 3]}, r"masks\[1\]: expected text"),
        ({"search": [1]}, "search: expected a mapping"),
        (
            {"search": {"C": [0.1, "1e4"]}},
            "search.C: expected a number, got the text '1e4'; write it without quotes",
        ),
    ],
)
def test_values_of_another_type_are_refused(given, said):
    with pytest.raises(ParameterError, match=said):
        check_parameters(given, DECLARED, where="03")


def test_yaml_reads_numbers_as_people_write_them():
    text = "a: 1e4\nb: 1.5e3\nc: 1e-3\nd: 12\ne: -2E+5\nf: '1e4'\ng: none\nh: [1e2]\ni: .5\nj: 1e4x\nk: 3."
    expected = {"a": 1e4, "b": 1500.0, "c": 0.001, "d": 12, "e": -2e5, "f": "1e4", "g": "none", "h": [100.0]}
    expected |= {"i": 0.5, "j": "1e4x", "k": 3.0}
    found = load_yaml(text, where="x")
    assert found == expected and type(found["d"]) is int


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\nb: 2\na: 3", "x: line 1: key 'a' is given twice"), ("a: [1", "x: expected YAML")],
)
def test_yaml_that_is_ambiguous_or_broken_is_refused(text, said):
    with pytest.raises(ParameterError, match=said):
        load_yaml(text, where="x")


def test_a_file_of_parameters_holds_one_mapping(tmp_path):
    path = tmp_path / "logreg.yaml"
    path.write_text("encoder: logreg\nsearch: {C: [1e-2, 1]}\n")
    assert load_parameters(path) == {"encoder": "logreg", "search": {"C": [0.01, 1]}}
    path.write_text("- logreg\n")
    with pytest.raises(ParameterError, match="logreg.yaml: expected a mapping of names to values, got list"):
        load_parameters(path)
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_parameters(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("encoder", "007", "007"),
        ("seed", "1e4", 1e4),
        ("ks", "[1, 5]", [1, 5]),
        ("fast", "true", True),
        ("search", "{C: [1e-3]}", {"C": [0.001]}),
        ("no_such_name", "1", "1"),
    ],
)
def test_the_command_line_is_read_by_declared_type(name, text, value):
    assert parse_text(name, text, DECLARED, where="-p") == value


@pytest.fixture
def papermill_says(tmp_path):
    """Executes a small notebook by papermill itself; what its last cell printed, or the error's text."""
    cells = [
        new_code_cell("from perturbret.workflow.parameters import check_given"),
        new_code_cell("seed = 0\nflag = False\nsearch = {}\nrate = 0.5", metadata={"tags": ["parameters"]}),
        new_code_cell("check_given()\nprint(repr((seed, flag, search, rate)))"),
    ]
    nbformat.write(
        new_notebook(cells=cells, metadata={"language_info": {"name": "python"}}), tmp_path / "in.ipynb"
    )

    def say(**given):
        import papermill
        from papermill.exceptions import PapermillExecutionError

        options = {"kernel_name": "python3", "progress_bar": False, "parameters": given}
        try:
            made = papermill.execute_notebook(
                str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), **options
            )
        except PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}"
        return made.cells[-1].outputs[0].text.strip()

    return say


def test_a_notebook_that_papermill_runs_refuses_other_types(papermill_says):
    said = papermill_says(flag="no")
    assert said.startswith(
        "ParameterError: parameters: flag: expected true or false (default False), got text: 'no'; "
    )
    assert "use -y" in said
    assert "unknown parameter 'sed'; nearest: 'seed'" in papermill_says(sed=1)
    assert papermill_says(seed=1e1, search={"C": [0.1]}, rate=1) == "(10, False, {'C': [0.1]}, 1.0)"


def test_outside_a_notebook_there_is_nothing_to_check():
    check_given()
