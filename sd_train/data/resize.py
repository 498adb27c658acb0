"""Resizing and cutting to sd-scripts' pixels, without ever holding an enlarged picture whole that Pillow can strip."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_train.data.settings import Interpolation

Size = tuple[int, int]
Pixels = NDArray[np.uint8]

_PILLOW: dict[Interpolation, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
_OPENCV: dict[Interpolation, int] = {
    # OpenCV's plain INTER_NEAREST takes each source pixel's corner and so shifts the picture; sd-scripts does not.
    "nearest": cv2.INTER_NEAREST_EXACT,
    "bilinear": cv2.INTER_LINEAR,
    "linear": cv2.INTER_LINEAR,
    "bicubic": cv2.INTER_CUBIC,
    "cubic": cv2.INTER_CUBIC,
    "area": cv2.INTER_AREA,
}
_STRIP = 1 << 25
"""Pixels that Pillow resizes in one go."""
_LARGEST = 1 << 28
"""Pixels of the largest resized picture that OpenCV, which resizes only whole pictures, is asked for."""


def interpolation_of(size: Size, resized: Size, wanted: Interpolation | None) -> Interpolation:
    """`wanted`, or by default sd-scripts' choice: area where no side grows, else Lanczos."""
    if wanted is not None:
        return wanted
    return "area" if resized[0] <= size[0] and resized[1] <= size[1] else "lanczos"


def too_large(size: Size, resized: Size, wanted: Interpolation | None) -> bool:
    """Whether `cut_out` would need gigabytes: only where a very long picture is enlarged by an OpenCV method."""
    grows = resized[0] * resized[1] > max(_LARGEST, size[0] * size[1])
    return grows and interpolation_of(size, resized, wanted) in _OPENCV


def cut_out(
    image: Pixels, resized: Size, target: Size, crop: tuple[int, int], interpolation: Interpolation | None = None
) -> Pixels:
    """`image` [h, w, 3] uint8 resized to `resized` and cut to `target` at `crop` (left, top): [height, width, 3].

    Sizes are (width, height). sd-scripts' back ends (`library/utils.py: resize_image`): Pillow for Lanczos and box,
    OpenCV for the others; the pixels are equal to its own.
    """
    size = image.shape[1], image.shape[0]
    if size == resized:
        return _cut(image, target, crop)
    chosen = interpolation_of(size, resized, interpolation)
    if chosen in _PILLOW:
        return _resample(image, resized, target, crop, _PILLOW[chosen])
    whole = cv2.resize(image, resized, interpolation=_OPENCV[chosen])
    return _cut(np.asarray(whole, dtype=np.uint8), target, crop)


def cut_mask(mask: Pixels, resized: Size, target: Size, crop: tuple[int, int]) -> Pixels:
    """As `cut_out` for one channel [h, w]: area where no side grows, else linear."""
    size = mask.shape[1], mask.shape[0]
    if size == resized:
        return _cut(mask, target, crop)
    if interpolation_of(size, resized, None) == "area":
        return _cut(np.asarray(cv2.resize(mask, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8), target, crop)
    return _resample(mask, resized, target, crop, Image.Resampling.BILINEAR)


def _cut(image: Pixels, target: Size, crop: tuple[int, int]) -> Pixels:
    left, top = crop
    return image[top : top + target[1], left : left + target[0]]


def _resample(image: Pixels, resized: Size, target: Size, crop: tuple[int, int], method: Image.Resampling) -> Pixels:
    """Pillow's resize of the whole, to the bit, of which only `target` at `crop` is kept.

    Pillow resizes the rows, rounds to 8 bits, and then the columns. So each row, and then each column, can be resized
    without the others, and what is not wanted is dropped between the two.
    """
    (width, height), (left, top) = resized, crop
    rows = max(1, _STRIP // width)
    wide = []
    for start in range(0, len(image), rows):
        strip = image[start : start + rows]
        done = Image.fromarray(strip).resize((width, len(strip)), method)
        wide.append(np.asarray(done.crop((left, 0, left + target[0], len(strip))), dtype=np.uint8))
    middle = np.concatenate(wide) if len(wide) > 1 else wide[0]
    columns = max(1, _STRIP // height)
    parts = []
    for start in range(0, target[0], columns):
        strip = middle[:, start : start + columns]
        done = Image.fromarray(np.ascontiguousarray(strip)).resize((strip.shape[1], height), method)
        parts.append(np.asarray(done.crop((0, top, strip.shape[1], top + target[1])), dtype=np.uint8))
    return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
