"""The autoencoder of a model by itself, for what needs no other network of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd_train.families.base import digest_of
from sd_train.families.build import build_network, published_tensors
from sd_train.families.parts import ModelParts

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def posterior_rows(vae: AutoencoderKL, pixels: Tensor) -> dict[str, Tensor]:
    """[B, 3, height, width] in [-1, 1] -> "mean" and "logvar", [B, channels, height / 8, width / 8], float32."""
    # Kept in float32: half precision blurs what every sample is learned from, and SDXL's overflows in float16.
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}


class Autoencoder:
    """The autoencoder of `parts` on `device`, in float32."""

    def __init__(self, parts: ModelParts, device: torch.device) -> None:
        self.vae: Any = build_network(parts, "vae", torch.float32).to(device)
        self.channels: int = self.vae.config["latent_channels"]
        self.factor: int = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        """Pixels to one place of the latents, along each side."""

    def digest(self) -> str:
        """What determines the rows of `encode` beside the pixels."""
        return digest_of(published_tensors("vae", self.vae))

    def encode(self, pixels: Tensor) -> dict[str, Tensor]:
        """See `posterior_rows`."""
        return posterior_rows(self.vae, pixels)
