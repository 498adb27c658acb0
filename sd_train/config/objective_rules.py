"""The rules between options of noise, timesteps, loss and validation."""

from __future__ import annotations

from sd_train.config.catalogue import options
from sd_train.config.rules import Chosen
from sd_train.errors import Problems

_NEEDS = {
    "noise_offset_random_strength": "noise_offset",
    "multires_noise_discount": "multires_noise_iterations",
    "ip_noise_gamma_random_strength": "ip_noise_gamma",
    "p2_k": "p2_gamma",
    "dream_detail_preservation": "dream_training",
}
"""Options without effect -> the one that they belong to."""


def check_objective(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """Add what is wrong between these options to `problems` and what has no effect to `warnings`."""
    values = chosen.values
    for name, needed in _NEEDS.items():
        if chosen.valid(needed) and not values[needed] and _differs(chosen, name):
            warnings.append(f"{chosen.where(name)} has no effect: {needed} is not given")
    _noise(chosen, problems, warnings)
    _loss(chosen, problems, warnings)
    _validation(chosen, problems, warnings)


def _differs(chosen: Chosen, name: str) -> bool:
    """Whether an option is given with a value of its own; kohya_ss writes the defaults of all."""
    return name in chosen.given and chosen.valid(name) and chosen.values[name] != options()[name].default


def _noise(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    adaptive = values.get("adaptive_noise_scale")
    if chosen.valid("noise_offset") and adaptive is not None and values["noise_offset"] is None:
        problems.add(chosen.where("adaptive_noise_scale"), adaptive, "needs noise_offset",
                     "give a noise_offset, which it adds to")
    if chosen.valid("min_timestep", "max_timestep"):
        low, high = values["min_timestep"] or 0, values["max_timestep"] or 1000
        if low >= high:
            problems.add(chosen.where("min_timestep"), low, f"is not below max_timestep, {high}, which is not trained",
                         "give a smaller min_timestep or a larger max_timestep")
    if chosen.valid("timestep_sampling") and values["timestep_sampling"] != "logit_normal":
        for name in ("logit_mean", "logit_std"):
            if _differs(chosen, name):
                warnings.append(f"{chosen.where(name)} has no effect: timestep_sampling is not logit_normal")


def _loss(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    if chosen.valid("loss_type", "huber_schedule"):
        bent = values["loss_type"] in ("huber", "smooth_l1")
        for name in ("huber_schedule", "huber_c", "huber_scale"):
            if not _differs(chosen, name):
                continue
            if not bent:
                warnings.append(f"{chosen.where(name)} has no effect: loss_type is {values['loss_type']}")
            elif name == "huber_scale" and values["huber_schedule"] == "snr":
                warnings.append(f"{chosen.where(name)} has no effect: huber_schedule is snr, as in sd-scripts")
    name = "scale_v_pred_loss_like_noise_pred"
    if chosen.valid(name, "v_parameterization") and values[name] and not values["v_parameterization"]:
        problems.add(chosen.where(name), None, "is for models that predict v, and v_parameterization is not given",
                     "give --v_parameterization too, as in sd-scripts, or remove it")
    if values.get("min_snr_gamma") is not None and values.get("soft_min_snr_gamma") is not None:
        where = f"{chosen.where('min_snr_gamma')} and {chosen.where('soft_min_snr_gamma')}"
        problems.add(where, None, "exclude each other", "remove one of the two")


def _validation(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
    if not chosen.valid(*names, "save_best", "validation_patience"):
        return
    if values["validate_every_n_steps"] is not None and values["validate_every_n_epochs"] is not None:
        warnings.append(
            f"{chosen.where('validate_every_n_steps')} and {chosen.where('validate_every_n_epochs')}: both count"
        )
