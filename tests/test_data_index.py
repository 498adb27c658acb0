"""The index: what is listed, balanced, counted, and what stops the run before it begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sd_train.data.batches import BatchSettings, Updates
from sd_train.data.captions import sample_caption
from sd_train.data.config import DatasetConfig, SubsetConfig
from sd_train.data.images import sample_view
from sd_train.data.index import ImageIndex, balance, build_index
from sd_train.diffusion.schedule import Draws
from sd_train.errors import DataError
from sd_train.types import Progress

REG = json.loads((Path(__file__).parent / "data/dataset_reg.json").read_text(encoding="utf-8"))["cases"]


def put(folder: Path, name: str, size: tuple[int, int] = (64, 64), caption: str | None = None, **save: Any) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size).save(folder / name, **save)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def index(*subsets: SubsetConfig, allow: bool = False, weight: float = 1.0, **options: Any) -> ImageIndex:
    options = {"resolution": (64, 64), "origin": "data.toml:1: datasets[0]", **options}
    dataset = DatasetConfig(batch_size=1, subsets=subsets, **options)
    return build_index(dataset, allow_missing_captions=allow, prior_loss_weight=weight)


def subset(folder: Path, **options: Any) -> SubsetConfig:
    return SubsetConfig(**{"image_dir": folder, "caption_extension": ".txt", "origin": "data.toml:3", **options})


def refusal(*subsets: SubsetConfig, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        index(*subsets, **options)
    return str(caught.value)


def test_lists_images_of_any_case_in_order_and_not_below(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.Png", "c.webp", "d.BMP", "e.avif", ".hidden.png"):
        put(tmp_path, name, format="JPEG" if name == "b.JPG" else None)
    (tmp_path / "notes.md").write_text("no image")
    put(tmp_path / "below", "f.png")
    assert index(subset(tmp_path, class_tokens="x")).paths == ["a.Png", "b.JPG", "c.webp", "d.BMP", "e.avif"]


def test_records_columns_and_counts(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", (300, 100), "Red, blue,red")
    put(tmp_path / "one", "b.png", (64, 64), "blue")
    put(tmp_path / "two", "a.png", (100, 300))
    options: dict[str, Any] = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256}
    options["resolution"] = (128, 128)
    found = index(subset(tmp_path / "one", num_repeats=3), subset(tmp_path / "two", class_tokens="dog"), **options)
    assert len(found) == 3
    record = found.record(0)
    assert (record.path, record.key) == (tmp_path / "one" / "a.png", "a.png")
    assert (record.size, record.bucket, record.resized) == ((300, 100), (192, 64), (192, 64))
    assert (record.caption, record.weight, record.is_reg) == ("Red, blue,red", 1.0, False)
    assert found.record(2).caption == "dog"
    assert found.repeats.tolist() == [3, 3, 1]
    assert found.buckets == [(64, 192), (128, 128), (192, 64)]
    assert found.bucket_counts() == [1, 3, 3]
    assert [found.buckets[bucket] for bucket in found.bucket_of] == [found.record(row).bucket for row in range(3)]
    assert (found.num_train_images, found.num_reg_images) == (7, 0)
    assert found.mean_aspect_error == 0.0
    assert found.tag_frequency() == {"one": {"red": 2, "blue": 2}, "two": {"dog": 1}}
    assert [found.image_count(number) for number in (0, 1)] == [2, 1]


def test_images_that_are_much_too_small_are_told_of(tmp_path: Path) -> None:
    put(tmp_path, "large.png", (128, 128))
    put(tmp_path, "small.png", (20, 20))
    (warning,) = index(subset(tmp_path, class_tokens="x"), resolution=(128, 128)).warnings
    assert "1 of 2 images are enlarged more than 4 times, the first is small.png (20x20 to 128x128)" in warning


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_size_follows_the_exif_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path, name, (100, 50), exif=exif)
    assert index(subset(tmp_path, class_tokens="x")).record(0).size == ((50, 100) if orientation > 4 else (100, 50))


@pytest.mark.parametrize("case", REG)
def test_regularisation_is_balanced_as_sd_scripts_does(case: dict[str, Any]) -> None:
    own = [group["repeats"] for group in case["reg"] for _ in range(group["images"])]
    expected = [count for group in case["reg_final_repeats"] for count in group]
    assert balance(own, case["num_train_images"]).tolist() == expected


def test_regularisation_images_in_the_index(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "reg", f"{number}.png")
    put(tmp_path / "train", "a.png")
    reg = subset(tmp_path / "reg", class_tokens="dog", is_reg=True)
    found = index(reg, subset(tmp_path / "train", class_tokens="sks dog", num_repeats=2), weight=0.5)
    assert found.paths == ["0.png", "1.png", "a.png"]
    assert found.repeats.tolist() == [1, 1, 2]
    assert found.weights.tolist() == [0.5, 0.5, 1.0]
    assert (found.num_train_images, found.num_reg_images) == (2, 3)
    assert found.tag_frequency()["reg"] == {"dog": 3}
    assert "1 of 3 regularisation images are not used" in found.warnings[0]
    assert found.record(0).is_reg


def test_caption_of_another_extension_is_named_with_the_line_to_write(tmp_path: Path) -> None:
    for number in range(7):
        put(tmp_path, f"{number}.png", caption="a cat")
    for class_tokens in (None, "sks"):
        asked = subset(tmp_path, caption_extension=".caption", class_tokens=class_tokens)
        message = refusal(asked)
        assert 'caption_extension = ".txt"' in message
        assert "7 of 7 images" in message
        assert "0.png, 1.png, 2.png, 3.png, 4.png, and 2 more" in message
        found = index(asked, allow=True)
        assert set(found.captions) == {class_tokens or ""}
        assert "have no .caption file" in found.warnings[0]


def test_missing_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", caption="cat")
    put(tmp_path, "b.png")
    message = refusal(subset(tmp_path))
    assert all(words in message for words in ("1 of 2 images", "b.png", "class_tokens", "--allow_missing_captions"))
    assert index(subset(tmp_path), allow=True).captions == ["cat", ""]
    with_class = index(subset(tmp_path, class_tokens="dog"))
    assert with_class.captions == ["cat", "dog"]
    assert "trained with class_tokens ('dog')" in with_class.warnings[0]


def test_every_problem_of_every_subset_at_once(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", caption="")
    put(tmp_path / "one", "b.png", caption="x")
    (tmp_path / "one" / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / "a.HEIC").write_bytes(b"")
    put(tmp_path / "four" / "5_cat", "a.png")
    names = ("one", "two", "three", "four")
    message = refusal(*(subset(tmp_path / name, class_tokens="x" if name == "two" else None) for name in names))
    for words in ("a.txt: the caption file is empty", "b.txt: byte 0 is not UTF-8", "broken.jpg: no image",
                  "1 file .heic", "num_repeats = 5 and class_tokens = 'cat'"):  # fmt: skip
        assert words in message


def test_images_that_no_bucket_can_take(tmp_path: Path) -> None:
    put(tmp_path, "tiny.png", (60, 60))
    options = {"enable_bucket": True, "bucket_no_upscale": True, "resolution": (128, 128)}
    assert "tiny.png = 60x60 pixels" in refusal(subset(tmp_path, class_tokens="x"), **options)


def test_columns_have_one_row_an_image(tmp_path: Path) -> None:
    put(tmp_path, "a.png", (90, 64))
    found = index(subset(tmp_path, class_tokens="x"))
    columns = (found.subset_of, found.sizes, found.resized, found.bucket_of, found.repeats, found.weights)
    assert {len(column) for column in columns} == {len(found)}
    assert isinstance(found.repeats, np.ndarray)
    assert abs(found.mean_aspect_error - (90 / 64 - 1)) < 1e-12


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    put(tmp_path / "real", "a.png", caption="cat")
    photos = tmp_path / "photos"
    photos.mkdir()
    os.mkfifo(photos / "pipe.jpg")
    os.mkfifo(photos / "linked.txt")
    assert "no image lies in this folder" in refusal(subset(photos))
    (photos / "linked.png").symlink_to(tmp_path / "real" / "a.png")
    found = index(subset(photos, class_tokens="x"))
    assert (found.paths, found.captions) == (["linked.png"], ["x"])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png: the image cannot be read" in refusal(subset(photos, class_tokens="x"))


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    put(tmp_path, name, caption="A Cat")
    put(tmp_path, os.fsdecode(b"caf\xe8.png"))
    found = index(subset(tmp_path, flip_aug=True, shuffle_caption=True), allow=True)
    assert found.paths[1] == name
    for warning in found.warnings:
        assert "caf\\udce8.png" in warning.encode().decode()
    first, second = found.record(0), found.record(1)
    assert first.key != second.key
    views = [[sample_view(record, 0, epoch, 0).flip for epoch in range(64)] for record in (first, second)]
    assert views[0] != views[1]
    assert sample_caption(second, 0, 0, 0, 0, 1) == "A Cat"
    assert json.dumps(found.tag_frequency()).isascii()
    draws = Draws(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64))
    settings = BatchSettings(seed=0, accumulation=1, workers=0)
    updates = Updates([found], [2], settings, lambda step, places, width, height: draws)
    (update,) = updates.starting_at(Progress(seed=0, session_id=0, started_at=0.0), 1)
    (batch,) = update.batches
    assert sorted(key.encode() for key in batch.keys) == [b"caf\\udce8.png", b"caf\\udce9.png"]


def test_more_samples_than_can_be_ordered(tmp_path: Path) -> None:
    for number in range(101):
        (tmp_path / f"{number}.png").touch()
    message = refusal(subset(tmp_path, class_tokens="x", num_repeats=1_000_000))
    assert "data.toml:1: datasets[0]: an epoch would have 101,000,000 samples" in message
    assert "lower num_repeats" in message
