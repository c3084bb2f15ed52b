"""Notebooks stay thin and clean: one cell of literal parameters, no definitions, short cells, no outputs."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import yaml

from perturbret.workflow.parameters import ParameterError, check_parameters, declared_parameters

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMS = ROOT / "params"
MAX_CELL_LINES = 25
MAX_CODE_LINES = 100
METADATA = {"kernelspec", "language_info"}


def flaws(path):
    """Sentences on what is wrong with the style of a notebook."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    sources = [
        "\n".join(line for line in c.source.splitlines() if not line.startswith(("%", "!"))) for c in code
    ]
    found = []
    if any(cell.outputs or cell.execution_count for cell in code):
        found.append("outputs not stripped")
    if set(notebook.metadata) - METADATA or set(notebook.metadata.get("language_info", {})) - {"name"}:
        found.append("metadata of the editor or of a run")
    tagged = sum("parameters" in cell.metadata.get("tags", []) for cell in code)
    if tagged != 1:
        found.append(f"{tagged} cells tagged parameters, expected 1")
    try:
        declared_parameters(path)
    except ParameterError as error:
        found.append(str(error))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if any(isinstance(node, definitions) for source in sources for node in ast.walk(ast.parse(source))):
        found.append("defines functions or classes")
    longest = max((len(cell.source.splitlines()) for cell in code), default=0)
    if longest > MAX_CELL_LINES:
        found.append(f"a cell of {longest} lines, expected at most {MAX_CELL_LINES}")
    lines = sum(
        bool(line.strip()) and line.strip()[0] != "#" for source in sources for line in source.splitlines()
    )
    if lines > MAX_CODE_LINES:
        found.append(f"{lines} lines of code, expected at most {MAX_CODE_LINES}")
    first = notebook.cells[0]
    if (
        first.cell_type != "markdown"
        or not re.match(r"# \d\d · ", first.source)
        or "**Question:**" not in first.source
    ):
        found.append("does not open with a title and its question")
    return found


@pytest.fixture
def edited(tmp_path):
    """Path of a small notebook without flaws, after a change to it."""

    def write(change=lambda notebook: None):
        opening = nbformat.v4.new_markdown_cell("# 09 · Example\n\n**Question:** what is shown?")
        tagged = {"tags": ["parameters"]}
        parameters = nbformat.v4.new_code_cell("dataset = 'auto'\nsizes = [1, 5]\nx = -1.0", metadata=tagged)
        cells = [opening, parameters, nbformat.v4.new_code_cell("print(dataset)")]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
        change(notebook)
        nbformat.write(notebook, tmp_path / "09_example.ipynb")
        return tmp_path / "09_example.ipynb"

    return write


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_thin_and_clean(path):
    assert flaws(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_checks_its_parameters_first_and_shows_tables_that_escape(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    (place,) = [i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    assert code[place + 1].source.startswith("check_given()\n")
    everything = "\n".join(cell.source for cell in code)
    assert ".style" not in everything and "to_html" not in everything, "use perturbret.report.wording"


def test_a_good_notebook_has_no_flaw(edited):
    assert flaws(edited()) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f():\n    return 1", "defines functions or classes"),
        ("class A:\n    pass", "defines functions or classes"),
        ("if True:\n    def f():\n        pass", "defines functions or classes"),
        ("x = 1\n" * 26, "a cell of 26 lines, expected at most 25"),
    ],
)
def test_flaws_of_a_cell_are_seen(edited, source, said):
    path = edited(lambda notebook: notebook.cells[2].update(source=source))
    assert flaws(path) == [said]


@pytest.mark.parametrize("source", ["x = y", "x = 2 * 3", "import os", "a = b = 1"])
def test_parameters_that_are_no_literals_are_seen(edited, source):
    (flaw,) = flaws(edited(lambda notebook: notebook.cells[1].update(source=source)))
    assert source in flaw


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda n: n.cells[2].update(outputs=[nbformat.v4.new_output("stream", text="hi")]),
            "outputs not stripped",
        ),
        (lambda n: n.cells[2].update(execution_count=3), "outputs not stripped"),
        (lambda n: n.cells[1].update(metadata={}), "0 cells tagged parameters, expected 1"),
        (lambda n: n.cells[0].update(source="# Example"), "does not open with a title and its question"),
        (lambda n: n.metadata.update(papermill={}), "metadata of the editor or of a run"),
        (
            lambda n: n.cells.extend(nbformat.v4.new_code_cell("x = 1\n" * 20) for _ in range(5)),
            "104 lines of code, expected at most 100",
        ),
    ],
)
def test_other_flaws_are_seen(edited, change, said):
    assert flaws(edited(change)) == [said]


def grids():
    """Content of every grid file in params/: those with `runs`."""
    contents = {path.stem: yaml.safe_load(path.read_text()) for path in PARAMS.glob("*.yaml")}
    return {
        name: content for name, content in contents.items() if isinstance(content, dict) and "runs" in content
    }


# Recipes that take too long for a grid of this project.
IN_NO_GRID = {
    "runs": [
        {"notebook": "03_baselines", "recipes": ["boosted_trees"]},
        {"notebook": "04_finetune", "recipes": ["scgpt_full_x3", "scgpt_lora_head_random"]},
    ]
}


def test_each_key_of_a_recipe_is_a_parameter_of_the_notebook_that_gets_it():
    used = set()
    for name, grid in {**grids(), "in no grid": IN_NO_GRID}.items():
        for block in grid["runs"]:
            declared = declared_parameters(ROOT / "notebooks" / f"{block['notebook']}.ipynb")
            assert set(block.get("vary", {})) <= set(declared)
            for item in block["recipes"]:
                recipe = item["recipe"] if isinstance(item, dict) else item
                keys = yaml.safe_load((PARAMS / f"{recipe}.yaml").read_text())
                assert check_parameters(keys, declared, where=f"{name}: {recipe}")
                used.add(recipe)
    unused = (
        {path.stem for path in PARAMS.glob("*.yaml")}
        - used
        - {"datasets", "references", "checkpoints", *grids()}
    )
    assert unused == set(), "recipes in no grid: nothing checks their keys"


def test_each_key_of_a_grid_is_a_parameter_of_the_notebook_that_gets_it():
    parts = {"audit": "01_data_audit", "vocab": "02_vocab_coverage"}
    parts |= {"evaluation": "05_retrieval_eval", "report": "06_ablation_report"}
    assert "ablation" in grids()
    for grid in grids().values():
        for part, notebook in parts.items():
            assert set(grid.get(part) or {}) <= set(
                declared_parameters(ROOT / "notebooks" / f"{notebook}.ipynb")
            )
