"""Finds updates that spoil the weights: losses or gradients that are not finite, losses that jump."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sd_train.device import Device

LAG = 4
"""Updates after which a verdict is read: by then the device has long computed it, so that nobody waits."""
REMEMBERED = 100
"""Losses that a jump is measured by."""
LEAST_REMEMBERED = 20

Seen = Sequence[tuple[Sequence[str], Tensor]]
"""The micro-batches of an update on this rank: the files of their samples, and [B] the losses of these."""


class Suspect(Exception):
    """Update number `step` (from zero) must not have been; `files` are the images that it is down to, if that can be
    told, else all that it had."""

    def __init__(self, step: int, reason: str, files: Sequence[str]) -> None:
        super().__init__(step, reason, files)
        self.step, self.reason, self.files = step, reason, list(files)


@dataclass(frozen=True)
class _Waiting:
    """An update whose verdict is not read yet."""

    step: int
    values: Tensor
    """[2]: loss, and norm of the gradients, over all ranks."""
    ready: torch.cuda.Event | None
    """When `values` can be read without waiting."""
    seen: Seen


class Watch:
    """Looks at each update's loss and gradients, all ranks at the same ones."""

    def __init__(self, device: Device, *, spike_factor: float | None, at_once: bool) -> None:
        """With `at_once` the verdict is read before the optimizer's step; otherwise `LAG` updates later."""
        self.device, self.spike_factor, self.at_once = device, spike_factor, at_once
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._waiting: deque[_Waiting] = deque()

    def look(self, step: int, loss: Tensor, norm: Tensor, seen: Seen) -> None:
        """Take in an update's `loss` and `norm` of gradients, both over all ranks.

        Raises:
            Suspect: of this update or, unless `at_once`, of one before it.
        """
        values, ready = torch.stack([loss.detach().float(), norm.detach().float()]), None
        if not self.at_once and values.is_cuda:
            # Memory that the device writes to by itself, without the host.
            kept = torch.empty(2, pin_memory=True).copy_(values, non_blocking=True)
            values, ready = kept, torch.cuda.Event()
            ready.record()
        self._waiting.append(_Waiting(step, values, ready, seen))
        while len(self._waiting) > (0 if self.at_once else LAG):
            self._judge(self._waiting.popleft())

    def settle(self) -> None:
        """Read every verdict that is out; waits for the device.

        Raises:
            Suspect: as `look`.
        """
        while self._waiting:
            self._judge(self._waiting.popleft())

    def all_good(self) -> bool:
        """Whether the verdicts that are out have nothing against their updates; asks no other rank."""
        while self._waiting:
            if self._found(self._waiting.popleft()) is not None:
                return False
        return True

    def forget(self) -> None:
        """Drop what is not read yet: those updates are undone."""
        self._waiting.clear()

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON values."""
        return {"losses": list(self._losses)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._losses = deque(map(float, state["losses"]), REMEMBERED)

    def _judge(self, waiting: _Waiting) -> None:
        if (found := self._found(waiting)) is not None:
            reason, most = found
            raise Suspect(waiting.step, reason, self._files(waiting.seen, most))

    def _found(self, waiting: _Waiting) -> tuple[str, float | None] | None:
        """What is wrong with an update, and above which loss a sample is to blame; None where nothing is."""
        if waiting.ready is not None:
            waiting.ready.synchronize()
        loss, norm = waiting.values.tolist()
        if not math.isfinite(loss):
            return f"its loss is {loss}", None
        if not math.isfinite(norm):
            return f"the norm of its gradients is {norm}", None
        if self.spike_factor is None:
            return None
        if len(self._losses) >= LEAST_REMEMBERED:
            usual = median(self._losses)
            if loss > self.spike_factor * usual:
                reason = f"its loss {loss:.4g} is above {self.spike_factor:g} times the usual {usual:.4g}"
                return reason, self.spike_factor * usual
        self._losses.append(loss)
        return None

    def _files(self, seen: Seen, most: float | None) -> list[str]:
        """The files, over all ranks, whose losses are not finite or above `most`; all of them if no loss is."""
        pairs = [(path, value) for paths, losses in seen for path, value in zip(paths, losses.tolist(), strict=True)]
        own = [path for path, value in pairs if not math.isfinite(value) or (most is not None and value > most)]
        culprits = self.device.gather(own)
        return list(dict.fromkeys(culprits or self.device.gather([path for path, _ in pairs])))
