"""The files of a state: tables of tensors and JSON, read as what anyone may have written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sd_train.errors import DataError, ModelError
from sd_train.families.sources import DictSource, SafetensorsSource, read_all
from sd_train.families.streaming import put_safetensors

_SHARED = "shared"
"""Entry of a table's metadata: name -> the one under which the same memory is written."""


def place_of(tensor: Tensor) -> object:
    """What tensors that are the same memory have in common; without numbers there is no memory to share."""
    if not tensor.numel():
        return object()
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def put_table(path: Path, table: Mapping[str, Tensor]) -> str:
    """Write `table`; tensors that are the same memory are written once, under the first of their names.

    Returns the SHA-256 of the bytes that the file was given, as hexadecimal digits; the file is not read again.
    """
    first: dict[object, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in table.items():
        owner = first.setdefault(place_of(tensor), name)
        if owner != name:
            shared[name] = owner
    kept = {name: tensor for name, tensor in table.items() if name not in shared}
    # Tensor by tensor: beside a whole model there may be no room for its state twice.
    digest = hashlib.sha256()
    put_safetensors(path, DictSource(kept), {_SHARED: json.dumps(shared)} if shared else None, digest.update)
    return digest.hexdigest()


def read_table(path: Path) -> dict[str, Tensor]:
    """What `put_table` was given; names of the same memory have the same tensor again.

    Raises:
        DataError: if the file is none of a state.
    """
    with of_a_state(path):
        source = SafetensorsSource.open([path])
        table = read_all(source)
        shared: dict[str, str] = json.loads(source.metadata.get(_SHARED, "{}"))
        return table | {name: table[owner] for name, owner in shared.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a state.

    Raises:
        DataError: if the file is none of a state.
    """
    with of_a_state(path):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(content)


@contextmanager
def of_a_state(path: Path) -> Iterator[None]:
    """Turn what reading `path` stumbles over into words: a seal can be put on anything.

    Raises:
        DataError: in place of what the block raises because of the content.
    """
    try:
        yield
    except ModelError as problem:
        reason = str(problem).removeprefix(f"{path}: ").removesuffix("; download it again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        reason = f"{type(problem).__name__}: {problem}"
    else:
        return
    raise DataError(f"{path}: holds what no training has written ({reason[:200]}); choose another state") from None
