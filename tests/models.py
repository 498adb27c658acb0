"""Tiny real models that tests share; each is written once a run."""

from __future__ import annotations

import copy
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.demo.tiny_model import make_tiny_model, save_tiny_model
from sd_train.families.checkpoints import join_checkpoint, unet_shape_of
from sd_train.families.keys import UNetShape
from sd_train.families.sd import StableDiffusion1

SEED = 7
DATA = Path(__file__).parent / "data"


def golden(name: str) -> Any:
    """A table of tests/data, plain or compressed."""
    path = DATA / name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


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


def write_ckpt(path: Path, tensors: dict[str, Tensor], *, zipped: bool = True) -> Path:
    """A pickled checkpoint as Stable Diffusion's authors published them; `zipped`: since torch 1.6."""
    torch.save(
        {"state_dict": tensors, "global_step": 840000, "epoch": 3}, path, _use_new_zipfile_serialization=zipped
    )
    return path


@cache
def _tiny() -> StableDiffusion1:
    return make_tiny_model(SEED)


def fresh_tiny() -> StableDiffusion1:
    """The weights of `write_folder`, in a model of the caller's own."""
    model = _tiny()
    return StableDiffusion1(*(copy.deepcopy(part) for part in (model.unet, model.vae, model.text_encoder)))


def original_tensors() -> dict[str, Tensor]:
    """The tiny model under the original checkpoint's names, float32; a table of the caller's own."""
    model = _tiny()
    parts = {role: model.tensors(role) for role in ("unet", "vae", "text_encoder")}
    shape: UNetShape = unet_shape_of(model.unet.config)
    return join_checkpoint(parts["unet"], parts["vae"], parts["text_encoder"], shape, 4)


def all_tensors(model: StableDiffusion1) -> dict[str, Tensor]:
    """Every weight, as "role.name"."""
    roles = ("unet", "vae", "text_encoder")
    return {f"{role}.{name}": tensor for role in roles for name, tensor in model.tensors(role).items()}


def assert_equal_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names, shapes and values, to the bit."""
    assert sorted(first) == sorted(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
