"""Which family a model belongs to; nobody else asks."""

from __future__ import annotations

import torch

from sd_train.families.base import Family
from sd_train.families.build import check_inputs
from sd_train.families.parts import ModelKind, ModelParts, ModelRequest, model_kind, read_model
from sd_train.families.specs import LatentSpec

PUBLISHED_LATENT = LatentSpec(channels=4, factor=8, scale=0.18215)
"""Of every published Stable Diffusion model; a loaded one tells its own."""


def check_model(request: ModelRequest) -> ModelKind:
    """Find out before anything is loaded what kind of model is asked for.

    Raises:
        ModelError: if there is none, or it is of an unknown kind, or cannot be trained.
    """
    kind = model_kind(request)
    check_inputs(kind.configs["unet"], kind.configs["vae"], request.source)
    return kind


def make_family(parts: ModelParts, dtype: torch.dtype | None = torch.float32) -> Family:
    """The networks of `parts`, ready to be trained.

    Args:
        parts: what was read.
        dtype: of all networks but the VAE, which is float32; None: as they are stored, until `Family.to` is called.

    Raises:
        ModelError: if something does not fit, or the model cannot be trained.
    """
    from sd_train.families.sd import StableDiffusion
    from sd_train.families.sdxl import StableDiffusionXL

    if parts.family in ("sdxl", "sdxl_refiner"):
        return StableDiffusionXL(parts, dtype)
    return StableDiffusion(parts, dtype)


def load_family(request: ModelRequest, dtype: torch.dtype | None = torch.float32) -> Family:
    """Load the model that is asked for, a folder or a file; see `make_family`.

    Raises:
        ModelError: if there is none, or it is of an unknown kind, incomplete or broken.
    """
    return make_family(read_model(request), dtype)
