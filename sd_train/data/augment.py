"""What is random about a picture beside its flip and its plain crop: the crop around a face, and changed colours.

The rules are sd-scripts' (`BaseDataset.crop_target`, `AugHelper.color_aug`). Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

import cv2
import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int]
Pixels = NDArray[np.uint8]

_FACE = re.compile(r"_([0-9]+)_([0-9]+)_([0-9]+)_([0-9]+)$")
_COLOUR_RATE = 0.33
_HUE_LIMIT = 8.0
_GAMMA_LIMIT = 0.05


@dataclass(frozen=True)
class ColourChange:
    """One of the two is changed, the other is neutral."""

    hue: float = 0.0
    """Added to the hue, of which a full turn is 180 (OpenCV's scale)."""
    gamma: float = 1.0
    """Power that the values in [0, 1] are raised to."""


@dataclass(frozen=True)
class Face:
    """Where a face is in the picture as seen upright, in pixels."""

    centre: tuple[int, int]
    size: int
    """The longer of its sides."""


@dataclass(frozen=True)
class Placement:
    """Size after the resize, and (left, top) of what is cut out of that."""

    resized: Size
    crop: tuple[int, int]


def draw_colour(rng: Random) -> ColourChange | None:
    """With probability 0.33 a hue shift within 8 of 180 or a gamma within 0.05 of 1, each as often; else None."""
    if rng.random() >= _COLOUR_RATE:
        return None
    if rng.random() < 0.5:
        return ColourChange(hue=rng.uniform(-_HUE_LIMIT, _HUE_LIMIT))
    return ColourChange(gamma=rng.uniform(1 - _GAMMA_LIMIT, 1 + _GAMMA_LIMIT))


def change_colour(pixels: Pixels, change: ColourChange) -> Pixels:
    """`pixels` [height, width, 3] uint8 RGB with `change`; every pixel by itself, so that the crop does not matter.

    Other than in sd-scripts, gamma acts on values in [0, 1]: a power of 0..255 would darken or clip the picture.
    """
    if change.gamma != 1.0:
        table = np.rint(255 * (np.arange(256) / 255) ** change.gamma).astype(np.uint8)
        pixels = np.asarray(cv2.LUT(pixels, table), dtype=np.uint8)
    if change.hue != 0.0:
        # In floating point: with 8-bit hue and saturation dark pixels would change although nothing is shifted.
        hsv = cv2.cvtColor(np.divide(pixels, 255, dtype=np.float32), cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0] + 2 * change.hue) % 360
        rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        pixels = np.rint(255 * np.clip(rgb, 0, 1)).astype(np.uint8)
    return pixels


def face_in_name(stem: str, size: Size) -> Face | None:
    """The face that a file name's stem tells of: `..._cx_cy_w_h`, centre and size in pixels of a picture of `size`.

    None where the name ends otherwise, or in numbers that are no face, as a date: centred outside the picture, larger
    than it, or of no size.
    """
    found = _FACE.search(stem)
    if found is None:
        return None
    x, y, width, height = map(int, found.groups())
    if x > size[0] or y > size[1] or width > size[0] or height > size[1] or max(width, height) == 0:
        return None
    return Face((x, y), max(width, height))


def place_on_face(
    rng: Random, face: Face, size: Size, target: Size, span: tuple[float, float], random_crop: bool
) -> Placement:
    """A scale at which the face is a random share of the picture, and a crop to `target` around it.

    The target's short side becomes `span[0]` to `span[1]` times the face's size, as far as the scale is not above 1;
    the picture always covers the target, and is enlarged only for that. The crop is centred on the face and shifted:
    with `random_crop` anywhere, the more likely the nearer; else, if `span` is one, by up to a twentieth of the face.
    """
    short = min(target)
    cover = max(target[0] / size[0], target[1] / size[1])
    smallest = max(cover, min(1.0, short / (face.size * span[1])))
    largest = max(smallest, min(1.0, short / (face.size * span[0])))
    scale = rng.uniform(smallest, largest) if largest > smallest else smallest
    seen = int(face.size * scale + 0.5)
    resized, crop = [], []
    for length, side, centre in zip(size, target, face.centre, strict=True):
        long = max(side, int(length * scale + 0.5))
        middle = min(long, int(centre * scale + 0.5))
        start = middle - side // 2
        if random_crop:
            reach = max(long - middle, middle)
            start += rng.randint(0, reach) + rng.randint(0, reach) - reach
        elif span[0] != span[1] and seen >= 40 and seen > short // 10:
            start += rng.randint(-(seen // 20), seen // 20)
        resized.append(long)
        crop.append(max(0, min(start, long - side)))
    return Placement((resized[0], resized[1]), (crop[0], crop[1]))
