"""The header of a safetensors file, which may come from anyone: believed in nothing that the file does not bear out."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

_LONGEST = 100_000_000
"""Bytes of JSON; the format's own limit."""
_LARGEST = 2**63 - 1
"""What torch can count."""
_MOST_DIMENSIONS = 8
"""Of a tensor; no network has more than four, and the product of a thousand numbers takes long."""


class BadHeader(ValueError):
    """A header says what cannot be; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor, checked."""

    dtype: str
    """One of those that were asked for."""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""


def read_header(path: Path, sizes: Mapping[str, int]) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors in the safetensors file at `path`, in the header's order, and its metadata.

    `sizes` gives the bytes of a number of each dtype that is known. Every tensor lies within the file, has as many
    bytes as its shape says, and shares none with another: a short file cannot pretend to hold more than it has.

    Raises:
        BadHeader: if it is no such file.
        OSError: if it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        # A pipe would be waited for.
        raise BadHeader("it is no regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if status.st_size < 8 or length > _LONGEST:
            raise BadHeader("it has no header")
        text = file.read(length)
    if len(text) < length:
        raise BadHeader("it ends early")
    table = _parsed(text)
    metadata = _metadata(table.pop("__metadata__", None))
    room = status.st_size - 8 - length
    entries = {name: _entry(name, value, sizes, 8 + length, room) for name, value in table.items()}
    _check_apart(entries, sizes)
    return entries, metadata


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        table = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise BadHeader("its header is nested too deep") from None
    except UnicodeDecodeError:
        raise BadHeader("its header is not UTF-8") from None
    if not isinstance(table, dict):
        raise BadHeader("its header is no table")
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadHeader("its header names something twice")
    return table


def _no_number(word: str) -> None:
    raise BadHeader(f"its header holds {word}")


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadHeader("its metadata are no table")
    # What other programs write as numbers is read as text, as they mean it.
    return {_sound(key): _sound(str(text)) for key, text in value.items()}


def _sound(text: str) -> str:
    r"""`text` without lone surrogates, which JSON can write (`\ud800`) and no file or terminal takes."""
    return text.encode("utf-8", "replace").decode()


def _entry(name: str, value: object, sizes: Mapping[str, int], start: int, room: int) -> Entry:
    """What `value` says of the tensor `name`; the tensors' bytes begin at `start` and are `room` many."""
    if not isinstance(value, dict) or _sound(name) != name:
        raise BadHeader(f"{name!r} is no table, or no name that can be written")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in sizes:
        raise BadHeader(f"unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape, _MOST_DIMENSIONS) or not _are_counts(offsets, 2) or len(offsets) != 2:
        raise BadHeader(f"{name!r} has no place or shape that can be")
    first, last = offsets
    if last - first != math.prod(shape) * sizes[dtype]:
        raise BadHeader(f"{name!r} has a place of the wrong size")
    if last > room:
        raise BadHeader("it ends early")
    return Entry(dtype, tuple(shape), start + first)


def _are_counts(value: object, most: int) -> TypeGuard[list[int]]:
    """Whether `value` is a list of at most `most` whole numbers from 0 on; a bool is none."""
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(number) is int and 0 <= number <= _LARGEST for number in value)


def _check_apart(entries: Mapping[str, Entry], sizes: Mapping[str, int]) -> None:
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if (size := math.prod(entry.shape) * sizes[entry.dtype]) and entry.start < end:
            raise BadHeader(f"{before!r} and {name!r} share their place")
        if size:
            end, before = entry.start + size, name
