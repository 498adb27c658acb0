"""The plan in words and as JSON."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_train.config.options import RunConfig
from sd_train.data.index import ImageIndex
from sd_train.data.masks import LATENT_CELL
from sd_train.data.settings import DatasetConfig
from sd_train.data.shards import UNIT
from sd_train.families.parts import read_model
from sd_train.families.sizes import model_sizes
from sd_train.files import nearest_folder
from sd_train.names import Moment
from sd_train.optim.optimizers import chooses_rate, find_optimizer
from sd_train.plan import Plan, Prepared
from sd_train.plan_data import caches_latents, caches_texts, model_request, written_folders
from sd_train.plan_network import network_sizes
from sd_train.plan_optimizer import describe_state
from sd_train.plan_outputs import epoch_interval, save_rules
from sd_train.plan_points import epoch_ends, multiples
from sd_train.plan_validation import describe_validation
from sd_train.plan_words import word_numbers

_BYTES = {"float": 4, "fp16": 2, "bf16": 2, None: 4}
_LATENT_NUMBERS = 8
"""Mean and log-variance of four channels."""
_TOKENS = 77
"""Of one chunk of a caption, with its start and end."""


@dataclass(frozen=True)
class Save:
    """Files that the run will write at one point."""

    path: Path
    update: int
    bytes: int | None
    """None where the model's headers do not tell."""
    state: Path | None
    average: Path | None = None
    """The same with the moving average, as large."""


@dataclass(frozen=True)
class Outputs:
    """What the run will write."""

    saves: tuple[Save, ...]
    previews: tuple[int, ...]
    """Updates after which sample pictures are made; 0 is before the first."""
    pictures: int
    most_models: int
    """That lie on the disk together; one with its moving average counts once."""
    most_states: int
    disk_bytes: int | None
    cache_bytes: int
    """At most, of latents and captions in the cache folder, if they are kept there."""


def describe(plan: Plan, config: RunConfig) -> str:
    """The plan in words, a line each."""
    lines = []
    for number, index in enumerate(plan.indexes):
        lines += _describe_dataset(number, index)
    for index in plan.validation:
        lines.append(f"validation: {len(index)} images of the dataset at {index.dataset.origin}")
    accumulated = config.training.gradient_accumulation_steps
    first = "the first epoch" if plan.varies else "an epoch"
    rest = f"; {plan.filled} copies fill its short batches" if plan.filled else ""
    rest += f"; {plan.carried} of its samples go on to the next one" if plan.carried else ""
    lines.append(
        f"{first}: {plan.samples_per_epoch} samples in {plan.batches_per_epoch} batches, "
        f"{plan.updates_per_epoch} updates (accumulation {accumulated}){rest}"
    )
    epochs = f"{plan.epochs} epochs begun" if plan.varies else f"{plan.total_steps / plan.updates_per_epoch:.4g} epochs"
    warmup = f", warm-up over the first {plan.warmup_steps}" if plan.warmup_steps else ""
    lines.append(f"training: {plan.total_steps} updates, {epochs}{warmup}")
    rates = ", ".join(f"{role} {rate:g}" for role, rate in plan.rates.items())
    spec = find_optimizer(config.optimizer.optimizer_type)
    if rates and chooses_rate(spec, config.optimizer.optimizer_args):
        rates = f"{', '.join(plan.rates)}: {spec.name} chooses them while it trains"
    lines.append(f"learning rates: {rates or 'none above 0, nothing learns: a control run'}")
    lines += _describe_options(config)
    return "\n".join(lines)


def _describe_options(config: RunConfig) -> list[str]:
    """What changes what is trained and neither rates nor counts show."""
    network, full, lines = config.network, config.full, list[str]()
    if config.command == "train_network" and network.network_args:
        given = " ".join(f"{key}={value}" for key, value in network.network_args.items())
        lines.append(f"network: {network.network_module} {given}")
    if network.base_weights:
        strengths = [*network.base_weights_multiplier, *[1.0] * len(network.base_weights)]
        merged = (f"{path} ({strength:g})" for path, strength in zip(network.base_weights, strengths, strict=False))
        lines.append(f"merged into the model first: {', '.join(merged)}")
    if config.command == "train_db" and (full.stop_text_encoder_training or 0) > 0:
        lines.append(f"the text encoder learns for the first {full.stop_text_encoder_training} updates only")
    if full.block_lr is not None:
        lines.append(f"the U-Net's rates by block: {', '.join(f'{rate:g}' for rate in full.block_lr)}")
    if config.training.prior_preservation is not None:
        lines.append(f"kept as the base model has it: {config.training.class_prompt!r}")
    if config.ema.use_ema:
        lines.append(f"moving average with decay {config.ema.ema_decay:g}, saved as NAME-ema")
    return lines


def _describe_dataset(number: int, index: ImageIndex) -> list[str]:
    dataset = index.dataset
    width, height = dataset.resolution
    samples, reg = float(index.repeats.sum()), float(index.repeats[index.is_reg].sum())
    kinds = f" ({_number(samples - reg)} to learn, {_number(reg)} regularisation)" if reg else ""
    lines = [
        f"dataset {number}: {len(index)} images, {_number(samples)} samples an epoch{kinds}, {width}x{height}, "
        f"batch {dataset.batch_size}"
    ]
    for place, subset in enumerate(dataset.subsets):
        used = index.subset_of == place
        source = subset.metadata_file or subset.image_dir
        kind = (", regularisation" if subset.is_reg else "") + (", masked" if subset.masked else "")
        lines.append(f"  {source}: {int(used.sum())} images, {_number(float(index.repeats[used].sum()))} samples{kind}")
    loss, counts = crop_loss(index), samples_by_bucket(index)
    broken = index.bucket_of[index.repeats != np.floor(index.repeats)]
    for place, (bucket_width, bucket_height) in enumerate(index.buckets):
        lines.append(
            f"  bucket {bucket_width}x{bucket_height}: {_number(counts[place])} samples, {loss[place]:.1%} cut off"
            + _rest(counts[place], dataset, bool((broken == place).any()))
        )
    return lines


def _number(value: float) -> str:
    return str(round(value)) if abs(value - round(value)) < 1e-6 else f"{value:.2f}"


def samples_by_bucket(index: ImageIndex) -> list[float]:
    """Samples of an epoch in each bucket; a fraction is the mean over epochs."""
    counts: list[float] = np.bincount(index.bucket_of, index.repeats, minlength=len(index.buckets)).round(6).tolist()
    return counts


def crop_loss(index: ImageIndex) -> list[float]:
    """For each bucket, the mean share of the resized pictures that lies outside of it."""
    buckets = np.array(index.buckets, np.float64).prod(axis=1)[index.bucket_of]
    lost = 1 - buckets / index.resized.astype(np.float64).prod(axis=1)
    count = np.bincount(index.bucket_of, minlength=len(index.buckets))
    total = np.bincount(index.bucket_of, weights=lost, minlength=len(index.buckets))
    return [max(0.0, float(share)) for share in total / np.maximum(count, 1)]


def _rest(count: float, dataset: DatasetConfig, varies: bool) -> str:
    """What happens to the samples of a bucket that fill no batch; `varies`: their number differs between epochs."""
    rest = round(count) % dataset.batch_size
    if dataset.batch_size == 1 or not (rest or varies):
        return ""
    match dataset.bucket_policy:
        case "fill" if varies:
            return " (the last batch of an epoch is filled, weighted down)"
        case "carry" if varies:
            return " (what is left goes on to the next epoch)"
        case _ if varies:
            return " (the last batch of an epoch may be short)"
        case "fill":
            return f" ({dataset.batch_size - rest} more to fill the last batch, weighted down)"
        case "carry":
            return f" ({rest} go on to the next epoch)"
        case _:
            return f" (the last batch of an epoch has {rest})"


def outputs(prepared: Prepared) -> Outputs:
    """What the run will write, from where it stands to its end."""
    config, plan, names = prepared.config, prepared.plan, prepared.names
    saving = config.saving
    weights, size = sizes(prepared)
    start, total = prepared.progress.step, plan.total_steps
    ends = epoch_ends(prepared, epoch_interval(saving, plan.epochs))
    saves = []
    for update in sorted({*multiples(saving.save_every_n_steps, start, total), *ends, total}):
        stems = [names.at_step(update)] if _due(update, saving.save_every_n_steps) else []
        if ends.get(update, plan.epochs) < plan.epochs:
            stems.append(names.at_epoch(ends[update]))
        if update == total:
            stems.append(names.last)
        for stem in stems:
            last = update == total and stem == names.last
            state = saving.save_state or (last and saving.save_state_on_train_end)
            average = names.average(stem) if config.ema.use_ema else None
            saves.append(Save(names.model(stem), update, size, names.state(stem) if state else None, average))
    previews = _previews(prepared) if prepared.prompts else []
    # A state holds the weights and, for most optimizers, two more numbers for each, in float32; and the average.
    averages = int(config.ema.use_ema)
    models, states = _most_at_once(prepared, saves)
    models += int(config.validation.save_best)
    disk = None
    if size is not None and weights is not None:
        disk = models * (1 + averages) * size + states * weights * (12 + 4 * averages)
    cached = caches_latents(config) and config.dataset.cache_latents_to_disk
    return Outputs(
        saves=tuple(saves),
        previews=tuple(previews),
        pictures=len(previews) * len(prepared.prompts),
        most_models=models,
        most_states=states,
        disk_bytes=disk,
        cache_bytes=(sum(map(_latent_bytes, plan.indexes)) if cached else 0)
        + _text_bytes(prepared),
    )


def _most_at_once(prepared: Prepared, saves: Sequence[Save]) -> tuple[int, int]:
    """The most models and states of this run that lie on the disk together; old ones go when new ones are whole."""
    _, retention = save_rules(prepared.config.saving, prepared.plan.epochs)
    kept: dict[bool, list[Moment | None]] = {False: [], True: []}
    most = {False: 0, True: 0}
    for save in saves:
        moment = prepared.names.moment(save.path)
        for state in (False, True) if save.state is not None else (False,):
            kept[state].append(moment)
            most[state] = max(most[state], len(kept[state]))
        if moment is not None:
            for state, moments in kept.items():
                kept[state] = [one for one in moments if one is None or not retention.is_old(one, moment, state)]
    return most[False], most[True]


def sizes(prepared: Prepared) -> tuple[int, int] | tuple[None, None]:
    """Numbers that learn, and bytes of a saved file."""
    config, rates = prepared.config, prepared.plan.rates
    # `--debug_dataset` reads no model.
    if prepared.kind is None:
        return None, None
    if config.command == "train_textual_inversion":
        learned = word_numbers(config, prepared.kind)
        return learned, learned * _BYTES[config.saving.save_precision]
    parts, precision = read_model(model_request(config)), config.saving.save_precision
    if config.command in ("fine_tune", "train_db"):
        return model_sizes(parts, rates, None if precision is None else _BYTES[precision], config.full.block_lr)
    if config.network.network_module != "networks.lora":
        return None, None
    numbers = network_sizes(config, prepared.kind, parts)
    weights = sum(count for role, count in numbers.items() if role in rates)
    return weights, weights * _BYTES[precision]


def _latent_bytes(index: ImageIndex) -> int:
    cells = (np.array(index.buckets, np.int64) // LATENT_CELL).prod(axis=1)[index.bucket_of]
    flipped = np.array([1 + subset.flip_aug for subset in index.dataset.subsets])[index.subset_of]
    masked = np.array([subset.masked for subset in index.dataset.subsets], np.int64)[index.subset_of]
    rows = -(-cells * (_LATENT_NUMBERS + masked) * 4 // UNIT) * UNIT
    return int((rows * flipped).sum())


def _text_bytes(prepared: Prepared) -> int:
    """Of a caption for each image, or its variants, and the empty one; equal captions are kept once."""
    config, kind = prepared.config, prepared.kind
    if kind is None or not config.dataset.cache_text_encoder_outputs_to_disk:
        return 0
    captions = sum(map(len, prepared.plan.indexes)) * (config.dataset.cache_caption_variants or 1) + 1
    widths = sum(int(part["hidden_size"]) for role, part in kind.configs.items() if role.startswith("text_encoder"))
    return captions * (config.model.max_token_length or 75) // 75 * _TOKENS * widths * 4


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _previews(prepared: Prepared) -> list[int]:
    sampling, start = prepared.config.sampling, prepared.progress.step
    found = [0] if sampling.sample_at_first and start == 0 else []
    if sampling.sample_every_n_epochs is not None:
        return [*found, *epoch_ends(prepared, sampling.sample_every_n_epochs)]
    return [*found, *multiples(sampling.sample_every_n_steps, start, prepared.plan.total_steps)]


def describe_outputs(prepared: Prepared) -> str:
    """What will be written, in words."""
    written = outputs(prepared)
    files = "1 file" if len(written.saves) == 1 else f"{len(written.saves)} files"
    lines = [f"saves: {files} in {prepared.config.saving.output_dir}"]
    if prepared.resume is not None:
        lines.insert(0, f"goes on after update {prepared.progress.step}, from {prepared.resume}")
    elif prepared.progress.step:
        lines.insert(0, f"begins after update {prepared.progress.step}")
    for save in (*written.saves[:6], *written.saves[-1:]) if len(written.saves) > 7 else written.saves:
        size = "size not known before loading" if save.bytes is None else size_text(save.bytes)
        also = (", with state" if save.state else "") + (f", and {save.average.name}" if save.average else "")
        lines.append(f"  {save.path.name} after update {save.update}, {size}{also}")
    if len(written.saves) > 7:
        lines.insert(-1, f"  ... {len(written.saves) - 7} more")
    if prepared.prompts:
        lines.append(f"sample pictures: {written.pictures}, at {len(written.previews)} points of the training")
    lines += describe_validation(prepared)
    if (state := describe_state(prepared)) is not None:
        lines.append(state)
    if written.disk_bytes is not None:
        lines.append(f"disk: about {size_text(written.disk_bytes)} for models and states")
    if written.cache_bytes:
        lines.append(f"cache on disk: up to {size_text(written.cache_bytes)}, less what is there already")
    caches = [name for name, on in (("latents", caches_latents(prepared.config)), ("captions", caches_texts(
        prepared.config))) if on]
    if caches:
        lines.append(f"encoded once: {' and '.join(caches)}")
    return "\n".join(lines)


def size_text(count: int) -> str:
    """1234567 -> 1.23 MB."""
    value, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.3g} {unit}"


def disk_warnings(prepared: Prepared) -> list[str]:
    """What the folders that are written into will not take."""
    written, warnings = outputs(prepared), []
    needed = {"--output_dir": written.disk_bytes or 0, "--cache_dir": written.cache_bytes, "--logging_dir": 0}
    for folder, option in written_folders(prepared.config).items():
        place = nearest_folder(folder)
        if not os.access(place, os.W_OK):
            warnings.append(f"{option} = {folder}: nothing can be written to {place}; choose another folder")
        elif (free := shutil.disk_usage(place).free) < needed[option]:
            way_out = "; what does not fit is saved when there is room" if option == "--output_dir" else ""
            warnings.append(
                f"{option} = {folder}: {free / 1e9:.3g} GB are free and about {needed[option] / 1e9:.3g} GB are "
                f"needed{way_out}"
            )
    return warnings
