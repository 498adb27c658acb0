"""Tiny real models that tests share; each is made once a run."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.demo.tiny_model import KINDS, TinyKind, make_tiny_parts, tiny_configs
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import ModelParts, ModelRequest, Part, read_model
from sd_train.families.registry import make_family
from sd_train.families.saving import save_model
from sd_train.families.sources import DictSource, SafetensorsSource, read_all
from sd_train.families.tokenizer import load_clip_tokenizer

SEED = 7
DATA = Path(__file__).parent / "data"


def golden(name: str) -> Any:
    """A table of tests/data, plain or compressed."""
    path = DATA / name
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())


def write_file(folder: Path, kind: TinyKind = "sd1") -> Path:
    """The tiny model as one `.safetensors` in half precision."""
    path = folder / f"tiny_{kind}.safetensors"
    save_model(path, _made(kind), "safetensors", torch.float16, {})
    return path


def write_small_file(folder: Path, kind: TinyKind = "sd1") -> Path:
    """The model of `small_parts` as one `.safetensors` in half precision."""
    path = folder / f"small_{kind}.safetensors"
    save_model(path, small_parts(kind), "safetensors", torch.float16, {})
    return path


def write_folder(folder: Path, kind: TinyKind = "sd1") -> Path:
    """The tiny model as a diffusers folder in float32."""
    path = folder / f"tiny_{kind}_folder"
    save_model(path, _made(kind), "diffusers_safetensors")
    return path


def write_ckpt(path: Path, tensors: dict[str, Tensor], *, zipped: bool = True) -> Path:
    """A pickled checkpoint as Stable Diffusion's authors published them; `zipped`: since torch 1.6."""
    torch.save(
        {"state_dict": tensors, "global_step": 840000, "epoch": 3}, path, _use_new_zipfile_serialization=zipped
    )
    return path


@cache
def _made(kind: TinyKind) -> ModelParts:
    return make_tiny_parts(kind, SEED)


@cache
def small_parts(kind: TinyKind = "sd1", zero_terminal_snr: bool = False) -> ModelParts:
    """A model of every kind of module, and of few of each; SDXL's is the tiny one."""
    configs = tiny_configs(kind)
    if kind != "sdxl":
        heads = configs["unet"]["attention_head_dim"]
        configs["unet"] |= {
            "block_out_channels": [32, 64], "layers_per_block": 1,
            "attention_head_dim": heads if isinstance(heads, int) else heads[:2],
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        }  # fmt: skip
        # Stable Diffusion 2.x reads the last layer but one.
        configs["text_encoder"] |= {"num_hidden_layers": 1 if kind == "sd1" else 2}
    return make_tiny_parts(kind, SEED, configs, zero_terminal_snr)


def tiny_parts(kind: TinyKind = "sd1", **changes: Any) -> ModelParts:
    """The weights of `write_folder`, the caller's own; `changes` of the model's description."""
    made = _made(kind)
    copies = {
        role: Part(part.config, DictSource({name: tensor.clone() for name, tensor in read_all(part.tensors).items()}))
        for role, part in made.parts.items()
    }
    return replace(made, parts=copies, **changes)


def fresh_tiny(kind: TinyKind = "sd1", **changes: Any) -> LatentDiffusion:
    """The weights of `write_folder`, in a model of the caller's own."""
    return _ours(make_family(tiny_parts(kind, **changes)))


def changed_tiny(kind: TinyKind, **unet: Any) -> LatentDiffusion:
    """A tiny model of which the U-Net's configuration is changed."""
    configs = tiny_configs(kind)
    configs["unet"] |= unet
    return _ours(make_family(make_tiny_parts(kind, SEED, configs)))


def load(path: Path, **more: Any) -> LatentDiffusion:
    """The model in a file or folder, as a run would load it."""
    return _ours(make_family(read_model(ModelRequest(str(path), allow_network=False, **more))))


def _ours(family: Any) -> LatentDiffusion:
    assert isinstance(family, LatentDiffusion)
    return family


def reference_pipeline(kind: TinyKind = "sd1") -> Any:
    """diffusers' own pipeline with the weights of `write_folder`, put together without any of our loading."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLImg2ImgPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts = tiny_parts(kind).parts
    made: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(parts["unet"].config),
        "vae": AutoencoderKL.from_config(parts["vae"].config),
    }
    for role, network in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        made[role] = network(CLIPTextConfig(**parts[role].config)) if role in parts else None
    for role, part in parts.items():
        names = made[role].state_dict()
        tensors = read_all(part.tensors).items()
        # transformers 5.6 dropped a level of names in the first of the two.
        made[role].load_state_dict({n if n in names else n.removeprefix("text_model."): t for n, t in tensors})
        made[role].eval().requires_grad_(False)
    first = made["text_encoder"]
    if first is not None and not hasattr(first, "text_model"):
        # diffusers' clip_skip reads the level.
        first.__dict__["text_model"] = first
    pad = "!" if kind.startswith("sd2") else "<|endoftext|>"
    made["tokenizer"] = None if first is None else load_clip_tokenizer(pad)
    made["scheduler"] = DDIMScheduler.from_config(tiny_parts(kind).scheduler)
    if kind in ("sdxl", "refiner"):
        second = made | {"tokenizer_2": load_clip_tokenizer("!"), "add_watermarker": False}
        if kind == "refiner":
            pipeline: Any = StableDiffusionXLImg2ImgPipeline(**second, requires_aesthetics_score=True)
        else:
            pipeline = StableDiffusionXLPipeline(**second)
    else:
        del made["text_encoder_2"]
        pipeline = StableDiffusionPipeline(
            **made, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def original_tensors(folder: Path, kind: TinyKind = "sd1") -> dict[str, Tensor]:
    """The tiny model under the original checkpoint's names, float32; a table of the caller's own."""
    path = folder / f"original_{kind}.safetensors"
    save_model(path, tiny_parts(kind), "safetensors", None, {})
    return read_all(SafetensorsSource.open([path]))


def all_tensors(model: LatentDiffusion) -> dict[str, Tensor]:
    """Every weight, as "role.name"."""
    roles = (*model.networks, "vae")
    return {f"{role}.{name}": tensor for role in roles for name, tensor in model.tensors(role).items()}


def assert_equal_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal names, shapes and values, to the bit."""
    assert sorted(first) == sorted(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


ALL_KINDS: tuple[TinyKind, ...] = tuple(KINDS)
