"""A line chart of learning rates over updates, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, groupby
from operator import itemgetter

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 1200, 700
LEFT, RIGHT, TOP, BOTTOM = 96, 32, 118, 76
"""Pixels around the axes."""
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (230, 159, 0))
"""Okabe & Ito's, which the colour-blind can tell apart."""
SHADE = (238, 241, 246)
"""Behind the warm-up and the decay."""
_INK, _GREY, _GRID = (32, 32, 36), (96, 98, 104), (222, 222, 226)
_FINER = 3
"""Times as large as it is shown the picture is drawn, for smooth lines."""
_LINE = 3
_MARKED = 60
"""Most updates that are marked one by one."""
_TICKS = 8
_MOST_LETTERS = 150


@dataclass(frozen=True)
class Plot:
    """What is drawn."""

    title: str
    subtitle: str
    updates: tuple[int, ...]
    """Number of each point's update, from 1."""
    curves: Mapping[str, tuple[float, ...]]
    """Rate at each of `updates` by name."""
    warmup: int
    """Updates."""
    decay: int
    """Updates at the end."""
    total: int

    @cached_property
    def top(self) -> float:
        """The rate at the upper end of the axis."""
        return max(max(curve) for curve in self.curves.values()) * 1.06 or 1.0


def nice_ticks(highest: float, count: int) -> list[float]:
    """At most `count` + 1 round numbers from 0 on, the last one from `highest` on or just below it."""
    if highest <= 0:
        return [0.0]
    rough = highest / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [number * step for number in range(math.floor(highest / step * (1 + 1e-9)) + 1)]


def place(plot: Plot, update: float, rate: float) -> tuple[float, float]:
    """The pixel (from the left, from the top) at which `rate` is drawn at `update`."""
    across = WIDTH - LEFT - RIGHT
    down = HEIGHT - TOP - BOTTOM
    return LEFT + across * update / plot.total, HEIGHT - BOTTOM - down * rate / plot.top


def draw_plot(plot: Plot) -> Image.Image:
    """The picture, `WIDTH` by `HEIGHT`."""
    picture = Image.new("RGB", (WIDTH * _FINER, HEIGHT * _FINER), "white")
    drawing = ImageDraw.Draw(picture)
    _draw_phases(drawing, plot)
    _draw_axes(drawing, plot)
    for name, colour in reversed(list(zip(plot.curves, cycle(COLOURS), strict=False))):
        points = [_fine(*place(plot, *point)) for point in zip(plot.updates, plot.curves[name], strict=True)]
        _draw_curve(drawing, thinned(points), colour)
    _draw_words(drawing, plot)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def _fine(across: float, down: float) -> tuple[float, float]:
    return across * _FINER, down * _FINER


def _draw_curve(
    drawing: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: tuple[int, int, int]
) -> None:
    width = _LINE * _FINER
    drawing.line(points, fill=colour, width=width)
    # Round joints and ends; of a few updates every one is marked.
    radius = width / 2 if len(points) > _MARKED else width
    for across, down in points:
        drawing.ellipse((across - radius, down - radius, across + radius, down + radius), fill=colour)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """`points` from left to right without those that the others of their column of pixels hide."""
    kept: list[tuple[float, float]] = []
    for _, column in groupby(points, key=lambda point: int(point[0])):
        inside = list(column)
        ends = {inside[0], inside[-1], min(inside, key=itemgetter(1)), max(inside, key=itemgetter(1))}
        kept += sorted(ends, key=inside.index)
    return kept


def _draw_phases(drawing: ImageDraw.ImageDraw, plot: Plot) -> None:
    for begin, updates, name in ((0, plot.warmup, "warm-up"), (plot.total - plot.decay, plot.decay, "decay")):
        if not updates:
            continue
        left, right = place(plot, begin, 0)[0], place(plot, begin + updates, 0)[0]
        drawing.rectangle((*_fine(left, TOP), *_fine(right, HEIGHT - BOTTOM)), fill=SHADE)
        text = f"{name}: {updates} update{'s' if updates > 1 else ''}"
        wide = right - left > _font(14).getlength(text) / _FINER + 12
        # A narrow one is named beside itself, where there is room.
        if name == "decay":
            _text(drawing, ((right if wide else left) - 6, TOP + 5), text, 14, _GREY, "ra")
        else:
            _text(drawing, ((left if wide else right) + 6, TOP + 5), text, 14, _GREY, "la")


def _draw_axes(drawing: ImageDraw.ImageDraw, plot: Plot) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for rate in nice_ticks(plot.top, _TICKS):
        down = place(plot, 0, rate)[1]
        drawing.line((*_fine(LEFT, down), *_fine(right, down)), fill=_GRID, width=_FINER)
        _text(drawing, (LEFT - 10, down), rate_text(rate), 15, _INK, "rm")
    for update in nice_ticks(plot.total, _TICKS):
        if update != int(update):
            continue
        across = place(plot, update, 0)[0]
        drawing.line((*_fine(across, bottom), *_fine(across, bottom + 6)), fill=_INK, width=_FINER)
        text = str(int(update))
        half = _font(15).getlength(text) / _FINER / 2
        _text(drawing, (min(across, WIDTH - half - 8), bottom + 11), text, 15, _INK, "ma")
    drawing.line((*_fine(LEFT, TOP), *_fine(LEFT, bottom), *_fine(right, bottom)), fill=_INK, width=_FINER)
    _text(drawing, ((LEFT + right) / 2, HEIGHT - 34), "update", 16, _INK, "ma")
    _text(drawing, (LEFT - 10, TOP - 14), "rate", 16, _INK, "rm")


def _draw_words(drawing: ImageDraw.ImageDraw, plot: Plot) -> None:
    _text(drawing, (LEFT, 16), plot.title, 24, _INK, "la")
    cut = plot.subtitle[:_MOST_LETTERS] + ("..." if len(plot.subtitle) > _MOST_LETTERS else "")
    _text(drawing, (LEFT, 48), cut, 15, _GREY, "la")
    across = float(LEFT)
    for (name, curve), colour in zip(plot.curves.items(), cycle(COLOURS), strict=False):
        drawing.line((*_fine(across, 86), *_fine(across + 26, 86)), fill=colour, width=_LINE * _FINER)
        text = f"{name}: {rate_text(max(curve))}"
        _text(drawing, (across + 34, 86), text, 15, _INK, "lm")
        across += 34 + _font(15).getlength(text) / _FINER + 32


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINER)


def _text(
    drawing: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    colour: tuple[int, int, int],
    anchor: str,
) -> None:
    """`anchor`: Pillow's two letters, such as "la" for left and top."""
    drawing.text(_fine(*at), text, fill=colour, font=_font(size), anchor=anchor)


def rate_text(rate: float) -> str:
    """0.00025 -> 2.5e-4; numbers from 0.01 to 1000 in full."""
    if rate == 0 or 0.01 <= rate < 1000:
        return f"{rate:.4g}"
    digits, _, power = f"{rate:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
