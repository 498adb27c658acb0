"""Randomness is derived, never consumed: every stream comes from a seed and the counters that name it."""

from __future__ import annotations

import hashlib
import random


def derive(seed: int, *parts: str | int) -> int:
    """A 64-bit number that depends on nothing but `seed` and `parts`; the same on every platform."""
    # File names that are not UTF-8 come as lone surrogates; every one of them must have its own number.
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def stream(seed: int, *parts: str | int) -> random.Random:
    """A Python generator of its own for (`seed`, `parts`)."""
    return random.Random(derive(seed, *parts))
