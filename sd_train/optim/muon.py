"""Muon for the weights of layers with AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

TABLE = 10_000
"""A matrix with so many rows is a table of words, most of which have no gradient; its rows are no directions."""
_MUON = ("momentum", "nesterov", "ns_steps", "adjust_lr_fn", "weight_decay")


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for weights of layers and convolutions, `torch.optim.AdamW` for vectors and tables of words.

    Muon takes matrices: a convolution's weight is one with a row for each output (Jordan et al. 2024).
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
        self._weights: dict[torch.optim.Muon, list[torch.nn.Parameter]] = {}
        """Whose matrices each Muon steps."""
        for number, group in enumerate(self.param_groups):
            weights = [parameter for parameter in group["params"] if is_weight(parameter)]
            others = [parameter for parameter in group["params"] if not is_weight(parameter)]
            if weights:
                matrices = [torch.nn.Parameter(_as_matrix(weight.detach())) for weight in weights]
                muon = torch.optim.Muon(matrices, lr, **{name: group[name] for name in _MUON})
                self.parts.append((number, muon))
                self._weights[muon] = weights
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
            part.state = self._matrices_state(part) if isinstance(part, torch.optim.Muon) else self.state
            for own in part.param_groups:
                own["lr"], own["weight_decay"] = group["lr"], group["weight_decay"]
            part.step()
        return loss

    def _matrices_state(self, muon: torch.optim.Muon) -> defaultdict[torch.Tensor, Any]:
        """Point the matrices at the weights' memory and gradients; their state is the weights' own."""
        state: defaultdict[torch.Tensor, Any] = defaultdict(dict)
        for matrix, weight in zip(muon.param_groups[0]["params"], self._weights[muon], strict=True):
            # What the weights are may have been exchanged since the last step.
            matrix.data = _as_matrix(weight.detach())
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, weight)
            if weight.grad is not None:
                state[matrix] = self.state[weight]
        return state


def is_weight(parameter: torch.Tensor) -> bool:
    """Whether Muon steps a parameter."""
    return parameter.ndim > 1 and not (parameter.ndim == 2 and len(parameter) >= TABLE)


def _as_matrix(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """A view with a row for each output; the order of columns is `like`'s, and nothing to Muon."""
    laid = tensor if like is None else like
    if laid.ndim == 4 and not laid.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(len(tensor), -1) if like is not None else tensor.view(len(tensor), -1)
