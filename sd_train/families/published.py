"""The published configurations of each family, as they ship with the package."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from sd_train.families.tokenizer import END

FamilyName = Literal["sd1", "sd2", "sdxl", "sdxl_refiner"]
Prediction = Literal["epsilon", "v_prediction", "sample"]

PREDICTION_WORDS: dict[Prediction, str] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
"""modelspec's prediction_type."""

TITLES: dict[FamilyName, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "SDXL",
    "sdxl_refiner": "the SDXL refiner",
}

PAD_TOKENS = {
    "text_encoder": {"sd1": END, "sd2": "!", "sdxl": END},
    "text_encoder_2": {"sdxl": "!", "sdxl_refiner": "!"},
}
"""What fills a prompt up to 77 tokens, by encoder and family."""


@cache
def _text(folder: str, name: str) -> str:
    return (files("sd_train.families") / "assets" / folder / f"{name}.json").read_text(encoding="utf-8")


def published_config(name: str, family: FamilyName = "sd1", prediction: Prediction = "epsilon") -> dict[str, Any]:
    """The configuration of "unet", "vae", "text_encoder", "text_encoder_2" or "scheduler" in the published model.

    `prediction` tells Stable Diffusion 2.x for 768 pixels from the one for 512; for the other families it is written
    into the scheduler's configuration.
    """
    v_prediction = prediction == "v_prediction"
    folder = "sd2_768" if family == "sd2" and v_prediction else family
    config: dict[str, Any] = json.loads(_text(folder, name))
    if name == "scheduler":
        config["prediction_type"] = prediction
    return config


def scheduler_config(family: FamilyName, prediction: Prediction, zero_terminal_snr: bool) -> dict[str, Any]:
    """The scheduler that a model of `family` is published with, adapted to what its U-Net predicts.

    PNDM knows no rescaled betas, and they need the last timestep (Lin et al. 2024), nor predictions of the picture, so
    DDIM takes its place there.
    """
    config = published_config("scheduler", family, prediction)
    if config["_class_name"] == "PNDMScheduler" and (zero_terminal_snr or prediction == "sample"):
        config = published_config("scheduler", "sd2", "v_prediction") | {"prediction_type": prediction}
    if zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config
