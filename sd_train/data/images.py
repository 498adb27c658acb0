"""One sample's picture: decode, resize, crop and flip to pixels and `Geometry`.

What is random about a sample depends on (seed, epoch, path within the subset, repeat) alone. Sizes are (width,
height) in pixels, arrays [height, width, 3] uint8 RGB, until the pixels leave as [3, height, width] in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_train.data.buckets import Size, crop_box
from sd_train.data.headers import open_image, orientation
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError
from sd_train.randomness import stream
from sd_train.types import Geometry

Pixels = NDArray[np.uint8]

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNIT = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
"""Value in [-1, 1] of each of the 256 levels, rounded as torchvision's ToTensor and Normalize do."""


@dataclass(frozen=True)
class View:
    """How one sample looks at its image."""

    crop: tuple[int, int]
    """(left, top) of the bucket in the resized image."""
    flip: bool


def load_pixels(path: Path) -> Pixels:
    """Decode `path` to [height, width, 3] uint8 RGB, upright by its EXIF orientation, transparency on white.

    Raises:
        DataError: if the file is missing or broken; it names the file.
    """
    with open_image(path) as image:
        turn = _TURNS.get(orientation(image))
        upright = image if turn is None else image.transpose(turn)
        return np.asarray(_rgb(upright), dtype=np.uint8)


def fit(
    image: Pixels, resized: Size, bucket: Size, crop: tuple[int, int] | None, flip: bool
) -> tuple[NDArray[np.float32], Geometry]:
    """Resize to `resized`, cut out `bucket` at `crop` (left, top; None: centred), mirror; -> pixels [3, H, W].

    sd-scripts' interpolation: area where no side grows, else Lanczos.
    """
    view = View(crop_box(resized, bucket) if crop is None else crop, flip)
    cut = cut_out(image, resized, bucket, view.crop)
    pixels = np.ascontiguousarray(_UNIT[cut[:, ::-1] if flip else cut].transpose(2, 0, 1))
    return pixels, _geometry((image.shape[1], image.shape[0]), resized, bucket, view)


def cut_out(image: Pixels, resized: Size, bucket: Size, crop: tuple[int, int]) -> Pixels:
    """`image` resized and cut to `bucket` at `crop` (left, top), still uint8 [height, width, 3]."""
    height, width = image.shape[:2]
    if (width, height) != resized:
        if resized[0] <= width and resized[1] <= height:
            image = np.asarray(cv2.resize(image, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        else:
            image = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS), dtype=np.uint8)
    left, top = crop
    return image[top : top + bucket[1], left : left + bucket[0]]


def sample_view(record: ImageRecord, seed: int, epoch: int, repeat: int) -> View:
    """Crop and flip of one sample; the flip is drawn first, so that it is the same with and without random crop."""
    rng = stream(seed, "image", epoch, record.key, repeat)
    flip = record.subset.flip_aug and rng.random() < 0.5
    if not record.subset.random_crop:
        return View(crop_box(record.resized, record.bucket), flip)
    left = rng.randint(0, record.resized[0] - record.bucket[0])
    return View((left, rng.randint(0, record.resized[1] - record.bucket[1])), flip)


def view_geometry(record: ImageRecord, view: View) -> Geometry:
    """The geometry of `record` seen through `view`, without its pixels; as `fit` returns it."""
    return _geometry(record.size, record.resized, record.bucket, view)


def prepare(record: ImageRecord, view: View) -> tuple[NDArray[np.float32], Geometry]:
    """Pixels [3, H, W] in [-1, 1] and geometry of `record` seen through `view`.

    Raises:
        DataError: if the file is broken, or is not the one that was indexed.
    """
    image = load_pixels(record.path)
    height, width = image.shape[:2]
    if (width, height) != record.size:
        raise DataError(
            f"{record.path}: the image is {width}x{height} but was {record.size[0]}x{record.size[1]} when the training "
            "began; leave the folder as it is while training, and start again"
        )
    return fit(image, record.resized, record.bucket, view.crop, view.flip)


def _geometry(original: Size, resized: Size, bucket: Size, view: View) -> Geometry:
    left, top = view.crop
    if view.flip:
        left = resized[0] - bucket[0] - left
    return Geometry((original[1], original[0]), (top, left), (bucket[1], bucket[0]), view.flip)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")
