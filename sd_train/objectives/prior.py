"""Prior preservation without pictures: the base model's own prediction for the class is a second target.

DreamBooth (Ruiz et al. 2023) learns pictures that the base model draws of the class beside those of the subject; here
its prediction for the class prompt on the subject's noisy latents takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_train.device import Device
from sd_train.families.base import Family
from sd_train.trainables.base import Trainable
from sd_train.types import Batch


@dataclass(frozen=True)
class Prior:
    """A class that the model keeps: its own prediction before the training is the target (prior preservation)."""

    prompt: str
    weight: float


class Preservation:
    """Both predictions for the class, on one batch's noisy latents."""

    def __init__(self, prior: Prior, family: Family, trainable: Trainable, device: Device, learns_text: bool) -> None:
        self.prior, self.family, self.trainable, self.device = prior, family, trainable, device
        self._learns_text = learns_text
        self._class_rows: dict[int, dict[str, Tensor]] = {}
        """What the base model makes of the class prompt, by how many times it stands there."""
        self._noted: list[Tensor] = []

    def before(self, batch: Batch, images: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the base model predicts for the class, on the same noisy latents.

        It comes before anything that gradients flow through, as the weights may be exchanged for it; and under an
        autocast of its own, which remembers what weights it has cast until it ends.
        """
        with self.trainable.disabled(), torch.no_grad(), self.device.autocast():
            # The base model does not change, so neither does this.
            if len(noisy) not in self._class_rows:
                self._class_rows[len(noisy)] = self._encoded(len(noisy))
            rows = self._class_rows[len(noisy)]
            target = self.family.predict(noisy, timesteps, self.family.condition(rows, images, batch.geometry))
        return target.float()

    def now(self, batch: Batch, images: Mapping[str, Tensor], noisy: Tensor, timesteps: Tensor) -> Tensor:
        """What the model predicts for the class as it stands."""
        rows = self._encoded(len(noisy)) if self._learns_text else self._class_rows[len(noisy)]
        conditioning = self.family.condition(rows, images, batch.geometry)
        return self.family.predict(noisy, timesteps, conditioning)

    def _encoded(self, count: int) -> dict[str, Tensor]:
        """The class prompt, once for each sample: what dropout leaves out is a sample's own."""
        return dict(self.family.encode_texts([self.prior.prompt] * count))

    def note(self, losses: Tensor, weight: Tensor) -> None:
        """Take in [B] losses of the class and [B] weights of their samples, for the curve."""
        self._noted.append(torch.stack([(losses.detach() * weight).sum(), weight.sum()]))

    def figures(self) -> dict[str, float | Tensor]:
        """The curve of the update that ends, over all its samples; empties what was noted."""
        if not self._noted:
            return {}
        kept, samples = self.device.sum(torch.stack(self._noted).sum(0))
        self._noted = []
        return {"loss/prior": kept / samples}

    def forget(self) -> None:
        """Drop what was noted."""
        self._noted = []

