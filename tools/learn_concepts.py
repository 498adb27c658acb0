"""What `learn.py` teaches: new shapes, pairs of colours and styles, with invented words, in pictures drawn by rule."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from shapes_judge import Seen
from shapes_world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    STYLES,
    Picture,
    Scene,
    Thing,
    caption,
    draw,
    random_scene,
    second_tone,
)

TRAINED = 12
"""Pictures of a concept that are trained on."""
REPEATS = 8
"""Of each picture in an epoch; with `BATCH` pictures in an update no update is smaller."""
SIZE = "large"
"""Of all things: a small one is three latents wide, too few for two colours."""
_PICTURE_SEED = 8_000
_REG_SEED = 815
"""None of the captions drawn by it is one that forgetting is judged by (`learn_scores.old_scenes`)."""
_LEAST_CONTRAST = 48.0
"""Distance in RGB of a pair of colours from the background."""


@dataclass(frozen=True)
class Axes:
    """Shapes, colours and backgrounds that pictures are made of."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]


SHOWN = Axes(
    ("circle", "square", "star", "ring"),
    ("red", "yellow", "blue", "purple", "orange"),
    ("white", "black", "gray", "green"),
)
"""What training pictures show beside the concept."""
ASKED = Axes(("triangle", "cross"), ("green", "cyan", "pink"), ("blue", "yellow", "pink"))
"""What is asked for afterwards: nothing of it stood beside the concept in training."""


@dataclass(frozen=True)
class Concept:
    """Something that the base model cannot draw, and the word that stands for it."""

    kind: Literal["glyph", "pairing", "style"]
    name: str
    """A glyph or a style of the world; of a pairing "upper over lower"."""
    word: str
    """Invented: no word of CLIP's vocabulary."""
    start: str
    """Known words that textual inversion starts from."""
    class_prompt: str
    """A caption of the class without the word."""

    @property
    def pair(self) -> tuple[str, str]:
        """Upper and lower colour of a pairing."""
        upper, _, lower = self.name.partition(" over ")
        return upper, lower

    def scene(self, thing: Thing, background: str) -> Scene:
        """A scene that shows the concept, with all else as `thing` has it."""
        match self.kind:
            case "glyph":
                return Scene((replace(thing, shape=self.name),), background)
            case "pairing":
                upper, lower = self.pair
                return Scene((replace(thing, colour=upper, lower=lower),), background)
            case "style":
                return Scene((replace(thing, colour=None),), background, style=self.name)

    def plain(self, scene: Scene) -> Scene:
        """The class of a scene: the same without the concept."""
        (thing,) = scene.things
        match self.kind:
            case "glyph":
                return replace(scene, things=(replace(thing, shape=None),))
            case "pairing":
                return replace(scene, things=(replace(thing, colour=None, lower=None),))
            case "style":
                return replace(scene, style=None)

    def caption(self, scene: Scene) -> str:
        """The words for a scene, with the invented one."""
        named = {"glyph": {self.name: f"{self.word} shape"}, "pairing": {"lower": self.word}}
        return caption(scene, named.get(self.kind, {self.name: self.word}))

    def shows(self, seen: Seen) -> bool:
        """Whether a picture shows the concept."""
        match self.kind:
            case "glyph":
                return any(thing.shape == self.name for thing in seen.things)
            case "pairing":
                return any((thing.colour, thing.lower) == self.pair for thing in seen.things)
            case "style":
                return seen.style == self.name

    def _stands_out(self, background: str) -> bool:
        """Whether the concept differs from a background."""
        if self.kind == "style":
            return STYLES[self.name] != background
        return self.kind != "pairing" or _differ(self.pair, background)

    def scenes(self, axes: Axes, count: int, seed: int) -> list[Scene]:
        """`count` scenes of the concept, each shape, colour and background about equally often; none comes again before
        all have come."""
        rng = np.random.default_rng(seed)
        every = [
            (shape, colour, background)
            for shape in axes.shapes
            for colour in axes.colours
            for background in axes.backgrounds
            if background != colour and self._stands_out(background)
        ]
        places = (None, *PLACES)
        different = len({self._scene(one, place) for one in every for place in places})
        chosen: list[Scene] = []
        uses: dict[str, int] = {}
        while len(chosen) < count:
            order = [every[int(place)] for place in rng.permutation(len(every))]
            order.sort(key=lambda three: sum(uses.get(each, 0) for each in three))
            wanted = [(one, places[int(place)]) for one in order for place in rng.permutation(len(places))]
            again = len(chosen) // different
            picked, scene = next((one, new) for one, place in wanted
                                 if chosen.count(new := self._scene(one, place)) <= again)  # fmt: skip
            chosen.append(scene)
            for each in picked:
                uses[each] = uses.get(each, 0) + 1
        return chosen

    def _scene(self, three: tuple[str, str, str], place: str | None) -> Scene:
        """Of a shape, a colour and a background."""
        shape, colour, background = three
        return self.scene(Thing(shape, colour, SIZE, place), background)

    def trained(self) -> list[Scene]:
        """The scenes of the training pictures."""
        return self.scenes(SHOWN, TRAINED, 1)

    def asked(self, count: int) -> list[Scene]:
        """Scenes with shapes, colours and backgrounds that no training picture has."""
        return self.scenes(ASKED, count, 2)

    def plain_asked(self, count: int) -> list[Scene]:
        """Scenes of the class, half of them as the training pictures are but for the concept."""
        shown = self.scenes(SHOWN, count - count // 2, 3)
        return [self.plain(scene) for scene in (*shown, *self.scenes(ASKED, count // 2, 4))]

    def training_pictures(self) -> list[Picture]:
        """The pictures that are trained on."""
        return [draw(scene, _PICTURE_SEED + place) for place, scene in enumerate(self.trained())]


REPORTED = (
    Concept("glyph", "crescent", "zorbik", "shape", "a shape on a white background"),
    Concept("pairing", "pink over red", "duvost", "pink", "a circle on a white background"),
    Concept("style", "chalk", "kwimbel", "white", "a circle on a white background"),
)
TUNED = (
    Concept("glyph", "heart", "plurax", "shape", "a shape on a white background"),
    Concept("pairing", "cyan over blue", "gromzy", "cyan", "a circle on a white background"),
    Concept("pairing", "yellow over orange", "vindrel", "yellow", "a circle on a white background"),
    Concept("pairing", "purple over blue", "strobak", "purple", "a circle on a white background"),
    Concept("style", "ink", "fexlor", "black", "a circle on a white background"),
)
"""What rates, ranks and updates are chosen by."""


def _differ(pair: tuple[str, str], background: str) -> bool:
    """Whether both colours, and the seam in which they mix, differ from both tones of a background."""
    upper, lower = (np.array(COLOURS[name], dtype=np.float64) for name in pair)
    tones = (np.array(BACKGROUNDS[background], dtype=np.float64), second_tone(BACKGROUNDS[background]))
    shown = (upper, lower, (upper + lower) / 2)
    return all(float(np.linalg.norm(colour - tone)) > _LEAST_CONTRAST for colour in shown for tone in tones)


def reg_prompts(concept: Concept) -> list[str]:
    """What regularisation images are drawn of: the training pictures' captions without the concept, and as many others
    of the base model's world."""
    rng = np.random.default_rng(_REG_SEED)
    return sorted({caption(concept.plain(scene)) for scene in concept.trained()}) + [
        caption(random_scene(rng)) for _ in range(TRAINED)
    ]


def write_dataset(concept: Concept, folder: Path, reg_images: Mapping[str, Path], batch_size: int) -> None:
    """The training pictures with caption files, and the dataset files over them.

    `captions.toml` reads the caption files, `metadata.toml` the same captions from a metadata file, and `reg.toml`,
    written where there are `reg_images` (folders by prompt), takes as many of them as pictures of the concept into
    each batch.
    """
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    metadata = {}
    for place, (scene, picture) in enumerate(zip(concept.trained(), concept.training_pictures(), strict=True)):
        path = pictures / f"{place:02d}.png"
        cv2.imwrite(str(path), picture[..., ::-1])
        path.with_suffix(".txt").write_text(concept.caption(scene) + "\n", encoding="utf-8")
        metadata[path.stem] = {"caption": concept.caption(scene)}
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    taught = [f"image_dir = {str(pictures)!r}", f"num_repeats = {REPEATS}"]
    with_files, caption_file = [*taught, 'caption_extension = ".txt"'], f"{str(folder / 'metadata.json')!r}"
    (folder / "captions.toml").write_text(_toml([with_files], batch_size))
    (folder / "metadata.toml").write_text(_toml([[*taught, f"metadata_file = {caption_file}"]], batch_size))
    if reg_images:
        reg = [[f"image_dir = {str(path)!r}", "is_reg = true", f"class_tokens = {prompt!r}"]
               for prompt, path in reg_images.items()]  # fmt: skip
        (folder / "reg.toml").write_text(_toml([with_files, *reg], 2 * batch_size))


def _toml(subsets: Sequence[Sequence[str]], batch_size: int) -> str:
    """A dataset file."""
    blocks = ["\n".join(["[[datasets.subsets]]", *lines]) for lines in subsets]
    return "\n\n".join([f"[[datasets]]\nresolution = 64\nbatch_size = {batch_size}", *blocks]) + "\n"
