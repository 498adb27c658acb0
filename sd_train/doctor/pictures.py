"""Thumbnails: pictures as the trainer sees them, with what the bucket cuts off dimmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sd_train.config.textfile import printable
from sd_train.data.images import centred_view, decode
from sd_train.data.index import ImageIndex, Indexes
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError
from sd_train.html import Html, Pixels, figure, picture, shrink

LONGEST = 208
"""Pixels of a thumbnail's longer side."""
_LINE = np.array([255, 64, 64], np.uint8)


class Thumbnails:
    """Makes figures of image files; each is decoded when it is shown.

    They are called by their paths in the folder `root`, without one by their names.
    """

    def __init__(self, indexes: Indexes | None, root: Path | None = None) -> None:
        self._root = root
        self._rows: dict[Path, tuple[ImageIndex, int]] = {}
        for index in () if indexes is None else (*indexes.training, *indexes.validation):
            for row in range(len(index)):
                self._rows.setdefault(index.path(row), (index, row))

    def record(self, path: Path) -> ImageRecord | None:
        """The record of an image that is trained."""
        found = self._rows.get(path)
        return None if found is None else found[0].record(found[1])

    def plain(self, path: Path, lines: list[str]) -> Html:
        """The whole picture, with `lines` below its name."""
        return self._figure(path, lines, None)

    def framed(self, path: Path, lines: list[str]) -> Html:
        """The whole picture with what its bucket cuts off dimmed."""
        return self._figure(path, lines, self.record(path))

    def _figure(self, path: Path, lines: list[str], record: ImageRecord | None) -> Html:
        name = name_in(path, self._root)
        try:
            pixels = decode(path).pixels
        except DataError:
            return figure(None, [name, *lines], "cannot be shown")
        small = shrink(pixels, LONGEST)
        if record is not None:
            small = frame(small, record)
        return figure(picture(small, name, LONGEST), [name, *lines])


def name_in(path: Path, root: Path | None) -> str:
    """What a file is called: its path in the folder `root` if it is there, else its name."""
    if root is not None and path.is_relative_to(root):
        return printable(path.relative_to(root).as_posix())
    return printable(path.name)


def frame(small: Pixels, record: ImageRecord) -> Pixels:
    """A scaled-down picture [height, width, 3] with a line around the box that is trained and the rest dimmed."""
    height, width = small.shape[:2]
    left, top = centred_view(record, False).crop
    scale = width / record.resized[0], height / record.resized[1]
    x0, x1 = round(left * scale[0]), round((left + record.bucket[0]) * scale[0])
    y0, y1 = round(top * scale[1]), round((top + record.bucket[1]) * scale[1])
    if (x0, y0) == (0, 0) and x1 >= width and y1 >= height:
        return small
    result = (small // 4 + 96).astype(np.uint8)
    x1, y1 = max(x1, x0 + 3), max(y1, y0 + 3)
    result[y0:y1, x0:x1] = _LINE
    result[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = small[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1]
    return result
