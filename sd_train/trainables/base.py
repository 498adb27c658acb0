"""What every trainable offers to the loop."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from sd_train.families.base import Family
from sd_train.types import Batch, Update


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate."""

    name: str
    """As it is logged: lr/NAME."""
    params: dict[str, nn.Parameter]
    """By the names that `Trainable.tensors` gives them."""
    lr: float
    until: int | None = None
    """The update from which on they stay as they are, over all runs of the training; None: never."""
    weight_decay: float | None = None
    """In place of the optimizer's own; None: that one."""

    def active(self, step: int) -> bool:
        """Whether they still learn after `step` updates."""
        return self.until is None or step < self.until


class Trainable(Protocol):
    """Which parameters learn, and how they are saved."""

    masters: Collection[str]
    """Networks whose own weights learn: they are kept in float32, whatever the forward pass computes in."""

    def install(self, family: Family) -> None:
        """Put the trainable parameters into the networks of `family`.

        Raises:
            ModelError: if they do not fit it.
        """
        ...

    def describe(self) -> str:
        """What learns, in a few words: kinds and numbers."""
        ...

    def groups(self) -> list[ParamGroup]:
        """The parameters, by learning rate."""
        ...

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        ...

    def before_batch(self, update: Update, batch: Batch) -> None:
        """Told before each micro-batch: dropout is drawn from the counters."""
        ...

    def disabled(self) -> AbstractContextManager[None]:
        """The base model's own predictions; trainables with `masters` keep a copy only if they were asked to."""
        ...

    def for_inference(self) -> AbstractContextManager[None]:
        """Predictions without dropout."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The trainable weights by name: state, EMA and export are made of these."""
        ...

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy `tensors` into the trainable weights.

        Raises:
            ModelError: if they are others.
        """
        ...

    def after_step(self) -> None:
        """Called after each optimizer step."""
        ...

    def figures(self) -> dict[str, float | Tensor]:
        """What is worth logging after `after_step`, by its name in the log; tensors stay on their device."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the file or folder that users get; `tensors` in place of the live weights (EMA), as `tensors` gives."""
        ...


@contextmanager
def swapped_in(trainable: Trainable, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """`tensors` in place of the live weights, which wait where `tensors` are and come back to the bit."""
    kept = {name: tensor.to(tensors[name].device, copy=True) for name, tensor in trainable.tensors().items()}
    trainable.load(tensors)
    try:
        yield
    finally:
        trainable.load(kept)
