"""The judge: what a picture of the shapes' world shows, found by rule with OpenCV, without anything learned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt
from shapes_world import (
    BACKGROUNDS,
    COLOURS,
    GLYPHS,
    PIXELS,
    SHAPES,
    SIZES,
    STYLES,
    TEXTURES,
    Floats,
    Picture,
    Scene,
    Thing,
    second_tone,
    shape_mask,
    texture_mask,
)

FAR = 45.0
"""Distance in RGB from which a pixel belongs to a thing and not to the background."""
SMALLEST = 40
"""Pixels of the smallest thing; less is a speck."""
OVERLAP = 0.6
"""Least overlap (intersection over union) with a shape's template."""
_TONES = {**COLOURS, **{name: BACKGROUNDS[name] for name in STYLES.values()}}
"""What things can be coloured in."""
_LEAST_TONES = 0.12
"""Spread of a textured background's brightness, of the distance between its two tones."""
_LEAST_MATCH = 0.6
"""Correlation of a texture with what is drawn."""
_GRID = 48


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows; things from left to right."""

    background: str
    texture: str | None
    things: tuple[Thing, ...]
    style: str | None = None


def look(picture: Picture) -> Seen:
    """What `picture` (64 x 64 x 3, RGB) shows."""
    pixels = picture.astype(np.float64)
    background = _background(pixels)
    far = _distance(pixels, background) > FAR
    count, labels, stats, centres = cv2.connectedComponentsWithStats(far.astype(np.uint8), connectivity=8)
    found = [label for label in range(1, count) if stats[label, cv2.CC_STAT_AREA] >= SMALLEST]
    found.sort(key=lambda label: float(centres[label][0]))
    things = tuple(_thing(pixels, labels == label, stats[label]) for label in found)
    styles = [style for style, tone in STYLES.items() if things and all(thing.colour == tone for thing in things)]
    return Seen(background, _texture(pixels, far, background), things, styles[0] if styles else None)


def verdict(scene: Scene, picture: Picture) -> dict[str, bool]:
    """What of a scene's caption a picture shows: "count", "shape", "colour", "lower", "size", "place", "background",
    "texture", "style".

    What the caption does not say is right whatever is drawn.
    """
    seen = look(picture)
    same = len(seen.things) == len(scene.things)
    pairs = list(zip(scene.things, seen.things, strict=True)) if same else []
    return {
        "count": same,
        "shape": same and all(said.shape in (None, shown.shape) for said, shown in pairs),
        "colour": same and all(said.colour in (None, shown.colour) for said, shown in pairs),
        "lower": same and all(said.lower in (None, shown.lower) for said, shown in pairs),
        "size": same and all(said.size in (None, shown.size) for said, shown in pairs),
        "place": same and all(said.place in (None, shown.place) for said, shown in pairs),
        "background": seen.background == scene.background,
        "texture": seen.texture == scene.texture,
        "style": seen.style == scene.style,
    }


def right(scene: Scene, picture: Picture) -> bool:
    """Whether a picture shows all that its caption says."""
    return all(verdict(scene, picture).values())


def _tones(background: str) -> tuple[Floats, Floats]:
    base = BACKGROUNDS[background]
    return np.array(base, dtype=np.float64), second_tone(base)


def _distance(pixels: Floats, background: str) -> Floats:
    """The distance of each pixel from the line between a background's two tones."""
    base, second = _tones(background)
    line = second - base
    along = np.clip(((pixels - base) @ line) / (line @ line), 0.0, 1.0)
    distance: Floats = np.linalg.norm(pixels - base - along[..., None] * line, axis=-1)
    return distance


def _background(pixels: Floats) -> str:
    """The background whose two tones the border is nearest to."""
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    return min(BACKGROUNDS, key=lambda name: float(np.median(_distance(edge, name))))


def _nearest(colour: Floats) -> str:
    return min(_TONES, key=lambda name: float(np.linalg.norm(colour - np.array(_TONES[name]))))


def _thing(pixels: Floats, mask: npt.NDArray[np.bool_], stats: npt.NDArray[np.int32]) -> Thing:
    left, top, width, height = (int(value) for value in stats[:4])
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    core = core if core.sum() >= 8 else mask
    rows = np.arange(len(pixels))[:, None]
    middle = top + height / 2
    upper, lower = core & (rows < middle - 1), core & (rows >= middle + 1)
    first = _nearest(np.median(pixels[core], axis=0))
    second: str | None = None
    if upper.sum() >= 6 and lower.sum() >= 6:
        halves = [_nearest(np.median(pixels[half], axis=0)) for half in (upper, lower)]
        if halves[0] != halves[1]:
            first, second = halves[0], halves[1]
    extent = max(width, height)
    x, y = left + width / 2 - PIXELS / 2, top + height / 2 - PIXELS / 2
    place = None
    if max(abs(x), abs(y)) > 4.5:
        if abs(x) > abs(y):
            place = "on the left" if x < 0 else "on the right"
        else:
            place = "at the top" if y < 0 else "at the bottom"
    small, large = SIZES.values()
    size = "small" if extent < (small + large) / 2 else "large"
    return Thing(_shape(mask[top : top + height, left : left + width]), first, size, place, second)


def _shape(cut: npt.NDArray[np.bool_]) -> str | None:
    """The shape whose template a mask overlaps most, None where none fits."""
    side = max(cut.shape)
    square = np.zeros((side, side), np.float32)
    y, x = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[y : y + cut.shape[0], x : x + cut.shape[1]] = cut
    mask = cv2.resize(square, (_GRID, _GRID), interpolation=cv2.INTER_LINEAR) > 0.5
    scores = {name: _overlap(mask, template) for name, template in _templates().items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] >= OVERLAP else None


def _overlap(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


@cache
def _templates() -> dict[str, npt.NDArray[np.bool_]]:
    """Each shape's mask, cut to its bounding box, on a grid of 48."""
    made = {}
    for name in (*SHAPES, *GLYPHS):
        mask = shape_mask(name, (128, 128), 200, 256) > 0
        x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
        side = max(width, height)
        square = np.zeros((side, side), np.float32)
        dy, dx = (side - height) // 2, (side - width) // 2
        square[dy : dy + height, dx : dx + width] = mask[y : y + height, x : x + width]
        made[name] = cv2.resize(square, (_GRID, _GRID), interpolation=cv2.INTER_AREA) > 0.5
    return made


def _texture(pixels: Floats, far: npt.NDArray[np.bool_], background: str) -> str | None:
    """The texture whose two tones explain the background's brightness best, None where it is plain."""
    base, second = _tones(background)
    line = second - base
    along = ((pixels - base) @ line) / (line @ line)
    free = cv2.dilate(far.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    if free.sum() < 100:
        return None
    values = along[free]
    if values.std() < _LEAST_TONES:
        return None
    found = {name: _correlation(name, along, free) for name in TEXTURES}
    best = max(found, key=lambda name: found[name])
    return best if found[best] > _LEAST_MATCH else None


def _correlation(texture: str, along: Floats, free: npt.NDArray[np.bool_]) -> float:
    """How well a texture, moved to where it fits best (captions say nothing of its phase), explains the free pixels."""
    period = PIXELS // 4
    weights = free.astype(np.float64).reshape(4, period, 4, period).sum(axis=(0, 2))
    sums = np.where(free, along - along[free].mean(), 0.0).reshape(4, period, 4, period).sum(axis=(0, 2))
    cell = sums / np.maximum(weights, 1)
    pattern = texture_mask(texture, period * 4)[:period, :period].astype(np.float64)
    # The cyclic correlation of one period with the pattern, over all shifts.
    shifts = np.fft.ifft2(np.fft.fft2(cell) * np.conj(np.fft.fft2(pattern - pattern.mean()))).real
    dy, dx = np.unravel_index(int(np.argmax(shifts)), shifts.shape)
    moved = np.roll(np.tile(pattern, (4, 4)), (int(dy), int(dx)), axis=(0, 1))[free]
    return float(np.corrcoef(along[free], moved)[0, 1]) if moved.std() > 0 else 0.0
