"""Whole weights without a run: which parameters learn, blocks, the copy of the base model, saving."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_train.demo.tiny_model import TinyKind
from sd_train.device import Device
from sd_train.errors import ModelError
from sd_train.families.build import published_parameters
from sd_train.families.keys import unet_blocks, unet_modules, unet_shape_of
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import ModelParts, ModelRequest, read_model
from sd_train.families.published import FamilyName, published_config
from sd_train.families.sizes import model_sizes
from sd_train.families.sources import DictSource, Part, read_all
from sd_train.families.text import TextOptions
from sd_train.objectives.denoise import Denoise
from sd_train.trainables.full import Full, FullSettings
from sd_train.types import Batch, Geometry
from tests.models import assert_equal_tensors, fresh_tiny, golden, load, tiny_parts, write_file

CPU = torch.device("cpu")
ALL_RATES = {"unet": 1e-3, "text_encoder": 1e-4, "text_encoder_2": 1e-5}


def made(family: LatentDiffusion, **more: Any) -> Full:
    """Everything of `family` that can learn."""
    rates = {role: rate for role, rate in ALL_RATES.items() if role in family.networks}
    full = Full(FullSettings(**{"rates": rates, "read": family.parts, **more}))
    full.install(family)
    return full


def some_batch() -> Batch:
    """Two samples of 64x64 pixels."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 8, 8, generator=draw)
    return Batch(
        keys=["a", "b"], paths=["a", "b"], captions=["a cat", "two red dogs"],
        pixels=torch.rand(2, 3, 64, 64, generator=draw) * 2 - 1, images=None, noise=noise,
        latent_noise=torch.zeros_like(noise), timesteps=torch.tensor([200, 700]), weight=torch.ones(2), mask=None,
        texts=None, geometry=[Geometry((64, 64), (0, 0), (64, 64), False, (64, 64))] * 2, micro=0,
    )  # fmt: skip


def all_parameters(family: LatentDiffusion) -> dict[str, nn.Parameter]:
    return {
        f"{role}.{name}": parameter
        for role, network in family.networks.items()
        for name, parameter in published_parameters(role, network).items()
    }


@pytest.mark.parametrize(
    ("kind", "clip_skip", "idle"),
    [
        ("sd1", None, 0), ("sd1", 2, 16), ("sd2-v", None, 0), ("sd2-v", 3, 32),
        # The last layer's 16 tensors and the final norm's two.
        ("sdxl", None, 18), ("refiner", None, 0),
    ],
)  # fmt: skip
def test_exactly_what_gets_a_gradient_learns(kind: TinyKind, clip_skip: int | None, idle: int) -> None:
    family = fresh_tiny(kind)
    family.configure(TextOptions(clip_skip=clip_skip))
    full = made(family)
    chosen = set(full.tensors())
    parameters = all_parameters(family)
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == chosen
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    Denoise(family, full, Device(CPU, "no")).loss(some_batch()).sum().backward()  # type: ignore[no-untyped-call]
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == chosen
    assert len(parameters) - len(chosen) == idle


def test_groups_have_sd_scripts_names_and_an_end() -> None:
    groups = made(fresh_tiny("sdxl"), text_until=5).groups()
    assert [(group.name, group.lr, group.until) for group in groups] == [
        ("unet", 1e-3, None), ("text_encoder1", 1e-4, 5), ("text_encoder2", 1e-5, 5),
    ]  # fmt: skip
    assert all(name.startswith("text_encoder_2.") for name in groups[2].params)


def block_in_sd_scripts(key: str) -> int:
    """`get_block_params_to_optimize` of sd-scripts' sdxl_train.py."""
    first, number = key.split(".")[:2]
    within = {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}
    return within[first] + int(number) if first in within else {"time_embed": 0, "label_emb": 0, "out": 22}[first]


def test_blocks_are_those_of_sd_scripts() -> None:
    """On every key of the published SDXL model."""
    prefix = "model.diffusion_model."
    theirs = Counter(
        block_in_sd_scripts(key.removeprefix(prefix))
        for key in golden("checkpoint_keys_sdxl_base.json.gz")["keys"]
        if key.startswith(prefix) and key.endswith(".weight")
    )
    assert sorted(theirs) == list(range(23))
    shape = unet_shape_of(published_config("unet", "sdxl"))
    blocks = unet_blocks(shape)
    # Of the shortcuts only those are in the model where the width changes.
    there = {f"{prefix}{module.original}.weight": module.diffusers for module in unet_modules(shape)}
    keys = golden("checkpoint_keys_sdxl_base.json.gz")["keys"]
    assert Counter(blocks[name] for key, name in there.items() if key in keys) == theirs
    sampled = {"conv_in": 1, "down_blocks.2.attentions.1.norm": 9, "mid_block.resnets.1.conv1": 12,
               "up_blocks.0.upsamplers.0.conv": 15, "add_embedding.linear_2": 0, "conv_out": 22}  # fmt: skip
    assert {name: blocks[name] for name in sampled} == sampled


def test_blocks_get_rates_of_their_own_and_zero_freezes() -> None:
    family = fresh_tiny("sdxl")
    rates = (0.0, *(place * 1e-4 for place in range(1, 22)), 0.0)
    full = made(family, rates={"unet": max(rates)}, block_rates=rates)
    assert [(group.name, group.lr) for group in full.groups()] == [
        (f"block{place}", rate) for place, rate in enumerate(rates) if rate
    ]
    frozen = {name for name, parameter in all_parameters(family).items() if not parameter.requires_grad}
    outer = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")
    unet = {name.removeprefix("unet.") for name in frozen if name.startswith("unet.")}
    assert unet == {name for name in family.tensors("unet") if name.startswith(outer)}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_base_models_prediction_stays_at_hand(precision: Any) -> None:
    family, device, batch = fresh_tiny("sd1"), Device(CPU, precision), some_batch()
    full = made(family, reference=True)

    def predict() -> Tensor:
        latents = family.draw_latents(family.encode_images(batch.pixels), batch.latent_noise)  # type: ignore[arg-type]
        conditioning = family.condition(family.encode_texts(batch.captions), {}, batch.geometry)
        return family.predict(latents, batch.timesteps, conditioning)

    with device.autocast(), torch.no_grad():
        base = predict()
    with torch.no_grad():
        for tensor in full.tensors().values():
            tensor.mul_(1.01)
    learned = {name: tensor.clone() for name, tensor in full.tensors().items()}
    gradients = []
    for looks_back in (False, True):
        with device.autocast():
            now = predict()
            if looks_back:
                # After a prediction within the same autocast, which keeps what it has cast.
                with full.disabled(), torch.no_grad():
                    assert torch.equal(predict(), base)
                assert torch.equal(predict(), now)
        assert not torch.equal(now, base)
        now.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in all_parameters(family).items() if p.grad is not None})
        for parameter in all_parameters(family).values():
            parameter.grad = None
    assert gradients[0].keys() == gradients[1].keys() == learned.keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in learned)
    assert all(torch.equal(tensor, learned[name]) for name, tensor in full.tensors().items())


def test_loading_is_strict() -> None:
    full = made(fresh_tiny("sd1"), rates={"text_encoder": 1.0})
    tensors = {name: tensor + 1 for name, tensor in full.tensors().items()}
    full.load(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in full.tensors().items())
    first, *_ = tensors
    others = {**tensors, "unet.conv_in.weight": torch.zeros(1), first: torch.zeros(3)}
    del others["text_encoder.text_model.final_layer_norm.bias"]
    with pytest.raises(ModelError, match="3 differences") as raised:
        full.load(others)
    for reason in ("final_layer_norm.bias is missing", "conv_in.weight is not trained", "has shape (3,)"):
        assert reason in str(raised.value)


def saved_parts(path: Path) -> dict[str, dict[str, Tensor]]:
    parts = read_model(ModelRequest(str(path), allow_network=False)).parts
    return {role: read_all(part.tensors) for role, part in parts.items()}


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_what_does_not_learn_is_saved_as_it_was_stored(kind: TinyKind, tmp_path: Path) -> None:
    source = write_file(tmp_path, kind)
    family = load(source).to(CPU, torch.bfloat16, ["unet"])
    full = made(family, rates={"unet": 1.0}, read=lambda: read_model(ModelRequest(str(source))))
    average = {name: tensor + 1 for name, tensor in full.tensors().items()}
    path = tmp_path / "saved.safetensors"
    full.save(path, {"a": "b"}, average)
    before, after = saved_parts(source), saved_parts(path)
    assert after.pop("unet").keys() == before.pop("unet").keys()
    assert all(torch.equal(tensor, average[f"unet.{n}"]) for n, tensor in saved_parts(path)["unet"].items())
    for role, tensors in before.items():
        for name, tensor in tensors.items():
            assert after[role][name].dtype == tensor.dtype == torch.float16
            assert torch.equal(after[role][name], tensor)
    # Constants and layers that no network has in use are part of such a file too.
    assert load_file(path).keys() == load_file(source).keys()


def other_width(parts: ModelParts) -> ModelParts:
    tensors = {name: tensor[:1] for name, tensor in read_all(parts.parts["vae"].tensors).items()}
    return replace(parts, parts={**parts.parts, "vae": Part(parts.parts["vae"].config, DictSource(tensors))})


def other_numbers(parts: ModelParts) -> ModelParts:
    tensors = {name: tensor + 1 for name, tensor in read_all(parts.parts["vae"].tensors).items()}
    return replace(parts, parts={**parts.parts, "vae": Part(parts.parts["vae"].config, DictSource(tensors))})


@pytest.mark.parametrize("change", ["gone", "other width", "other numbers"])
def test_a_source_that_is_no_more_loses_no_training(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> ModelParts:
        if change == "gone":
            return read_model(ModelRequest(str(tmp_path / "gone.safetensors")))
        return (other_width if change == "other width" else other_numbers)(tiny_parts("sd1"))

    family = fresh_tiny("sd1")
    full = made(family, rates={"text_encoder": 1.0}, read=read)
    with caplog.at_level(logging.WARNING):
        full.save(tmp_path / "saved.safetensors", {})
    assert "cannot be read again" in caplog.text
    again = load(tmp_path / "saved.safetensors")
    for role in ("unet", "vae", "text_encoder"):
        assert_equal_tensors(again.tensors(role), family.tensors(role))


def test_sizes_are_those_of_the_saved_file(tmp_path: Path) -> None:
    source = write_file(tmp_path, "sd1")
    family = load(source)
    full = made(family, rates={"unet": 1.0}, read=lambda: read_model(ModelRequest(str(source))))
    for precision, number in ((None, None), (torch.float16, 2)):
        path = tmp_path / f"{number}.safetensors"
        replaced = Full(replace(full.settings, precision=precision))
        replaced.install(family)
        replaced.save(path, {})
        learned, size = model_sizes(read_model(ModelRequest(str(source))), ("unet",), number)
        assert learned == sum(tensor.numel() for tensor in full.tensors().values())
        # The header, and a constant of the text encoder.
        assert 0 < path.stat().st_size - size < 200_000


def published_parts(file: str, family: FamilyName) -> ModelParts:
    """A published model's networks in half precision: the names and shapes of its file, without numbers."""
    table = golden(f"checkpoint_keys_{file}.json.gz")
    parts = {}
    for role in ("unet", "vae", "text_encoder"):
        tensors = {
            name: torch.empty(table["keys"][key], dtype=torch.float16, device="meta")
            for key, name in table[role].items()
        }
        parts[role] = Part(published_config(role, family), DictSource(tensors))
    return replace(tiny_parts("sd1"), family=family, parts=parts)


def test_sizes_of_published_models() -> None:
    small, large = published_parts("sd15", "sd1"), published_parts("sdxl_base", "sdxl")
    unet, text, vae = 859_520_964, 123_060_480, 83_653_863
    assert model_sizes(small, ("unet", "text_encoder"), None) == (unet + text, 4 * (unet + text) + 2 * vae)
    assert model_sizes(small, ("unet",), None) == (unet, 4 * unet + 2 * (text + vae))
    assert model_sizes(small, ("unet",), 2) == (unet, 2 * (unet + text + vae))
    unet = 2_567_463_684
    assert model_sizes(large, ("unet",), None) == (unet, 4 * unet + 2 * (text + vae))
    # Blocks that stay are neither counted nor written in float32; all of them are the whole.
    blocks = [
        model_sizes(large, ("unet",), None, [float(place == block) for place in range(23)]) for block in range(23)
    ]
    assert sum(learned for learned, _ in blocks) == unet
    assert all(size == 2 * (unet + text + vae) + 2 * learned for learned, size in blocks)
    # The last one is a norm's 320 channels and a convolution of 3x3 to 4.
    assert blocks[22][0] == 2 * 320 + 4 * 320 * 9 + 4
