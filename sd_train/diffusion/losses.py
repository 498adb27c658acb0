"""Losses, one value for each sample."""

from __future__ import annotations

from torch import Tensor


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """[B, ...], [B, ...] -> [B]: in float32, the mean over everything but the batch."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
