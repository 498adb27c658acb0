"""What the run will do, as data, known before step 1 and before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd_train.config.options import RunConfig
from sd_train.data.batches import Updates
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig
from sd_train.types import Progress


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


def describe(plan: Plan, config: RunConfig) -> str:
    """The plan in words, a line each."""
    lines = []
    for number, (dataset, index) in enumerate(zip(plan.datasets, plan.indexes, strict=True)):
        width, height = dataset.resolution
        lines.append(
            f"dataset {number}: {len(index)} images ({index.num_train_images} with repeats, "
            f"{index.num_reg_images} regularisation), {width}x{height}, batch {dataset.batch_size}"
        )
        for (bucket_width, bucket_height), count in zip(index.buckets, index.bucket_counts(), strict=True):
            if count:
                lines.append(f"  bucket {bucket_width}x{bucket_height}: {count} samples" + _rest(count, dataset))
    accumulated = config.training.gradient_accumulation_steps
    lines.append(
        f"an epoch: {plan.samples_per_epoch} samples in {plan.batches_per_epoch} batches, "
        f"{plan.updates_per_epoch} updates (accumulation {accumulated})"
    )
    lines.append(f"training: {plan.total_steps} updates, {plan.epochs} epochs begun")
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
            place = f"update {update.step + 1}, batch {batch.micro + 1} of its {updates.per_update}"
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
