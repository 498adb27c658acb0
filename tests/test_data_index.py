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
from sd_train.data.images import sample_view
from sd_train.data.index import ImageIndex, Indexes, IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.diffusion.draws import Draws
from sd_train.errors import DataError
from sd_train.types import Progress


def put(folder: Path, name: str, size: tuple[int, int] = (64, 64), caption: str | None = None, **save: Any) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size).save(folder / name, **save)
    if caption is not None:
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def dataset(*subsets: SubsetConfig, **options: Any) -> DatasetConfig:
    options = {"batch_size": 1, "resolution": (64, 64), "origin": "data.toml:1: datasets[0]", **options}
    return DatasetConfig(subsets=subsets, **options)


def index(*subsets: SubsetConfig, allow: bool = False, weight: float = 1.0, **options: Any) -> ImageIndex:
    own = IndexOptions(allow_missing_captions=allow, prior_loss_weight=weight)
    return build_indexes([dataset(*subsets, **options)], own).training[0]


def subset(folder: Path, **options: Any) -> SubsetConfig:
    return SubsetConfig(**{"image_dir": folder, "caption_extension": ".txt", "origin": "data.toml:3", **options})


def built(*datasets: DatasetConfig, **options: Any) -> Indexes:
    return build_indexes(datasets, IndexOptions(**options))


def refusal(*subsets: SubsetConfig, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        index(*subsets, **options)
    return str(caught.value)


def test_lists_images_of_any_case_in_order_and_not_below(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.Png", "c.webp", "d.BMP", "e.avif", ".hidden.png"):
        put(tmp_path, name, format="JPEG" if name == "b.JPG" else None)
    (tmp_path / "notes.md").write_text("no image")
    put(tmp_path / "below", "f.png")
    assert index(subset(tmp_path, class_tokens="x")).keys == ["a.Png", "b.JPG", "c.webp", "d.BMP", "e.avif"]


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


def test_regularisation_images_in_the_index(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "reg", f"{number}.png")
    put(tmp_path / "train", "a.png")
    reg = subset(tmp_path / "reg", class_tokens="dog", is_reg=True)
    found = index(reg, subset(tmp_path / "train", class_tokens="sks dog", num_repeats=2), weight=0.5)
    assert found.keys == ["0.png", "1.png", "a.png"]
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
    assert (found.keys, found.captions) == (["linked.png"], ["x"])
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png: the image cannot be read" in refusal(subset(photos, class_tokens="x"))


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    put(tmp_path, name, caption="A Cat")
    put(tmp_path, os.fsdecode(b"caf\xe8.png"))
    found = index(subset(tmp_path, flip_aug=True, shuffle_caption=True), allow=True, batch_size=2)
    assert found.keys[1] == name
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
    updates = Updates([found], settings, lambda step, places, width, height: draws)
    (update,) = updates.starting_at(Progress(seed=0, session_id=0, started_at=0.0), 1)
    (batch,) = update.batches
    assert sorted(key.encode() for key in batch.keys) == [b"caf\\udce8.png", b"caf\\udce9.png"]


def test_more_samples_than_can_be_ordered(tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    for number in range(1, 101):
        (tmp_path / f"{number}.png").symlink_to(tmp_path / "0.png")
    message = refusal(subset(tmp_path, class_tokens="x", num_repeats=1_000_000))
    assert "data.toml:1: datasets[0]: an epoch would have 101,000,000 samples" in message
    assert "lower num_repeats" in message


def test_weights_and_fractional_repeats(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "reg", f"{number}.png")
        put(tmp_path / "train", f"{number}.png")
    reg = subset(tmp_path / "reg", class_tokens="x", is_reg=True, loss_weight=0.5)
    found = index(reg, subset(tmp_path / "train", class_tokens="x", num_repeats=1.5, loss_weight=2.0), weight=0.5)
    assert found.weights.tolist() == [0.25] * 3 + [2.0] * 3
    # 4.5 samples to learn, rounded to 4.
    assert found.repeats.tolist() == [2.0, 1.0, 1.0, 1.5, 1.5, 1.5]
    assert found.num_train_images == 4


def test_problems_of_all_datasets_at_once(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png")
    put(tmp_path / "two", "tiny.png", (20, 20), "x")
    small = {"enable_bucket": True, "bucket_no_upscale": True}
    with pytest.raises(DataError) as caught:
        built(dataset(subset(tmp_path / "one")), dataset(subset(tmp_path / "two"), **small),
              dataset(subset(tmp_path / "gone", class_tokens="x")))  # fmt: skip
    for words in ("have no caption", "tiny.png = 20x20 pixels", "gone"):
        assert words in str(caught.value)


def test_a_folder_in_two_datasets(tmp_path: Path) -> None:
    put(tmp_path, "a.png", (128, 128), "x")
    found = built(dataset(subset(tmp_path)), dataset(subset(tmp_path), resolution=(128, 128))).training
    assert [index.buckets for index in found] == [[(64, 64)], [(128, 128)]]


def test_images_that_are_not_larger_than_the_limit_are_left_out(tmp_path: Path) -> None:
    for width in (40, 64, 65, 90):
        put(tmp_path, f"{width}.png", (width, 64), "x")
    found = index(subset(tmp_path), skip_image_resolution=64)
    assert list(found.keys) == ["65.png", "90.png"]
    assert "2 of 4 images are left out because sqrt(width x height) is not above" in found.warnings[0]
    assert "40.png, 64.png" in found.warnings[0]
    assert "none of its 4 images is left" in refusal(subset(tmp_path), skip_image_resolution=1000.5)


def test_regularisation_is_balanced_after_images_were_left_out(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path / "reg", f"{number}.png", (64, 32 if number == 0 else 64))
    put(tmp_path / "train", "a.png")
    put(tmp_path / "train", "b.png", (32, 32))
    found = index(subset(tmp_path / "reg", class_tokens="x", is_reg=True), subset(tmp_path / "train", class_tokens="x"),
                  skip_image_resolution=50)  # fmt: skip
    assert list(found.keys) == ["1.png", "a.png"]


def damage(path: Path) -> None:
    """Cut the body, leave the header."""
    path.write_bytes(path.read_bytes()[:-60])


def test_broken_bodies_are_found_before_the_run(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path, name, caption=name)
        Image.fromarray(pixels).save(tmp_path / name)
    damage(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"nothing")
    made = dataset(subset(tmp_path))
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            built(made, verify_images=True, cache_dir=cache)
        assert "2 images cannot be read" in str(caught.value)
        assert "--skip_broken_images" in str(caught.value)
    (found,) = built(made, skip_broken_images=True, cache_dir=cache).training
    assert list(found.keys) == ["a.png"]
    assert [Path(text.partition(":")[0]).name for text in found.left_out] == ["b.png", "c.png"]
    assert "2 of 3 images cannot be read and are left out" in found.warnings[0]
    damage(tmp_path / "a.png")
    with pytest.raises(DataError, match="none of its 3 images is left"):
        built(made, skip_broken_images=True, cache_dir=cache)


def colours(folder: Path, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        put(folder, f"{number}.png", caption="one, {a|b}\ntwo")
        Image.new("RGB", (64, 64), (number % 256, number // 256, 7)).save(folder / f"{number}.png")


def contents(index: ImageIndex) -> set[bytes]:
    return {Image.open(index.path(row)).convert("RGB").tobytes() for row in range(len(index))}


@pytest.mark.parametrize(("count", "share", "expected"), [(10, 0.2, 2), (2, 0.01, 1), (5, 0.999, 4), (40, 0.25, 10)])
def test_validation_takes_its_share(tmp_path: Path, count: int, share: float, expected: int) -> None:
    colours(tmp_path, count)
    found = built(dataset(subset(tmp_path, num_repeats=3, shuffle_caption=True, flip_aug=True, random_crop=True,
                                 enable_wildcard=True), validation_split=share), seed=3)  # fmt: skip
    (training,), (validation,) = found.training, found.validation
    assert (len(training), len(validation)) == (count - expected, expected)
    assert not contents(training) & contents(validation)
    assert validation.repeats.tolist() == [1.0] * expected
    assert set(validation.captions) == {"one, a"}
    kept = validation.record(0).subset
    assert not any([kept.shuffle_caption, kept.flip_aug, kept.random_crop, kept.enable_wildcard])
    assert training.num_train_images == 3 * (count - expected)


def test_validation_is_the_same_whatever_the_names_and_differs_by_seed(tmp_path: Path) -> None:
    colours(tmp_path / "a", 30)
    (tmp_path / "b").mkdir()
    for path in (tmp_path / "a").iterdir():
        (tmp_path / "b" / f"moved {path.name}").write_bytes(path.read_bytes())

    def kept(folder: str, **more: Any) -> set[bytes]:
        made = dataset(subset(tmp_path / folder), validation_split=0.3, **more)
        return contents(built(made, seed=1).validation[0])

    assert kept("a") == kept("b")
    assert kept("a", validation_seed=1) == kept("a")
    assert kept("a", validation_seed=2) != kept("a")


def test_equal_pictures_are_never_on_both_sides(tmp_path: Path) -> None:
    colours(tmp_path / "one", 12)
    colours(tmp_path / "two", 12, start=6)
    colours(tmp_path / "reg", 6, start=15)
    Image.open(tmp_path / "one" / "0.png").save(tmp_path / "one" / "copy.bmp")
    (tmp_path / "one" / "copy.txt").write_text("x")
    one = subset(tmp_path / "one")
    for seed in range(6):
        found = built(
            dataset(one, subset(tmp_path / "reg", is_reg=True), validation_split=0.3),
            dataset(subset(tmp_path / "two"), validation_split=0.4, validation_seed=9),
            dataset(one, resolution=(128, 128), validation_split=0.1),
            seed=seed,
        )
        assert len(found.validation) == 3
        learned = set().union(*map(contents, found.training))
        kept = set().union(*map(contents, found.validation))
        assert not learned & kept
        assert all(len(contents(index)) > 0 for index in found.training)
        assert not any(index.is_reg.any() for index in found.validation)
        assert sum(len(part) for part in (found.training[2], found.validation[2])) == 13


def test_validation_keeps_away_from_what_is_not_split(tmp_path: Path) -> None:
    colours(tmp_path / "one", 6)
    colours(tmp_path / "whole", 5)
    found = built(dataset(subset(tmp_path / "one"), validation_split=0.5), dataset(subset(tmp_path / "whole")))
    assert list(found.validation[0].keys) == ["5.png"]
    assert len(found.training[1]) == 5
    colours(tmp_path / "whole", 6)
    found = built(dataset(subset(tmp_path / "one"), validation_split=0.5), dataset(subset(tmp_path / "whole")))
    assert found.validation == ()
    assert "validation_split = 0.5 keeps no image" in found.training[0].warnings[0]


def test_images_that_are_left_out_are_not_said_to_lack_captions(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        put(tmp_path, f"{name}.bmp", caption="x" if name == "a" else None)
    cut = (tmp_path / "b.bmp").read_bytes()[:-100]
    (tmp_path / "b.bmp").write_bytes(cut)
    (tmp_path / "d.bmp").write_bytes(cut)
    (tmp_path / "d.txt").write_bytes(b"\xfc")
    found = built(dataset(subset(tmp_path, class_tokens="frog")), skip_broken_images=True).training[0]
    assert list(found.keys) == ["a.bmp", "c.bmp"]
    assert found.warnings[0] == "data.toml:3: 1 of 2 images have no .txt file and are trained with class_tokens " \
                                "('frog'): c.bmp"
    assert "2 of 4 images cannot be read and are left out" in found.warnings[1]
    # An image that is left out needs no caption either.
    (tmp_path / "c.bmp").write_bytes(cut)
    found = built(dataset(subset(tmp_path)), skip_broken_images=True).training[0]
    assert list(found.keys) == ["a.bmp"]


def test_captions_of_several_folders_are_counted_each_for_itself(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", caption="red\n\nfirst, note")
    put(tmp_path / "two", "a.png", caption="blue\nsecond, note")
    put(tmp_path / "two", "b.png", caption="green\n")
    found = index(subset(tmp_path / "one"), subset(tmp_path / "two"))
    assert found.tag_frequency() == {"one": {"red": 1}, "two": {"blue": 1, "green": 1}}


def test_captions_in_utf_16_without_mark_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "a.txt").write_bytes("a frog".encode("utf-16-le"))
    assert "a.txt: holds a null character, as text in UTF-16 does; save the file as UTF-8" in refusal(subset(tmp_path))


def test_a_broken_avif_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.avif", caption="x")
    content = (tmp_path / "a.avif").read_bytes()
    pixels = content.index(b"mdat") + 4
    (tmp_path / "a.avif").write_bytes(content[:pixels] + bytes(len(content) - pixels))
    with pytest.raises(DataError, match=r"a\.avif: the image cannot be read \(Failed to decode"):
        built(dataset(subset(tmp_path)), verify_images=True)
