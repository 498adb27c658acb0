"""Shapes of a model's weights from its files' headers, without loading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from sd_train.families.checkpoints import unet_shape_of, unet_shape_of_names
from sd_train.families.keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    LoraTarget,
    published_text_name,
    text_lora_targets,
    unet_lora_targets,
    unet_modules,
)

Shapes = dict[str, tuple[int, ...]]


def lora_numbers(source: Path, rank: int) -> dict[str, int] | None:
    """How many numbers a LoRA of `rank` has in each network role of the model at `source`.

    None where the headers do not tell: pickled files, sharded or unusual folders.
    """
    try:
        found = _folder(source) if source.is_dir() else _single_file(source)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    if found is None:
        return None
    return {role: sum(_numbers(shapes.get(target.path), rank) for target in targets) for role, shapes, targets in found}


def _numbers(shape: tuple[int, ...] | None, rank: int) -> int:
    # down: [rank, in, kernel], up: [out, rank], alpha.
    return 0 if shape is None else rank * (prod(shape[1:]) + shape[0]) + 1


_Networks = list[tuple[str, Shapes, list[LoraTarget]]]


def _single_file(source: Path) -> _Networks | None:
    if source.suffix.lower() != ".safetensors":
        return None
    shapes = _header(source)
    unet = {name.removeprefix(UNET_PREFIX): shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX)}
    text = {name.removeprefix(TEXT_PREFIX): shape for name, shape in shapes.items() if name.startswith(TEXT_PREFIX)}
    layout = unet_shape_of_names(unet)
    renamed = {module.diffusers: unet.get(f"{module.original}.weight") for module in unet_modules(layout)}
    return [
        ("unet", {name: shape for name, shape in renamed.items() if shape is not None}, unet_lora_targets(layout)),
        _text(text),
    ]


def _folder(source: Path) -> _Networks | None:
    unet, text = (
        next(iter(sorted((source / part).glob("*.safetensors"))), None) for part in ("unet", "text_encoder")
    )
    if unet is None or text is None:
        return None
    layout = unet_shape_of(json.loads((source / "unet" / "config.json").read_text(encoding="utf-8")))
    shapes = {name.removesuffix(".weight"): shape for name, shape in _header(unet).items() if name.endswith(".weight")}
    return [("unet", shapes, unet_lora_targets(layout)), _text(_header(text))]


def _text(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Shapes, list[LoraTarget]]:
    named = {published_text_name(name).removesuffix(".weight"): shape for name, shape in shapes.items()}
    layers = 1 + max(int(name.split(".")[3]) for name in named if ".layers." in name)
    return "text_encoder", named, text_lora_targets(layers)


def _header(path: Path) -> Shapes:
    """Shape of each tensor, from the JSON at the file's start (https://github.com/huggingface/safetensors#format)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
