"""Settings are checked one by one before anything is computed; none is taken for something else."""

import json
from typing import get_args

import pytest
import yaml

from perturbret.scgpt.settings import ScGPTSettings

FIELDS = ScGPTSettings.model_fields
NUMBERS = [name for name, field in FIELDS.items() if field.annotation in (int, float)]


def limits(name):
    found = {type(limit).__name__: limit for limit in FIELDS[name].metadata}
    return found["Ge"].ge, found["Le"].le


def test_defaults_and_what_was_saved_as_json_are_read_back():
    assert ScGPTSettings.read({}) == ScGPTSettings()
    changed = ScGPTSettings(lora_targets=("Wqkv",), lora_layers=(0, 2), rank=4, lr_head=0.01)
    assert ScGPTSettings.read(json.loads(json.dumps(changed.model_dump()))) == changed


def test_every_default_is_what_could_be_given():
    defaults = ScGPTSettings().model_dump()
    assert ScGPTSettings.read(defaults) == ScGPTSettings() and len(NUMBERS) == 25
    for mode in get_args(FIELDS["mode"].annotation):
        assert ScGPTSettings.read({"mode": mode}).mode == mode
    assert ScGPTSettings.read({"mode": "head"}).epochs == 60 != ScGPTSettings().epochs
    assert ScGPTSettings.read({"mode": "head", "epochs": 5}).epochs == 5


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_as_text_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name}: expected a .*number, got '1e1'; .* write 1.0e4"):
        ScGPTSettings.read({name: "1e1"})


def test_what_yaml_takes_for_text_is_refused():
    given = yaml.safe_load("lr_head: 1e-3")
    assert isinstance(given["lr_head"], str)
    with pytest.raises(ValueError, match="lr_head: expected a number, got '1e-3'; YAML"):
        ScGPTSettings.read(given)
    assert ScGPTSettings.read(yaml.safe_load("lr_head: 1.0e-3")).lr_head == 1e-3


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, True, [1], float("nan"), float("inf")])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a"):
        ScGPTSettings.read({name: value})


@pytest.mark.parametrize("name", NUMBERS)
def test_limits_hold(name):
    low, high = limits(name)
    for value in (low, high):
        # Balanced batches are not asked for here: any size goes.
        assert getattr(ScGPTSettings.read({name: value}), name) == value
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match=f"^{name}: expected {low} to {high}, got {value}"):
            ScGPTSettings.read({name: value})


def test_whole_numbers_stay_whole_and_others_become_floats():
    with pytest.raises(ValueError, match="^rank: expected a whole number, got 8.0"):
        ScGPTSettings.read({"rank": 8.0})
    assert type(ScGPTSettings.read({"lr_head": 1}).lr_head) is float


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ranks": 4}, "settings: expected some of mode, .*, got 'ranks'"),
        ({"mode": "lora"}, "mode: expected one of frozen, head, lora_head, last_n, full, got 'lora'"),
        ({"normalise": 1}, "normalise: expected bool, got 1"),
        ({"checkpoint": 3}, "checkpoint: expected str, got 3"),
        ({"lora_targets": "Wqkv"}, "lora_targets: expected a list of str, got 'Wqkv'"),
        ({"lora_targets": []}, "lora_targets: expected some of Wqkv, .*, got \\[\\]"),
        ({"lora_targets": ["linear"]}, "lora_targets: expected some of Wqkv, .*, got \\['linear'\\]"),
        ({"lora_targets": ["Wqkv", "Wqkv"]}, "lora_targets: expected some of Wqkv, .*, each once"),
        ({"lora_layers": [1.0]}, "lora_layers: expected a list of int, got \\[1.0\\]"),
        ({"lora_layers": [True]}, "lora_layers: expected a list of int"),
        (
            {"sampler": "balanced", "batch_size": 30},
            "batch_size: expected a multiple of cells_per_condition 4, got 30",
        ),
    ],
)
def test_errors_name_what_was_expected(given, said):
    with pytest.raises(ValueError, match=said):
        ScGPTSettings.read(given)
