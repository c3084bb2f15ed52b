"""Where a result came from."""

from perturbret import provenance


def test_code_hashes_follow_what_runs_and_not_how_it_is_described(tmp_path, monkeypatch):
    package = tmp_path / "perturbret"
    (package / "data").mkdir(parents=True)
    (package / "data" / "read.csv").write_text("1")
    (package / "data" / "other.csv").write_text("1")
    (package / "a.py").write_text('"""A."""\nfrom .b import f\nfrom .c import g\n\nTABLE = "read.csv"\n')
    (package / "b.py").write_text('def f():\n    """Of b."""\n    return 1\n')
    (package / "c.py").write_text("def g():\n    return 1\n")
    monkeypatch.setattr(provenance, "PACKAGE", package)
    first = provenance.code_hash("a", without=["c"])
    same = {
        "a.py": '"""Another."""\nfrom .b import f\nfrom .c import g\n\n# why\nTABLE = "read.csv"\n',
        "b.py": 'def f():\n    """Said otherwise."""\n\n    return 1\n',
        "c.py": "def g():\n    return 2\n",
        "data/other.csv": "2",
    }
    for name, text in same.items():
        (package / name).write_text(text)
        assert provenance.code_hash("a", without=["c"]) == first, name
    for name, text in {"b.py": "def f():\n    return 2\n", "data/read.csv": "2"}.items():
        before = (package / name).read_text()
        (package / name).write_text(text)
        assert provenance.code_hash("a", without=["c"]) != first, name
        (package / name).write_text(before)
