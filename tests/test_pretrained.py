"""A checkpoint's name stands for its files and no others."""

import hashlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from perturbret.data.sources import CheckpointNotFound, EntryError, find_checkpoint, load_checkpoint_registry
from perturbret.files.downloads import ChecksumError

FILES = {"args.json": b"{}", "vocab.json": b'{"<pad>": 0}', "best_model.pt": bytes(range(256))}
SUMS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache of its own, no local directories, no proxy between the test and 127.0.0.1."""
    monkeypatch.setenv("PERTURBRET_CACHE", str(tmp_path / "cache"))
    for name in ("PERTURBRET_DATA", "PERTURBRET_CHECKPOINTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    """Serves the files under /pinned/; counts requests in `asked`, and answers 404 to others."""
    asked, content = [], dict(FILES)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = content.get(self.path.removeprefix("/pinned/"))
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    http.asked, http.content, http.url = asked, content, f"http://127.0.0.1:{http.server_port}/pinned"
    yield http
    http.shutdown()
    http.server_close()


@pytest.fixture
def registry(tmp_path):
    """Writer of a registry with one entry, `toy`."""

    def write(**keys):
        path = tmp_path / "checkpoints.yaml"
        path.write_text(yaml.safe_dump([{"name": "toy", "files": SUMS, **keys}]))
        return path

    return write


def place(directory, **changed):
    directory.mkdir(parents=True)
    for name, content in {**FILES, **changed}.items():
        if content is not None:
            (directory / name).write_bytes(content)
    return directory


def test_a_directory_is_taken_as_it_is(tmp_path, registry):
    mine = place(tmp_path / "mine")
    assert find_checkpoint(mine) == find_checkpoint(str(mine)) == mine
    assert find_checkpoint(mine, registry=registry()) == mine
    with pytest.raises(CheckpointNotFound, match="'.*typo': expected a directory or a name.*known: 'toy'"):
        find_checkpoint(tmp_path / "typo", registry=registry())
    with pytest.raises(CheckpointNotFound, match="nearest: 'whole-human'"):
        find_checkpoint("whole_human")


def test_a_name_is_not_a_directory_that_happens_to_lie_here(tmp_path, registry, monkeypatch):
    place(tmp_path / "toy", **{"best_model.pt": b"another"})
    path = registry()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFound, match="checkpoint 'toy'"):
        find_checkpoint("toy", registry=path)
    assert (
        find_checkpoint("./toy", registry=path) == find_checkpoint(Path("toy"), registry=path) == Path("toy")
    )


def test_places_in_their_order(tmp_path, registry, server, monkeypatch):
    path = registry(url=server.url)
    downloaded = find_checkpoint("toy", registry=path, progress=False)
    assert downloaded == tmp_path / "cache" / "checkpoints" / "toy" and len(server.asked) == 3
    assert {name: (downloaded / name).read_bytes() for name in FILES} == FILES
    assert find_checkpoint("toy", registry=path, progress=False) == downloaded
    for variable, folder in (("PERTURBRET_DATA", "data/checkpoints"), ("PERTURBRET_CHECKPOINTS", "own")):
        here = place(tmp_path / folder / "toy")
        monkeypatch.setenv(variable, str(tmp_path / folder.split("/")[0]))
        assert find_checkpoint("toy", registry=path) == here
    assert len(server.asked) == 3


@pytest.mark.parametrize("variable", ["PERTURBRET_DATA", "PERTURBRET_CHECKPOINTS"])
def test_a_variable_that_names_no_directory_is_an_error(tmp_path, registry, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "typo"))
    with pytest.raises(NotADirectoryError, match=f"{variable}: expected a directory, got '.*typo'"):
        find_checkpoint("toy", registry=registry())


@pytest.mark.parametrize("name", list(FILES))
def test_a_local_directory_with_other_files_is_refused_and_not_passed_over(
    tmp_path, registry, server, monkeypatch, name
):
    path = registry(url=server.url)
    monkeypatch.setenv("PERTURBRET_CHECKPOINTS", str(tmp_path / "own"))
    here = place(tmp_path / "own" / "toy", **{name: b"another"})
    with pytest.raises(ChecksumError, match=f"'toy': sha256 of {name}: expected {SUMS[name]}, got "):
        find_checkpoint("toy", registry=path)
    (here / name).unlink()
    with pytest.raises(CheckpointNotFound, match=f"found no {name}.*No other checkpoint"):
        find_checkpoint("toy", registry=path)
    assert server.asked == []


def test_a_file_without_checksum_has_to_be_there(tmp_path, registry, monkeypatch):
    path = registry(files={"args.json": None})
    monkeypatch.setenv("PERTURBRET_CHECKPOINTS", str(tmp_path / "own"))
    here = place(tmp_path / "own" / "toy", **{"args.json": b"anything"})
    assert find_checkpoint("toy", registry=path) == here
    (here / "args.json").unlink()
    with pytest.raises(CheckpointNotFound, match="found no args.json"):
        find_checkpoint("toy", registry=path)


def test_what_was_looked_for_is_said(tmp_path, registry, monkeypatch):
    path = registry(published="https://example.org/folder")
    with pytest.raises(FileNotFoundError) as caught:
        find_checkpoint("toy", registry=path)
    said = str(caught.value)
    for part in ("'toy'", "args.json, best_model.pt, vocab.json", "https://example.org/folder", "are unset"):
        assert part in said
    assert (
        "No other checkpoint is taken in its place" in said and "PERTURBRET_CHECKPOINTS to <folder>" in said
    )
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("PERTURBRET_CHECKPOINTS", str(tmp_path / "own"))
    with pytest.raises(FileNotFoundError, match=f"looked in: {tmp_path / 'own' / 'toy'}"):
        find_checkpoint("toy", registry=path)


def test_a_download_that_is_another_file_is_refused(registry, server, tmp_path):
    path = registry(url=server.url)
    server.content["best_model.pt"] = b"<html>not it</html>"
    with pytest.raises(ChecksumError, match=f"best_model.pt: expected {SUMS['best_model.pt']}"):
        find_checkpoint("toy", registry=path, progress=False)
    assert not (tmp_path / "cache" / "checkpoints" / "toy" / "best_model.pt").exists()
    server.content.pop("best_model.pt")
    with pytest.raises(
        CheckpointNotFound, match=r"best_model.pt could not be downloaded .*No other checkpoint"
    ):
        find_checkpoint("toy", registry=path, progress=False)
    server.content.update(FILES)
    before = len(server.asked)
    find_checkpoint("toy", registry=path, progress=False)
    assert "/pinned/best_model.pt" in server.asked[before:]
    assert "/pinned/args.json" not in server.asked[before:]  # it is there


def test_a_cached_file_that_was_changed_is_refused(registry, server):
    path = registry(url=server.url)
    found = find_checkpoint("toy", registry=path, progress=False)
    (found / "best_model.pt").write_bytes(b"changed")
    with pytest.raises(ChecksumError, match="delete that file"):
        find_checkpoint("toy", registry=path, progress=False)


def test_a_package_may_hold_it(tmp_path, registry, monkeypatch):
    package = tmp_path / "site" / "toy_package"
    place(package / "data" / "checkpoint_small")
    (package / "__init__.py").write_text("raise ImportError('run')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = registry(package="toy_package/data/checkpoint_small")
    assert find_checkpoint("toy", registry=path) == package / "data" / "checkpoint_small"
    monkeypatch.setenv("PERTURBRET_CHECKPOINTS", str(tmp_path / "own"))
    mine = place(tmp_path / "own" / "toy")
    assert find_checkpoint("toy", registry=path) == mine
    monkeypatch.delenv("PERTURBRET_CHECKPOINTS")
    with pytest.raises(CheckpointNotFound, match="had from no_such_package/data"):
        find_checkpoint("toy", registry=registry(package="no_such_package/data"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"name": "a b"}, "name: expected letters"),
        ({"nmae": "x"}, "unknown key 'nmae'; nearest: 'name'"),
        ({"files": ["args.json"]}, "files: expected a mapping"),
        ({"files": {"../args.json": None}}, "bare name of a file"),
        ({"files": {"args.json": "12"}}, "64 hexadecimal digits, got '12'"),
        ({"url": "ftp://x/y"}, "url: expected http"),
        ({"url": "https://x.org/y", "files": {"args.json": None}}, "sha256 for each of its files"),
        ({"url": "https://x.org/y", "files": {}}, "sha256 for each of its files"),
        ({"package": "perturbret"}, "package: expected package/folder"),
        ({"package": "perturbret/../x"}, "package: expected package/folder"),
        ({"license": 5}, "license: expected text, got 5"),
    ],
)
def test_malformed_entries_are_refused(registry, keys, said):
    with pytest.raises(EntryError, match=said):
        load_checkpoint_registry(registry(**keys))


def test_malformed_registries_are_refused(tmp_path):
    path = tmp_path / "r.yaml"
    for text, said in (
        ("a: 1", "a list of entries"),
        ("- 1", "a mapping"),
        ("- name: a\n- name: a", "two entries"),
    ):
        path.write_text(text)
        with pytest.raises(EntryError, match=said):
            load_checkpoint_registry(path)


def test_the_registry_names_the_whole_human_checkpoint_exactly():
    entry = load_checkpoint_registry()["whole-human"]
    assert set(entry.files) == set(FILES) and None not in entry.files.values()
    assert entry.published.startswith("https://drive.google.com/drive/folders/")
    assert len(entry.url.split("/")[-1]) == 40  # a commit, not a branch


def test_no_network_library_is_needed():
    ask = "import sys, perturbret.data.sources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask]).returncode == 0
