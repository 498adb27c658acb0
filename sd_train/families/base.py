"""What every model family offers; nobody else asks which model it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.families.keys import LoraTarget
from sd_train.types import Conditioning, Geometry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


@dataclass(frozen=True)
class LatentSpec:
    """How a picture becomes latents."""

    channels: int
    factor: int
    """Pixels for each latent, along a side."""
    scale: float
    """What latents are multiplied with, so that their standard deviation is about one."""

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a `width` x `height` picture's latents."""
        return self.channels, height // self.factor, width // self.factor


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Family(Protocol):
    """A model of one family, loaded."""

    name: str
    networks: dict[str, nn.Module]
    """Trainable candidates by role: "unet", "text_encoder"."""
    schedule: NoiseSchedule
    prediction: Literal["epsilon", "v_prediction", "sample"]
    base_version: str
    """`ss_base_model_version`, e.g. sd_v1."""
    architecture: str
    """`modelspec.architecture`, e.g. stable-diffusion-v1."""
    latents_suffix: str
    """End of the names of sd-scripts' latents files, before `.npz`."""

    @property
    def latent(self) -> LatentSpec | None:
        """None where latents are vectors without a picture's shape."""
        ...

    def configure(self, clip_skip: int | None, max_token_length: int | None) -> None:
        """How captions are encoded: `--clip_skip`, `--max_token_length`."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Family:
        """Move everything to `device`; what is trained or run in every step in `dtype`."""
        ...

    def digest(self) -> str:
        """Hexadecimal digits that tell this base model from others, whatever its file."""
        ...

    def encoder_digest(self, what: Literal["images", "texts"]) -> str:
        """What determines the rows of `encode_images` or `encode_texts` beside their input: weights and settings."""
        ...

    def lora_targets(self, role: str) -> list[LoraTarget]:
        """What gets a LoRA in network `role`, under its published name."""
        ...

    def module(self, role: str, path: str) -> nn.Module:
        """The live module with the published path `path` in network `role`."""
        ...

    def checkpoint_gradients(self, role: str) -> None:
        """Compute network `role`'s activations again in the backward pass instead of keeping them."""
        ...

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, height, width] in [-1, 1] -> cacheable rows."""
        ...

    def encode_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> cacheable rows, without geometry."""
        ...

    def condition(
        self, texts: Mapping[str, Tensor], images: Mapping[str, Tensor], geometry: Sequence[Geometry]
    ) -> Conditioning:
        """What the denoiser is told."""
        ...

    def draw_latents(self, images: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """Rows of `encode_images` and a standard normal draw -> scaled latents."""
        ...

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output, of the shape of `noisy`."""
        ...

    def prompt_arguments(self, prompt: str, negative: str) -> dict[str, Tensor]:
        """What the pipeline is called with in place of a prompt and a negative prompt."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline ends with -> [B, 3, height, width] in about [-1, 1], float32."""
        ...

    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules, for previews."""
        ...

    def save(self, path: Path, overrides: Mapping[str, Tensor]) -> None:
        """Write the whole model to `path`; `overrides` replace weights by their published names."""
        ...
