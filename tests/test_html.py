"""Pages request nothing, say what they are, and link only to what exists."""

import base64
import hashlib
import json
import re
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from pages import external_requests, missing_anchors

from perturbret.workflow.html import SIMULATED, index_page, render
from perturbret.workflow.index import write_index

PIXEL = base64.b64encode(b"\x89PNG not really").decode()
MIME = "application/vnd.perturbret+json"


def shown(**data):
    """A cell that displayed `data`, given as kind_subkind=content."""
    bundle = {name.replace("_", "/", 1).replace("_", "+"): content for name, content in data.items()}
    return new_code_cell("show()", outputs=[new_output("display_data", bundle)])


@pytest.fixture
def notebook():
    """An executed notebook with one of everything."""
    parameters = new_code_cell("encoder = 'pca'\nseed = 0\nrun = ''", metadata={"tags": ["parameters"]})
    injected = new_code_cell("seed = 7\nrun = 'pca-7'", metadata={"tags": ["injected-parameters"]})
    table = "<table><tr><th>a</th></tr><tr><td>0.18 [0.16, 0.20]</td></tr></table>"
    cells = [
        new_markdown_cell(
            "# 09 · Toy\n\nSee [the paper](https://doi.org/10.1/x) and [below](#What-follows)."
        ),
        parameters,
        injected,
        new_markdown_cell("## A & B\n\n$x < y$\n\n## What follows\n### Deeper"),
        shown(text_html=table, text_plain="a"),
        new_markdown_cell("## A & B"),
        shown(image_png=PIXEL, text_plain="<Figure>"),
        new_code_cell(
            "warn()",
            outputs=[
                new_output("stream", name="stdout", text="said <this>\n"),
                new_output("stream", name="stderr", text="a warning\n"),
                new_output("execute_result", {"text/plain": "'<tag>'"}),
            ],
        ),
        shown(text_markdown="**bold** conclusion"),
    ]
    noted = {"parameters": {"seed": 7, "run": "pca-7"}, "end_time": "2026-01-02T03:04:05", "duration": 6.2}
    return new_notebook(cells=cells, metadata={"papermill": noted})


def test_a_page_is_self_contained_and_links_to_what_it_has(notebook):
    page = render(notebook, name="09_toy")
    assert external_requests(page) == [] and missing_anchors(page) == []
    # One script, that of the page, which the policy knows by its hash.
    (script,) = re.findall("<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.count("<script") == 1 and "aria-sort" in script
    assert (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    )


def test_a_page_has_contents_title_and_footer(notebook):
    page = render(notebook, name="09_toy")
    assert "<title>09 · Toy</title>" in page
    nav = page[page.index("<nav") : page.index("</nav>")]
    found = re.findall(r'class="level(\d)"><a href="#(.*?)">(.*?)</a>', nav)
    expected = [("2", "A--B", "A &amp; B"), ("2", "What-follows", "What follows"), ("3", "Deeper", "Deeper")]
    assert found == [*expected, ("2", "A--B-2", "A &amp; B")]
    assert "pca-7" in nav
    assert "09_toy · executed 2026-01-02 03:04 UTC in 6 s" in page
    assert render(notebook, title="Mine").count("<title>Mine</title>") == 1


def test_parameters_are_the_values_in_force(notebook):
    page = render(notebook)
    rows = re.findall(r'<tr( class="changed")?><th scope="row">(\w+)</th><td><code>(.*?)</code>', page)
    assert [(name, bool(changed)) for changed, name, _ in rows] == [
        ("encoder", False),
        ("seed", True),
        ("run", True),
    ]
    assert [value for *_, value in rows] == ["&#x27;pca&#x27;", "7", "&#x27;pca-7&#x27;"]
    # The cell that papermill puts in says nothing more.
    assert page.count("<summary>code</summary>") == 4


def test_outputs_are_shown_as_they_should_be(notebook):
    page = render(notebook)
    assert f'src="data:image/png;base64,{PIXEL}" alt="Figure: A &amp; B"' in page
    assert "0.18 [0.16,&nbsp;0.20]" in page and '<div class="scroll"><table>' in page
    assert "said &lt;this&gt;" in page and "&lt;tag&gt;" in page
    assert "<summary>messages</summary>" in page and "<strong>bold</strong> conclusion" in page


def test_code_is_folded_unless_asked_otherwise(notebook):
    assert '<details class="code">' in render(notebook)
    assert '<details class="code" open>' in render(notebook, fold_code=False)


def test_simulated_data_put_a_banner_on_the_page(notebook):
    assert SIMULATED not in render(notebook)
    notebook.cells.append(
        new_code_cell(
            "", outputs=[new_output("display_data", {MIME: {"simulated": False}, "text/plain": "x"})]
        )
    )
    assert SIMULATED not in render(notebook)
    notebook.cells.append(
        new_code_cell(
            "", outputs=[new_output("display_data", {MIME: {"simulated": True}, "text/plain": "x"})]
        )
    )
    assert f'role="alert">{SIMULATED}<' in render(notebook)
    assert 'role="alert">DRAFT<' in render(notebook, banner="DRAFT")


def test_metadata_may_name_a_banner(notebook):
    notebook.metadata["perturbret"] = {"banner": "PRELIMINARY"}
    assert 'role="alert">PRELIMINARY<' in render(notebook)


def test_a_failed_notebook_says_so_and_where(notebook):
    error = new_output(
        "error", ename="ValueError", evalue="no", traceback=["\x1b[31mValueError\x1b[0m: no <x>"]
    )
    tags = {"tags": ["papermill-error-cell-tag"]}
    notebook.cells.insert(0, new_markdown_cell("An Exception was encountered", metadata=tags))
    notebook.cells.append(new_markdown_cell('<span id="papermill-error-cell">here</span>', metadata=tags))
    notebook.cells.append(new_code_cell("fail()", outputs=[error]))
    page = render(notebook, error="ValueError: no")
    assert (
        'This notebook failed:</strong> <code>ValueError: no</code> <a href="#papermill-error-cell">' in page
    )
    assert '<span class="ansi-red-fg">ValueError</span>: no &lt;x&gt;' in page
    assert "An Exception was encountered" not in page and missing_anchors(page) == []


def test_rendering_leaves_the_notebook_as_it_is(notebook):
    before = str(notebook)
    render(notebook)
    assert str(notebook) == before


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<img src="https://a.org/x.png">', ["img src: https://a.org/x.png"]),
        ("<img src='figure.png'>", ["img src: figure.png"]),
        ('<img srcset="a.png 1x, b.png 2x">', ["img srcset: a.png", "img srcset: b.png"]),
        ('<link rel="stylesheet" href="//cdn.org/x.css">', ["link href: //cdn.org/x.css"]),
        ('<script src="https://cdn.org/x.js"></script>', ["script src: https://cdn.org/x.js"]),
        ("<script>load('https://cdn.org/x.js')</script>", ["script: https://cdn.org/x.js"]),
        (
            "<style>@import 'x.css'; a { background: url(y.png) }</style>",
            ["style url: y.png", "style @import: x.css"],
        ),
        ('<p style="background: url(&quot;y.png&quot;)">', ["p style url: y.png"]),
        ('<iframe src="https://a.org"></iframe>', ["iframe src: https://a.org"]),
        ('<svg><image xlink:href="z.png"/></svg>', ["image xlink:href: z.png"]),
        ('<object data="x.svg"></object>', ["object data: x.svg"]),
        ('<meta http-equiv="refresh" content="0; url=https://a.org">', ["meta refresh: https://a.org"]),
        ('<a href="https://a.org">x</a><p>https://a.org url(x)</p>', []),
        ('<img src="data:image/png;base64,AA"><svg><use href="#x"/></svg>', []),
        ("<style>a { fill: url(#x); b: url(data:image/png;base64,AA) }</style>", []),
    ],
)
def test_the_scanner_sees_what_a_browser_would_load(html, found):
    assert external_requests(html) == found


def test_the_scanner_sees_links_to_nothing():
    assert missing_anchors('<a href="#a">x</a><a href="#b">y</a><p id="b"></p><a href="c.html#d">z</a>') == [
        "a"
    ]


def test_what_an_output_would_load_is_found_and_forbidden(notebook):
    notebook.cells.append(shown(text_html='<img src="https://a.org/x.png">'))
    page = render(notebook)
    assert external_requests(page) == ["img src: https://a.org/x.png"]
    assert "img-src data:;" in page


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" if path.suffix == ".json" else "<html>")


def test_the_index_links_every_run_and_names_the_failed(tmp_path):
    put(
        tmp_path / "toy",
        "report/06_ablation_report.html",
        "audit/01_data_audit.html",
        "vocab/02_vocab_coverage.html",
        "report/comparison.csv",
    )
    put(tmp_path / "toy", "pca-none-seed0/03_baselines.html", "pca-none-seed0/05_retrieval_eval.html")
    put(tmp_path / "toy", "pca-none-seed1/failed/03_baselines.html", "mine & yours/05_retrieval_eval.html")
    (tmp_path / "toy/report/plan.json").write_text('{"runs": {"pca-none-seed0": {}, "pca-none-seed1": {}}}')
    failure = new_output("error", ename="ValueError", evalue="no <x>\nmore", traceback=[])
    kept = tmp_path / "toy/pca-none-seed1/failed/03_baselines.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=[failure])]), kept)
    page = write_index(tmp_path).read_text()
    links = re.findall(r'href="([^#"][^"]*)"', page)
    assert links[0] == "toy/report/06_ablation_report.html"
    assert all((tmp_path / unquote(link)).is_file() for link in links)
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("toy/**/*.html")}
    assert pages <= {unquote(link) for link in links}
    assert 'pca-none-seed1/failed/03_baselines.html" class="bad">03 failed</a>' in page
    assert "1 notebook failed" in page and "<code>ValueError: no &lt;x&gt;</code>" in page
    assert "which genes scGPT knows" in page and ">vocab<" not in page
    assert "not part of the last report" in page and SIMULATED not in page
    assert external_requests(page) == [] and missing_anchors(page) == []


def test_the_index_places_runs_by_what_was_asked_for_not_by_their_names(tmp_path):
    for name in ("planned", "mine", "bare"):
        put(tmp_path / "toy", f"{name}/03_baselines.html")
    plan = {"recipe": "pca_small", "varied": {"mask": "none", "seed": 1, "track": "in_dist"}}
    put(tmp_path / "toy", "report/plan.json")
    (tmp_path / "toy/report/plan.json").write_text(json.dumps({"runs": {"planned": plan}}))
    params = {"dataset": "toy", "encoder": "lda", "mask": "own_targets", "seed": 7, "track": "in_dist"}
    manifest = {"fit": {"params": params, "context": {"train_share": 0.5}}}
    (tmp_path / "toy/mine/manifest.json").write_text(json.dumps(manifest))
    page = write_index(tmp_path).read_text()
    for text in (">pca_small<", ">none<", "seed 1, track = in_dist", ">lda<", ">own_targets<", ">bare<"):
        assert text in page
    assert "seed 7, train_share = 0.5" in page and ">planned<" not in page and ">mine<" not in page


def test_the_index_of_simulated_data_bears_the_banner(tmp_path):
    put(tmp_path / "sim", "pca-none-seed0/03_baselines.html", "report/plan.json")
    (tmp_path / "sim/report/plan.json").write_text('{"runs": {}, "simulated": true}')
    page = write_index(tmp_path).read_text()
    assert f'role="alert">{SIMULATED}<' in page and "no finished report" in page
    put(tmp_path / "real", "pca-none-seed0/03_baselines.html")
    page = write_index(tmp_path).read_text()
    assert f'role="alert">{SIMULATED}<' not in page and page.count(SIMULATED) == 1


def test_an_index_of_nothing_says_so():
    assert "Nothing has been run yet" in index_page([])
