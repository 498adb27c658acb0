"""What is said before the first update: plan, explain and the page of `--debug_dataset`; and that the run does it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from sd_train.__main__ import main as sd_train
from sd_train.families.parts import ModelRequest, read_model
from sd_train.families.sizes import lora_numbers
from sd_train.train_network import main
from tests.browser import chromium, find_chromium
from tests.runs import PHOTOS, run_process, train, words, write_dataset
from tools.check_plan import differences, make_words


def plan_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert sd_train(["plan", "train_network", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("number", range(5))
def test_the_run_equals_its_plan(small_model: Path, tmp_path: Path, number: int) -> None:
    """`tools/check_plan.py` compares more."""
    part = 0.4 if number % 2 else 1.0
    assert differences(make_words(tmp_path, random.Random(1000 + number), small_model), part) == []


def test_plan_lists_images_buckets_and_saves(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 4", "num_repeats = 2", size=96)
    more = "--max_train_epochs 3 --save_every_n_epochs 1 --save_state_on_train_end --lr_scheduler cosine"
    arguments = words(small_model, dataset, tmp_path / "out", f"{more} --lr_warmup_steps 2")
    found = plan_of(arguments, capsys)
    assert not (tmp_path / "out").exists(), "planning writes nothing"
    (described,) = found["datasets"]
    assert [Path(image["path"]).name for image in described["images"]] == sorted(p.name for p in PHOTOS.glob("*.jpg"))
    for image in described["images"]:
        with Image.open(image["path"]) as picture:
            assert image["size"] == list(picture.size)
        assert image["repeats"] == 2
        assert not image["is_reg"]
        assert image["captions"] == [Path(image["path"]).with_suffix(".txt").read_text().splitlines()[0].strip()]
        (left, top), resized, bucket = image["crop_top_left"][::-1], image["resized"], image["bucket"]
        assert (left, top) == ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2)
    assert sum(bucket["images"] for bucket in described["buckets"]) == len(described["images"])
    assert sum(bucket["batches"] for bucket in described["buckets"]) == found["batches_per_epoch"]
    assert found["total_updates"] == 3 * found["updates_per_epoch"]
    assert found["warmup_updates"] == 2
    assert [Path(save["path"]).name for save in found["checkpoints"]] == [
        "lora-000001.safetensors", "lora-000002.safetensors", "lora.safetensors",
    ]  # fmt: skip
    assert found["checkpoints"][-1]["state"] is not None
    saved = train(small_model, dataset, tmp_path / "out", more)
    assert abs(saved.stat().st_size - found["checkpoints"][-1]["bytes"]) < 0.3 * saved.stat().st_size
    assert {path.name for path in saved.parent.glob("*.safetensors")} == {
        Path(save["path"]).name for save in found["checkpoints"]
    }


def test_the_size_of_a_lora_is_known_from_headers(tiny_model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    saved = load_file(train(tiny_model, write_dataset(tmp_path / "d.toml"), tmp_path / "out", "--max_train_steps 1"))
    numbers = {"unet": 0, "text_encoder": 0}
    for name, weight in saved.items():
        numbers["unet" if name.startswith("lora_unet") else "text_encoder"] += weight.numel()
    for model in (tiny_model, tiny_folder):
        assert lora_numbers(read_model(ModelRequest(str(model))), 4) == numbers


def test_plan_in_words_and_refusals(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 4", size=96)
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_steps 10 --sample_every_n_steps 5")
    assert sd_train(["plan", "train_network", *arguments]) == 2
    assert "--sample_every_n_steps" in capsys.readouterr().err
    assert sd_train(["plan", "train_network", *arguments[:-2]]) == 0
    text = capsys.readouterr().out
    assert f"dataset 0: {len(list(PHOTOS.glob('*.jpg')))} images" in text
    assert "cut off" in text
    assert "lora.safetensors after update 10" in text
    assert sd_train(["plan", "--help"]) == 0
    assert sd_train(["plan", "train_netwrk"]) == 2
    assert "train_network" in capsys.readouterr().err


def test_plan_needs_no_model_libraries_to_load(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_steps 1")
    code = (
        "import sys; from sd_train.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = run_process([os.sys.executable, "-c", code, "plan", "train_network", *arguments])
    assert done.returncode == 0, done.stderr


def test_explain_finds_images_by_path_and_name(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="flip_aug = true\nnum_repeats = 3")
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_epochs 2")
    photo = sorted(PHOTOS.glob("*.jpg"))[0]
    for wanted in (str(photo), photo.name):
        assert sd_train(["explain", wanted, "train_network", *arguments]) == 0
        text = capsys.readouterr().out
        assert text.count("timestep") == 6
        assert str(photo) in text
    assert sd_train(["explain", photo.name, "train_network", "--most", "2", *arguments]) == 0
    assert capsys.readouterr().out.count("timestep") == 2
    assert sd_train(["explain", photo.stem + "x.jpg", "train_network", *arguments]) == 3
    assert f"did you mean {photo.name}" in capsys.readouterr().err
    assert sd_train(["explain", photo.name]) == 2
    assert sd_train(["explain", photo.name, "train_network", "--most", "none", *arguments]) == 2


def test_debug_dataset_writes_a_page_and_sheets(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 2", "flip_aug = true\nnum_repeats = 2", size=96)
    # It writes beside an earlier run's files without asking, because it replaces none of them.
    train(small_model, dataset, tmp_path / "out", "--max_train_steps 1")
    assert main(words(small_model, dataset, tmp_path / "out", "--max_train_epochs 1 --debug_dataset")) == 0
    page = tmp_path / "out" / "lora-dataset.html"
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    captions = [path.read_text().splitlines()[0].strip() for path in PHOTOS.glob("*.txt")]
    assert all(caption in text for caption in captions)
    assert text.count("<figure") == 2 * len(captions)
    assert "http" not in text.split("</style>")[1]
    sheets = sorted((tmp_path / "out").glob("lora-dataset-*.png"))
    assert sheets
    for sheet in sheets:
        with Image.open(sheet) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["lora.safetensors"]


def write_masked(path: Path, more: str, count: int = 7) -> Path:
    """A dataset of pictures with transparency, faces in their names and captions that not every font has."""
    folder = path.parent / "pictures"
    folder.mkdir()
    for number in range(count):
        picture = Image.new("RGBA", (200, 100), (5 * number, 200, 90, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 60, 100))
        file = folder / f"p{number}_150_50_30_30.png"
        picture.save(file)
        file.with_suffix(".txt").write_text(f"漢字 😀 <b>&amp; \u202e\x07 {'long' * 60}", encoding="utf-8")
    path.write_text(
        f"""[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
{more}
[[datasets.subsets]]
image_dir = {str(folder)!r}
caption_extension = ".txt"
alpha_mask = true
flip_aug = true
face_crop_aug_range = [1.0, 2.0]
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: put one on the PATH or name it in CHROME")
def test_the_page_of_debug_dataset_in_a_browser(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    dataset = write_masked(tmp_path / "d.toml", "batch_size = 7")
    main(words(small_model, dataset, tmp_path / "a page #1", "--max_train_steps 20 --debug_dataset --cache_latents"))
    program, path = find_chromium(), tmp_path / "a page #1" / "lora-dataset.html"
    assert program is not None
    with chromium(program, tmp_path / "profile") as browser:
        for width, dark in ((1200, False), (390, True)):
            browser.open(path, width, dark=dark)
            broken = browser.evaluate("[...document.images].filter(i => !i.complete || i.naturalWidth == 0).length")
            assert (browser.evaluate("document.images.length"), broken) == (98, 0)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("document.querySelector('figcaption').innerText.includes('漢字 😀 <b>&amp;')")
            assert browser.complaints == []
            assert browser.requests == [path.resolve().as_uri()]


def test_debug_dataset_goes_on_from_a_state_and_keeps_sheets_narrow(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    dataset, output = write_masked(tmp_path / "d.toml", "batch_size = 50", count=50), tmp_path / "out"
    train(small_model, dataset, output, "--max_train_steps 1 --save_state")
    assert main(words(small_model, dataset, output, "--max_train_steps 3 --resume latest --debug_dataset")) == 0
    said = capsys.readouterr().out
    assert "epoch 2, update 2: 64x64" in said
    assert "update 1:" not in said
    sheets = sorted(output.glob("lora-dataset-*.png"))
    assert len(sheets) == 5, "nine rows for each of two batches, four on a sheet"
    for sheet in sheets:
        with Image.open(sheet) as picture:
            assert picture.width < 1500
            assert picture.height < 2000
    # Sheets of an earlier call do not stay beside those of a later one.
    assert main(words(small_model, dataset, output, "--max_train_steps 2 --resume latest --debug_dataset")) == 0
    assert len(list(output.glob("lora-dataset-*.png"))) == 3


def test_faces_are_not_cropped_with_buckets(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_masked(tmp_path / "d.toml", "batch_size = 2")
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_epochs 2 --cache_latents")
    found = plan_of(arguments, capsys)
    assert any("face_crop_aug_range = (1.0, 2.0): has no effect" in warning for warning in found["warnings"])
    for image in found["datasets"][0]["images"]:
        (width, height), (bucket_width, bucket_height) = image["resized"], image["bucket"]
        assert image["crop_top_left"] == [(height - bucket_height) // 2, (width - bucket_width) // 2]
        assert (width == bucket_width) or (height == bucket_height)
    assert differences(arguments) == []


def test_plan_says_what_happens_to_what_fills_no_batch(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = len(list(PHOTOS.glob("*.jpg")))
    for policy, repeats, words_for_it in (
        ("keep", 1, "(the last batch of an epoch has 2)"),
        ("keep", 1.5, "(the last batch of an epoch may be short)"),
        ("fill", 1, "(2 more to fill the last batch, weighted down)"),
        ("fill", 1.5, "(the last batch of an epoch is filled, weighted down)"),
        ("carry", 1, "(2 go on to the next epoch)"),
        ("carry", 1.5, "(what is left goes on to the next epoch)"),
    ):
        more = f'batch_size = 4\nbucket_policy = "{policy}"'
        dataset = write_dataset(tmp_path / "d.toml", more, f"num_repeats = {repeats}")
        arguments = words(small_model, dataset, tmp_path / "out", "--max_train_epochs 5")
        found = plan_of(arguments, capsys)
        (bucket,) = found["datasets"][0]["buckets"]
        assert bucket["samples"] == images * repeats
        samples = found["samples_per_epoch"]
        assert abs(samples - images * repeats) < 1
        rest = samples % 4
        assert found["filled_in_first_epoch"] == (4 - rest if policy == "fill" else 0)
        assert found["carried_after_first_epoch"] == (rest if policy == "carry" else 0)
        assert sd_train(["plan", "train_network", *arguments]) == 0
        # What differs between epochs is not told as if it did not.
        assert words_for_it in capsys.readouterr().out


def test_a_long_training_is_planned_as_quickly_as_a_short_one(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo --s 1 --w 64 --h 64")
    more = "--max_train_steps 1000000000 --save_every_n_steps 250000000 --save_every_n_epochs 100000000"
    more += f" --sample_prompts {prompts} --sample_every_n_steps 500000000 --sample_at_first"
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 4")
    found = plan_of(words(small_model, dataset, tmp_path / "out", more), capsys)
    updates = [save["update"] for save in found["checkpoints"]]
    assert updates == sorted(updates)
    assert updates[-1] == 1_000_000_000
    assert set(range(250_000_000, 1_000_000_000, 250_000_000)) < set(updates)
    assert sum(Path(save["path"]).stem == "lora-100000000" for save in found["checkpoints"]) == 1
    assert found["samples"]["after_updates"] == [0, 500_000_000, 1_000_000_000]


def test_intervals_in_epochs_that_come_never_or_seldom_are_told_of(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", 'batch_size = 4\nbucket_policy = "carry"', "num_repeats = 0.2")
    more = "--max_train_epochs 12 --save_every_n_epochs"
    (warning,) = [
        text for text in plan_of(words(small_model, dataset, tmp_path / "out", f"{more} 2"), capsys)["warnings"]
        if "save_every_n_epochs" in text
    ]  # fmt: skip
    assert "complete no batch" in warning
    train(small_model, dataset, tmp_path / "out", f"{more} 2")
    saved = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    found = plan_of(words(small_model, dataset, tmp_path / "out", f"{more} 2 --overwrite"), capsys)
    assert saved == {Path(save["path"]).name for save in found["checkpoints"]}
    found = plan_of(words(small_model, dataset, tmp_path / "new", f"{more} 20"), capsys)
    assert any("save_every_n_epochs = 20 has no effect" in text for text in found["warnings"])


def test_the_cache_is_not_larger_than_planned(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, cache = write_masked(tmp_path / "d.toml", "batch_size = 2", count=20), tmp_path / "cache"
    more = f"--max_train_steps 1 --cache_latents_to_disk --cache_dir {cache} --network_train_unet_only"
    planned = plan_of(words(small_model, dataset, tmp_path / "out", more), capsys)["cache_bytes"]
    texts = "--cache_text_encoder_outputs_to_disk --max_token_length 150"
    both = plan_of(words(small_model, dataset, tmp_path / "out", f"{more} {texts}"), capsys)["cache_bytes"]
    assert both - planned == 21 * 2 * 77 * 64 * 4
    train(small_model, dataset, tmp_path / "out", more)
    rows = sum(path.stat().st_size - 4096 for path in (cache / "latents").glob("*.safetensors"))
    assert rows == planned


def test_a_finished_run_can_be_planned_and_explained(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(small_model, write_dataset(tmp_path / "d.toml"), tmp_path / "out", "--max_train_steps 1")
    saved = ["train_network", "--config_file", str(tmp_path / "out" / "lora-config.toml")]
    photo = sorted(PHOTOS.glob("*.jpg"))[0].name
    assert sd_train(["explain", photo, *saved]) == 0
    capsys.readouterr()
    assert sd_train(["plan", *saved]) == 0
    assert "this run would be refused" in capsys.readouterr().err
    assert sd_train(saved) == 2


def test_folders_are_tried_before_the_model_is_loaded(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    more = f"--max_train_steps 1 --cache_latents_to_disk --cache_dir {tmp_path / 'file' / 'below'}"
    arguments = words(small_model, write_dataset(tmp_path / "d.toml"), tmp_path / "out", more)
    assert main(arguments) == 4
    printed = capsys.readouterr()
    assert "nothing can be written there" in printed.err
    assert "--cache_dir" in printed.err
    assert "model:" not in printed.out
    assert not (tmp_path / "out").exists()


def test_options_that_no_image_calls_for_are_told_of(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = "keep_tokens_separator = '|||'\nface_crop_aug_range = [2, 4]\nshuffle_caption = true"
    dataset = write_dataset(tmp_path / "d.toml", subset=idle)
    dataset.write_text(dataset.read_text().replace("enable_bucket = true", "").replace("min_bucket_reso = 64", ""))
    dataset.write_text(dataset.read_text().replace("max_bucket_reso = 128", ""))
    assert sd_train(["plan", *words(small_model, dataset, tmp_path / "out", "--max_train_steps 1")]) == 2
    capsys.readouterr()
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_steps 1")
    assert sd_train(["plan", "train_network", *arguments]) == 0
    said = capsys.readouterr().err
    assert "keep_tokens_separator = '|||' stands in no caption" in said
    assert "face_crop_aug_range has no effect: no file name" in said
