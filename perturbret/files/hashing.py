"""Numbers that look random and depend on names alone: the same on every machine, in every order."""

import hashlib
from collections.abc import Iterable

import numpy as np


def name_seeds(names: Iterable[str]) -> np.ndarray:
    """A number for each name, uint64.

    Examples
    --------
    >>> name_seeds(["AAACCTG-1", "AAACCTG-2"])
    array([10768829140609158776, 11521687642516792551], dtype=uint64)
    """
    digests = (hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest) for digest in digests], np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """One step of splitmix64 (Steele et al., OOPSLA 2014) on uint64: near numbers get far apart.

    Examples
    --------
    >>> mix(np.array([1, 2], np.uint64))
    array([10451216379200822465, 10905525725756348110], dtype=uint64)
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
