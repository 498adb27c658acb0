"""Stable Diffusion 1.x: what is loaded, refused, encoded and predicted, against diffusers' own parts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sd_train.errors import ModelError
from sd_train.families.checkpoints import (
    SdParts,
    join_checkpoint,
    published_config,
    read_tensors,
    split_checkpoint,
    unet_shape_of,
)
from sd_train.families.sd import StableDiffusion1, load_sd1
from sd_train.types import Geometry
from tests.models import all_tensors, assert_equal_tensors, original_tensors, write_ckpt

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer."
LONG = ", ".join(f"a photo of {thing} number {n}" for n in range(6) for thing in ("a cat", "a rocket", "two cups"))
HUGE = " ".join(f"word{n}" for n in range(150))


@pytest.fixture(scope="module")
def full_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one file in float32."""
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in original_tensors().items()}, path)
    return path


@pytest.fixture(scope="module")
def family(full_file: Path) -> StableDiffusion1:
    return load_sd1(full_file)


@pytest.fixture(scope="module")
def diffusers_pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers' clip_skip reads the level that transformers 5.6 dropped.
        pipeline.text_encoder.__dict__["text_model"] = pipeline.text_encoder
    return pipeline


@pytest.fixture
def configured(family: StableDiffusion1) -> Iterator[StableDiffusion1]:
    yield family
    family.configure(None, None)


# Loading


def test_folder_file_and_ckpt_hold_equal_weights(tiny_folder: Path, full_file: Path, tmp_path: Path) -> None:
    from_folder, from_file = load_sd1(tiny_folder), load_sd1(full_file)
    ckpt = write_ckpt(tmp_path / "model.ckpt", load_file(full_file))
    before_zip = write_ckpt(tmp_path / "old.ckpt", load_file(full_file), zipped=False)
    flat = tmp_path / "flat.pt"
    torch.save(load_file(full_file), flat)
    expected = all_tensors(from_folder)
    assert_equal_tensors(expected, all_tensors(from_file))
    for path in (ckpt, before_zip, flat):
        assert_equal_tensors(expected, all_tensors(load_sd1(path)))
    assert from_folder.digest() == from_file.digest()
    assert from_folder.latent == from_file.latent
    for network in (from_file.unet, from_file.vae, from_file.text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_half_precision_file_loads_as_its_rounded_float32(tiny_model: Path, full_file: Path) -> None:
    loaded = all_tensors(load_sd1(tiny_model))
    expected = {name: tensor.half().float() for name, tensor in all_tensors(load_sd1(full_file)).items()}
    assert_equal_tensors(loaded, expected)


def test_digest_changes_with_one_weight(full_file: Path, family: StableDiffusion1) -> None:
    other = load_sd1(full_file)
    assert other.digest() == family.digest()
    with torch.no_grad():
        other.text_encoder.get_parameter(next(name for name, _ in other.text_encoder.named_parameters()))[3, 5] += 1e-3
    assert other.digest() != family.digest()


def join(parts: SdParts) -> dict[str, Tensor]:
    levels = len(parts.vae_config["block_out_channels"])
    return join_checkpoint(parts.unet, parts.vae, parts.text_encoder, unet_shape_of(parts.unet_config), levels)


def test_split_and_join_are_inverses(full_file: Path) -> None:
    original = original_tensors()
    assert_equal_tensors(join(split_checkpoint(original, full_file)), original)


def test_save_writes_what_was_read_and_overrides(family: StableDiffusion1, full_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    family.save(path, {})
    assert_equal_tensors(load_file(path), load_file(full_file))
    bias = torch.full_like(family.unet.conv_in.bias, 0.25)
    family.save(path, {"unet.conv_in.bias": bias, "text_encoder.text_model.final_layer_norm.bias": torch.ones(64)})
    saved = load_file(path)
    assert torch.equal(saved[UNET + "input_blocks.0.0.bias"], bias)
    assert torch.equal(saved[TEXT + "text_model.final_layer_norm.bias"], torch.ones(64))


def test_diffusers_reads_our_file(family: StableDiffusion1, full_file: Path, tiny_folder: Path) -> None:
    theirs = StableDiffusionPipeline.from_single_file(
        str(full_file), config=str(tiny_folder), local_files_only=True, safety_checker=None
    )
    loaded = StableDiffusion1(theirs.unet, theirs.vae, theirs.text_encoder)
    assert_equal_tensors(all_tensors(loaded), all_tensors(family))


def test_other_spellings_and_leftovers_load(family: StableDiffusion1, full_file: Path, tmp_path: Path) -> None:
    tensors = {name.replace(TEXT + "text_model.", TEXT): tensor for name, tensor in load_file(full_file).items()}
    tensors[TEXT + "embeddings.position_ids"] = torch.arange(77)[None]
    tensors |= {"betas": torch.ones(1000), "model_ema.decay": torch.tensor(0.9999)}
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(32, 4, 3, 3)
    tensors[TEXT + "text_projection.weight"] = torch.eye(64)
    path = tmp_path / "leftovers.safetensors"
    save_file(tensors, path)
    assert_equal_tensors(all_tensors(load_sd1(path)), all_tensors(family))


# Refusals


def without(prefix: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def adding(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(shape)

    return change


def only_lora(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"] = torch.zeros(4, 320)


FILES: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "SDXL": (adding("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", 768), "SDXL"),
    "SD 2": (adding("cond_stage_model.model.ln_final.weight", 1024), r"2\.x"),
    "LoRA": (only_lora, "LoRA, not a base model"),
    "nothing known": (lambda tensors: (tensors.clear(), tensors.update(x=torch.zeros(1)))[0], "none of its names"),
    "empty": (lambda tensors: tensors.clear(), "none of its names"),
    "inpainting": (adding(UNET + "input_blocks.0.0.weight", 32, 9, 3, 3), "9 input channels"),
    "no VAE": (without(VAE), r"incomplete.*first_stage_model"),
    "no text encoder": (without(TEXT), r"incomplete.*cond_stage_model"),
    "no first convolution": (without(UNET + "input_blocks.0."), r"incomplete|missing"),
    "no middle block": (without(UNET + "middle_block.1"), "incomplete"),
    "no quant_conv": (without(VAE + "quant_conv"), r"VAE.*quant_conv"),
    "one missing": (without(UNET + "output_blocks.4.0.in_layers.2.bias"), r"U-Net.*conv1\.bias|U-Net.*missing"),
    "one CLIP tensor missing": (without(TEXT + "text_model.final_layer_norm.bias"), r"missing.*final_layer_norm\.bias"),
    "unknown": (adding(UNET + "input_blocks.1.0.controlnet.weight", 3), r"unknown.*controlnet"),
    "unknown in the text encoder": (adding(TEXT + "text_model.adapter.weight", 3), r"unknown.*adapter"),
    "odd layer name": (adding(TEXT + "text_model.layers.0", 3), r"incomplete|unknown"),
    "odd block name": (adding(UNET + "input_blocks.first.weight", 3), r"incomplete|unknown"),
    "other shape": (adding(UNET + "time_embed.2.bias", 7), "does not fit"),
    "flat weight": (adding(UNET + "input_blocks.0.0.weight", 7), r"incomplete|fit"),
    "scalar weight": (adding(UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"), r"incomplete|fit"),
    "added tokens": (adding(TEXT + "text_model.embeddings.token_embedding.weight", 49410, 64), "49410 tokens"),
    "other VAE": (adding(VAE + "post_quant_conv.weight", 16, 16, 1, 1), "VAE does not fit"),
}


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    change, reason = FILES[kind]
    tensors = original_tensors()
    change(tensors)
    path = tmp_path / "other.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(ModelError, match=reason) as caught:
        load_sd1(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", [UNET, VAE, TEXT])
def test_missing_tensors_are_noticed(part: str, full_file: Path) -> None:
    tensors = original_tensors()
    whole = split_checkpoint(tensors, full_file)
    checked = 0
    names = [name for name in tensors if name.startswith(part)][::5]
    for name in names:
        taken = tensors.pop(name)
        try:
            parts = split_checkpoint(tensors, full_file)
        except ModelError as problem:
            message = str(problem)
            checked += "complete" in message and str(full_file) in message
        else:
            checked += 1
            # The networks are then the whole file's, and loading is strict.
            assert (parts.unet_config, parts.vae_config) == (whole.unet_config, whole.vae_config)
            assert parts.text_config == whole.text_config
            found, expected = ({*each.unet, *each.vae, *each.text_encoder} for each in (parts, whole))
            assert len(found) == len(expected) - 1
        tensors[name] = taken
    assert checked == len(names)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("length", [0, 5, 100, 100_000])
def test_truncated_files_are_refused(suffix: str, length: int, full_file: Path, tmp_path: Path) -> None:
    whole = full_file if suffix == ".safetensors" else write_ckpt(tmp_path / "whole.ckpt", load_file(full_file))
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole.read_bytes()[:length])
    with pytest.raises(ModelError, match="download it again") as caught:
        load_sd1(path)
    assert str(path) in str(caught.value)


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, target: Path, function: Callable[..., Any]) -> None:
        self.target, self.function = target, function

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (str(self.target), "w") if self.function is open else (f"echo > {self.target}",)
        return self.function, arguments


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [open, os.system, exec, Path], ids=["open", "system", "exec", "Path"])
def test_code_inside_a_pickle_never_runs(function: Callable[..., Any], zipped: bool, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "model.ckpt"
    content = {"state_dict": {"x": torch.zeros(2)}, "callbacks": Malicious(target, function)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    reason = rf"Python objects.*{function.__name__}\); convert the file to \.safetensors"
    with pytest.raises(ModelError, match=reason) as caught:
        load_sd1(path)
    assert str(path) in str(caught.value)
    assert not target.exists()


def test_a_web_page_saved_as_ckpt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    with pytest.raises(ModelError, match="cannot be read as a PyTorch file"):
        load_sd1(path)


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    with pytest.raises(ModelError, match="no table of tensors"):
        load_sd1(path)


def test_paths_that_are_no_model_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("x")
    for path, reason in ((tmp_path / "none.safetensors", "no such file or folder"), (text, "not a model file")):
        with pytest.raises(ModelError, match=reason) as caught:
            load_sd1(path)
        assert str(path) in str(caught.value)
    with pytest.raises(ModelError, match=r"not a model file"):
        read_tensors(text)


def link_folder(source: Path, target: Path) -> Path:
    """A copy whose weights are links: cheap to change around."""
    return Path(shutil.copytree(source, target, copy_function=lambda old, new: Path(new).symlink_to(old)))


def test_broken_folders_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(ModelError, match=reason) as caught:
            load_sd1(folder)
        assert str(folder) in str(caught.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no unet/config\.json \(found: nothing\)")
    no_unet = link_folder(tiny_folder, tmp_path / "no_unet")
    shutil.rmtree(no_unet / "unet")
    refused(no_unet, r"no unet/config\.json \(found: .*vae")
    no_weights = link_folder(tiny_folder, tmp_path / "no_weights")
    next((no_weights / "vae").glob("*.safetensors")).unlink()
    refused(no_weights, "vae cannot be loaded")
    cut = link_folder(tiny_folder, tmp_path / "cut")
    for part in ("unet", "text_encoder"):
        weights = next((cut / part).glob("*.safetensors"))
        content = weights.read_bytes()[:1000]
        weights.unlink()
        weights.write_bytes(content)
        refused(cut, f"{part} cannot be loaded")
        shutil.rmtree(cut / part)
        shutil.copytree(tiny_folder / part, cut / part)
    for part in ("unet", "vae", "text_encoder"):
        incomplete = link_folder(tiny_folder, tmp_path / f"incomplete_{part}")
        weights = next((incomplete / part).glob("*.safetensors"))
        tensors = load_file(weights)
        gone = next(name for name in tensors if name.endswith("bias"))
        del tensors[gone]
        weights.unlink()
        save_file(tensors, weights, {"format": "pt"})
        refused(incomplete, f"1 tensors of {part} are missing")
    xl = link_folder(tiny_folder, tmp_path / "xl")
    (xl / "text_encoder_2").mkdir()
    refused(xl, "SDXL")
    config = json.loads((tiny_folder / "unet" / "config.json").read_text())
    for key, value, reason in (("use_linear_projection", True, r"2\.x"), ("in_channels", 9, "9 input channels")):
        other = link_folder(tiny_folder, tmp_path / key)
        (other / "unet" / "config.json").unlink()
        (other / "unet" / "config.json").write_text(json.dumps(config | {key: value}))
        refused(other, f"{reason}|cannot be loaded")
    scheduler = link_folder(tiny_folder, tmp_path / "scheduler") / "scheduler" / "scheduler_config.json"
    scheduler.unlink()
    for text, reason in (('{"prediction_type": "v_prediction"}', "v_prediction"), ("{", "JSON"), ("[]", "JSON")):
        scheduler.write_text(text)
        refused(scheduler.parents[1], reason)
    (tmp_path / "wide").mkdir()
    wide = link_folder(tiny_folder, tmp_path / "wide" / "model")
    shutil.rmtree(wide / "vae")
    config = published_config("vae") | {"block_out_channels": [32] * 4, "latent_channels": 16}
    AutoencoderKL.from_config(config).save_pretrained(wide / "vae")
    refused(wide, "16 channels")


def test_a_folder_with_tokens_of_its_own_equals_diffusers(tiny_folder: Path, tmp_path: Path) -> None:
    folder = link_folder(tiny_folder, tmp_path / "added")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    encoder.resize_token_embeddings(49410)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer.add_tokens(["<cat-toy>", "<my-style>"]) == 2
    for part, written in (("text_encoder", encoder), ("tokenizer", tokenizer)):
        shutil.rmtree(folder / part)
        written.save_pretrained(folder / part)
    ours = load_sd1(folder)
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    for caption in ("a <cat-toy> in the style of <my-style>, red", "a cat"):
        with torch.no_grad():
            expected = theirs.encode_prompt(caption, "cpu", 1, False)[0]
            torch.testing.assert_close(ours.encode_texts([caption])["states"], expected, atol=1e-5, rtol=0)
    assert 49409 in ours.tokenizer(["<my-style>"], 1)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelError, match="knows 49410 tokens"):
        load_sd1(folder)


# Parity with diffusers

CAPTIONS = {"short": "a cat, close up", "empty": "", "long": LONG, "odd": "Ein HÄUSCHEN  <b>&amp;</b> (x:1.2) 猫 🚀!"}


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_noise_prediction_equals_diffusers(
    caption: str, clip_skip: int | None, configured: StableDiffusion1, diffusers_pipeline: StableDiffusionPipeline
) -> None:
    configured.configure(clip_skip, None)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    timesteps = torch.tensor([17, 801])
    with torch.no_grad():
        texts = configured.encode_texts([caption, caption])
        geometry = [Geometry((64, 96), (0, 0), (64, 96), False, (64, 96))] * 2
        ours = configured.predict(latents, timesteps, configured.condition(texts, {}, geometry))
        # diffusers counts the layers that are left out, A1111 and sd-scripts the layer from the end that is used.
        skip = None if clip_skip is None or clip_skip == 1 else clip_skip - 1
        states = diffusers_pipeline.encode_prompt(caption, "cpu", 1, False, clip_skip=skip)[0]
        theirs = diffusers_pipeline.unet(latents, timesteps, states.expand(2, -1, -1)).sample
    torch.testing.assert_close(texts["states"], states.expand(2, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_caption_and_clip_skip_change_the_prediction(configured: StableDiffusion1) -> None:
    latents, timesteps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([500])
    predictions = []
    for caption, skip in (("a cat", None), ("a rocket", None), ("a cat", 2)):
        configured.configure(skip, None)
        with torch.no_grad():
            conditioning = configured.condition(configured.encode_texts([caption]), {}, [])
            predictions.append(configured.predict(latents, timesteps, conditioning))
    assert (predictions[0] - predictions[1]).abs().mean() > 1e-3
    assert (predictions[0] - predictions[2]).abs().mean() > 1e-3


@pytest.mark.parametrize("clip_skip", [None, 2])
@pytest.mark.parametrize("tokens", [150, 225])
@pytest.mark.parametrize("caption", ["a cat", LONG, HUGE], ids=["short", "long", "huge"])
def test_long_captions_equal_separate_chunks(
    caption: str, tokens: int, clip_skip: int | None, configured: StableDiffusion1,
    diffusers_pipeline: StableDiffusionPipeline,
) -> None:  # fmt: skip
    configured.configure(clip_skip, tokens)
    tokenizer, encoder = diffusers_pipeline.tokenizer, diffusers_pipeline.text_encoder
    ids = tokenizer(caption, add_special_tokens=False)["input_ids"][:tokens]
    ids += [49407] * (tokens - len(ids))
    pieces: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, tokens, 75):
            chunk = torch.tensor([[49406, *ids[start : start + 75], 49407]])
            output = encoder(chunk, output_hidden_states=True)
            states = output.last_hidden_state
            if clip_skip:
                states = encoder.text_model.final_layer_norm(output.hidden_states[-clip_skip])
            first, last = start == 0, start + 75 == tokens
            pieces.append(states[:, 0 if first else 1 : 77 if last else 76])
        ours = configured.encode_texts([caption])["states"]
    assert ours.shape == (1, tokens + 2, 64)
    torch.testing.assert_close(ours, torch.cat(pieces, dim=1), atol=1e-5, rtol=0)


def test_more_layers_than_there_are_cannot_be_skipped(configured: StableDiffusion1) -> None:
    with pytest.raises(ModelError, match="--clip_skip = 3: the text encoder has 2 layers"):
        configured.configure(3, None)


def test_prompts_take_the_chunks_of_the_longer_prompt(configured: StableDiffusion1) -> None:
    with torch.no_grad():
        prompt, negative = configured.prompt_arguments(HUGE, "ugly").values()
        short, _ = configured.prompt_arguments("a cat", "").values()
        assert torch.equal(short, configured.encode_texts(["a cat"])["states"])
    assert prompt.shape == negative.shape == (1, 227, 64)
    assert short.shape == (1, 77, 64)


def test_autoencoder_equals_diffusers(family: StableDiffusion1, diffusers_pipeline: StableDiffusionPipeline) -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(2, 3, 64, 96, generator=generator) * 2 - 1
    with torch.no_grad():
        theirs = diffusers_pipeline.vae.encode(pixels).latent_dist
        drawn = theirs.sample(torch.Generator().manual_seed(9)) * diffusers_pipeline.vae.config.scaling_factor
    ours = family.encode_images(pixels)
    assert ours["mean"].shape == (2, *family.latent.shape(96, 64)) == (2, 4, 8, 12)
    torch.testing.assert_close(ours["mean"], theirs.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close((0.5 * ours["logvar"]).exp(), theirs.std, atol=1e-5, rtol=1e-5)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(family.draw_latents(ours, noise), drawn, atol=1e-5, rtol=0)
