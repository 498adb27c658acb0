"""How far a prediction is from its target: small pure functions with the papers' symbols."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sd_train.diffusion.schedule import NoiseSchedule

LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]


@dataclass(frozen=True)
class LossSettings:
    """Which distance is taken at each place."""

    kind: LossType = "l2"
    huber_schedule: HuberSchedule = "snr"
    """How the threshold c of the two Huber losses depends on the timestep."""
    huber_c: float = 0.1
    huber_scale: float = 1.0
    """Factor of c; the schedule "snr" has none, as in sd-scripts."""


def huber_thresholds(settings: LossSettings, schedule: NoiseSchedule) -> Tensor:
    """[T]: c of every timestep (sd-scripts' `get_huber_threshold_if_needed`).

    constant: c. exponential: c^(t / T), from 1 down to c. snr: (1 - c) / (1 + sigma_t)^2 + c with
    sigma_t^2 = (1 - abar_t) / abar_t, c where nothing of the picture is left.
    """
    abar, c = schedule.alphas_cumprod, settings.huber_c
    match settings.huber_schedule:
        case "constant":
            return torch.full_like(abar, c * settings.huber_scale)
        case "exponential":
            t = torch.arange(len(abar), device=abar.device, dtype=abar.dtype)
            return torch.exp(t * (math.log(c) / len(abar))) * settings.huber_scale
        case _:
            # sqrt(abar) / (sqrt(abar) + sqrt(1 - abar)) is 1 / (1 + sigma), also at sigma = infinity.
            share = abar.sqrt() / (abar.sqrt() + (1.0 - abar).sqrt())
            return (1.0 - c) * share.square() + c


def distance(prediction: Tensor, target: Tensor, kind: LossType = "l2", threshold: Tensor | None = None) -> Tensor:
    """[B, ...] twice -> the same shape in float32: the loss of every place.

    l2: d^2. l1: |d|. huber: 2 c (sqrt(d^2 + c^2) - c); smooth_l1: 2 (sqrt(d^2 + c^2) - c), the pseudo-Huber losses
    (Charbonnier et al. 1997), near d^2 or d^2 / c for small d and linear for large ones.

    Args:
        prediction: of the model.
        target: what it should be.
        kind: which of them.
        threshold: [B], c of each sample; for the two Huber losses.
    """
    difference = prediction.float() - target.float()
    if kind == "l2":
        return difference.square()
    if kind == "l1":
        return difference.abs()
    assert threshold is not None
    c = threshold.view(-1, *[1] * (difference.dim() - 1))
    squares = difference.square()
    # The same as sqrt(d^2 + c^2) - c, without the cancellation.
    bent = 2.0 * squares / ((squares + c.square()).sqrt() + c)
    return bent * c if kind == "huber" else bent


def sample_mean(losses: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, ...] -> [B]: the mean over each sample (Ho et al. 2020, eq. 14).

    `mask` [B, rows, columns] weights the places of each sample. The mean stays over all of them, as in sd-scripts
    (`apply_masked_loss`): a small mask gives a small loss.
    """
    if mask is not None:
        losses = losses * mask.float().unsqueeze(1)
    return losses.flatten(1).mean(1)
