"""What a saved file says of itself: sd-scripts' `ss_*` entries and `modelspec.*`, as web UIs read them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sd_train import __version__
from sd_train.config.options import RunConfig
from sd_train.config.rates import trains_text
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import ConfigError, Problem
from sd_train.files import sha256
from sd_train.metadata_objective import objective_entries, timestep_range
from sd_train.types import Progress

# Options of sd-scripts whose part of the trainer does not exist: what it writes into LoRAs when they are not given.
_NOT_GIVEN = {
    "ss_full_fp16": "False",
    "ss_lowram": "False",
    "ss_fp8_base": "False",
    "ss_fp8_base_unet": "False",
    "ss_sd_scripts_commit_hash": "(unknown)",
}
_LAST_SECOND = 253370764799
"""The end of the year 9998 (UTC); a year of five digits is no ISO 8601 date, in any time zone."""
_MINIMUM = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


@dataclass(frozen=True)
class RunFacts:
    """What the metadata tells beside the configuration."""

    datasets: Sequence[DatasetConfig]
    indexes: Sequence[ImageIndex]
    num_validation_images: int
    world: int
    """Processes."""
    batches_per_epoch: int
    epochs: int
    total_steps: int
    network_dim: int | str
    network_alpha: float | str
    optimizer: str
    """`module.Class(argument=value,...)`, as sd-scripts writes it."""
    base_version: str
    architecture: str
    prediction: str
    zero_terminal_snr: bool = False
    folder: bool = False
    """Whether a save is a whole model as diffusers has it."""


def now() -> float:
    """Seconds since 1970; SOURCE_DATE_EPOCH takes the clock's place where it is set (reproducible-builds.org).

    Raises:
        ConfigError: if that variable holds no such number.
    """
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    if not fixed:
        return time.time()
    if not re.fullmatch(r"[0-9]{1,12}", fixed) or int(fixed) > _LAST_SECOND:
        rule = "must be whole seconds since 1970, below the year 9999"
        way_out = "write for example SOURCE_DATE_EPOCH=1700000000, or unset the variable"
        raise ConfigError(str(Problem("the environment variable SOURCE_DATE_EPOCH", repr(fixed), rule, way_out)))
    return float(fixed)


def build_metadata(config: RunConfig, facts: RunFacts, base: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """The file's metadata after `progress.step` updates; `base` holds what `describe_base` said."""
    entries: dict[str, Any] = {**_from_config(config), **_from_facts(facts)}
    match config.command:
        case "train_network":
            entries = {**_NOT_GIVEN, **entries, **_from_network(config, facts)}
        case "train_textual_inversion":
            entries |= _from_embedding(config)
        case _:
            entries |= _from_weights(config)
    entries |= _from_datasets(facts) if config.dataset.dataset_config is not None else _from_folders(config, facts)
    entries |= {
        "ss_seed": progress.seed,
        "ss_session_id": progress.session_id,
        "ss_training_started_at": progress.started_at,
        "ss_training_finished_at": now(),
        "ss_steps": progress.step,
        # Epochs begun: the same for a save at a step and one at an epoch's end, unlike sd-scripts.
        "ss_epoch": progress.epoch + (1 if progress.index else 0),
        **base,
    }
    if config.network.no_metadata:
        entries = {key: entries[key] for key in _MINIMUM if key in entries}
    metadata = {key: str(value) for key, value in entries.items()}
    return metadata | _modelspec(config, facts)


def describe_base(source: Path, vae: Path | None = None) -> dict[str, str]:
    """Name and hashes of the base model's file, and of the one that its VAE was taken from; a folder has no hash."""
    described: dict[str, str] = {}
    for kind, path in (("sd_model", source), ("vae", vae)):
        if path is None:
            continue
        described[f"ss_{kind}_name"] = path.name
        if path.is_file():
            with path.open("rb") as file:
                file.seek(0x100000)
                described[f"ss_{kind}_hash"] = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
            described[f"ss_new_{kind}_hash"] = sha256(path)
    return described


def _from_config(config: RunConfig) -> dict[str, Any]:
    optimizer, training, dataset = config.optimizer, config.training, config.dataset
    entries: dict[str, Any] = {
        "ss_output_name": config.saving.output_name,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_lr_warmup_steps": optimizer.lr_warmup_steps,
        "ss_lr_scheduler": optimizer.lr_scheduler,
        "ss_mixed_precision": training.mixed_precision,
        "ss_clip_skip": config.model.clip_skip,
        "ss_max_token_length": config.model.max_token_length,
        "ss_cache_latents": dataset.cache_latents or dataset.cache_latents_to_disk,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_caption_dropout_rate": dataset.caption_dropout_rate,
        "ss_caption_dropout_every_n_epochs": dataset.caption_dropout_every_n_epochs,
        "ss_caption_tag_dropout_rate": dataset.caption_tag_dropout_rate,
        "ss_prior_loss_weight": training.prior_loss_weight,
        "ss_face_crop_aug_range": dataset.face_crop_aug_range,
        "ss_resize_interpolation": dataset.resize_interpolation,
        "ss_validation_seed": dataset.validation_seed,
        "ss_validation_split": dataset.validation_split,
        **objective_entries(config),
    }
    if training.prior_preservation is not None:
        entries |= {"ss_prior_preservation": training.prior_preservation, "ss_class_prompt": training.class_prompt}
    return entries


def _from_network(config: RunConfig, facts: RunFacts) -> dict[str, Any]:
    network = config.network
    entries: dict[str, Any] = {
        "ss_text_encoder_lr": network.text_encoder_lr,
        "ss_unet_lr": network.unet_lr,
        "ss_network_module": network.network_module,
        "ss_network_dim": facts.network_dim,
        "ss_network_alpha": facts.network_alpha,
        "ss_network_dropout": network.network_dropout,
        "ss_scale_weight_norms": network.scale_weight_norms,
        "ss_training_comment": network.training_comment,
    }
    if network.network_args:
        # Words, as they were given: sd-scripts reads no types either.
        words = {name: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                 for name, value in network.network_args.items()}  # fmt: skip
        entries["ss_network_args"] = json.dumps(words)
    return entries


def _from_embedding(config: RunConfig) -> dict[str, Any]:
    """sd-scripts writes none of these; no reader can tell the word from the file otherwise."""
    chosen = config.embedding
    return {
        "ss_token_string": chosen.token_string,
        "ss_num_vectors_per_token": chosen.num_vectors_per_token,
        "ss_init_word": chosen.init_word,
        "ss_xti": chosen.xti,
    }


def _from_weights(config: RunConfig) -> dict[str, Any]:
    full = config.full
    return {
        "ss_train_text_encoder": trains_text(config.command, {**full.model_dump(), **config.optimizer.model_dump()}),
        "ss_learning_rate_te": full.learning_rate_te,
        "ss_learning_rate_te1": full.learning_rate_te1,
        "ss_learning_rate_te2": full.learning_rate_te2,
        "ss_block_lr": full.block_lr,
        "ss_stop_text_encoder_training": full.stop_text_encoder_training,
    }


def _from_facts(facts: RunFacts) -> dict[str, Any]:
    return {
        "ss_num_train_images": sum(index.num_train_images for index in facts.indexes),
        "ss_num_reg_images": sum(index.num_reg_images for index in facts.indexes),
        "ss_num_validation_images": facts.num_validation_images,
        "ss_num_batches_per_epoch": facts.batches_per_epoch,
        "ss_num_epochs": facts.epochs,
        "ss_max_train_steps": facts.total_steps,
        "ss_optimizer": facts.optimizer,
        "ss_v2": facts.base_version.startswith("sd_v2"),
        "ss_base_model_version": facts.base_version,
        "ss_zero_terminal_snr": facts.zero_terminal_snr,
    }


def _from_datasets(facts: RunFacts) -> dict[str, Any]:
    """What sd-scripts writes of datasets that a file describes."""
    frequency: dict[str, dict[str, int]] = {}
    folders: dict[str, dict[str, float]] = {}
    datasets = []
    for dataset, index in zip(facts.datasets, facts.indexes, strict=True):
        own = index.tag_frequency()
        for folder, tags in own.items():
            frequency[_unused(folder, frequency)] = tags
        for place, subset in enumerate(dataset.subsets):
            if not subset.is_reg:
                folders[_unused(_source_name(subset), folders)] = _counts(subset, index.image_count(place))
        datasets.append(
            {
                "is_dreambooth": dataset.style == "dreambooth",
                "batch_size_per_device": dataset.batch_size,
                "num_train_images": index.num_train_images,
                "num_reg_images": index.num_reg_images,
                "resolution": list(dataset.resolution),
                "enable_bucket": dataset.enable_bucket,
                "min_bucket_reso": dataset.min_bucket_reso,
                "max_bucket_reso": dataset.max_bucket_reso,
                "tag_frequency": own,
                "bucket_info": _bucket_info(index) if dataset.enable_bucket else None,
                "resize_interpolation": None,
                "subsets": [
                    _describe_subset(subset, index.image_count(place)) for place, subset in enumerate(dataset.subsets)
                ],
            }
        )
    return {
        "ss_datasets": json.dumps(datasets),
        "ss_tag_frequency": json.dumps(frequency),
        "ss_dataset_dirs": json.dumps(folders),
    }


def _from_folders(config: RunConfig, facts: RunFacts) -> dict[str, Any]:
    """What sd-scripts writes of the one dataset that folders on the command line make."""
    (dataset,), (index,) = facts.datasets, facts.indexes
    folders: dict[bool, dict[str, dict[str, float]]] = {False: {}, True: {}}
    for place, subset in enumerate(dataset.subsets):
        own = folders[subset.is_reg]
        own[_unused(_source_name(subset), own)] = _counts(subset, index.image_count(place))
    chosen, batch_size = config.dataset, config.training.train_batch_size
    return {
        "ss_batch_size_per_device": batch_size,
        "ss_total_batch_size": batch_size * facts.world * config.training.gradient_accumulation_steps,
        "ss_resolution": dataset.resolution,
        "ss_color_aug": chosen.color_aug,
        "ss_flip_aug": chosen.flip_aug,
        "ss_random_crop": chosen.random_crop,
        "ss_shuffle_caption": chosen.shuffle_caption,
        "ss_enable_bucket": dataset.enable_bucket,
        "ss_bucket_no_upscale": dataset.bucket_no_upscale,
        "ss_min_bucket_reso": dataset.min_bucket_reso,
        "ss_max_bucket_reso": dataset.max_bucket_reso,
        "ss_keep_tokens": chosen.keep_tokens,
        "ss_dataset_dirs": json.dumps(folders[False]),
        "ss_reg_dataset_dirs": json.dumps(folders[True]),
        "ss_tag_frequency": json.dumps(index.tag_frequency()),
        "ss_bucket_info": json.dumps(_bucket_info(index) if dataset.enable_bucket else None),
    }


def _source_name(subset: SubsetConfig) -> str:
    """The last part of where a subset comes from: its metadata file, or its folder."""
    return subset.image_dir.resolve().name if subset.metadata_file is None else subset.metadata_file.name


def _counts(subset: SubsetConfig, images: int) -> dict[str, float]:
    return {"n_repeats": subset.num_repeats, "img_count": images}


def _unused(name: str, taken: Mapping[str, object]) -> str:
    """`name`, or `name (2)` and so on where two folders share it."""
    number, chosen = 2, name
    while chosen in taken:
        chosen, number = f"{name} ({number})", number + 1
    return chosen


def _describe_subset(subset: SubsetConfig, count: int) -> dict[str, Any]:
    described = {
        "img_count": count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.metadata_file is not None:
        return described | {"metadata_file": subset.metadata_file.name}
    return described | {
        "image_dir": subset.image_dir.resolve().name,
        "class_tokens": subset.class_tokens,
        "is_reg": subset.is_reg,
    }


def _bucket_info(index: ImageIndex) -> dict[str, Any]:
    counts = index.bucket_counts()
    used = sorted((bucket, int(count)) for bucket, count in zip(index.buckets, counts, strict=True) if count)
    buckets = {str(n): {"resolution": list(bucket), "count": count} for n, (bucket, count) in enumerate(used)}
    return {"buckets": buckets, "mean_img_ar_error": index.mean_aspect_error}


def _modelspec(config: RunConfig, facts: RunFacts) -> dict[str, str]:
    """Stability AI's model metadata standard, version 1.0.1."""
    given, moment = config.metadata, now()
    if os.environ.get("SOURCE_DATE_EPOCH"):
        date = datetime.fromtimestamp(moment, UTC).replace(tzinfo=None)
    else:
        date = datetime.fromtimestamp(moment)
    width, height = max((dataset.resolution for dataset in facts.datasets), key=lambda size: size[0] * size[1])
    network = config.command == "train_network"
    kind = "/lora" if network else "/textual-inversion" if config.command == "train_textual_inversion" else ""
    name = config.saving.output_name or config.embedding.token_string
    title = given.metadata_title or name or f"{'LoRA' if network else 'Checkpoint'}@{moment}"
    sdxl = facts.base_version.startswith("sdxl")
    # As sd-scripts has it: also of the LoRAs of Stable Diffusion 1.x and 2.x, though not of embeddings.
    diffusers = facts.folder or (network and not sdxl)
    entries = {
        "sai_model_spec": "1.0.1",
        "architecture": facts.architecture + kind,
        "implementation": "diffusers" if diffusers else "https://github.com/Stability-AI/generative-models",
        "implementation_version": f"sd_train/{__version__}",
        "title": title,
        "resolution": f"{width}x{height}",
        "date": date.isoformat(timespec="seconds"),
        "timestep_range": timestep_range(config),
        "prediction_type": "v" if facts.prediction == "v_prediction" else facts.prediction,
        # SDXL's layers are not chosen by it in sd-scripts, which this entry is written for.
        "encoder_layer": None if sdxl else config.model.clip_skip,
        "author": given.metadata_author,
        "description": given.metadata_description,
        "license": given.metadata_license,
        "tags": given.metadata_tags,
        "usage_hint": given.metadata_usage_hint,
        "trigger_phrase": given.metadata_trigger_phrase,
        "merged_from": given.metadata_merged_from,
    }
    return {f"modelspec.{key}": str(value) for key, value in entries.items() if value is not None}
