"""What is random about a training sample; every draw is a function of (seed, purpose, update, place) alone.

So batch 4, 2 accumulated batches of 2 and 2 processes with batch 2 see the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sd_train.diffusion.noise import NoiseSettings, draw_noise
from sd_train.diffusion.schedule import TIMESTEPS
from sd_train.diffusion.timesteps import TimestepSettings, draw_shares, draw_timesteps
from sd_train.randomness import derive


@dataclass(frozen=True)
class DrawSettings:
    """What is drawn for a sample."""

    seed: int
    steps: int = TIMESTEPS
    """Of the noise schedule."""
    noise: NoiseSettings = field(default_factory=NoiseSettings)
    timesteps: TimestepSettings = field(default_factory=TimestepSettings)


@dataclass(frozen=True)
class Draws:
    """What is random about a micro-batch; every row depends on its own place in the update alone."""

    noise: Tensor
    """[B, *shape], standard normal, float32."""
    latent_noise: Tensor
    """[B, *shape], standard normal, float32."""
    timesteps: Tensor
    """[B], int64."""
    more: dict[str, Tensor] = field(default_factory=dict)
    """What `noise.combine` and `noise.perturb` take, and "share" [B] for `timesteps.Importance`, where it is wanted."""


def draw(settings: DrawSettings, step: int, places: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """Noise and timesteps of the samples at `places` of update number `step`, for latents of `shape`."""
    seed = settings.seed

    def normal(purpose: str) -> Tensor:
        return normal_rows([derive(seed, purpose, step, place) for place in places], shape)

    more = draw_noise(settings.noise, seed, step, places, shape)
    if settings.timesteps.sampling == "importance":
        more["share"] = draw_shares(seed, step, places)
    drawn = draw_timesteps(settings.timesteps, seed, step, places, settings.steps)
    return Draws(normal("noise"), normal("latent"), drawn, more)


def fixed_latent_noise(seed: int, keys: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    """[B, *shape], standard normal, float32: the same for an image in all epochs, a function of (seed, its key)."""
    return normal_rows([derive(seed, "fixed latent", key) for key in keys], shape)


def normal_rows(streams: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """[B, *shape], standard normal, float32: a row for each number of `streams`."""
    rows = np.empty((len(streams), *shape), np.float32)
    for row, key in zip(rows, streams, strict=True):
        np.random.Generator(np.random.Philox(key=key)).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)
