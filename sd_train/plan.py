"""What the run will do, as data, known before step 1 and before the model is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from sd_train.config.options import RunConfig
from sd_train.data.batches import BatchSettings, Draw, Updates
from sd_train.data.config import RENAMED_OPTIONS, dataset_fallbacks, load_dataset_config
from sd_train.data.index import ImageIndex, build_index
from sd_train.data.settings import DatasetConfig
from sd_train.device import Device, open_device
from sd_train.diffusion.schedule import TIMESTEPS, Draws, draw
from sd_train.errors import ConfigError, Problem, UserError
from sd_train.families.base import LatentSpec
from sd_train.families.registry import PUBLISHED_LATENT, check_model
from sd_train.metadata import now
from sd_train.names import FileNames, step_of
from sd_train.optim.optimizers import check_arguments, check_optimizer, check_rates, find_optimizer
from sd_train.optim.schedules import check_schedule, make_schedule
from sd_train.prompts import Prompt, load_prompts
from sd_train.randomness import derive
from sd_train.report import warn_line
from sd_train.state import find_state, read_progress
from sd_train.types import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Counts of a training."""

    datasets: tuple[DatasetConfig, ...]
    indexes: tuple[ImageIndex, ...]
    batches_per_epoch: int
    updates_per_epoch: int
    total_steps: int
    epochs: int
    """Epochs begun by the time the training ends."""
    rates: dict[str, float]
    """Learning rate by network role; roles that learn nothing are missing."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples with repeats, regularisation images included."""
        return sum(int(index.repeats.sum()) for index in self.indexes)


def learning_rates(config: RunConfig) -> dict[str, float]:
    """The rate of each network role; one that is left out or has rate 0 is missing."""
    network, base = config.network, config.optimizer.learning_rate
    rates: dict[str, float] = {}
    if not network.network_train_text_encoder_only:
        rates["unet"] = base if network.unet_lr is None else network.unet_lr
    if not network.network_train_unet_only:
        rates["text_encoder"] = base if network.text_encoder_lr is None else network.text_encoder_lr
    return {role: rate for role, rate in rates.items() if rate > 0}


def make_plan(
    config: RunConfig, datasets: Sequence[DatasetConfig], indexes: Sequence[ImageIndex], updates: Updates
) -> Plan:
    """Count what the run will do."""
    per_epoch, training = updates.per_epoch, config.training
    total = training.max_train_steps
    if training.max_train_epochs is not None:
        total = training.max_train_epochs * per_epoch
    return Plan(
        tuple(datasets),
        tuple(indexes),
        updates.batches_per_epoch,
        per_epoch,
        total,
        -(-total // per_epoch),
        learning_rates(config),
    )


def plan_fingerprint(prepared: Prepared) -> dict[str, object]:
    """What decides which samples an update holds, beside the seed, as JSON values: a resume compares it."""
    digest = hashlib.blake2b(digest_size=16)
    for dataset, index in zip(prepared.plan.datasets, prepared.plan.indexes, strict=True):
        subsets = [{**asdict(subset), "origin": "", "image_dir": ""} for subset in dataset.subsets]
        facts = [dataset.batch_size, subsets, index.paths, index.captions, index.buckets]
        digest.update(json.dumps(facts, default=str).encode())
        for column in (index.repeats, index.bucket_of, index.resized, index.subset_of):
            digest.update(np.ascontiguousarray(column).data)
    settings = prepared.updates.settings
    return {"world": settings.world, "accumulation": settings.accumulation, "datasets": digest.hexdigest()}


def describe(plan: Plan, config: RunConfig) -> str:
    """The plan in words, a line each."""
    lines = []
    for number, (dataset, index) in enumerate(zip(plan.datasets, plan.indexes, strict=True)):
        width, height = dataset.resolution
        samples = int(index.repeats.sum())
        reg = int(index.repeats[index.is_reg].sum())
        kinds = f" ({samples - reg} to learn, {reg} regularisation)" if reg else ""
        lines.append(
            f"dataset {number}: {len(index)} images, {samples} samples an epoch{kinds}, {width}x{height}, "
            f"batch {dataset.batch_size}"
        )
        for (bucket_width, bucket_height), count in zip(index.buckets, index.bucket_counts(), strict=True):
            if count:
                lines.append(f"  bucket {bucket_width}x{bucket_height}: {count} samples" + _rest(count, dataset))
    accumulated = config.training.gradient_accumulation_steps
    lines.append(
        f"an epoch: {plan.samples_per_epoch} samples in {plan.batches_per_epoch} batches, "
        f"{plan.updates_per_epoch} updates (accumulation {accumulated})"
    )
    epochs = plan.total_steps / plan.updates_per_epoch
    lines.append(f"training: {plan.total_steps} updates, {epochs:.4g} epochs")
    rates = ", ".join(f"{role} {rate:g}" for role, rate in plan.rates.items())
    lines.append(f"learning rates: {rates or 'none above 0, nothing learns: a control run'}")
    return "\n".join(lines)


def _rest(count: int, dataset: DatasetConfig) -> str:
    rest = count % dataset.batch_size
    return f" (the last batch of an epoch has {rest})" if rest else ""


def describe_batches(updates: Updates, plan: Plan, count: int = 8) -> str:
    """What the first `count` batches hold, as they would be trained on; every picture is really read."""
    lines = []
    shown = 0
    start = Progress(seed=updates.settings.seed, session_id=0, started_at=0.0)
    for update in updates.starting_at(start, plan.total_steps):
        for batch in update.batches:
            assert batch.pixels is not None
            height, width = batch.pixels.shape[2:]
            of = f", batch {batch.micro + 1} of its {updates.per_update}" if updates.per_update > 1 else ""
            place = f"update {update.step + 1}{of}"
            lines.append(f"{place}: {width}x{height}")
            for sample, key in enumerate(batch.keys):
                geometry = batch.geometry[sample]
                original = f"{geometry.original[1]}x{geometry.original[0]}"
                flipped = ", flipped" if geometry.flipped else ""
                lines.append(
                    f"  {key}: {original}, crop left {geometry.crop[1]} top {geometry.crop[0]}{flipped}, "
                    f"weight {float(batch.weight[sample]):g}, timestep {int(batch.timesteps[sample])}"
                )
                lines.append(f"    caption: {batch.captions[sample]!r}")
            shown += 1
            if shown == count:
                return "\n".join(lines)
    return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """What is known before the model is loaded."""

    config: RunConfig
    device: Device
    progress: Progress
    resume: Path | None
    names: FileNames
    updates: Updates
    plan: Plan
    prompts: tuple[Prompt, ...]


def prepare(config: RunConfig) -> Prepared:
    """Read the dataset, count, and find every problem that needs no model.

    Raises:
        UserError: with all problems and the ways out.
    """
    checks = Checks()
    names = FileNames(config.saving.output_dir, config.saving.output_name)
    if checks(lambda: _check_name(config, "optimizer_type", check_optimizer(config.optimizer.optimizer_type))):
        checks(lambda: check_arguments(config.optimizer.optimizer_type, config.optimizer.optimizer_args))
        checks(lambda: check_rates(config.optimizer.optimizer_type, learning_rates(config)))
    checks(lambda: _check_name(config, "lr_scheduler", check_schedule(config.optimizer.lr_scheduler)))
    checks(now)
    checks(lambda: check_model(Path(config.model.pretrained_model_name_or_path)))
    prompts = checks(lambda: load_prompts(config.sampling.sample_prompts) if config.sampling.sample_prompts else ())
    device = checks(lambda: open_device(config.training.mixed_precision))
    warn = warn_line if device is not None and device.is_main else _silent
    resume = checks(lambda: find_state(config.saving.resume, names, warn) if config.saving.resume else None)
    refused = bool(config.saving.resume) and resume is None
    own_state = resume is not None and resume.resolve() in {path.resolve() for path in names.states()}
    if not refused and not own_state and not config.saving.overwrite and not config.dataset.debug_dataset:
        checks(lambda: _refuse_existing(names))
    read = checks(lambda: _read_datasets(config))
    progress = checks(lambda: _first_progress(config, resume, device)) if device is not None else None
    checks.raise_any()
    assert read is not None
    assert device is not None
    assert progress is not None
    datasets, indexes = read
    updates = _make_updates(config, datasets, indexes, progress.seed, device)
    plan = make_plan(config, datasets, indexes, updates)
    checks(lambda: make_schedule(config.optimizer.lr_scheduler, config.optimizer.lr_warmup_steps, plan.total_steps))
    checks(lambda: _refuse_finished(progress, plan, resume))
    checks.raise_any()
    return Prepared(config, device, progress, resume, names, updates, plan, prompts or ())


class Checks:
    """Runs one check after another and keeps what they raise, so that all problems come out together."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __call__(self, check: Callable[[], T]) -> T | None:
        """What `check` returns; None if it raised."""
        try:
            return check()
        except UserError as problem:
            self.errors.append(problem)
            return None

    def raise_any(self) -> None:
        """Raise one error with everything that was found, of the first one's kind."""
        if self.errors:
            raise type(self.errors[0])(*(problem for error in self.errors for problem in error.problems))


def _silent(text: str) -> None:
    """What other ranks say."""


def _check_name(config: RunConfig, option: str, wrong: tuple[str, str] | None) -> bool:
    """True; raises what is wrong with an option of the optimizer group, at its place."""
    if wrong is None:
        return True
    origin = config.origins[option]
    where = f"--{option}" if origin == "default" else origin if origin.startswith("--") else f"{origin}: {option}"
    raise ConfigError(str(Problem(where, repr(getattr(config.optimizer, option)), *wrong)))


def _refuse_existing(names: FileNames) -> None:
    existing = names.existing()
    if existing:
        shown = ", ".join(path.name for path in existing[:3])
        onward = "continue it with --resume latest, " if names.states() else ""
        raise ConfigError(
            f"--output_dir = {names.folder}: holds another run's files of these names ({shown}"
            f"{', ...' if len(existing) > 3 else ''}); {onward}replace it with --overwrite, or choose another "
            "--output_name"
        )


def _refuse_finished(progress: Progress, plan: Plan, resume: Path | None) -> None:
    if progress.step >= plan.total_steps:
        raise ConfigError(
            f"--resume = {resume}: stands at step {progress.step} and the training ends at {plan.total_steps}; "
            "raise --max_train_steps or --max_train_epochs to go on"
        )


def _read_datasets(config: RunConfig) -> tuple[tuple[DatasetConfig, ...], list[ImageIndex]]:
    datasets = load_dataset_config(config.dataset.dataset_config, _fallbacks(config))
    if config.dataset.cache_latents:
        moving = [subset.origin for dataset in datasets for subset in dataset.subsets if subset.random_crop]
        if moving:
            raise ConfigError(
                f"{moving[0]}: random_crop = true: a cached latent cannot be cropped anew for every sample; "
                "leave --cache_latents away, or random_crop"
            )
    checks = Checks()
    indexes = [
        checks(
            partial(
                build_index,
                dataset,
                allow_missing_captions=config.dataset.allow_missing_captions,
                prior_loss_weight=config.training.prior_loss_weight,
            )
        )
        for dataset in datasets
    ]
    checks.raise_any()
    return datasets, [index for index in indexes if index is not None]


def _fallbacks(config: RunConfig) -> dict[str, object]:
    return dataset_fallbacks({**config.dataset.model_dump(), **config.training.model_dump()})


def plan_warnings(prepared: Prepared) -> list[str]:
    """What is allowed and probably not meant."""
    config, plan = prepared.config, prepared.plan
    warnings = [text for dataset in plan.datasets for text in dataset.warnings]
    warnings += [text for index in plan.indexes for text in index.warnings]
    warnings += unused_fallbacks(config, plan.datasets)
    given = {name for name, origin in config.origins.items() if origin != "default"}
    if "prior_loss_weight" in given and not any(s.is_reg for dataset in plan.datasets for s in dataset.subsets):
        warnings.append("--prior_loss_weight has no effect: no subset has is_reg = true")
    for name in ("save_every_n_steps", "sample_every_n_steps"):
        every = getattr(config.saving if name.startswith("save") else config.sampling, name)
        if every is not None and every > plan.total_steps:
            warnings.append(f"--{name} = {every} has no effect: the training has {plan.total_steps} updates")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != config.training.mixed_precision and "mixed_precision" not in given and launched != "no":
        warnings.append(
            f"accelerate was told mixed precision {launched}; as in sd-scripts only --mixed_precision counts, "
            f"which is {config.training.mixed_precision}"
        )
    spec = find_optimizer(config.optimizer.optimizer_type)
    if spec.adapts_rate and plan.rates and max(plan.rates.values()) <= 0.1:
        warnings.append(f"{spec.name} estimates the rate itself and multiplies it with yours; 1.0 is recommended")
    if prepared.resume is not None:
        later = [path.name for path in prepared.names.existing() if step_of(path) > prepared.progress.step]
        if later:
            shown = ", ".join(later[:4])
            warnings.append(f"{shown}: saved at later steps than this run goes on from; it replaces what it gets to")
    return warnings


def unused_fallbacks(config: RunConfig, datasets: Sequence[DatasetConfig]) -> list[str]:
    """Warnings for options that were given and that every dataset overrides with a value of its own."""
    own_names = {key: option for option, key in RENAMED_OPTIONS.items()}
    warnings = []
    for name, value in _fallbacks(config).items():
        option = own_names.get(name, name)
        # Bucket limits are rounded where they are used, so a difference says nothing.
        if config.origins.get(option, "default") == "default" or name in ("min_bucket_reso", "max_bucket_reso"):
            continue
        holders: list[object] = list(datasets)
        if not hasattr(datasets[0], name):
            holders = [subset for dataset in datasets for subset in dataset.subsets]
        if all(getattr(holder, name) != value for holder in holders):
            where = config.origins[option]
            shown = where if where.startswith("--") else f"{where}: {option}"
            warnings.append(
                f"{shown} = {value!r}: has no effect: {config.dataset.dataset_config} sets its own value everywhere"
            )
    return warnings


def _first_progress(config: RunConfig, resume: Path | None, device: Device) -> Progress:
    wanted = config.training.seed
    if resume is not None:
        progress = read_progress(resume)
        if wanted is not None and wanted != progress.seed:
            raise ConfigError(
                f"--seed = {wanted}: the state at {resume} was trained with {progress.seed}; leave --seed away"
            )
        return progress
    seed = device.shared(random.SystemRandom().randrange(2**32)) if wanted is None else wanted
    session = derive(seed, "session", config.saving.output_name or "") % 2**32
    return Progress(seed=seed, session_id=session, started_at=now())


def _make_updates(
    config: RunConfig, datasets: Sequence[DatasetConfig], indexes: Sequence[ImageIndex], seed: int, device: Device
) -> Updates:
    training = config.training
    settings = BatchSettings(
        seed=seed,
        accumulation=training.gradient_accumulation_steps,
        workers=min(training.max_data_loader_n_workers, os.cpu_count() or 1),
        rank=device.rank,
        world=device.world,
    )
    # The shape of the published models' latents; the loaded model's own takes its place.
    drawn = draw_function(seed, PUBLISHED_LATENT, TIMESTEPS)
    return Updates(indexes, [dataset.batch_size for dataset in datasets], settings, drawn)


def draw_function(seed: int, latent: LatentSpec, timesteps: int) -> Draw:
    """Draws noise for latents of `latent`, and timesteps below `timesteps`."""

    def drawn(step: int, places: Sequence[int], width: int, height: int) -> Draws:
        return draw(seed, step, places, latent.shape(width, height), timesteps)

    return drawn
