"""The plan for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sd_train.data.captions import sample_caption
from sd_train.data.images import sample_view
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.plan import Prepared
from sd_train.plan_report import crop_loss, disk_warnings, outputs, samples_by_bucket
from sd_train.plan_validation import validation_json
from sd_train.plan_warnings import plan_warnings


def plan_json(prepared: Prepared) -> dict[str, Any]:
    """The plan for machines. Sizes are [width, height] in pixels; `crop_top_left` is in the resized image."""
    config, plan, written = prepared.config, prepared.plan, outputs(prepared)
    return {
        "command": config.command,
        "model": config.model.pretrained_model_name_or_path,
        "seed": prepared.progress.seed,
        "start_step": prepared.progress.step,
        "datasets": [_dataset_json(prepared, number) for number in range(len(plan.indexes))],
        **validation_json(prepared),
        "samples_per_epoch": plan.samples_per_epoch,
        "batches_per_epoch": plan.batches_per_epoch,
        "updates_per_epoch": plan.updates_per_epoch,
        "filled_in_first_epoch": plan.filled,
        "carried_after_first_epoch": plan.carried,
        "epochs_vary": plan.varies,
        "total_updates": plan.total_steps,
        "epochs": plan.epochs,
        "warmup_updates": plan.warmup_steps,
        "learning_rates": plan.rates,
        "checkpoints": [
            {
                "path": str(save.path), "update": save.update, "bytes": save.bytes,
                "state": None if save.state is None else str(save.state),
                "average": None if save.average is None else str(save.average),
            }
            for save in written.saves
        ],
        "samples": {"after_updates": list(written.previews), "pictures": written.pictures},
        "disk_bytes": written.disk_bytes,
        "cache_bytes": written.cache_bytes,
        "warnings": [*plan_warnings(prepared), *disk_warnings(prepared)],
    }  # fmt: skip


def _options(settings: DatasetConfig | SubsetConfig, without: Sequence[str]) -> dict[str, Any]:
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in without}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _dataset_json(prepared: Prepared, number: int) -> dict[str, Any]:
    index = prepared.plan.indexes[number]
    batches = prepared.updates.order.batches_by_bucket(number, 0).tolist()
    loss, counts = crop_loss(index), samples_by_bucket(index)
    images = np.bincount(index.bucket_of, minlength=len(index.buckets)).tolist()
    return {
        **_options(index.dataset, ("subsets", "warnings")),
        "subsets": [_options(subset, ()) for subset in index.dataset.subsets],
        "num_train_images": index.num_train_images,
        "num_reg_images": index.num_reg_images,
        "images": [_image_json(prepared, index, row) for row in range(len(index))],
        "buckets": [
            {
                "resolution": list(bucket), "images": images[place], "samples": _whole(counts[place]),
                "batches": batches[place], "crop_loss": round(loss[place], 6),
            }
            for place, bucket in enumerate(index.buckets)
        ],
    }  # fmt: skip


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _image_json(prepared: Prepared, index: ImageIndex, row: int) -> dict[str, Any]:
    """One image, as its first sample of the first epoch shows it."""
    seed, plan = prepared.progress.seed, prepared.plan
    record = index.record(row)
    view = sample_view(record, seed, 0, 0)
    variants = prepared.updates.settings.caption_variants
    repeats = float(index.repeats[row])
    return {
        "path": str(record.path),
        "size": list(record.size),
        "bucket": list(record.bucket),
        "resized": list(view.resized),
        "crop_top_left": [view.crop[1], view.crop[0]],
        "flipped": view.flip,
        "repeats": _whole(repeats),
        "is_reg": record.is_reg,
        "weight": record.weight,
        "subset": int(index.subset_of[row]),
        "captions": [sample_caption(record, seed, 0, 0, 0, plan.total_steps, variants)],
    }
