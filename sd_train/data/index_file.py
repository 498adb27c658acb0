"""Scans of large folders kept between runs: one file each in the cache folder, checked when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_train.errors import RunError
from sd_train.files import write_whole

FEWEST = 5000
"""Images from which on a scan is kept; fewer are read anew in no time."""

UNSETTLED = 2_000_000_000
"""Nanoseconds: a file that changed so shortly before its scan may have changed again within its time's granularity.

https://git-scm.com/docs/racy-git
"""

_MAGIC = b"sd_train index 1\n"
_LENGTHS = struct.Struct("<IIQ")  # checksum of what follows, length of the description, length of the arrays
_ALIGNED = 64
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Kept:
    """What was found, and when."""

    scanned_at: int
    """Nanoseconds since 1970, when the scan began."""
    columns: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class KeptIndexes:
    """The scans kept in `cache_dir`/index."""

    cache_dir: Path
    trust: bool
    """Take a kept scan as it is, without a look at the files that it is of."""

    def read(self, *key: str) -> Kept | None:
        """What was written under `key`; None if there is nothing, or nothing whole."""
        try:
            with self._path(key).open("rb") as file:
                return _read(file, key)
        except OSError:
            return None

    def write(self, key: tuple[str, ...], kept: Kept) -> None:
        """Keep `kept`. Where the disk refuses, the next run reads the files again."""
        with contextlib.suppress(RunError):
            write_whole(self._path(key), lambda temporary: _write(temporary, key, kept))

    def _path(self, key: tuple[str, ...]) -> Path:
        text = "\0".join((_MAGIC.decode(), *key))
        name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        return self.cache_dir / "index" / f"{name}.index"


def _write(path: Path, key: tuple[str, ...], kept: Kept) -> None:
    arrays = {name: np.ascontiguousarray(column) for name, column in kept.columns.items()}
    described = [[name, column.dtype.str, list(column.shape)] for name, column in arrays.items()]
    description = json.dumps({"key": key, "scanned_at": kept.scanned_at, "columns": described}).encode()
    checksum, length = zlib.crc32(description), 0
    with path.open("wb") as file:
        start = len(_MAGIC) + _LENGTHS.size
        file.write(bytes(start) + description)
        for column in arrays.values():
            # No copies: a column may be half of the memory.
            for part in (bytes(-length % _ALIGNED), column.reshape(-1).view(np.uint8).data):
                checksum = zlib.crc32(part, checksum)
                length += file.write(part)
        file.seek(0)
        file.write(_MAGIC + _LENGTHS.pack(checksum, len(description), length))


def _read(file: BufferedReader, key: tuple[str, ...]) -> Kept | None:
    head = file.read(len(_MAGIC) + _LENGTHS.size)
    if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _LENGTHS.size:
        return None
    checksum, described, length = _LENGTHS.unpack_from(head, len(_MAGIC))
    place = file.tell()
    if file.seek(0, 2) != place + described + length:
        return None
    file.seek(place)
    description = file.read(described)
    data = np.empty(length, np.uint8)
    found = zlib.crc32(description)
    # In blocks that stay in the processor's cache between the copy and the checksum.
    for start in range(0, length, _BLOCK):
        block = data[start : start + _BLOCK].data
        if file.readinto(block) != len(block):
            return None
        found = zlib.crc32(block, found)
    if found != checksum:
        return None
    content = json.loads(description)
    if content["key"] != list(key):
        return None
    columns, start = dict[str, NDArray[Any]](), 0
    for name, kind, shape in content["columns"]:
        start += -start % _ALIGNED
        count = int(np.prod(shape)) * np.dtype(kind).itemsize
        columns[name] = data[start : start + count].view(kind).reshape(shape)
        start += count
    return Kept(content["scanned_at"], columns)
