"""What a saved file says of noise, timesteps, loss and validation."""

from __future__ import annotations

from typing import Any

from sd_train.config.options import RunConfig


def objective_entries(config: RunConfig) -> dict[str, Any]:
    """Noise, loss and validation: sd-scripts' names, and in the same way what it does not have, where it is given."""
    noise, loss, validation = config.noise, config.loss, config.validation
    entries: dict[str, Any] = {
        "ss_noise_offset": noise.noise_offset,
        "ss_noise_offset_random_strength": noise.noise_offset_random_strength,
        "ss_adaptive_noise_scale": noise.adaptive_noise_scale,
        "ss_multires_noise_iterations": noise.multires_noise_iterations,
        "ss_multires_noise_discount": noise.multires_noise_discount,
        "ss_ip_noise_gamma": noise.ip_noise_gamma,
        "ss_ip_noise_gamma_random_strength": noise.ip_noise_gamma_random_strength,
        "ss_min_snr_gamma": loss.min_snr_gamma,
        "ss_debiased_estimation": loss.debiased_estimation_loss,
        "ss_loss_type": loss.loss_type,
        "ss_huber_schedule": loss.huber_schedule,
        "ss_huber_scale": loss.huber_scale,
        "ss_huber_c": loss.huber_c,
        "ss_max_validation_steps": validation.max_validation_steps,
        "ss_validate_every_n_epochs": validation.validate_every_n_epochs,
        "ss_validate_every_n_steps": validation.validate_every_n_steps,
    }
    own: dict[str, Any] = {
        "ss_soft_min_snr_gamma": loss.soft_min_snr_gamma,
        "ss_p2_gamma": loss.p2_gamma,
        "ss_p2_k": None if loss.p2_gamma is None else loss.p2_k,
        "ss_scale_v_pred_loss_like_noise_pred": loss.scale_v_pred_loss_like_noise_pred or None,
        "ss_v_pred_like_loss": loss.v_pred_like_loss,
        "ss_dream_detail_preservation": loss.dream_detail_preservation if loss.dream_training else None,
        "ss_timestep_sampling": None if noise.timestep_sampling == "uniform" else noise.timestep_sampling,
    }
    return entries | {name: value for name, value in own.items() if value is not None}


def timestep_range(config: RunConfig) -> str | None:
    """`first,last` as sd-scripts writes them where either is given."""
    low, high = config.noise.min_timestep, config.noise.max_timestep
    return None if low is None and high is None else f"{low or 0},{1000 if high is None else high}"
