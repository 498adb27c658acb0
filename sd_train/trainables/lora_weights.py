"""LoRA weights that a training starts from: whether they fit what it builds."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import Tensor


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


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], strict: bool) -> list[str]:
    """What keeps `theirs` from being put into `ours`, a sentence each; `strict`: names must be the same."""
    problems = []
    if strict:
        problems += [f"{name} is missing" for name in ours if name not in theirs]
        problems += [f"{name} is not part of this network" for name in theirs if name not in ours]
    for name, tensor in theirs.items():
        if name not in ours:
            continue
        if ours[name].shape != tensor.shape:
            expected, found = tuple(ours[name].shape), tuple(tensor.shape)
            problems.append(f"{name} has shape {found}, --network_dim makes it {expected}")
        elif name.endswith(".alpha") and not math.isclose(float(ours[name]), float(tensor), rel_tol=1e-3):
            problems.append(f"{name} is {float(tensor):g}, --network_alpha is {float(ours[name]):g}")
    return problems
