"""Pictures on their way through the encoder, for caches; the encode function is passed in, so this knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sd_train.data.images import Decoded, Picture, centred_view, unit_range, view_mask, view_pixels
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[["Tensor"], "dict[str, Tensor]"]
"""[B, 3, height, width] in [-1, 1] -> rows by name, [B, ...]; it does not keep its argument."""


@dataclass(frozen=True)
class FillOptions:
    """How a cache is filled."""

    batch_size: int
    """Pictures that are encoded at once."""
    workers: int
    """Threads that decode ahead; 0 decodes in the caller's."""
    progress: Callable[[int], object]
    """Told the number of images that have become available."""
    rank: int = 0
    world: int = 1
    """This process does its share of the images; for a cache in memory it does all of them."""

    @property
    def window(self) -> int:
        """Images that are decoded ahead."""
        return self.batch_size + 2 * self.workers


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture that is to be encoded."""

    path: Path
    picture: Picture
    place: int
    """Number of the image in its dataset."""
    flip: bool
    key: bytes = b""
    """What its row is called on disk."""


def centred_pictures(decoded: Decoded, record: ImageRecord, mirrored: bool) -> list[Picture]:
    """`record` at the centre of its bucket as it is and, if `mirrored`, also mirrored.

    Raises:
        DataError: if the image is not the one that was indexed, or its mask is broken.
    """
    if decoded.size != record.size:
        (width, height), expected = decoded.size, record.size
        raise DataError(
            f"{record.path}: the image is {width}x{height} but was {expected[0]}x{expected[1]} when the training "
            "began; leave the folder as it is while training, and start again"
        )
    plain = centred_view(record, False)
    pixels = unit_range(view_pixels(decoded.pixels, record, plain))
    pictures = [Picture(pixels, view_mask(decoded.alpha, record, plain))]
    if mirrored:
        mask = view_mask(decoded.alpha, record, centred_view(record, True))
        pictures.append(Picture(np.ascontiguousarray(pixels[:, :, ::-1]), mask))
    return pictures


class Encoder:
    """Pictures in, rows out: of one bucket at a time, `batch_size` at once."""

    def __init__(
        self, encode: Encode, batch_size: int, keep: Callable[[list[Shown], dict[str, Tensor]], None]
    ) -> None:
        self._encode, self._batch_size, self._keep = encode, batch_size, keep
        self._shown: list[Shown] = []
        self._pixels = torch.empty(0)

    def add(self, shown: Shown) -> None:
        """Take one more; encodes when a batch is full, or when this one does not fit into it."""
        if self._shown:
            last = self._shown[-1].picture
            same = last.pixels.shape == shown.picture.pixels.shape
            if not same or (last.mask is None) != (shown.picture.mask is None):
                self.finish()
        self._shown.append(shown)
        if len(self._shown) >= self._batch_size:
            self.finish()

    def finish(self) -> None:
        """Encode what is left.

        Raises:
            DataError: if what comes out is not finite; it names the image.
        """
        chosen, self._shown = self._shown, []
        if not chosen:
            return
        pixels = self._stacked([shown.picture for shown in chosen])
        rows = {name: encoded.detach().to("cpu") for name, encoded in self._encode(pixels).items()}
        for name, encoded in rows.items():
            # A sum is much faster, and never finite where something in it is not.
            if encoded.sum().isfinite():
                continue
            finite = encoded.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                shown = chosen[int((~finite).nonzero()[0])]
                raise DataError(
                    f"{shown.path}: its {name} from the autoencoder is not finite (NaN or infinite); use "
                    "another --vae, or remove the image"
                )
        masks = [shown.picture.mask for shown in chosen if shown.picture.mask is not None]
        if masks:
            rows["mask"] = torch.from_numpy(np.stack(masks))
        self._keep(chosen, rows)

    def _stacked(self, pictures: list[Picture]) -> Tensor:
        """[B, 3, height, width], valid until the next call."""
        if len(pictures) == 1:
            return torch.from_numpy(pictures[0].pixels)[None]
        shape = pictures[0].pixels.shape
        if self._pixels.shape[1:] != shape:
            # Fresh memory for every batch would take longer than the copying.
            self._pixels = torch.empty(self._batch_size, *shape)
        pixels = self._pixels[: len(pictures)]
        for place, picture in enumerate(pictures):
            pixels[place] = torch.from_numpy(picture.pixels)
        return pixels
