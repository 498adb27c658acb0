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
from sd_train.families.sizes import lora_numbers
from sd_train.train_network import main
from tests.runs import PHOTOS, run_process, train, words, write_dataset
from tools.check_plan import differences, make_words


def plan_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert sd_train(["plan", "train_network", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("number", range(5))
def test_the_run_equals_its_plan(tiny_model: Path, tmp_path: Path, number: int) -> None:
    """`tools/check_plan.py` compares more."""
    part = 0.4 if number % 2 else 1.0
    assert differences(make_words(tmp_path, random.Random(1000 + number), tiny_model), part) == []


def test_plan_lists_images_buckets_and_saves(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 4", "num_repeats = 2", size=96)
    more = "--max_train_epochs 3 --save_every_n_epochs 1 --save_state_on_train_end --lr_scheduler cosine"
    arguments = words(tiny_model, dataset, tmp_path / "out", f"{more} --lr_warmup_steps 2")
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
    saved = train(tiny_model, dataset, tmp_path / "out", more)
    assert abs(saved.stat().st_size - found["checkpoints"][-1]["bytes"]) < 0.3 * saved.stat().st_size
    assert {path.name for path in saved.parent.glob("*.safetensors")} == {
        Path(save["path"]).name for save in found["checkpoints"]
    }


def test_the_size_of_a_lora_is_known_from_headers(tiny_model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    saved = load_file(train(tiny_model, write_dataset(tmp_path / "d.toml"), tmp_path / "out", "--max_train_steps 1"))
    numbers = {"unet": 0, "text_encoder": 0}
    for name, weight in saved.items():
        numbers["unet" if name.startswith("lora_unet") else "text_encoder"] += weight.numel()
    assert lora_numbers(tiny_model, 4) == numbers
    assert lora_numbers(tiny_folder, 4) == numbers


def test_plan_in_words_and_refusals(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 4", size=96)
    arguments = words(tiny_model, dataset, tmp_path / "out", "--max_train_steps 10 --sample_every_n_steps 5")
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


def test_plan_needs_no_model_libraries_to_load(tiny_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    arguments = words(tiny_model, dataset, tmp_path / "out", "--max_train_steps 1")
    code = (
        "import sys; from sd_train.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    )
    done = run_process([os.sys.executable, "-c", code, "plan", "train_network", *arguments])
    assert done.returncode == 0, done.stderr


def test_explain_finds_images_by_path_and_name(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="flip_aug = true\nnum_repeats = 3")
    arguments = words(tiny_model, dataset, tmp_path / "out", "--max_train_epochs 2")
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
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 2", "flip_aug = true\nnum_repeats = 2", size=96)
    # It writes beside an earlier run's files without asking, because it replaces none of them.
    train(tiny_model, dataset, tmp_path / "out", "--max_train_steps 1")
    assert main(words(tiny_model, dataset, tmp_path / "out", "--max_train_epochs 1 --debug_dataset")) == 0
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
