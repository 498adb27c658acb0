"""The same updates without anything that was made quick: diffusers' own modules, LoRA as a formula, plain clipping.

What a fast path computes is worth nothing if it is something else: figures of speed stand beside the largest
differences of the losses and of the gradients' norms from these, each update from the weights that the training had
before it. Losses agree to a few 1e-7. On random weights norms do not: against float64, either is up to some 1e-2 off.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sd_train.device import Updater
from sd_train.objectives.denoise import Denoise
from sd_train.trainables.lora import Lora
from sd_train.types import Batch


@dataclass
class _Update:
    batch: Batch
    loss: float
    weights: dict[str, Tensor]
    """Of the U-Net, or of the LoRA, before it."""
    norm: float = 0.0
    """Of the gradients, before they are clipped."""


class Recorder:
    """Keeps what the first updates of a training were made of and what it found."""

    def __init__(self, updates: int) -> None:
        self.updates: list[_Update] = []
        self.paths: dict[str, str] = {}
        """Module of the LoRA -> where in the U-Net it is; none where all weights are trained."""
        loras: list[Lora] = []
        whole, install, reduce = Denoise.loss, Lora.install, Updater.reduce

        def loss(objective: Denoise, batch: Batch) -> Tensor:
            before = None
            if len(self.updates) < updates:
                weights = loras[0].tensors() if loras else objective.family.tensors("unet")
                before = {name: tensor.clone() for name, tensor in weights.items()}
            found = whole(objective, batch)
            if before is not None:
                self.updates.append(_Update(batch, float(found.detach().mean()), before))
            return found

        def reduced(updater: Updater, *arguments: Any) -> Tensor:
            norm = reduce(updater, *arguments)
            if self.updates and not self.updates[-1].norm:
                self.updates[-1].norm = float(norm)
            return norm

        def installed(lora: Lora, family: Any) -> None:
            install(lora, family)
            loras.append(lora)
            self.paths = {target.key: target.path for target in family.lora_targets("unet")}

        for owner, name, own in ((Denoise, "loss", loss), (Lora, "install", installed), (Updater, "reduce", reduced)):
            setattr(owner, name, own)


def largest_differences(model: Path, recorder: Recorder) -> dict[str, float]:
    """Of the recorded losses and norms from those of plain updates, relative to these."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    learned = _add_factors(unet, recorder) if recorder.paths else dict(unet.named_parameters())
    differences: list[tuple[float, ...]] = []
    for update in recorder.updates:
        with torch.no_grad():
            for name, parameter in learned.items():
                parameter.copy_(update.weights[name])
        batch = update.batch
        assert batch.images is not None
        assert batch.texts is not None
        rows = batch.images
        latents = (rows["mean"] + (0.5 * rows["logvar"]).exp() * batch.latent_noise) * 0.18215
        noisy = schedule.add_noise(latents, batch.noise, batch.timesteps)
        prediction = unet(noisy, batch.timesteps, batch.texts["states"]).sample
        loss = functional.mse_loss(prediction, batch.noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned.values(), 1.0, foreach=False)
        pairs = (float(loss.detach()), update.loss), (float(norm), update.norm)
        differences.append(tuple(abs(found - plain) / plain for plain, found in pairs))
        for parameter in learned.values():
            parameter.grad = None
    losses, norms = zip(*differences, strict=True)
    return {"loss_difference": max(losses), "norm_difference": max(norms)}


def _add_factors(unet: nn.Module, recorder: Recorder) -> dict[str, nn.Parameter]:
    """W x + (alpha / rank) up(down(x)) at each of the recorded modules; the factors by name."""
    unet.requires_grad_(False)
    learned: dict[str, nn.Parameter] = {}
    for key, path in recorder.paths.items():
        layer, first = unet.get_submodule(path), recorder.updates[0].weights
        down = learned[f"{key}.lora_down.weight"] = nn.Parameter(first[f"{key}.lora_down.weight"].clone())
        up = learned[f"{key}.lora_up.weight"] = nn.Parameter(first[f"{key}.lora_up.weight"].clone())
        scale = float(first[f"{key}.alpha"]) / len(down)

        def added(
            layer: nn.Module, given: tuple[Tensor], base: Tensor, down: Tensor = down, up: Tensor = up,
            scale: float = scale,
        ) -> Tensor:  # fmt: skip
            product = functional.conv2d if isinstance(layer, nn.Conv2d) else functional.linear
            return base + scale * product(product(given[0], down), up)

        layer.register_forward_hook(added)
    return learned
