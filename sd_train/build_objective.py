"""The options of noise, loss and weights -> the objective; what of them does not fit the model."""

from __future__ import annotations

from sd_train.build_trainable import prior_of
from sd_train.config.options import RunConfig
from sd_train.diffusion.losses import LossSettings
from sd_train.diffusion.weights import WeightSettings
from sd_train.objectives.denoise import DenoiseSettings
from sd_train.plan_data import draw_settings


def weight_settings(config: RunConfig) -> WeightSettings:
    """The weights of the loss by timestep."""
    loss = config.loss
    return WeightSettings(
        min_snr_gamma=loss.min_snr_gamma,
        soft_min_snr_gamma=loss.soft_min_snr_gamma,
        p2_gamma=loss.p2_gamma,
        p2_k=loss.p2_k,
        scale_v_like_noise=loss.scale_v_pred_loss_like_noise_pred,
        v_like=loss.v_pred_like_loss,
        debiased=loss.debiased_estimation_loss,
    )


def denoise_settings(config: RunConfig) -> DenoiseSettings:
    """What the run learns."""
    # The draws themselves are made while batches are prepared; the seed says nothing here.
    drawn, loss = draw_settings(config, seed=0), config.loss
    return DenoiseSettings(
        noise=drawn.noise,
        timesteps=drawn.timesteps,
        loss=LossSettings(loss.loss_type, loss.huber_schedule, loss.huber_c, loss.huber_scale),
        weights=weight_settings(config),
        dream=loss.dream_detail_preservation if loss.dream_training else None,
        prior=prior_of(config),
    )
