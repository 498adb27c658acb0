"""What every trainable offers to the loop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
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


class Trainable(Protocol):
    """Which parameters learn, and how they are saved."""

    def install(self, family: Family) -> None:
        """Put the trainable parameters into the networks of `family`."""
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
        """The base model's own predictions."""
        ...

    def for_inference(self) -> AbstractContextManager[None]:
        """Predictions without dropout."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The trainable weights by name: state, EMA and export are made of these."""
        ...

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy `tensors` into the trainable weights."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the file that users get."""
        ...
