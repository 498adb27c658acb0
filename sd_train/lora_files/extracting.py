"""A LoRA from the difference of two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sd_train.errors import ModelError
from sd_train.families.sources import TensorSource
from sd_train.lora_files.decompose import Decomposition, RankRule, decompose
from sd_train.lora_files.merging import published_names
from sd_train.lora_files.names import TEXT_ROLES, Place, unet_kinds


@dataclass(frozen=True)
class Extraction:
    """How a difference becomes a LoRA."""

    rule: RankRule
    convolutions: bool = False
    """Also the U-Net's residual blocks and samplers (sd-scripts' `conv_dim`)."""
    clamp_quantile: float | None = 0.99
    """Factors' elements beyond this share of all are cut off (sd-scripts); None: none."""
    min_diff: float = 0.01
    """A text encoder that differs nowhere more than this is left out (sd-scripts)."""


def extract(
    original: Mapping[str, TensorSource], tuned: Mapping[str, TensorSource], how: Extraction, device: torch.device
) -> Iterator[Decomposition]:
    """Factors of tuned - original, module by module; networks by role, with diffusers' names.

    Raises:
        ModelError: if the models are not of the same shape.
    """
    roles = [role for role in ("unet", *TEXT_ROLES) if role in original]
    if missing := [role for role in roles if role not in tuned]:
        raise ModelError(f"the tuned model has no {missing[0]}; both models must be of one family")
    for role in roles:
        first, second = published_names(original[role], role), published_names(tuned[role], role)
        places = [place for place in targets(role, first, how.convolutions)]
        _refuse_other_shapes(original[role], tuned[role], first, second, places)
        if role in TEXT_ROLES and not _differs(original[role], tuned[role], first, second, places, how.min_diff):
            continue
        for place in places:
            name = f"{place.path}.weight"
            difference = tuned[role].read(second[name]).float() - original[role].read(first[name]).float()
            yield decompose(place, difference.to(device), how.rule, how.clamp_quantile)


def targets(role: str, names: Mapping[str, str], convolutions: bool) -> list[Place]:
    """The modules among `names` that get a LoRA: attentions, MLPs and, with `convolutions`, what is between them."""
    if role in TEXT_ROLES:
        inner = (".self_attn.", ".mlp.")
        return [
            Place(role, name.removesuffix(".weight"))
            for name in names
            if name.endswith(".weight") and any(part in name for part in inner)
        ]
    kinds = ("attention", "resnet", "sampler") if convolutions else ("attention",)
    table = unet_kinds()
    paths = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    return [Place(role, path) for path in paths if path in table and table[path].matrix and table[path].kind in kinds]


def _refuse_other_shapes(
    original: TensorSource,
    tuned: TensorSource,
    first: Mapping[str, str],
    second: Mapping[str, str],
    places: list[Place],
) -> None:
    for place in places:
        name = f"{place.path}.weight"
        ours, theirs = original.shape(first[name]), tuned.shape(second[name]) if name in second else None
        if ours != theirs:
            raise ModelError(
                f"{place.role}.{name}: the original model has shape {ours}, the tuned one "
                f"{theirs or 'no such weight'}; both models must be of one family"
            )


def _differs(
    original: TensorSource,
    tuned: TensorSource,
    first: Mapping[str, str],
    second: Mapping[str, str],
    places: list[Place],
    least: float,
) -> bool:
    for place in places:
        name = f"{place.path}.weight"
        difference = tuned.read(second[name]).float() - original.read(first[name]).float()
        if float(difference.abs().max()) > least:
            return True
    return False
