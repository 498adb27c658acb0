"""Safetensors files written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sd_train.families.sources import DTYPES, TensorSource

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: place for place, dtype in enumerate(DTYPES.values())}


def put_safetensors(path: Path, source: TensorSource, metadata: Mapping[str, str] | None = None) -> None:
    """Write `source` as a safetensors file (https://github.com/huggingface/safetensors#format).

    For use inside `write_whole` and `write_folder`. At any time one tensor is in memory. The same content gives the
    same bytes, those of the library's own files but for the order of the metadata.
    """
    names = sorted(source.names(), key=lambda name: (_RANK[source.dtype(name)], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in names:
        shape, dtype = source.shape(name), source.dtype(name)
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            plain = source.read(name).detach().cpu().contiguous()
            file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
