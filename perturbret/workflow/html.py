"""Pages of executed notebooks, and the index of all runs: HTML that opens offline and requests nothing."""

import base64
import copy
import hashlib
import html as escapes
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from .parameters import ParameterError, parameter_cell

TEMPLATES = Path(__file__).with_name("templates")
MIME = "application/vnd.perturbret+json"
SIMULATED = "SIMULATED DATA"
# What a page with that banner contains, and no other.
BANNERED = f'<div class="banner" role="alert">{SIMULATED}'
_IMAGES = ("image/png", "image/jpeg", "image/svg+xml")


def render(
    notebook,
    *,
    title: str | None = None,
    name: str = "",
    banner: str | None = None,
    fold_code: bool = True,
    error: str | None = None,
    home: str | None = None,
) -> str:
    """One self-contained page of an executed notebook.

    Parameters
    ----------
    notebook : path or nbformat.NotebookNode
        A node is not changed.
    title : str, optional
        The notebook's first heading unless given.
    name : str
        Of the notebook, for the footer.
    banner : str, optional
        Shown on top of every page of the print and at every scroll position. Unless given: what
        `notebook.metadata["perturbret"]["banner"]` says, or SIMULATED DATA when an output of type
        `application/vnd.perturbret+json` says `{"simulated": true}`.
    fold_code : bool, default True
        Show code cells folded.
    error : str, optional
        What stopped the notebook, shown on top.
    home : str, optional
        Relative address of the index of all runs.

    Returns
    -------
    str
        HTML that requests nothing, as far as the notebook's own outputs allow; its content security policy keeps
        browsers from loading the rest.

    Examples
    --------
    >>> from nbformat.v4 import new_markdown_cell, new_notebook
    >>> page = render(new_notebook(cells=[new_markdown_cell("# A result")]), banner="SIMULATED DATA")
    >>> "<title>A result" in page, "SIMULATED DATA" in page
    (True, True)
    """
    import nbformat

    node = nbformat.read(notebook, 4) if isinstance(notebook, str | Path) else copy.deepcopy(notebook)
    banner = banner or _banner(node)
    parameters = _mark_parameters(node)
    _describe_images(node)
    body, contents = _number_headings(_exporter(fold_code).from_notebook_node(node)[0])
    # In a narrow column `0.18 [0.16, 0.20]` may break before the bracket, not within.
    body = re.sub(r"(\[[-+.%\d]+), ([-+.%\d]+\])", r"\1,&nbsp;\2", body)
    first = next((text for level, _, text in contents if level == 1), "")
    return _page(
        "page.html.j2",
        title=title or first or name or "notebook",
        banner=banner,
        body=body,
        contents=[entry for entry in contents if entry[0] > 1],
        error=error,
        error_anchor="papermill-error-cell" if 'id="papermill-error-cell"' in body else None,
        home=home,
        context=parameters.get("run") or parameters.get("dataset"),
        footer=_footer(node, name),
    )


def index_page(
    datasets: Sequence[dict], *, banner: str | None = None, title: str = "perturbret: all runs"
) -> str:
    """The page that links everything.

    Parameters
    ----------
    datasets : sequence of dict
        `name`; `simulated`; `report`, the address of the report or None; `others` and `failed`, lists of
        (text, address) and (text, address, reason); `other_data`, names of what is not linked; `tables`, a
        list of (heading, columns, rows), where a row is a dict of `name` and
        `cells`, one list per column of (label, [(text, address, failed), ...]). Addresses are relative.
    banner : str, optional
        Shown on top; for a single dataset that is simulated it is there anyway.
    """
    if datasets and all(dataset["simulated"] for dataset in datasets):
        banner = banner or SIMULATED
    datasets = [{**dataset, "anchor": _slug(dataset["name"])} for dataset in datasets]
    contents = [(2, dataset["anchor"], dataset["name"]) for dataset in datasets]
    return _page("runs.html.j2", title=title, banner=banner, datasets=datasets, contents=contents)


def _exporter(fold_code: bool):
    from nbconvert.exporters.html import HTMLExporter
    from nbconvert.exporters.templateexporter import TemplateExporter
    from nbconvert.filters import Highlight2HTML
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    class Exporter(HTMLExporter):
        """HTMLExporter without its pass of a slow parser over the whole page, which would add alt texts."""

        def from_notebook_node(self, nb, resources=None, **options):
            self.register_filter("highlight_code", Highlight2HTML(pygments_lexer="python", parent=self))
            return TemplateExporter.from_notebook_node(self, nb, {"fold_code": fold_code}, **options)

    return Exporter(
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="perturbret",
        exclude_anchor_links=True,
        embed_images=True,
        preprocessors=[CoalesceStreamsPreprocessor],  # papermill keeps every printed line apart
    )


def _page(
    template: str, *, home=None, context=None, error=None, error_anchor=None, footer=None, **content
) -> str:
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    frame = {"home": home, "context": context, "error": error, "error_anchor": error_anchor, "footer": footer}
    return (
        environment.get_template(template).render(
            style=style, script=script, script_hash=f"sha256-{digest}", **frame, **content
        )
        + "\n"
    )


def _banner(node) -> str | None:
    for cell in node.cells:
        for output in cell.get("outputs", []):
            if output.get("data", {}).get(MIME, {}).get("simulated"):
                return SIMULATED
    return node.metadata.get("perturbret", {}).get("banner")


def _mark_parameters(node) -> dict[str, Any]:
    """Put the values in force on the parameters cell, for the template; drop papermill's cell. Returns the values."""

    def tagged(cell, tag: str) -> bool:
        return tag in cell.metadata.get("tags", [])

    for cell in node.cells:
        if cell.cell_type == "code" and tagged(cell, "parameters"):
            try:
                defaults = parameter_cell(cell.source, where="parameters")
            except (ParameterError, SyntaxError):
                return {}
            given = node.metadata.get("papermill", {}).get("parameters", {})
            values = {**defaults, **given}
            rows = [(name, repr(value), value != defaults.get(name)) for name, value in values.items()]
            cell.metadata["perturbret_parameters"] = rows
            node.cells = [other for other in node.cells if not tagged(other, "injected-parameters")]
            return values
    return {}


def _describe_images(node) -> None:
    """Give every image an alternative text: its own, else the heading above it. Drop papermill's note on top."""
    node.cells = [
        cell
        for cell in node.cells
        if "papermill-error-cell-tag" not in cell.metadata.get("tags", []) or "id=" in cell.source
    ]
    heading = "notebook"
    for cell in node.cells:
        if cell.cell_type == "markdown":
            heading = next(iter(re.findall(r"^#+ +(.+?)\s*$", cell.source, re.MULTILINE)[::-1]), heading)
        for output in cell.get("outputs", []):
            for kind in set(_IMAGES) & set(output.get("data", {})):
                own = output.metadata.get(kind, {}).get("alt") or output.metadata.get("alt")
                output.metadata["alt"] = own or f"Figure: {heading}"


def _number_headings(body: str) -> tuple[str, list[tuple[int, str, str]]]:
    """Give headings unique ids; also return level, id and text of each."""
    contents: list[tuple[int, str, str]] = []
    used: set[str] = set()

    def number(match: re.Match) -> str:
        level, inner = int(match[1]), match[3]
        text = escapes.unescape(re.sub(r"<[^>]+>", "", inner)).strip()
        slug = base = _slug(text)
        for i in range(2, len(contents) + 3):
            if slug not in used:
                break
            slug = f"{base}-{i}"
        used.add(slug)
        contents.append((level, slug, text))
        return f'<h{level} id="{escapes.escape(slug)}">{inner}</h{level}>'

    return re.sub(r"<h([1-3])(\s[^>]*)?>(.*?)</h\1>", number, body, flags=re.DOTALL), contents


def _slug(text: str) -> str:
    """As Jupyter names headings, so that links within a notebook work here, too."""
    return re.sub(r"[\"'<>&]", "", re.sub(r"\s+", "-", text)) or "section"


def _footer(node, name: str) -> str:
    noted = node.metadata.get("papermill", {})
    parts = [name, f"perturbret {__version__}"]
    if noted.get("end_time"):
        parts.insert(
            1, f"executed {noted['end_time'][:16].replace('T', ' ')} UTC in {noted['duration']:.0f} s"
        )
    return " · ".join(filter(None, parts))
