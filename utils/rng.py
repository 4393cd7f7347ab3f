"""Randomness as a function: every random number of a run comes from `key(seed, *words)`, no generator's state is saved.

The words name the use: ("sample", epoch, index) is a sample's augmentation, ("slot", step, micro-batch) a
micro-batch's mixing, erasing and drop path, ("order", epoch) the order of an epoch.
"""

import hashlib
import random

import numpy as np
import torch


def key(seed: int, *words: int | str) -> int:
    """A 64-bit integer that depends on nothing but its arguments, equal on every machine and version."""
    text = "/".join(f"{word:d}" if isinstance(word, int) else word for word in (seed, *words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def reseed(value: int, device: torch.device | None = None) -> None:
    """Start Python's, NumPy's and torch's global generators, and that of `device`, from the 64-bit `value`.

    `torch.default_generator` is seeded directly: `torch.manual_seed` costs ten times as much, which a data worker
    would pay for every sample.
    """
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value >> 1)
    if device is not None and device.type == "cuda":
        torch.cuda.manual_seed(value >> 1)


def permutation(length: int, value: int) -> np.ndarray:
    """A permutation of range(`length`), int64 [length]: the stable argsort of a hash (splitmix64) of the indices.

    Not `torch.randperm` or NumPy's: their streams may change with a release, and a resumed run would change with them.
    """
    x = np.arange(length, dtype=np.uint64) ^ np.uint64(value)
    x += np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")
