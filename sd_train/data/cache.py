"""Encoded pictures kept in memory; the encode function is passed in, so this knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from sd_train.data.buckets import crop_box
from sd_train.data.images import View, prepare
from sd_train.data.index import ImageIndex

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[["Tensor"], "dict[str, Tensor]"]


class MemoryCache:
    """What `encode` makes of each picture, as is and, with `flip_aug`, flipped; on the CPU."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int, bool], dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def fill(
        self,
        indexes: Sequence[ImageIndex],
        encode: Encode,
        batch_size: int,
        progress: Callable[[int], object],
    ) -> None:
        """Encode every picture of `indexes`, `batch_size` of one bucket at a time.

        Raises:
            DataError: if a picture cannot be read.
        """
        for number, index in enumerate(indexes):
            order = np.argsort(index.bucket_of, kind="stable")
            wanted = [
                (int(place), flip)
                for place in order
                for flip in ((False, True) if index.record(int(place)).subset.flip_aug else (False,))
            ]
            start = 0
            while start < len(wanted):
                bucket = index.bucket_of[wanted[start][0]]
                group = [
                    entry for entry in wanted[start : start + batch_size] if index.bucket_of[entry[0]] == bucket
                ]
                self._encode(number, index, group, encode)
                start += len(group)
                progress(len(group))

    def _encode(self, number: int, index: ImageIndex, group: list[tuple[int, bool]], encode: Encode) -> None:
        pictures = []
        for place, flip in group:
            record = index.record(place)
            pictures.append(prepare(record, View(crop_box(record.resized, record.bucket), flip))[0])
        rows = encode(torch.from_numpy(np.stack(pictures)))
        for name, encoded in rows.items():
            for (place, flip), row in zip(group, encoded.cpu(), strict=True):
                self._rows.setdefault((number, place, flip), {})[name] = row.clone()

    def rows(self, number: int, places: Sequence[int], flips: Sequence[bool]) -> dict[str, Tensor]:
        """The rows of records `places` of dataset `number`, stacked by name."""
        found = [self._rows[(number, place, flip)] for place, flip in zip(places, flips, strict=True)]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}
