"""The registry of optimizers: frozen specs, imported when they are chosen."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sd_train.errors import ConfigError

if TYPE_CHECKING:
    import torch


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
    reserved: frozenset[str] = frozenset({"params", "lr"})
    """Arguments that `--optimizer_args` may not set."""
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


def find_optimizer(name: str) -> OptimizerSpec:
    """The spec that `--optimizer_type NAME` means, in any case; "" is AdamW.

    Raises:
        ConfigError: names the nearest one.
    """
    spec = OPTIMIZERS.get((name or "AdamW").lower())
    if spec is None:
        names = [known.name for known in OPTIMIZERS.values()]
        near = difflib.get_close_matches(name.lower(), OPTIMIZERS, n=1, cutoff=0.5)
        hint = f"did you mean {OPTIMIZERS[near[0]].name}? " if near else ""
        raise ConfigError(
            f"--optimizer_type = {name!r}: is not among the optimizers; {hint}use one of {', '.join(names)}"
        )
    return spec


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
    """Find out before anything is loaded whether the optimizer takes `arguments`.

    Raises:
        ConfigError: as `make_optimizer`.
    """
    import torch

    make_optimizer(name, [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], arguments)


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer over `groups` (each with "params" and "lr").

    Raises:
        ConfigError: for an unknown name or argument (naming the accepted ones), or a value that the class refuses.
    """
    spec = find_optimizer(name)
    accepted = accepted_arguments(spec)
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        raise ConfigError(
            f"--optimizer_args = {', '.join(unknown)}: {spec.name} takes no such argument; "
            f"it accepts {', '.join(accepted)}"
        )
    values = {**spec.defaults, **arguments}
    if values.get("foreach") or values.get("differentiable"):
        values.pop("fused", None)
    try:
        return optimizer_class(spec)([dict(group) for group in groups], **values)
    except (TypeError, ValueError) as problem:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ConfigError(
            f"--optimizer_args = {given}: {spec.name} refuses them: {problem}; correct the value"
        ) from None
