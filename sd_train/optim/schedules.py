"""The registry of learning-rate schedules: pure functions of the update, equal to diffusers' curves."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

from sd_train.errors import ConfigError


@dataclass(frozen=True)
class ScheduleSpec:
    """One schedule that `--lr_scheduler` can name."""

    name: str
    description: str
    factor: Callable[[int, int, int], float]
    """(update, warm-up updates, total updates) -> factor of the learning rate."""
    warms_up: bool = True
    """Whether `--lr_warmup_steps` means anything to it."""


def _warmup(step: int, warmup: int) -> float:
    return step / max(1, warmup)


def _constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def _constant_with_warmup(step: int, warmup: int, total: int) -> float:
    return _warmup(step, warmup) if step < warmup else 1.0


def _linear(step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return _warmup(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def _cosine(step: int, warmup: int, total: int) -> float:
    """Half a cosine (Loshchilov & Hutter 2017, one cycle)."""
    if step < warmup:
        return _warmup(step, warmup)
    done = (step - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


_SPECS = (
    ScheduleSpec("constant", "the rate as given", _constant, warms_up=False),
    ScheduleSpec("constant_with_warmup", "rises from 0, then stays", _constant_with_warmup),
    ScheduleSpec("linear", "rises from 0, then falls to 0 in a straight line", _linear),
    ScheduleSpec("cosine", "rises from 0, then falls to 0 along half a cosine", _cosine),
)

SCHEDULES: dict[str, ScheduleSpec] = {spec.name: spec for spec in _SPECS}


LATER = frozenset(
    [
        "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "inverse_sqrt", "warmup_stable_decay",
        "piecewise_constant", "adafactor", "rex",
    ]
)  # fmt: skip
"""Names of sd-scripts and others that are known and not there yet."""


def check_schedule(name: str) -> tuple[str, str] | None:
    """The rule that `--lr_scheduler NAME` breaks and the way out; None if there is such a schedule."""
    if name.lower() in SCHEDULES:
        return None
    way_out = f"use one of {', '.join(SCHEDULES)}"
    if name.lower() in LATER:
        return "is not yet supported", way_out
    near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.5)
    return "is not among the schedules", (f"did you mean {near[0]}? " if near else "") + way_out


def find_schedule(name: str) -> ScheduleSpec:
    """The spec that `--lr_scheduler NAME` means, in any case.

    Raises:
        ConfigError: names the nearest one.
    """
    if (wrong := check_schedule(name)) is not None:
        raise ConfigError(f"--lr_scheduler = {name!r}: {wrong[0]}; {wrong[1]}")
    return SCHEDULES[name.lower()]


@dataclass(frozen=True)
class Schedule:
    """A schedule with its numbers filled in."""

    spec: ScheduleSpec
    warmup_steps: int
    total_steps: int

    def factor(self, step: int) -> float:
        """Factor of the learning rate of update number `step`, from zero; the end is absolute, also after a resume."""
        return self.spec.factor(step, self.warmup_steps, self.total_steps)


def make_schedule(name: str, warmup: int | float, total_steps: int) -> Schedule:
    """`warmup` is a number of updates, or below 1 a fraction of `total_steps` (sd-scripts' `int_or_float`).

    Raises:
        ConfigError: for an unknown name, for warm-up where the schedule has none, or longer than the training.
    """
    spec = find_schedule(name)
    steps = int(warmup * total_steps) if isinstance(warmup, float) else warmup
    if steps and not spec.warms_up:
        raise ConfigError(
            f"--lr_warmup_steps = {warmup}: {spec.name} has no warm-up; use --lr_scheduler constant_with_warmup, or 0"
        )
    if steps > total_steps:
        raise ConfigError(
            f"--lr_warmup_steps = {warmup}: is longer than the training ({total_steps} updates); use fewer"
        )
    return Schedule(spec, steps, total_steps)
