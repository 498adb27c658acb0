"""What of noise, loss and weights does not fit the model that is trained."""

from __future__ import annotations

from sd_train.config.options import RunConfig
from sd_train.errors import ConfigError
from sd_train.families.parts import ModelKind


def check_objective(config: RunConfig, kind: ModelKind) -> None:
    """Refuse what cannot be learned.

    Raises:
        ConfigError: with every option that does not fit, and the way out.
    """
    loss, problems = config.loss, list[str]()
    predicts_v, zero = kind.prediction == "v_prediction", ends_in_noise(config, kind)
    if loss.scale_v_pred_loss_like_noise_pred and not predicts_v:
        problems.append("--scale_v_pred_loss_like_noise_pred: the model predicts the noise, not v; remove it")
    if loss.v_pred_like_loss is not None and predicts_v:
        problems.append(f"--v_pred_like_loss = {loss.v_pred_like_loss}: the model predicts v itself; remove it")
    if zero and not predicts_v:
        for name in ("debiased_estimation_loss", "v_pred_like_loss"):
            if getattr(loss, name):
                problems.append(
                    f"--{name}: its weight is infinite at the last timestep, which is pure noise with zero terminal "
                    "SNR; train a model that predicts v, or remove one of the two"
                )
    if problems:
        raise ConfigError(*problems)


def ends_in_noise(config: RunConfig, kind: ModelKind) -> bool:
    """Whether the noise schedule that is trained has zero terminal SNR."""
    return kind.zero_terminal_snr or config.noise.zero_terminal_snr


def objective_warnings(config: RunConfig, kind: ModelKind) -> list[str]:
    """What is allowed and probably not meant."""
    loss, predicts_v, warnings = config.loss, kind.prediction == "v_prediction", list[str]()
    if config.noise.zero_terminal_snr and kind.zero_terminal_snr:
        warnings.append("--zero_terminal_snr has no effect: the model's schedule has it already")
    elif config.noise.zero_terminal_snr and not predicts_v:
        warnings.append(
            "--zero_terminal_snr: the model predicts the noise, which says nothing at the last timestep; it is meant "
            "for models that predict v (Lin et al. 2023)"
        )
    weighs_nothing = [
        f"--{name}" for name in ("min_snr_gamma", "soft_min_snr_gamma", "scale_v_pred_loss_like_noise_pred")
        if getattr(loss, name)
    ]  # fmt: skip
    if ends_in_noise(config, kind) and predicts_v and weighs_nothing:
        warnings.append(
            f"{' and '.join(weighs_nothing)}: with zero terminal SNR the last timestep counts 0, so that what it is "
            "for is hardly learned; debiased_estimation_loss or no weights keep it"
        )
    return warnings
