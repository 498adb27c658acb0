"""What is allowed and probably not meant."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sd_train.data.augment import face_in_name
from sd_train.names import step_of
from sd_train.optim.optimizers import find_optimizer
from sd_train.plan import Prepared
from sd_train.plan_data import unused_fallbacks
from sd_train.plan_full import idle_rates
from sd_train.plan_network import network_warnings
from sd_train.plan_objective import objective_warnings
from sd_train.plan_optimizer import idle_eight_bit
from sd_train.plan_outputs import epoch_interval
from sd_train.plan_validation import validation_warnings
from sd_train.plan_words import word_warnings


def plan_warnings(prepared: Prepared) -> list[str]:
    """What is allowed and probably not meant."""
    config, plan = prepared.config, prepared.plan
    warnings = [text for dataset in plan.datasets for text in dataset.warnings]
    warnings += [text for index in plan.indexes for text in index.warnings]
    warnings += unused_fallbacks(config, plan.datasets)
    subsets = [subset for dataset in plan.datasets for subset in dataset.subsets]
    given = {name for name, origin in config.origins.items() if origin != "default"}
    kept = any(subset.is_reg for subset in subsets) or config.training.prior_preservation is not None
    if config.training.prior_loss_weight != 1 and not kept:
        warnings.append("--prior_loss_weight has no effect: no subset has is_reg = true")
    if config.ema.sample_ema and config.ema.use_ema and not prepared.prompts:
        warnings.append("--sample_ema has no effect: no sample pictures are made")
    if config.dataset.masked_loss and not any(subset.masked for subset in subsets):
        warnings.append("--masked_loss has no effect: no subset has conditioning_data_dir or alpha_mask")
    warnings += _idle_in_data(prepared)
    warnings += word_warnings(config, plan.indexes, prepared.prompts, plan.total_steps)
    warnings += validation_warnings(prepared)
    for name in ("save_every_n_steps", "sample_every_n_steps"):
        every = getattr(config.saving if name.startswith("save") else config.sampling, name)
        if every is not None and every > plan.total_steps:
            warnings.append(f"--{name} = {every} has no effect: the training has {plan.total_steps} updates")
    warnings += _epoch_intervals(prepared)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != config.training.mixed_precision and "mixed_precision" not in given and launched != "no":
        warnings.append(
            f"accelerate was told mixed precision {launched}; as in sd-scripts only --mixed_precision counts, "
            f"which is {config.training.mixed_precision}"
        )
    if prepared.kind is not None and prepared.kind.family.startswith("sdxl") and config.model.clip_skip == 1:
        warnings.append("--clip_skip = 1 has no effect: SDXL takes the last layer but one, as with 2")
    warnings += [*prepared.notes, *idle_eight_bit(prepared)]
    warnings += idle_rates(config, prepared.kind, plan.total_steps)
    warnings += network_warnings(config, prepared.kind)
    if prepared.kind is not None:
        warnings += objective_warnings(config, prepared.kind)
    spec = find_optimizer(config.optimizer.optimizer_type)
    if spec.schedule_free and config.ema.use_ema:
        warnings.append(
            f"--use_ema: {spec.name} averages the weights itself, and its files hold that average; NAME-ema is one of "
            "the weights that it steps from"
        )
    if spec.adapts_rate and plan.rates and max(plan.rates.values()) <= 0.1:
        warnings.append(f"{spec.name} estimates the rate itself and multiplies it with yours; 1.0 is recommended")
    warnings += prepared.start.notes
    if prepared.resume is not None:
        later = [path.name for path in prepared.names.existing() if step_of(path) > prepared.progress.step]
        if later:
            shown = ", ".join(later[:4])
            warnings.append(f"{shown}: saved at later steps than this run goes on from; it replaces what it gets to")
    return warnings


def _idle_in_data(prepared: Prepared) -> list[str]:
    """Options of subsets that none of their images or captions calls for."""
    warnings = []
    for index in prepared.plan.indexes:
        for number, subset in enumerate(index.dataset.subsets):
            rows = np.flatnonzero(index.subset_of == number).tolist()
            divider, faces = subset.keep_tokens_separator, subset.face_crop_aug_range
            if divider and len(rows) and not any(divider in index.captions[row] for row in rows):
                warnings.append(f"{subset.origin}: keep_tokens_separator = {divider!r} stands in no caption")
            if faces is not None and not index.dataset.enable_bucket and len(rows):
                stems = (Path(index.keys[row]).stem for row in rows)
                sizes = map(tuple, index.sizes[rows].tolist())
                if not any(face_in_name(stem, size) for stem, size in zip(stems, sizes, strict=True)):
                    warnings.append(
                        f"{subset.origin}: face_crop_aug_range has no effect: no file name ends in the place of a face "
                        "(NAME_x_y_w_h: centre and size in pixels)"
                    )
    return warnings


def _epoch_intervals(prepared: Prepared) -> list[str]:
    """Intervals in epochs that come due never, or after an epoch that has no update."""
    config, plan, updates = prepared.config, prepared.plan, prepared.updates
    given = {"save_every_n_epochs": epoch_interval(config.saving, plan.epochs)}
    if prepared.prompts:
        given["sample_every_n_epochs"] = config.sampling.sample_every_n_epochs
    if plan.validation:
        given["validate_every_n_epochs"] = config.validation.validate_every_n_epochs
    warnings = []
    for name, every in given.items():
        if every is None:
            continue
        due = range(every, plan.epochs + 1, every)
        empty = [] if updates.order.constant else [epoch for epoch in due if not updates.updates_in(epoch - 1)]
        if not due:
            warnings.append(f"--{name} = {every} has no effect: the training has {plan.epochs} epochs")
        elif empty:
            warnings.append(
                f"--{name} = {every}: nothing comes after {len(empty)} of its {len(due)} epochs, the first is number "
                f"{empty[0]}: they complete no batch; give it in steps, or raise num_repeats"
            )
    return warnings
