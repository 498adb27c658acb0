"""The forward process q(x_t | x_0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
