"""Whole models as files: one checkpoint under original names, or a folder as diffusers publishes them.

Tensors are read, converted and written one after another, so that a model larger than the memory can be converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sd_train.families.keys import UNET_PREFIX, VAE_PREFIX, unet_shape_of
from sd_train.families.keys_original import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    TensorPair,
    clip_pairs,
    open_clip_pairs,
    to_original,
    unet_pairs,
    vae_pairs,
)
from sd_train.families.layout_folder import fill_model_folder
from sd_train.families.parts import CONFIG_ENTRY, TOLD_BY_NOTHING, ModelParts, fitting_scheduler, with_prediction
from sd_train.families.pickles import write_pickled
from sd_train.families.published import PREDICTION_WORDS, scheduler_config
from sd_train.families.recognise import V_PREDICTION_MARKER, ZERO_SNR_MARKER, NotRecognisedError, recognise
from sd_train.families.sources import CastSource, DictSource, JoinedSource, RenamedSource, TensorSource
from sd_train.families.streaming import put_safetensors
from sd_train.files import write_folder, write_whole

SaveForm = Literal["safetensors", "ckpt", "diffusers", "diffusers_safetensors"]
"""`--save_model_as`; both kinds of folders hold safetensors: pickles are only written where `ckpt` is asked for."""

_NOT_NOTED: dict[str, Any] = {"upcast_attention": False, "force_upcast": True, "only_cross_attention": False,
                              "dual_cross_attention": False, "resnet_time_scale_shift": "default"}  # fmt: skip
"""What the libraries take where a configuration says nothing."""


def save_model(
    path: Path,
    parts: ModelParts,
    form: SaveForm,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    leftovers: bool = False,
    option: str = "--output_dir",
) -> None:
    """Write a whole model to `path`, complete or not at all.

    Args:
        path: a file, or a folder for diffusers' forms.
        parts: the model.
        form: how.
        dtype: of every number with a fraction; None: as they are.
        metadata: of the safetensors file; in a folder, of the U-Net's; in a pickle, an entry of its own.
        leftovers: also write what else the single file that `parts` came from holds.
        option: what to change if the disk refuses.

    Raises:
        RunError: if the disk refuses.
        ModelError: if the tensors cannot be read any more.
    """
    entries = {key: value for key, value in (metadata or {}).items() if key not in ("format", CONFIG_ENTRY)}
    if form in ("diffusers", "diffusers_safetensors"):
        write_folder(path, lambda folder: fill_model_folder(folder, parts, dtype, entries), option)
        return
    source = original_tensors(parts, leftovers)
    entries |= _noted(parts, source)
    written = CastSource(source, dtype)
    if (parts.family == "sd2" and parts.told) or parts.prediction == "sample":
        # Neither names nor shapes tell the two kinds of 2.x apart, nor that the picture is predicted.
        entries.setdefault("modelspec.prediction_type", PREDICTION_WORDS[parts.prediction])
    if form == "ckpt":
        write_whole(path, lambda temporary: write_pickled(temporary, written, entries), option)
    else:
        plain = {"format": "pt", **entries}
        write_whole(path, lambda temporary: put_safetensors(temporary, written, plain), option)


def original_tensors(parts: ModelParts, leftovers: bool = False) -> TensorSource:
    """The model as one table under the original checkpoint's names, with the markers of what it predicts."""
    sources: list[TensorSource] = []
    for role, prefix, pairs in _prefixed(parts):
        part = parts.parts[role]
        names = set(part.tensors.names())
        there = [pair for pair in pairs if not pair.optional or names.issuperset(pair.published)]
        table = {prefix + name: derived for name, derived in to_original(there).items()}
        sources.append(RenamedSource(part.tensors, table))
    markers = [V_PREDICTION_MARKER] if parts.prediction == "v_prediction" else []
    markers += [ZERO_SNR_MARKER] if parts.zero_terminal_snr else []
    sources += [parts.extras, DictSource({name: torch.empty(0) for name in markers})]
    if leftovers:
        sources.append(parts.leftovers)
    return JoinedSource.of(sources)


def _prefixed(parts: ModelParts) -> list[tuple[str, str, list[TensorPair]]]:
    """Role, prefix and names of each network in the original checkpoint."""
    family, configs = parts.family, {role: part.config for role, part in parts.parts.items()}
    vae = configs["vae"]
    found = [
        ("unet", UNET_PREFIX, unet_pairs(unet_shape_of(configs["unet"]))),
        ("vae", VAE_PREFIX, vae_pairs(len(vae["block_out_channels"]), vae.get("layers_per_block", 1))),
    ]
    for role in ("text_encoder", "text_encoder_2"):
        if role not in configs:
            continue
        layers = configs[role]["num_hidden_layers"]
        if role == "text_encoder_2" or family == "sd2":
            found.append((role, OPEN_CLIP_PREFIX[family], open_clip_pairs(layers, role == "text_encoder_2")))
        else:
            found.append((role, CLIP_PREFIX[family], clip_pairs(layers)))
    return found


def _noted(parts: ModelParts, source: TensorSource) -> dict[str, str]:
    """A metadata entry with what a reader of `source` would get wrong, so that tiny and unusual models come back."""
    try:
        told = with_prediction(
            {n: p.config for n, p in recognise(source).parts.items()}, parts.family, parts.prediction
        )
    except NotRecognisedError:
        told = {}
    noted: dict[str, dict[str, Any]] = {}
    for role, part in parts.parts.items():
        inferred, actual = told.get(role, {}), json.loads(json.dumps(dict(part.config), default=list))
        for field in TOLD_BY_NOTHING["text" if role.startswith("text") else role]:
            value = actual.get(field)
            if parts.family == "sd2" and field == "projection_dim":
                continue
            if value is not None and value != inferred.get(field, _NOT_NOTED.get(field)):
                noted.setdefault(role, {})[field] = value
    scheduler = {key: value for key, value in fitting_scheduler(parts).items() if key != "_diffusers_version"}
    if scheduler != scheduler_config(parts.family, parts.prediction, parts.zero_terminal_snr):
        noted["scheduler"] = scheduler
    return {CONFIG_ENTRY: json.dumps(noted, sort_keys=True)} if noted else {}
