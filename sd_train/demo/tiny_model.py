"""Tiny models of every family with random weights: the real block topology and vocabulary, small widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from sd_train.families.build import published_tensors
from sd_train.families.parts import ModelParts, Part
from sd_train.families.published import FamilyName, Prediction, published_config, scheduler_config
from sd_train.families.saving import save_model
from sd_train.families.sources import DictSource
from sd_train.randomness import derive

TinyKind = Literal["sd1", "sd2", "sd2-v", "sdxl", "refiner"]

KINDS: dict[TinyKind, tuple[FamilyName, Prediction]] = {
    "sd1": ("sd1", "epsilon"),
    "sd2": ("sd2", "epsilon"),
    "sd2-v": ("sd2", "v_prediction"),
    "sdxl": ("sdxl", "epsilon"),
    "refiner": ("sdxl_refiner", "epsilon"),
}

_UNET = {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [1, 1, 1, 1], "cross_attention_dim": 64}
_ADDED = 256
"""Numbers that each of SDXL's sizes becomes, as in the published model."""
_FIRST, _SECOND = 64, 32
"""Widths of SDXL's text encoders."""


def tiny_configs(kind: TinyKind) -> dict[str, dict[str, Any]]:
    """The configuration of each network of a tiny model, by role: the published one with small widths and depths."""
    family, prediction = KINDS[kind]
    configs = {
        "unet": published_config("unet", family, prediction) | _UNET,
        "vae": published_config("vae", family, prediction) | {"block_out_channels": [32, 32, 32, 64]},
    }
    match kind:
        case "sd1":
            # Heads are counted in 1.x, whatever the width.
            configs["unet"]["attention_head_dim"] = 8
            configs["text_encoder"] = _text("text_encoder", family, _FIRST, layers=2)
        case "sd2" | "sd2-v":
            configs["text_encoder"] = _text("text_encoder", family, _FIRST, layers=3)
        case "sdxl":
            configs["unet"] |= {
                "block_out_channels": [32, 64, 64],
                "attention_head_dim": [1, 1, 1],
                "transformer_layers_per_block": [1, 1, 2],
                "cross_attention_dim": _FIRST + _SECOND,
                "projection_class_embeddings_input_dim": 6 * _ADDED + _SECOND,
            }
            configs["text_encoder"] = _text("text_encoder", family, _FIRST, layers=3)
            configs["text_encoder_2"] = _text("text_encoder_2", family, _SECOND, layers=3)
        case "refiner":
            configs["unet"] |= {
                "transformer_layers_per_block": 2,
                "cross_attention_dim": _SECOND,
                "projection_class_embeddings_input_dim": 5 * _ADDED + _SECOND,
            }
            configs["text_encoder_2"] = _text("text_encoder_2", family, _SECOND, layers=3)
    return configs


def _text(role: str, family: FamilyName, width: int, layers: int) -> dict[str, Any]:
    return published_config(role, family) | {
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
    }


def make_tiny_parts(
    kind: TinyKind, seed: int, configs: dict[str, dict[str, Any]] | None = None, zero_terminal_snr: bool = False
) -> ModelParts:
    """A tiny model, float32: CLIP text encoders with 49,408 tokens, VAE with factor 8, U-Net with the family's blocks.

    The same `seed` gives the same weights on the same torch release; `configs` None are `tiny_configs`.
    """
    family, prediction = KINDS[kind]
    parts: dict[str, Part] = {}
    # The libraries initialise from torch's global generator; it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "tiny_model") % 2**63)
        for role, config in (configs or tiny_configs(kind)).items():
            parts[role] = Part(config, DictSource(published_tensors(role, _random(role, config))))
    return ModelParts(
        family=family,
        parts=parts,
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
        scheduler=scheduler_config(family, prediction, zero_terminal_snr),
        form="diffusers",
        origin=f"tiny {kind} model",
    )


def _random(role: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network: Any
    if role == "unet":
        network = UNet2DConditionModel.from_config(config)
    elif role == "vae":
        network = AutoencoderKL.from_config(config)
    else:
        kind: Any = CLIPTextModelWithProjection if role == "text_encoder_2" else CLIPTextModel
        network = kind(CLIPTextConfig(**config))
        # CLIP's own initialisation is so small that every prompt would look alike to the U-Net.
        for name, parameter in network.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=1.0)
    made: torch.nn.Module = network.requires_grad_(False)
    return made


def save_tiny_model(path: Path, seed: int, kind: TinyKind = "sd1") -> None:
    """Write a tiny model to `path`: a `.safetensors` file in half precision, or a diffusers folder in float32."""
    parts = make_tiny_parts(kind, seed)
    if path.suffix == ".safetensors":
        save_model(path, parts, "safetensors", torch.float16, {})
    else:
        save_model(path, parts, "diffusers_safetensors", None, {})
