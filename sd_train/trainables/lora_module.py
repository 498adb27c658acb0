"""One LoRA module: the low-rank change of one linear layer or convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd_train.randomness import derive


@dataclass
class Switches:
    """What all modules of one LoRA share at run time."""

    enabled: bool = True
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    key: tuple[int, int] = (0, 0)
    """(update, micro-batch): dropout masks are drawn from these."""
    rows: tuple[int, int, int] | None = None
    """Of a part of a micro-batch: its first sample, its samples and those of the whole; None: it is whole."""


class LoraModule(nn.Module):
    """Adds a low-rank change to one linear layer or convolution by taking the place of its `forward`."""

    def __init__(self, name: str, original: nn.Module, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.name, self.rank, self.alpha, self.seed = name, rank, alpha, seed
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(derive(seed, "lora", name) % 2**63)
        if isinstance(original, nn.Conv2d):
            down = torch.empty(rank, original.in_channels, *original.kernel_size)
            up = torch.zeros(original.out_channels, rank, 1, 1)
        else:
            assert isinstance(original, nn.Linear)
            down = torch.empty(rank, original.in_features)
            up = torch.zeros(original.out_features, rank)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = original.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(up.to(device))
        self._forward = original.forward
        self._stride = original.stride if isinstance(original, nn.Conv2d) else None
        self._padding = original.padding if isinstance(original, nn.Conv2d) else None

    def install(self, original: nn.Module, switches: Switches) -> None:
        """Take over `original.forward`."""
        self._switches = switches
        # Not by assignment: a module registers what is assigned to it, and its state dict would change.
        original.__dict__["forward"] = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The original output plus the scaled low-rank change."""
        base = self.base(x)
        if not self._switches.enabled or self._left_out():
            return base
        low = self.cast(x)
        if self._stride is None:
            return self.add(base, functional.linear(low, self.down))
        assert self._padding is not None
        return self.add(base, functional.conv2d(low, self.down, stride=self._stride, padding=self._padding))

    def base(self, x: Tensor) -> Tensor:
        """The original output."""
        output: Tensor = self._forward(x)
        return output

    @property
    def stackable(self) -> bool:
        """Whether the product with `down` may be computed elsewhere: always, and of every module, but when some are
        switched off."""
        return self._switches.enabled and not self._switches.module_dropout

    def cast(self, x: Tensor) -> Tensor:
        """`x` for the product with `down`."""
        # Under autocast the operators cast the float32 factors themselves; a half-precision base without it needs this.
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.dtype)

    def add(self, base: Tensor, hidden: Tensor, scale: float | None = None) -> Tensor:
        """`base` and what `hidden`, the product of the input with `down`, changes of it; `scale`: in place of its own,
        where the product has it already."""
        scale = self.scale if scale is None else scale
        if self._switches.dropout:
            hidden = hidden * self._mask("dropout", hidden.shape, self._switches.dropout, hidden)
        if self._switches.rank_dropout:
            # [batch, 1, rank], [batch, rank] or [batch, rank, 1, 1]: the rank is last but for convolutions.
            middle = [1] * (hidden.ndim - 2)
            shape = [len(hidden), *middle, self.rank] if self._stride is None else [len(hidden), self.rank, *middle]
            hidden = hidden * self._mask("rank dropout", shape, self._switches.rank_dropout, hidden)
        if self._stride is not None:
            return torch.add(base, functional.conv2d(hidden, self.up).to(base.dtype), alpha=scale)
        if hidden.dtype != base.dtype:
            return torch.add(base, functional.linear(hidden, self.up).to(base.dtype), alpha=scale)
        # Product, scale and sum at once.
        rows = torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), self.up.t(), alpha=scale)
        return rows.view_as(base)

    def _drawn_from(self, purpose: str) -> int:
        # Anew from the counters at every call: a forward that is recomputed (checkpointing) draws the same.
        return derive(self.seed, purpose, self.name, *self._switches.key)

    def _left_out(self) -> bool:
        share = self._switches.module_dropout
        return bool(share) and self._drawn_from("module dropout") < share * 2**64

    def _mask(self, purpose: str, shape: Sequence[int], share: float, like: Tensor) -> Tensor:
        """0 with probability `share`, else what keeps the mean."""
        generator = torch.Generator(like.device).manual_seed(self._drawn_from(purpose) % 2**63)
        keep, whole, part = 1.0 - share, shape[0], slice(None)
        if self._switches.rows is not None:
            # A part has the masks that its samples have in the whole; each has as many rows (chunks of a long caption).
            first, count, samples = self._switches.rows
            each = shape[0] // count
            whole, part = samples * each, slice(first * each, (first + count) * each)
        drawn = torch.rand((whole, *shape[1:]), generator=generator, device=like.device)[part]
        return (drawn < keep).to(like.dtype) / keep
