"""SDXL and its refiner: the caption by two text encoders (the refiner: one), pooled text, sizes and crop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sd_train.families.latent import LatentDiffusion, make_tokenizer
from sd_train.families.parts import ModelParts
from sd_train.families.published import PAD_TOKENS
from sd_train.families.text import TextEncoder
from sd_train.types import Conditioning, Geometry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

AESTHETIC_SCORE = 6.0
"""What the refiner is told of every picture, in training as well as in previews (diffusers' default)."""
NEGATIVE_AESTHETIC_SCORE = 2.5
"""What it is told beside the negative prompt."""


class StableDiffusionXL(LatentDiffusion):
    """A loaded SDXL model, its refiner, or one of the same shape (SSD-1B, Segmind-Vega, SDXL-Turbo).

    The states are those of the last layer but one of both text encoders side by side, without the final layer norm; the
    pooled text is the second encoder's (Podell et al. 2023). The refiner has the second encoder alone.
    """

    latents_suffix = "_sdxl"
    text_prefixes: Mapping[str, str] = MappingProxyType({"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"})

    def __init__(self, parts: ModelParts, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__(parts, dtype)
        self.refines = parts.family == "sdxl_refiner"
        # diffusers takes one of the refiner's original names for another module.
        self.original_lora_names = not self.refines
        part = "refiner" if self.refines else "base"
        self.base_version = f"sdxl_{part}_v1-0"
        self.architecture = f"stable-diffusion-xl-v1-{part}"

    def _text_encoder(self, role: str, network: Any) -> TextEncoder:
        pad = PAD_TOKENS[role][self.origin.family]
        tokenizer = make_tokenizer(self.origin, role, network.config.vocab_size, pad)
        return TextEncoder(network, tokenizer, final_norm=False, layer=self._layer(None))

    def _layer(self, clip_skip: int | None) -> int:
        """The last but one; 1 and 2 are the same, as in A1111's web UI and sd-scripts, which has no more of them."""
        return max(clip_skip or 2, 2)

    def condition(
        self, texts: Mapping[str, Tensor], images: Mapping[str, Tensor], geometry: Sequence[Geometry]
    ) -> Conditioning:
        """The caption and "time_ids", [B, 6], float32: heights before widths, of the file, the crop and the bucket.

        The crop is where the picture was really cut, in pixels after the resize, as SDXL was trained (Podell et al.
        2023, algorithm 1). The refiner has 5: its aesthetic score in place of the bucket's size.
        """
        states = texts["states"]
        ids = [(*known.original, *known.crop, *self._last(known.target, AESTHETIC_SCORE)) for known in geometry]
        time_ids = torch.tensor(ids, dtype=torch.float32).to(states.device, non_blocking=True)
        return Conditioning(states, texts["pooled"], {"time_ids": time_ids})

    def _last(self, target: tuple[int, int], score: float) -> tuple[float, ...]:
        return (score,) if self.refines else target

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        assert conditioning.pooled is not None
        return {"text_embeds": conditioning.pooled, "time_ids": conditioning.extra["time_ids"]}

    def prompt_arguments(self, prompt: str, negative: str, width: int, height: int) -> dict[str, Any]:
        """Both prompts, and an uncropped picture of its own size, as sd-scripts and diffusers make them."""
        size = (height, width)
        return super().prompt_arguments(prompt, negative, width, height) | {
            "original_size": size,
            "target_size": self._last(size, AESTHETIC_SCORE),
            "negative_original_size": size,
            "negative_target_size": self._last(size, NEGATIVE_AESTHETIC_SCORE),
        }

    def _make_pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=self.unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
