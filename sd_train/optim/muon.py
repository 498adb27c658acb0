"""Muon for matrices with AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

_MUON = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn", "weight_decay")


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for 2-D parameters, `torch.optim.AdamW` for those with fewer or more dimensions.

    Groups are those that are given, each with parameters of both kinds; their state is one, so that it is saved as that
    of any other optimizer. One rate serves both: with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025) a step of
    Muon has the size of one of AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """
        Args:
            params: parameters or groups of them.
            lr: learning rate of both.
            weight_decay: decoupled, of both.
            momentum: of Muon.
            nesterov: whether its step looks ahead along the momentum.
            ns_steps: iterations that make the momentum orthogonal.
            adjust_lr_fn: how its rate depends on the matrix's shape: `match_rms_adamw` or `original`.
            betas: of AdamW.
        """
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn, "betas": betas,
        }  # fmt: skip
        super().__init__(params, defaults)
        self.parts: list[tuple[int, torch.optim.Optimizer]] = []
        """Number of the group and the optimizer of some of its parameters."""
        for number, group in enumerate(self.param_groups):
            matrices = [parameter for parameter in group["params"] if parameter.ndim == 2]
            others = [parameter for parameter in group["params"] if parameter.ndim != 2]
            if matrices:
                self.parts.append((number, torch.optim.Muon(matrices, lr, **{name: group[name] for name in _MUON})))
            if others:
                adam = torch.optim.AdamW(others, lr, betas, weight_decay=group["weight_decay"])
                self.parts.append((number, adam))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, part in self.parts:
            group = self.param_groups[number]
            # Loading replaces both the state and the groups.
            part.state = self.state
            for own in part.param_groups:
                own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
            part.step()
        return loss
