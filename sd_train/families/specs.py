"""Facts about a model that need none of its networks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LatentSpec:
    """How a picture becomes latents."""

    channels: int
    factor: int
    """Pixels for each latent, along a side."""
    scale: float
    """What latents are multiplied with, so that their standard deviation is about one."""

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a `width` x `height` picture's latents."""
        return self.channels, height // self.factor, width // self.factor
