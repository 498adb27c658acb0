"""Which learning-rate schedule uses which options, and what is wrong between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sd_train.errors import Problems


@dataclass(frozen=True)
class Uses:
    """What one schedule reads."""

    options: tuple[str, ...] = ()
    """Beside `lr_scheduler_args`."""
    arguments: tuple[str, ...] | None = ()
    """Names in `lr_scheduler_args`; None: those of a class that is not ours."""


_WARMUP, _CYCLES, _LEAST = "lr_warmup_steps", "lr_scheduler_num_cycles", "lr_scheduler_min_lr_ratio"

SCHEDULE_USES: Mapping[str, Uses] = MappingProxyType(
    {
        "constant": Uses(),
        "constant_with_warmup": Uses((_WARMUP,)),
        "linear": Uses((_WARMUP,)),
        "cosine": Uses((_WARMUP,), ("num_cycles",)),
        "cosine_with_restarts": Uses((_WARMUP, _CYCLES)),
        "cosine_with_min_lr": Uses((_WARMUP, _CYCLES, _LEAST), ("min_lr",)),
        "polynomial": Uses((_WARMUP, "lr_scheduler_power"), ("lr_end",)),
        "inverse_sqrt": Uses((_WARMUP, "lr_scheduler_timescale")),
        "warmup_stable_decay": Uses((_WARMUP, "lr_decay_steps", _CYCLES, _LEAST), ("warmup_type", "decay_type")),
        "piecewise_constant": Uses((), ("step_rules",)),
        "adafactor": Uses(),
        "rex": Uses((_WARMUP,)),
    }
)
_CLASS = Uses((), None)
"""A class of torch or another package: all that it is told stands in `lr_scheduler_args`."""

_NOT_GIVEN: Mapping[str, object] = MappingProxyType(
    {
        "lr_warmup_steps": 0,
        "lr_decay_steps": 0,
        "lr_scheduler_num_cycles": 1,
        "lr_scheduler_power": 1.0,
        "lr_scheduler_timescale": None,
        "lr_scheduler_min_lr_ratio": None,
    }
)
"""The defaults, which kohya_ss writes with every schedule."""

SCHEDULE_OPTIONS = (
    "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", *_NOT_GIVEN, "optimizer_type", "optimizer_args",
)  # fmt: skip
"""Every option that `check_schedule_options` looks at."""

_ADAFACTOR = ("adafactor", "transformers.adafactor", "transformers.optimization.adafactor")
"""Names of the optimizer that finds its rates itself; torch's of the same name does not."""

_OWN_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "num_cycles": "lr_scheduler_num_cycles",
        "power": "lr_scheduler_power",
        "timescale": "lr_scheduler_timescale",
        "min_lr_rate": "lr_scheduler_min_lr_ratio",
        "min_lr_ratio": "lr_scheduler_min_lr_ratio",
        "num_warmup_steps": "lr_warmup_steps",
        "num_decay_steps": "lr_decay_steps",
    }
)
"""Arguments of the libraries' functions that have options here, as in sd-scripts."""


def scheduler_class(values: Mapping[str, Any]) -> str | None:
    """The `module.Class` that the options ask for; None if it is one of our schedules.

    A class without a module is one of `torch.optim.lr_scheduler`, as in sd-scripts.
    """
    name: str = values["lr_scheduler_type"] or values["lr_scheduler"]
    if values["lr_scheduler_type"] and "." not in name:
        return f"torch.optim.lr_scheduler.{name}"
    return name if "." in name and not name.lower().startswith("adafactor:") else None


def schedule_key(lr_scheduler: str) -> str:
    """The key of `--lr_scheduler` in the tables of schedules: `adafactor:1e-4` -> `adafactor`."""
    key = lr_scheduler.lower()
    return "adafactor" if key.startswith("adafactor:") else key


def check_schedule_options(
    values: Mapping[str, Any], where: Callable[[str], str], problems: Problems, warnings: list[str]
) -> None:
    """Add what the chosen schedule ignores or lacks to `problems`; a schedule that does not exist is not looked at.

    Args:
        values: of all options in `SCHEDULE_OPTIONS`.
        where: the place of an option for a message.
    """
    name = scheduler_class(values)
    uses = _CLASS if name is not None else SCHEDULE_USES.get(schedule_key(values["lr_scheduler"]))
    if uses is None:
        return
    if values["lr_scheduler_type"] and values["lr_scheduler"] != "constant":
        warnings.append(f"{where('lr_scheduler')} has no effect: lr_scheduler_type is given, as in sd-scripts")
    name = name or schedule_key(values["lr_scheduler"])
    for option, not_given in _NOT_GIVEN.items():
        if option not in uses.options and values[option] != not_given:
            users = [user for user, used in SCHEDULE_USES.items() if option in used.options]
            way_out = f"remove it, or choose as lr_scheduler one that does: {', '.join(users)}"
            problems.add(where(option), values[option], f"{name} does not use it", way_out)
    _arguments(name, uses, values, where, problems)
    _needs(name, values, where, problems)
    if name == "adafactor":
        _adafactor(values, where, problems)


def _arguments(
    name: str, uses: Uses, values: Mapping[str, Any], where: Callable[[str], str], problems: Problems
) -> None:
    for argument, value in values["lr_scheduler_args"].items() if uses.arguments is not None else ():
        assert uses.arguments is not None
        if argument in uses.arguments:
            continue
        option = _OWN_OPTIONS.get(argument)
        if option in uses.options:
            way_out = f"give it as {option}"
        elif uses.arguments:
            way_out = f"it takes {', '.join(uses.arguments)}; remove this"
        else:
            way_out = "remove it"
        problems.add(where("lr_scheduler_args"), f"{argument}={value}", f"{name} takes no such argument", way_out)


def _needs(name: str, values: Mapping[str, Any], where: Callable[[str], str], problems: Problems) -> None:
    """What a schedule cannot do without, and what excludes each other."""
    arguments, least = values["lr_scheduler_args"], values[_LEAST]
    if name == "cosine_with_min_lr" and least is None and "min_lr" not in arguments:
        way_out = f"give the share of the learning rate that it ends at as {_LEAST} = 0.1"
        problems.add(where("lr_scheduler"), name, f"needs {_LEAST}", way_out)
    elif name == "cosine_with_min_lr" and least is not None and "min_lr" in arguments:
        rule = f"says the same as {_LEAST} = {least}"
        problems.add(where("lr_scheduler_args"), f"min_lr={arguments['min_lr']}", rule, "remove one of the two")
    elif name == "warmup_stable_decay" and values["lr_decay_steps"] == 0:
        way_out = "give the updates of the decay as lr_decay_steps, or choose constant_with_warmup"
        problems.add(where("lr_scheduler"), name, "needs lr_decay_steps: it would never decay", way_out)
    elif name == "warmup_stable_decay" and values[_CYCLES] != 1 and arguments.get("decay_type", "cosine") != "cosine":
        rule = f"a decay of the type {arguments['decay_type']} has no cycles"
        problems.add(where(_CYCLES), values[_CYCLES], rule, "remove it, or write decay_type=cosine")
    elif name == "piecewise_constant" and "step_rules" not in arguments:
        way_out = "write lr_scheduler_args = [\"step_rules='1:100,0.1:200,0.01'\"] for the rate as given up to update "
        way_out += "100, a tenth of it up to update 200, then a hundredth"
        problems.add(where("lr_scheduler"), name, "needs step_rules among lr_scheduler_args", way_out)


def _adafactor(values: Mapping[str, Any], where: Callable[[str], str], problems: Problems) -> None:
    """The schedule stands for the rates that the optimizer finds by itself."""
    _, colon, rate = values["lr_scheduler"].partition(":")
    if colon and not _is_rate(rate):
        way_out = "write adafactor or, for example, adafactor:1e-4"
        problems.add(where("lr_scheduler"), values["lr_scheduler"], "no number stands behind the colon", way_out)
    if values["optimizer_type"].lower() not in _ADAFACTOR:
        rule = f"belongs to optimizer_type Adafactor, and {values['optimizer_type'] or 'AdamW'} needs a schedule"
        problems.add(where("lr_scheduler"), values["lr_scheduler"], rule, "write lr_scheduler = constant")
    elif values["optimizer_args"].get("relative_step", True) is False:
        rule = "stands for the rates that Adafactor finds itself, and relative_step=False switches that off"
        problems.add(where("lr_scheduler"), values["lr_scheduler"], rule, "write lr_scheduler = constant")


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < float("inf")
    except ValueError:
        return False
