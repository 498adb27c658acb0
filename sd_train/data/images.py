"""One sample's picture: decode, resize, crop, flip and recolour to pixels, mask and `Geometry`.

What is random about a sample depends on (seed, epoch, path within the subset, repeat) alone. Sizes are (width,
height) in pixels, arrays [height, width, 3] uint8 RGB, until the pixels leave as [3, height, width] in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_train.data.augment import ColourChange, change_colour, draw_colour, face_in_name, place_on_face
from sd_train.data.buckets import Size, crop_box
from sd_train.data.headers import open_image, orientation
from sd_train.data.masks import cell_weights, check_aspect, seen_mask
from sd_train.data.record import ImageRecord
from sd_train.data.resize import Pixels, cut_out, too_large
from sd_train.errors import DataError, ImageError
from sd_train.randomness import stream
from sd_train.types import Geometry

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


@dataclass(frozen=True, eq=False)
class Decoded:
    """A picture as it is meant to be seen: upright by its EXIF orientation, transparency on white."""

    pixels: Pixels
    """[height, width, 3]"""
    alpha: Pixels | None
    """[height, width], 255 where opaque; None: opaque everywhere."""

    @property
    def size(self) -> Size:
        return self.pixels.shape[1], self.pixels.shape[0]


@dataclass(frozen=True)
class View:
    """How one sample looks at its image."""

    resized: Size
    """Of the whole image, before the crop."""
    crop: tuple[int, int]
    """(left, top) of the bucket in the resized image."""
    flip: bool
    """Mirrored after the crop."""
    colour: ColourChange | None = None


@dataclass(frozen=True, eq=False)
class Picture:
    """What a batch takes of one sample."""

    pixels: NDArray[np.float32]
    """[3, height, width] in [-1, 1]"""
    mask: NDArray[np.float32] | None
    """[height / 8, width / 8], the weight of each place's loss; None: the subset has no masks."""


def decode(path: Path) -> Decoded:
    """The first picture in the file `path`, whatever its format, depth and palette.

    Raises:
        DataError: if the file is missing or broken; it names the file.
    """
    if path.suffix == ".npz":
        raise DataError(f"{path}: only the latents of this image are there, so it cannot be shown; put it beside them")
    with _opened(path) as image:
        upright = _upright(image)
        if upright.mode.startswith("I"):
            return _decode_deep(upright)
        if not upright.has_transparency_data:
            return Decoded(np.asarray(upright.convert("RGB"), dtype=np.uint8), None)
        colours = upright.convert("RGBA")
        alpha = np.asarray(colours.getchannel("A"), dtype=np.uint8)
        composed = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
        return Decoded(np.asarray(composed, dtype=np.uint8), None if alpha.min() == 255 else alpha)


def load_mask(path: Path) -> Pixels:
    """The mask file `path` as one channel [height, width], upright: its red channel, whatever its transparency.

    Raises:
        DataError: if the file is missing or broken; it names the file.
    """
    with _opened(path) as image:
        upright = _upright(image)
        if upright.mode.startswith("I"):
            return _top_byte(upright)
        return np.asarray(upright.convert("RGB").getchannel("R"), dtype=np.uint8)


def centred_view(record: ImageRecord, flip: bool) -> View:
    """The view without anything random but `flip`: what the caches hold."""
    return View(record.resized, crop_box(record.resized, record.bucket), flip)


def sample_view(record: ImageRecord, seed: int, epoch: int, repeat: int) -> View:
    """Flip, crop and colours of one sample.

    The flip is drawn first, so that it is the same with and without a random crop; the colours have draws of their
    own, so that they are the same with any crop. With `face_crop_aug_range` (buckets off) an image whose name tells of
    a face is scaled and cut by `augment.place_on_face`; other images as without it.
    """
    subset = record.subset
    rng = stream(seed, "image", epoch, record.key, repeat)
    flip = subset.flip_aug and rng.random() < 0.5
    colour = draw_colour(stream(seed, "colour", epoch, record.key, repeat)) if subset.color_aug else None
    span = None if record.bucketed else subset.face_crop_aug_range
    face = face_in_name(record.path.stem, record.size) if span is not None else None
    if face is not None and span is not None:
        placed = place_on_face(rng, face, record.size, record.bucket, span, random_crop=subset.random_crop)
        return View(placed.resized, placed.crop, flip, colour)
    if not subset.random_crop:
        return View(record.resized, crop_box(record.resized, record.bucket), flip, colour)
    left = rng.randint(0, record.resized[0] - record.bucket[0])
    top = rng.randint(0, record.resized[1] - record.bucket[1])
    return View(record.resized, (left, top), flip, colour)


def view_geometry(record: ImageRecord, view: View) -> Geometry:
    """The geometry of `record` seen through `view`, without its pixels."""
    (width, height), (left, top) = record.bucket, view.crop
    if view.flip:
        left = view.resized[0] - width - left
    return Geometry((record.size[1], record.size[0]), (top, left), (height, width), view.flip, view.resized[::-1])


def view_pixels(image: Pixels, record: ImageRecord, view: View) -> Pixels:
    """`image`, the decoded picture of `record`, seen through `view`: [height, width, 3] uint8 of the bucket.

    Raises:
        DataError: if it is so long that resizing it would take gigabytes; it names the file.
    """
    size, method = (image.shape[1], image.shape[0]), record.subset.resize_interpolation
    if too_large(size, view.resized, method):
        raise DataError(
            f"{record.path}: the image is {size[0]}x{size[1]} and would be enlarged to {view.resized[0]}x"
            f"{view.resized[1]} pixels to fill {record.bucket[0]}x{record.bucket[1]}; cut it, or leave out "
            f"resize_interpolation = {method!r}"
        )
    cut = cut_out(image, view.resized, record.bucket, view.crop, method)
    seen = np.ascontiguousarray(cut[:, ::-1] if view.flip else cut)
    return seen if view.colour is None else change_colour(seen, view.colour)


def view_mask(alpha: Pixels | None, record: ImageRecord, view: View) -> NDArray[np.float32] | None:
    """The mask of `record` seen through `view`, [height / 8, width / 8] of the bucket; None: the subset has none.

    That of the mask folder, else with `alpha_mask` the image's own `alpha`; without either all of it counts.

    Raises:
        DataError: if the mask file is broken or has another shape than its image; it names the file.
    """
    subset = record.subset
    if not subset.masked:
        return None
    mask = alpha if subset.alpha_mask else None
    if record.mask is not None:
        mask = load_mask(record.mask)
        check_aspect(mask, record.mask, record.size, record.path)
    if mask is not None:
        mask = seen_mask(mask, view.resized, record.bucket, view.crop, view.flip)
    return cell_weights(mask, record.bucket, subset.unmasked_weight)


def prepare(record: ImageRecord, view: View) -> Picture:
    """Pixels and mask of `record` seen through `view`.

    Raises:
        DataError: if a file is broken, or is not the one that was indexed.
    """
    decoded = decode(record.path)
    (width, height), expected = decoded.size, record.size
    if (width, height) != expected:
        raise DataError(
            f"{record.path}: the image is {width}x{height} but was {expected[0]}x{expected[1]} when the training "
            "began; leave the folder as it is while training, and start again"
        )
    pixels = unit_range(view_pixels(decoded.pixels, record, view))
    return Picture(pixels, view_mask(decoded.alpha, record, view))


def unit_range(pixels: Pixels) -> NDArray[np.float32]:
    """[height, width, 3] uint8 as [3, height, width] in [-1, 1], with torchvision's rounding."""
    planes = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
    for channel, plane in enumerate(planes):
        cv2.LUT(cv2.extractChannel(pixels, channel), _UNIT, plane)
    return planes


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """As `open_image`; Pillow's AVIF decoder says with a RuntimeError what the others say with an OSError."""
    try:
        with open_image(path) as image:
            image.load()
            yield image
    except RuntimeError as problem:
        raise ImageError(f"{path}: the image cannot be read ({problem}); remove it or save it anew") from None


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def _top_byte(image: Image.Image) -> Pixels:
    """The upper 8 of 16 bits of a grey picture; Pillow's own conversion would make everything above 255 white."""
    return (np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)


def _decode_deep(image: Image.Image) -> Decoded:
    """A grey picture of more than 8 bits; one of its levels may be transparent."""
    grey, alpha = _top_byte(image), None
    if "transparency" in image.info:
        opaque = np.asarray(image) != image.info["transparency"]
        grey = np.where(opaque, grey, np.uint8(255))
        alpha = None if opaque.all() else opaque * np.uint8(255)
    return Decoded(np.repeat(grey[:, :, None], 3, axis=2), alpha)
