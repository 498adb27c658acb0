"""Maximum norm of a module's change (`scale_weight_norms`), for all modules at once and without waiting for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """One module's matrices."""

    up: Tensor
    """[out, rank, ...]."""
    down: Tensor
    """[rank, in, ...]."""
    scale: float
    """alpha / rank."""


def change_norms(modules: Sequence[Factors]) -> Tensor:
    """The Frobenius norm of each module's change, scale * up @ down, [modules]; shapes and scales are the same.

    |U D|^2 = sum of (U^T U) * (D D^T): products of [rank, rank] instead of the whole weight.
    """
    up = torch.stack([module.up.flatten(1) for module in modules])
    down = torch.stack([module.down.flatten(1) for module in modules])
    squared = ((up.mT @ up) * (down @ down.mT)).sum((1, 2))
    return squared.clamp_min(0).sqrt() * modules[0].scale


@torch.no_grad()
def scale_down(modules: Sequence[Factors], most: float) -> dict[str, float | Tensor]:
    """Scale both matrices of every module down whose change has a norm above `most`, to `most`.

    Returns:
        sd-scripts' figures: how many were scaled, and the mean and the largest norm afterwards.
    """
    by_kind: dict[tuple[torch.Size, torch.Size, float], list[Factors]] = {}
    for module in modules:
        by_kind.setdefault((module.up.shape, module.down.shape, module.scale), []).append(module)
    norms, ratios = [], []
    for alike in by_kind.values():
        own = change_norms(alike)
        # 0 / 0 is no ratio, and a change of 0 is not scaled.
        ratio = (most / own.clamp_min(torch.finfo(own.dtype).tiny)).clamp_max(1)
        roots = list(ratio.sqrt().unbind())
        torch._foreach_mul_([module.up for module in alike], roots)
        torch._foreach_mul_([module.down for module in alike], roots)
        norms.append(own * ratio)
        ratios.append(ratio)
    every = torch.cat(norms)
    return {
        "max_norm/keys_scaled": (torch.cat(ratios) < 1).sum(),
        "max_norm/average_key_norm": every.mean(),
        "max_norm/max_key_norm": every.max(),
    }
