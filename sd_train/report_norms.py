"""Norms of weights and gradients, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from sd_train.trainables.base import ParamGroup


@dataclass
class Norms:
    """Measures after every n-th update; what it gives stays on the device.

    The work is one reading of the weights and one of the gradients, as for clipping.
    """

    groups: Sequence[ParamGroup]
    every_n_steps: int
    _gradients: dict[str, Tensor] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether the update after which `step` are done is measured."""
        return step % self.every_n_steps == 0

    def take_gradients(self) -> None:
        """Measure the gradients: call it when they are those of the whole update and not yet clipped."""
        found = {
            group.name: [parameter.grad for parameter in group.params.values() if parameter.grad is not None]
            for group in self.groups
        }
        self._gradients = {f"norm/gradient/{name}": _norm(tensors) for name, tensors in found.items() if tensors}

    def figures(self) -> dict[str, Tensor]:
        """Norms of the gradients as they were taken, and of the weights as they are; scalars."""
        weights = {
            f"norm/weight/{group.name}": _norm([parameter.detach() for parameter in group.params.values()])
            for group in self.groups
        }
        return {**self._gradients, **weights}


def _norm(tensors: list[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers together."""
    return nn.utils.get_total_norm(tensors)
