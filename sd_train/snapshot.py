"""Everything that a state holds, kept in memory: a run goes back to it to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sd_train.state import StateParts, load_optimizer_state, optimizer_state
from sd_train.types import Progress


@dataclass(frozen=True)
class Snapshot:
    """Copies on the CPU, of `progress.step` updates."""

    progress: Progress
    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    optimizer_plain: Mapping[str, Any]
    average: Mapping[str, Tensor] | None
    extras: Mapping[str, dict[str, Any]]

    def restore(self, parts: StateParts, progress: Progress) -> None:
        """Put everything back, `progress` included; the snapshot stays as it is."""
        parts.trainable.load(self.trainable)
        # Some optimizers note things in their groups at the first step, which loading would leave there.
        for group, saved in zip(parts.optimizer.param_groups, self.optimizer_plain["groups"], strict=True):
            for key in group.keys() - saved.keys() - {"params"}:
                del group[key]
        load_optimizer_state(parts, self.optimizer, self.optimizer_plain)
        if parts.ema is not None and self.average is not None:
            parts.ema.load(self.average)
        for name, (_, put) in parts.extras.items():
            put(deepcopy(self.extras[name]))
        for field in fields(Progress):
            setattr(progress, field.name, deepcopy(getattr(self.progress, field.name)))


def take_snapshot(parts: StateParts, progress: Progress, before: Snapshot | None = None) -> Snapshot:
    """A snapshot of `parts` as they stand; the memory of `before`, which is of no use any more, is used again."""
    tensors, plain = optimizer_state(parts)
    return Snapshot(
        deepcopy(progress),
        _copies(parts.trainable.tensors(), {} if before is None else before.trainable),
        _copies(tensors, {} if before is None else before.optimizer),
        deepcopy(plain),
        None if parts.ema is None else _copies(parts.ema.tensors, (before.average or {}) if before else {}),
        {name: deepcopy(read()) for name, (read, _) in parts.extras.items()},
    )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is; waits once for each device, where they are."""
    alike: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault(tensor.device, []).append(tensor)
    return all(_all_finite(found) for found in alike.values())


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    """The same of one device's. What is not finite spoils a sum, which takes a fiftieth of the time that looking at
    each number takes; where finite numbers are too large for a sum, each is looked at."""
    if bool(torch.stack([tensor.sum().isfinite() for tensor in tensors]).all()):
        return True
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _copies(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, in the memory of those of the same name that fit."""
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        old = before.get(name)
        if old is not None and old.shape == tensor.shape and old.dtype == tensor.dtype:
            copies[name] = old.copy_(tensor.detach())
        else:
            copies[name] = tensor.detach().to("cpu", copy=True)
    return copies
