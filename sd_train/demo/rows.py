"""Small pictures in rows, each row with a title and each picture with words below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""Height, width, 3; RGB."""

_GAP = 10
_LINE = 14
_TITLE = 24


@dataclass(frozen=True)
class Row:
    """Pictures beside each other."""

    title: str
    pictures: Sequence[Picture]
    words: Sequence[str] = ()
    """Below each picture; empty: nothing."""


def draw_rows(rows: Sequence[Row], side: int = 128) -> Image.Image:
    """The rows below each other on white, every picture enlarged to `side` pixels without smoothing."""
    title, small = ImageFont.load_default(15), ImageFont.load_default(11)
    # The font's letters are at most about seven pixels wide at this size.
    wrapped = [[textwrap.wrap(words, max(8, side // 7)) for words in row.words] for row in rows]
    heights = [_TITLE + side + _GAP + _LINE * max((len(lines) for lines in texts), default=0) for texts in wrapped]
    width = _GAP + max(len(row.pictures) for row in rows) * (side + _GAP)
    sheet = Image.new("RGB", (width, _GAP + sum(heights)), "white")
    drawing, top = ImageDraw.Draw(sheet), _GAP // 2
    for row, texts, height in zip(rows, wrapped, heights, strict=True):
        drawing.text((_GAP, top), row.title, fill="black", font=title)
        for number, picture in enumerate(row.pictures):
            left = _GAP + number * (side + _GAP)
            shown = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, top + _TITLE))
            for line, text in enumerate(texts[number] if texts else ()):
                place = (left, top + _TITLE + side + 2 + _LINE * line)
                drawing.text(place, text, fill="black", font=small)
        top += height
    return sheet


def read_picture(path: Path) -> Picture:
    """A picture file's RGB pixels."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
