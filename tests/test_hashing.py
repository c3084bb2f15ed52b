"""Numbers from names: the same everywhere, whatever the order, and spread out."""

import subprocess
import sys

import numpy as np

from perturbret.files.hashing import mix, name_seeds

NAMES = [f"cell{i}" for i in range(2000)]


def test_numbers_depend_on_the_name_alone():
    order = np.random.default_rng(0).permutation(len(NAMES))
    seeds = name_seeds(NAMES)
    assert seeds.dtype == np.uint64 and len(set(seeds.tolist())) == len(NAMES)
    np.testing.assert_array_equal(name_seeds([NAMES[i] for i in order]), seeds[order])
    np.testing.assert_array_equal(name_seeds(NAMES[7:8]), seeds[7:8])
    np.testing.assert_array_equal(mix(seeds[order]), mix(seeds)[order])


def test_numbers_are_the_same_in_every_process_and_version():
    # Python's own hash of a text differs between processes; a change of these numbers changes held-out cells.
    ask = "from perturbret.files.hashing import *; print(*name_seeds(['a', 'ä']), *mix(name_seeds(['a'])))"
    said = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["4681665781835383343", "17315702723226345529", "1786339900719625571"]


def test_splitmix64_as_published():
    # First outputs of the published generator from the state 0: its state goes up by the golden gamma each time.
    golden = 0x9E3779B97F4A7C15
    states = np.array([0, golden, 2 * golden % 2**64], np.uint64)
    assert [int(x) for x in mix(states)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_near_numbers_get_far_apart():
    shares = np.bincount((mix(np.arange(20_000, dtype=np.uint64)) % np.uint64(20)).astype(int)) / 20_000
    assert len(shares) == 20 and np.abs(shares - 0.05).max() < 0.008
    shares = np.bincount((mix(name_seeds(NAMES)) % np.uint64(4)).astype(int)) / len(NAMES)
    assert np.abs(shares - 0.25).max() < 0.05
