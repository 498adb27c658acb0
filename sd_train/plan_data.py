"""The datasets of a run: read, indexed, ordered."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from sd_train.config.catalogue import options
from sd_train.config.options import RunConfig
from sd_train.data.batches import BatchSettings, Draw, Updates
from sd_train.data.config import RENAMED_OPTIONS, dataset_fallbacks, load_datasets
from sd_train.data.index import Indexes, IndexOptions, build_indexes
from sd_train.data.request import dataset_request
from sd_train.data.settings import DatasetConfig
from sd_train.data.store import default_cache_dir
from sd_train.device import Device
from sd_train.diffusion.draws import Draws, DrawSettings, draw
from sd_train.diffusion.noise import NoiseSettings
from sd_train.diffusion.timesteps import TimestepSettings
from sd_train.errors import ConfigError
from sd_train.families.parts import ModelKind, ModelRequest
from sd_train.families.registry import PUBLISHED_LATENT
from sd_train.families.specs import LatentSpec
from sd_train.families.text import TextOptions
from sd_train.names import FileNames
from sd_train.plan_words import templates_of

SavedForm = Literal["safetensors", "ckpt", "pt", "diffusers", "diffusers_safetensors"]

SDXL_STEP = 32
"""Pixels of which the sides of SDXL's buckets are multiples, in sd-scripts."""


def model_request(config: RunConfig) -> ModelRequest:
    """Which model the run asks for."""
    model = config.model
    # In files that kohya_ss writes every switch stands, so that false there is no answer but a default.
    by_default = model.v_parameterization is False and not config.origins["v_parameterization"].startswith("--")
    return ModelRequest(
        model.pretrained_model_name_or_path,
        v2=model.v2,
        v_parameterization=None if by_default else model.v_parameterization,
        guess=by_default,
        sdxl=model.sdxl,
        vae=model.vae,
    )


def text_options(config: RunConfig) -> TextOptions:
    """How the run encodes captions."""
    return TextOptions(config.model.clip_skip, config.model.max_token_length, config.model.weighted_captions)


def run_options(config: RunConfig) -> dict[str, object]:
    """The options that datasets fall back to, by name."""
    return {**config.dataset.model_dump(), **config.training.model_dump()}


def read_datasets(
    config: RunConfig, kind: ModelKind | None, seed: int
) -> tuple[tuple[DatasetConfig, ...], Indexes]:
    """The datasets that `config` asks for, for a model of `kind`, and the indexes of their images.

    Raises:
        UserError: with every problem of the dataset file, or else of images and captions.
    """
    chosen = config.dataset
    request = dataset_request(config.command, run_options(config))
    sdxl = config.model.sdxl if kind is None else kind.family.startswith("sdxl")
    multiple = kind.multiple if kind is not None else SDXL_STEP if sdxl else request.step_multiple
    templates = templates_of(config)
    datasets = load_datasets(replace(request, sdxl=sdxl, step_multiple=multiple, templates=templates))
    options = IndexOptions(
        allow_missing_captions=chosen.allow_missing_captions,
        prior_loss_weight=config.training.prior_loss_weight,
        seed=seed,
        verify_images=chosen.verify_images,
        skip_broken_images=chosen.skip_broken_images,
        cache_dir=chosen.cache_dir or default_cache_dir(),
        trust_index=chosen.trust_index,
        caches_latents=caches_latents(config),
        latents_suffix="_sdxl" if sdxl else "_sd",
    )
    return datasets, build_indexes(datasets, options)


def make_updates(config: RunConfig, indexes: Indexes, seed: int, device: Device) -> Updates:
    """The order of all updates.

    Raises:
        ConfigError: if an epoch would hold no batch at all.
    """
    training = config.training
    settings = BatchSettings(
        seed=seed,
        accumulation=training.gradient_accumulation_steps,
        workers=min(training.max_data_loader_n_workers, os.cpu_count() or 1),
        rank=device.rank,
        world=device.world,
        last_epoch=None if training.max_train_epochs is None else training.max_train_epochs - 1,
        caption_variants=config.dataset.cache_caption_variants if caches_texts(config) else None,
        pin=device.device.type == "cuda",
    )
    # The shape of the published models' latents; the loaded model's own takes its place.
    drawn = draw_function(draw_settings(config, seed), PUBLISHED_LATENT)
    return Updates(indexes.training, settings, drawn)


def draw_settings(config: RunConfig, seed: int) -> DrawSettings:
    """What is drawn for each sample."""
    noise = config.noise
    return DrawSettings(
        seed=seed,
        noise=NoiseSettings(
            offset=noise.noise_offset or 0.0,
            offset_random=noise.noise_offset_random_strength,
            adaptive=noise.adaptive_noise_scale or 0.0,
            pyramid_levels=noise.multires_noise_iterations or 0,
            pyramid_discount=noise.multires_noise_discount,
            perturbation=noise.ip_noise_gamma or 0.0,
            perturbation_random=noise.ip_noise_gamma_random_strength,
        ),
        timesteps=TimestepSettings(
            low=noise.min_timestep or 0,
            high=noise.max_timestep,
            sampling=noise.timestep_sampling,
            mean=noise.logit_mean,
            std=noise.logit_std,
        ),
    )


def draw_function(settings: DrawSettings, latent: LatentSpec) -> Draw:
    """Draws what is random about samples with latents of `latent`."""

    def drawn(step: int, places: Sequence[int], width: int, height: int) -> Draws:
        return draw(settings, step, places, latent.shape(width, height))

    return drawn


def written_folders(config: RunConfig) -> dict[Path, str]:
    """The folders that the run writes into, and the options that choose them."""
    chosen, folders = config.dataset, {config.saving.output_dir: "--output_dir"}
    if chosen.cache_latents_to_disk or chosen.cache_text_encoder_outputs_to_disk:
        folders[chosen.cache_dir or default_cache_dir()] = "--cache_dir"
    if config.logging.logging_dir is not None:
        folders[config.logging.logging_dir] = "--logging_dir"
    return folders


def saved_form(config: RunConfig, kind: ModelKind | None) -> SavedForm:
    """How trained weights are written: as asked for; else whole models as they came, never as a pickle."""
    if config.saving.save_model_as is not None:
        return config.saving.save_model_as
    whole = config.command in ("fine_tune", "train_db")
    return "diffusers_safetensors" if whole and kind is not None and kind.form == "diffusers" else "safetensors"


def file_names(config: RunConfig, kind: ModelKind | None) -> FileNames:
    """What the run writes; an embedding is called by its word, as in sd-scripts."""
    form = saved_form(config, kind)
    name = config.saving.output_name or config.embedding.token_string
    return FileNames(config.saving.output_dir, name, "" if form.startswith("diffusers") else f".{form}")


def caches_latents(config: RunConfig) -> bool:
    """Whether images are encoded once."""
    return config.dataset.cache_latents or config.dataset.cache_latents_to_disk


def caches_texts(config: RunConfig) -> bool:
    """Whether captions are encoded once."""
    return config.dataset.cache_text_encoder_outputs or config.dataset.cache_text_encoder_outputs_to_disk


def check_caption_cache(config: RunConfig, datasets: Sequence[DatasetConfig]) -> None:
    """Captions that vary cannot be encoded once, unless a number of variants is asked for.

    Raises:
        ConfigError: with every subset whose captions vary.
    """
    from sd_train.data.captions import needs_variants

    if not caches_texts(config) or config.dataset.cache_caption_variants is not None:
        return
    varying = [
        f"{subset.origin}: {option} makes another caption for every sample, which --cache_text_encoder_outputs cannot "
        "keep; give --cache_caption_variants 8 (so many versions of each are kept), or switch it off"
        for dataset in datasets
        for subset in dataset.subsets
        if (option := needs_variants(subset)) is not None
    ]
    if varying:
        raise ConfigError(*varying)


def check_prior(config: RunConfig, datasets: Sequence[DatasetConfig]) -> None:
    """A class is kept by regularisation images or by the base model's own predictions, not by both.

    Raises:
        ConfigError: with every subset of regularisation images.
    """
    if config.training.prior_preservation is None:
        return
    doubled = [
        f"--prior_preservation = {config.training.prior_preservation}: {subset.origin} holds regularisation images "
        "(is_reg), which keep the class in another way; remove that subset, or remove prior_preservation and "
        "class_prompt"
        for dataset in datasets
        for subset in dataset.subsets
        if subset.is_reg
    ]
    if doubled:
        raise ConfigError(*doubled)


def unused_fallbacks(config: RunConfig, datasets: Sequence[DatasetConfig]) -> list[str]:
    """Warnings for options that were given and that every dataset overrides with a value of its own."""
    own_names = {key: option for option, key in RENAMED_OPTIONS.items()}
    warnings = []
    for name, value in dataset_fallbacks(run_options(config)).items():
        option = own_names.get(name, name)
        # Bucket limits are rounded where they are used, so a difference says nothing; a default that is written out, as
        # kohya_ss does, is no wish.
        known = options().get(option)
        usual = known is not None and value == known.default and not config.origins.get(option, "").startswith("--")
        rounded = name in ("min_bucket_reso", "max_bucket_reso")
        if config.origins.get(option, "default") == "default" or rounded or usual:
            continue
        holders: list[object] = list(datasets)
        if not hasattr(datasets[0], name):
            holders = [subset for dataset in datasets for subset in dataset.subsets]
        if all(getattr(holder, name) != value for holder in holders):
            where = config.origins[option]
            shown = where if where.startswith("--") else f"{where}: {option}"
            source = config.dataset.dataset_config or "the dataset"
            warnings.append(f"{shown} = {value!r}: has no effect: {source} sets its own value everywhere")
    return warnings
