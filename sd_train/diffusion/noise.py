"""What the noise of a sample is made of beside a normal draw: offsets, pyramids, perturbations.

Everything is drawn for each sample by itself, so that batches, accumulation and processes do not matter. sd-scripts
draws strengths and the pyramid's sizes once for each batch, and divides by the standard deviation of the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sd_train.randomness import derive


@dataclass(frozen=True)
class NoiseSettings:
    """What is added to the noise; 0: nothing."""

    offset: float = 0.0
    """Standard deviation of a shift of each channel (Guttenberg 2023, "Diffusion with offset noise")."""
    offset_random: bool = False
    """Whether each sample's `offset` is times a uniform draw."""
    adaptive: float = 0.0
    """Share of the latents' own mean, without its sign, that is added to `offset`."""
    pyramid_levels: int = 0
    """Coarser and coarser noises that are added (Whitaker 2023, "Multi-resolution noise")."""
    pyramid_discount: float = 0.3
    """Weight of level i: this to the power of i."""
    perturbation: float = 0.0
    """Noise that the input has and the target does not (Ning et al. 2023)."""
    perturbation_random: bool = False


def draw_noise(
    settings: NoiseSettings, seed: int, step: int, places: Sequence[int], shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """What `combine` and `perturb` take, float32: of the samples at `places` of update number `step`.

    Returns:
        "offset" [B, C, 1, 1] and its "offset_strength" [B, 1, 1, 1], and "pyramid" and "perturbation" [B, *shape] with
        their strengths in them, as far as the settings want them.
    """
    drawn: dict[str, list[Tensor]] = {}
    if settings == NoiseSettings():
        return {}
    for place in places:
        generator = np.random.Generator(np.random.Philox(key=derive(seed, "more noise", step, place)))
        # Every draw is made whatever the others are, so that one option does not change another's.
        offset = _normal(generator, (shape[0], 1, 1))
        strengths = generator.random(2, dtype=np.float64)
        if settings.offset or settings.adaptive:
            drawn.setdefault("offset", []).append(offset)
            if settings.offset_random:
                drawn.setdefault("offset_strength", []).append(torch.full((1, 1, 1), strengths[0]))
        if settings.perturbation:
            strength = settings.perturbation * (strengths[1] if settings.perturbation_random else 1.0)
            own = np.random.Generator(np.random.Philox(key=derive(seed, "perturbation", step, place)))
            drawn.setdefault("perturbation", []).append(_normal(own, shape) * strength)
        if settings.pyramid_levels:
            own = np.random.Generator(np.random.Philox(key=derive(seed, "pyramid", step, place)))
            drawn.setdefault("pyramid", []).append(_pyramid(settings, own, shape))
    return {name: torch.stack(rows).float() for name, rows in drawn.items()}


def combine(settings: NoiseSettings, noise: Tensor, drawn: Mapping[str, Tensor], latents: Tensor) -> Tensor:
    """[B, C, h, w]: the noise that is added to `latents` and, in epsilon prediction, the target.

    The offset comes first; a pyramid's sum is divided by its own standard deviation, sample by sample.
    """
    if "offset" in drawn:
        size: Tensor | float = settings.offset
        if "offset_strength" in drawn:
            size = settings.offset * drawn["offset_strength"]
        if settings.adaptive:
            size = (size + settings.adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()).clamp(min=0.0)
        noise = noise + drawn["offset"] * size
    if "pyramid" in drawn:
        noise = noise + drawn["pyramid"]
        noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    return noise


def perturb(noise: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
    """The noise that the input gets; the target keeps `noise`."""
    return noise + drawn["perturbation"] if "perturbation" in drawn else noise


def _pyramid(settings: NoiseSettings, generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Levels 0, 1, ... of (h / r^i, w / r^i), r uniform in [2, 4) for each, enlarged; ends where a side is 1."""
    channels, height, width = shape
    total = torch.zeros(shape)
    for level in range(settings.pyramid_levels):
        ratio = (generator.random() * 2.0 + 2.0) ** level
        rows, columns = max(1, int(height / ratio)), max(1, int(width / ratio))
        coarse = _normal(generator, (channels, rows, columns))
        fine = functional.interpolate(coarse[None], size=(height, width), mode="bilinear", align_corners=False)[0]
        total += fine * settings.pyramid_discount**level
        if rows == 1 or columns == 1:
            break
    return total


def _normal(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
