"""Tiny real models that tests share; each is written once a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sd_train.demo.tiny_model import save_tiny_model

SEED = 7


def write_file(folder: Path) -> Path:
    """The tiny model as one `.safetensors` in half precision."""
    path = folder / "tiny.safetensors"
    save_tiny_model(path, SEED)
    return path


def write_folder(folder: Path) -> Path:
    """The tiny model as the folder that diffusers' `save_pretrained` writes, in float32."""
    path = folder / "tiny_folder"
    save_tiny_model(path, SEED)
    return path


def write_ckpt(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A pickled checkpoint as Stable Diffusion's authors published them."""
    torch.save({"state_dict": tensors, "global_step": 840000}, path)
    return path
