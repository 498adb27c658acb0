"""Single-file Stable Diffusion 1.x checkpoints: read, recognise, split into parts, and join again."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from sd_train.errors import ModelError
from sd_train.families.keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    ModuleName,
    UNetShape,
    published_text_name,
    text_modules,
    unet_modules,
    vae_modules,
)
from sd_train.families.pickles import read_pickled_tensors

VOCABULARY = 49408
SUFFIXES = (".safetensors", ".ckpt", ".pt")


@cache
def _asset(name: str) -> str:
    return (files("sd_train.families") / "assets" / "sd1" / f"{name}.json").read_text(encoding="utf-8")


def published_config(name: str) -> dict[str, Any]:
    """SD 1.5's configuration of "unet", "vae", "text_encoder" or "scheduler", as it ships with the package."""
    config: dict[str, Any] = json.loads(_asset(name))
    return config


@dataclass(frozen=True)
class SdParts:
    """The parts of a checkpoint under diffusers' published names, with configurations that fit their tensors."""

    unet: dict[str, Tensor]
    unet_config: dict[str, Any]
    vae: dict[str, Tensor]
    vae_config: dict[str, Any]
    text_encoder: dict[str, Tensor]
    text_config: dict[str, Any]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a `.safetensors`, `.ckpt` or `.pt` file.

    Raises:
        ModelError: if the file is broken or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: is not a model file; expected a folder or one of {', '.join(SUFFIXES)}")
    if path.suffix.lower() != ".safetensors":
        return read_pickled_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{path}: cannot be read as safetensors ({problem}); download it again") from None


def recognise(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file holds if it is not a Stable Diffusion 1.x checkpoint, in words; None if it is one."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in tensors)

    if has("conditioner.embedders."):
        return "an SDXL checkpoint, and SDXL is not yet supported"
    if has("cond_stage_model.model."):
        return "a Stable Diffusion 2.x checkpoint, and 2.x is not yet supported"
    if has("lora_unet_") or has("lora_te") or any(".lora_" in name for name in tensors):
        return "a LoRA, not a base model; give it with --network_weights"
    missing = [prefix for prefix in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX) if not has(prefix)]
    if len(missing) == 3:
        return "no Stable Diffusion checkpoint: none of its names is known"
    if missing:
        return f"an incomplete checkpoint: nothing is named {' or '.join(missing)}*"
    first = tensors.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is None or first.dim() != 4:
        return f"an incomplete checkpoint: it has no 3x3 convolution {UNET_PREFIX}input_blocks.0.0.weight"
    if (channels := first.shape[1]) != 4:
        return f"a U-Net with {channels} input channels (inpainting?), and only 4 are supported yet"
    return None


def split_checkpoint(tensors: Mapping[str, Tensor], source: Path) -> SdParts:
    """Split an original-layout checkpoint; widths and depths are read from the tensors.

    Raises:
        ModelError: if it is no Stable Diffusion 1.x checkpoint, or tensors are missing or too many.
    """
    if reason := recognise(tensors):
        raise ModelError(f"--pretrained_model_name_or_path = {source}: is {reason}")
    try:
        return _split(tensors, source)
    except (KeyError, ValueError, IndexError) as problem:
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: the checkpoint is incomplete ({problem}); download it again"
        ) from None


def _split(tensors: Mapping[str, Tensor], source: Path) -> SdParts:
    unet_part, vae_part, text_part = (_under(tensors, prefix) for prefix in (UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX))
    # What trained the autoencoder is sometimes left in the file.
    vae_part = {name: tensor for name, tensor in vae_part.items() if not name.startswith("loss.")}
    shape = unet_shape_of_names(unet_part)
    unet_config = _unet_config(unet_part, shape)
    levels = 1 + max(int(name.split(".")[2]) for name in vae_part if name.startswith("encoder.down."))
    layers = 1 + max(int(name.split(".")[4]) for name in vae_part if name.startswith("encoder.down.0.block."))
    vae_config = published_config("vae")
    vae_config["block_out_channels"] = [
        vae_part[f"encoder.down.{level}.block.0.conv2.weight"].shape[0] for level in range(levels)
    ]
    vae_config["layers_per_block"] = layers
    vae_config["latent_channels"] = vae_part["post_quant_conv.weight"].shape[0]
    text = {published_text_name(name): tensor for name, tensor in text_part.items() if not _is_leftover(name)}
    text_config = _text_config(text)
    text_names = [f"{name}{end}" for name in text_modules(text_config["num_hidden_layers"]) for end in _ends(name)]
    _check_complete(text, text_names, source, "text encoder")
    return SdParts(
        _renamed(unet_part, unet_modules(shape), source, "U-Net"),
        unet_config,
        _renamed(vae_part, vae_modules(levels, layers), source, "VAE"),
        vae_config,
        text,
        text_config,
    )


def join_checkpoint(
    unet: Mapping[str, Tensor], vae: Mapping[str, Tensor], text: Mapping[str, Tensor], shape: UNetShape, levels: int
) -> dict[str, Tensor]:
    """Parts under diffusers' names -> one table under the original names, the inverse of `split_checkpoint`."""
    joined: dict[str, Tensor] = {}
    layers = 1 + max(int(name.split(".")[4]) for name in vae if name.startswith("encoder.down_blocks.0.resnets."))
    for prefix, part, modules in (
        (UNET_PREFIX, unet, unet_modules(shape)),
        (VAE_PREFIX, vae, vae_modules(levels, layers)),
    ):
        for module in modules:
            for end in (".weight", ".bias"):
                if (tensor := part.get(module.diffusers + end)) is not None:
                    # The VAE's attention matrices are 1x1 convolutions in original checkpoints.
                    if prefix == VAE_PREFIX and module.kind == "attention" and tensor.dim() == 2:
                        tensor = tensor[:, :, None, None]
                    joined[prefix + module.original + end] = tensor
    joined.update({TEXT_PREFIX + published_text_name(name): tensor for name, tensor in text.items()})
    return joined


def unet_shape_of(config: Mapping[str, Any]) -> UNetShape:
    """The names' shape from a diffusers U-Net configuration."""
    depth = config.get("transformer_layers_per_block", 1)
    kinds = config["down_block_types"]
    depths: Sequence[int] = [depth] * len(kinds) if isinstance(depth, int) else depth
    attention = tuple(n if "CrossAttn" in kind else 0 for kind, n in zip(kinds, depths, strict=True))
    return UNetShape(attention, config["layers_per_block"], depths[-1])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_leftover(name: str) -> bool:
    # A constant, and the projection that Stable Diffusion 1.x does not use: some tools write them.
    return "position_ids" in name or name.startswith("text_projection.")


def _ends(name: str) -> tuple[str, ...]:
    return (".weight",) if "_embedding" in name else (".weight", ".bias")


def unet_shape_of_names(unet: Collection[str]) -> UNetShape:
    """The names' shape from the tensors' original names."""
    blocks = 1 + max(int(name.split(".")[1]) for name in unet if name.startswith("input_blocks."))
    depth = {block: 0 for block in range(blocks)}
    samplers = [block for block in depth if f"input_blocks.{block}.0.op.weight" in unet]
    for name in unet:
        if found := re.match(r"input_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.", name):
            block = int(found[1])
            depth[block] = max(depth[block], int(found[2]) + 1)
    first = [1, *(block + 1 for block in samplers)]
    layers = (samplers[0] if samplers else blocks) - 1
    mid = [int(name.split(".")[3]) for name in unet if name.startswith("middle_block.1.transformer_blocks.")]
    return UNetShape(tuple(depth[block] for block in first), layers, 1 + max(mid, default=0))


def _unet_config(unet: Mapping[str, Tensor], shape: UNetShape) -> dict[str, Any]:
    config = published_config("unet")
    step = shape.layers + 1
    widths = [
        unet[f"input_blocks.{1 + level * step}.0.out_layers.3.weight"].shape[0]
        for level in range(len(shape.down_attention))
    ]
    config["block_out_channels"] = widths
    config["layers_per_block"] = shape.layers
    config["down_block_types"] = ["CrossAttnDownBlock2D" if n else "DownBlock2D" for n in shape.down_attention]
    config["up_block_types"] = ["CrossAttnUpBlock2D" if n else "UpBlock2D" for n in reversed(shape.down_attention)]
    config["cross_attention_dim"] = unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return config


def _text_config(text: Mapping[str, Tensor]) -> dict[str, Any]:
    config = copy.deepcopy(published_config("text_encoder"))
    width = text["text_model.embeddings.token_embedding.weight"].shape[1]
    config["hidden_size"] = config["projection_dim"] = width
    config["num_attention_heads"] = max(1, width // 64)
    config["intermediate_size"] = text["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    config["num_hidden_layers"] = 1 + max(int(n.split(".")[3]) for n in text if ".layers." in n)
    config["vocab_size"] = text["text_model.embeddings.token_embedding.weight"].shape[0]
    return config


def _renamed(part: Mapping[str, Tensor], modules: list[ModuleName], source: Path, title: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    known: set[str] = set()
    for module in modules:
        for end in (".weight", ".bias"):
            known.add(module.original + end)
            if (tensor := part.get(module.original + end)) is not None:
                if title == "VAE" and module.kind == "attention" and tensor.dim() == 4:
                    tensor = tensor[:, :, 0, 0]
                renamed[module.diffusers + end] = tensor
    _check_complete(part, sorted(known & set(part)), source, title)
    return renamed


def _check_complete(part: Mapping[str, Tensor], names: Sequence[str], source: Path, title: str) -> None:
    unknown, missing = sorted(set(part) - set(names)), sorted(set(names) - set(part))
    if unknown or missing:
        kind, shown = ("unknown", unknown) if unknown else ("missing", missing)
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: {len(shown)} tensors of the {title} are {kind}, "
            f"e.g. {', '.join(shown[:3])}; the file is no complete Stable Diffusion 1.x checkpoint"
        )
