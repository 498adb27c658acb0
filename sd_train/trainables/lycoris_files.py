"""Tensors of a LyCORIS network as they learn <-> as they stand in its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_FOLDED = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "a2.weight", "b2.weight")
"""Factors that a trained `scalar` is multiplied into when a file is written."""


def to_file(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """A network's tensors as LyCORIS saves them: scalars multiplied in, blocks of ranks put together.

    `shapes`: of the changed weights, by module.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key, _, factor = name.partition(".")
        scalar = tensors.get(f"{key}.scalar")
        if factor.startswith(("up_list.", "down_list.")):
            half, _, number = factor.partition("_list.")
            if number == "0":
                found[f"{key}.lora_{half}.weight"] = _joined(tensors, f"{key}.{half}_list.", shapes[key])
        elif factor != "scalar":
            found[name] = tensor * scalar if scalar is not None and factor in _FOLDED else tensor
    return found


def _joined(tensors: Mapping[str, Tensor], beginning: str, shape: Sequence[int]) -> Tensor:
    """The blocks side by side, for a convolution with four dimensions as in a LoCon."""
    parts = [tensors[f"{beginning}{number}"] for number in range(sum(name.startswith(beginning) for name in tensors))]
    if beginning.endswith("up_list."):
        return torch.cat(parts, dim=1).reshape(shape[0], -1, *[1] * len(shape[2:]))
    return torch.cat(parts).reshape(-1, *shape[1:])


def from_file(tensors: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_file` wrote, under the names of `ours`; what does not fit them stays as it is, for `load` to say."""
    found = dict(tensors)
    for name, tensor in ours.items():
        key, _, factor = name.partition(".")
        if factor == "scalar":
            found[name] = torch.ones_like(tensor)
        elif factor.startswith(("up_list.", "down_list.")) and factor.endswith(".0"):
            half = factor.partition("_list.")[0]
            count = sum(other.startswith(f"{key}.{half}_list.") for other in ours)
            whole = tensors.get(f"{key}.lora_{half}.weight")
            if whole is None or whole.shape[1 if half == "up" else 0] != count * tensor.shape[1 if half == "up" else 0]:
                continue
            del found[f"{key}.lora_{half}.weight"]
            for number, part in enumerate(whole.flatten(1).chunk(count, dim=1 if half == "up" else 0)):
                found[f"{key}.{half}_list.{number}"] = part
    return found
