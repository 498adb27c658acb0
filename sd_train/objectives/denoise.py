"""The denoising objective: predict the noise (Ho et al. 2020), or the velocity (Salimans & Ho 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_train.device import Device
from sd_train.diffusion.losses import mean_squared_error
from sd_train.families.base import Family
from sd_train.trainables.base import Trainable
from sd_train.types import Batch


@dataclass(frozen=True)
class Prior:
    """A class that the model keeps: its own prediction before the training is the target (prior preservation)."""

    prompt: str
    weight: float


class Denoise:
    """What the family predicts, with mean squared error."""

    def __init__(self, family: Family, trainable: Trainable, device: Device, prior: Prior | None = None) -> None:
        self.family, self.trainable, self.device, self.prior = family, trainable, device, prior
        self.needs = frozenset(() if prior is None else ("reference",))
        self._learns_text = any(trainable.trains(role) for role in family.networks if role != "unet")
        self._class_rows: dict[str, Tensor] | None = None
        self._kept: list[Tensor] = []
        self._figures: dict[str, float | Tensor] = {}

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
        before = None if self.prior is None else self._before(self.prior, batch, images, noisy, timesteps)
        with self.device.autocast():
            if batch.texts is not None:
                texts = {name: move(rows) for name, rows in batch.texts.items()}
            else:
                with nullcontext() if self._learns_text else torch.no_grad():
                    texts = family.encode_texts(batch.captions)
            prediction = family.predict(noisy, timesteps, family.condition(texts, images, batch.geometry))
            now = None if self.prior is None else self._now(self.prior, batch, images, noisy, timesteps)
        mask = None if batch.mask is None else move(batch.mask)
        losses = mean_squared_error(prediction, self._target(latents, noise, timesteps), mask)
        weight = move(batch.weight)
        if self.prior is not None and before is not None and now is not None:
            moved = mean_squared_error(now, before, None) * self.prior.weight
            self._kept.append(torch.stack([(moved.detach() * weight).sum(), weight.sum()]))
            losses = losses + moved
        return losses * weight

    def _before(
        self, prior: Prior, batch: Batch, images: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor
    ) -> Tensor:
        """What the base model predicts for the class, on the same noisy latents.

        It comes before anything that gradients flow through, as the weights may be exchanged for it; and under an
        autocast of its own, which remembers what weights it has cast until it ends.
        """
        with self.trainable.disabled(), torch.no_grad(), self.device.autocast():
            if self._class_rows is None:
                # The base model does not change, so neither does this.
                self._class_rows = self.family.encode_texts([prior.prompt])
            rows = _for_each(self._class_rows, len(noisy))
            target = self.family.predict(noisy, timesteps, self.family.condition(rows, images, batch.geometry))
        return target.float()

    def _now(
        self, prior: Prior, batch: Batch, images: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor
    ) -> Tensor:
        """What the model predicts for the class as it stands."""
        rows = self.family.encode_texts([prior.prompt]) if self._learns_text else self._class_rows
        assert rows is not None
        conditioning = self.family.condition(_for_each(rows, len(noisy)), images, batch.geometry)
        return self.family.predict(noisy, timesteps, conditioning)

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
        """The update's part of the loss that keeps the class, for the curves."""
        if self._kept:
            kept, samples = self.device.sum(torch.stack(self._kept).sum(0))
            self._figures = {"loss/prior": kept / samples}
            self._kept = []

    def figures(self) -> dict[str, float | Tensor]:
        """Curves beside the loss: with a prior its part of the loss, over all samples of the last update."""
        return self._figures


def _for_each(rows: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """One text's rows, `count` times."""
    return {name: row.expand(count, *row.shape[1:]) for name, row in rows.items()}
