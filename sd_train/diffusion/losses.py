"""Losses and weights: small pure functions with the papers' symbols."""

from __future__ import annotations

from torch import Tensor


def mean_squared_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, ...] twice -> [B] in float32: the mean over each sample (Ho et al. 2020, eq. 14).

    `mask` [B, rows, columns] weights the places of each sample. The mean stays over all of them, as in sd-scripts
    (`apply_masked_loss`): a small mask gives a small loss.
    """
    squares = (prediction.float() - target.float()).square()
    if mask is not None:
        squares = squares * mask.float().unsqueeze(1)
    return squares.flatten(1).mean(1)
