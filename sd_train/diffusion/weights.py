"""Weights of the loss by timestep: tables over the noise schedule that is really trained.

Every rule is stated for the prediction of the noise and of v. With SNR = abar / (1 - abar) the loss of the noise is SNR
times that of the picture, and the loss of v is SNR + 1 times (Salimans & Ho 2022), so that a weight w of the noise is
w SNR / (SNR + 1) of v and w SNR of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sd_train.diffusion.schedule import NoiseSchedule

Prediction = Literal["epsilon", "v_prediction", "sample"]

LARGEST_SNR = 1000.0
"""What sd-scripts limits the signal-to-noise ratio to in its debiased and v weights."""


@dataclass(frozen=True)
class WeightSettings:
    """Which weights multiply the loss of a sample, in sd-scripts' order; None and False: not that one."""

    min_snr_gamma: float | None = None
    soft_min_snr_gamma: float | None = None
    p2_gamma: float | None = None
    p2_k: float = 1.0
    scale_v_like_noise: bool = False
    v_like: float | None = None
    debiased: bool = False

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self != WeightSettings(p2_k=self.p2_k)


def signal_to_noise(schedule: NoiseSchedule) -> Tensor:
    """[T]: abar / (1 - abar) (Kingma et al. 2021); 0 where nothing of the picture is left."""
    abar = schedule.alphas_cumprod
    return abar / (1.0 - abar)


def loss_weights(settings: WeightSettings, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """[T], finite: the product of all chosen weights at every timestep."""
    snr = signal_to_noise(schedule)
    table = torch.ones_like(snr)
    if settings.min_snr_gamma is not None:
        table = table * min_snr(snr, settings.min_snr_gamma, prediction)
    if settings.soft_min_snr_gamma is not None:
        table = table * soft_min_snr(snr, settings.soft_min_snr_gamma, prediction)
    if settings.p2_gamma is not None:
        table = table * p2(snr, settings.p2_k, settings.p2_gamma, prediction)
    if settings.scale_v_like_noise:
        table = table * v_share(snr)
    if settings.v_like is not None:
        table = table * (1.0 + settings.v_like / v_share(_positive(snr)))
    if settings.debiased:
        table = table * debiased(snr, prediction)
    return table


def min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """min(SNR, gamma) of the picture's loss (Hang et al. 2023): / SNR for the noise, / (SNR + 1) for v.

    Without any signal the noise's weight is its limit, 1, and that of v is 0.
    """
    if prediction == "epsilon":
        # min(SNR, gamma) / SNR, without dividing 0 by 0.
        return torch.clamp(gamma / _positive(snr), max=1.0)
    return _of_picture(torch.clamp(snr, max=gamma), snr, prediction)


def soft_min_snr(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """SNR gamma / (SNR + gamma) of the picture's loss: min-SNR without its bend (Crowson et al. 2024, eq. 7)."""
    if prediction == "epsilon":
        return gamma / (snr + gamma)
    return _of_picture(snr * gamma / (snr + gamma), snr, prediction)


def p2(snr: Tensor, k: float, gamma: float, prediction: Prediction) -> Tensor:
    """1 / (k + SNR)^gamma of the noise's loss (Choi et al. 2022, eq. 8)."""
    weight = (k + snr) ** -gamma
    return weight if prediction == "epsilon" else _of_picture(weight * snr, snr, prediction)


def debiased(snr: Tensor, prediction: Prediction) -> Tensor:
    """1 / sqrt(SNR) of the noise's loss (Yu et al. 2023); for v 1 / (SNR + 1), as sd-scripts has it."""
    limited = torch.clamp(snr, max=LARGEST_SNR)
    if prediction == "v_prediction":
        return 1.0 / (limited + 1.0)
    weight = _positive(limited).rsqrt()
    return weight if prediction == "epsilon" else weight * snr


def v_share(snr: Tensor) -> Tensor:
    """SNR / (SNR + 1): the loss of v times this is that of the noise (sd-scripts' `scale_v_prediction_loss...`)."""
    limited = torch.clamp(snr, max=LARGEST_SNR)
    return limited / (limited + 1.0)


def _of_picture(weight: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
    """A weight of the picture's loss as one of v's, or as it is."""
    return weight / (snr + 1.0) if prediction == "v_prediction" else weight


def _positive(snr: Tensor) -> Tensor:
    """`snr` with its smallest value above 0 in place of 0, which no weight could divide by."""
    return torch.where(snr > 0, snr, snr[snr > 0].min())
