"""Stable Diffusion 1.x and 2.x: one text encoder, and nothing but the caption is told."""

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


class StableDiffusion(LatentDiffusion):
    """A loaded Stable Diffusion 1.x or 2.x model.

    The states are those of the text encoder's last layer after the final layer norm. Of 2.x that is the penultimate
    layer of the OpenCLIP encoder, whose last layer no published model has in use (it has 23 layers here).
    """

    latents_suffix = "_sd"
    text_prefixes: Mapping[str, str] = MappingProxyType({"text_encoder": "lora_te"})

    def __init__(self, parts: ModelParts, dtype: torch.dtype | None = torch.float32) -> None:
        super().__init__(parts, dtype)
        # sd-scripts' `get_model_version_str_for_sd1_sd2`.
        version, v_prediction = parts.family.removeprefix("sd"), parts.prediction == "v_prediction"
        self.base_version = f"sd_v{version}" + ("_v" if v_prediction else "")
        self.architecture = "stable-diffusion-v1"
        if version == "2":
            self.architecture = "stable-diffusion-v2-768-v" if v_prediction else "stable-diffusion-v2-512"

    def _text_encoder(self, role: str, network: Any) -> TextEncoder:
        pad = PAD_TOKENS[role][self.origin.family]
        return TextEncoder(network, make_tokenizer(self.origin, role, network.config.vocab_size, pad), final_norm=True)

    def condition(
        self, texts: Mapping[str, Tensor], images: Mapping[str, Tensor], geometry: Sequence[Geometry]
    ) -> Conditioning:
        """The caption and nothing else."""
        return Conditioning(texts["states"])

    def _make_pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
