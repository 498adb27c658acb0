"""Loading every family from every kind of file, digests, precision, and models that cannot be trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from sd_train.__main__ import main
from sd_train.demo.tiny_model import TinyKind, make_tiny_parts, tiny_configs
from sd_train.errors import ModelError
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import ModelRequest
from sd_train.families.registry import check_model, load_family, make_family
from sd_train.families.sizes import lora_numbers
from sd_train.families.sources import read_all
from tests.models import (
    ALL_KINDS,
    SEED,
    all_tensors,
    assert_equal_tensors,
    fresh_tiny,
    load,
    original_tensors,
    tiny_parts,
    write_ckpt,
    write_file,
    write_folder,
)

PIPELINES: dict[TinyKind, Any] = {"sdxl": StableDiffusionXLPipeline, "refiner": StableDiffusionXLImg2ImgPipeline}


@pytest.fixture(scope="module", params=ALL_KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyKind, Path, Path]:
    """A kind of tiny model, its folder and its file in float32."""
    folder = tmp_path_factory.mktemp("saved")
    original_tensors(folder, request.param)
    return request.param, write_folder(folder, request.param), folder / f"original_{request.param}.safetensors"


def test_folder_file_and_ckpt_hold_equal_weights(saved: tuple[TinyKind, Path, Path], tmp_path: Path) -> None:
    kind, folder, file = saved
    made = fresh_tiny(kind)
    expected = all_tensors(made)
    ckpt = write_ckpt(tmp_path / "model.ckpt", original_tensors(tmp_path, kind), zipped=kind != "sd1")
    more = {"v_parameterization": False} if kind == "sd2" else {}
    for path in (folder, file, ckpt):
        loaded = load(path, **(more if path == ckpt else {}))
        assert_equal_tensors(all_tensors(loaded), expected)
        assert loaded.digest() == made.digest()
        assert (loaded.name, loaded.prediction, loaded.latent) == (made.name, made.prediction, made.latent)
        assert list(loaded.networks) == list(made.networks)
        for network in (*loaded.networks.values(), loaded.vae):
            assert not network.training
            assert not any(parameter.requires_grad for parameter in network.parameters())
            assert not any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_diffusers_reads_our_folder(saved: tuple[TinyKind, Path, Path]) -> None:
    kind, folder, _ = saved
    theirs: Any = PIPELINES.get(kind, StableDiffusionPipeline).from_pretrained(folder, local_files_only=True)
    made = fresh_tiny(kind)
    for role in (*made.networks, "vae"):
        ours = {name.removeprefix("text_model."): tensor for name, tensor in made.tensors(role).items()}
        found = {name.removeprefix("text_model."): each for name, each in getattr(theirs, role).state_dict().items()}
        assert_equal_tensors({name: each for name, each in found.items() if "position_ids" not in name}, ours)
    assert theirs.scheduler.config.prediction_type == made.prediction


def test_the_numbers_of_a_lora_are_known_from_headers(saved: tuple[TinyKind, Path, Path]) -> None:
    from sd_train.families.parts import read_model
    from sd_train.trainables.lora import Lora, LoraSettings

    kind, folder, file = saved
    family = fresh_tiny(kind)
    lora = Lora(LoraSettings(3, 1.0, 0.0, dict.fromkeys(family.networks, 1.0), 0))
    lora.install(family)
    expected = {
        role: sum(module.down.numel() + module.up.numel() + 1 for module in modules.values())
        for role, modules in lora.modules.items()
    }
    for path in (folder, file):
        assert lora_numbers(read_model(ModelRequest(str(path))), 3) == expected


def test_saved_parts_are_the_live_weights(tmp_path: Path) -> None:
    family = fresh_tiny("sdxl")
    with torch.no_grad():
        family.unet.conv_in.bias.fill_(0.25)
        family.module("text_encoder", "text_model.final_layer_norm").bias.fill_(1.0)
        family.module("text_encoder_2", "text_model.final_layer_norm").bias.fill_(2.0)
    parts = family.parts()
    assert {role: part.config for role, part in parts.parts.items()} == {
        role: part.config for role, part in tiny_parts("sdxl").parts.items()
    }
    found = {role: read_all(part.tensors) for role, part in parts.parts.items()}
    assert bool((found["unet"]["conv_in.bias"] == 0.25).all())
    assert bool((found["text_encoder"]["text_model.final_layer_norm.bias"] == 1).all())
    assert bool((found["text_encoder_2"]["text_model.final_layer_norm.bias"] == 2).all())
    assert {role: set(tensors) for role, tensors in found.items()} == {
        role: set(part.tensors.names()) for role, part in tiny_parts("sdxl").parts.items()
    }


def test_a_digest_is_of_values_and_changes_with_one_weight(tmp_path: Path) -> None:
    family, other = fresh_tiny("sdxl"), fresh_tiny("sdxl")
    first = family.digest()
    texts, images = other.encoder_digest("texts"), other.encoder_digest("images")
    with torch.no_grad():
        next(iter(other.networks["text_encoder_2"].parameters()))[3, 5] += 1e-3
    assert other.digest() != first
    assert other.encoder_digest("texts") != texts
    assert other.encoder_digest("images") == images
    # What half precision can hold is the same model however it is stored.
    path = write_file(tmp_path, "sdxl")
    stored = load_family(ModelRequest(str(path)), None)
    assert stored.networks["unet"].conv_in.weight.dtype == torch.float16
    assert stored.digest() == load(path).digest()


def test_precision_is_chosen_or_kept(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    assert main(["make_tiny_model", "--family", "sdxl", str(path)]) == 0
    assert path.stat().st_size < 20_000_000
    request = ModelRequest(str(path))
    wanted: tuple[tuple[torch.dtype | None, torch.dtype], ...] = (
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (None, torch.float16),
    )  # fmt: skip
    for asked, got in wanted:
        family = load_family(request, asked)
        assert isinstance(family, LatentDiffusion)
        assert {parameter.dtype for each in family.networks.values() for parameter in each.parameters()} == {got}
        assert family.vae.dtype == torch.float32


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradients_flow_with_checkpointing_too(kind: TinyKind) -> None:
    from sd_train.types import Geometry

    grads = []
    for checkpointed in (False, True):
        family = fresh_tiny(kind)
        weights = {}
        for role, network in family.networks.items():
            if checkpointed:
                family.checkpoint_gradients(role)
            path = family.lora_targets(role)[0].path
            weights[role] = family.module(role, path).weight.requires_grad_(True)
            assert network.training is checkpointed
        texts = family.encode_texts(["a cat"])
        told = family.condition(texts, {}, [Geometry((64, 64), (0, 0), (64, 64), False, (64, 64))])
        noisy = torch.ones(1, 4, 8, 8)
        family.predict(noisy, torch.tensor([5]), told).square().mean().backward()
        grads.append({role: weight.grad for role, weight in weights.items()})
        assert all(grad is not None and grad.abs().max() > 0 for grad in grads[-1].values())
    for role, grad in grads[0].items():
        torch.testing.assert_close(grads[1][role], grad, atol=1e-6, rtol=1e-4)


# Refusals


def with_unet(kind: TinyKind, **changes: Any) -> Any:
    configs = tiny_configs(kind)
    configs["unet"] |= changes
    return make_tiny_parts(kind, SEED, configs)


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_inpainting_models_are_refused_before_anything_is_loaded(kind: TinyKind, tmp_path: Path) -> None:
    from sd_train.families.saving import save_model

    parts = with_unet(kind, in_channels=9)
    path = tmp_path / "inpainting.safetensors"
    save_model(path, parts, "safetensors", None, {})
    for attempt in (check_model, load_family):
        with pytest.raises(ModelError, match=r"inpainting model \(its U-Net takes 9 channels") as caught:
            attempt(ModelRequest(str(path)))
        assert str(path) in str(caught.value)
    with pytest.raises(ModelError, match="inpainting model"):
        make_family(parts)
    with pytest.raises(ModelError, match="takes 8 channels and its VAE makes 4"):
        make_family(with_unet(kind, in_channels=8))


@pytest.mark.parametrize(
    ("role", "change", "reason"),
    [
        ("unet", {"block_out_channels": [32, 64, 64, 32]}, "the U-Net does not fit its configuration: .*size mismatch"),
        ("unet", {"down_block_types": ["Nothing"] * 4}, "no U-Net can be built"),
        ("vae", {"layers_per_block": 1}, "the VAE does not fit its configuration: .*Unexpected"),
        ("text_encoder", {"num_hidden_layers": 3}, "the text encoder does not fit its configuration: .*Missing"),
        ("text_encoder", {"num_attention_heads": 7}, "no text encoder can be built"),
    ],
)
def test_parts_that_do_not_fit_are_refused(role: str, change: dict[str, Any], reason: str) -> None:
    parts = tiny_parts("sd1", origin="some/model")
    parts.parts[role].config.update(change)
    try:
        with pytest.raises(ModelError, match=f"some/model: {reason}"):
            make_family(parts)
    finally:
        # The configuration is the shared one.
        parts.parts[role].config.update(tiny_configs("sd1")[role])


def test_a_folder_with_tokens_of_its_own_equals_diffusers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    encoder: Any = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(49410)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.add_tokens(["<cat-toy>", "<my-style>"]) == 2
    written: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        ("text_encoder", encoder.save_pretrained), ("tokenizer", tokenizer.save_pretrained),
    )  # fmt: skip
    for part, save in written:
        shutil.rmtree(folder / part)
        save(folder / part)
    ours = load(folder)
    theirs: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    for caption in ("a <cat-toy> in the style of <my-style>, red", "a cat"):
        with torch.no_grad():
            expected = theirs.encode_prompt(caption, "cpu", 1, False)[0]
            torch.testing.assert_close(ours.encode_texts([caption])["states"], expected, atol=1e-5, rtol=0)
    assert 49409 in ours.text_encoders["text_encoder"].tokenizer(["<my-style>"], 1).ids
    # The same weights under other words encode captions otherwise.
    shutil.copytree(folder, tmp_path / "renamed")
    for path in (tmp_path / "renamed" / "tokenizer").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("<my-style>", "<her-style>"), encoding="utf-8")
    assert load(tmp_path / "renamed").encoder_digest("texts") != ours.encoder_digest("texts")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match=r"knows 49410 tokens instead of CLIP's 49408, and"):
        load(folder)


def test_added_tokens_in_a_single_file_are_refused(tmp_path: Path) -> None:
    tensors = original_tensors(tmp_path, "sd1")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.zeros(49410, 64)
    path = tmp_path / "added.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"knows 49410 tokens .* a single file holds no names for them"):
        load(path)


# The command


def test_make_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "xl"
    assert main(["make_tiny_model", "--family", "refiner", "--seed", "5", str(folder)]) == 0
    assert json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"] == 32
    assert main(["make_tiny_model", "--family", "refiner", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    first, second = (make_tiny_parts("sd1", seed) for seed in (5, 5))
    different = make_tiny_parts("sd1", 6)
    weight = [read_all(each.parts["unet"].tensors)["conv_in.weight"] for each in (first, second, different)]
    assert torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], weight[2])
