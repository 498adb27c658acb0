"""LoRA keys against complete lists that sd-scripts wrote, names of the text encoders."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from sd_train.demo.tiny_model import KINDS, TinyKind, make_tiny_parts, tiny_configs
from sd_train.families.keys import (
    UNetShape,
    live_text_name,
    published_text_name,
    text_lora_targets,
    text_modules,
    unet_lora_targets,
)
from sd_train.families.latent import LatentDiffusion
from sd_train.families.published import Prediction, published_config
from sd_train.families.registry import make_family
from sd_train.families.text import TextEncoder
from sd_train.trainables.lora_module import LoraModule
from tests.models import fresh_tiny, golden

Shapes = dict[str, list[list[int]]]


@cache
def full_size(kind: TinyKind) -> LatentDiffusion:
    """A published model without memory for its weights."""
    family, told = KINDS[kind]
    configs = {role: published_config(role, family, told) for role in tiny_configs(kind)}
    with torch.device("meta"):
        parts = make_tiny_parts(kind, 0, configs)
        made = make_family(parts)
    assert isinstance(made, LatentDiffusion)
    return made


def lora_shapes(family: LatentDiffusion, convolutions: bool) -> Shapes:
    shapes = {}
    for role in family.networks:
        for target in family.lora_targets(role, convolutions):
            # The factors are small and real; only the layers they belong to have no memory.
            module = LoraModule(target.key, family.module(role, target.path), 4, 1.0, 0)
            shapes[target.key] = [list(module.down.shape), list(module.up.shape)]
    return shapes


@pytest.mark.parametrize(
    ("kind", "convolutions", "table", "modules"),
    [("sd1", False, "sd15", 264), ("sd1", True, "sd15 conv", 350), ("sdxl", False, "sdxl", 986),
     ("sdxl", True, "sdxl conv", 1052)],
)  # fmt: skip
def test_lora_keys_and_shapes_are_sd_scripts(kind: TinyKind, convolutions: bool, table: str, modules: int) -> None:
    expected = golden("lora_keys.json.gz")[table]
    assert len(expected) == modules
    assert lora_shapes(full_size(kind), convolutions) == expected


def test_numbers_of_modules_in_other_families() -> None:
    # reference: sd-scripts' `networks.lora` on Stable Diffusion 2.x: text encoder 138 + U-Net 192.
    second = full_size("sd2")
    assert len(second.lora_targets("text_encoder")) == 138
    assert {target.key for target in second.lora_targets("unet")} == {
        key for key in golden("lora_keys.json.gz")["sd15"] if key.startswith("lora_unet_")
    }
    refiner = full_size("refiner")
    assert list(refiner.networks) == ["unet", "text_encoder_2"]
    keys = [target.key for target in refiner.lora_targets("text_encoder_2")]
    assert len(keys) == 192
    assert all(key.startswith("lora_te2_text_model_encoder_layers_") for key in keys)
    assert all(refiner.module("unet", target.path) is not None for target in refiner.lora_targets("unet", True))


@pytest.mark.parametrize(
    ("kind", "prediction", "base", "architecture", "suffix"),
    [
        ("sd1", "epsilon", "sd_v1", "stable-diffusion-v1", "_sd"),
        ("sd1", "v_prediction", "sd_v1_v", "stable-diffusion-v1", "_sd"),
        ("sd2", "epsilon", "sd_v2", "stable-diffusion-v2-512", "_sd"),
        ("sd2-v", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v", "_sd"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "_sdxl"),
        ("refiner", "epsilon", "sdxl_refiner_v1-0", "stable-diffusion-xl-v1-refiner", "_sdxl"),
    ],
)
def test_families_have_sd_scripts_names(
    kind: TinyKind, prediction: Prediction, base: str, architecture: str, suffix: str
) -> None:
    family = fresh_tiny(kind, prediction=prediction)
    assert (family.base_version, family.architecture, family.latents_suffix) == (base, architecture, suffix)
    assert family.prediction == prediction
    assert family.latent.scale == (0.13025 if suffix == "_sdxl" else 0.18215)
    assert family.latent.shape(1024, 512) == (4, 64, 128)


def test_text_encoders_of_published_models_take_the_right_layer_and_padding() -> None:
    def facts(encoder: TextEncoder) -> tuple[int, bool, int, int]:
        pad = encoder.tokenizer(["a"], 1).ids[0, 0, -1]
        return encoder.layer, encoder.final_norm, encoder.layers, int(pad)

    assert [facts(encoder) for encoder in full_size("sd1").text_encoders.values()] == [(1, True, 12, 49407)]
    assert [facts(encoder) for encoder in full_size("sd2").text_encoders.values()] == [(1, True, 23, 0)]
    xl = [facts(encoder) for encoder in full_size("sdxl").text_encoders.values()]
    assert xl == [(2, False, 12, 49407), (2, False, 32, 0)]
    assert [facts(encoder) for encoder in full_size("refiner").text_encoders.values()] == xl[1:]


def test_lora_targets_do_not_depend_on_the_model() -> None:
    keys = golden("lora_keys.json.gz")
    targets = [*unet_lora_targets(UNetShape()), *text_lora_targets(12)]
    assert {target.key for target in targets} == set(keys["sd15"])
    shape = full_size_shape()
    listed = {target.key for target in unet_lora_targets(shape, original_names=True, convolutions=True)}
    # Residual blocks whose width does not change have no skip connection.
    known = {key for key in keys["sdxl conv"] if key.startswith("lora_unet_")}
    assert known < listed
    assert all(key.endswith("_skip_connection") for key in listed - known)


def full_size_shape() -> UNetShape:
    return UNetShape(((0, 0), (2, 2), (10, 10)), ((10,) * 3, (2,) * 3, (0,) * 3), 10, added=True)


def test_both_spellings_of_clip_names() -> None:
    for name in text_modules(2):
        assert published_text_name(name) == published_text_name(name.removeprefix("text_model.")) == name
        assert live_text_name(name, nested=True) == name
        assert published_text_name(live_text_name(name, nested=False)) == name
    assert published_text_name("text_projection.weight") == "text_projection.weight"
