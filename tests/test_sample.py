"""`sd-train sample`: pictures as diffusers draws them, with LoRAs and embeddings, explained as A1111 explains them."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sd_train.__main__ import main
from sd_train.commands.sample import ChosenLora, SampleOptions, read_options
from sd_train.commands.sample_pictures import load_model
from sd_train.data.words import Words
from sd_train.device import Device
from sd_train.drawing import draw_pixels, make_grid, parameters_text, to_picture
from sd_train.errors import ConfigError, ModelError
from sd_train.families.embeddings import install_embeddings, read_embedding, read_embeddings
from sd_train.families.latent import LatentDiffusion
from sd_train.prompts import CANONICAL_SAMPLERS, Prompt
from sd_train.samplers import make_sampler
from tests.models import DATA, TinyKind, fresh_tiny, reference_pipeline, write_file, write_folder

EMBEDDINGS = DATA / "embeddings"
PROMPT = Prompt("a photo of a cat on a mat", "blurry, low quality", width=64, height=96, steps=4, scale=5.0, seed=3)
CPU = Device(torch.device("cpu"), "no")
DRAWN: tuple[TinyKind, ...] = ("sd1", "sd2-v", "sdxl")


def options_for(*words: str | Path) -> SampleOptions:
    return read_options([str(word) for word in words])


def theirs(pipeline: Any, prompt: Prompt, scheduler: Any, **more: Any) -> Tensor:
    """What diffusers' own pipeline draws from a text, [3, height, width] in [0, 1]."""
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipeline.scheduler = scheduler(**settings, prediction_type=pipeline.scheduler.config.prediction_type)
    drawn: Tensor = pipeline(
        prompt.text,
        negative_prompt=prompt.negative,
        width=prompt.width,
        height=prompt.height,
        num_inference_steps=prompt.steps,
        guidance_scale=prompt.scale,
        generator=torch.Generator("cpu").manual_seed(prompt.seed or 0),
        output_type="pt",
        **more,
    ).images[0]
    return drawn


def ours(family: Any, prompt: Prompt, sampler: str) -> Tensor:
    return (draw_pixels(family, prompt, sampler, prompt.seed or 0) / 2 + 0.5).clamp(0, 1)


def assert_same_picture(mine: Tensor, other: Tensor) -> None:
    assert mine.shape == other.shape
    assert float(other.std()) > 0.05
    assert float((mine - other).abs().max()) < 1e-4


def random_lora(family: LatentDiffusion, path: Path, rank: int = 3, alpha: float = 2.0) -> Path:
    """A LoRA in kohya's format for every module that gets one, large enough to change the picture."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for role in family.networks:
        for target in family.lora_targets(role):
            weight: Any = family.module(role, target.path).weight
            tensors[f"{target.key}.alpha"] = torch.tensor(alpha)
            down = torch.randn(rank, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), rank, *[1] * (weight.dim() - 2), generator=generator) * 0.3
            tensors |= {f"{target.key}.lora_down.weight": down, f"{target.key}.lora_up.weight": up}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", DRAWN)
def test_the_picture_is_that_of_diffusers(kind: TinyKind) -> None:
    pipeline, family = reference_pipeline(kind), fresh_tiny(kind)
    # It draws more noise on its way.
    mine = ours(family, PROMPT, "euler_a")
    assert_same_picture(mine, theirs(pipeline, PROMPT, EulerAncestralDiscreteScheduler))


@pytest.mark.parametrize("kind", DRAWN)
def test_with_a_lora_too(kind: TinyKind, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, kind)
    lora = random_lora(fresh_tiny(kind), tmp_path / "style.safetensors")
    plain = ours(load_model(options_for(folder, "--prompt", "x"), CPU), PROMPT, "euler")
    family = load_model(options_for(folder, "--prompt", "x", "--lora", f"{lora}:0.7"), CPU)
    pipeline = reference_pipeline(kind)
    # diffusers' reader takes it for transformers before 5.6.
    pipeline.text_encoder.__dict__.pop("text_model", None)
    pipeline.load_lora_weights(str(lora))
    pipeline.fuse_lora(lora_scale=0.7)
    mine = ours(family, PROMPT, "euler")
    assert_same_picture(mine, theirs(pipeline, PROMPT, EulerDiscreteScheduler))
    assert float((mine - plain).abs().mean()) > 0.01


def test_multipliers_add_up(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    lora = random_lora(fresh_tiny(), tmp_path / "style.safetensors")
    once = load_model(options_for(folder, "--prompt", "x", "--lora", f"{lora}:0.7"), CPU)
    twice = load_model(options_for(folder, "--prompt", "x", "--lora", f"{lora}:0.4", f"{lora}:0.3"), CPU)
    without = load_model(options_for(folder, "--prompt", "x", "--lora", f"{lora}:0"), CPU)
    plain = fresh_tiny().networks["unet"].state_dict()
    changed, both = once.networks["unet"].state_dict(), twice.networks["unet"].state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in without.networks["unet"].state_dict().items())
    assert all(torch.allclose(tensor, changed[name], atol=1e-5) for name, tensor in both.items())
    assert sum(not torch.equal(tensor, plain[name]) for name, tensor in changed.items()) > 100


def test_a_lora_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_folder(tmp_path, "sdxl")
    lora = random_lora(fresh_tiny(), tmp_path / "style.safetensors")
    assert main(["sample", str(model), "--prompt", "x", "--lora", str(lora), "--output_dir", str(tmp_path / "o")]) == 3
    assert f"error: {lora}: " in (said := capsys.readouterr().err)
    assert "modules are not in the model" in said
    assert main(["sample", str(lora), "--prompt", "x", "--output_dir", str(tmp_path / "o")]) == 3
    told = capsys.readouterr().err
    assert f"error: MODEL = {lora}: is a LoRA, not a base model" in told
    assert "to --lora of sample" in told
    assert not (tmp_path / "o").exists()


def vectors(family: LatentDiffusion, rows: int) -> dict[str, Tensor]:
    """Random vectors for each text encoder, by role."""
    generator = torch.Generator().manual_seed(9)
    widths = {role: encoder.network.config.hidden_size for role, encoder in family.text_encoders.items()}
    return {role: torch.randn(rows, width, generator=generator) for role, width in widths.items()}


@pytest.mark.parametrize("kind", DRAWN)
def test_with_an_embedding_too(kind: TinyKind, tmp_path: Path) -> None:
    family, pipeline = fresh_tiny(kind), reference_pipeline(kind)
    learned = vectors(family, 3)
    path = tmp_path / "my-Style.safetensors"
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    save_file({keys[role]: table for role, table in learned.items()}, path)
    for role, number in (("text_encoder", ""), ("text_encoder_2", "_2")):
        if role in learned:
            parts = {"tokenizer": getattr(pipeline, f"tokenizer{number}"), "text_encoder": getattr(pipeline, role)}
            pipeline.load_textual_inversion(learned[role], token="<thing>", **parts)
    if kind == "sdxl":
        # The published configuration makes transformers pool at the token with the highest number, which is the end
        # of the text until tokens are added; sd-scripts (`pool_workaround`) and A1111 pool at the end then too.
        pipeline.text_encoder_2.text_model.eos_token_id = 49407
    prompt = Prompt("a photo, <thing> cat", "ugly <thing>", width=64, height=64, steps=6, scale=3.0, seed=1)
    expected = theirs(pipeline, prompt, EulerDiscreteScheduler)
    before = ours(family, prompt, "euler")
    install_embeddings(read_embeddings([path]), family)
    named = Prompt("a photo, MY-style cat", "ugly my-style", 64, 64, steps=6, scale=3.0, seed=1)
    assert_same_picture(ours(family, named, "euler"), expected)
    assert float((before - expected).abs().max()) > 0.005


def test_files_of_sd_scripts_are_read() -> None:
    # From the README of the files, which sd-scripts itself wrote.
    first = {
        "sd15_emb_params.pt": {"": (768, -0.01640268974006176, 0.7605389696364)},
        "sd15_emb_params_fp16.safetensors": {"": (768, -0.0164031982421875, 0.7604875564575195)},
        "sd21_emb_params.safetensors": {"": (1024, -0.007527968846261501, 0.03299657457182548)},
    }
    both = {
        "text_encoder": (768, 0.05554661527276039, 0.7559801865236295),
        "text_encoder_2": (1280, -0.023636847734451294, 1.2146303204717697),
    }
    for name, tables in {**first, "sdxl_clip_l_clip_g.pt": both, "sdxl_clip_l_clip_g.safetensors": both}.items():
        embedding = read_embedding(EMBEDDINGS / name)
        assert embedding.names == (Path(name).stem,)
        assert embedding.vectors.keys() == tables.keys()
        for role, (width, start, total) in tables.items():
            table = embedding.vectors[role]
            assert table.shape == (2, width)
            assert table.dtype == torch.float32
            assert float(table[0, 0]) == pytest.approx(start, abs=1e-9)
            assert float(table.double().sum()) == pytest.approx(total, abs=1e-4)


def test_files_of_other_programs_are_read(tmp_path: Path) -> None:
    table = torch.randn(2, 8)
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": table.requires_grad_()}, "name": "x", "step": 5}
    torch.save(a1111, tmp_path / "web.pt")
    torch.save({"<cat-toy>": table[0].detach()}, tmp_path / "learned_embeds.bin")
    save_file({"text_encoders_0": table, "text_encoders_1": table[:, :4].contiguous()}, tmp_path / "embeddings.pti")
    web, toy = read_embedding(tmp_path / "web.pt"), read_embedding(tmp_path / "learned_embeds.bin")
    assert (web.names, toy.names) == (("web",), ("learned_embeds", "<cat-toy>"))
    assert torch.equal(web.vectors[""], table)
    assert torch.equal(toy.vectors[""], table[:1])
    assert read_embedding(tmp_path / "embeddings.pti").vectors["text_encoder_2"].shape == (2, 4)


def test_diffusers_pairs_for_sdxl_are_one(tmp_path: Path) -> None:
    family = fresh_tiny("sdxl")
    learned = vectors(family, 2)
    for role, name in (("text_encoder", "toy"), ("text_encoder_2", "toy_2")):
        save_file({"<toy>": learned[role]}, tmp_path / f"{name}.safetensors")
    pair = [tmp_path / "toy_2.safetensors", tmp_path / "toy.safetensors"]
    with pytest.raises(ModelError, match="has vectors for one text encoder, and the model has 2"):
        install_embeddings(read_embeddings(pair[1:]), family)
    install_embeddings(read_embeddings(pair), family)
    for role, encoder in family.text_encoders.items():
        assert encoder.tokenizer(["a <toy>"], 1).ids.equal(encoder.tokenizer(["a Toy"], 1).ids)
        ids = encoder.tokenizer(["toy"], 1).ids[0, 0]
        network: Any = encoder.network
        assert torch.equal(network.get_input_embeddings()(ids[1:3]), learned[role])
        assert ids[3] == encoder.tokenizer.tokenizer.eos_token_id


def test_names_count_as_words_only() -> None:
    words = Words({"cat": [0], "cat_2": [1], "my cat (new)": [2, 3]})
    found = words.split(words.mark("Cat, cats, bobcat,cat_2 (cat:1.2)"))
    assert found == [(0,), ", cats, bobcat,", (1,), " (", (0,), ":1.2)"]
    assert words.used("a My  Cat (new) and CAT") == ["my cat (new)", "cat"]
    assert words.split(words.mark("my cat (new)")) == [(2, 3)]
    assert Words({}).split(Words({}).mark("a cat")) == ["a cat"]


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({name: torch.zeros(1, 64) for name in ("IN01", "IN02", "MID")}, "XTI.*for 3 blocks .*has 16"),
        ({"IN04.clip_l": torch.zeros(1, 64), "MID.clip_g": torch.zeros(1, 32)}, "no whole extended"),
        ({"IN04": torch.zeros(1, 64), "MID": torch.zeros(2, 64)}, "no whole extended"),
        ({"a": torch.zeros(1, 64), "b": torch.zeros(1, 64)}, "expected one table of vectors"),
        ({"clip_l": torch.zeros(2, 64), "clip_g": torch.zeros(1, 32)}, "same number"),
        ({"a": torch.zeros(1, 2, 64)}, "expected one table"),
        ({"lora_unet.alpha": torch.zeros(())}, "expected one table"),
        ({"emb_params": torch.zeros(1, 768)}, r"768 numbers \(Stable Diffusion 1.x\).* takes 64"),
        ({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 32)}, "SDXL's two text encoders, and the model has 1"),
    ],
)
def test_embeddings_that_do_not_fit(tmp_path: Path, tensors: Mapping[str, Tensor], part: str) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(dict(tensors), path)
    with pytest.raises(ModelError, match=part):
        install_embeddings(read_embeddings([path]), fresh_tiny())


def test_every_broken_embedding_is_told_at_once(tmp_path: Path) -> None:
    good = EMBEDDINGS / "sd15_emb_params.pt"
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    (tmp_path / "b.pt").write_bytes(b"PK no zip")
    (tmp_path / good.name).write_bytes(good.read_bytes())
    paths = [tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "c.png", good, tmp_path / good.name]
    with pytest.raises(ModelError, match="4 problems") as caught:
        read_embeddings(paths)
    for part in ("a.safetensors", "b.pt", "c.png: is no embedding file", "has the same name"):
        assert part in str(caught.value)


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, read as A1111's `parse_generation_parameters` does."""
    *lines, last = text.strip().split("\n")
    settings = {
        key: json.loads(value) if value.startswith('"') else value
        for key, value in re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    }
    assert len(settings) >= 3
    where = next((place for place, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[where:]).removeprefix("Negative prompt:").strip()
    return "\n".join(lines[:where]), negative, settings


def test_texts_are_read_back_by_a1111s_rule() -> None:
    prompt = Prompt('a "cat": one, two\nthree', "low, (bad:1.2)", 512, 768, steps=20, scale=7.5, sampler="k_euler_a")
    more = {"Model": "my, model: v2", "Model hash": None, "Lora hashes": 'a "b": 12', "Clip skip": 2}
    text, negative, settings = parsed(parameters_text(prompt, "ddim", 5, more))
    assert (text, negative) == (prompt.text, prompt.negative)
    assert settings == {
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7.5",
        "Seed": "5",
        "Size": "512x768",
        "Model": "my, model: v2",
        "Lora hashes": 'a "b": 12',
        "Clip skip": "2",
    }
    assert parsed(parameters_text(Prompt("", "x"), "ddim", 5, {}))[:2] == ("", "x")


def shown(path: Path) -> tuple[np.ndarray[Any, Any], tuple[str, str, dict[str, str]]]:
    with Image.open(path) as picture:
        return np.asarray(picture), parsed(picture.text["parameters"])  # type: ignore[attr-defined]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = write_file(tmp_path)
    lora = random_lora(fresh_tiny(), tmp_path / "style.safetensors")
    save_file({"emb_params": vectors(fresh_tiny(), 2)["text_encoder"]}, tmp_path / "frog.safetensors")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a frog --n blurry, low --w 96 --h 64 --d 18446744073709551615 --ss k_euler\na <lora:x:1>\n")
    out = tmp_path / "out"
    words: list[str | Path] = ["sample", model, "--prompts", prompts, "--lora", f"{lora}:0.5", "--embedding"]
    words += [tmp_path / "frog.safetensors", "--output_dir", out, "--grid", "--count", "2", "--seed", "7"]
    words += ["--width", "64", "--height", "64", "--steps", "3", "--scale", "2", "--clip_skip", "2"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    # Seeds count up, and begin again at 0.
    names = ["00000-18446744073709551615.png", "00001-0.png", "00002-7.png", "00003-8.png"]
    assert said.out.split() == [str(out / name) for name in (*names, "grid-0000.png")]
    assert sorted(path.name for path in out.iterdir()) == [*names, "grid-0000.png"]
    assert "4 of 4: 00003-8.png" in said.err
    assert "<lora:x:1> is read as text" in caplog.text

    pixels, (text, negative, settings) = shown(out / names[0])
    assert (pixels.shape, text, negative) == ((64, 96, 3), "a frog <lora:style:0.5>", "blurry, low")
    assert settings["Size"] == "96x64"
    assert (settings["Sampler"], settings["Schedule type"], settings["RNG"]) == ("Euler", "Uniform", "CPU")
    assert (settings["Clip skip"], settings["Model"]) == ("2", model.stem)
    assert re.fullmatch(r"[0-9a-f]{10}", settings["Model hash"])
    assert re.fullmatch(r"style: [0-9a-f]{12}", settings["Lora hashes"])
    assert re.fullmatch(r"frog: [0-9a-f]{12}", settings["TI hashes"])
    other, (_, negative, settings) = shown(out / names[3])
    assert (negative, settings["Seed"], settings["Sampler"], settings["CFG scale"]) == ("", "8", "DDIM", "2")
    assert "TI hashes" not in settings

    # The same pictures from the same options, without the command.
    options = options_for(*words[1:])
    family = load_model(options, CPU)
    install_embeddings(read_embeddings(options.embeddings), family)
    again = Prompt("a frog", "blurry, low", 96, 64, steps=3, scale=2.0)
    assert (to_picture(draw_pixels(family, again, "euler", 2**64 - 1)) == pixels).all()
    grid, _ = shown(out / "grid-0000.png")
    assert grid.shape == (128, 192, 3)
    assert (grid[:64, :96] == pixels).all()
    assert (grid[64:, 96 + 16 : 192 - 16] == other).all()

    # Numbers go on, and nothing is overwritten.
    assert main(["sample", str(model), "--prompt", "x --w 64 --h 64 --s 1 --d 7", "--output_dir", str(out)]) == 0
    assert (out / "00004-7.png").is_file()


def test_what_fails_is_told_and_the_rest_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_file(tmp_path)
    broken = tmp_path / "broken.safetensors"
    save_file({"emb_params": torch.full((1, 64), float("nan"))}, broken)
    words = ["sample", str(model), "--embedding", str(broken), "--output_dir", str(tmp_path / "out"), "--grid"]
    words += ["--steps", "1", "--width", "64", "--height", "64", "--seed", "1", "--prompt", "a broken cat"]
    assert main(words) == 4
    assert "error: no picture could be drawn: the picture holds values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "a cat"]) == 0
    said = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000-1.png", "grid-0000.png"]
    assert "1 of 2: not drawn" in said.err
    assert "warning: 1 of 2 pictures" in said.err


def test_all_wrong_options_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a --ss x\n")
    words = f"--prompts {tmp_path}/p.txt --lora no.safetensors:0.5 C:/no.pt --embedding no.pt --sampler plms --count 0 "
    words += f"--clip_skip 0 --width -5 --seed 99999999999999999999 --output_dir {tmp_path}/p.txt"
    with pytest.raises(ConfigError, match="11 problems") as caught:
        read_options(words.split())
    for part in (
        "MODEL: there is none",
        "--lora = 'no.safetensors': there is no such file",
        "--lora = 'C:/no.pt': there is no such file",
        "--embedding = 'no.pt'",
        "--sampler = 'plms'",
        "--count = 0",
        "--clip_skip = 0",
        "--width = -5",
        "--seed = 99999999999999999999",
        "p.txt is a file; name a folder",
        "p.txt:1: --ss = 'x'",
    ):
        assert part in str(caught.value)
    for words, part in (("m --stepz 3", "--stepz"), ("m --steps x", "--steps"), ("m", "there is no prompt")):
        with pytest.raises(ConfigError, match=part):
            read_options(words.split())


def test_options_have_their_meaning(tmp_path: Path) -> None:
    lora = tmp_path / "a:0.5"
    lora.write_bytes(b"")
    options = options_for("m", "--prompt", "x --s 5", "y --w 128", "--seed", "-1", "--lora", lora, f"{lora}:-2")
    assert options.prompts == (Prompt("x", width=0, height=0, steps=5), Prompt("y", width=128, height=0))
    assert options.loras == (ChosenLora(lora), ChosenLora(lora, -2.0))
    assert (options.sampler, options.output_dir, options.v_parameterization) == ("ddim", Path("samples"), None)
    assert options_for("m", "--prompt", "x", "--no_v_parameterization").v_parameterization is False


def test_a_finished_run_is_looked_at(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --d 3\n")
    config = tmp_path / "out" / "cat-config.toml"
    config.parent.mkdir()
    folder = json.dumps(str(config.parent))
    config.write_text(
        f'network_module = "networks.lora"\npretrained_model_name_or_path = "base.safetensors"\nclip_skip = 2\n'
        f'# model\nv2 = true\n'
        f'output_dir = {folder}\noutput_name = "cat"\nsave_model_as = "safetensors"\nmixed_precision = "bf16"\n'
        f'sample_prompts = {json.dumps(str(prompts))}\nsample_sampler = "euler_a"\nlearning_rate = 0.1\n'
    )
    with pytest.raises(ConfigError, match=r"its training has left no .*cat\.safetensors"):
        read_options(["--config_file", str(config)])
    trained = config.parent / "cat.safetensors"
    trained.write_bytes(b"")
    options = read_options(["--config_file", str(config), "--steps", "4"])
    assert (options.model, options.loras, options.output_dir) == (
        "base.safetensors",
        (ChosenLora(trained),),
        config.parent / "samples",
    )
    assert options.prompts == (Prompt("a cat", width=0, height=0, seed=3, steps=4, line=1),)
    assert (options.sampler, options.clip_skip, options.v2, options.mixed_precision) == ("euler_a", 2, True, "bf16")
    other = read_options(["m", "--config_file", str(config), "--prompt", "b", "--sampler", "ddim", "--clip_skip", "1"])
    assert (other.model, other.prompts[0].text, other.sampler, other.clip_skip) == ("m", "b", "ddim", 1)


def test_a_run_is_shown_with_what_was_merged_before_it_and_with_its_average(tmp_path: Path) -> None:
    first, second = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    for name in ("a", "b", "cat", "cat-ema"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    config = tmp_path / "cat-config.toml"
    text = (
        f'network_module = "networks.lora"\npretrained_model_name_or_path = "m"\n'
        f'output_dir = {json.dumps(str(tmp_path))}\noutput_name = "cat"\n'
        f'base_weights = {json.dumps([str(first), str(second)])}\n'
        "base_weights_multiplier = [0.5]\nuse_ema = true\n"
    )
    for shown, file in (("false", "cat"), ("true", "cat-ema")):
        config.write_text(f"{text}sample_ema = {shown}\n")
        options = read_options(["--config_file", str(config), "--prompt", "x"])
        own = ChosenLora(tmp_path / f"{file}.safetensors")
        assert options.loras == (ChosenLora(first, 0.5), ChosenLora(second, 1.0), own)
    second.unlink()
    with pytest.raises(ConfigError, match=r"base_weights = .*b\.safetensors': there is no such file"):
        read_options(["--config_file", str(config), "--prompt", "x"])


def test_grids() -> None:
    white = [np.full((height, 2, 3), 255, np.uint8) for height in (2, 4, 2)]
    grid = make_grid([white[0], white[1], None, white[2]], 2)
    assert grid[..., 0].astype(int).tolist() == [
        [0, 0, 255, 255],
        [255, 255, 255, 255],
        [255, 255, 255, 255],
        [0, 0, 255, 255],
        [0, 0, 255, 255],
        [0, 0, 255, 255],
    ]
    assert make_grid([None, white[0]], 3).shape == (2, 2, 3)


def test_without_torch() -> None:
    code = (
        "import sys\nfrom sd_train.commands.sample import read_options\n"
        "read_options(['m', '--prompt', 'x'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CANONICAL_SAMPLERS)
def test_samplers_on_a_schedule_that_ends_in_pure_noise(name: str, prediction: Any) -> None:
    """Where the data are one point, they find it, from the last timestep on."""
    roots = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    if name != "ddim" or prediction == "epsilon":
        alphas[-1] = 2**-24
    point = torch.tensor([1.5, -0.5, 0.3, -2.5]).reshape(1, 4, 1, 1)
    for steps in (1, 3, 201):
        sampler: Any = make_sampler(name, prediction, steps, zero_terminal_snr=True)
        sampler.set_timesteps(steps)
        assert int(sampler.timesteps[0]) == 999
    for steps in (1, 20):
        generator = torch.Generator().manual_seed(1)
        sampler = make_sampler(name, prediction, steps, zero_terminal_snr=True)
        sampler.set_timesteps(steps)
        x = torch.randn(1, 4, 8, 8, generator=generator) * sampler.init_noise_sigma
        extra = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
        for t in sampler.timesteps:
            noisy = sampler.scale_model_input(x, t)
            alpha = float(np.interp(float(t), np.arange(1000), alphas))
            noise = (noisy - alpha**0.5 * point) / (1 - alpha) ** 0.5
            velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * point
            x = sampler.step(noise if prediction == "epsilon" else velocity, t, x, **extra).prev_sample
        assert float((x - point).abs().max()) < 0.16, steps
