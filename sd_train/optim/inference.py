"""The weights that a training gives: what a schedule-free optimizer averages, in place of what it steps from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch


class _Weights(Protocol):
    """What can be put into the state in which it is used."""

    def for_inference(self) -> AbstractContextManager[None]: ...


def has_average(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `averaged` changes the parameters: the optimizer is a schedule-free one that is training."""
    able = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    return able and any(group.get("train_mode", True) for group in optimizer.param_groups)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters as a schedule-free optimizer gives them; afterwards they are to the bit what they were.

    Nothing happens with other optimizers, and within itself.
    """
    if not has_average(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # Going there and back by their own interpolation leaves rounding errors in the weights that are trained.
    # They wait in main memory: what a GPU has left may be less than the weights.
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True)
class InferenceWeights:
    """What a training has learned, for previews, validation and files."""

    trainable: _Weights
    optimizer: torch.optim.Optimizer

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """The weights that the optimizer gives, without dropout."""
        with averaged(self.optimizer), self.trainable.for_inference():
            yield
