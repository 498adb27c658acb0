"""The options of validation -> what validates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sd_train.checkpoint import Checkpoint
from sd_train.data.cache import FillOptions, MemoryCache
from sd_train.data.index import ImageIndex
from sd_train.data.slices import fixed_slice
from sd_train.data.texts import MemoryTexts, TextFill, all_captions
from sd_train.diffusion.timesteps import TimestepSettings
from sd_train.families.base import Family
from sd_train.objectives.denoise import Denoise
from sd_train.optim.inference import InferenceWeights
from sd_train.plan import Prepared
from sd_train.plan_data import caches_latents, caches_texts
from sd_train.plan_validation import epoch_interval
from sd_train.report import Report
from sd_train.state import StateParts
from sd_train.trainables.average import AverageWeights
from sd_train.validate import ScoredSet, ScoreSettings, Validation

MOST_TRAINING_IMAGES = 256
MOST_IN_MEMORY = 2**30
"""Bytes of encoded pictures; where there are more, they are encoded each time unless the training's are kept too."""


def make_validation(
    prepared: Prepared,
    family: Family,
    objective: Denoise,
    parts: StateParts,
    report: Report,
    checkpoint: Checkpoint,
) -> Validation | None:
    """What validates; None without images for it.

    Raises:
        UserError: if an image cannot be read.
    """
    config, plan, device = prepared.config, prepared.plan, prepared.device
    if not plan.validation:
        return None
    chosen, seed = config.validation, prepared.progress.seed
    kept = _kept(prepared)
    learned = fixed_slice(plan.indexes, min(sum(map(len, kept)), MOST_TRAINING_IMAGES), seed)
    low, high = TimestepSettings(config.noise.min_timestep or 0, config.noise.max_timestep).bounds(
        family.schedule.steps
    )
    settings = ScoreSettings(
        seed, chosen.validation_timesteps, low, high, chosen.max_validation_steps, device.rank, device.world
    )
    assert family.latent is not None
    sets = [ScoredSet(indexes, settings, family.latent.shape) for indexes in (kept, learned)]
    for scored in sets:
        _fill(prepared, family, scored)
    return Validation(
        objective=objective,
        device=device,
        kept=sets[0],
        trained=sets[1],
        weights=InferenceWeights(parts.trainable, parts.optimizer),
        average=None if parts.ema is None else AverageWeights(parts.trainable, parts.ema),
        report=report,
        every_n_steps=chosen.validate_every_n_steps,
        every_n_epochs=epoch_interval(chosen),
        end=plan.total_steps,
        patience=chosen.validation_patience,
        save_best=checkpoint.best if chosen.save_best else None,
    )


def _kept(prepared: Prepared) -> Sequence[ImageIndex]:
    """The images for validation; no more of them than so many batches can hold, so that none is encoded in vain."""
    indexes, most = prepared.plan.validation, prepared.config.validation.max_validation_steps
    count = 0 if most is None else most * max(index.dataset.batch_size for index in indexes)
    return fixed_slice(indexes, count, prepared.progress.seed) if 0 < count < sum(map(len, indexes)) else indexes


def _fill(prepared: Prepared, family: Family, scored: ScoredSet) -> None:
    """Encode pictures, and captions where the training's are kept, once for all validations."""
    config, device, updates = prepared.config, prepared.device, scored.updates

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        with device.autocast():
            return family.encode_images(device.move(pixels))

    def encode_texts(texts: Sequence[str]) -> dict[str, Tensor]:
        with device.autocast():
            return family.encode_texts(texts)

    if caches_latents(config) or sum(_bytes(index, family) for index in updates.indexes) <= MOST_IN_MEMORY:
        cache = MemoryCache()
        workers = prepared.updates.settings.workers
        cache.fill(updates.indexes, encode, FillOptions(config.dataset.vae_batch_size, workers, lambda count: None))
        updates.cache = cache
    if caches_texts(config):
        texts = MemoryTexts()
        captions = all_captions(updates.indexes, updates.settings.seed, None, prepared.plan.total_steps)
        texts.fill(captions, TextFill(encode_texts, lambda count: None))
        updates.texts = texts


def _bytes(index: ImageIndex, family: Family) -> int:
    """Of the encoded pictures: mean and log-variance, float32."""
    assert family.latent is not None
    shapes = [family.latent.shape(width, height) for width, height in index.buckets]
    sizes = np.array([8 * int(np.prod(shape)) for shape in shapes], np.int64)
    return int(sizes[index.bucket_of].sum())
