"""What saves are written from beside the training: copies of the tensors, in memory that each save uses again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from sd_train.optim.inference import InferenceWeights, has_average
from sd_train.state import StateContent, StateParts, optimizer_state, state_content
from sd_train.state_files import place_of
from sd_train.types import Progress

AsyncSave = Literal["auto", "always", "never"]

MOST_COPIED = 2**30
"""Bytes of a copy that nobody has to ask for."""


@dataclass(frozen=True)
class SaveCopy:
    """What saves after one update hold."""

    step: int
    weights: Mapping[str, Tensor]
    """As files get them."""
    average: Mapping[str, Tensor] | None
    ready: Callable[[], None]
    """Waits until everything is copied."""
    state: StateContent | None = None


def memory_for(size: int, pinned: bool) -> int:
    """Bytes that a tensor of `size` bytes takes: PyTorch gives out pinned memory in powers of two."""
    return 1 << (size - 1).bit_length() if pinned and size else size


def copied_bytes(parts: StateParts, state: bool) -> int:
    """How much memory a copy takes; `state`: of a save with a state."""
    weights = _bytes_of_copies(parts.trainable.tensors())
    tables = [] if parts.ema is None else [parts.ema.tensors]
    if state:
        tables.append(optimizer_state(parts)[0])
    twice = state and has_average(parts.optimizer)
    return weights * (1 + twice) + sum(map(_bytes_of_copies, tables))


def _bytes_of_copies(tensors: Mapping[str, Tensor]) -> int:
    return sum(memory_for(tensor.nbytes, tensor.is_cuda) for tensor in tensors.values())


@dataclass
class CopyMemory:
    """The memory that copies are made in: the one before is of no use any more when the next one is made."""

    _tables: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def take(self, parts: StateParts, progress: Progress) -> SaveCopy:
        """A copy of the weights and their average, as they stand."""
        with InferenceWeights(parts.trainable, parts.optimizer).for_inference():
            weights = self._copies("weights", parts.trainable.tensors())
        average = None if parts.ema is None else self._copies("ema", parts.ema.tensors)
        return SaveCopy(progress.step, weights, average, _reached(parts))

    def with_state(self, copy: SaveCopy, parts: StateParts, progress: Progress) -> SaveCopy:
        """`copy` with a state of the same update."""
        content = state_content(progress, parts)
        own = has_average(parts.optimizer)
        tables = {
            "trainable": self._copies("trainable", content.tables["trainable"]) if own else copy.weights,
            "optimizer": self._copies("optimizer", content.tables["optimizer"]),
        }
        if copy.average is not None:
            tables["ema"] = copy.average
        return replace(copy, state=replace(content, tables=tables), ready=_reached(parts))

    def free(self) -> None:
        """Give the memory back."""
        self._tables.clear()

    def _copies(self, table: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of `tensors`; names of the same memory have the same one."""
        before, made, used = self._tables.get(table, {}), dict[object, Tensor](), set[int]()
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            place = place_of(tensor)
            if place not in made:
                memory = before.get(name)
                if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype or id(memory) in used:
                    # Into pinned memory a GPU copies by itself.
                    memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                used.add(id(memory))
                made[place] = memory.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            copies[name] = made[place]
        self._tables[table] = copies
        return copies


def _reached(parts: StateParts) -> Callable[[], None]:
    """Waits for what the GPU has been told to do so far; nothing on other devices, which copy at once."""
    devices = {tensor.device for tensor in parts.trainable.tensors().values() if tensor.is_cuda}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait
