"""Options for what is learned: noise, timesteps, the loss and its weights, validation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd_train.config.group import Group
from sd_train.config.values import Hint


class NoiseOptions(Group):
    """The noise that pictures are trained with, and the timesteps."""

    noise_offset: float | None = Field(
        None, gt=0, le=10, description="Standard deviation of a shift of each channel of the noise; around 0.05 lets "
        "pictures become darker and brighter.",
    )
    noise_offset_random_strength: bool = Field(
        False, description="Draw the strength of noise_offset for each sample between 0 and it."
    )
    adaptive_noise_scale: Annotated[float | None, Hint(zero_is_unset=True)] = Field(
        None, ge=-10, le=10, description="Add this times the latents' own mean (without its sign) to noise_offset."
    )
    multires_noise_iterations: int | None = Field(
        None, ge=1, le=16, description="Levels of coarser and coarser noise that are added (pyramid noise); 6 to 10."
    )
    multires_noise_discount: float = Field(
        0.3, ge=0, le=1, description="Weight of each level of multires_noise_iterations: this to the level's power."
    )
    ip_noise_gamma: float | None = Field(
        None, gt=0, le=10, description="Input perturbation: noise of this size that the input has and the target does "
        "not; around 0.1.",
    )
    ip_noise_gamma_random_strength: bool = Field(
        False, description="Draw the strength of ip_noise_gamma for each sample between 0 and it."
    )
    zero_terminal_snr: bool = Field(
        False, description="Rescale the noise schedule so that the last timestep is pure noise; for v-prediction."
    )
    min_timestep: Annotated[int | None, Hint(zero_is_unset=True)] = Field(
        None, ge=0, le=999, description="First timestep that is trained; not given: 0."
    )
    max_timestep: int | None = Field(
        None, ge=1, le=1000, description="Timestep below which all that are trained lie; not given: 1000."
    )
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = Field(
        "uniform",
        description="How timesteps are drawn: all alike; more from the middle (logit_normal); in proportion to their "
        "loss, weighted back (importance).",
    )
    logit_mean: float = Field(0.0, ge=-10, le=10, description="Mean of logit_normal; below 0: less noise.")
    logit_std: float = Field(1.0, gt=0, le=10, description="Standard deviation of logit_normal.")


class LossOptions(Group):
    """The loss of a sample, and its weight by timestep."""

    loss_type: Literal["l2", "l1", "huber", "smooth_l1"] = Field("l2", description="Distance of prediction and target.")
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "snr", description="How the threshold of huber and smooth_l1 depends on the timestep."
    )
    huber_c: float = Field(0.1, gt=0, le=1e3, description="Threshold of huber and smooth_l1.")
    huber_scale: float = Field(
        1.0, gt=0, le=1e3, description="Factor of the threshold, for huber_schedule constant and exponential."
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, le=1e4, description="Min-SNR weighting (Hang et al. 2023); 5 is usual."
    )
    soft_min_snr_gamma: float | None = Field(
        None, gt=0, le=1e4, description="The same without its bend (Crowson et al. 2024); 4 is usual."
    )
    p2_gamma: float | None = Field(
        None, gt=0, le=10, description="P2 weighting (Choi et al. 2022): 1 / (p2_k + SNR)^p2_gamma; 1 is usual."
    )
    p2_k: float = Field(1.0, gt=0, le=1e3, description="See p2_gamma.")
    scale_v_pred_loss_like_noise_pred: bool = Field(
        False, description="v-prediction: weight the loss as that of the noise is."
    )
    v_pred_like_loss: float | None = Field(
        None, gt=0, le=1e3, description="Noise prediction: add so much of the loss as that of v is weighted."
    )
    debiased_estimation_loss: bool = Field(False, description="Debiased estimation weighting (Yu et al. 2023).")
    dream_training: bool = Field(
        False, description="DREAM (Zhou et al. 2024): learn from the model's own prediction too; one more forward pass."
    )
    dream_detail_preservation: float = Field(
        1.0, ge=0, le=100, description="Exponent of DREAM; larger keeps closer to the plain loss."
    )


class ValidationOptions(Group):
    """The loss on pictures that are not trained on (validation_split), with noise that is always the same."""

    validate_every_n_steps: int | None = Field(None, ge=1, description="Validate after every n-th update.")
    validate_every_n_epochs: int | None = Field(
        None, ge=1, description="Validate after every n-th epoch; not given, nor validate_every_n_steps: after each."
    )
    max_validation_steps: int | None = Field(
        None, ge=1, description="At most so many batches in each validation; not given: all."
    )
    validation_timesteps: int = Field(
        4, ge=1, le=100, description="Timesteps that each image is scored at; all of a validation are evenly spread."
    )
    save_best: bool = Field(False, description="Keep the model with the lowest validation loss as NAME-best.")
    validation_patience: int | None = Field(
        None, ge=1, description="End the training after so many validations in a row without a new lowest loss."
    )
