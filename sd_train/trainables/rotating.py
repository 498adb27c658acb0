"""Orthogonal finetuning: changes that multiply a weight by small orthogonal matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rotated(weight: Tensor, factors: Mapping[str, Tensor], constraint: float) -> Tensor:
    """`weight` after the rotation that `factors` hold, in float32.

    `oft_blocks` are [blocks, side, side] for OFT (Qiu et al. 2023, arXiv:2306.07280), [stages, blocks, side, side] for
    BOFT (Liu et al. 2023, arXiv:2311.06243); `rescale`, where there is one, multiplies each output afterwards.

    Args:
        weight: [out, in, ...].
        factors: by LyCORIS's names.
        constraint: the blocks' norm is at most `constraint` times the outputs; 0: no limit.

    Nothing here waits for the device, so that it can be part of a training step.

    Raises:
        ValueError: if the blocks do not make up the outputs.
    """
    blocks = factors["oft_blocks"].float()
    if blocks.ndim not in (3, 4) or blocks.shape[-3] * blocks.shape[-1] != weight.shape[0]:
        raise ValueError(f"blocks of shape {tuple(blocks.shape)} do not make up {weight.shape[0]} outputs")
    rotations = _cayley(blocks, constraint * weight.shape[0])
    found = weight.float()
    if blocks.ndim == 3:
        parts = found.unflatten(0, (blocks.shape[0], -1))
        found = torch.einsum("knm,kn...->km...", rotations, parts).flatten(0, 1)
    else:
        for stage, rotation in enumerate(rotations):
            found = _butterfly(found, rotation, 2**stage * (blocks.shape[-1] // 2))
    if "rescale" in factors:
        found = found * factors["rescale"].float().view(-1, *[1] * (weight.ndim - 1))
    return found


def _cayley(blocks: Tensor, most: float) -> Tensor:
    """Cayley's transform of the blocks' skew-symmetric part: an orthogonal matrix for each."""
    skew = blocks - blocks.transpose(-1, -2)
    if most > 0:
        skew = skew * (most / torch.linalg.vector_norm(skew).clamp_min(most))
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    # Of a skew-symmetric matrix this always has an inverse; inv would wait for the device to hear that.
    rotations: Tensor = (identity + skew) @ torch.linalg.inv_ex(identity - skew).inverse
    return rotations


def _butterfly(weight: Tensor, rotation: Tensor, apart: int) -> Tensor:
    """Rotate the outputs in groups of which each holds neighbours and those `apart` from them."""
    mixed = weight.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, rotation.shape[-1]))
    turned = torch.einsum("bij,bj...->bi...", rotation, mixed).flatten(0, 1)
    sorted_again: Tensor = turned.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return sorted_again
