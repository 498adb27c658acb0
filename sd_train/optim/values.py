"""An optimizer's state as JSON and named tensors: whatever its classes keep comes back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sd_train.errors import ConfigError


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; the tensors in it are added to `tensors` under names that begin with `path`.

    A JSON list stands for a tuple; lists, dicts and tensors are objects that say so.

    Raises:
        ConfigError: if it holds something that no file can.
    """
    match value:
        case Tensor():
            # No copy: beside a whole model there may be no room for its optimizer's state twice.
            tensors[path] = value.detach()
            return {"tensor": path}
        case None | bool() | int() | float() | str():
            return value
        case tuple():
            return [encode(item, f"{path}/{place}", tensors) for place, item in enumerate(value)]
        case list():
            return {"list": [encode(item, f"{path}/{place}", tensors) for place, item in enumerate(value)]}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {key: encode(item, f"{path}/{key}", tensors) for key, item in value.items()}}
    raise ConfigError(
        f"--optimizer_type: the optimizer keeps a {type(value).__name__} as {path.rpartition('/')[2]}, which cannot be "
        "saved in a state; choose another one"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    match value:
        case {"tensor": str(path)}:
            return tensors[path]
        case {"list": list(items)}:
            return [decode(item, tensors) for item in items]
        case {"dict": dict(items)}:
            return {key: decode(item, tensors) for key, item in items.items()}
        case list():
            return tuple(decode(item, tensors) for item in value)
    return value


def moved(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in it on `device`."""
    match value:
        case Tensor():
            return value.to(device)
        case list() | tuple():
            return type(value)([moved(item, device) for item in value])
        case dict():
            return {key: moved(item, device) for key, item in value.items()}
    return value
