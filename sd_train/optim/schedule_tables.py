"""Schedulers that are classes of torch or another package: stepped on a small parameter into a table of factors."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sd_train.errors import ConfigError

_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
"""How such classes refuse their arguments."""


class FactorTable:
    """The factors that a scheduler gives, update after update; a lookup goes as far as it must.

    The scheduler works on one parameter group for each learning rate of the run, so that a class which sets rates of
    its own (`eta_min`, `max_lr`) is right where there is one rate, and refused where its factors are not the same for
    all.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], rates: Collection[float]) -> None:
        """Build the scheduler.

        Args:
            name: `module.Class`.
            rates: learning rates of the run above 0; none: 1.

        Raises:
            ConfigError: if there is no such class, it refuses `arguments`, or its rates do not depend on the update
                alone.
        """
        import torch

        self.name, self.arguments = name, arguments
        self.rates = sorted(set(rates), reverse=True) or [1.0]
        found = _find_class(name)
        self.optimizer = torch.optim.SGD(
            [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in self.rates]
        )
        before = self._other_values()
        with self._refusing():
            self.scheduler = found(self.optimizer, **arguments)
        self._check_step()
        self.optimizer.step()
        self.factors: list[float] = []
        self._note()
        if self._other_values() != before:
            raise ConfigError(
                f"--lr_scheduler_type = {name}: changes more of the optimizer than its learning rate, which is not "
                "done here; give --lr_scheduler_args cycle_momentum=False, or choose another one"
            )

    def factor(self, step: int) -> float:
        """Factor of the learning rate of update number `step`, from zero."""
        while len(self.factors) <= step:
            with self._refusing():
                self.scheduler.step()
            self._note()
        return self.factors[step]

    def _note(self) -> None:
        """Read the rates that the scheduler has set as one factor."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        factors = [now / rate for now, rate in zip(rates, self.rates, strict=True)]
        step = len(self.factors)
        if not all(math.isfinite(factor) and factor >= 0 for factor in factors):
            raise ConfigError(
                f"--lr_scheduler_type = {self.name}: gives the learning rate {rates[0]} at update {step + 1}; correct "
                "--lr_scheduler_args"
            )
        if any(not math.isclose(factor, factors[0], rel_tol=1e-6, abs_tol=1e-9) for factor in factors):
            shown = ", ".join(f"{now:.6g} in place of {rate:g}" for now, rate in zip(rates, self.rates, strict=True))
            raise ConfigError(
                f"--lr_scheduler_type = {self.name}: sets rates that are not the same factor of every learning rate "
                f"({shown} at update {step + 1}), and a schedule is one factor for all; give equal learning rates, or "
                "leave out arguments that are rates, such as eta_min and max_lr"
            )
        self.factors.append(factors[0])

    def _other_values(self) -> list[dict[str, object]]:
        """What stands in the groups beside the rate."""
        names = [name for name in self.optimizer.defaults if name != "lr"]
        return [{name: group[name] for name in names} for group in self.optimizer.param_groups]

    def _check_step(self) -> None:
        step = getattr(self.scheduler, "step", None)
        if not callable(step):
            raise ConfigError(f"--lr_scheduler_type = {self.name}: has no step(); name a class of schedulers")
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        asked = [
            name for name, item in inspect.signature(step).parameters.items()
            if item.default is item.empty and item.kind in kinds
        ]  # fmt: skip
        if asked:
            raise ConfigError(
                f"--lr_scheduler_type = {self.name}: asks for {', '.join(asked)} at every step, and a schedule depends "
                "on the number of the update alone, so that a resumed training goes on as it was; choose another one"
            )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What the class raises inside the block is a `ConfigError`; what it warns of is for those who step it."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except _FAILURES as problem:
            given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items()) or "nothing"
            accepted = ", ".join(list(inspect.signature(_find_class(self.name)).parameters)[1:]) or "no arguments"
            raise ConfigError(
                f"--lr_scheduler_args = {given}: {self.name} refuses them: {problem or type(problem).__name__}; it "
                f"takes {accepted}"
            ) from None


def _find_class(name: str) -> type[Any]:
    """Import `module.Class`.

    Raises:
        ConfigError: if there is no such module or class.
    """
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last, None)
    except (ImportError, ValueError) as problem:
        raise ConfigError(
            f"--lr_scheduler_type = {name}: the module {module} cannot be imported ({problem}); install its package, "
            "or correct the name"
        ) from None
    if not isinstance(found, type):
        raise ConfigError(
            f"--lr_scheduler_type = {name}: {module} has no class {last}; write module.Class, or the name of a class "
            "of torch.optim.lr_scheduler; the schedules of this trainer are chosen by --lr_scheduler"
        )
    return found
