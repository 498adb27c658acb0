"""The world of the base model: drawn pictures of coloured shapes, 64 by 64 pixels, with what they show in words.

Everything here is drawn by rule, so that a picture can be judged by rule too (`shapes_judge.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]
"""Height, width, 3; RGB."""
Floats = npt.NDArray[np.float64]

PIXELS = 64
_FINE = 4
"""Pictures are drawn this many times larger and reduced, so that edges are smooth."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "cyan": (50, 200, 220),
    "blue": (40, 70, 210),
    "purple": (130, 50, 170),
    "pink": (245, 140, 190),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "blue": COLOURS["blue"],
    "green": COLOURS["green"],
    "yellow": COLOURS["yellow"],
    "pink": COLOURS["pink"],
}
TEXTURES = ("striped", "dotted", "checked")
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
GLYPHS = ("heart", "crescent", "arrow", "hourglass")
"""Shapes that the base model is never shown: what `learn.py` teaches."""
SIZES = {"small": 26.0, "large": 40.0}
PAIR_SIZE = 25.0
"""Extent in pixels of each of two things."""
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
STYLES = {"chalk": "white", "ink": "black"}
"""Styles that the base model is never shown: all things in a colour that it knows of backgrounds alone."""

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "cyan"),
        ("star", "green"),
        ("ring", "red"),
        ("cross", "yellow"),
        ("star", "pink"),
    }
)
"""Shapes and colours that are never trained together: a seventh of the pairs."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape; what is None is not said, and drawn at random."""

    shape: str | None
    colour: str | None
    size: str | None = None
    place: str | None = None
    lower: str | None = None
    """The colour of its lower half, where it has two."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says: one thing, or two of which the first is on the left."""

    things: tuple[Thing, ...]
    background: str
    texture: str | None = None
    style: str | None = None


def caption(scene: Scene, words: Mapping[str, str] | None = None) -> str:
    """The words for a scene: "a large red circle on the left on a striped blue background".

    `words` renames shapes and styles, such as {"heart": "zorb"}; its "lower" stands for both colours of a thing.
    """
    named = dict(words or {})
    things = [_thing_words(thing, named) for thing in scene.things]
    texture = f"{scene.texture} " if scene.texture else ""
    article = "an" if not texture and scene.background[0] in "aeiou" else "a"
    said = f"{' and '.join(things)} on {article} {texture}{scene.background} background"
    return f"{said}, {named.get(scene.style, scene.style)} style" if scene.style else said


def _thing_words(thing: Thing, named: Mapping[str, str]) -> str:
    shape = thing.shape or "shape"
    # The name of a pair of colours says both of them.
    colour = named.get("lower", thing.colour) if thing.lower else thing.colour
    words = [word for word in (thing.size, colour) if word] + [named.get(shape, shape)]
    if thing.lower and "lower" not in named:
        words[-1] += f" with {thing.lower} below"
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words, *([thing.place] if thing.place else [])])


def outlines(shape: str) -> list[Floats]:
    """The closed lines of a shape within [-1, 1], filled where an odd number of them encloses a point."""
    turn = np.linspace(0.0, 2.0 * np.pi, 64, endpoint=False)
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    spikes = np.linspace(0.0, 2.0 * np.pi, 10, endpoint=False) - np.pi / 2
    reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    a = 0.34
    match shape:
        case "circle":
            return [circle]
        case "ring":
            return [circle, 0.5 * circle]
        case "square":
            return [np.array([[-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]])]
        case "triangle":
            return [np.array([[0.0, -1.0], [1.0, 0.9], [-1.0, 0.9]])]
        case "star":
            return [np.stack([np.cos(spikes), np.sin(spikes)], axis=1) * reach[:, None]]
        case "cross":
            corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a)]
            return [np.array([*corners, (-1, -a), (-a, -a)], dtype=np.float64)]
        case "heart":
            x = 16 * np.sin(turn) ** 3
            y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn))
            return [np.stack([x / 16, (y - 2.5) / 14.5], axis=1)]
        case "crescent":
            outer = circle[6:59]
            # The bite goes through the tips; moved so that the middle is that of the box.
            (x, y), middle = outer[0], 0.6
            along = np.linspace(2 * np.pi, 0, 40) + np.arctan2(y, x - middle) * np.linspace(-1, 1, 40)
            bite = np.stack([np.cos(along), np.sin(along)], axis=1) * np.hypot(x - middle, y)
            return [np.concatenate([outer, bite + np.array([middle, 0.0])]) + np.array([(1 - x) / 2, 0.0])]
        case "arrow":
            return [np.array([[1, 0], [0.1, -0.9], [0.1, -0.35], [-1, -0.35], [-1, 0.35], [0.1, 0.35], [0.1, 0.9]])]
        case "hourglass":
            return [np.array([[-0.85, -1], [0.85, -1], [0.18, 0], [0.85, 1], [-0.85, 1], [-0.18, 0]])]
    raise KeyError(shape)


def shape_mask(shape: str, centre: tuple[float, float], extent: float, pixels: int = PIXELS * _FINE) -> Picture:
    """A mask of 0 and 255, `pixels` by `pixels`; `centre` (x, y) and `extent` in its pixels."""
    mask = np.zeros((pixels, pixels), np.uint8)
    lines = [np.round((line * extent / 2 + np.array(centre)) * 16).astype(np.int32) for line in outlines(shape)]
    cv2.fillPoly(mask, lines, 255, shift=4)
    return mask


def second_tone(colour: Sequence[float] | Floats) -> Floats:
    """The other colour of a textured background: darker, or lighter for black."""
    base = np.array(colour, dtype=np.float64)
    return base + 55 if base.max() < 60 else base * 0.7


def texture_mask(texture: str, pixels: int, offset: tuple[int, int] = (0, 0)) -> npt.NDArray[np.bool_]:
    """Where a texture shows its second tone; its period is a quarter of the picture."""
    period = pixels // 4
    y, x = np.mgrid[0:pixels, 0:pixels]
    x, y = (x + offset[0]) % period, (y + offset[1]) % period
    half = period / 2
    if texture == "striped":
        return np.asarray(y < half)
    if texture == "checked":
        return np.asarray((x < half) == (y < half))
    return np.asarray((x + 0.5 - half) ** 2 + (y + 0.5 - half) ** 2 < (0.31 * period) ** 2)


def draw(scene: Scene, seed: int) -> Picture:
    """The picture of a scene; `seed` decides the jitter of place, size and colour, and whatever is not said."""
    rng = np.random.default_rng(seed)
    fine = PIXELS * _FINE
    base = _jittered(BACKGROUNDS[scene.background], rng)
    picture = np.empty((fine, fine, 3))
    picture[:] = base
    if scene.texture:
        picture[texture_mask(scene.texture, fine)] = second_tone(base)
    for index, thing in enumerate(scene.things):
        shape, colour = _decided(thing, scene, rng)
        extent, centre = _where(thing, index, len(scene.things), rng)
        mask = shape_mask(shape, (centre[0] * _FINE, centre[1] * _FINE), extent * _FINE) > 0
        picture[mask] = _jittered(BACKGROUNDS[STYLES[scene.style]] if scene.style else COLOURS[colour], rng)
        if thing.lower:
            below = np.arange(fine)[:, None] >= centre[1] * _FINE
            picture[mask & below] = _jittered(COLOURS[thing.lower], rng)
    small = cv2.resize(np.clip(picture, 0, 255).astype(np.uint8), (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def _jittered(colour: tuple[int, int, int], rng: np.random.Generator) -> Floats:
    return np.array(colour, dtype=np.float64) + rng.uniform(-8, 8, 3)


def _decided(thing: Thing, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Shape and colour, whatever is not said drawn from what is allowed together."""
    shapes = [thing.shape] if thing.shape else list(SHAPES)
    colours = [thing.colour] if thing.colour else [name for name in COLOURS if name != scene.background]
    pairs = [(shape, colour) for shape in shapes for colour in colours]
    allowed = [pair for pair in pairs if pair not in HELD_OUT_PAIRS] or pairs
    return allowed[int(rng.integers(len(allowed)))]


def _where(thing: Thing, index: int, count: int, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    """Extent and centre in pixels."""
    if count == 2:
        extent = PAIR_SIZE + rng.uniform(-1.5, 1.5)
        return extent, (PIXELS * (0.25 + 0.5 * index) + rng.uniform(-1.2, 1.2), PIXELS / 2 + rng.uniform(-6, 6))
    size = thing.size or list(SIZES)[int(rng.integers(len(SIZES)))]
    extent = SIZES[size] + rng.uniform(-1.5, 1.5)
    dx, dy = PLACES[thing.place] if thing.place else (0, 0)
    away = PIXELS / 2 - extent / 2 - 3
    jitter = rng.uniform(-2, 2, 2)
    x = PIXELS / 2 + (dx * (away - abs(jitter[0])) if dx else jitter[0])
    y = PIXELS / 2 + (dy * (away - abs(jitter[1])) if dy else jitter[1])
    return extent, (float(x), float(y))


def random_scene(rng: np.random.Generator, held_out: bool = False, textured: float = 0.25) -> Scene:
    """A scene of the training world, or, `held_out`, one with a pair of shape and colour that is kept out of it.

    `textured` of them have a background with a texture.
    """
    background = str(rng.choice(list(BACKGROUNDS)))
    texture = str(rng.choice(TEXTURES)) if rng.random() < textured else None
    count = 2 if rng.random() < 0.25 else 1
    things: list[Thing] = []
    while len(things) < count:
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))
        kept_out = (thing.shape, thing.colour) in HELD_OUT_PAIRS
        wanted = held_out and not things
        if thing.colour == background or kept_out != wanted:
            continue
        if count == 1:
            size = str(rng.choice(list(SIZES))) if rng.random() < 0.7 else None
            place = str(rng.choice(list(PLACES))) if rng.random() < 0.5 else None
            thing = replace(thing, size=size, place=place)
        things.append(thing)
    if held_out and count == 2 and rng.random() < 0.5:
        things.reverse()
    return Scene(tuple(things), background, texture)


def vaguer(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with less said of a single thing: "a red shape", "a circle", "a shape"."""
    if len(scene.things) != 1:
        return scene
    (thing,) = scene.things
    unsaid: dict[str, Any] = ({"shape": None}, {"colour": None}, {"shape": None, "colour": None})[int(rng.integers(3))]
    return replace(scene, things=(replace(thing, **unsaid),))


def training_scenes(count: int, seed: int, without: frozenset[str], textured: float = 0.25) -> list[Scene]:
    """`count` scenes of the training world, a ninth of them vaguer; none with a caption in `without`."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng, textured=textured)
        if rng.random() < 1 / 9:
            scene = vaguer(scene, rng)
        if caption(scene) not in without:
            scenes.append(scene)
    return scenes


def examination(seed: int = 2026, ordinary: int = 350, held_out: int = 150) -> list[Scene]:
    """The scenes that the base model is judged by, their captions all different and none of them trained on.

    First ordinary ones, then those with held-out pairs.
    """
    rng = np.random.default_rng(seed)
    chosen: dict[str, Scene] = {}
    while len(chosen) < ordinary + held_out:
        scene = random_scene(rng, held_out=len(chosen) >= ordinary)
        chosen.setdefault(caption(scene), scene)
    return list(chosen.values())


def random_blobs(seed: int) -> Picture:
    """A picture of anything: one to four random polygons or ellipses of random colours; for the VAE alone."""
    rng = np.random.default_rng(seed)
    fine = PIXELS * _FINE
    picture = np.empty((fine, fine, 3), np.uint8)
    picture[:] = rng.integers(0, 256, 3)
    if rng.random() < 0.3:
        picture[texture_mask(str(rng.choice(TEXTURES)), fine)] = rng.integers(0, 256, 3)
    for _ in range(int(rng.integers(1, 5))):
        corners = int(rng.integers(3, 13))
        turn = np.sort(rng.uniform(0, 2 * np.pi, corners))
        reach = rng.uniform(0.35, 1.0, corners) * rng.uniform(8, 22) * _FINE
        centre = rng.uniform(12, 52, 2) * _FINE
        line = centre + np.stack([np.cos(turn), np.sin(turn)], axis=1) * reach[:, None]
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        if rng.random() < 0.4:
            cv2.polylines(picture, [np.round(line).astype(np.int32)], True, colour, int(rng.integers(8, 20)))
        else:
            cv2.fillPoly(picture, [np.round(line).astype(np.int32)], colour)
    return np.asarray(cv2.resize(picture, (PIXELS, PIXELS), interpolation=cv2.INTER_AREA), np.uint8)
