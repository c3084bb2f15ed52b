"""README's blocks come from the files that reports wrote."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import results  # noqa: E402

BLOCK = "Before.\n<!-- results: toy headline -->\n{}<!-- end of results -->\nAfter.\n"
TABLE = "| method | exact_hit@1 |\n| --- | --- |\n| a\\|b | .100 |\n"


@pytest.fixture
def report(tmp_path):
    """A finished report of two runs, as little of it as is read."""
    outputs = tmp_path / "outputs" / "toy"
    (outputs / "report").mkdir(parents=True)
    (outputs / "report" / "headline.csv").write_text("track,method,exact_hit@1\nin_dist,a|b,.100\n")
    (outputs / "report" / "contrasts.csv").write_text("question,verdict\n")
    (outputs / "report" / "headline.md").write_text("- A finding.\n")
    (outputs / "report" / "ladder.png").write_bytes(b"png")
    (outputs / "report" / "plan.json").write_text(json.dumps({"runs": {"a": {}, "b": {}}}))
    for run in ("a", "b"):
        write_manifest(outputs, run)
    return outputs


def write_manifest(outputs, run, *, code="c0", dirty=False, evaluated=True):
    fit = {"params": {"encoder": "pca"}, "context": {"fingerprint": "f0"}, "code": code}
    manifest = {"fit": fit, "environment": {"git_commit": "123", "git_dirty": dirty}}
    (outputs / run).mkdir(exist_ok=True)
    (outputs / run / "manifest.json").write_text(
        json.dumps(manifest | ({"evaluation": {}} if evaluated else {}))
    )


def test_a_report_becomes_a_table(report, tmp_path):
    taken, figures = tmp_path / "results", tmp_path / "figures"
    figures.mkdir()
    results.take(report, taken, figures)
    assert (figures / "toy_ladder.png").read_bytes() == b"png"
    made = json.loads((taken / "toy" / "made.json").read_text())
    assert made["commits"] == ["123"] and made["code"] == {"pca": "c0"} and made["n_runs"] == 2
    text = results.render(BLOCK.format("old"), taken)
    assert text == BLOCK.format(TABLE) and results.render(text, taken) == text
    words = BLOCK.replace("toy headline", "toy headline-text")
    assert results.render(words.format("old"), taken) == words.format("- A finding.\n")
    (taken / "toy" / "headline.csv").write_text("method,exact_hit@1\na|b,.900\n")
    with pytest.raises(ValueError, match="was changed after the report wrote it"):
        results.render(text, taken)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dirty": True}, "expected runs of a commit, b was made from uncommitted changes"),
        ({"evaluated": False}, "expected every run to be evaluated, b is not"),
        ({"code": "c1"}, "expected one value for all runs, got ['c0', 'c1']"),
    ],
)
def test_what_no_commit_made_is_refused(report, tmp_path, change, said):
    write_manifest(report, "b", **change)
    with pytest.raises(ValueError) as error:
        results.take(report, tmp_path / "results", tmp_path)
    assert said in str(error.value)


def test_a_report_that_is_not_there_is_named(report, tmp_path):
    (report / "report" / "headline.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"found no headline\.csv"):
        results.take(report, tmp_path / "results", tmp_path)


def test_readme_says_what_its_files_say():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results.BLOCK.search(readme) and results.render(readme) == readme
