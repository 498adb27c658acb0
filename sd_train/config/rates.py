"""Which networks a command trains and at which learning rate, from the values of its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_ROLES = ("text_encoder", "text_encoder_2")

RATE_OPTIONS = (
    "learning_rate", "unet_lr", "text_encoder_lr", "network_train_unet_only", "network_train_text_encoder_only",
    "train_text_encoder", "learning_rate_te", "learning_rate_te1", "learning_rate_te2", "stop_text_encoder_training",
    "block_lr",
)  # fmt: skip
"""Every option that `learning_rates` looks at."""


def learning_rates(command: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The rate of each network role, of the model's or not; one that is left out or has rate 0 is missing.

    Args:
        command: the training command.
        values: of all options in `RATE_OPTIONS`.
    """
    match command:
        case "train_network":
            rates = _of_network(values)
        case "train_textual_inversion":
            rates = dict.fromkeys(TEXT_ROLES, values["learning_rate"])
        case _:
            rates = _of_weights(command, values)
    return {role: rate for role, rate in rates.items() if rate > 0}


def _of_network(values: Mapping[str, Any]) -> dict[str, float]:
    base, rates = values["learning_rate"], dict[str, float]()
    if not values["network_train_text_encoder_only"]:
        rates["unet"] = _first(values["unet_lr"], base)
    if not values["network_train_unet_only"]:
        # One rate for all text encoders, as sd-scripts' `networks.lora` has.
        rates |= dict.fromkeys(TEXT_ROLES, _first(values["text_encoder_lr"], base))
    return rates


def _of_weights(command: str, values: Mapping[str, Any]) -> dict[str, float]:
    base, blocks = values["learning_rate"], values["block_lr"]
    rates: dict[str, float] = {"unet": base if blocks is None else max(blocks)}
    if values["train_text_encoder"] if command == "fine_tune" else values["stop_text_encoder_training"] != -1:
        shared = _first(values["learning_rate_te"], base)
        for role, name in zip(TEXT_ROLES, ("learning_rate_te1", "learning_rate_te2"), strict=True):
            rates[role] = _first(values[name], shared)
    return rates


def _first(chosen: float | None, otherwise: float) -> float:
    return otherwise if chosen is None else chosen


def trains_text(command: str, values: Mapping[str, Any]) -> bool:
    """Whether any text encoder learns."""
    return any(role in learning_rates(command, values) for role in TEXT_ROLES)
