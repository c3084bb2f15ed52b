"""What was made from other data is moved aside, whole, and nothing is lost on the way."""

import json
import os

import pandas as pd
import pytest

from perturbret.data.sources import make_entry
from perturbret.workflow.index import write_index
from perturbret.workflow.snakemake import data_stamp
from perturbret.workflow.superseded import other_data, read_record, supersede

OLD, NEW = "a" * 64, "b" * 64
ENTRY = make_entry({"name": "toy", "simulate": {}})


@pytest.fixture
def made(tmp_path):
    """outputs/toy/ with results of old data, one run of new data, and what no data made."""
    workdir = tmp_path / "toy"

    def run(name, fingerprint):
        (workdir / name).mkdir(parents=True)
        if fingerprint:
            manifest = {"fit": {"context": {"fingerprint": fingerprint}}}
            (workdir / name / "manifest.json").write_text(json.dumps(manifest))
        (workdir / name / "03_baselines.html").write_text(name)

    for name, fingerprint in {"pca": OLD, "logreg": OLD, "mine": NEW, "begun": None, "audit": None}.items():
        run(name, fingerprint)
    for name in ("splits", "cache", ".snakemake"):
        (workdir / name).mkdir()
    write_split(workdir / "splits" / "in_dist-seed0.parquet", OLD)
    write_split(workdir / "splits" / "in_dist-seed1.parquet", NEW)
    (workdir / "splits" / "in_dist-seed2.parquet").write_text("cut off")
    return workdir


def write_split(path, fingerprint):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(pd.DataFrame({"cell": ["c"], "role": ["train"]}))
    metadata = {b"perturbret_split": json.dumps({"fingerprint": fingerprint})}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def there(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def data(monkeypatch):
    """The data at hand: a class whose `fingerprint` a test may change, and how often they were loaded."""

    class Data:
        fingerprint, loads = NEW, 0

    def load(entry):
        Data.loads += 1
        return Data

    monkeypatch.setattr("perturbret.data.datasets.load_screen", load)
    return Data


def test_what_other_data_made_is_moved_and_the_rest_stays(made, data):
    before, said = there(made), []
    moved = supersede(ENTRY, "stamp", made, say=said.append)
    aside = made / "superseded"
    assert there(aside) == sorted(
        [f"{OLD[:12]}/{name}/03_baselines.html" for name in ("audit", "begun", "logreg", "pca")]
        + [f"{OLD[:12]}/{name}/manifest.json" for name in ("logreg", "pca")]
        + [f"{OLD[:12]}/splits/in_dist-seed0.parquet", "unreadable/splits/in_dist-seed2.parquet"]
    )
    assert (
        len(moved) == 6 and "have changed (fingerprint aaaaaaaaaaaa, unreadable, now bbbbbbbbbbbb)" in said[0]
    )
    assert {path.split("/", 1)[1] for path in there(aside)} | set(there(made)) >= set(before)
    assert (made / "mine").is_dir() and (made / "cache").is_dir() and (made / ".snakemake").is_dir()
    assert read_record(made)["fingerprint"] == NEW
    assert supersede(ENTRY, "stamp", made, say=said.append) == [] and len(said) == 1 and data.loads == 1


def test_after_a_kill_at_any_step_the_next_call_goes_on(made, data, monkeypatch):
    before, real, steps = len(there(made)), os.replace, 0
    while True:
        left = steps

        def replace(source, target):
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            real(source, target)

        monkeypatch.setattr("perturbret.workflow.superseded.os.replace", replace)
        try:
            supersede(ENTRY, "stamp", made, say=lambda line: None)
            break
        except KeyboardInterrupt:
            assert not read_record(made) and len(there(made)) == before
            steps += 1
    assert steps == 4, "no, one, two and three of six were moved, then the record could not be written"
    assert other_data(made, NEW, NEW) == [] and len(there(made)) == before + 1


def test_data_that_change_back_and_forth_lose_nothing(made, data):
    supersede(ENTRY, "1", made, say=print)
    data.fingerprint = OLD
    supersede(ENTRY, "2", made, say=print)
    (made / "pca").mkdir()
    (made / "pca" / "again").touch()
    data.fingerprint = NEW
    supersede(ENTRY, "3", made, say=print)
    assert (made / "superseded" / OLD[:12] / "pca" / "manifest.json").exists()
    assert (made / "superseded" / f"{OLD[:12]}-2" / "pca" / "again").exists()
    assert (made / "superseded" / NEW[:12] / "mine" / "manifest.json").exists()


def test_data_that_cannot_be_loaded_move_nothing(made, monkeypatch):
    def refuse(entry):
        raise ValueError("no counts")

    monkeypatch.setattr("perturbret.data.datasets.load_screen", refuse)
    before = there(made)
    with pytest.raises(ValueError, match="no counts"):
        supersede(ENTRY, "stamp", made, say=print)
    assert there(made) == before


def test_the_index_links_no_page_of_other_data(made):
    (made / "data.json").write_text(json.dumps({"fingerprint": NEW}))
    page = write_index(made.parent).read_text()
    assert "toy/mine/03_baselines.html" in page and "toy/begun/03_baselines.html" in page
    assert "toy/pca/" not in page and "toy/logreg/" not in page
    assert "made from other data than today's: logreg, pca." in page
    (made / "data.json").unlink()
    os.utime(made / "mine" / "manifest.json", (2e9, 2e9))
    assert "toy/pca/" not in write_index(made.parent).read_text(), "the newest run tells whose data count"


def test_the_stamp_follows_the_content_of_a_zarr_store(tmp_path):
    entry = make_entry({"name": "toy", "path": "a.zarr", "condition_key": "c", "control_label": "ctrl"})
    (tmp_path / "a.zarr" / "X").mkdir(parents=True)
    (tmp_path / "a.zarr" / "X" / "0").write_text("cells")
    stamp = data_stamp(entry, tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "X" / "0").rename(tmp_path / "a.zarr" / "X" / "1")
    assert stamp != data_stamp(entry, tmp_path / "a.zarr")
