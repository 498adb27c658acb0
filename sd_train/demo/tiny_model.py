"""A tiny Stable Diffusion 1.x model with random weights: the real block topology and vocabulary, small widths."""

from __future__ import annotations

from pathlib import Path

import torch

from sd_train.families.checkpoints import published_config
from sd_train.families.sd import StableDiffusion1
from sd_train.families.tokenizer import load_clip_tokenizer
from sd_train.randomness import derive


def make_tiny_model(seed: int) -> StableDiffusion1:
    """CLIP text encoder with 49,408 tokens, VAE with factor 8, U-Net with SD 1.x's blocks; 7.6 M parameters.

    The same `seed` gives the same weights on the same torch release.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet_config = published_config("unet") | {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64}
    vae_config = published_config("vae") | {"block_out_channels": [32, 32, 32, 64]}
    text_config = published_config("text_encoder") | {
        "hidden_size": 64,
        "projection_dim": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    # The libraries initialise from torch's global generator; it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "tiny_model") % 2**63)
        unet = UNet2DConditionModel.from_config(unet_config)
        vae = AutoencoderKL.from_config(vae_config)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text_config))
        # CLIP's own initialisation is so small that every prompt would look alike to the U-Net.
        for name, parameter in text_encoder.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(parameter, std=1.0)
    return StableDiffusion1(unet, vae, text_encoder)


def save_tiny_model(path: Path, seed: int) -> None:
    """Write the tiny model to `path`: a `.safetensors` file in half precision, or a diffusers folder."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    model = make_tiny_model(seed)
    if path.suffix == ".safetensors":
        model.vae.half()
        model.to(torch.device("cpu"), torch.float16).save(path, {})
        return
    pipeline = StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=load_clip_tokenizer("<|endoftext|>"),
        unet=model.unet,
        scheduler=PNDMScheduler.from_config(published_config("scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path)
