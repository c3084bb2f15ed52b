"""Where a result came from."""

import pytest

from perturbret.files import provenance

SOURCES = {
    "room/__init__.py": "",
    "room/a.py": (
        '"""A."""\nfrom ..other import c\nfrom .b import f as used\n\nTABLE = "read.csv"\n\n\n'
        "def start():\n    return used() + len(TABLE) + c.member()\n\n\ndef unused():\n    return h()\n\n\n"
        "def h():\n    return 0\n"
    ),
    "room/b.py": (
        'def f():\n    """Of b."""\n    return inner()\n\n\ndef inner():\n    return 1\n\n\n'
        "def beside():\n    return 1\n"
    ),
    "other/__init__.py": "__getattr__, _, _ = attach(__name__, submod_attrs={'d': ['passed_on']})\n",
    "other/c.py": (
        "from . import passed_on\n\n\ndef member():\n    return passed_on()\n\n\n"
        "def other_member():\n    return 1\n"
    ),
    "other/d.py": "from ..left.out import g\n\n\ndef passed_on():\n    return g()\n",
    "left/__init__.py": "",
    "left/out.py": "def g():\n    return 1\n",
    "resources/read.csv": "1",
    "resources/other.csv": "1",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path)
    return tmp_path


def hash_of_start():
    return provenance.code_hash("room.a:start", without=["left"])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("room/a.py", '"""A."""', '"""Another."""'),
        ("room/a.py", "\n\nTABLE", "\n\n# why\nTABLE"),
        ("room/a.py", "return 0", "return 2"),
        ("room/b.py", "Of b.", "Said otherwise."),
        ("room/b.py", "def beside():\n    return 1", "def beside():\n    return 2"),
        ("other/c.py", "def other_member():\n    return 1", "def other_member():\n    return 2"),
        ("left/out.py", "return 1", "return 2"),
        ("resources/other.csv", "1", "2"),
    ],
)
def test_what_does_not_run_and_how_it_is_described_leave_the_hash(package, file, old, new):
    before = hash_of_start()
    assert old in SOURCES[file]
    (package / file).write_text(SOURCES[file].replace(old, new))
    assert hash_of_start() == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("room/a.py", "len(TABLE)", "2 * len(TABLE)"),
        ("room/b.py", "def inner():\n    return 1", "def inner():\n    return 2"),
        ("room/b.py", "def f", "import os\n\nos.environ['A'] = '1'\n\n\ndef f"),
        ("other/c.py", "return passed_on()", "return passed_on() + 1"),
        ("other/d.py", "return g()", "return g() + 1"),
        ("resources/read.csv", "1", "2"),
    ],
)
def test_what_runs_at_any_depth_changes_the_hash(package, file, old, new):
    before = hash_of_start()
    assert old in SOURCES[file]
    (package / file).write_text(SOURCES[file].replace(old, new))
    assert hash_of_start() != before


def test_what_registers_counts_where_its_register_is_used(package):
    register = "METRICS = {}\n\n\ndef metric(name):\n    return lambda f: METRICS.setdefault(name, f)\n\n\n"
    text = register + "@metric('a')\ndef a():\n    return 1\n\n\ndef every():\n    return METRICS\n\n\n"
    text += "def other():\n    return 1\n"
    path = package / "room" / "m.py"
    path.write_text(text)
    before = [provenance.code_hash(f"room.m:{name}") for name in ("every", "other")]
    path.write_text(text.replace("return 1", "return 2", 1))
    after = [provenance.code_hash(f"room.m:{name}") for name in ("every", "other")]
    assert after[0] != before[0] and after[1] == before[1]


def test_a_start_is_followed_although_its_room_is_left_out(package):
    starts = ["room.a:start", "left.out"]
    before = provenance.code_hash(*starts, without=["left"])
    (package / "left" / "out.py").write_text("def g():\n    return 2\n")
    assert provenance.code_hash(*starts, without=["left"]) != before


def test_code_outside_of_the_package_counts_with_what_it_calls(package):
    source = "from perturbret.room.b import f\nprint(f())\n"
    before = provenance.code_hash(source=source)
    assert provenance.code_hash(source=source + "print(1)\n") != before
    assert provenance.code_hash(source="# why\n" + source) == before
    (package / "room" / "b.py").write_text(SOURCES["room/b.py"].replace("beside", "besides"))
    assert provenance.code_hash(source=source) == before
    (package / "room" / "b.py").write_text(SOURCES["room/b.py"].replace("return 1", "return 2", 1))
    assert provenance.code_hash(source=source) != before


@pytest.mark.parametrize("start", ["room.nothing", "room.a:nothing", "nothing"])
def test_a_start_that_is_not_there_is_an_error(package, start):
    with pytest.raises(ValueError, match=f"expected {start.partition(':')[0]}.* to be in the package"):
        provenance.code_hash(start)
