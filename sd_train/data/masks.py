"""Masks: how much each place of the latents counts in the loss.

A mask is one channel [h, w] uint8, white where the loss counts. Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.data.resize import Pixels, Size, cut_mask
from sd_train.errors import DataError

LATENT_CELL = 8
"""Pixels of the picture to one place of the latents, along each side."""


def check_aspect(mask: Pixels, path: Path, size: Size, image: Path) -> None:
    """A mask may be larger or smaller than its image of `size`, but must have its shape, up to a rounded pixel.

    Raises:
        DataError: if it has not; it names both files and sizes.
    """
    height, width = mask.shape
    if abs(width * size[1] - height * size[0]) > max(width + height, sum(size)):
        raise DataError(
            f"{path}: the mask is {width}x{height} pixels, which is not the shape of its image {image}, {size[0]}x"
            f"{size[1]}; save the mask in the size of the image, turned as the image is seen"
        )


def cell_weights(mask: Pixels | None, target: Size, unmasked_weight: float) -> NDArray[np.float32]:
    """Weight of each place of the latents, [height // 8, width // 8], for a mask cut to `target`; None: all white.

    The mean over the place's 8x8 pixels (as sd-scripts, area interpolation), from `unmasked_weight` where it is black
    to 1 where it is white.
    """
    rows, columns = target[1] // LATENT_CELL, target[0] // LATENT_CELL
    if mask is None:
        return np.ones((rows, columns), dtype=np.float32)
    cells = mask[: rows * LATENT_CELL, : columns * LATENT_CELL].reshape(rows, LATENT_CELL, columns, LATENT_CELL)
    share = cells.sum(axis=(1, 3), dtype=np.int64) / (255 * LATENT_CELL**2)
    weights: NDArray[np.float32] = (unmasked_weight + (1 - unmasked_weight) * share).astype(np.float32)
    return weights


def seen_mask(mask: Pixels, resized: Size, target: Size, crop: tuple[int, int], flip: bool) -> Pixels:
    """`mask` as its picture is seen: resized to the same size, cut at the same place, mirrored likewise.

    sd-scripts squashes it to the bucket instead, so that it lies beside what it should cover.
    """
    cut = cut_mask(mask, resized, target, crop)
    return cut[:, ::-1] if flip else cut
