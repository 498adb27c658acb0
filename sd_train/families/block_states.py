"""Text of its own for each cross-attention block of a U-Net (P+, Voynov et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sd_train.families.keys import unet_modules, unet_shape_of

_HALVES = {"input": "IN", "output": "OUT"}
_BLOCK = re.compile(r"(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.norm")


def state_blocks(config: Mapping[str, Any]) -> dict[str, str]:
    """Name of each transformer of a U-Net -> its path in diffusers, in the order in which they compute.

    The names are sd-scripts', after the blocks of the original checkpoints: `input_blocks.1.1` is IN01. Stable
    Diffusion 1.x and 2.x have 16: IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 to OUT11. SDXL has 11: IN04 IN05 IN07 IN08
    MID OUT00 to OUT05.
    """
    blocks = {}
    for module in unet_modules(unet_shape_of(config)):
        if found := _BLOCK.fullmatch(module.original):
            name = f"{_HALVES[found[1]]}{int(found[2]):02d}" if found[1] else "MID"
            blocks[name] = module.diffusers.removesuffix(".norm")
    return blocks


def divide_states(unet: nn.Module, paths: Sequence[str]) -> None:
    """Let each of the transformers at `paths` see its own part of the states, [B, blocks * tokens, width].

    The parts lie along the tokens, so that whoever puts batches together (guidance in diffusers' pipelines) needs not
    know of them.
    """
    for place, path in enumerate(paths):
        hook = partial(_own_part, place, len(paths))
        unet.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)


def _own_part(
    place: int, count: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    states: Tensor = kwargs["encoder_hidden_states"]
    tokens = states.shape[1] // count
    return args, {**kwargs, "encoder_hidden_states": states.narrow(1, place * tokens, tokens)}
