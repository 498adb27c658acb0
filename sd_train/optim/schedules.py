"""The registry of learning-rate schedules: pure functions of the update."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from sd_train.config.schedule_rules import SCHEDULE_USES, check_schedule_options, schedule_key, scheduler_class
from sd_train.config.training_options import OptimizerOptions
from sd_train.errors import ConfigError, Problems
from sd_train.optim import schedule_curves as curves
from sd_train.optim.schedule_curves import Numbers

_TRIED = 1_000_000
"""Updates over which a scheduler of another package is stepped before the training begins."""


@dataclass(frozen=True)
class ScheduleSpec:
    """One schedule that `--lr_scheduler` can name."""

    name: str
    description: str
    factor: Callable[[int, Numbers], float]
    """(update from zero, numbers) -> factor of the learning rate."""

    @property
    def warms_up(self) -> bool:
        """Whether `--lr_warmup_steps` means anything to it."""
        return "lr_warmup_steps" in SCHEDULE_USES[self.name].options


_SPECS = (
    ScheduleSpec("constant", "the rate as given", curves.constant),
    ScheduleSpec("constant_with_warmup", "rises from 0, then stays", curves.constant_with_warmup),
    ScheduleSpec("linear", "rises from 0, then falls to 0 in a straight line", curves.linear),
    ScheduleSpec("cosine", "rises from 0, then falls to 0 along half a cosine", curves.cosine),
    ScheduleSpec("cosine_with_restarts", "falls to 0 along half a cosine several times", curves.cosine_with_restarts),
    ScheduleSpec("cosine_with_min_lr", "falls to a share of the rate along half a cosine", curves.cosine),
    ScheduleSpec("polynomial", "falls to 1e-7 with a power of what is left", curves.polynomial),
    ScheduleSpec("inverse_sqrt", "falls with the root of the updates, without an end", curves.inverse_sqrt),
    ScheduleSpec("warmup_stable_decay", "rises, stays, falls over the last updates", curves.warmup_stable_decay),
    ScheduleSpec("piecewise_constant", "steps that are written out", curves.piecewise_constant),
    ScheduleSpec("adafactor", "the rate that Adafactor finds itself; nothing is changed", curves.constant),
    ScheduleSpec("rex", "falls to 0, late and faster and faster", curves.rex),
)

SCHEDULES: dict[str, ScheduleSpec] = {spec.name: spec for spec in _SPECS}


@dataclass(frozen=True)
class ScheduleOptions:
    """What a schedule is made of: options by their own names, and the rates that it is a factor of."""

    lr_scheduler: str = "constant"
    lr_scheduler_type: str = ""
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)
    lr_warmup_steps: int | float = 0
    lr_decay_steps: int | float = 0
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
    optimizer_type: str = "AdamW"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates above 0 by network role; absolute rates (`lr_end`, `min_lr`) are meant of the largest one."""

    @classmethod
    def of(cls, options: OptimizerOptions, rates: Mapping[str, float]) -> ScheduleOptions:
        """The options of a run whose networks learn at `rates`."""
        names = [item.name for item in fields(cls) if item.name != "rates"]
        return cls(rates=rates, **{name: getattr(options, name) for name in names})


def check_schedule(name: str) -> tuple[str, str] | None:
    """The rule that `--lr_scheduler NAME` breaks and the way out; None if there may be such a schedule."""
    if schedule_key(name) in SCHEDULES:
        return None
    way_out = f"use one of {', '.join(SCHEDULES)}, or a class as module.Class"
    if name.lower() in ("reduce_lr_on_plateau", "greedy"):
        return "depends on the loss, and a schedule on the number of the update alone", way_out
    if "." in name:
        whole = all(part.isidentifier() for part in name.split("."))
        return None if whole else ("is no module.Class", way_out)
    near = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.5)
    return "is not among the schedules", (f"did you mean {near[0]}? " if near else "") + way_out


def find_schedule(name: str) -> ScheduleSpec:
    """The spec that `--lr_scheduler NAME` means, in any case.

    Raises:
        ConfigError: names the nearest one.
    """
    if (wrong := check_schedule(name)) is not None:
        raise ConfigError(f"--lr_scheduler = {name!r}: {wrong[0]}; {wrong[1]}")
    return SCHEDULES[schedule_key(name)]


@dataclass(frozen=True)
class Schedule:
    """A schedule with its numbers filled in."""

    name: str
    """As in the registry, or `module.Class`."""
    curve: Callable[[int], float]
    warmup_steps: int
    decay_steps: int
    """Updates at the end in which `warmup_stable_decay` decays."""
    total_steps: int

    def factor(self, step: int) -> float:
        """Factor of the learning rate of update number `step`, from zero; the end is absolute, also after a resume."""
        return self.curve(step)


def make_schedule(options: ScheduleOptions, total_steps: int) -> Schedule:
    """The schedule of a training of `total_steps` updates; shares of it are rounded down, as in sd-scripts.

    Raises:
        ConfigError: for an unknown name, options that the schedule ignores or lacks, values that it cannot take, and
            warm-up and decay longer than the training.
    """
    _refuse_options(options)
    if (name := scheduler_class(vars(options))) is not None:
        from sd_train.optim.schedule_tables import FactorTable

        table = FactorTable(name, options.lr_scheduler_args, options.rates.values())
        table.factor(min(total_steps, _TRIED) - 1)
        return Schedule(name, table.factor, 0, 0, total_steps)
    spec = find_schedule(options.lr_scheduler)
    warmup, decay = (_steps(value, total_steps) for value in (options.lr_warmup_steps, options.lr_decay_steps))
    if warmup > total_steps:
        raise ConfigError(
            f"--lr_warmup_steps = {options.lr_warmup_steps}: is longer than the training ({total_steps} updates); use "
            "fewer"
        )
    if warmup + decay > total_steps:
        raise ConfigError(
            f"--lr_decay_steps = {options.lr_decay_steps}: with the warm-up that is {warmup + decay} updates, longer "
            f"than the training ({total_steps} updates); use fewer"
        )
    numbers = _numbers(spec.name, options, warmup, decay, total_steps)
    return Schedule(spec.name, partial(_factor_at, spec, numbers), warmup, decay, total_steps)


def check_schedule_values(options: ScheduleOptions) -> None:
    """Find out whether the schedule takes its arguments while the length of the training is not known yet.

    Raises:
        ConfigError: as `make_schedule`.
    """
    _refuse_options(options)
    if (name := scheduler_class(vars(options))) is not None:
        from sd_train.optim.schedule_tables import FactorTable

        FactorTable(name, options.lr_scheduler_args, options.rates.values())
    else:
        _numbers(find_schedule(options.lr_scheduler).name, options, 0, 0, 1)


def _refuse_options(options: ScheduleOptions) -> None:
    problems = Problems()
    check_schedule_options(vars(options), lambda name: f"--{name}", problems, [])
    problems.raise_if_any(ConfigError)


def _factor_at(spec: ScheduleSpec, numbers: Numbers, step: int) -> float:
    return spec.factor(step, numbers)


def _steps(value: int | float, total_steps: int) -> int:
    return int(value * total_steps) if isinstance(value, float) else value


def _numbers(name: str, options: ScheduleOptions, warmup: int, decay: int, total: int) -> Numbers:
    arguments, numbers = options.lr_scheduler_args, partial(Numbers, warmup, total)
    match name:
        case "cosine":
            return numbers(cycles=_number(arguments, "num_cycles", 0.5))
        case "cosine_with_restarts":
            return numbers(cycles=options.lr_scheduler_num_cycles)
        case "cosine_with_min_lr":
            least = options.lr_scheduler_min_lr_ratio
            return numbers(
                # As in sd-scripts: a cycle of this option goes down only, and two of them also up again.
                cycles=options.lr_scheduler_num_cycles / 2,
                least=_share(options, "min_lr", _number(arguments, "min_lr", 0.0)) if least is None else least,
            )
        case "polynomial":
            end = _share(options, "lr_end", _number(arguments, "lr_end", 1e-7))
            return numbers(power=options.lr_scheduler_power, least=end)
        case "inverse_sqrt":
            return numbers(timescale=options.lr_scheduler_timescale or warmup or 10_000)
        case "warmup_stable_decay":
            return numbers(
                decay=decay,
                cycles=options.lr_scheduler_num_cycles / 2,
                least=options.lr_scheduler_min_lr_ratio or 0.0,
                warmup_type=_shape(arguments, "warmup_type", "linear"),
                decay_type=_shape(arguments, "decay_type", "cosine"),
            )
        case "piecewise_constant":
            pieces, last = read_step_rules(str(arguments["step_rules"]))
            return numbers(pieces=pieces, last=last)
        case "adafactor":
            return numbers(last=_initial_factor(options))
        case _:
            return numbers()


def _number(arguments: Mapping[str, Any], name: str, default: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ConfigError(
            f"--lr_scheduler_args = {name}={value}: must be a number from 0 on; write for example {name}={default:g}"
        )
    return float(value)


def _shape(arguments: Mapping[str, Any], name: str, default: str) -> str:
    value = arguments.get(name, default)
    shapes = ("linear", "cosine", "1-sqrt")
    if value not in shapes:
        raise ConfigError(f"--lr_scheduler_args = {name}={value}: must be one of {', '.join(shapes)}; correct it")
    return str(value)


def _share(options: ScheduleOptions, name: str, rate: float) -> float:
    """The factor that leads to `rate`; 0 where nothing learns."""
    base = max(options.rates.values(), default=0.0)
    if base and rate >= base:
        raise ConfigError(
            f"--lr_scheduler_args = {name}={rate:g}: is not below the learning rate, {base:g}; give a smaller one, for "
            f"example {name}=0"
        )
    return rate / base if base else 0.0


def _initial_factor(options: ScheduleOptions) -> float:
    """`adafactor:LR` -> the factor whose rate is LR. Adafactor does not look at it; it is what is logged."""
    _, colon, rate = options.lr_scheduler.partition(":")
    base = max(options.rates.values(), default=0.0)
    return float(rate) / base if colon and base else 1.0


def read_step_rules(text: str) -> tuple[tuple[tuple[int, float], ...], float]:
    """`1:100,0.1:200,0.01` -> ((100, 1.0), (200, 0.1)), 0.01: factors up to an update, and the last one.

    Raises:
        ConfigError: naming the part that cannot be read.
    """
    *parts, last = text.split(",")
    pieces: dict[int, float] = {}
    try:
        for part in parts:
            factor, until = part.split(":")
            if int(until) in pieces or int(until) < 1:
                raise ValueError
            pieces[int(until)] = _factor(factor)
        part = last
        return tuple(sorted(pieces.items())), _factor(last)
    except ValueError:
        raise ConfigError(
            f"--lr_scheduler_args = step_rules={text}: {part.strip()!r} is not factor:update, with an update of its "
            "own, nor the factor at the end; write for example step_rules='1:100,0.1:200,0.01'"
        ) from None


def _factor(text: str) -> float:
    factor = float(text)
    if not math.isfinite(factor) or factor < 0:
        raise ValueError
    return factor
