"""The denoising objective: predict the noise (Ho et al. 2020), or the velocity (Salimans & Ho 2022)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from sd_train.device import Device
from sd_train.diffusion.losses import mean_squared_error
from sd_train.families.base import Family
from sd_train.trainables.base import Trainable
from sd_train.types import Batch


class Denoise:
    """What the family predicts, with mean squared error."""

    needs: frozenset[str] = frozenset()

    def __init__(self, family: Family, trainable: Trainable, device: Device) -> None:
        self.family, self.device = family, device
        self._learns_text = any(trainable.trains(role) for role in family.networks if role != "unet")

    def loss(self, batch: Batch) -> Tensor:
        """[B]: each sample's loss, its weight applied."""
        family, move = self.family, self.device.move
        with self.device.autocast():
            if batch.images is None:
                assert batch.pixels is not None
                images = family.encode_images(move(batch.pixels))
            else:
                images = {name: move(rows) for name, rows in batch.images.items()}
            noise, timesteps = move(batch.noise), move(batch.timesteps)
            latents = family.draw_latents(images, move(batch.latent_noise))
            noisy = family.schedule.add_noise(latents, noise, timesteps)
            if batch.texts is not None:
                texts = {name: move(rows) for name, rows in batch.texts.items()}
            else:
                with nullcontext() if self._learns_text else torch.no_grad():
                    texts = family.encode_texts(batch.captions)
            conditioning = family.condition(texts, images, batch.geometry)
            prediction = family.predict(noisy, timesteps, conditioning)
        mask = None if batch.mask is None else move(batch.mask)
        return mean_squared_error(prediction, self._target(latents, noise, timesteps), mask) * move(batch.weight)

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser answers on average, [B, ...]."""
        match self.family.prediction:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.family.schedule.velocity(latents, noise, timesteps)
            case "sample":
                return latents

    def after_step(self) -> None:
        """Nothing is kept between updates."""
