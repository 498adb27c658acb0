"""What the chosen optimizer makes of the rates and the schedule: the options as they will act."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sd_train.errors import ConfigError
from sd_train.optim.optimizers import chooses_rate, find_optimizer, needs_schedule

if TYPE_CHECKING:
    from sd_train.config.options import RunConfig
    from sd_train.optim.registry import OptimizerSpec

RATES = (
    "learning_rate", "unet_lr", "text_encoder_lr", "learning_rate_te", "learning_rate_te1", "learning_rate_te2",
    "block_lr",
)  # fmt: skip
"""Options that set a learning rate."""

NETWORK_RATES = (
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "loraplus_lr_ratio", "loraplus_unet_lr_ratio",
    "loraplus_text_encoder_lr_ratio",
)  # fmt: skip
"""`--network_args` that give parts of a network rates of their own."""


@dataclass(frozen=True)
class Settled:
    """A configuration that says all that the optimizer will do, and what the user should know of it."""

    config: RunConfig
    notes: tuple[str, ...]


def settle(config: RunConfig, rates: Mapping[str, float]) -> Settled:
    """Write out what the optimizer decides: AdaFactor's kind of rate, and that no schedule acts where none is used.

    Args:
        config: with an optimizer that exists.
        rates: learning rate by network role.

    Raises:
        ConfigError: for a warm-up from 0 where the optimizer cannot take it.
    """
    spec, notes = find_optimizer(config.optimizer.optimizer_type), list[str]()
    arguments = dict(config.optimizer.optimizer_args)
    if spec.name == "AdaFactor":
        arguments = _adafactor_arguments(config, arguments, notes)
    changes: dict[str, Any] = {"optimizer_args": arguments}
    if not needs_schedule(spec, arguments):
        changes |= _without_schedule(config, spec, notes)
    elif spec.needs_rate and config.optimizer.lr_warmup_steps:
        raise ConfigError(
            f"{_where(config, 'lr_warmup_steps')} = {config.optimizer.lr_warmup_steps}: {spec.name} divides by what "
            "its first update gives, and a warm-up begins at rate 0; leave the warm-up away, or choose DAdaptAdam"
        )
    if spec.one_rate:
        config = _with_one_rate(config, spec, rates, notes)
    return Settled(replace(config, optimizer=config.optimizer.model_copy(update=changes)), tuple(notes))


def _with_one_rate(config: RunConfig, spec: OptimizerSpec, rates: Mapping[str, float], notes: list[str]) -> RunConfig:
    """`config` with the first rate for every block that learns; which of several rates counts is noted."""
    blocks = tuple(rate for rate in config.full.block_lr or () if rate)
    if blocks:
        rates = {**rates, "unet": blocks[0]}
        own = tuple(blocks[0] if rate else 0.0 for rate in config.full.block_lr or ())
        config = replace(config, full=config.full.model_copy(update={"block_lr": own}))
    takes = f"{spec.name} takes one learning rate for all parameters"
    given = [*rates.items(), *(("a block", rate) for rate in blocks)]
    firsts = {rate: role for role, rate in reversed(given)}
    if len(firsts) > 1:
        shown = ", ".join(f"{firsts[rate]} {rate:.12g}" for rate in dict.fromkeys(rate for _, rate in given))
        notes.append(
            f"{takes}: of those given ({shown}) only the first one is effective, {given[0][1]:.12g} for all"
        )
    if apart := [name for name in NETWORK_RATES if name in config.network.network_args]:
        notes.append(
            f"{_where(config, 'network_args')}: {', '.join(apart)}: {takes}: they change no rate (blocks of weight 0 "
            "still get no modules)"
        )
    return config


def _adafactor_arguments(config: RunConfig, arguments: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """`arguments` with `relative_step` in them: a rate that was given counts, unless a relative step was asked for."""
    given = [name for name in RATES if config.origins.get(name, "default") != "default"]
    shown = ", ".join(f"{_where(config, name)} = {_value(config, name)}" for name in given)
    if "relative_step" not in arguments:
        scheduler = config.optimizer.lr_scheduler.lower().partition(":")[0]
        asked = scheduler == "adafactor" or bool(arguments.get("warmup_init", False))
        arguments = {**arguments, "relative_step": asked or not given}
        if given and not asked:
            notes.append(
                f"{shown}: AdaFactor goes by it; sd-scripts would put its own rate in this one's place, which "
                "--optimizer_args relative_step=True does here"
            )
    if given and chooses_rate(find_optimizer("AdaFactor"), arguments):
        notes.append(f"{shown} has no effect: with relative steps AdaFactor chooses its rate itself")
    return arguments


def _without_schedule(config: RunConfig, spec: OptimizerSpec, notes: list[str]) -> dict[str, Any]:
    """The options of the schedule at their defaults, which is the rate as given."""
    fields = type(config.optimizer).model_fields
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields.items()}
    names = [name for name in fields if name.startswith("lr_")]
    idle = [name for name in names if getattr(config.optimizer, name) != defaults[name]]
    # sd-scripts' name for AdaFactor's own rates.
    if spec.name == "AdaFactor" and config.optimizer.lr_scheduler.lower().startswith("adafactor"):
        idle.remove("lr_scheduler")
    if idle:
        shown = ", ".join(f"{_where(config, name)} = {_value(config, name)}" for name in idle)
        notes.append(f"{shown} has no effect: {spec.name} needs no schedule and warms up by its own arguments alone")
    return {name: defaults[name] for name in names}


def _value(config: RunConfig, name: str) -> object:
    group = next(group for group in vars(config).values() if hasattr(group, name))
    return getattr(group, name)


def _where(config: RunConfig, name: str) -> str:
    origin = config.origins.get(name, "default")
    return f"--{name}" if origin == "default" else origin if origin.startswith("--") else f"{origin}: {name}"
