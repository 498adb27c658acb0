"""A LoRA trained by a bare loop over PyTorch, diffusers, transformers and peft, with nothing of this project.

The step is that of diffusers' own example for text-to-image LoRA: mean squared error of the noise at random timesteps,
factors beside the queries, keys, values and outputs of the U-Net's attention, AdamW at a constant rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def train_bare(model: Path, pictures: Path, file: Path, numbers: dict[str, Any]) -> None:
    """Train on the PNG pictures of a folder, each with a caption in a `.txt` file.

    Args:
        model: folder in diffusers' layout.
        file: where the LoRA goes, in diffusers' form.
        numbers: "rank", "rate", "updates", "batch" and "seed".
    """
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    unet, vae, text_encoder, tokenizer = pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False)
    torch.manual_seed(numbers["seed"])
    rank = numbers["rank"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS))
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=numbers["rate"], betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    paths = sorted(pictures.glob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths])
    with torch.no_grad():
        encoded = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
        texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths]
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        states = text_encoder(ids)[0]
    order: list[int] = []
    for _ in range(numbers["updates"]):
        while len(order) < numbers["batch"]:
            order += torch.randperm(len(paths)).tolist()
        chosen, order = order[: numbers["batch"]], order[numbers["batch"] :]
        latents = encoded.sample()[chosen] * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(chosen),))
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, states[chosen], return_dict=False)[0]
        loss = functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(file.parent, unet_lora_layers=layers, weight_name=file.name)
