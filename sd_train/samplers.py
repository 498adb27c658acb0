"""The samplers of `--sample_sampler`, built as diffusers schedulers on Stable Diffusion's noise schedule.

Settings are those of the published Stable Diffusion scheduler configurations where diffusers' defaults differ. One
thing that sd-scripts sets (`train_util.get_my_scheduler`) is left out: `clip_sample`, which cuts the predicted latents
to [-1, 1]; latents have a standard deviation of about one, so a third of them would be cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

from sd_train.errors import ConfigError
from sd_train.prompts import SAMPLER_ALIASES, SAMPLER_NAMES

TRAIN_TIMESTEPS = 1000
BETA_START = 0.00085
BETA_END = 0.012

LABELS = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "dpmsolver": "DPM-Solver 2M",
    "dpmsolver++": "DPM++ 2M",
    "dpmsingle": "DPM++ 2S",
}
"""What A1111's web UI calls each."""


def lms_coefficient(sigmas: Sequence[float], order: int, t: int, past: int) -> float:
    """Weight of the derivative `past` steps ago in step `t` of the linear multistep method of `order` (1 to 4).

    The integral over [sigmas[t], sigmas[t + 1]] of the Lagrange polynomial that is 1 at sigmas[t - past] and 0 at the
    other `order` - 1 last sigmas. Its degree is at most 3, which two Gauss-Legendre points integrate exactly.
    """
    middle, half = (sigmas[t + 1] + sigmas[t]) / 2, (sigmas[t + 1] - sigmas[t]) / 2
    integral = 0.0
    for point in (-(3**-0.5), 3**-0.5):
        value = half
        for other in range(order):
            if other != past:
                value *= (middle + half * point - sigmas[t - other]) / (sigmas[t - past] - sigmas[t - other])
        integral += value
    return integral


_CLASSES: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "lms": LMSDiscreteScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm_2": KDPM2DiscreteScheduler,
    "dpm_2_a": KDPM2AncestralDiscreteScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "dpmsingle": DPMSolverSinglestepScheduler,
}


_RESCALING = ("euler", "euler_a", "dpmsolver", "dpmsolver++")
"""Those whose diffusers class rescales the schedule itself, with the smallest signal below."""
_NOT_OF_PICTURES = ("pndm", "euler_a", "dpm_2", "dpm_2_a")
"""Those whose diffusers class takes predictions of the noise and of v alone."""
_SMALLEST_SIGNAL = 2**-24


def _rescaled_betas() -> list[float]:
    """Betas whose last timestep is pure noise but for `_SMALLEST_SIGNAL`, [1000] (Lin et al. 2023, algorithm 1).

    Without the rest, sigma would be infinite, and the first step of a noise prediction a division by zero.
    """
    roots = np.sqrt(np.cumprod(1 - np.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS) ** 2))
    cumulative = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    cumulative[-1] = _SMALLEST_SIGNAL
    betas: list[float] = (1 - cumulative / np.concatenate(([1.0], cumulative[:-1]))).tolist()
    return betas


def canonical_sampler(name: str) -> str:
    """`k_euler` -> `euler`, in lower case.

    Raises:
        ConfigError: if there is no such sampler.
    """
    lower = name.lower()
    if lower not in SAMPLER_NAMES:
        raise ConfigError(f"sampler = {name!r}: is not known; use one of {', '.join(SAMPLER_NAMES)}")
    return SAMPLER_ALIASES.get(lower, lower)


def make_sampler(
    name: str,
    prediction_type: Literal["epsilon", "v_prediction", "sample"],
    steps: int = 30,
    zero_terminal_snr: bool = False,
) -> SchedulerMixin:
    """A new scheduler for one picture of `steps` (1 to 1000) steps.

    Args:
        zero_terminal_snr: the model was trained on the schedule that ends in pure noise (Lin et al. 2023).

    Raises:
        ConfigError: if there is no sampler `name`, or it cannot draw with such predictions.
    """
    name = canonical_sampler(name)
    if prediction_type == "sample" and name in _NOT_OF_PICTURES:
        others = ", ".join(other for other in _CLASSES if other not in _NOT_OF_PICTURES)
        raise ConfigError(
            f"sampler = {name!r}: cannot draw with a model that predicts the picture itself; use one of {others}"
        )
    settings: dict[str, Any] = {
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction_type,
    }
    if name != "dpmsingle":
        # Only "leading" timesteps are moved by it; StableDiffusionPipeline warns of a scheduler that says otherwise.
        settings |= {"steps_offset": 1}
    if name in ("ddim", "pndm"):
        settings |= {"set_alpha_to_one": False, "timestep_spacing": _spacing(steps, zero_terminal_snr)}
        settings |= {"clip_sample": False} if name == "ddim" else {"skip_prk_steps": True}
    elif name == "dpmsingle":
        settings |= {"lower_order_final": True}
    elif name in ("dpmsolver", "dpmsolver++"):
        settings |= {"algorithm_type": name}
        # Spaced evenly over 0 to 999, a thousand steps repeat a timestep, and the solver divides by their distance.
        settings |= {"timestep_spacing": "linspace" if steps < TRAIN_TIMESTEPS else "trailing"}
        # A solver of the noise prediction cannot step to sigma zero.
        settings |= {"final_sigmas_type": "zero" if name == "dpmsolver++" else "sigma_min"}
    elif steps == 1:
        # A single one of the timesteps that are spaced evenly over 0 to 999 is 0, where there is no noise.
        settings |= {"timestep_spacing": "trailing"}
    if zero_terminal_snr:
        rescales = name in _RESCALING or (name == "ddim" and prediction_type == "v_prediction")
        settings |= {"rescale_betas_zero_snr": True} if rescales else {"trained_betas": _rescaled_betas()}
    with warnings.catch_warnings():
        # diffusers advises against the algorithm "dpmsolver", which the user has chosen by name.
        warnings.simplefilter("ignore", FutureWarning)
        scheduler = _CLASSES[name](**settings)
    if name == "lms":
        # diffusers' own needs scipy, whose adaptive quadrature is slower and less exact.
        def coefficient(order: int, t: int, past: int) -> float:
            return lms_coefficient(scheduler.sigmas.tolist(), order, t, past)

        scheduler.get_lms_coefficient = coefficient
    made: SchedulerMixin = scheduler
    return made


def _spacing(steps: int, whole: bool) -> Literal["leading", "trailing", "linspace"]:
    """Timesteps of DDIM and PNDM: "leading", as published, unless that would begin far from pure noise or past the end.

    1000 // steps is rounded down, so that a single step would stand at timestep 1 and 600 steps would begin at 600.
    `whole`: they must begin at the last timestep, because the schedule ends in pure noise there.
    """
    first = (steps - 1) * (TRAIN_TIMESTEPS // steps) + 1
    trailing = np.round(np.arange(TRAIN_TIMESTEPS, 0, -TRAIN_TIMESTEPS / steps)) - 1
    # Floating point gives "trailing" one timestep too many, -1, for a few numbers such as 201.
    if trailing[-1] < 0:
        return "linspace" if whole else "leading"
    return "leading" if 900 <= first < TRAIN_TIMESTEPS and not whole else "trailing"
