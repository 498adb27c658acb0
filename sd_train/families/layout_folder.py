"""What a model is as a folder that diffusers reads: networks, scheduler, tokenizers, index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sd_train.families.parts import ModelParts, fitting_scheduler
from sd_train.families.published import PAD_TOKENS
from sd_train.families.sources import CastSource, Part
from sd_train.families.streaming import put_safetensors
from sd_train.families.tokenizer import CONTEXT_LENGTH, END, START, clip_vocabulary

_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}

_INPAINTING_CHANNELS = 9


def fill_model_folder(folder: Path, parts: ModelParts, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
    """Write every file of a diffusers folder; for use inside `write_folder`.

    Names are the published ones, whatever the installed libraries call their modules.
    """
    for role, stored in parts.parts.items():
        part = Part(stored.config, CastSource(stored.tensors, dtype))
        (folder / role).mkdir()
        _write_json(folder / role / "config.json", _config(role, part))
        stem = "model" if role.startswith("text") else "diffusion_pytorch_model"
        entries = {"format": "pt", **(metadata if role == "unet" else {})}
        put_safetensors(folder / role / f"{stem}.safetensors", part.tensors, entries)
    scheduler = fitting_scheduler(parts)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    for role, name in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if role in parts.parts:
            own = parts.tokenizers.get(name)
            if own is not None:
                shutil.copytree(own, folder / name)
            else:
                _write_tokenizer(folder / name, PAD_TOKENS[role][parts.family])
    _write_json(folder / "model_index.json", _index(parts, scheduler["_class_name"]))


def _config(role: str, part: Part) -> dict[str, Any]:
    config = {key: value for key, value in part.config.items() if key != "_name_or_path"}
    if not role.startswith("text"):
        return {**config, "_class_name": _CLASSES[role][1], "_diffusers_version": version("diffusers")}
    config.pop("dtype", None)
    stored = str(part.tensors.dtype(part.tensors.names()[0])).removeprefix("torch.")
    return {**config, "architectures": [_CLASSES[role][1]], "torch_dtype": stored}


def _index(parts: ModelParts, scheduler: str) -> dict[str, Any]:
    """model_index.json; what a model can do without (the safety checker, image encoders) is not there."""
    inpainting = parts.parts["unet"].config["in_channels"] == _INPAINTING_CHANNELS
    index: dict[str, Any] = {"_diffusers_version": version("diffusers"), "feature_extractor": [None, None]}
    index["image_encoder"] = [None, None]
    index["scheduler"] = ["diffusers", scheduler]
    roles = ("text_encoder", "text_encoder_2") if parts.family.startswith("sdxl") else ("text_encoder",)
    for role in ("unet", "vae", *roles):
        index[role] = list(_CLASSES[role]) if role in parts.parts else [None, None]
    for role in roles:
        tokenizer = role.replace("text_encoder", "tokenizer")
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if role in parts.parts else [None, None]
    match parts.family:
        case "sd1" | "sd2":
            index["_class_name"] = "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline"
            index |= {"safety_checker": [None, None], "requires_safety_checker": False}
        case "sdxl":
            index["_class_name"] = "StableDiffusionXLInpaintPipeline" if inpainting else "StableDiffusionXLPipeline"
            index["force_zeros_for_empty_prompt"] = True
        case "sdxl_refiner":
            index["_class_name"] = "StableDiffusionXLImg2ImgPipeline"
            index |= {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    return index


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    """CLIP's tokenizer in the files that every release of transformers reads."""
    folder.mkdir()
    vocabulary = clip_vocabulary()
    (folder / "vocab.json").write_bytes(json.dumps(vocabulary.ids, ensure_ascii=False).encode())
    merges = "".join(f"{first} {second}\n" for first, second in vocabulary.merges)
    (folder / "merges.txt").write_bytes(f"#version: 0.2\n{merges}".encode())

    def special(content: str) -> dict[str, Any]:
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    specials = {
        "bos_token": special(START), "eos_token": special(END), "unk_token": special(END), "pad_token": pad_token,
    }  # fmt: skip
    _write_json(folder / "special_tokens_map.json", specials)
    typed = {
        name: {"__type": "AddedToken", **value} if isinstance(value, dict) else value
        for name, value in specials.items()
    }
    settings = {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", {**settings, **typed})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    # Live configurations hold tuples and sets of their libraries' own kinds.
    text = json.dumps(dict(content), indent=2, sort_keys=True, default=list)
    path.write_bytes(f"{text}\n".encode())
