"""Which timestep a sample is trained at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sd_train.randomness import derive

TimestepSampling = Literal["uniform", "logit_normal", "importance"]

BINS = 20
"""Equal parts of the timesteps that `Importance` keeps a loss for; of fewer timesteps each is a part."""


@dataclass(frozen=True)
class TimestepSettings:
    """How timesteps are drawn."""

    low: int = 0
    high: int | None = None
    """Not itself drawn; None: the schedule's end."""
    sampling: TimestepSampling = "uniform"
    mean: float = 0.0
    """Of the normal draw whose logistic function says the place (Esser et al. 2024, section 3.1)."""
    std: float = 1.0

    def bounds(self, steps: int) -> tuple[int, int]:
        """First timestep, and the one after the last, of a schedule of `steps`."""
        return self.low, steps if self.high is None else min(self.high, steps)


def draw_timesteps(settings: TimestepSettings, seed: int, step: int, places: Sequence[int], steps: int) -> Tensor:
    """[B], int64: of the samples at `places` of update number `step`, each a function of its own place alone."""
    low, high = settings.bounds(steps)
    if settings.sampling != "logit_normal":
        drawn = [derive(seed, "timestep", step, place) % (high - low) for place in places]
        return torch.tensor(drawn, dtype=torch.int64) + low
    normal = [
        np.random.Generator(np.random.Philox(key=derive(seed, "timestep", step, place))).standard_normal()
        for place in places
    ]
    share = torch.sigmoid(torch.tensor(normal, dtype=torch.float64) * settings.std + settings.mean)
    return (low + (share * (high - low)).long()).clamp(max=high - 1)


def draw_shares(seed: int, step: int, places: Sequence[int]) -> Tensor:
    """[B], float32 in [0, 1): where in its distribution each sample's timestep lies, for `Importance`."""
    return torch.tensor([derive(seed, "share", step, place) % 2**24 / 2**24 for place in places], dtype=torch.float32)


class Importance:
    """Timesteps in proportion to how large their losses are, weighted back so that the mean loss stays what it was.

    Nichol & Dhariwal 2021 ("Improved denoising diffusion probabilistic models", section 3.3): p is proportional to
    sqrt(E[L^2]), here of each of `bins` equal parts of the timesteps, as a moving average over the updates. Until every
    part has been seen, all are alike.
    """

    decay = 0.95
    """Share of the average that an update leaves."""
    uniform = 0.1
    """Share of the draws that ignore the losses, so that no part is forgotten."""

    def __init__(self, settings: TimestepSettings, steps: int, device: torch.device) -> None:
        self.low, self.high = settings.bounds(steps)
        self.bins = min(BINS, self.high - self.low)
        self.moments = torch.zeros(self.bins, device=device)
        self._squares, self._counts = torch.zeros_like(self.moments), torch.zeros_like(self.moments)
        self._parts = torch.arange(self.bins, device=device)

    def probabilities(self) -> Tensor:
        """[bins]: of each part, 1 in all."""
        roots = self.moments.sqrt()
        chosen = torch.where((roots > 0).all(), roots, torch.ones_like(roots))
        return (1.0 - self.uniform) * chosen / chosen.sum() + self.uniform / self.bins

    def place(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """[B] uniform draws in [0, 1) -> [B] timesteps, int64, and [B], the weights of their losses."""
        p = self.probabilities()
        ends = p.cumsum(0)
        part = torch.searchsorted(ends, share).clamp(max=self.bins - 1)
        inside = ((share - (ends[part] - p[part])) / p[part]).clamp(0.0, 1.0)
        moved = self.low + ((part + inside) * ((self.high - self.low) / self.bins)).long()
        return moved.clamp(max=self.high - 1), 1.0 / (self.bins * p[part])

    def note(self, timesteps: Tensor, losses: Tensor, real: Tensor) -> None:
        """Take in [B] losses at [B] timesteps; `real` [B] is 0 for padding.

        Losses that are not finite are passed over: their updates are, too, and the average would never forget them.
        """
        part = ((timesteps - self.low) * self.bins // (self.high - self.low)).clamp(0, self.bins - 1)
        squares = losses.detach().float().square()
        real = real * squares.isfinite()
        # Not index_add_, whose order of adding, and so whose last bit, a GPU chooses anew each time.
        found = (part[:, None] == self._parts) * real[:, None]
        self._squares += (found * torch.where(real > 0, squares, 0.0)[:, None]).sum(0)
        self._counts += found.sum(0)

    def sums(self) -> Tensor:
        """[2, bins] of this update, to be summed over the ranks."""
        return torch.stack([self._squares, self._counts])

    def end_update(self, sums: Tensor) -> None:
        """Move the average on with the `sums` of all ranks."""
        squares, counts = sums
        mean = squares / counts.clamp(min=1.0)
        before = torch.where(self.moments > 0, self.moments, mean)
        self.moments = torch.where(counts > 0, before.lerp(mean, 1.0 - self.decay), self.moments)
        self.forget()

    def forget(self) -> None:
        """Drop what was noted since the last update."""
        self._squares.zero_()
        self._counts.zero_()

    def state(self) -> dict[str, list[float]]:
        """What a resume needs, as JSON values."""
        return {"moments": self.moments.tolist(), "bounds": [self.low, self.high]}

    def load(self, state: dict[str, list[float]]) -> None:
        """Go on from `state`; what it holds of other timesteps says nothing of these."""
        if state["bounds"] == [self.low, self.high]:
            self.moments.copy_(torch.tensor(state["moments"]))
