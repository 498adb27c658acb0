"""How many numbers a LoRA has, from the headers of a model's files."""

from __future__ import annotations

from math import prod

from sd_train.families.keys import text_lora_targets, unet_lora_targets, unet_shape_of
from sd_train.families.parts import ModelParts, Part


def lora_numbers(parts: ModelParts, rank: int) -> dict[str, int]:
    """How many numbers a LoRA of `rank` has in each network of `parts` that can have one, by role."""
    return {role: _numbers(role, part, rank) for role, part in parts.parts.items() if role != "vae"}


def _numbers(role: str, part: Part, rank: int) -> int:
    if role == "unet":
        targets = unet_lora_targets(unet_shape_of(part.config))
    else:
        targets = text_lora_targets(part.config["num_hidden_layers"])
    shapes = [part.tensors.shape(f"{target.path}.weight") for target in targets]
    # down: [rank, in, kernel], up: [out, rank], alpha.
    return sum(rank * (prod(shape[1:]) + shape[0]) + 1 for shape in shapes)
