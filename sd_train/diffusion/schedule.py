"""The forward process q(x_t | x_0) and the draws that a training sample needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sd_train.randomness import derive

TIMESTEPS = 1000
"""Of every published Stable Diffusion model."""


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving discrete diffusion (Ho et al. 2020), by its cumulative products of alphas, [T]."""

    alphas_cumprod: Tensor

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = TIMESTEPS
    ) -> NoiseSchedule:
        """Betas that are linear in their square roots (Rombach et al. 2022): Stable Diffusion's schedule."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @property
    def steps(self) -> int:
        """Number of timesteps, T."""
        return len(self.alphas_cumprod)

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same schedule with its table on `device`."""
        return NoiseSchedule(self.alphas_cumprod.to(device))

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule shifted and scaled so that x_T is pure noise (Lin et al. 2023, algorithm 1)."""
        roots = self.alphas_cumprod.sqrt()
        first, last = roots[0], roots[-1]
        return NoiseSchedule(((roots - last) * (first / (first - last))) ** 2)

    def velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0; shapes as `add_noise` (Salimans & Ho 2022, section 4)."""
        abar = self._at(x0, timesteps)
        return abar.sqrt() * noise - (1.0 - abar).sqrt() * x0

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; [B, ...] twice, [B] -> [B, ...] (Ho et al. 2020, eq. 4)."""
        abar = self._at(x0, timesteps)
        return abar.sqrt() * x0 + (1.0 - abar).sqrt() * noise

    def _at(self, x0: Tensor, timesteps: Tensor) -> Tensor:
        """[B] -> abar of each sample, to multiply rows of `x0` with."""
        return self.alphas_cumprod[timesteps].view(-1, *[1] * (x0.dim() - 1))


@dataclass(frozen=True)
class Draws:
    """What is random about a micro-batch; every row depends on its own place in the update alone."""

    noise: Tensor
    """[B, *shape], standard normal, float32."""
    latent_noise: Tensor
    """[B, *shape], standard normal, float32."""
    timesteps: Tensor
    """[B], int64."""


def draw(seed: int, step: int, places: Sequence[int], shape: tuple[int, ...], timesteps: int) -> Draws:
    """Noise and timesteps of the samples at `places` of update number `step`.

    A sample's draws are a function of (seed, purpose, step, place) alone, so batch 4, 2 accumulated batches of 2
    and 2 processes with batch 2 see the same noise. Timesteps are uniform over [0, `timesteps`).
    """

    def normal(purpose: str) -> Tensor:
        return _normal([derive(seed, purpose, step, place) for place in places], shape)

    drawn = [derive(seed, "timestep", step, place) % timesteps for place in places]
    return Draws(normal("noise"), normal("latent"), torch.tensor(drawn, dtype=torch.int64))


def fixed_latent_noise(seed: int, keys: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """[B, *shape], standard normal, float32: the same for an image in all epochs, a function of (seed, its key)."""
    return _normal([derive(seed, "fixed latent", key) for key in keys], shape)


def _normal(streams: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    rows = np.empty((len(streams), *shape), np.float32)
    for row, key in zip(rows, streams, strict=True):
        np.random.Generator(np.random.Philox(key=key)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)
