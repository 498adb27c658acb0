"""The VAE of the base model: eight times smaller, four channels, trained from scratch on drawn pictures.

The decoder learns from latents with some noise, as a U-Net's are never exact. In between, the latents are given mean 0
and the spread that SD 1.x's scaling factor expects, folded into the two 1x1 convolutions, so that nothing about the
scaling needs to be noted anywhere.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from shapes_world import draw, random_blobs, random_scene

from sd_train.families.published import published_config

CONFIG: dict[str, Any] = {"block_out_channels": [16, 32, 64, 64], "layers_per_block": 1, "norm_num_groups": 8}
STEPS = 5_000
DECODER_STEPS = 2_500
BATCH = 8
RATE = 1.5e-3
LATENT_NOISE = 0.03
"""Of the latents' spread: what the decoder must bear."""


def make_vae(seed: int) -> AutoencoderKL:
    """A VAE with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: AutoencoderKL = AutoencoderKL.from_config(published_config("vae", "sd1", "epsilon") | CONFIG)
    return made


def pictures(seed: int, count: int, blobs: float = 0.15) -> torch.Tensor:
    """`count` drawn pictures, 3 x 64 x 64 in [-1, 1]; `blobs` of them show anything."""
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(count):
        one = int(rng.integers(2**62))
        drawn.append(random_blobs(one) if rng.random() < blobs else draw(random_scene(rng), one))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Optimizers:
    """Muon for the weights of layers, AdamW for their biases and norms; one rate for both.

    Muon takes matrices, so it is given a convolution's weight as one, the inputs and the kernel in its rows (Jordan et
    al. 2024). After equal steps the loss was about that which AdamW alone had after twice as many.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        self.matrices = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in self.weights]
        others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
        self.each: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.matrices, RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, RATE, betas=(0.9, 0.99), weight_decay=0.0),
        ]

    def step(self, rate: float) -> None:
        """An update with the gradients that the network has."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            # The matrix shares the weight's memory.
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def train_vae(path: Path, seed: int, threads: int) -> AutoencoderKL:
    """Train a VAE and write its weights to `path`: encoder and decoder together, then the decoder for their latents.

    What the first part has made is kept beside `path`, so that a run stopped in the second goes on from there.
    """
    torch.set_num_threads(threads)
    vae, first = make_vae(seed), path.with_suffix(".first")
    if first.exists():
        vae.load_state_dict(load_file(first))
    else:
        _train(vae, STEPS, seed, decoder_only=False)
        calibrate(vae, seed)
        _save(vae, first)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _train(vae, DECODER_STEPS, seed + 1, decoder_only=True)
    _save(vae, path)
    return vae


def _save(vae: AutoencoderKL, path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, path)


def _train(vae: AutoencoderKL, steps: int, seed: int, decoder_only: bool) -> None:
    optimizers = Optimizers(vae)
    started, shown = time.monotonic(), 0.0
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        batch = pictures(seed * 1_000_003 + step, BATCH)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                latents = vae.encode(batch).latent_dist.mean.float()
            spread = latents.std(dim=(0, 2, 3), keepdim=True)
            noisy = latents + LATENT_NOISE * spread.detach() * torch.randn_like(latents)
            decoded = vae.decode(noisy).sample.float()
        loss = difference(decoded, batch)
        if not decoder_only:
            # An even spread keeps each of the four channels in use.
            loss = loss + 0.05 * (latents.mean(dim=(0, 2, 3)).square().mean() + (spread - 1).square().mean())
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimizers.step(RATE * _one_cycle(step / steps))
        shown += float(loss.detach())
        if (step + 1) % 100 == 0:
            rate = (time.monotonic() - started) / (step + 1)
            part = "decoder" if decoder_only else "VAE"
            print(f"{part}: step {step + 1}/{steps}: loss {shown / 100:.4f}, {rate:.3f} s a step", flush=True)
            shown = 0.0


def difference(decoded: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """How far decoded pictures are from the drawn ones, mean over pixels: L1, squares, edges and colours of areas.

    What differs from a picture's commonest colour counts four times: shapes are a tenth of the pixels, and all of what
    a caption tells.
    """
    error = decoded - batch
    usual = batch.flatten(2).median(dim=2).values[:, :, None, None]
    shape = ((batch - usual).abs().amax(dim=1, keepdim=True) > 0.25).float()
    weight = 1 + 3 * shape
    weight = weight / weight.mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    areas = functional.avg_pool2d(error * shape, 4).abs().mean()
    return ((error.abs() + 2 * error.square()) * weight).mean() + 0.5 * edges + 2 * areas


def _one_cycle(done: float) -> float:
    """A rise over the first 5%, then a cosine to nothing."""
    return done / 0.05 if done < 0.05 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.05) / 0.95)


@torch.no_grad()
def calibrate(vae: AutoencoderKL, seed: int) -> None:
    """Give the latents mean 0 and spread 1 / scaling factor, by channel, and a posterior as narrow as SD 1.x's."""
    latents = vae.encode(pictures(seed + 77, 512, blobs=0.0)).latent_dist.mean
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    factor = 1 / (vae.config.scaling_factor * spread)
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] *= factor[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) * factor
    quant.weight[channels:] = 0
    # The noise that the decoder was trained with, halved.
    quant.bias[channels:] = 2 * math.log(LATENT_NOISE / 2 / vae.config.scaling_factor)
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
    post.weight /= factor[None, :, None, None]


def load_vae(path: Path) -> AutoencoderKL:
    """The VAE that `train_vae` wrote."""
    vae = make_vae(0)
    vae.load_state_dict(load_file(path))
    return vae
