"""The one place that reads pickled weights (`.ckpt`, `.pt`); nothing in the file is ever executed."""

from __future__ import annotations

import pickle  # only for the class of its errors
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from sd_train.errors import ModelError

_FOREIGN = re.compile(r"(?:unsupported (?:global|class)|can only)[^\n]*?(?= was not| whose|\. |$)", re.I | re.M)
"""What torch says of anything in a pickle that is no tensor and no plain value."""


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt` or `.pt` file, those under "state_dict" if it has one.

    Raises:
        ModelError: if the file is broken or holds anything but tensors and plain values.
    """
    # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
    zipped = zipfile.is_zipfile(path)
    broken = f"{path}: cannot be read as a PyTorch file (%s); download it again"
    try:
        if not zipped and _first_bytes(path, 2) == b"PK":
            raise ModelError(broken % "the archive has no end")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as problem:
        found = _FOREIGN.search(str(problem))
        if found is None:
            raise ModelError(broken % "no weights in it can be read") from None
        raise ModelError(
            f"{path}: holds Python objects beside the weights, and loading them could run code ({found[0]}); "
            "convert the file to .safetensors on a machine that may run it"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError) as problem:
        raise ModelError(broken % (str(problem) or "it ends early").splitlines()[0]) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no table of tensors; expected a model checkpoint")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
