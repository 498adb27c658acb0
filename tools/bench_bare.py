"""One training step after another as diffusers' examples take it, with nothing of this project.

Restated from what `train_text_to_image.py` and `train_text_to_image_lora.py` do at each step: pictures decoded and
captions tokenised by a data loader, encoded by the VAE and the text encoder, noise at random timesteps, mean squared
error, `accumulate`, the loss gathered and read, gradients clipped, AdamW as it comes, the rate's schedule, the bar.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
SIZE = 64


class _Pictures(Dataset[dict[str, Tensor]]):
    """Each picture `repeats` times: scaled, cut in the middle, sometimes mirrored; its caption's tokens."""

    def __init__(self, folder: Path, tokenizer: Any, repeats: int) -> None:
        self._paths = sorted(folder.glob("*.jpg")) * repeats
        texts = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in self._paths]
        chosen = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        self._ids = tokenizer(texts, **chosen).input_ids

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        image = Image.open(self._paths[place]).convert("RGB")
        scale = SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        image = image.crop((left, top, left + SIZE, top + SIZE))
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        return {"pixels": pixels, "ids": self._ids[place]}


def bare_marks(model: Path, pictures: Path, *, lora: bool, ema: bool, batch: int, steps: int) -> list[float]:
    """Train all weights of the U-Net, or a LoRA of rank 4; CPU seconds of the process after each of `steps` updates.

    Args:
        model: folder in diffusers' layout.
        pictures: folder of JPEG files, each with a caption in a `.txt` file.
        ema: whether an average of the weights is kept; not with a LoRA.
    """
    accelerator = Accelerator(cpu=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    for network in (unet, vae, text_encoder):
        network.requires_grad_(False)
    if lora:
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=TARGETS))
    else:
        unet.requires_grad_(True)
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    average = EMAModel(learned, model_cls=type(unet), model_config=unet.config) if ema else None
    optimizer = torch.optim.AdamW(learned, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    repeats = steps * batch // len(list(pictures.glob("*.jpg"))) + 1
    loader = DataLoader(_Pictures(pictures, pipeline.tokenizer, repeats), batch, shuffle=True, num_workers=0)
    rates = get_scheduler("constant", optimizer, num_warmup_steps=0, num_training_steps=steps)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    marks: list[float] = []
    bar = tqdm(range(steps), file=sys.stderr)
    for rows in loader:
        with accelerator.accumulate(unet):
            latents = vae.encode(rows["pixels"]).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = schedule.add_noise(latents, noise, timesteps.long())
            states = text_encoder(rows["ids"], return_dict=False)[0]
            prediction = unet(noisy, timesteps, states, return_dict=False)[0]
            loss = functional.mse_loss(prediction.float(), noise.float(), reduction="mean")
            read = accelerator.gather(loss.repeat(batch)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        if average is not None:
            average.step(learned)
        bar.update(1)
        accelerator.log({"train_loss": read}, step=len(marks))
        bar.set_postfix(step_loss=loss.detach().item(), lr=rates.get_last_lr()[0])
        marks.append(time.process_time())
        if len(marks) == steps:
            break
    return marks
