"""Figures of a picture that tell of blur and of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from sd_train.data.images import Decoded
from sd_train.html import shrink

SHARPNESS, LETTERS = "sharpness", "letters"

_SIDE = 512
"""Pictures are scaled down to it, so that figures of large and small ones are alike."""
_TEXT_SIDE = 384
_MOST_REGIONS = 400
_STEP, _VARIATION, _DIVERSITY = 8, 0.5, 0.05


def sharpness(bright: NDArray[np.uint8]) -> float:
    """Variance of the Laplacian of a grey picture (Pech-Pacheco et al. 2000)."""
    return float(cv2.Laplacian(bright, cv2.CV_32F).var())


def measure(decoded: Decoded, text: bool) -> Mapping[str, float]:
    """`SHARPNESS` of the picture at 512 pixels and, with `text`, `LETTERS`, the longest row of what may be letters."""
    bright = np.asarray(cv2.cvtColor(shrink(decoded.pixels, _SIDE), cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    figures = {SHARPNESS: sharpness(bright)}
    if text:
        small = np.asarray(cv2.cvtColor(shrink(decoded.pixels, _TEXT_SIDE), cv2.COLOR_RGB2GRAY), dtype=np.uint8)
        figures[LETTERS] = float(letters_in_a_row(small))
    return figures


@dataclass(frozen=True)
class _Region:
    """A spot of even brightness that has the size and shape of a letter."""

    left: int
    right: int
    middle: float
    height: int
    brightness: float


def letters_in_a_row(bright: NDArray[np.uint8]) -> int:
    """How many spots like letters stand side by side in a grey picture [height, width], at most.

    A guess: maximally stable regions (MSER; Matas et al. 2002) of a letter's shape, next to one another, equal in
    height, level and brightness. Fences, windows and rows of people may look the same.
    """
    regions = sorted(_letters(bright), key=lambda region: region.left)[:_MOST_REGIONS]
    longest = [1] * len(regions)
    for place, region in enumerate(regions):
        for before in range(place):
            if _follows(regions[before], region):
                longest[place] = max(longest[place], longest[before] + 1)
    return max(longest, default=0)


def _follows(one: _Region, other: _Region) -> bool:
    height = max(one.height, other.height)
    gap = other.left - one.right
    return (
        -0.2 * height <= gap <= 0.8 * height
        and other.left > one.left + 1
        and min(one.height, other.height) >= 0.6 * height
        and abs(one.middle - other.middle) <= 0.3 * height
        and abs(one.brightness - other.brightness) <= 24
    )


def _letters(bright: NDArray[np.uint8]) -> list[_Region]:
    # Less strict than its defaults: flat letters on a lively ground are otherwise passed over.
    finder = cv2.MSER.create(_STEP, 20, bright.size // 100, _VARIATION, _DIVERSITY)
    spots, boxes = finder.detectRegions(bright)
    found: dict[tuple[int, int, int, int], _Region] = {}
    for points, (left, top, width, height) in zip(spots, boxes, strict=True):
        share = len(points) / (width * height)
        if not (6 <= height <= len(bright) // 4 and 0.1 <= width / height <= 1.6 and 0.2 <= share <= 0.95):
            continue
        columns, rows = np.asarray(points).T
        levels = bright[rows, columns]
        # The same letter is found at several levels, with nearly the same box.
        place = (int(left) // 3, int(top) // 3, int(width) // 3, int(height) // 3)
        region = _Region(int(left), int(left + width), top + height / 2, int(height), float(levels.mean()))
        found.setdefault(place, region)
    return list(found.values())
