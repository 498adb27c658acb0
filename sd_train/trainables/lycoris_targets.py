"""Which modules a LyCORIS network changes: its presets on our tables of names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from sd_train.config.lycoris_args import WITH_KERNELS, WITH_RESNETS, Preset
from sd_train.families.base import Family
from sd_train.families.keys import unet_modules, unet_shape_of


class Target(NamedTuple):
    """One module that is changed."""

    key: str
    """In kohya's files."""
    original: nn.Module
    on_input: bool
    """Whether (IA)^3 scales what goes into it, where its preset decides that."""


_ON_INPUT = (".mlp.fc2", ".ff.net.2")
_IA3 = (".to_k", ".to_v", ".k_proj", ".v_proj", *_ON_INPUT)
"""Ends of the paths in (IA)^3's own preset (Liu et al. 2022): keys, values and what leaves the feed-forward layer."""


def _is_attention(path: str) -> bool:
    return ".attn1." in path or ".attn2." in path or ".self_attn." in path


def _anything(path: str) -> bool:
    return True


_CHOSEN: dict[Preset, Callable[[str], bool]] = {
    "attn-only": _is_attention,
    "unet-convblock-only": lambda path: ".attentions." not in path,
    "ia3": lambda path: path.endswith(_IA3),
}
"""By published path; a preset that is missing takes all that `lora_targets` gives."""


def targets_of(family: Family, role: str, preset: Preset) -> list[Target]:
    """What `preset` changes in network `role`, matrices only."""
    if role != "unet" and preset.startswith("unet-"):
        return []
    chosen = _CHOSEN.get(preset, _anything)
    kernels = preset in WITH_KERNELS
    found = []
    for target in family.lora_targets(role, convolutions=preset in WITH_RESNETS):
        original = family.module(role, target.path)
        wanted = kernels or not has_kernel(original)
        if wanted and chosen(target.path):
            found.append(Target(target.key, original, preset == "ia3" and target.path.endswith(_ON_INPUT)))
    return found


def has_kernel(original: nn.Module) -> bool:
    """Whether it is a convolution that sees more than one pixel."""
    return isinstance(original, nn.Conv2d) and original.kernel_size != (1, 1)


def norms_of(family: Family, role: str, preset: Preset) -> list[Target]:
    """The U-Net's norms beside what `preset` changes, for `train_norm`; LyCORIS leaves text encoders' norms alone."""
    if role != "unet":
        return []
    config: Any = family.networks[role].config
    # Whether keys follow the original checkpoint, which the matrices' keys tell.
    original = any(
        target.key != f"lora_unet_{target.path.replace('.', '_')}" for target in family.lora_targets(role)
    )
    kinds = {"attention", "resnet"} if preset in WITH_RESNETS else {"attention"}
    chosen = _CHOSEN.get(preset, _anything)
    names = [
        name
        for name in unet_modules(unet_shape_of(config))
        if name.kind in kinds and not name.matrix and chosen(name.diffusers)
    ]
    return [
        Target(
            "lora_unet_" + (name.original if original else name.diffusers).replace(".", "_"),
            family.module(role, name.diffusers),
            False,
        )
        for name in names
    ]
