"""How many numbers a LoRA or a whole model has, from the headers of a model's files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import prod

from sd_train.families.keys import text_lora_targets, unet_blocks, unet_lora_targets, unet_shape_of
from sd_train.families.parts import ModelParts, Part

RankOf = Callable[[str, str, bool], int]
"""(network role, published path, whether it is a convolution with a kernel above 1x1) -> rank; 0: no module."""


def lora_numbers(
    parts: ModelParts, rank: int, rank_of: RankOf | None = None, convolutions: bool = False
) -> dict[str, int]:
    """How many numbers a LoRA has in each network of `parts` that can have one, by role.

    Args:
        parts: the model.
        rank: of every linear layer and 1x1 convolution of the attentions.
        rank_of: in place of it, where they differ.
        convolutions: also of residual blocks and samplers.
    """
    rule = rank_of or (lambda role, path, wide: rank)
    sizes = lora_tensors(parts, rule, convolutions)
    # With the alpha of each module.
    return {role: sum(counts) + len(counts) // 2 for role, counts in sizes.items()}


def lora_tensors(parts: ModelParts, rank_of: RankOf, convolutions: bool = False) -> dict[str, list[int]]:
    """How many numbers each trained tensor of a LoRA has, by role: down and up of every module, in turn."""
    return {role: _tensors(role, part, rank_of, convolutions) for role, part in parts.parts.items() if role != "vae"}


def _tensors(role: str, part: Part, rank_of: RankOf, convolutions: bool) -> list[int]:
    if role == "unet":
        targets = unet_lora_targets(unet_shape_of(part.config), convolutions=convolutions)
    else:
        targets = text_lora_targets(part.config["num_hidden_layers"])
    there, sizes = set(part.tensors.names()), list[int]()
    for target in targets:
        # Only residual blocks whose width changes have a `conv_shortcut`.
        if target.path.endswith("conv_shortcut") and f"{target.path}.weight" not in there:
            continue
        shape = part.tensors.shape(f"{target.path}.weight")
        if own := rank_of(role, target.path, prod(shape[2:]) > 1):
            # down: [rank, in, kernel], up: [out, rank].
            sizes += [own * prod(shape[1:]), own * shape[0]]
    return sizes


def model_sizes(
    parts: ModelParts, learning: Collection[str], number: int | None, block_rates: Sequence[float] | None = None
) -> tuple[int, int]:
    """How many numbers learn, and how many bytes a file with the whole model has.

    Layers that nothing depends on, of SDXL's first text encoder the last one, count among those that learn.

    Args:
        parts: the model.
        learning: networks by role.
        number: bytes of each number in the file; None: 4 of those that learn, of others as stored.
        block_rates: of the 23 blocks of SDXL's U-Net, of which those with 0 do not learn.
    """
    learned, size = 0, 0
    for role, part in parts.parts.items():
        blocks = {} if block_rates is None or role != "unet" else unet_blocks(unet_shape_of(part.config))
        for name in part.tensors.names():
            count = prod(part.tensors.shape(name))
            learns = role in learning
            if learns and block_rates is not None and blocks:
                learns = block_rates[blocks[name.rpartition(".")[0]]] > 0
            learned += count * learns
            size += count * (number or (4 if learns else part.tensors.dtype(name).itemsize))
    return learned, size
