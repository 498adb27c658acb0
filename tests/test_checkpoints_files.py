"""Reading and writing whole models: every form, both directions, what only flags can tell."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.demo.tiny_model import KINDS, TinyKind
from sd_train.errors import ModelError
from sd_train.families.parts import CONFIG_ENTRY, ModelParts, ModelRequest, model_kind, read_model
from sd_train.families.published import scheduler_config
from sd_train.families.saving import SaveForm, original_tensors, save_model
from sd_train.families.sources import CastSource, DictSource, Part, SafetensorsSource, read_all
from sd_train.families.tokenizer import load_clip_tokenizer
from tests.models import assert_equal_tensors, tiny_parts

SUFFIX: dict[SaveForm, str] = {
    "safetensors": ".safetensors", "ckpt": ".ckpt", "diffusers": "", "diffusers_safetensors": "",
}  # fmt: skip
SINGLE: tuple[SaveForm, ...] = ("safetensors", "ckpt")
ROUND: tuple[SaveForm, ...] = (
    "diffusers", "safetensors", "diffusers_safetensors", "ckpt", "diffusers", "safetensors",
)  # fmt: skip


def all_tensors(parts: ModelParts) -> dict[str, Tensor]:
    """Every weight, as "role.name"."""
    return {f"{role}.{n}": t for role, part in parts.parts.items() for n, t in read_all(part.tensors).items()}


def saved(parts: ModelParts, folder: Path, form: SaveForm, name: str = "model") -> Path:
    path = folder / f"{name}{SUFFIX[form]}"
    save_model(path, parts, form)
    return path


def read(path: Path, **said: Any) -> ModelParts:
    return read_model(ModelRequest(str(path), **said))


def in_half(parts: ModelParts) -> ModelParts:
    """A model whose networks are stored in different precisions, as published ones are."""
    dtypes = {"unet": torch.float16, "vae": torch.float32, "text_encoder": torch.bfloat16}
    halves = {
        role: Part(part.config, CastSource(part.tensors, dtypes.get(role, torch.float16)))
        for role, part in parts.parts.items()
    }
    return replace(parts, parts=halves)


@pytest.mark.parametrize(("kind", "zero"), [*((kind, False) for kind in KINDS), ("sd1", True), ("sdxl", True)])
def test_round_trips_change_no_byte(kind: TinyKind, zero: bool, tmp_path: Path) -> None:
    first = in_half(tiny_parts(kind, zero_terminal_snr=zero))
    scheduler = scheduler_config(first.family, first.prediction, zero)
    assert ("rescale_betas_zero_snr" in scheduler) == zero
    tensors = all_tensors(first)
    current = first
    for place, form in enumerate(ROUND):
        path = saved(current, tmp_path, form, str(place))
        current = read(path)
        assert_equal_tensors(all_tensors(current), tensors)
        assert (current.family, current.prediction, current.zero_terminal_snr) == (first.family, KINDS[kind][1], zero)
        assert current.form == form.removesuffix("_safetensors")
        assert current.scheduler == scheduler
        for role, part in first.parts.items():
            config = current.parts[role].config
            ignored = {"_class_name", "projection_dim"} if role == "text_encoder" else {"_class_name"}
            expected = {key: value for key, value in part.config.items() if key not in ignored}
            assert {key: config.get(key) for key in expected} == expected
    # The same content gives the same bytes, whatever files it went through.
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "5.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl"])
def test_markers_are_written_where_comfyui_reads_them(kind: TinyKind, tmp_path: Path) -> None:
    for prediction, zero in (("epsilon", False), ("v_prediction", False), ("v_prediction", True)):
        parts = tiny_parts(kind, prediction=prediction, zero_terminal_snr=zero)
        names = load_file(saved(parts, tmp_path, "safetensors", f"{prediction}{zero}"))
        assert ("v_pred" in names, "ztsnr" in names) == (prediction == "v_prediction", zero)
        content = torch.load(saved(parts, tmp_path, "ckpt", f"{prediction}{zero}"), weights_only=True)
        assert sorted(content["state_dict"]) == sorted(names)


def test_unusual_widths_come_back_from_single_files(tmp_path: Path) -> None:
    """Heads, groups and scales are told by no tensor, so our files note them."""
    parts = tiny_parts("sdxl")
    unet, vae = parts.parts["unet"], parts.parts["vae"]
    unet = Part({**unet.config, "attention_head_dim": [2, 4, 4], "norm_num_groups": 16}, unet.tensors)
    vae = Part({**vae.config, "scaling_factor": 0.5, "force_upcast": False}, vae.tensors)
    text = parts.parts["text_encoder"]
    text = Part({**text.config, "num_attention_heads": 2, "hidden_act": "gelu"}, text.tensors)
    networks = {**parts.parts, "unet": unet, "vae": vae, "text_encoder": text}
    scheduler = {**parts.scheduler, "_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    unusual = replace(parts, parts=networks, scheduler=scheduler)
    for form in SINGLE:
        found = read(saved(unusual, tmp_path, form))
        assert found.scheduler == scheduler
        configs = {role: part.config for role, part in found.parts.items()}
        assert configs["unet"]["attention_head_dim"] == [2, 4, 4]
        assert configs["unet"]["norm_num_groups"] == 16
        assert (configs["vae"]["scaling_factor"], configs["vae"]["force_upcast"]) == (0.5, False)
        assert (configs["text_encoder"]["num_attention_heads"], configs["text_encoder"]["hidden_act"]) == (2, "gelu")
    assert CONFIG_ENTRY not in read(saved(parts, tmp_path, "safetensors", "usual")).metadata
    broken = tmp_path / "broken.safetensors"
    save_file(load_file(tmp_path / "model.safetensors"), broken, {CONFIG_ENTRY: "["})
    with pytest.raises(ModelError, match="is no JSON table"):
        read(broken)


def test_libraries_read_our_folders(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

    kinds: dict[TinyKind, Any] = {
        "sd1": StableDiffusionPipeline, "sd2-v": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline,
        "refiner": StableDiffusionXLImg2ImgPipeline,
    }  # fmt: skip
    for kind, pipeline_class in kinds.items():
        parts = tiny_parts(kind)
        folder = saved(parts, tmp_path, "diffusers", kind)
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == pipeline_class.__name__
        pipeline = pipeline_class.from_pretrained(folder, local_files_only=True)
        for role, part in parts.parts.items():
            network = getattr(pipeline, role)
            live = {name.removeprefix("text_model."): tensor for name, tensor in network.state_dict().items()}
            published = {name.removeprefix("text_model."): tensor for name, tensor in read_all(part.tensors).items()}
            assert_equal_tensors({n: t for n, t in live.items() if "position_ids" not in n}, published)
            if role.startswith("text"):
                assert "text_model.final_layer_norm.weight" in load_file(folder / role / "model.safetensors")
                tokenizer = getattr(pipeline, role.replace("text_encoder", "tokenizer"))
                pad = "<|endoftext|>" if role == "text_encoder" and kind != "sd2-v" else "!"
                ours = load_clip_tokenizer(pad)
                for text in ("a photo of a cat", "Żółw, 東京", ""):
                    padded = {"padding": "max_length", "max_length": 77, "truncation": True}
                    assert tokenizer(text, **padded)["input_ids"] == ours(text, **padded)["input_ids"]
        assert pipeline.scheduler.config["prediction_type"] == parts.prediction


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_our_single_files(kind: TinyKind, tmp_path: Path) -> None:
    """Text encoders included: their names, stacked matrices and the projection's orientation."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = tiny_parts(kind)
    folder, file = saved(parts, tmp_path, "diffusers"), saved(parts, tmp_path, "safetensors")
    pipeline_class: Any = StableDiffusionPipeline if kind == "sd1" else StableDiffusionXLPipeline
    pipeline = pipeline_class.from_single_file(str(file), config=str(folder), local_files_only=True)
    for role, part in parts.parts.items():
        live = {n.removeprefix("text_model."): t for n, t in getattr(pipeline, role).state_dict().items()}
        for name, tensor in read_all(part.tensors).items():
            assert torch.equal(live[name.removeprefix("text_model.")], tensor), (role, name)


def test_the_projection_is_transposed_in_original_files(tmp_path: Path) -> None:
    parts = tiny_parts("sdxl")
    projection = parts.parts["text_encoder_2"].tensors.read("text_projection.weight")
    file = load_file(saved(parts, tmp_path, "safetensors"))
    assert torch.equal(file["conditioner.embedders.1.model.text_projection"], projection.T)
    assert not torch.equal(projection, projection.T)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_both_spellings_of_text_encoder_names(kind: TinyKind, tmp_path: Path) -> None:
    """transformers 5.6 and later save without `text_model.`."""
    parts = tiny_parts(kind)
    folder = saved(parts, tmp_path, "diffusers")
    file = folder / "text_encoder" / "model.safetensors"
    short = {name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}
    constants = {"embeddings.position_ids": torch.arange(77)[None]}
    save_file({**short, **constants}, file, {"format": "pt"})
    assert_equal_tensors(all_tensors(read(folder)), all_tensors(parts))


def split(file: Path, stem: str) -> None:
    """Replace `file` by two shards and their index."""
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {f"{stem}-00001-of-00002.safetensors": names[::2], f"{stem}-00002-of-00002.safetensors": names[1::2]}
    for name, half in halves.items():
        save_file({key: tensors[key] for key in half}, file.parent / name, {"format": "pt"})
    weight_map = {key: name for name, half in halves.items() for key in half}
    index = {"metadata": {}, "weight_map": weight_map}
    (file.parent / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()


def test_folders_in_all_their_forms(tmp_path: Path) -> None:
    parts = tiny_parts("sdxl")
    folder = saved(parts, tmp_path, "diffusers")
    split(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model")
    text = folder / "text_encoder" / "model.safetensors"
    text.rename(text.with_name("model.fp16.safetensors"))
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(vae), vae.with_suffix(".bin"))
    vae.unlink()
    second = folder / "text_encoder_2" / "model.safetensors"
    # What full precision says counts, whatever lies beside it.
    save_file({"x": torch.zeros(1)}, second.with_name("model.fp16.safetensors"))
    assert_equal_tensors(all_tensors(read(folder)), all_tensors(parts))
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names files that are not there: diffusion_pytorch_model-00002"):
        read(folder)


def test_folders_of_old_diffusers_releases(tmp_path: Path) -> None:
    """Before 0.15 the autoencoder's attention had other names."""
    parts = tiny_parts("sd1")
    folder = saved(parts, tmp_path, "diffusers")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile(r"(attentions\.0\.)(to_q|to_k|to_v|to_out\.0)\.")
    tensors = {pattern.sub(lambda m: f"{m[1]}{old[m[2]]}.", name): tensor for name, tensor in load_file(file).items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, file)
    assert_equal_tensors(all_tensors(read(folder)), all_tensors(parts))


def changed(folder: Path, part: str, **fields: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_broken_folders_are_refused_by_name(tmp_path: Path) -> None:
    whole = saved(tiny_parts("sd1"), tmp_path, "diffusers")
    copies = iter(range(100))

    def copy() -> Path:
        return Path(shutil.copytree(whole, tmp_path / f"copy{next(copies)}"))

    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(ModelError, match=reason) as caught:
            read(folder)
        assert str(folder) in str(caught.value)

    folder = copy()
    shutil.rmtree(folder / "text_encoder")
    refused(folder, r"no text_encoder/config\.json \(found: model_index\.json, ")
    (folder := copy()).joinpath("unet", "config.json").write_text("{")
    refused(folder, r"config\.json: is no JSON table")
    (folder := copy()).joinpath("vae", "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, r"vae: holds no weights \(found: config\.json\)")
    changed(folder := copy(), "unet", layers_per_block=3)
    refused(folder, r"unet: \d+ tensors are missing, e\.g\. .*do not belong to its config\.json")
    changed(folder := copy(), "text_encoder", num_hidden_layers=1)
    refused(folder, r"text_encoder: 16 tensors are unknown, e\.g\. text_model\.encoder\.layers\.1")
    changed(folder := copy(), "unet", down_block_types=None)
    refused(folder, r"unet.config\.json: is not understood")
    changed(folder := copy(), "unet", class_embed_type="projection")
    refused(folder, "told classes or images")
    (folder := copy()).joinpath("scheduler", "scheduler_config.json").write_text('{"prediction_type": "flow"}')
    refused(folder, "was trained to predict 'flow'")
    (folder := copy()).joinpath("unet", "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 9)
    refused(folder, "cannot be read as safetensors")


def test_what_no_tensor_tells_is_asked_for(tmp_path: Path) -> None:
    parts = tiny_parts("sd2")
    plain = tmp_path / "plain.safetensors"
    save_file(read_all(original_tensors(parts)), plain)
    with pytest.raises(ModelError, match=r"say --v_parameterization \(768\) or --no_v_parameterization \(512, base\)"):
        read(plain)
    with pytest.raises(ModelError, match="--v_parameterization"):
        read(plain, v2=True)
    assert read(plain, v_parameterization=False).prediction == "epsilon"
    told = read(plain, v2=True, v_parameterization=True)
    assert told.prediction == told.scheduler["prediction_type"] == "v_prediction"
    assert told.parts["unet"].config["sample_size"] == 96
    guessed = read_model(ModelRequest(str(plain), guess=True))
    assert (guessed.prediction, guessed.told) == ("epsilon", False)
    for entries, prediction in (
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon"),
        ({"ss_base_model_version": "sd_v2_v"}, "v_prediction"),
    ):
        file = tmp_path / "told.safetensors"
        save_file(load_file(plain), file, entries)
        assert read(file).prediction == prediction
        # Markers count more than metadata, flags more than both.
        save_file({**load_file(plain), "v_pred": torch.empty(0)}, file, entries)
        assert read(file).prediction == "v_prediction"
        assert read(file, v_parameterization=False).prediction == "epsilon"
    folder = saved(parts, tmp_path, "diffusers")
    assert read(folder).prediction == "epsilon"
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ModelError, match="--no_v_parameterization"):
        read(folder)


@pytest.mark.parametrize(
    ("kind", "said", "reason"),
    [
        ("sd1", {"v2": True}, "is Stable Diffusion 1.x, and --v2 says otherwise; leave --v2 out"),
        ("sd1", {"sdxl": True}, "is Stable Diffusion 1.x, and --sdxl says otherwise"),
        ("sdxl", {"v2": True}, "is SDXL, and --v2 says otherwise"),
        ("sd2-v", {"sdxl": True}, "is Stable Diffusion 2.x, and --sdxl says otherwise"),
    ],
)
def test_flags_must_not_contradict_the_tensors(kind: TinyKind, said: Any, reason: str, tmp_path: Path) -> None:
    path = saved(tiny_parts(kind), tmp_path, "safetensors")
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        read(path, **said)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl", "refiner"])
def test_kinds_are_known_before_weights_are_read(kind: TinyKind, tmp_path: Path) -> None:
    parts = tiny_parts(kind)
    path = saved(parts, tmp_path, "safetensors")
    with path.open("rb+") as file:
        # Only the header is left; the weights are a hole.
        length = 8 + int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        file.truncate(length)
        file.truncate(size)
    found = model_kind(ModelRequest(str(path), v2=kind == "sd2-v", sdxl=kind != "sd2-v"))
    assert (found.family, found.prediction) == (parts.family, parts.prediction)
    assert found.multiple == (64 if kind == "sd2-v" else 32)
    assert (found.latent.channels, found.latent.factor, found.in_channels) == (4, 8, 4)
    assert found.latent.scale == (0.18215 if kind == "sd2-v" else 0.13025)
    assert found.configs["unet"]["block_out_channels"] == parts.parts["unet"].config["block_out_channels"]


def test_precision_and_numbers_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = tiny_parts("sd1")
    tensors = read_all(parts.parts["vae"].tensors)
    tensors["decoder.conv_out.bias"] = torch.full((3,), 1e5)
    parts = replace(parts, parts={**parts.parts, "vae": Part(parts.parts["vae"].config, DictSource(tensors))})
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for form in ("safetensors", "ckpt", "diffusers"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                save_model(path := tmp_path / f"{name}{SUFFIX[form]}", parts, form, dtype)
            assert {tensor.dtype for tensor in all_tensors(read(path)).values()} == {dtype}
            expected = dtype == torch.float16
            assert any("which fp16 cannot hold" in line for line in caplog.messages) == expected, form
            assert all(tensor.isfinite().all() for tensor in all_tensors(read(path)).values())


def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    from sd_train.families.streaming import put_safetensors

    generator = torch.Generator().manual_seed(0)
    tensors = {
        "z": torch.randn(3, 5, generator=generator), "a": torch.randn(7, generator=generator).half(),
        "empty": torch.empty(0), "scalar": torch.tensor(2.5), "long": torch.arange(4),
        "flag": torch.tensor([True, False, True]), "bf": torch.randn(2, 2, generator=generator).bfloat16(),
    }  # fmt: skip
    put_safetensors(tmp_path / "ours", DictSource(tensors), {"format": "pt", "a": "é"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert_equal_tensors(load_file(tmp_path / "ours"), load_file(tmp_path / "theirs"))
    source = SafetensorsSource.open([tmp_path / "ours"])
    assert source.metadata == {"format": "pt", "a": "é"}
    assert_equal_tensors(read_all(source), tensors)
    put_safetensors(tmp_path / "plain", DictSource(tensors))
    save_file(tensors, tmp_path / "theirs")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "theirs").read_bytes()
