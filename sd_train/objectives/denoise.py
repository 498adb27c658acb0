"""The denoising objective: predict the noise (Ho et al. 2020), or the velocity (Salimans & Ho 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_train.device import Device
from sd_train.diffusion.losses import LossSettings, distance, huber_thresholds, sample_mean
from sd_train.diffusion.noise import NoiseSettings, combine, perturb
from sd_train.diffusion.timesteps import Importance, TimestepSettings
from sd_train.diffusion.weights import WeightSettings, loss_weights
from sd_train.families.base import Family
from sd_train.objectives.prior import Preservation, Prior
from sd_train.trainables.base import Trainable
from sd_train.types import Batch, Conditioning


@dataclass(frozen=True)
class DenoiseSettings:
    """How far a prediction is from its target, and what that counts."""

    noise: NoiseSettings = field(default_factory=NoiseSettings)
    timesteps: TimestepSettings = field(default_factory=TimestepSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    dream: float | None = None
    """Exponent p of DREAM; None: without it."""
    prior: Prior | None = None


@dataclass
class _Noisy:
    """A batch's latents with noise."""

    images: Mapping[str, Tensor]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    noisy: Tensor
    share: Tensor | None = None
    """[B]: what the losses count for having been drawn more or less often."""


class Denoise:
    """What the family predicts; the loss of a sample does not depend on what it is batched with."""

    def __init__(
        self, family: Family, trainable: Trainable, device: Device, settings: DenoiseSettings | None = None
    ) -> None:
        self.family, self.device, self.settings = family, device, settings or DenoiseSettings()
        self._learns_text = any(trainable.trains(role) for role in family.networks if role != "unet")
        chosen, schedule = self.settings, family.schedule
        self.needs = frozenset(() if chosen.prior is None else ("reference",))
        self._prior = (
            None if chosen.prior is None
            else Preservation(chosen.prior, family, trainable, device, self._learns_text)
        )  # fmt: skip
        # Tables over the timesteps, so that nothing is decided inside a step.
        self._weights = loss_weights(chosen.weights, schedule, family.prediction) if chosen.weights.any else None
        bent = chosen.loss.kind in ("huber", "smooth_l1")
        self._thresholds = huber_thresholds(chosen.loss, schedule) if bent else None
        self.importance = (
            Importance(chosen.timesteps, schedule.steps, device.device)
            if chosen.timesteps.sampling == "importance" else None
        )  # fmt: skip
        self._figures: dict[str, float | Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        """[B]: each sample's loss, its weight applied."""
        with self.device.autocast():
            drawn = self._noised(batch)
        before = None
        if self._prior is not None:
            before = self._prior.before(batch, drawn.images, drawn.noisy, drawn.timesteps)
        now = None
        with self.device.autocast():
            conditioning = self._conditioning(batch, drawn.images)
        noisy, noise = drawn.noisy, drawn.noise
        if self.settings.dream is not None:
            noisy, noise = self._dream(drawn, conditioning, self.settings.dream)
        with self.device.autocast():
            prediction = self.family.predict(noisy, drawn.timesteps, conditioning)
            if self._prior is not None:
                now = self._prior.now(batch, drawn.images, drawn.noisy, drawn.timesteps)
        mask = None if batch.mask is None else self.device.move(batch.mask)
        losses = self._distance(prediction, self._target(drawn.latents, noise, drawn.timesteps), drawn.timesteps, mask)
        weight = self.device.move(batch.weight)
        if self._prior is not None and before is not None and now is not None:
            kept = self._distance(now, before, drawn.timesteps, None) * self._prior.prior.weight
            self._prior.note(kept, weight)
            losses = losses + kept
        if self._weights is not None:
            losses = losses * self._weights[drawn.timesteps]
        if self.importance is not None and drawn.share is not None:
            # What the timestep contributes, its weight applied; what a sample counts is another matter.
            self.importance.note(drawn.timesteps, losses, (weight > 0).float())
            losses = losses * drawn.share
        return losses * weight

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """[B]: each sample's plain squared error at the batch's own noise and timesteps, without weights."""
        move = self.device.move
        with self.device.autocast():
            images = self._images(batch)
            noise, timesteps = move(batch.noise), move(batch.timesteps)
            latents = self.family.draw_latents(images, move(batch.latent_noise))
            noisy = self.family.schedule.add_noise(latents, noise, timesteps)
            prediction = self.family.predict(noisy, timesteps, self._conditioning(batch, images))
        mask = None if batch.mask is None else move(batch.mask)
        return sample_mean(distance(prediction, self._target(latents, noise, timesteps)), mask)

    def _images(self, batch: Batch) -> Mapping[str, Tensor]:
        """What `Family.encode_images` gives of the batch's pictures."""
        if batch.images is None:
            assert batch.pixels is not None
            return self.family.encode_images(self.device.move(batch.pixels))
        return {name: self.device.move(rows) for name, rows in batch.images.items()}

    def _conditioning(self, batch: Batch, images: Mapping[str, Tensor]) -> Conditioning:
        if batch.texts is not None:
            texts = {name: self.device.move(rows) for name, rows in batch.texts.items()}
        else:
            with nullcontext() if self._learns_text else torch.no_grad():
                texts = self.family.encode_texts(batch.captions)
        return self.family.condition(texts, images, batch.geometry)

    def _noised(self, batch: Batch) -> _Noisy:
        move, images = self.device.move, self._images(batch)
        more = {name: move(rows) for name, rows in batch.more_noise.items()}
        latents = self.family.draw_latents(images, move(batch.latent_noise))
        noise = combine(self.settings.noise, move(batch.noise), more, latents)
        timesteps, share = move(batch.timesteps), None
        if self.importance is not None:
            timesteps, share = self.importance.place(more["share"])
        noisy = self.family.schedule.add_noise(latents, perturb(noise, more), timesteps)
        return _Noisy(images, latents, noise, timesteps, noisy, share)

    def _dream(self, drawn: _Noisy, conditioning: Conditioning, exponent: float) -> tuple[Tensor, Tensor]:
        """Noisy latents and noise with a part of the model's own error in them (Zhou et al. 2024, "DREAM", eq. 8).

        The autocast is its own: one remembers what weights it has cast, in earlier versions of PyTorch also those
        that were cast here, without a way for gradients.
        """
        with torch.no_grad(), self.device.autocast():
            prediction = self.family.predict(drawn.noisy, drawn.timesteps, conditioning).float()
        abar = self.family.schedule.alphas_cumprod[drawn.timesteps].view(-1, *[1] * (drawn.noisy.dim() - 1))
        signal, noise = abar.sqrt(), (1.0 - abar).sqrt()
        match self.family.prediction:
            case "epsilon":
                estimate = prediction
            case "v_prediction":
                estimate = signal * prediction + noise * drawn.noisy
            case "sample":
                estimate = (drawn.noisy - signal * prediction) / noise
        change = noise**exponent * (drawn.noise - estimate)
        return drawn.noisy + noise * change, drawn.noise + change

    def _distance(self, prediction: Tensor, target: Tensor, timesteps: Tensor, mask: Tensor | None) -> Tensor:
        """[B]: of the loss that was chosen."""
        threshold = None if self._thresholds is None else self._thresholds[timesteps]
        return sample_mean(distance(prediction, target, self.settings.loss.kind, threshold), mask)

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
        """What the update's samples add to statistics and curves."""
        if self.importance is not None:
            self.importance.end_update(self.device.sum(self.importance.sums()))
        if self._prior is not None:
            self._figures = self._prior.figures()

    def forget(self) -> None:
        """Drop what the losses since the last `after_step` add to statistics and curves."""
        if self.importance is not None:
            self.importance.forget()
        if self._prior is not None:
            self._prior.forget()

    def figures(self) -> dict[str, float | Tensor]:
        """Curves beside the loss: with a prior its part of the loss, over all samples of the last update."""
        return self._figures
