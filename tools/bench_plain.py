"""The same updates without anything that was made quick: diffusers' own modules, LoRA as a formula, a plain AdamW.

What a fast path computes is worth nothing if it is something else: every figure of speed stands beside the largest
difference of its losses from these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from sd_train.objectives.denoise import Denoise
from sd_train.trainables.lora import Lora
from sd_train.types import Batch

EPSILON = 1e-4
"""AdamW's, in both: with the usual 1e-8 a gradient that is next to nothing moves a weight by the full rate in the
direction of its rounding error, and after some updates the losses tell of nothing else."""


class Recorder:
    """Keeps the batches of the first updates, the losses that the training found, and a LoRA's first factors."""

    def __init__(self, updates: int) -> None:
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.factors: dict[str, Tensor] | None = None
        self.paths: dict[str, str] = {}
        whole, install = Denoise.loss, Lora.install

        def loss(objective: Denoise, batch: Batch) -> Tensor:
            found = whole(objective, batch)
            if len(self.batches) < updates:
                self.batches.append(batch)
                self.losses.append(float(found.detach().mean()))
            return found

        def installed(lora: Lora, family: Any) -> None:
            install(lora, family)
            self.factors = {name: tensor.clone() for name, tensor in lora.tensors().items()}
            self.paths = {target.key: target.path for target in family.lora_targets("unet")}

        Denoise.loss = loss  # type: ignore[method-assign]
        Lora.install = installed  # type: ignore[method-assign]


def largest_difference(model: Path, recorder: Recorder) -> float:
    """Of the recorded losses from those of plain updates on the same batches, relative to these."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    unet.requires_grad_(recorder.factors is None)
    learned = [*unet.parameters()] if recorder.factors is None else _add_factors(unet, recorder)
    optimizer = torch.optim.AdamW(learned, lr=1e-4, eps=EPSILON, foreach=False, fused=False)
    differences: list[float] = []
    for batch, expected in zip(recorder.batches, recorder.losses, strict=True):
        assert batch.images is not None and batch.texts is not None
        rows = batch.images
        latents = (rows["mean"] + (0.5 * rows["logvar"]).exp() * batch.latent_noise) * 0.18215
        noisy = schedule.add_noise(latents, batch.noise, batch.timesteps)
        prediction = unet(noisy, batch.timesteps, batch.texts["states"]).sample
        loss = functional.mse_loss(prediction, batch.noise)
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        differences.append(abs(float(loss.detach()) - expected) / float(loss.detach()))
    return max(differences)


def _add_factors(unet: nn.Module, recorder: Recorder) -> list[nn.Parameter]:
    """W x + (alpha / rank) up(down(x)) at each of the recorded modules."""
    assert recorder.factors is not None
    learned: list[nn.Parameter] = []
    for key, path in recorder.paths.items():
        layer = unet.get_submodule(path)
        down = nn.Parameter(recorder.factors[f"{key}.lora_down.weight"])
        up = nn.Parameter(recorder.factors[f"{key}.lora_up.weight"])
        scale = float(recorder.factors[f"{key}.alpha"]) / len(down)

        def added(
            layer: nn.Module, given: tuple[Tensor], base: Tensor, down: Tensor = down, up: Tensor = up,
            scale: float = scale,
        ) -> Tensor:  # fmt: skip
            product = functional.conv2d if isinstance(layer, nn.Conv2d) else functional.linear
            return base + scale * product(product(given[0], down), up)

        layer.register_forward_hook(added)
        learned += [down, up]
    return learned
