"""Pixels: formats, orientation, transparency, views, masks, broken files; sd-scripts' are in test_conformance.py."""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from sd_train.data import resize
from sd_train.data.augment import ColourChange, Face, change_colour, face_in_name, place_on_face
from sd_train.data.images import View, centred_view, decode, load_mask, prepare, sample_view, view_geometry
from sd_train.data.images import view_mask as mask_of
from sd_train.data.record import ImageRecord
from sd_train.data.resize import cut_out, too_large
from sd_train.data.settings import SubsetConfig
from sd_train.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
CENTRED = View((100, 64), (18, 0), False)


def record(path: Path, **options: Any) -> ImageRecord:
    subset = SubsetConfig(image_dir=path.parent, **options)
    return ImageRecord(path, path.name, subset, (100, 64), (64, 64), (100, 64), "", 1.0, False)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def png(path: Path, depth: int, kind: int, row: bytes, transparency: bytes = b"") -> Path:
    """A PNG of 4x4 pixels whose rows are all `row`; Pillow writes few of the kinds that it reads."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, depth, kind, 0, 0, 0))
    clear = chunk(b"tRNS", transparency) if transparency else b""
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * 4)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + clear + body)
    return path


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def test_pixels_are_rounded_as_torchvision_does(tmp_path: Path) -> None:
    seen = record(save(tmp_path / "a.png", NOISE))
    levels = cut_out(NOISE, seen.resized, seen.bucket, CENTRED.crop, None)
    pixels = prepare(seen, CENTRED).pixels
    assert (pixels.dtype, pixels.shape) == (np.float32, (3, 64, 64))
    # Its ToTensor and Normalize(0.5, 0.5).
    unit = (levels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(pixels, unit.transpose(2, 0, 1))


def test_names_of_interpolations_that_are_synonyms() -> None:
    for one, other in (("linear", "bilinear"), ("cubic", "bicubic")):
        assert np.array_equal(*(cut_out(NOISE, (75, 48), (48, 48), (9, 0), name) for name in (one, other)))


@pytest.mark.parametrize("resized", [(250, 160), (64, 41), (100, 300), (320, 64)])
@pytest.mark.parametrize("method", ["lanczos", "box"])
def test_strips_give_the_pixels_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, resized: tuple[int, int], method: Any
) -> None:
    whole = Image.fromarray(NOISE).resize(resized, Image.Resampling[method.upper()])
    expected = np.asarray(whole.crop((7, 3, 47, 35)))
    for strip in (1, 1000, resize._STRIP):
        monkeypatch.setattr(resize, "_STRIP", strip)
        assert np.array_equal(cut_out(NOISE, resized, (40, 32), (7, 3), method), expected)


def test_very_long_pictures(tmp_path: Path) -> None:
    path = save(tmp_path / "long.png", np.tile(NOISE[:16], (1, 200, 1)))
    wide = replace(record(path), size=(20000, 16), bucket=(512, 512), resized=(640000, 512))
    assert prepare(wide, centred_view(wide, False)).pixels.shape == (3, 512, 512)
    cubic = replace(wide, subset=replace(wide.subset, resize_interpolation="bicubic"))
    with pytest.raises(DataError, match=r"long\.png: the image is 20000x16 and would be enlarged to 640000x512"):
        prepare(cubic, centred_view(cubic, False))
    assert not too_large((30000, 20000), (1200, 800), "area")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_by_exif(tmp_path: Path, name: str, orientation: int) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
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
    loaded = decode(tmp_path / name).pixels.astype(int)
    assert loaded.shape == seen.shape
    assert np.abs(loaded - seen).max() < 8
    assert np.array_equal(load_mask(tmp_path / name), loaded[:, :, 0])


def test_transparency_is_white_and_kept(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    hidden.putpixel((0, 0), (0, 0, 255, 255))
    hidden.putpixel((1, 0), (0, 0, 0, 127))
    hidden.save(tmp_path / "rgba.png")
    picture = decode(tmp_path / "rgba.png")
    assert picture.pixels[0, :3].tolist() == [[0, 0, 255], [128, 128, 128], [255, 255, 255]]
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == [255, 127, 0, 0]
    hidden.convert("RGB").convert("RGBA").save(tmp_path / "opaque.png")
    assert decode(tmp_path / "opaque.png").alpha is None
    Image.new("LA", (4, 4), (10, 0)).save(tmp_path / "la.png")
    assert decode(tmp_path / "la.png").pixels[0, 0].tolist() == [255, 255, 255]
    assert load_mask(tmp_path / "la.png")[0, 0] == 10
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "palette.png")
    assert decode(tmp_path / "palette.png").pixels[0, 0].tolist() == [200, 0, 0]
    palette.save(tmp_path / "clear.png", transparency=1)
    assert decode(tmp_path / "clear.png").pixels[0, 0].tolist() == [255, 255, 255]
    assert load_mask(tmp_path / "clear.png")[0, 0] == 200
    keyed = decode(png(tmp_path / "keyed.png", 8, 2, bytes([1, 2, 3, 4, 5, 6] * 2), words(1, 2, 3)))
    assert keyed.pixels[0, :2].tolist() == [[255, 255, 255], [4, 5, 6]]
    assert keyed.alpha is not None


def test_depths(tmp_path: Path) -> None:
    deep = png(tmp_path / "grey.png", 16, 0, words(0x8040, 0, 0xFFFF, 0x1234))
    assert decode(deep).pixels[0].tolist() == [[level] * 3 for level in (0x80, 0, 0xFF, 0x12)]
    assert load_mask(deep)[0].tolist() == [0x80, 0, 0xFF, 0x12]
    keyed = decode(png(tmp_path / "keyed.png", 16, 0, words(0x8040, 0, 0x8041, 0), words(0x8040)))
    assert keyed.pixels[0, :, 0].tolist() == [255, 0, 0x80, 0]
    assert keyed.alpha is not None
    assert keyed.alpha[0].tolist() == [0, 255, 255, 255]
    colour = png(tmp_path / "colour.png", 16, 2, words(0x8040, 0x1000, 0xFFFF) * 4)
    assert decode(colour).pixels[0, 0].tolist() == [0x80, 0x10, 0xFF]
    assert decode(png(tmp_path / "both.png", 16, 6, words(0, 0, 0, 0x8000) * 4)).pixels[0, 0].tolist() == [127] * 3
    assert decode(png(tmp_path / "bits.png", 1, 0, b"\x50")).pixels[0, :, 0].tolist() == [0, 255, 0, 255]
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    assert decode(tmp_path / "print.jpg").pixels[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["A.PNG", "a.WebP", "b.gif"])
def test_first_picture_of_an_animation(tmp_path: Path, name: str) -> None:
    first, second = (Image.new("RGB", (16, 8), colour) for colour in ("red", "blue"))
    first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    assert decode(tmp_path / name).pixels[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp", "a.bmp", "a.avif"])
def test_broken_file_is_named(tmp_path: Path, name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow is built without AVIF")
    path = save(tmp_path / name, NOISE)
    whole = path.read_bytes()
    assert decode(path).pixels.shape == NOISE.shape
    # Behind a PNG's last pixel are 20 bytes of checksums and end mark.
    for length in (0, 11, 40, 700, len(whole) // 2, len(whole) - 25):
        path.write_bytes(whole[:length])
        for read in (decode, load_mask):
            with pytest.raises(DataError, match=name):
                read(path)
    with pytest.raises(DataError, match=r"gone\.png"):
        decode(tmp_path / "gone.png")


def test_flip_and_crop_are_in_the_geometry(tmp_path: Path) -> None:
    image = record(save(tmp_path / "a.png", NOISE))
    straight, mirrored = View((100, 64), (10, 0), False), View((100, 64), (10, 0), True)
    pixels = prepare(image, straight).pixels
    assert np.array_equal(np.rint((pixels + 1) * 127.5), NOISE[:, 10:74].transpose(2, 0, 1))
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    assert np.array_equal(prepare(image, mirrored).pixels, pixels[:, :, ::-1])
    assert view_geometry(image, straight) == ((64, 100), (0, 10), (64, 64), False, (64, 100))
    assert view_geometry(image, mirrored) == ((64, 100), (0, 26), (64, 64), True, (64, 100))
    assert view_geometry(image, View((200, 128), (100, 60), True)).crop == (60, 36)


def test_views_depend_on_the_sample_and_stay_inside(tmp_path: Path) -> None:
    image = record(tmp_path / "a.png", flip_aug=True, random_crop=True)
    views = [sample_view(image, 1, epoch, repeat) for epoch in range(40) for repeat in range(10)]
    assert views == [sample_view(image, 1, epoch, repeat) for epoch in range(40) for repeat in range(10)]
    assert {view.crop[0] for view in views} == set(range(37))
    assert {view.crop[1] for view in views} == {0}
    assert 150 < sum(view.flip for view in views) < 250
    fixed = replace(image, subset=replace(image.subset, random_crop=False))
    assert [sample_view(fixed, 1, epoch, 0).flip for epoch in range(40)] == [view.flip for view in views[::10]]
    assert sample_view(record(tmp_path / "a.png"), 1, 0, 0) == CENTRED
    assert centred_view(image, True) == replace(CENTRED, flip=True)


def test_views_of_a_sample_never_change(tmp_path: Path) -> None:
    image = record(tmp_path / "a.png", flip_aug=True, random_crop=True)
    views = [sample_view(image, 3, epoch, 1) for epoch in range(8)]
    assert [(view.crop[0], view.flip) for view in views] == [
        (32, True), (27, False), (35, False), (22, False), (28, True), (2, False), (21, False), (16, False),
    ]  # fmt: skip


def test_colours_do_not_depend_on_flip_or_crop(tmp_path: Path) -> None:
    plain = record(tmp_path / "a.png", color_aug=True)
    moved = replace(plain, subset=replace(plain.subset, flip_aug=True, random_crop=True))
    colours = [sample_view(plain, 1, epoch, 0).colour for epoch in range(2000)]
    assert colours == [sample_view(moved, 1, epoch, 0).colour for epoch in range(2000)]
    changed = [colour for colour in colours if colour is not None]
    hues = [colour.hue for colour in changed if colour.hue]
    gammas = [colour.gamma for colour in changed if colour.gamma != 1]
    assert 600 < len(changed) == len(hues) + len(gammas) < 720
    assert 270 < len(hues) < 390
    assert (min(hues), max(hues)) == (pytest.approx(-8, abs=0.2), pytest.approx(8, abs=0.2))
    assert (min(gammas), max(gammas)) == (pytest.approx(0.95, abs=2e-3), pytest.approx(1.05, abs=2e-3))


def test_colour_changes() -> None:
    square = np.array([[[255, 0, 0], [0, 0, 0], [77, 77, 77], [255, 255, 255], [100, 50, 50]]], dtype=np.uint8)
    assert change_colour(square, ColourChange(hue=30))[0].tolist() == [
        [255, 255, 0], [0, 0, 0], [77, 77, 77], [255, 255, 255], [100, 100, 50],
    ]  # fmt: skip
    for shift in (-8.0, 5.5):
        turned = change_colour(NOISE, ColourChange(hue=shift)).astype(int)
        assert np.abs(turned.max(axis=2) - NOISE.max(axis=2)).max() <= 1
        assert np.abs(turned.min(axis=2) - NOISE.min(axis=2)).max() <= 1
        assert np.abs(change_colour(turned.astype(np.uint8), ColourChange(hue=-shift)).astype(int) - NOISE).max() <= 2
    for gamma in (0.95, 1.05):
        bent = change_colour(square, ColourChange(gamma=gamma))[0, :, 0].tolist()
        assert bent == [255, 0, round(255 * (77 / 255) ** gamma), 255, round(255 * (100 / 255) ** gamma)]
    assert np.array_equal(change_colour(NOISE, ColourChange()), NOISE)


def test_colour_reaches_the_pixels_but_not_the_mask(tmp_path: Path) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (64, 100, 1), dtype=np.uint8)
    image = record(save(tmp_path / "a.png", np.concatenate([NOISE, alpha], axis=2)), alpha_mask=True)
    plain, changed = (prepare(image, replace(CENTRED, colour=colour)) for colour in (None, ColourChange(gamma=1.05)))
    assert (changed.pixels <= plain.pixels).all()
    assert (changed.pixels < plain.pixels).any()
    assert plain.mask is not None
    assert np.array_equal(plain.mask, changed.mask)


@pytest.mark.parametrize(
    ("stem", "face"),
    [
        ("girl_60_30_20_24", ((60, 30), 24)), ("_1_2_3_4", ((1, 2), 4)), ("girl_60_30_20", None),
        ("60_30_20_24", None), ("girl_60_30_20_24b", None), ("girl_60_30_0_0", None), ("girl_101_30_20_24", None),
        ("girl_60_-3_20_24", None), ("2024_10_12_30_99", None), ("girl_60_30_101_5", None),
    ],
)  # fmt: skip
def test_faces_in_names(stem: str, face: Any) -> None:
    found = face_in_name(stem, (100, 64))
    assert (found and (found.centre, found.size)) == face


@given(
    st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    st.tuples(st.sampled_from([64, 100, 512]), st.sampled_from([64, 333])),
    st.tuples(*[st.floats(0, 1)] * 3), st.floats(0.1, 8), st.floats(1, 4), st.booleans(), st.integers(),
)  # fmt: skip
def test_face_crops_follow_the_rule(
    size: Any, target: Any, place: Any, low: float, factor: float, shifted: bool, seed: int
) -> None:
    found = Face((int(place[0] * size[0]), int(place[1] * size[1])), max(1, int(place[2] * max(size))))
    placed = place_on_face(random.Random(seed), found, size, target, (low, low * factor), shifted)
    scales = [placed.resized[axis] / size[axis] for axis in (0, 1)]
    cover = max(target[axis] / size[axis] for axis in (0, 1))
    for axis in (0, 1):
        assert placed.resized[axis] >= target[axis]
        assert 0 <= placed.crop[axis] <= placed.resized[axis] - target[axis]
        slack = 1 / size[axis]
        assert scales[axis] <= max(1, cover) + slack
        # The face is as large as the range asks, unless the picture would no longer cover or would be enlarged.
        assert scales[axis] >= max(cover, min(1, min(target) / (found.size * low * factor))) - slack
        assert scales[axis] <= max(cover, min(1, min(target) / (found.size * low))) + slack


def test_face_crop_is_centred_or_shifted(tmp_path: Path) -> None:
    path = save(tmp_path / "girl_700_300_100_80.png", np.zeros((600, 1000, 3), dtype=np.uint8))
    subset = SubsetConfig(image_dir=tmp_path, face_crop_aug_range=(2.0, 2.0))
    girl = ImageRecord(path, path.name, subset, (1000, 600), (128, 128), (213, 128), "", 1.0, False)
    assert sample_view(girl, 0, 0, 0) == View((640, 384), (384, 128), False)  # 128 = 2 faces of 64; centre 448, 192
    assert prepare(girl, sample_view(girl, 0, 0, 0)).pixels.shape == (3, 128, 128)
    assert view_geometry(girl, View((640, 384), (384, 128), True)).crop == (128, 128)
    ranged = replace(girl, subset=replace(subset, face_crop_aug_range=(2.0, 3.0), flip_aug=True))
    views = [sample_view(ranged, 0, epoch, 0) for epoch in range(300)]
    assert (min(view.resized[0] for view in views), max(view.resized[0] for view in views)) == (
        pytest.approx(427, abs=3), pytest.approx(640, abs=3),
    )  # fmt: skip
    shifts = {view.crop[0] - (int(700 * view.resized[0] / 1000 + 0.5) - 64) for view in views}
    assert {-2, 2} <= shifts <= set(range(-4, 5))
    plain = replace(girl, path=tmp_path / "b.png", subset=replace(subset, flip_aug=True))
    assert [sample_view(plain, 0, epoch, 0).resized for epoch in range(3)] == [(213, 128)] * 3
    plain = replace(plain, subset=replace(plain.subset, face_crop_aug_range=None))
    assert [sample_view(plain, 0, epoch, 0).flip for epoch in range(300)] == [view.flip for view in views]
    # With buckets faces are not cropped, as in sd-scripts.
    bucketed = replace(girl, bucketed=True)
    assert sample_view(bucketed, 0, 0, 0) == View((213, 128), (42, 0), False)
    wild = replace(girl, subset=replace(subset, random_crop=True))
    lefts = [sample_view(wild, 0, epoch, 0).crop[0] for epoch in range(300)]
    assert (min(lefts), max(lefts)) == (pytest.approx(0, abs=40), 512)


def test_masks_lie_where_their_image_is(tmp_path: Path) -> None:
    """A picture that is its own mask: both must agree wherever it is cut."""
    blobs = cv2.resize(NOISE[:8, :13, 0], (832, 512), interpolation=cv2.INTER_LINEAR)
    path = save(tmp_path / "a.png", np.repeat(blobs[:, :, None], 3, axis=2))
    (tmp_path / "masks").mkdir()
    views = [
        View((208, 128), (80, 0), False), View((208, 128), (3, 60), True), View((832, 512), (401, 77), True),
        View((1664, 1024), (1600, 0), False),
    ]  # fmt: skip
    turned = Image.Exif()
    turned[0x0112] = 6
    for scale, options in ((1, {}), (2, {}), (1, {"exif": turned})):
        stored = cv2.resize(blobs, (832 // scale, 512 // scale), interpolation=cv2.INTER_AREA)
        mask = save(tmp_path / "masks" / "a.png", np.rot90(stored).copy() if options else stored, **options)
        subset = SubsetConfig(image_dir=tmp_path, conditioning_data_dir=mask.parent)
        image = ImageRecord(path, "a.png", subset, (832, 512), (64, 64), (208, 128), "", 1.0, False, mask)
        for view in views:
            picture = prepare(image, view)
            assert picture.mask is not None
            assert (picture.mask.dtype, picture.mask.shape) == (np.float32, (8, 8))
            grey = (picture.pixels[0].reshape(8, 8, 8, 8).mean(axis=(1, 3)) + 1) / 2
            assert np.abs(picture.mask - grey).max() < 0.02
            lighter = mask_of(None, replace(image, subset=replace(subset, unmasked_weight=0.25)), view)
            assert np.allclose(lighter, 0.25 + 0.75 * picture.mask)


def test_which_mask_counts(tmp_path: Path) -> None:
    alpha = np.zeros((64, 100, 1), dtype=np.uint8)
    alpha[:, 18:50] = 255
    path = save(tmp_path / "a.png", np.concatenate([NOISE, alpha], axis=2))
    left = np.repeat([[1.0] * 4 + [0.0] * 4], 8, axis=0)
    with_alpha = prepare(record(path, alpha_mask=True), CENTRED).mask
    assert np.array_equal(with_alpha, left)
    assert np.array_equal(prepare(record(path, alpha_mask=True), replace(CENTRED, flip=True)).mask, left[:, ::-1])
    assert prepare(record(path), CENTRED).mask is None
    opaque = prepare(record(save(tmp_path / "b.png", NOISE), alpha_mask=True, unmasked_weight=0.1), CENTRED).mask
    assert np.array_equal(opaque, np.ones((8, 8)))
    mask = tmp_path / "mask.png"
    Image.new("RGBA", (100, 64), (51, 255, 255, 0)).save(mask)
    both = replace(record(path, alpha_mask=True, conditioning_data_dir=tmp_path), mask=mask)
    assert np.allclose(prepare(both, CENTRED).mask, 0.2)
    odd = replace(both, bucket=(60, 52))
    assert prepare(odd, centred_view(odd, False)).mask.shape == (6, 7)


def test_masks_of_another_shape_are_refused(tmp_path: Path) -> None:
    path, mask = save(tmp_path / "a.png", NOISE), tmp_path / "a_mask.png"
    image = replace(record(path, conditioning_data_dir=tmp_path), mask=mask)
    for size in ((100, 64), (50, 32), (33, 21), (400, 256), (101, 64)):
        Image.new("L", size, 255).save(mask)
        assert prepare(image, CENTRED).mask.min() == 1
    for size in ((64, 64), (64, 100), (100, 60), (400, 240)):
        Image.new("L", size, 255).save(mask)
        with pytest.raises(DataError, match=rf"a_mask\.png: the mask is {size[0]}x{size[1]} .*a\.png, 100x64"):
            prepare(image, CENTRED)
    mask.write_bytes(mask.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a_mask\.png"):
        prepare(image, CENTRED)


def test_file_that_changed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.zeros((64, 101, 3), dtype=np.uint8))
    with pytest.raises(DataError, match=r"a\.png: the image is 101x64 but was 100x64"):
        prepare(record(path), CENTRED)
