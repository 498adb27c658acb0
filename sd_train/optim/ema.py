"""A moving average of what is trained (Polyak & Juditsky 1992), with the warm-up that diffusers' `EMAModel` has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from sd_train.errors import ModelError

_BLOCK = 2**26
"""Numbers that are taken in at a time: what is on its way to another device never takes more memory."""


class Ema:
    """The average of the tensors that `read` gives; it starts as what they are when it is made.

    Averages are float32; what is no floating point number is kept as it is. The tensors belong to nobody else: whoever
    wants to compute with the average puts `tensors` in the weights' place.
    """

    def __init__(self, read: Callable[[], Mapping[str, Tensor]], decay: float, device: torch.device | None) -> None:
        """
        Args:
            read: the live weights by name.
            decay: share of the average that one update leaves, once it is warm.
            device: where the average is kept; None: beside the weights.
        """
        self.read, self.decay = read, decay
        self.updates = 0
        """That the average has taken in, over all runs that kept it."""
        self.tensors = {
            name: tensor.detach().to(device or tensor.device, _dtype(tensor), copy=True)
            for name, tensor in read().items()
        }

    def factor(self, number: int) -> float:
        """The share that update `number` (from 1) leaves: nothing of where it began, then (1 + n) / (10 + n) with
        n = `number` - 1, up to the decay."""
        return min(self.decay, number / (9 + number)) if number > 1 else 0.0

    def update(self) -> None:
        """Take in the weights as they stand.

        An update that fp16 skipped counts too, as in diffusers: the average moves towards weights that stayed.
        """
        self.updates += 1
        taken = 1.0 - self.factor(self.updates)
        for averages, weights in self._blocks():
            moved = [
                weight.detach().to(average.device, average.dtype, non_blocking=weight.is_cuda)
                for average, weight in zip(averages, weights, strict=True)
            ]
            if weights[0].is_cuda and not averages[0].is_cuda:
                # Such a copy is read by the host, which does not wait for it by itself.
                torch.cuda.current_stream(weights[0].device).synchronize()
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, moved, taken)
            else:
                torch._foreach_copy_(averages, moved)

    def _blocks(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Averages and their weights, alike in devices and kind, some at a time."""
        alike: dict[object, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, weight in self.read().items():
            average = self.tensors[name]
            alike[average.device, weight.device, average.is_floating_point()].append((average, weight))
        for pairs in alike.values():
            start, size = 0, 0
            for place, (average, _) in enumerate(pairs):
                size += average.numel()
                if size >= _BLOCK or place == len(pairs) - 1:
                    block = pairs[start : place + 1]
                    yield [average for average, _ in block], [weight for _, weight in block]
                    start, size = place + 1, 0

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors`.

        Raises:
            ModelError: if they are others than the average has.
        """
        if tensors.keys() != self.tensors.keys():
            raise ModelError("the saved average is of other weights than this run trains")
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    def state(self) -> dict[str, int]:
        """What a resume needs beside the tensors."""
        return {"updates": self.updates}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state`."""
        self.updates = int(state["updates"])


def _dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype
