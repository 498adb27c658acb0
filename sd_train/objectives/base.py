"""What every objective offers to the loop."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sd_train.types import Batch


class Objective(Protocol):
    """A batch becomes a loss for each sample."""

    needs: frozenset[str]
    """What must be built for it: "reference", "teacher", "ema_target"."""

    def loss(self, batch: Batch) -> Tensor:
        """[B]: each sample's loss, its weight applied."""
        ...

    def after_step(self) -> None:
        """Called after each optimizer step."""
        ...

    def forget(self) -> None:
        """Drop what the losses since the last `after_step` have left: their update is not made, or made anew."""
        ...

    def figures(self) -> dict[str, float | Tensor]:
        """What is worth logging of the last update beside the loss, by the curves' full names."""
        ...
