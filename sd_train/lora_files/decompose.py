"""Low-rank factors of a change by singular value decomposition, and which rank is enough."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sd_train.lora_files.adapter import DOWN, UP, Adapter, fitting, without_mid
from sd_train.lora_files.names import Place

Method = Literal["sv_ratio", "sv_fro", "sv_cumulative"]

_ZERO = 1e-6
"""A largest singular value up to this is nothing (sd-scripts)."""


@dataclass(frozen=True)
class RankRule:
    """How many ranks a module gets."""

    rank: int
    """Of linear layers and 1x1 convolutions; with a method, the most."""
    conv_rank: int
    """Of larger convolutions."""
    method: Method | None = None
    """None: always `rank`."""
    target: float = 0.0
    """sv_ratio: largest / smallest singular value kept; sv_fro, sv_cumulative: share of the norm, or sum, kept."""

    def choose(self, values: Tensor, conv: bool) -> int:
        """The rank for singular `values` in descending order; at least 1.

        sd-scripts' rules (networks/resize_lora.py): sv_ratio keeps values above largest / target; sv_fro the fewest
        whose squares reach target^2 of the whole; sv_cumulative the fewest whose sum reaches target of the whole.
        """
        most = min(self.conv_rank if conv else self.rank, len(values))
        if float(values[0]) <= _ZERO:
            return 1
        if self.method == "sv_ratio":
            wanted = int((values > values[0] / self.target).sum())
        elif self.method == "sv_fro":
            wanted = _first_reaching(values.square(), self.target**2)
        elif self.method == "sv_cumulative":
            wanted = _first_reaching(values, self.target)
        else:
            wanted = most
        return max(1, min(wanted, most))


def _first_reaching(values: Tensor, target: float) -> int:
    shares = values.double().cumsum(0) / values.double().sum()
    # A sum of shares may end a little below 1.
    return int((shares < target - 1e-9).sum()) + 1


@dataclass(frozen=True)
class Decomposition:
    """A module's new factors, and how much of the change they keep."""

    adapter: Adapter
    kept: float
    """Frobenius norm of what is kept / of the whole; 1 where there was nothing."""


def decompose(place: Place, change: Tensor, rule: RankRule, clamp_quantile: float | None = None) -> Decomposition:
    """Factors of `change`, [out, in, ...]; alpha is the rank.

    Args:
        place: the module.
        change: of the weight, on the device that is to do the work.
        rule: which rank.
        clamp_quantile: cut off the factors' largest elements (sd-scripts' extraction); None: keep them.
    """
    flat = change.float().flatten(1)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    return _cut(place, (left, values, right), change.shape, rule, 1.0, clamp_quantile)


def resize(adapter: Adapter, rule: RankRule, device: torch.device) -> Decomposition:
    """The factors of a plain LoRA module at another rank; alpha / rank stays (sd-scripts' resize_lora).

    The singular values are those of up @ down, without alpha / rank, as there.

    Raises:
        ModelError: if the factors do not fit one another.
    """
    plain = without_mid(adapter)
    up, down = (plain.factors[name].float().to(device) for name in (UP, DOWN))
    # With up = Qu Ru and down^T = Qd Rd, those of Ru Rd^T are the product's: a small matrix.
    left, left_rest = torch.linalg.qr(up.flatten(1))
    right, right_rest = torch.linalg.qr(down.flatten(1).T)
    with fitting(adapter):
        inner = left_rest @ right_rest.T
    inner_left, values, inner_right = torch.linalg.svd(inner)
    factors = (left @ inner_left, values, inner_right @ right.T)
    shape = torch.Size((up.shape[0], *down.shape[1:]))
    return _cut(adapter.place, factors, shape, rule, adapter.scale, None)


def _cut(
    place: Place,
    factors: tuple[Tensor, Tensor, Tensor],
    shape: torch.Size,
    rule: RankRule,
    scale: float,
    clamp_quantile: float | None,
) -> Decomposition:
    left, values, right = factors
    rank = rule.choose(values, shape[2:].numel() > 1)
    up, down = left[:, :rank] * values[:rank], right[:rank]
    if clamp_quantile is not None:
        largest = _quantile(torch.cat([up.flatten(), down.flatten()]), clamp_quantile)
        up, down = up.clamp(-largest, largest), down.clamp(-largest, largest)
    total = float(values.double().norm())
    kept = float(values[:rank].double().norm()) / total if total > 0 else 1.0
    tensors = {
        UP: up.reshape(shape[0], rank, *[1] * (len(shape) - 2)).cpu().contiguous(),
        DOWN: down.reshape(rank, *shape[1:]).cpu().contiguous(),
    }
    return Decomposition(Adapter(place, "lora", tensors, rank * scale), kept)


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch.quantile, which refuses more than 16 million values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
