"""What a model is as a folder that diffusers reads: networks, scheduler, tokenizers, index."""

from __future__ import annotations

import json
import logging
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
from sd_train.families.tokenizer import CONTEXT_LENGTH, END, START, VOCABULARY_SIZE, clip_vocabulary

_LOG = logging.getLogger(__name__)

_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}

_INPAINTING_CHANNELS = 9

_TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
"""Every file that transformers writes for a CLIP tokenizer; nothing else goes from a base model's into a saved one."""


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
            (folder / name).mkdir()
            own = parts.tokenizers.get(name)
            whole = own is not None and _copy_tokenizer(own, folder / name)
            if not whole and (own is None or parts.parts[role].config.get("vocab_size") == VOCABULARY_SIZE):
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


def _copy_tokenizer(own: Path, folder: Path) -> bool:
    """Copy the tokenizer of the base model in `own`; whether its vocabulary is among what could be copied.

    A saved model goes to others: links that lead out of the base model are not followed, as its author may have put
    them there. Those of the hub's cache lead to its `blobs`.
    """
    place = own.resolve()
    homes = [place, place.parent]
    homes += [each.parent / "blobs" for each in place.parents if each.name == "snapshots"]
    for name in _TOKENIZER_FILES:
        file = own / name
        if not file.is_file():
            continue
        real = file.resolve()
        if not any(real.is_relative_to(home) for home in homes):
            _LOG.warning("%s: leads out of the model's folder and is not saved with the model", file)
            continue
        shutil.copyfile(real, folder / name)
    vocabularies = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).exists() for name in names) for names in vocabularies)


def _write_tokenizer(folder: Path, pad_token: str) -> None:
    """CLIP's tokenizer in the files that every release of transformers reads."""
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
