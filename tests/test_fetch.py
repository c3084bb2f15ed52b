import hashlib
import json
import os
import socket
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perturbret.data.sources import DataNotFound, cache_directory, data_directory, fetch, locate, make_entry
from perturbret.files.downloads import HDF5_SIGNATURE, ChecksumError, extract, sha256_of

CONTENT = HDF5_SIGNATURE + bytes(range(256)) * 50
OTHER = HDF5_SIGNATURE + b"something else"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def entry(**keys):
    return make_entry({"name": "toy", "condition_key": "condition", "control_label": "ctrl", **keys})


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A cache of its own, no data directory, no proxy between the test and 127.0.0.1."""
    monkeypatch.setenv("PERTURBRET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PERTURBRET_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("PERTURBRET_DATA", str(folder))
    return folder


class Server:
    """Serves what `content` says for any path; counts requests."""

    def __init__(self):
        self.content, self.status, self.cut, self.requests = CONTENT, 200, False, 0
        self.release, server = threading.Event(), self
        self.release.set()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests += 1
                server.release.wait(20)
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(server.content)))
                self.end_headers()
                self.wfile.write(server.content[: len(server.content) // 2 if server.cut else None])

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, name="toy.h5ad"):
        return f"http://127.0.0.1:{self.http.server_port}/{name}"


@pytest.fixture
def server():
    running = Server()
    yield running
    running.release.set()
    running.http.shutdown()
    running.http.server_close()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/toy.h5ad"


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_cache_directory_argument_then_variable_then_default(tmp_path, monkeypatch):
    assert cache_directory(tmp_path / "mine") == tmp_path / "mine"
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("PERTURBRET_CACHE")
    assert cache_directory().name == "perturbret"


def test_data_directory_must_be_one(tmp_path, monkeypatch):
    assert data_directory() is None
    monkeypatch.setenv("PERTURBRET_DATA", str(tmp_path / "typo"))
    with pytest.raises(NotADirectoryError, match="PERTURBRET_DATA: expected a directory, got '.*typo'"):
        data_directory()


def test_data_directory_comes_before_the_cache_and_the_network(data, server, tmp_path):
    toy = entry(path="toy.h5ad", url=server.url(), sha256=sha(CONTENT))
    cached = fetch(toy, progress=False)
    assert cached == tmp_path / "cache" / "toy" / "toy.h5ad" and server.requests == 1
    (data / "toy.h5ad").write_bytes(CONTENT)
    assert fetch(toy, progress=False) == data / "toy.h5ad" and server.requests == 1


def test_cache_comes_before_the_network(server):
    toy = entry(url=server.url(), sha256=sha(CONTENT))
    first = fetch(toy, progress=False)
    assert fetch(toy, progress=False) == first and first.read_bytes() == CONTENT
    assert server.requests == 1


def test_absolute_path_is_used_as_it_is(tmp_path):
    (tmp_path / "toy.h5ad").write_bytes(CONTENT)
    assert fetch(entry(path=str(tmp_path / "toy.h5ad"))) == tmp_path / "toy.h5ad"
    with pytest.raises(DataNotFound, match=r"expected a file at .*/none.h5ad, found none"):
        fetch(entry(path=str(tmp_path / "none.h5ad")))


def test_missing_absolute_path_with_an_address_is_downloaded_once(server, tmp_path):
    toy = entry(path=str(tmp_path / "none.h5ad"), url=server.url())
    assert fetch(toy, progress=False) == fetch(toy, progress=False) == tmp_path / "cache/toy/none.h5ad"
    assert server.requests == 1


def test_wrong_checksum_of_a_local_file(data):
    (data / "toy.h5ad").write_bytes(OTHER)
    with pytest.raises(ChecksumError, match=f"expected {sha(CONTENT)}, got {sha(OTHER)} for .*toy.h5ad"):
        fetch(entry(path="toy.h5ad", sha256=sha(CONTENT)))


def test_checksum_in_capitals_is_the_same(data):
    (data / "toy.h5ad").write_bytes(CONTENT)
    assert fetch(entry(path="toy.h5ad", sha256=sha(CONTENT).upper())) == data / "toy.h5ad"


def test_wrong_checksum_of_a_download_leaves_nothing(server, tmp_path):
    with pytest.raises(ChecksumError, match=f"expected {sha(OTHER)}, got {sha(CONTENT)}"):
        fetch(entry(url=server.url(), sha256=sha(OTHER)), progress=False)
    assert leftovers(tmp_path) == []


def test_unknown_checksum_is_recorded_and_verified_ever_after(server):
    toy = entry(url=server.url())
    path = fetch(toy, progress=False)
    record = json.loads(Path(f"{path}.json").read_text())
    assert record["sha256"] == sha(CONTENT) and record["url"] == toy.url and record["downloaded"]
    path.write_bytes(OTHER)
    with pytest.raises(ChecksumError, match="recorded when it was first fetched: expected"):
        fetch(toy, progress=False)


def test_another_content_at_the_same_address_is_refused(server):
    toy = entry(url=server.url())
    path = fetch(toy, progress=False)
    path.unlink()
    server.content = OTHER
    with pytest.raises(ChecksumError, match=r"recorded at the first download.*has changed; delete .*\.json"):
        fetch(toy, progress=False)
    assert not path.exists()
    Path(f"{path}.json").unlink()
    assert fetch(toy, progress=False).read_bytes() == OTHER


def test_file_put_into_the_cache_is_recorded_from_then_on(tmp_path):
    toy = entry(url=closed_port())
    path = tmp_path / "cache/toy/toy.h5ad"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(toy) == path
    path.write_bytes(OTHER)
    with pytest.raises(ChecksumError):
        fetch(toy)


def test_changed_file_of_equal_size_is_hashed_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == sha(b"abc")
    path.write_bytes(b"abd")
    os.utime(path, ns=(1, 1))
    assert sha256_of(path) == sha(b"abd")


def test_half_a_download_is_no_download(server, tmp_path):
    server.cut = True
    with pytest.raises(DataNotFound, match="could not be downloaded"):
        fetch(entry(url=server.url()), progress=False)
    assert leftovers(tmp_path) == []


def test_page_in_place_of_a_file_is_refused(server, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="expected an HDF5 file .*got 26 bytes, b'<html>pl'"):
        fetch(entry(url=server.url()), progress=False)
    assert leftovers(tmp_path) == []


def test_no_file_and_no_network_names_the_address_the_file_and_two_ways_out():
    url = closed_port()
    with pytest.raises(DataNotFound) as caught:
        fetch(entry(path="mine.h5ad", url=url))
    said = str(caught.value)
    assert url in said and "'mine.h5ad'" in said
    assert "set PERTURBRET_DATA" in said and "DATASET=simulated" in said


def test_no_file_and_no_address():
    with pytest.raises(DataNotFound, match="'mine.h5ad' is neither in PERTURBRET_DATA .unset.*no address"):
        fetch(entry(path="mine.h5ad"))


def test_address_that_serves_nothing(server):
    server.status = 404
    with pytest.raises(DataNotFound, match="404"):
        fetch(entry(url=server.url()), progress=False)


def test_silent_server_is_given_up_after_the_timeout(server, tmp_path):
    server.release.clear()
    with pytest.raises(DataNotFound, match="could not be downloaded .*(TimeoutError|Timeout)"):
        fetch(entry(url=server.url()), timeout=0.3, progress=False)
    assert leftovers(tmp_path) == []


def test_hanging_name_lookup_is_given_up_after_the_timeout(monkeypatch):
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: hang.wait(20) or [])
    try:
        with pytest.raises(DataNotFound, match="not finished within 0.2 seconds"):
            fetch(entry(url="http://nowhere.invalid/toy.h5ad"), timeout=0.2, progress=False)
    finally:
        hang.set()


def test_progress_bar_names_the_dataset(server, capsys):
    fetch(entry(url=server.url()))
    assert "toy: toy.h5ad" in capsys.readouterr().err


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


MEMBER = "norman/perturb_processed.h5ad"


def test_zip_is_downloaded_checked_and_its_member_extracted(server, tmp_path):
    server.content = zipped(tmp_path / "a.zip", {MEMBER: CONTENT, "../../evil": b"x"}).read_bytes()
    toy = entry(
        path="toy.h5ad", url=server.url("download/1"), archive_member=MEMBER, sha256=sha(server.content)
    )
    path = fetch(toy, progress=False)
    assert path == tmp_path / "cache/toy/toy.h5ad" and path.read_bytes() == CONTENT
    assert not list(tmp_path.rglob("evil"))
    record = json.loads(Path(f"{path}.json").read_text())
    assert record["archive_sha256"] == sha(server.content) and record["sha256"] == sha(CONTENT)
    assert fetch(toy, progress=False) == path and server.requests == 1
    other = entry(path="toy.h5ad", url=toy.url, archive_member=MEMBER, sha256=sha(OTHER))
    with pytest.raises(ChecksumError, match="sha256 of the zip: expected"):
        fetch(other, progress=False)


def test_zip_of_the_user_is_extracted_again_when_it_changes(data, tmp_path):
    toy = entry(path="toy.zip", archive_member=MEMBER)
    zipped(data / "toy.zip", {MEMBER: CONTENT})
    path = fetch(toy)
    assert path == tmp_path / "cache/toy/perturb_processed.h5ad" and path.read_bytes() == CONTENT
    zipped(data / "toy.zip", {MEMBER: OTHER})
    assert fetch(toy).read_bytes() == OTHER


def test_unpacked_member_in_the_data_directory_is_found(data):
    (data / "norman").mkdir()
    (data / MEMBER).write_bytes(CONTENT)
    toy = entry(path="toy.h5ad", url=closed_port(), archive_member=MEMBER, sha256=sha(b"of the zip"))
    assert locate(toy) == data / MEMBER


def test_zip_without_the_member_names_the_nearest(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"norman/perturb_procesed.h5ad": CONTENT})
    with pytest.raises(ValueError, match="expected a zip member .*nearest: 'norman/perturb_procesed.h5ad'"):
        extract(archive, MEMBER, tmp_path / "out")


def test_zip_member_that_is_a_link_is_refused(tmp_path):
    info = zipfile.ZipInfo("link.h5ad")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="expected 'link.h5ad' to be a file"):
        extract(tmp_path / "a.zip", "link.h5ad", tmp_path / "out")


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_zip_is_refused_and_leaves_nothing(data, tmp_path, damage):
    content = bytearray(zipped(data / "toy.zip", {MEMBER: os.urandom(5000)}).read_bytes())
    if damage == "cut":
        del content[3000:]
    else:
        content[2500] ^= 255
    (data / "toy.zip").write_bytes(content)
    if damage == "cut":  # no zip any more: taken for the h5ad itself, which loading then refuses
        assert fetch(entry(path="toy.zip", archive_member=MEMBER)) == data / "toy.zip"
        with pytest.raises(ValueError, match="expected a whole, unencrypted zip"):
            extract(data / "toy.zip", MEMBER, tmp_path / "out")
    else:
        with pytest.raises(ValueError, match="expected a whole, unencrypted zip"):
            fetch(entry(path="toy.zip", archive_member=MEMBER))
    assert leftovers(tmp_path) == []


def test_file_of_an_installed_package():
    path = locate(entry(package_file="numpy/version.py"))
    assert path.name == "version.py" and path.is_file()
    with pytest.raises(ChecksumError):
        locate(entry(package_file="numpy/version.py", sha256=sha(CONTENT)))
    with pytest.raises(DataNotFound, match="numpy does not ship it"):
        locate(entry(package_file="numpy/none.h5ad"))
    with pytest.raises(DataNotFound, match="nopackage is not installed"):
        locate(entry(package_file="nopackage/none.h5ad"))


def test_two_downloads_at_once_end_with_one_whole_file(server):
    toy = entry(url=server.url(), sha256=sha(CONTENT))
    failures = []

    def work():
        try:
            assert fetch(toy, progress=False).read_bytes() == CONTENT
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
