"""Name tables against complete lists that sd-scripts wrote for Stable Diffusion 1.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sd_train.families.checkpoints import join_checkpoint, published_config, split_checkpoint, unet_shape_of
from sd_train.families.keys import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    UNetShape,
    live_text_name,
    published_text_name,
    text_lora_targets,
    text_modules,
    unet_lora_targets,
    unet_modules,
    vae_modules,
)
from sd_train.families.sd import StableDiffusion1
from sd_train.trainables.lora import LoraModule
from tests.models import golden

ENDS = (".weight", ".bias")


@pytest.fixture(scope="module")
def full_size() -> StableDiffusion1:
    """Stable Diffusion 1.5 from the published configurations, without memory for its weights."""
    with torch.device("meta"):
        return StableDiffusion1(
            UNet2DConditionModel.from_config(published_config("unet")),
            AutoencoderKL.from_config(published_config("vae")),
            CLIPTextModel(CLIPTextConfig(**published_config("text_encoder"))),
        )


def test_lora_keys_and_shapes_are_sd_scripts(full_size: StableDiffusion1) -> None:
    shapes: dict[str, list[int]] = {}
    for role in ("text_encoder", "unet"):
        for target in full_size.lora_targets(role):
            # The factors are small and real; only the layers they belong to have no memory.
            module = LoraModule(target.key, full_size.module(role, target.path), 4, 1.0, 0)
            shapes[f"{target.key}.alpha"] = []
            shapes[f"{target.key}.lora_down.weight"] = list(module.down.shape)
            shapes[f"{target.key}.lora_up.weight"] = list(module.up.shape)
    expected = golden("lora_keys_sd15.json.gz")["shapes"]
    assert len(expected) == 792
    assert shapes == expected


def test_lora_targets_do_not_depend_on_the_model() -> None:
    keys = {name.rpartition(".lora_up")[0] for name in golden("lora_keys_sd15.json.gz")["shapes"] if "lora_up" in name}
    targets = [*unet_lora_targets(UNetShape()), *text_lora_targets(12)]
    assert {target.key for target in targets} == keys
    assert len(targets) == len(keys) == 264
    assert text_lora_targets(12, "lora_te1")[0].key.startswith("lora_te1_text_model_encoder_layers_0_")


def test_names_cover_a_whole_checkpoint(full_size: StableDiffusion1) -> None:
    table = golden("checkpoint_keys_sd15.json.gz")
    for role, prefix, modules in (
        ("unet", UNET_PREFIX, unet_modules(UNetShape())),
        ("vae", VAE_PREFIX, vae_modules()),
    ):
        pairs = {prefix + name.original + end: name.diffusers + end for name in modules for end in ENDS}
        existing = {original: ours for original, ours in pairs.items() if original in table["keys"]}
        assert existing == table[role]
        # Beyond the table are only the biases and shortcuts that some blocks lack.
        for original in set(pairs) - set(existing):
            assert "skip_connection" in original or "nin_shortcut" in original or original.endswith(".bias"), original
        assert set(existing.values()) == set(full_size.tensors(role))
        assert len({name.original for name in modules}) == len({name.diffusers for name in modules}) == len(modules)
    text = {TEXT_PREFIX + name + end: name + end for name in text_modules(12) for end in ENDS}
    text = {original: ours for original, ours in text.items() if not original.endswith("_embedding.bias")}
    assert text == table["text_encoder"]
    assert set(text.values()) == set(full_size.tensors("text_encoder"))


def test_a_full_size_checkpoint_is_joined_and_split(full_size: StableDiffusion1) -> None:
    table = golden("checkpoint_keys_sd15.json.gz")
    parts = {role: full_size.tensors(role) for role in ("unet", "vae", "text_encoder")}
    shape = unet_shape_of(published_config("unet"))
    assert shape == UNetShape()
    joined: dict[str, Tensor] = join_checkpoint(parts["unet"], parts["vae"], parts["text_encoder"], shape, 4)
    assert {name: list(tensor.shape) for name, tensor in joined.items()} == table["keys"]
    assert len(joined) == 1130
    for name, change in table["shape_changes"].items():
        assert list(joined[name].shape) == change["original"]
        assert list(parts["vae"][table["vae"][name]].shape) == change["diffusers"]
    split = split_checkpoint(joined, Path("model.safetensors"))
    for role in parts:
        found = {name: tensor.shape for name, tensor in getattr(split, role).items()}
        assert found == {name: tensor.shape for name, tensor in parts[role].items()}
    assert split.unet_config == published_config("unet")
    assert split.vae_config == published_config("vae")
    assert split.text_config == published_config("text_encoder")


def test_both_spellings_of_clip_names() -> None:
    for name in text_modules(2):
        assert published_text_name(name) == published_text_name(name.removeprefix("text_model.")) == name
        assert live_text_name(name, nested=True) == name
        assert published_text_name(live_text_name(name, nested=False)) == name
    assert published_text_name("text_projection.weight") == "text_projection.weight"
