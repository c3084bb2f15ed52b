"""A reader sees the old file or the whole new one."""

import errno
import json
import os
import types

import pytest

from perturbret.files.atomic import (
    DiskFull,
    disk_full,
    no_space,
    replacing,
    reporting_full,
    write_json,
    write_text,
)


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


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError('IoError(Os { code: 28, message: "No space left on device" })'),
    ],
)
def test_a_full_disk_is_said_to_be_one_whatever_wrote(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with (
        pytest.raises(DiskFull, match=r"No space left on device: '.*/a\.txt'") as caught,
        replacing(tmp_path / "a.txt"),
    ):
        raise error
    assert caught.value.errno == errno.ENOSPC and (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_only_a_full_disk_is_one():
    assert not disk_full(OSError(errno.EACCES, "Permission denied")) and not disk_full(ValueError("no"))
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise ValueError("could not write") from error
    except ValueError as error:
        assert disk_full(error)


def test_a_real_full_device_is_noticed():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        pytest.raises(DiskFull, match="/dev/full"),
        reporting_full("/dev/full"),
        open("/dev/full", "w") as file,
    ):
        file.write("x")
        file.flush()


def test_where_a_process_was_killed_the_free_space_tells(tmp_path, monkeypatch):
    assert no_space(tmp_path / "not" / "there") is None
    free = types.SimpleNamespace(f_bavail=1, f_frsize=4096, f_favail=9, f_files=9)
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    assert no_space(tmp_path) == f"no space left on device: 4,096 bytes and 9 files free in {tmp_path}"
    free.f_bavail, free.f_favail = 1 << 30, 0
    assert "0 files free" in no_space(tmp_path)
