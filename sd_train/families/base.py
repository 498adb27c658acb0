"""What every model family offers; nobody else asks which model it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

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
    cache_key: str
    """Names what the encoder makes of a picture: family, encoder weights, dtype."""

    def shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, rows, columns) of a `width` x `height` picture's latents."""
        return self.channels, height // self.factor, width // self.factor


class Family(Protocol):
    """A model of one family, loaded."""

    name: str
    networks: dict[str, nn.Module]
    """Trainable candidates by role: "unet", "text_encoder"."""
    latent: LatentSpec
    schedule: NoiseSchedule
    prediction: Literal["epsilon", "v_prediction", "sample"]
    base_version: str
    """`ss_base_model_version`, e.g. sd_v1."""
    architecture: str
    """`modelspec.architecture`, e.g. stable-diffusion-v1."""

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

    def prompt_embeddings(self, prompt: str, negative: str) -> tuple[Tensor, Tensor]:
        """Prompt and negative prompt -> [1, tokens, width] each, of equal length."""
        ...

    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules, for previews."""
        ...

    def save(self, path: Path, overrides: Mapping[str, Tensor]) -> None:
        """Write the whole model to `path`; `overrides` replace weights by their published names."""
        ...
