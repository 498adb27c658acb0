"""Queries, keys and values of one attention under LoRA: one product with all down matrices that share an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sd_train.families.base import Family
from sd_train.trainables.lora_module import LoraModule

_PARTS = ("to_q", "to_k", "to_v")


class StackedProjections:
    """Takes the place of an attention's three projections, each of which has a LoRA module.

    The down products are few columns wide: three of them cost three starts, and their gradients six.
    """

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self._query, self._key, self._value = modules

    def __call__(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, n, width], [B, m, width] -> queries, keys, values."""
        if hidden is attended:
            query, key, value = _together(hidden, (self._query, self._key, self._value))
        else:
            query = self._query(hidden)
            key, value = _together(attended, (self._key, self._value))
        return query, key, value


def _together(x: Tensor, modules: Sequence[LoraModule]) -> list[Tensor]:
    if not modules[0].stackable:
        return [module(x) for module in modules]
    downs, alone = torch.cat([module.down for module in modules]), None
    scale = modules[0].scale
    if scale != 1 and all(module.scale == scale for module in modules) and not _halves(x):
        # Once for all, where each sum would scale both of its gradients.
        downs, alone = downs * scale, 1.0
    hidden = functional.linear(modules[0].cast(x), downs).split([module.rank for module in modules], dim=-1)
    return [module.add(module.base(x), each, alone) for module, each in zip(modules, hidden, strict=True)]


def _halves(x: Tensor) -> bool:
    """Whether factors are cast to float16, in which a small scale would leave few of their digits."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def stack_projections(family: Family, role: str, modules: Mapping[str, LoraModule]) -> None:
    """Let the attentions of network `role` whose projections all have one of `modules`, by path, use it."""
    for path in modules:
        parent, _, part = path.rpartition(".")
        own = [modules[f"{parent}.{each}"] for each in _PARTS if f"{parent}.{each}" in modules]
        if part == _PARTS[0] and len(own) == len(_PARTS):
            attention: Any = family.module(role, parent)
            if hasattr(attention, "project"):
                attention.project = StackedProjections(own)
