"""Safetensors files written tensor by tensor: at any time one of them is in memory beside what is saved."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.families.sources import DTYPES, DictSource, TensorSource
from sd_train.files import write_whole

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_LEGACY = (0x100000, 0x110000)
"""The bytes of a file that the older of the two hashes of networks is made of."""


def put_safetensors(path: Path, source: TensorSource, metadata: Mapping[str, str] | None = None) -> None:
    """Write `source` as a safetensors file (https://github.com/huggingface/safetensors#format).

    For use inside `write_whole` and `write_folder`. The same content gives the same bytes, those of the library's own
    files but for the order of the metadata.
    """
    names = _in_order(source)
    with path.open("wb") as file:
        file.write(_head(source, names, metadata))
        for name in names:
            file.write(_bytes(source.read(name)))


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

    `sshs_model_hash` is SHA-256 of the tensors' bytes as they stand in the file, `sshs_legacy_hash` the first 8 digits
    of SHA-256 of 64 KiB at 1 MiB of a file that carries the `ss_*` entries alone (sd-scripts' definitions).

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

        with temporary.open("wb") as file:
            file.write(head())
            for name in names:
                block = _bytes(source.read(name))
                file.write(block)
                digest.update(block)
                legacy.add(block)
                # Not to be kept while the next one is read.
                del block
            file.seek(0)
            file.write(head())

    write_whole(path, write)


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
