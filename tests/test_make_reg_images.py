"""`sd-train make_reg_images`: the class as the base model draws it, in batches, resumable, used by a training."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image

from sd_train.__main__ import main
from sd_train.drawing import draw_batch, draw_pixels
from sd_train.prompts import Prompt
from sd_train.train_network import main as train_network
from tests.models import TinyKind, fresh_tiny, reference_pipeline, write_folder
from tests.runs import run_process, tree, words, write_dataset

CLASS = "a photo of a dog"
SMALL = ("--steps", "3", "--width", "64", "--height", "96")


def draw(model: Path, folder: Path, *more: str, text: str = CLASS) -> int:
    chosen = ("--pretrained_model_name_or_path", str(model), "--class_prompt", text, "--output_dir", str(folder))
    return main(["make_reg_images", *chosen, *SMALL, *more])


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "dpm_2_a", "dpmsolver++"])
def test_a_batch_holds_what_is_drawn_alone(sampler: str) -> None:
    family, prompt, seeds = fresh_tiny(), Prompt(CLASS, "blurry", 64, 64, steps=3), [5, 6]
    together = draw_batch(family, prompt, sampler, seeds)
    alone = torch.stack([draw_pixels(family, prompt, sampler, seed) for seed in seeds])
    assert together.shape == (2, 3, 64, 64)
    assert float((together - alone).abs().max()) < 1e-4
    assert float((together[0] - together[1]).abs().mean()) > 0.01


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_batch_is_that_of_diffusers(kind: TinyKind) -> None:
    prompt, seeds = Prompt(CLASS, "blurry", width=64, height=96, steps=3, scale=5.0), [3, 9]
    mine = (draw_batch(fresh_tiny(kind), prompt, "euler_a", seeds) / 2 + 0.5).clamp(0, 1)
    pipeline = reference_pipeline(kind)
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config["prediction_type"] = pipeline.scheduler.config.prediction_type
    pipeline.scheduler = EulerAncestralDiscreteScheduler(**config)
    theirs = pipeline(
        [CLASS] * 2, negative_prompt=["blurry"] * 2, width=64, height=96, num_inference_steps=3, guidance_scale=5.0,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds], output_type="pt",
    ).images  # fmt: skip
    assert mine.shape == theirs.shape
    assert float((mine - theirs).abs().max()) < 1e-4


def test_pictures_do_not_depend_on_the_batch_and_missing_ones_are_drawn_again(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ones, twos = tmp_path / "ones", tmp_path / "twos"
    assert draw(small_model, ones, "--num_images", "4", "--seed", "11") == 0
    assert draw(small_model, twos, "--num_images", "3", "--seed", "11", "--batch_size", "2", "--captions", "txt") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [*(str(ones / f"0000{n}.png") for n in range(4)), *(str(twos / f"0000{n}.png") for n in range(3))]
    for number in range(3):
        name = f"0000{number}.png"
        assert np.abs(picture(ones / name) - picture(twos / name)).max() <= 1
        with Image.open(ones / name) as shown:
            assert shown.size == (64, 96)
            assert shown.info["parameters"].startswith(f"{CLASS}\nSteps: 3, Sampler: DDIM, CFG scale: 7.5, Seed: 1")
            assert f"Seed: {11 + number}, Size: 64x96, Model hash: " in shown.info["parameters"]
    assert (twos / "00000.txt").read_text() == f"{CLASS}\n"

    before = tree(twos)
    (twos / "00001.png").unlink()
    (twos / "00002.txt").write_text("my own words")
    assert draw(small_model, twos, "--num_images", "4", "--seed", "11", "--batch_size", "2", "--captions", "txt") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(twos / "00001.png"), str(twos / "00003.png")]
    assert "2 pictures are there already" in said.err
    after = tree(twos)
    assert {name: after[name] for name in before if name not in ("00001.png", "00002.txt")} == {
        name: content for name, content in before.items() if name not in ("00001.png", "00002.txt")
    }
    assert after["00002.txt"] == b"my own words"
    assert np.abs(picture(ones / "00003.png") - picture(twos / "00003.png")).max() <= 1

    # All are there: nothing is loaded, and fewer are no reason to delete some.
    assert draw(small_model, twos, "--num_images", "2", "--seed", "11") == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "loading" not in said.err
    assert tree(twos) == after


@pytest.mark.parametrize(
    ("more", "text", "told"),
    [
        ((), "a photo of a cat", "(a photo of a dog; now a photo of a cat)"),
        (("--seed", "1"), CLASS, "(Seed: 0; now Seed: 1)"),
        (("--sampler", "euler"), CLASS, "(Sampler: DDIM; now Sampler: Euler, Schedule type: Uniform)"),
        (("--negative_prompt", "ugly"), CLASS, "(no more; now Negative prompt: ugly)"),
    ],
)
def test_other_pictures_are_not_mixed_in(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str, told: str
) -> None:
    assert draw(small_model, tmp_path / "reg", "--num_images", "1") == 0
    before = tree(tmp_path / "reg")
    capsys.readouterr()
    assert draw(small_model, tmp_path / "reg", "--num_images", "2", *more, text=text) == 2
    assert f"error: --output_dir = {tmp_path / 'reg'}: 00000.png was drawn otherwise {told}" in capsys.readouterr().err
    assert tree(tmp_path / "reg") == before


def test_another_model_is_not_mixed_in(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tiny_model, tmp_path / "reg", "--num_images", "1") == 0
    assert draw(write_folder(tmp_path), tmp_path / "reg", "--num_images", "2") == 2
    assert "Model: tiny_sd1; now Model: tiny_sd1_folder" in re.sub(r"Model hash: \w+, ", "", capsys.readouterr().err)


@pytest.mark.parametrize(("content", "told"), [(b"no picture", "is no picture"), (None, "does not say how it was")])
def test_foreign_pictures_of_our_names_are_refused(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, told: str
) -> None:
    path = tmp_path / "00007.png"
    Image.new("RGB", (64, 64)).save(path) if content is None else path.write_bytes(content)
    before = path.read_bytes()
    assert draw(small_model, tmp_path, "--num_images", "1") == 2
    assert f"00007.png {told}" in capsys.readouterr().err
    assert tree(tmp_path) == {path.name: before}


def test_what_it_prints_is_a_dataset(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "reg" / "1_dog"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "mine.jpg")
    assert draw(small_model, folder, "--num_images", "2", "--mixed_precision", "bf16") == 2
    assert "holds 1 other images (mine.jpg)" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine.jpg"]
    (folder / "mine.jpg").unlink()
    assert draw(small_model, folder, "--num_images", "2", "--mixed_precision", "bf16") == 0
    said = capsys.readouterr().err
    assert f'--reg_data_dir "{tmp_path / "reg"}"' in said
    told = said[said.index("  [[datasets.subsets]]") : said.index("without a dataset file")]
    assert tomllib.loads(told)["datasets"]["subsets"] == [
        {"image_dir": str(folder), "is_reg": True, "class_tokens": CLASS}
    ]
    dataset = write_dataset(tmp_path / "d.toml", subset=told)
    assert train_network(words(small_model, dataset, tmp_path / "out", "--max_train_steps 2")) == 0
    assert "6 to learn, 6 regularisation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--num_images", "0"), "--num_images = 0: must be 1 to 100,000"),
        (("--batch_size", "0"), "--batch_size = 0: must be 1 to 256"),
        (("--seed", "-1"), "--seed = -1: must be 0 or more"),
        (("--sampler", "ddmi"), "--sampler = 'ddmi': is no known sampler"),
        (("--class_prompt", " "), "--class_prompt = ' ': is empty"),
        (("--scale", "nan"), "--scale = nan: must be 0 or more"),
        (("--count", "3"), "unrecognized arguments: --count 3; sd-train make_reg_images --help"),
        (("--output_dir", __file__), "is a file; name a folder"),
        (("--clip_skip", "0"), "--clip_skip = 0: must be 1 or more"),
    ],
)
def test_bad_options_are_told_of(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], told: str
) -> None:
    assert draw(small_model, tmp_path / "reg", *more) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "reg").exists()


def test_a_missing_model_is_told_of_in_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw(tmp_path / "none.safetensors", tmp_path / "reg") == 3
    assert f"--pretrained_model_name_or_path = {tmp_path / 'none.safetensors'}: there is no such" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "reg").exists()


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from sd_train.commands.make_reg_images import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch'"
    )
    done = run_process([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "--class_prompt TEXT" in done.stdout
