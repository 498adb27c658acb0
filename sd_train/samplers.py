"""The samplers of `--sample_sampler`, built as diffusers schedulers on Stable Diffusion's noise schedule.

Settings are those of the published Stable Diffusion scheduler configurations where diffusers' defaults differ. One
thing that sd-scripts sets (`train_util.get_my_scheduler`) is left out: `clip_sample`, which cuts the predicted latents
to [-1, 1]; latents have a standard deviation of about one, so a third of them would be cut.
"""

from __future__ import annotations

import warnings
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


class ExactLMSScheduler(LMSDiscreteScheduler):
    """Linear multistep, with its coefficients integrated exactly instead of by scipy's adaptive quadrature."""

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """Integral over [sigma_t, sigma_t+1] of the Lagrange polynomial that is 1 at sigma_(t - current_order).

        The polynomial's degree is at most 3, which two Gauss-Legendre points integrate exactly.
        """
        sigmas = [float(sigma) for sigma in self.sigmas[t - order + 1 : t + 2]]
        # sigmas[order - 1 - k] is sigma_(t - k).
        middle, half = (sigmas[-1] + sigmas[-2]) / 2, (sigmas[-1] - sigmas[-2]) / 2
        integral = 0.0
        for point, weight in zip(*np.polynomial.legendre.leggauss(2), strict=True):
            value = float(weight) * half
            for k in range(order):
                if k != current_order:
                    here, there = sigmas[order - 1 - k], sigmas[order - 1 - current_order]
                    value *= (middle + half * float(point) - here) / (there - here)
            integral += value
        return integral


_CLASSES: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "lms": ExactLMSScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm_2": KDPM2DiscreteScheduler,
    "dpm_2_a": KDPM2AncestralDiscreteScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
    "dpmsingle": DPMSolverSinglestepScheduler,
}


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
    name: str, prediction_type: Literal["epsilon", "v_prediction", "sample"], steps: int = 30
) -> SchedulerMixin:
    """A new scheduler for one picture of `steps` (1 to 1000) steps.

    Raises:
        ConfigError: if there is no sampler `name`.
    """
    name = canonical_sampler(name)
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
        settings |= {"set_alpha_to_one": False, "timestep_spacing": _spacing(steps)}
        settings |= {"clip_sample": False} if name == "ddim" else {"skip_prk_steps": True}
    elif name == "dpmsingle":
        settings |= {"lower_order_final": True}
    elif name in ("dpmsolver", "dpmsolver++"):
        settings |= {"algorithm_type": name}
        # Spaced evenly over 0 to 999, a thousand steps repeat a timestep, and the solver divides by their distance.
        settings |= {"timestep_spacing": "linspace" if steps < TRAIN_TIMESTEPS else "trailing"}
        # A solver of the noise prediction cannot step to sigma zero.
        settings |= {"final_sigmas_type": "zero" if name == "dpmsolver++" else "sigma_min"}
    with warnings.catch_warnings():
        # diffusers advises against the algorithm "dpmsolver", which the user has chosen by name.
        warnings.simplefilter("ignore", FutureWarning)
        scheduler: SchedulerMixin = _CLASSES[name](**settings)
    return scheduler


def _spacing(steps: int) -> Literal["leading", "trailing"]:
    """Timesteps of DDIM and PNDM: "leading", as published, unless that would begin far from pure noise or past the end.

    1000 // steps is rounded down, so that a single step would stand at timestep 1 and 600 steps would begin at 600.
    """
    first = (steps - 1) * (TRAIN_TIMESTEPS // steps) + 1
    trailing = np.round(np.arange(TRAIN_TIMESTEPS, 0, -TRAIN_TIMESTEPS / steps)) - 1
    # Floating point gives "trailing" one timestep too many, -1, for a few numbers such as 201.
    return "leading" if 900 <= first < TRAIN_TIMESTEPS or trailing[-1] < 0 else "trailing"
