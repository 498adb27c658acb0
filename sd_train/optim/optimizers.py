"""The registry of optimizers: frozen specs, imported when they are chosen."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sd_train.errors import ConfigError

if TYPE_CHECKING:
    import torch


_RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "params": "the trainer gives the parameters itself; remove it",
        "lr": "is not set here; give learning_rate, unet_lr or text_encoder_lr",
        "capturable": "is for CUDA graphs, which this trainer does not make; remove it",
        "differentiable": "is for gradients through the optimizer, which nothing here needs; remove it",
        "maximize": "would raise the loss instead of lowering it; remove it",
        "fsdp_in_use": "is for sharded parameters, and here every device holds all of them; remove it",
        "use_triton": "replaces the update by a kernel that is not tested here; remove it",
    }
)

_FAILURES = (
    AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, SystemExit, TypeError, ValueError,
)  # fmt: skip
"""How optimizer classes refuse values; lion-pytorch even ends the process."""


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that `--optimizer_type` can name."""

    name: str
    target: str
    """`module:Class`, imported on use."""
    description: str
    package: str | None = None
    """The package to install, where it is not one that is always there."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    reserved: Mapping[str, str] = field(default_factory=lambda: _RESERVED)
    """Arguments that `--optimizer_args` may not set, and why."""
    adapts_rate: bool = False
    """Estimates its own step size d; the learning rate is a factor of it, usually 1.0."""
    syncs: bool = False
    """Its own step waits for the device."""


_SPECS = (
    OptimizerSpec("AdamW", "torch.optim:AdamW", "Adam with decoupled weight decay (Loshchilov & Hutter 2019)",
                  defaults={"fused": True}),
    OptimizerSpec("Lion", "lion_pytorch:Lion", "sign momentum (Chen et al. 2023); use a third of AdamW's rate",
                  package="lion-pytorch"),
    OptimizerSpec("Prodigy", "prodigyopt:Prodigy", "Adam that estimates its rate (Mishchenko & Defazio 2023); rate 1.0",
                  package="prodigyopt", adapts_rate=True, syncs=True),
)  # fmt: skip

OPTIMIZERS: dict[str, OptimizerSpec] = {spec.name.lower(): spec for spec in _SPECS}


LATER = frozenset(
    [
        "adamw8bit", "pagedadamw", "pagedadamw8bit", "pagedadamw32bit", "lion8bit", "pagedlion8bit", "sgdnesterov",
        "sgdnesterov8bit", "dadaptation", "dadaptadam", "dadaptadagrad", "dadaptadan", "dadaptadanip", "dadaptlion",
        "dadaptsgd", "dadaptadampreprint", "adafactor", "adamwschedulefree", "sgdschedulefree", "radamschedulefree",
        "came", "muon",
    ]
)  # fmt: skip
"""Names of sd-scripts and others that are known and not there yet, in lower case."""


def check_optimizer(name: str) -> tuple[str, str] | None:
    """The rule that `--optimizer_type NAME` breaks and the way out; None if there is such an optimizer."""
    if (name or "AdamW").lower() in OPTIMIZERS:
        return None
    way_out = f"use one of {', '.join(known.name for known in OPTIMIZERS.values())}"
    if name.lower() in LATER:
        return "is not yet supported", way_out
    near = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=0.5)
    hint = f"did you mean {OPTIMIZERS[near[0]].name}? " if near else ""
    return "is not among the optimizers", hint + way_out


def find_optimizer(name: str) -> OptimizerSpec:
    """The spec that `--optimizer_type NAME` means, in any case; "" is AdamW.

    Raises:
        ConfigError: names the nearest one.
    """
    if (wrong := check_optimizer(name)) is not None:
        raise ConfigError(f"--optimizer_type = {name!r}: {wrong[0]}; {wrong[1]}")
    return OPTIMIZERS[(name or "AdamW").lower()]


def optimizer_class(spec: OptimizerSpec) -> type[torch.optim.Optimizer]:
    """Import the class of `spec`.

    Raises:
        ConfigError: with the install line, if its package is missing.
    """
    module, _, name = spec.target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError as problem:
        raise ConfigError(
            f"--optimizer_type = {spec.name!r}: needs the package {spec.package} ({problem}); "
            f"pip install {spec.package}"
        ) from None
    assert isinstance(found, type)
    return found


def accepted_arguments(spec: OptimizerSpec) -> tuple[str, ...]:
    """What `--optimizer_args` may set, in the order of the class's signature."""
    names = inspect.signature(optimizer_class(spec)).parameters
    return tuple(name for name in names if name not in spec.reserved)


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Find out before anything is loaded whether the optimizer takes `arguments`, by a step on a small parameter.

    Raises:
        ConfigError: as `make_optimizer`, and for a value that only the step refuses.
    """
    import torch

    parameter = torch.nn.Parameter(torch.full((2, 3), 0.5))
    optimizer = make_optimizer(name, [{"params": [parameter], "lr": 1.0}], arguments)
    parameter.grad = torch.full_like(parameter, 0.1)
    with _refusing(find_optimizer(name), arguments):
        optimizer.step()
        if not parameter.isfinite().all():
            raise ValueError("the first step gives values that are not finite")


def check_rates(name: str, rates: Mapping[str, float]) -> None:
    """Refuse unlike learning rates for an optimizer that estimates one rate for all parameters.

    Args:
        rates: rate by network role ("unet", "text_encoder"); those that are 0 learn nothing and do not count.

    Raises:
        ConfigError: with the flags and their rates.
    """
    spec = find_optimizer(name)
    used = {role: rate for role, rate in rates.items() if rate != 0}
    if spec.adapts_rate and len(set(used.values())) > 1:
        shown = ", ".join(f"--{role}_lr = {rate:.12g}" for role, rate in used.items())
        raise ConfigError(f"{shown}: {spec.name} takes one learning rate for all; give equal rates")


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer over `groups` (each with "params" and "lr").

    Raises:
        ConfigError: for an unknown name, an unknown or reserved argument (naming the accepted ones), or a value that
            the class refuses.
    """
    spec = find_optimizer(name)
    found = optimizer_class(spec)
    _check_names(spec, arguments)
    _check_switches(spec, arguments)
    values: dict[str, Any] = {**spec.defaults, **arguments}
    if values.get("foreach"):
        values.pop("fused", None)
    # Every group has its own rate; Lion's decoupled weight decay also asks for the first one, which must be above 0.
    rates = [float(group["lr"]) for group in groups if group["lr"] > 0]
    if rates:
        values["lr"] = rates[0]
    with _refusing(spec, arguments):
        return found([dict(group) for group in groups], **values)


def _check_names(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> None:
    known = inspect.signature(optimizer_class(spec)).parameters
    for key in arguments:
        if key in spec.reserved and key in known:
            raise ConfigError(f"--optimizer_args = {key}: {spec.reserved[key]}")
    accepted = accepted_arguments(spec)
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        raise ConfigError(
            f"--optimizer_args = {', '.join(unknown)}: {spec.name} takes no such argument; "
            f"it accepts {', '.join(accepted)}"
        )


def _check_switches(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> None:
    """Classes take any value as true where they expect a switch: `fused=abc` would switch it on."""
    parameters = inspect.signature(optimizer_class(spec)).parameters
    for key, value in arguments.items():
        default = spec.defaults.get(key, parameters[key].default)
        # `foreach: bool | None = None` is a switch too.
        switch = isinstance(default, bool) or "bool" in str(parameters[key].annotation)
        if switch and not isinstance(value, bool) and (value is not None or isinstance(default, bool)):
            raise ConfigError(
                f"--optimizer_args = {key}={value!r}: {spec.name} takes True or False here; write {key}=True"
            )


@contextlib.contextmanager
def _refusing(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> Iterator[None]:
    """What the class raises inside the block is a `ConfigError`; what it prints is kept back."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except _FAILURES as problem:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = str(problem) or type(problem).__name__
        raise ConfigError(
            f"--optimizer_args = {given}: {spec.name} refuses them: {reason}; correct the value"
        ) from None
