"""A model as parts: networks with their configurations and tensors, whatever files they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sd_train.errors import ModelError
from sd_train.families.folders import check_config, read_folder
from sd_train.families.hub import find_model
from sd_train.families.published import TITLES, FamilyName, Prediction, published_config, scheduler_config
from sd_train.families.recognise import NotRecognisedError, ema_table, recognise
from sd_train.families.sources import (
    DictSource,
    Part,
    RenamedSource,
    SafetensorsSource,
    TensorSource,
    open_file,
    select,
)
from sd_train.families.specs import LatentSpec
from sd_train.families.vae import read_vae

__all__ = [
    "CONFIG_ENTRY",
    "TOLD_BY_NOTHING",
    "Form",
    "ModelKind",
    "ModelParts",
    "ModelRequest",
    "Part",
    "fitting_scheduler",
    "model_kind",
    "read_model",
    "with_prediction",
]

Form = Literal["safetensors", "ckpt", "diffusers"]

CONFIG_ENTRY = "sd_train.config"
"""Metadata entry: what the tensors do not tell, as JSON: fields of the networks' configurations, the scheduler's."""


TOLD_BY_NOTHING = {
    "unet": (
        "attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos",
        "freq_shift", "sample_size", "upcast_attention", "addition_time_embed_dim", "mid_block_scale_factor",
        "only_cross_attention", "dual_cross_attention", "resnet_time_scale_shift", "downsample_padding",
    ),
    "vae": ("act_fn", "norm_num_groups", "sample_size", "scaling_factor", "force_upcast"),
    "text": (
        "num_attention_heads", "hidden_act", "layer_norm_eps", "projection_dim", "bos_token_id", "eos_token_id",
        "pad_token_id",
    ),
}  # fmt: skip
"""Fields of configurations that neither names nor shapes of tensors tell: no others stand under `CONFIG_ENTRY`."""


@dataclass(frozen=True)
class ModelRequest:
    """Which model is asked for, and what the user says about it."""

    source: str
    """A folder, a file or a hub id."""
    v2: bool = False
    v_parameterization: bool | None = None
    sdxl: bool = False
    vae: str | None = None
    """Another autoencoder: a file, a folder or a whole model."""
    allow_network: bool = True
    """Whether a hub id that is not in the cache may be downloaded."""
    ema: bool = False
    """Take the U-Net's running means for its weights."""
    option: str = "--pretrained_model_name_or_path"
    """What named the model, for messages."""
    guess: bool = False
    """Take the model for one that predicts the noise where nothing tells, instead of refusing it."""


@dataclass(frozen=True)
class ModelParts:
    """A model, its tensors not yet read."""

    family: FamilyName
    parts: dict[str, Part]
    """By "unet", "vae", "text_encoder", "text_encoder_2"; the refiner has no "text_encoder"."""
    prediction: Prediction
    zero_terminal_snr: bool
    scheduler: dict[str, Any]
    """diffusers' configuration of the scheduler for inference."""
    form: Form
    """Of the files that it comes from."""
    origin: str
    tokenizers: dict[str, Path] = field(default_factory=dict)
    """Folders "tokenizer" and "tokenizer_2" of a model with its own."""
    metadata: dict[str, str] = field(default_factory=dict)
    extras: TensorSource = field(default_factory=DictSource)
    """Of a single file: tensors that belong to its text encoders and that no network of ours uses, original names."""
    leftovers: TensorSource = field(default_factory=DictSource)
    """Of a single file: all the rest, such as running means and schedules, original names."""
    told: bool = True
    """Whether the model or the user tells what it predicts; False: `prediction` is a guess."""


@dataclass(frozen=True)
class ModelKind:
    """What is known of a model before its weights are read."""

    family: FamilyName
    prediction: Prediction
    zero_terminal_snr: bool
    multiple: int
    """Sides of pictures are multiples of it, in pixels (sd-scripts' rule)."""
    latent: LatentSpec
    in_channels: int
    configs: dict[str, dict[str, Any]]
    """Configuration of each part."""
    form: Form
    """Of the files that it comes from."""


def read_model(request: ModelRequest) -> ModelParts:
    """The model that `request` names; its tensors are read when they are asked for.

    Raises:
        ModelError: if there is none, it is of an unknown kind, incomplete or broken, or contradicts `request`.
    """
    try:
        path = find_model(request.source, request.allow_network)
        parts = _read_folder(request, path) if path.is_dir() else _read_file(request, path)
    except ModelError as problem:
        # The option has told the path already.
        lines = (line.removeprefix(f"{request.source}: ") for line in problem.problems)
        raise ModelError(*(f"{request.option} = {request.source}: {line}" for line in lines)) from None
    parts = _decided(request, parts)
    if request.vae is not None:
        vae = read_vae(request.vae, parts.family, parts.parts["vae"].config, request.allow_network)
        parts = replace(parts, parts={**parts.parts, "vae": vae})
    return parts


def multiple_of(family: FamilyName) -> int:
    """Of what pictures' sides are multiples, in pixels."""
    return 32 if family.startswith("sdxl") else 64


def model_kind(request: ModelRequest) -> ModelKind:
    """Family, prediction, latents and configurations, without reading weights.

    Raises:
        ModelError: as `read_model`.
    """
    parts = read_model(request)
    vae = parts.parts["vae"].config
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    latent = LatentSpec(vae["latent_channels"], factor, vae.get("scaling_factor", 0.18215))
    configs = {name: part.config for name, part in parts.parts.items()}
    in_channels = configs["unet"]["in_channels"]
    return ModelKind(
        parts.family, parts.prediction, parts.zero_terminal_snr, multiple_of(parts.family), latent, in_channels,
        configs, parts.form,
    )  # fmt: skip


def _read_folder(request: ModelRequest, path: Path) -> ModelParts:
    folder = read_folder(path, request.ema)
    scheduler = folder.scheduler
    kind = None if scheduler is None else scheduler.get("prediction_type", "epsilon")
    prediction = _prediction_word(kind, path)
    zero = scheduler is not None and bool(scheduler.get("rescale_betas_zero_snr"))
    told = prediction if prediction is not None else _of_metadata(folder.metadata)
    return ModelParts(
        folder.family, folder.parts, told or "epsilon", zero, scheduler or {}, "diffusers", str(path),
        folder.tokenizers, folder.metadata, told=told is not None,
    )  # fmt: skip


def _read_file(request: ModelRequest, path: Path) -> ModelParts:
    source, metadata = open_file(path)
    try:
        layout = recognise(source)
    except NotRecognisedError as problem:
        raise ModelError(f"{path}: is {problem}") from None
    tables = {name: part.table for name, part in layout.parts.items()}
    leftovers = set(layout.leftovers)
    if request.ema:
        means = ema_table(source, tables["unet"])
        if means is None:
            raise ModelError(f"{path}: holds no running means (model_ema.*), and --ema asks for them; leave --ema out")
        tables["unet"] = means
        leftovers = {name for name in leftovers if not name.startswith("model_ema.")}
    noted = _noted(metadata, path)
    configs = {name: {**part.config, **noted.get(name, {})} for name, part in layout.parts.items()}
    for name, config in configs.items():
        try:
            check_config(name, config)
        except (TypeError, ValueError) as problem:
            raise ModelError(
                f"{path}: its metadata {CONFIG_ENTRY} are not understood ({name}: {problem}); download it again"
            ) from None
    parts = {name: Part(configs[name], RenamedSource(source, table)) for name, table in tables.items()}
    told = layout.prediction or _of_metadata(metadata)
    form: Form = "safetensors" if isinstance(source, SafetensorsSource) else "ckpt"
    return ModelParts(
        layout.family, parts, told or "epsilon", layout.zero_terminal_snr, noted.get("scheduler", {}), form, str(path),
        {}, metadata,
        select(source, set(layout.extras).__contains__), select(source, leftovers.__contains__), told is not None,
    )  # fmt: skip


def _noted(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """What our own files note beside the tensors, by role."""
    try:
        entries = json.loads(metadata.get(CONFIG_ENTRY, "{}"))
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict) or not all(isinstance(fields, dict) for fields in entries.values()):
        raise ModelError(f"{path}: its metadata {CONFIG_ENTRY} is no JSON table; write the file again")
    for role, fields in entries.items():
        known = TOLD_BY_NOTHING.get("text" if role in ("text_encoder", "text_encoder_2") else role, ())
        if role != "scheduler" and (strange := sorted(fields.keys() - set(known))):
            raise ModelError(
                f"{path}: its metadata {CONFIG_ENTRY} set {role}.{strange[0]}, which nothing reads there; download it "
                "again, or write it again without that entry"
            )
    return entries


def _prediction_word(word: Any, path: Path) -> Prediction | None:
    match word:
        case None | "epsilon" | "v_prediction" | "sample":
            known: Prediction | None = word
            return known
    raise ModelError(
        f"{path}: was trained to predict {word!r} (its scheduler says so); only epsilon, v_prediction and sample are "
        "supported"
    )


def _of_metadata(metadata: Mapping[str, str]) -> Prediction | None:
    """What modelspec (https://github.com/Stability-AI/ModelSpec) or sd-scripts' entries tell."""
    match metadata.get("modelspec.prediction_type", "").lower():
        case "epsilon":
            return "epsilon"
        case "v" | "v_prediction" | "v-prediction":
            return "v_prediction"
        case "sample":
            return "sample"
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    version = metadata.get("ss_base_model_version", "")
    if architecture == "stable-diffusion-v2-768-v" or version == "sd_v2_v":
        return "v_prediction"
    if architecture == "stable-diffusion-v2-512" or version == "sd_v2":
        return "epsilon"
    return None


def _decided(request: ModelRequest, parts: ModelParts) -> ModelParts:
    """With the prediction that flags, markers, metadata or custom decide on, in this order."""
    where = f"{request.option} = {request.source}"
    for given, flag, families in ((request.v2, "--v2", ("sd2",)), (request.sdxl, "--sdxl", ("sdxl", "sdxl_refiner"))):
        if given and parts.family not in families:
            instead = " (sdxl_... commands give it: use the one without sdxl_)" if flag == "--sdxl" else ""
            raise ModelError(
                f"{where}: is {TITLES[parts.family]}, and {flag} says otherwise; leave {flag} out{instead}"
            )
    prediction, told = parts.prediction, parts.told
    if request.v_parameterization is not None:
        prediction, told = ("v_prediction" if request.v_parameterization else "epsilon"), True
    if not told and parts.family == "sd2" and not request.guess:
        raise ModelError(
            f"{where}: is Stable Diffusion 2.x, and nothing tells the model for 512 pixels from the one for 768, which "
            "predicts v; say --v_parameterization (768) or --no_v_parameterization (512, base)"
        )
    if parts.form != "diffusers":
        configs = with_prediction({name: part.config for name, part in parts.parts.items()}, parts.family, prediction)
        parts = replace(parts, parts={name: Part(configs[name], part.tensors) for name, part in parts.parts.items()})
    parts = replace(parts, prediction=prediction, told=told or parts.family != "sd2", origin=request.source)
    return replace(parts, scheduler=fitting_scheduler(parts))


def fitting_scheduler(parts: ModelParts) -> dict[str, Any]:
    """The model's scheduler, or its family's where there is none or it cannot do what the model needs."""
    scheduler = parts.scheduler
    if not scheduler or bool(scheduler.get("rescale_betas_zero_snr")) != parts.zero_terminal_snr:
        return scheduler_config(parts.family, parts.prediction, parts.zero_terminal_snr)
    if scheduler.get("prediction_type", "epsilon") == parts.prediction:
        return scheduler
    return {**scheduler, "prediction_type": parts.prediction}


def with_prediction(
    configs: Mapping[str, dict[str, Any]], family: FamilyName, prediction: Prediction
) -> dict[str, dict[str, Any]]:
    """The configurations of a single file, where what a model predicts tells its size of pictures (2.x)."""
    if family != "sd2" or prediction == "epsilon":
        return dict(configs)
    told = {role: published_config(role, family, prediction) for role in ("unet", "vae")}
    fields = {"unet": ("sample_size", "upcast_attention"), "vae": ("sample_size",)}
    return {
        role: {**config, **{field: told[role][field] for field in fields.get(role, ())}}
        for role, config in configs.items()
    }
