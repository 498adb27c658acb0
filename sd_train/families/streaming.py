"""Safetensors files written tensor by tensor: at any time one of them is in memory beside what is saved."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sd_train.families.sources import DTYPES, DictSource, TensorSource
from sd_train.files import begin_writing, write_whole

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_MOST_BEHIND = 8 << 20
"""Bytes that may wait in memory to be taken."""
_BEGUN_TOGETHER = 32 << 20
"""Bytes that the disk is told to begin with."""
_LEGACY = (0x100000, 0x110000)
"""The bytes of a file that the older of the two hashes of networks is made of."""


Take = Callable[[bytes | memoryview], None]
"""Is given the bytes of a file, in their order."""


def put_safetensors(
    path: Path, source: TensorSource, metadata: Mapping[str, str] | None = None, take: Take | None = None
) -> None:
    """Write `source` as a safetensors file (https://github.com/huggingface/safetensors#format).

    For use inside `write_whole` and `write_folder`. The same content gives the same bytes, those of the library's own
    files but for the order of the metadata. `take` is given them too, as a digest needs them.
    """
    names = _in_order(source)
    with path.open("wb") as file, _Taken(file, take) as taken:
        taken.write(_head(source, names, metadata))
        for name in names:
            taken.write(_bytes(source.read(name)))


def write_tensors(
    path: Path, tensors: TensorSource | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; tensors may be views and on any device.

    Raises:
        RunError: if the disk refuses.
    """
    source = _source(tensors)
    write_whole(path, lambda temporary: put_safetensors(temporary, source, metadata))


def write_network(path: Path, tensors: TensorSource | Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA-like network with the two hashes that web UIs look it up by, whole or not at all.

    `sshs_model_hash` is SHA-256 of the tensors' bytes as they are given to the file, `sshs_legacy_hash` the first 8
    digits of SHA-256 of 64 KiB at 1 MiB of a file that carries the `ss_*` entries alone (sd-scripts' definitions).

    Raises:
        RunError: if the disk refuses.
    """
    source = _source(tensors)
    names = _in_order(source)

    def write(temporary: Path) -> None:
        digest, legacy = hashlib.sha256(), _Part(*_LEGACY)
        legacy.add(_head(source, names, {key: value for key, value in metadata.items() if key.startswith("ss_")}))

        def head() -> bytes:
            # As long before the tensors are hashed as after it.
            hashes = {"sshs_model_hash": digest.hexdigest(), "sshs_legacy_hash": legacy.digest.hexdigest()[:8]}
            return _head(source, names, {**metadata, **hashes})

        def take(block: bytes | memoryview) -> None:
            digest.update(block)
            legacy.add(block)

        with temporary.open("wb") as file:
            file.write(head())
            with _Taken(file, take) as taken:
                for name in names:
                    taken.write(_bytes(source.read(name)))
            file.seek(0)
            file.write(head())

    write_whole(path, write)


class _Taken:
    """Writes to a file; what is written is also taken, in a thread while it is written. A context manager, after which
    everything is taken."""

    def __init__(self, file: BinaryIO, take: Take | None) -> None:
        self._file, self._take = file, take
        self._thread = ThreadPoolExecutor(1)
        self._behind: deque[tuple[Future[None], int]] = deque()
        """What is still to be taken, with its bytes."""
        self._bytes_behind = 0
        self._begun = 0
        """How much of the file is on its way to the disk."""

    def __enter__(self) -> _Taken:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._catch_up(0)
        finally:
            self._thread.shutdown()

    def write(self, block: bytes | memoryview) -> None:
        """Write `block`, whose bytes must not change before everything is taken."""
        if self._take is not None:
            self._behind.append((self._thread.submit(self._take, block), len(block)))
            self._bytes_behind += len(block)
        self._file.write(block)
        self._begin()
        self._catch_up(_MOST_BEHIND)

    def _catch_up(self, most: int) -> None:
        """Wait until at most so many bytes are still to be taken."""
        while self._bytes_behind > most:
            taken, size = self._behind.popleft()
            taken.result()
            self._bytes_behind -= size

    def _begin(self) -> None:
        place = self._file.tell()
        if place - self._begun >= _BEGUN_TOGETHER:
            begin_writing(self._file, self._begun, place - self._begun)
            self._begun = place


@dataclass
class _Part:
    """SHA-256 of the bytes from `start` to `end` of what is added."""

    start: int
    end: int
    digest: Any = field(default_factory=hashlib.sha256)
    _added: int = 0

    def add(self, block: bytes | memoryview) -> None:
        first, last = max(0, self.start - self._added), max(0, self.end - self._added)
        self.digest.update(block[first:last])
        self._added += len(block)


def _source(tensors: TensorSource | Mapping[str, Tensor]) -> TensorSource:
    return DictSource(tensors) if isinstance(tensors, Mapping) else tensors


def _in_order(source: TensorSource) -> list[str]:
    return sorted(source.names(), key=lambda name: (_RANK[source.dtype(name)], name))


def _head(source: TensorSource, names: Sequence[str], metadata: Mapping[str, str] | None) -> bytes:
    """What stands before the tensors."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = source.shape(name), source.dtype(name)
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
