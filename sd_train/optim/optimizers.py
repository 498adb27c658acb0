"""Optimizers by name: found, checked and made as their specs say."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sd_train.errors import ConfigError
from sd_train.optim.registry import REFUSED, RESERVED, SPECS, OptimizerSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OPTIMIZERS: dict[str, OptimizerSpec] = {spec.name.lower(): spec for spec in SPECS}


def _all_names() -> dict[str, OptimizerSpec]:
    """Every way to write a spec's name, in lower case: its own, its aliases, and where its class lies."""
    names = {alias.lower(): spec for spec in SPECS for alias in spec.aliases}
    for spec in reversed(SPECS):
        # SGD is torch.optim.SGD, and SGDNesterov the same with other defaults.
        names[spec.target.replace(":", ".").lower()] = OPTIMIZERS.get(spec.target.partition(":")[2].lower(), spec)
    return {**names, **OPTIMIZERS}


_NAMES = _all_names()

_FAILURES = (
    AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, SystemExit, TypeError, ValueError,
)  # fmt: skip
"""How optimizer classes refuse values; lion-pytorch even ends the process."""

_TRIAL_STEPS = 8
"""RAdam's first five do not use all of its arguments."""


def check_optimizer(name: str) -> tuple[str, str] | None:
    """The rule that `--optimizer_type NAME` breaks and the way out; None if there may be such an optimizer."""
    wanted = (name or "AdamW").lower()
    listed = f"use one of {', '.join(known.name for known in SPECS)}, or a class as package.module.Class"
    if wanted in _NAMES:
        return None
    if (reason := REFUSED.get(wanted.removeprefix("torch.optim."))) is not None:
        return reason, listed
    parts = name.split(".")
    if len(parts) > 1 and all(part.isidentifier() for part in parts):
        return None
    near = difflib.get_close_matches(wanted, _NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {_NAMES[near[0]].name}? " if near else ""
    return "is not among the optimizers", hint + listed


def find_optimizer(name: str) -> OptimizerSpec:
    """The spec that `--optimizer_type NAME` means, in any case; "" is AdamW. A class that no spec has gets one.

    Raises:
        ConfigError: names the nearest one.
    """
    if (wrong := check_optimizer(name)) is not None:
        raise ConfigError(f"--optimizer_type = {name!r}: {wrong[0]}; {wrong[1]}")
    wanted = (name or "AdamW").lower()
    if wanted in _NAMES:
        return _NAMES[wanted]
    module, _, kind = name.rpartition(".")
    return OptimizerSpec(name, f"{module}:{kind}", "a class of your own choice", None, package=module.partition(".")[0])


def is_installed(spec: OptimizerSpec) -> bool:
    """Whether the package of `spec` is there, without importing it."""
    return importlib.util.find_spec(spec.target.partition(":")[0].partition(".")[0]) is not None


def optimizer_class(spec: OptimizerSpec) -> type[torch.optim.Optimizer]:
    """Import the class of `spec`.

    Raises:
        ConfigError: if its package is missing (with the install line), too old, or holds something else by that name.
    """
    import torch

    module, _, name = spec.target.partition(":")
    where = f"--optimizer_type = {spec.name!r}"
    try:
        # bitsandbytes tells of kernels for large language models.
        with _quiet():
            found = getattr(importlib.import_module(module), name, None)
    except ImportError as problem:
        install = "" if spec.accepts is None else f"; pip install {spec.package or 'torch'}"
        raise ConfigError(f"{where}: needs the package {spec.package or 'torch'} ({problem}){install}") from None
    except Exception as problem:
        raise ConfigError(f"{where}: {module} cannot be imported ({type(problem).__name__}: {problem})") from None
    if found is None:
        raise ConfigError(
            f"{where}: {module} has no {name}; check the name, or install a newer {spec.package or 'torch'}"
        )
    if not isinstance(found, type) or not issubclass(found, torch.optim.Optimizer):
        raise ConfigError(f"{where}: is no torch.optim.Optimizer; name a class of one")
    return found


def accepted_arguments(spec: OptimizerSpec) -> tuple[str, ...]:
    """What `--optimizer_args` may set, in the order of the class's signature."""
    if spec.accepts is not None:
        return spec.accepts
    parameters = inspect.signature(optimizer_class(spec)).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(one.name for one in parameters if one.kind not in variable and one.name not in RESERVED)


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Find out before anything is loaded whether the optimizer takes `arguments`, by steps on small parameters.

    Raises:
        ConfigError: as `make_optimizer`, and for a value that only a step refuses.
    """
    import torch

    spec = find_optimizer(name)
    parameters = [torch.nn.Parameter(torch.full(shape, 0.5)) for shape in ((2, 3), (4,))]
    optimizer = make_optimizer(name, [{"params": parameters, "lr": 1.0}], arguments)
    with _refusing(spec, arguments):
        for _ in range(_TRIAL_STEPS):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1)
            optimizer.step()
        if not all(parameter.isfinite().all() for parameter in parameters):
            raise ValueError("the first steps give values that are not finite")


def shared_rates(name: str, rates: Mapping[str, float]) -> dict[str, float]:
    """The learning rate of each network as the optimizer takes them: one that takes a single rate uses the first for
    all."""
    if not rates or not find_optimizer(name).one_rate:
        return dict(rates)
    return dict.fromkeys(rates, next(iter(rates.values())))


def make_optimizer(
    name: str, groups: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer over `groups` (each with "params" and "lr"), ready for a step.

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
    if chooses_rate(spec, arguments):
        values.update(lr=None, relative_step=True)
    # Every group has its own rate; Lion's decoupled weight decay also asks for the first one, which must be above 0.
    elif rates := [float(group["lr"]) for group in groups if group["lr"] > 0]:
        values["lr"] = rates[0]
    # ASGD draws weights to zero by an argument of its own, which a group without weight decay must not have either.
    undecayed = {"lambd": 0.0} if spec.name == "ASGD" else {}
    chosen = [{**group, **(undecayed if group.get("weight_decay") == 0 else {})} for group in groups]
    with _refusing(spec, arguments):
        optimizer = found(chosen, **values)
        if callable(train := getattr(optimizer, "train", None)):
            train()
        return optimizer


def chooses_rate(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> bool:
    """Whether the optimizer goes by a rate of its own, whatever its groups have: AdaFactor's relative steps."""
    if spec.name != "AdaFactor":
        return False
    return bool(arguments.get("relative_step", True))


def needs_schedule(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> bool:
    """Whether `--lr_scheduler` means anything to the optimizer."""
    averages = spec.schedule_free and arguments.get("use_schedulefree", True)
    return not averages and not chooses_rate(spec, arguments)


def eight_bit_numbers(
    name: str, arguments: Mapping[str, Any], sizes: Iterable[int]
) -> tuple[int, int] | None:
    """How many of all trained numbers have state of 8 bits, and how many there are; None: it has no such state.

    `sizes`: numbers in each trained tensor. Small tensors keep state of 32 bits.
    """
    spec = find_optimizer(name)
    if not spec.eight_bit:
        return None
    counts = list(sizes)
    least = smallest_eight_bit(arguments)
    return sum(count for count in counts if count >= least), sum(counts)


def smallest_eight_bit(arguments: Mapping[str, Any]) -> int:
    """Numbers in the smallest tensor that bitsandbytes keeps state of 8 bits for."""
    least = arguments.get("min_8bit_size", 4096)
    return least if isinstance(least, int) else 4096


def rate_figures(optimizer: torch.optim.Optimizer) -> dict[str, float | Tensor]:
    """The step sizes that the optimizer found by itself, by name: `lr/d*lr/group0` as in sd-scripts."""
    figures: dict[str, float | Tensor] = {}
    for place, group in enumerate(optimizer.param_groups):
        if "d" in group:
            figures[f"lr/d*lr/group{place}"] = group["d"] * group["lr"]
        elif group.get("relative_step") is True:
            taken = max((int(optimizer.state[parameter].get("step", 0)) for parameter in group["params"]), default=0)
            most = 1e-6 * taken if group["warmup_init"] else 1e-2
            figures[f"lr/relative/group{place}"] = min(most, taken**-0.5) if taken else 0.0
    return figures


def _check_names(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> None:
    known = inspect.signature(optimizer_class(spec)).parameters
    for key in arguments:
        if key in RESERVED and key in known:
            raise ConfigError(f"--optimizer_args = {key}: {RESERVED[key]}")
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
        if key not in parameters:
            continue  # An older package: the class itself refuses it.
        default = spec.defaults.get(key, parameters[key].default)
        # `foreach: bool | None = None` is a switch too.
        switch = isinstance(default, bool) or "bool" in str(parameters[key].annotation)
        if switch and not isinstance(value, bool) and (value is not None or isinstance(default, bool)):
            raise ConfigError(
                f"--optimizer_args = {key}={value!r}: {spec.name} takes True or False here; write {key}=True"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries print, log or warn of inside the block is kept back."""
    before = logging.root.manager.disable
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _refusing(spec: OptimizerSpec, arguments: Mapping[str, Any]) -> Iterator[None]:
    """What the class raises inside the block is a `ConfigError`; what it says is kept back."""
    try:
        with _quiet():
            yield
    except _FAILURES as problem:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = str(problem) or type(problem).__name__
        if not arguments:
            raise ConfigError(
                f"--optimizer_type = {spec.name!r}: fails: {reason}; install a newer {spec.package or 'torch'}, or "
                "choose another one"
            ) from None
        raise ConfigError(
            f"--optimizer_args = {given}: {spec.name} refuses them: {reason}; correct the value"
        ) from None
