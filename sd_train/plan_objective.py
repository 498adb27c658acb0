"""What of noise, loss and weights does not fit the model that is trained, and of validation the images."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.config.options import RunConfig
from sd_train.data.index import ImageIndex
from sd_train.diffusion.schedule import TIMESTEPS
from sd_train.errors import ConfigError
from sd_train.families.parts import ModelKind


def check_objective(config: RunConfig, kind: ModelKind) -> None:
    """Refuse what cannot be learned.

    Raises:
        ConfigError: with every option that does not fit, and the way out.
    """
    loss, problems = config.loss, list[str]()
    predicts_v, zero = kind.prediction == "v_prediction", learns_pure_noise(config, kind)
    if loss.scale_v_pred_loss_like_noise_pred and not predicts_v:
        problems.append(f"--scale_v_pred_loss_like_noise_pred: the model predicts {_words(kind)}, not v; remove it")
    if loss.v_pred_like_loss is not None and predicts_v:
        problems.append(f"--v_pred_like_loss = {loss.v_pred_like_loss}: the model predicts v itself; remove it")
    if zero and not predicts_v:
        for name in ("debiased_estimation_loss", "v_pred_like_loss"):
            if getattr(loss, name):
                problems.append(
                    f"--{name}: its weight is infinite at the last timestep, which is pure noise with zero terminal "
                    "SNR; train a model that predicts v, remove it, or leave that timestep out with --max_timestep 999"
                )
    if problems:
        raise ConfigError(*problems)


def check_validation(config: RunConfig, validation: Sequence[ImageIndex]) -> None:
    """Refuse what only a validation loss can decide, where there is none.

    Raises:
        ConfigError: with every such option.
    """
    if validation:
        return
    chosen = config.validation
    refused = {"save_best": chosen.save_best, "validation_patience": chosen.validation_patience}
    problems = [
        f"--{name}{'' if value is True else f' = {value}'}: no images are kept for validation, so there is no loss "
        f"to go by; give --validation_split 0.1 (or validation_split in the dataset file), or remove {name}"
        for name, value in refused.items()
        if value
    ]
    if problems:
        raise ConfigError(*problems)


def learns_pure_noise(config: RunConfig, kind: ModelKind) -> bool:
    """Whether the last timestep of a noise schedule with zero terminal SNR is trained."""
    ends_in_noise = kind.zero_terminal_snr or config.noise.zero_terminal_snr
    return ends_in_noise and (config.noise.max_timestep or TIMESTEPS) >= TIMESTEPS


def _words(kind: ModelKind) -> str:
    return "the picture" if kind.prediction == "sample" else "the noise"


def objective_warnings(config: RunConfig, kind: ModelKind) -> list[str]:
    """What is allowed and probably not meant."""
    loss, warnings = config.loss, list[str]()
    if config.noise.zero_terminal_snr and kind.zero_terminal_snr:
        warnings.append("--zero_terminal_snr has no effect: the model's schedule has it already")
    elif config.noise.zero_terminal_snr and kind.prediction == "epsilon":
        warnings.append(
            "--zero_terminal_snr: the model predicts the noise, which says nothing at the last timestep; it is meant "
            "for models that predict v (Lin et al. 2023)"
        )
    weighs_nothing = [
        f"--{name}"
        for name in ("min_snr_gamma", "soft_min_snr_gamma", "p2_gamma", "scale_v_pred_loss_like_noise_pred")
        if getattr(loss, name)
    ]
    if learns_pure_noise(config, kind) and kind.prediction != "epsilon" and weighs_nothing:
        warnings.append(
            f"{' and '.join(weighs_nothing)}: with zero terminal SNR the last timestep counts 0, so that what it is "
            "for is hardly learned; debiased_estimation_loss or no weights keep it"
        )
    return warnings
