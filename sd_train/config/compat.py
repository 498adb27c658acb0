"""What becomes of the options of sd-scripts: the table `sd_scripts.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sd_train.config.catalogue import Kind, number_in

Status = Literal["supported", "no_effect", "not_yet", "refused"]

SHORTHANDS: Mapping[str, tuple[str, str]] = {
    "use_8bit_adam": ("optimizer_type", "AdamW8bit"),
    "use_lion_optimizer": ("optimizer_type", "Lion"),
}
"""Flags that stand for a value of another option."""

_TEXT_RATES = dict.fromkeys(("learning_rate_te", "learning_rate_te1", "learning_rate_te2"), "text_encoder_lr")
SUBSTITUTES: Mapping[str, Mapping[str, str]] = {
    "train_network": {
        **_TEXT_RATES,
        "block_lr": "network_args down_lr_weight, mid_lr_weight and up_lr_weight",
        "train_text_encoder": "network_train_unet_only to leave the text encoder out; it is trained otherwise",
        "stop_text_encoder_training": "network_train_unet_only, or train the text encoder to the end",
        "weights": "network_weights",
    },
    "fine_tune": {
        "unet_lr": "learning_rate", "text_encoder_lr": "learning_rate_te",
        "stop_text_encoder_training": "train_db, or leave train_text_encoder out",
        "network_train_unet_only": "fine_tune as it is: without train_text_encoder the U-Net alone is trained",
        "network_weights": "a whole model as pretrained_model_name_or_path (sd-train lora merge makes one)",
    },
    "train_db": {
        "unet_lr": "learning_rate", "text_encoder_lr": "learning_rate_te",
        "train_text_encoder": "train_db as it is: it trains the text encoder unless stop_text_encoder_training is -1",
        "network_train_unet_only": "stop_text_encoder_training = -1",
        "network_weights": "a whole model as pretrained_model_name_or_path (sd-train lora merge makes one)",
    },
    "train_textual_inversion": {
        **dict.fromkeys((*_TEXT_RATES, "text_encoder_lr", "unet_lr"), "learning_rate"), "network_weights": "weights",
    },
}  # fmt: skip
"""What stands for an option of other commands, by command."""

SYNONYMS: Mapping[str, str] = {"caption_extention": "caption_extension"}
"""Other spellings that sd-scripts takes."""

HANDLED_BY_PARSER = ("config_file", "output_config")


@dataclass(frozen=True)
class KnownOption:
    """One row of the table; the head of `sd_scripts.toml` says what the columns mean."""

    name: str
    kind: Kind
    status: Status
    default: Any = None
    note: str = ""
    only_with: Mapping[str, Sequence[str]] = field(default_factory=dict)
    not_with: str | None = None
    same_as_unset: Sequence[Any] = ()

    def is_unset(self, value: object) -> bool:
        """Whether `value` means the same as not giving this (unsupported) option."""
        if value is False or value == "" or (isinstance(value, list) and all(item == "" for item in value)):
            return True
        number = number_in(value, self.kind)
        if isinstance(number, bool):
            return False
        if number == 0 and self.default is None and self.kind in ("int", "float"):
            return True
        return (self.default is not None and number == self.default) or number in self.same_as_unset

    def idle_because(self, given: Mapping[str, Any]) -> str | None:
        """Why the option would do nothing beside the options `given` (name -> value), if so."""
        if self.not_with in given:
            return f"it is ignored because {self.not_with} is given"
        if not self.only_with:
            return None
        for name, values in self.only_with.items():
            if name in given and (not values or given[name] in values):
                return None
        needs = (f"{name} = {' or '.join(values)}" if values else name for name, values in self.only_with.items())
        return f"it acts only with {' or '.join(needs)}"


@cache
def known_options() -> dict[str, KnownOption]:
    """Every option that sd-scripts knows, by name."""
    text = Path(__file__).with_name("sd_scripts.toml").read_text(encoding="utf-8")
    return {name: KnownOption(name, **row) for name, row in tomllib.loads(text).items()}
