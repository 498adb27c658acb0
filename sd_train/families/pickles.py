"""The one place that reads pickled weights (`.ckpt`, `.pt`); nothing in the file is ever executed."""

from __future__ import annotations

import pickle  # only for the class of its errors
from pathlib import Path

import torch
from torch import Tensor

from sd_train.errors import ModelError


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt` or `.pt` file, those under "state_dict" if it has one.

    Raises:
        ModelError: if the file is broken or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as problem:
        reason = str(problem).splitlines()[0]
        raise ModelError(
            f"{path}: holds Python objects beside the weights, and loading them could run code ({reason}); "
            "convert the file to .safetensors on a machine that may run it"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise ModelError(f"{path}: cannot be read as a PyTorch file ({reason}); download it again") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no table of tensors; expected a model checkpoint")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
