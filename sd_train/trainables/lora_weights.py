"""Weights that a network starts from: whether they fit what is built, and how they get there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sd_train.errors import ModelError

_ROUNDED = 1e-2
"""Relative: files in bfloat16 round their constants to eight bits."""


def describe_network(tensors: Mapping[str, Tensor]) -> str:
    """What a LoRA file holds, in the words of the options that fit it."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_down.weight")}
    alphas = {round(float(tensor), 4) for name, tensor in tensors.items() if name.endswith(".alpha")}
    wide = any(tensor.shape[2:].numel() > 1 for name, tensor in tensors.items() if name.endswith(".lora_down.weight"))
    if len(ranks) > 1 or len(alphas) > 1 or wide:
        held = "convolutions" if wide else f"modules of rank {sorted(ranks)} and alpha {sorted(alphas)}"
        return f"the file has {held}; give --dim_from_weights, which takes modules, ranks and alphas from it"
    text = f"the file fits --network_dim {max(ranks)}" + (f" --network_alpha {max(alphas):g}" if alphas else "")
    for prefix, option in (("lora_te", "unet"), ("lora_unet", "text_encoder")):
        if not any(name.startswith(prefix) for name in tensors):
            text += f" --network_train_{option}_only"
    return text


def of_kinds(tensors: Mapping[str, Tensor], kinds: Collection[str]) -> dict[str, Tensor]:
    """`tensors` without those of networks other than `kinds` (see `kind_of`)."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("lora_") or kind_of(name) in kinds}


def kind_of(name: str) -> str:
    """The network that a key is for: "lora_unet", "lora_te", "lora_te1" or "lora_te2"."""
    return "_".join(name.split("_")[:2])


def put_weights(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], strict: bool, constants: tuple[str, ...] = (".alpha",)
) -> None:
    """Copy `theirs` into `ours`, the live weights of a network.

    Args:
        ours: live weights, and constants, by name.
        theirs: what is put in their place.
        strict: whether the names must be the same; otherwise names of only one side are passed over.
        constants: endings of the names of what is compared and not copied.

    Raises:
        ModelError: if names (when `strict`), shapes or constants differ.
    """
    problems = _differences(ours, theirs, strict, constants)
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:5])
        raise ModelError(f"{len(problems)} differences between the weights and this configuration:{shown}")
    with torch.no_grad():
        for name, tensor in theirs.items():
            if name in ours and not name.endswith(constants):
                ours[name].copy_(tensor)


def _differences(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], strict: bool, constants: tuple[str, ...]
) -> list[str]:
    problems = []
    if strict:
        problems += [f"{name} is missing" for name in ours if name not in theirs]
        problems += [f"{name} is not part of this network" for name in theirs if name not in ours]
    for name, tensor in theirs.items():
        if name not in ours:
            continue
        if ours[name].shape != tensor.shape:
            expected, found = tuple(ours[name].shape), tuple(tensor.shape)
            made = "--network_dim makes it" if ".lora_" in name else "this network has"
            problems.append(f"{name} has shape {found}, {made} {expected}")
        elif name.endswith(constants) and not torch.allclose(ours[name].float(), tensor.cpu().float(), rtol=_ROUNDED):
            given = "--network_alpha is" if name.endswith(".alpha") else "this network has"
            problems.append(f"{name} is {float(tensor):g}, {given} {float(ours[name]):g}")
    return problems
