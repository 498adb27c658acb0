"""The files of a cache: rows of equal layout, packed, each with its key and checksum.

A shard is a safetensors file with three tensors, so that other tools can open it:

- `keys`, uint8 [N, 16]: the name of each row;
- `sums`, uint64 [N]: the checksum of each row;
- `rows`, uint8 [N, bytes]: each row's tensors one behind the other, padded to a multiple of `UNIT` bytes.

Its metadata hold the layout (name, dtype, shape, start and size of each tensor within a row) and a digest of layout,
keys and checksums. A shard is never changed: it appears complete, and is removed or written anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.files import write_whole

Bytes = NDArray[np.uint8]
Keys = NDArray[np.bytes_]
"""[N] of 16 bytes each, dtype S16: NumPy sorts and searches it as it is."""

FORMAT = "sd_train rows 1"
SUFFIX = ".safetensors"
UNIT = 4096
MOST_HEADER = 100_000_000
_SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
          "uint8": 1, "bool": 1}  # fmt: skip
"""Bytes of a number of each dtype that rows may have, as torch spells it."""
_LANES = UNIT // 8
# Odd, so that a single changed bit always changes the sum.
_FACTORS = np.random.PCG64(0x5D).random_raw(_LANES) | np.uint64(1)


@dataclass(frozen=True)
class Part:
    """One tensor of a row."""

    name: str
    dtype: str
    """As torch spells it, without "torch."."""
    shape: tuple[int, ...]
    start: int
    """Its first byte within the row."""
    size: int
    """Bytes."""


Layout = tuple[Part, ...]


class BadShard(Exception):
    """A file is no whole shard; the message says why, without the file's name."""


@dataclass(frozen=True)
class ShardHead:
    """What a shard says about its rows."""

    layout: Layout
    keys: Keys
    sums: NDArray[np.uint64]
    start: int
    """First byte of the rows in the file."""
    row_bytes: int
    file_bytes: int

    def __len__(self) -> int:
        return len(self.keys)


def layout_of(tensors: Sequence[tuple[str, str, tuple[int, ...], int]]) -> tuple[Layout, int]:
    """(name, dtype, shape, bytes) of each tensor of a row -> layout, bytes of a row."""
    parts, start = [], 0
    for name, dtype, shape, size in tensors:
        parts.append(Part(name, dtype, shape, start, size))
        # Every tensor starts where any dtype may.
        start += -(-size // 64) * 64
    return tuple(parts), -(-start // UNIT) * UNIT


def checksums(rows: Bytes) -> NDArray[np.uint64]:
    """[N, bytes] -> [N]: 512 interleaved sums of 8-byte words modulo 2^64, weighted by odd numbers and summed."""
    return np.array([checksum(row) for row in rows], np.uint64)


def checksum(row: Bytes) -> int:
    """[bytes] -> the checksum of one row."""
    lanes = np.add.reduce(row.view(np.uint64).reshape(-1, _LANES), axis=0)
    return int(np.dot(lanes, _FACTORS))


def write_shard(folder: Path, layout: Layout, keys: Keys, blocks: Sequence[Bytes]) -> Path:
    """Write the rows of `blocks`, each [n, bytes of a row], as a new shard of `folder`; its path.

    Raises:
        RunError: if the disk refuses.
    """
    sums = np.concatenate([checksums(block) for block in blocks])
    count, row_bytes = len(keys), blocks[0].shape[1]
    table = {
        "keys": {"dtype": "U8", "shape": [count, 16], "data_offsets": [0, 16 * count]},
        "sums": {"dtype": "U64", "shape": [count], "data_offsets": [16 * count, 24 * count]},
        "rows": {
            "dtype": "U8",
            "shape": [count, row_bytes],
            "data_offsets": [24 * count, (24 + row_bytes) * count],
        },
    }
    described = json.dumps([asdict(part) for part in layout], separators=(",", ":"))
    metadata = {"format": FORMAT, "layout": described, "digest": _digest(described, row_bytes, keys, sums)}
    header = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    # Blanks at its end move the rows to the start of a page.
    header += b" " * (-(8 + len(header) + 24 * count) % UNIT)
    # Two processes, or two runs at once, never choose the same name.
    path = folder / f"{time.time_ns():016x}-{secrets.token_hex(6)}{SUFFIX}"

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.write(keys.tobytes() + sums.tobytes())
            for block in blocks:
                file.write(block.data)

    write_whole(path, write, "--cache_dir")
    return path


def read_head(path: Path) -> ShardHead:
    """Read and check everything of a shard but its rows.

    Raises:
        BadShard: if the file is foreign, cut off or damaged.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER, file_bytes):
            raise BadShard("it is no cache file")
        try:
            header = json.loads(file.read(length))
            metadata = header["__metadata__"]
            if metadata["format"] != FORMAT:
                raise BadShard(f"its format is {str(metadata['format'])[:40]!r}, not {FORMAT!r}")
            layout = tuple(
                Part(part["name"], part["dtype"], tuple(part["shape"]), part["start"], part["size"])
                for part in json.loads(metadata["layout"])
            )
            count, row_bytes = header["rows"]["shape"]
            if not all(isinstance(number, int) and 0 < number <= file_bytes for number in (count, row_bytes)):
                raise BadShard("its header is damaged")
            if not all(_is_sound(part, row_bytes) for part in layout):
                raise BadShard("its layout is not that of its rows")
            start = 8 + length + 24 * count
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise BadShard("its header is damaged, or it is no cache file") from None
        if file_bytes != start + count * row_bytes:
            raise BadShard(f"it has {file_bytes:,} bytes in place of {start + count * row_bytes:,}")
        keys = np.frombuffer(file.read(16 * count), "S16")
        sums = np.frombuffer(file.read(8 * count), np.uint64)
    if metadata.get("digest") != _digest(metadata["layout"], row_bytes, keys, sums):
        raise BadShard("its keys or checksums are damaged")
    return ShardHead(layout, keys, sums, start, row_bytes, file_bytes)


def _is_sound(part: Part, row_bytes: int) -> bool:
    """Whether a tensor of that dtype and shape has its place within a row."""
    counts = (*part.shape, part.start, part.size)
    if not all(type(number) is int and 0 <= number <= row_bytes for number in counts) or part.dtype not in _SIZES:
        return False
    return isinstance(part.name, str) and (
        part.start + part.size <= row_bytes and math.prod(part.shape) * _SIZES[part.dtype] == part.size
    )


def read_rows(path: Path, head: ShardHead, first: int, count: int) -> Bytes:
    """[n, bytes]: up to `count` rows from number `first` on, as they stand in the file, checked or not.

    Raises:
        BadShard: if the file has become shorter.
        OSError: if it cannot be read.
    """
    count = min(count, len(head) - first)
    size = count * head.row_bytes
    found = np.fromfile(path, np.uint8, size, offset=head.start + first * head.row_bytes)
    if len(found) != size:
        raise BadShard("it is cut off")
    return found.reshape(count, head.row_bytes)


def damaged_rows(path: Path, head: ShardHead) -> NDArray[np.int64]:
    """Numbers of the rows that do not have their checksum; reads the whole file.

    Raises:
        BadShard: if the file has become shorter.
        OSError: if it cannot be read.
    """
    found = []
    step = max(1, (16 << 20) // head.row_bytes)
    for first in range(0, len(head), step):
        sums = checksums(read_rows(path, head, first, step))
        found.append(first + np.flatnonzero(sums != head.sums[first : first + step]))
    return np.concatenate(found)


def copy_rows(path: Path, head: ShardHead, keep: NDArray[np.bool_]) -> Path | None:
    """Write the rows that `keep` marks as a new shard beside `path`; None where it marks none.

    Raises:
        BadShard: if the file has become shorter.
        OSError, RunError: if it cannot be read, or the disk refuses.
    """
    if not keep.any():
        return None
    return write_shard(path.parent, head.layout, head.keys[keep], [read_rows(path, head, 0, len(head))[keep]])


def _digest(layout: str, row_bytes: int, keys: Keys, sums: NDArray[np.uint64]) -> str:
    digest = hashlib.blake2b(f"{layout}|{row_bytes}|{len(keys)}|".encode(), digest_size=16)
    digest.update(keys.tobytes())
    digest.update(sums.tobytes())
    return digest.hexdigest()
