"""A result is made once for each key, and what is damaged or of another key is made again."""

import json

import pytest

from perturbret.files.cache import cached


@pytest.fixture
def ask(tmp_path):
    """Ask for a result; how often it was made is in `ask.made`."""

    def run(key, **options):
        def make(folder):
            run.made.append(key)
            (folder / "result.txt").write_text(f"result of {key}")

        return (cached(tmp_path / "cache", "thing", key, make, **options) / "result.txt").read_text()

    run.made = []
    return run


def test_a_result_is_made_once_for_each_key(ask, tmp_path):
    for _ in range(2):
        assert ask({"a": 1, "b": [2]}) == "result of {'a': 1, 'b': [2]}"
        assert ask({"b": (2,), "a": 1})
        assert ask("other") == "result of other"
    assert len(ask.made) == 2
    assert all(path.name.startswith("thing-") for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_seen_where_it_is_looked_for(ask, tmp_path, verify):
    ask("key", verify=verify)
    (file,) = tmp_path.glob("cache/*/result.txt")
    file.write_text("damaged")
    assert ask("key", verify=verify) == ("result of key" if verify else "damaged")
    assert len(ask.made) == 1 + verify


@pytest.mark.parametrize("text", ["", "[]", json.dumps({"key": "other", "sha256": None}), None])
def test_a_folder_without_a_record_of_the_key_is_made_again(ask, tmp_path, text):
    ask("key")
    (record,) = tmp_path.glob("cache/*/record.json")
    record.unlink()
    if text is not None:
        record.write_text(text)
    ask("key")
    assert len(ask.made) == 2 and json.loads(record.read_text())["key"] == "key"


def test_what_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "thing", 1, fail)
    assert list(tmp_path.iterdir()) == []
