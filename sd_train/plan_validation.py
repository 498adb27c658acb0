"""Validations of a training: when they come, what they write, what of their options is wrong or idle."""

from __future__ import annotations

from typing import Any

from sd_train.config.objective_options import ValidationOptions
from sd_train.plan import Prepared
from sd_train.plan_points import epoch_ends, multiples


def epoch_interval(chosen: ValidationOptions) -> int | None:
    """Epochs between validations: one where no interval is given; None: they do not count."""
    neither = chosen.validate_every_n_steps is None and chosen.validate_every_n_epochs is None
    return 1 if neither else chosen.validate_every_n_epochs


def validation_points(prepared: Prepared) -> list[int]:
    """Updates after which the run validates; 0 is before the first."""
    chosen, start, end = prepared.config.validation, prepared.progress.step, prepared.plan.total_steps
    if not prepared.plan.validation:
        return []
    steps = multiples(chosen.validate_every_n_steps, start, end)
    first = {0} if start == 0 else set[int]()
    return sorted({*first, *steps, *epoch_ends(prepared, epoch_interval(chosen)), end})


def validation_warnings(prepared: Prepared) -> list[str]:
    """Options without effect."""
    config, total = prepared.config, prepared.plan.total_steps
    given = [name for name in ValidationOptions.model_fields if config.origins.get(name, "default") != "default"]
    if not prepared.plan.validation:
        idle = [name for name in given if getattr(config.validation, name)]
        return [f"--{name} has no effect: no images are kept for validation (validation_split)" for name in idle]
    every = config.validation.validate_every_n_steps
    if every is not None and every > total:
        return [f"--validate_every_n_steps = {every}: the training has {total} updates; it validates before the first "
                "and after the last"]
    return []


def describe_validation(prepared: Prepared) -> list[str]:
    """What validation does, in words; nothing without images for it."""
    chosen, points = prepared.config.validation, validation_points(prepared)
    if not points:
        return []
    lines = [f"validations: {len(points)}, each image at {chosen.validation_timesteps} timesteps"]
    if chosen.validation_patience is not None:
        lines[0] += f"; the training ends after {chosen.validation_patience} in a row without a new lowest loss"
    if chosen.save_best:
        names = prepared.names
        also = f" and {names.average(names.best).name}" if prepared.config.ema.use_ema else ""
        lines.append(f"  {names.model(names.best).name}{also} whenever the validation loss is a new lowest")
    return lines


def validation_json(prepared: Prepared) -> dict[str, Any]:
    """The same for machines."""
    config, names = prepared.config, prepared.names
    best = names.model(names.best) if config.validation.save_best else None
    average = names.average(names.best) if best is not None and config.ema.use_ema else None
    return {
        "validation": [
            {"origin": index.dataset.origin, "images": [str(index.path(row)) for row in range(len(index))]}
            for index in prepared.plan.validation
        ],
        "validations": {
            "after_updates": validation_points(prepared),
            "best": None if best is None else str(best),
            "best_average": None if average is None else str(average),
        },
    }
