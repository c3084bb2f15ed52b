"""A reader sees the old file or the whole new one."""

import json

import pytest

from perturbret.atomic import replacing, write_json, write_text


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and names(path.parent) == ["a.txt"]


def test_the_old_file_stays_when_writing_fails(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="half way"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError("half way")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_directory_replaces_a_directory_whole(tmp_path):
    for content in ("old", "new"):
        with replacing(tmp_path / "encoder") as temporary:
            temporary.mkdir()
            (temporary / f"{content}.txt").write_text(content)
    assert names(tmp_path) == ["encoder"] and names(tmp_path / "encoder") == ["new.txt"]


def test_the_temporary_keeps_the_suffix_that_writers_go_by(tmp_path):
    with replacing(tmp_path / "a.parquet") as temporary:
        assert temporary.suffix == ".parquet" and temporary.parent == tmp_path
        temporary.touch()


def test_writing_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written to .* which was to become .*a.txt"):
        with replacing(tmp_path / "a.txt"):
            pass


def test_json_refuses_what_json_cannot_carry(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_what_another_process_put_there_meanwhile_may_be_kept(tmp_path):
    for there in (True, False):
        place = tmp_path / f"named-by-content-{there}"
        with replacing(place, keep=True) as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("mine")
            if there:
                place.mkdir()
                (place / "file").write_text("theirs")
        assert (place / "file").read_text() == ("theirs" if there else "mine")
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
