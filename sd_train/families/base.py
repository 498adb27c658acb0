"""What every model family offers; nobody else asks which model it is."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.families.keys import LoraTarget
from sd_train.families.specs import LatentSpec
from sd_train.families.text import TextEncoder, TextOptions
from sd_train.types import Conditioning, Geometry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

    from sd_train.families.parts import ModelParts


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over every tensor's name, shape and values (as float32), as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Family(Protocol):
    """A model of one family, loaded."""

    name: str
    networks: dict[str, nn.Module]
    """Trainable candidates by role: "unet", "text_encoder", "text_encoder_2"."""
    text_encoders: dict[str, TextEncoder]
    """By role, with their tokenizers; the networks are those of `networks`."""
    schedule: NoiseSchedule
    prediction: Literal["epsilon", "v_prediction", "sample"]
    zero_terminal_snr: bool
    """Whether the schedule ends in pure noise (Lin et al. 2023)."""
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

    def configure(self, options: TextOptions) -> None:
        """How captions are encoded from now on."""
        ...

    def end_in_noise(self) -> None:
        """Train, draw and save with zero terminal SNR from now on (Lin et al. 2023)."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype, masters: Collection[str] = ()) -> Family:
        """Move everything to `device`; what runs in every step in `dtype`, but the networks `masters` in float32."""
        ...

    def tensors(self, role: str) -> dict[str, Tensor]:
        """The live weights of network `role` or "vae" under their published names."""
        ...

    def digest(self) -> str:
        """Hexadecimal digits that tell this base model from others, whatever its file."""
        ...

    def encoder_digest(self, what: Literal["images", "texts"]) -> str:
        """What determines the rows of `encode_images` or `encode_texts` beside their input: weights and settings."""
        ...

    def lora_targets(self, role: str, convolutions: bool = False) -> list[LoraTarget]:
        """What gets a LoRA in network `role`, under its published name; `convolutions`: as with `conv_dim`."""
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

    def prompt_arguments(self, prompt: str, negative: str, width: int, height: int) -> dict[str, Any]:
        """What the pipeline is called with in place of a prompt and a negative prompt, for a picture of that size."""
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline ends with -> [B, 3, height, width] in about [-1, 1], float32."""
        ...

    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules, for previews."""
        ...

    def parts(self) -> ModelParts:
        """The live networks as a model that can be saved, under published names."""
        ...
