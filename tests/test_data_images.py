"""Pixels: sd-scripts' to the byte, orientation, transparency, crop, flip, broken files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_train.data.buckets import assign, crop_box
from sd_train.data.config import DatasetConfig, SubsetConfig
from sd_train.data.images import View, cut_out, fit, load_pixels, prepare, sample_view, view_geometry
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "pixels.json").read_text(encoding="utf-8"))["cases"]


def record(path: Path, **options: Any) -> ImageRecord:
    subset = SubsetConfig(image_dir=path.parent, **options)
    return ImageRecord(path, path.name, subset, (100, 64), (64, 64), (100, 64), "", 1.0, False)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['image']}-{case['resolution'][0]}")
def test_pixels_equal_sd_scripts(case: dict[str, Any]) -> None:
    dataset = DatasetConfig(
        batch_size=1, resolution=tuple(case["resolution"]), enable_bucket=True, min_bucket_reso=case["min"],
        max_bucket_reso=case["max"], bucket_reso_steps=case["steps"], bucket_no_upscale=case["no_upscale"],
    )  # fmt: skip
    image = load_pixels(DATA / "pixels" / case["image"])
    place = assign((image.shape[1], image.shape[0]), dataset)
    assert [list(place.bucket), list(place.resized)] == [case["bucket"], case["resized"]]
    levels = cut_out(image, place.resized, place.bucket, crop_box(place.resized, place.bucket))
    assert hashlib.sha256(levels.tobytes()).hexdigest() == case["sha256_rgb"]
    pixels, geometry = fit(image, place.resized, place.bucket, None, False)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, place.bucket[1], place.bucket[0])
    assert np.array_equal(np.rint((pixels + 1) * 127.5).astype(np.uint8), levels.transpose(2, 0, 1))
    assert geometry.original == (case["size"][1], case["size"][0])


def test_flip_and_crop_are_in_the_geometry() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    straight, geometry = fit(image, (100, 64), (64, 64), (10, 0), False)
    flipped, mirrored = fit(image, (100, 64), (64, 64), (10, 0), True)
    assert np.array_equal(flipped, straight[:, :, ::-1])
    assert (geometry.crop, geometry.target, geometry.flipped) == ((0, 10), (64, 64), False)
    assert (mirrored.crop, mirrored.flipped) == ((0, 26), True)
    assert (straight.min(), straight.max()) == (-1.0, 1.0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_by_exif(tmp_path: Path, name: str, orientation: int) -> None:
    seen = np.zeros((32, 48, 3), dtype=np.uint8)
    seen[:16, :24] = 255
    seen[16:, 24:] = 128
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    stored = Image.fromarray(seen)
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(turns[undo[orientation]]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / name, exif=exif, quality=100)
    loaded = load_pixels(tmp_path / name).astype(int)
    assert loaded.shape == seen.shape
    assert np.abs(loaded - seen).max() < 8


def test_transparency_palettes_and_deep_greys(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 0, 255, 255))
    hidden.putpixel((1, 0), (0, 0, 0, 127))
    hidden.save(tmp_path / "rgba.png")
    pixels = load_pixels(tmp_path / "rgba.png")
    assert pixels[0, :3].tolist() == [[0, 0, 255], [128, 128, 128], [255, 255, 255]]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "opaque.png")
    assert load_pixels(tmp_path / "opaque.png")[0, 0].tolist() == [200, 0, 0]
    palette.save(tmp_path / "clear.png", transparency=1)
    assert load_pixels(tmp_path / "clear.png")[0, 0].tolist() == [255, 255, 255]
    Image.fromarray(np.full((4, 4), 0x8040, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_pixels(tmp_path / "deep.png")[0, 0].tolist() == [128, 128, 128]
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    assert load_pixels(tmp_path / "print.jpg").shape == (4, 4, 3)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_broken_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=name):
        load_pixels(path)
    with pytest.raises(DataError, match=r"gone\.png"):
        load_pixels(tmp_path / "gone.png")


def test_views_depend_on_the_sample_and_stay_inside(tmp_path: Path) -> None:
    image = record(tmp_path / "a.png", flip_aug=True, random_crop=True)
    views = [sample_view(image, 1, epoch, repeat) for epoch in range(40) for repeat in range(10)]
    assert views == [sample_view(image, 1, epoch, repeat) for epoch in range(40) for repeat in range(10)]
    assert {view.crop[0] for view in views} == set(range(37))
    assert {view.crop[1] for view in views} == {0}
    assert 150 < sum(view.flip for view in views) < 250
    fixed = replace(image, subset=replace(image.subset, random_crop=False))
    assert [sample_view(fixed, 1, epoch, 0).flip for epoch in range(40)] == [view.flip for view in views[::10]]
    assert sample_view(record(tmp_path / "a.png"), 1, 0, 0) == View((18, 0), False)


def test_prepared_sample_and_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 64), (255, 0, 0)).save(path)
    view = View((18, 0), True)
    pixels, geometry = prepare(record(path), view)
    assert pixels[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert geometry == view_geometry(record(path), view)
    Image.new("RGB", (101, 64)).save(path)
    with pytest.raises(DataError, match=r"a\.png: the image is 101x64 but was 100x64"):
        prepare(record(path), view)
