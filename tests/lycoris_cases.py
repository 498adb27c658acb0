"""A model with every kind of module and few of each, for networks that change many."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from sd_train.demo.tiny_model import TinyKind, make_tiny_parts, tiny_configs
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import ModelParts
from sd_train.families.registry import make_family
from sd_train.families.saving import save_model


@cache
def small_parts(kind: TinyKind = "sd1") -> ModelParts:
    """A model of every kind of module, and of few of each."""
    configs = tiny_configs(kind)
    if kind == "sd1":
        configs["unet"] |= {
            "block_out_channels": [32, 64], "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }  # fmt: skip
        configs["text_encoder"] |= {"num_hidden_layers": 1}
    return make_tiny_parts(kind, 7, configs)


def made(parts: ModelParts) -> LatentDiffusion:
    family = make_family(parts)
    assert isinstance(family, LatentDiffusion)
    return family


def write_small(folder: Path) -> Path:
    """The model as a diffusers folder."""
    path = folder / "small"
    save_model(path, small_parts(), "diffusers", None, {})
    return path
