"""What a model has learned and what it still knows: pictures by the project's own drawing, judged by rule."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from learn_concepts import Concept
from learn_methods import Method
from shapes_judge import look, right
from shapes_world import PIXELS, Picture, Scene, caption, random_scene

from sd_train.commands.sample import ChosenLora, SampleOptions
from sd_train.commands.sample_pictures import load_model
from sd_train.device import open_device
from sd_train.drawing import draw_batch, to_picture
from sd_train.families.base import Family
from sd_train.families.embeddings import install_embeddings, read_embeddings
from sd_train.prompts import Prompt

SAMPLER = "dpmsolver++"
STEPS = 6
GUIDANCE = 2.5
AT_ONCE = 32
"""Pictures that are drawn together."""

ASKED_COUNT = 24
"""Captions of a concept that a model is judged by."""
OLD_COUNT = 64
"""Captions of the base model's own world."""
CLASS_COUNT = 16
"""Captions of the class without the word."""
_OLD_SEED = 4_711


@dataclass(frozen=True)
class Scores:
    """Shares of pictures, 0 to 1."""

    concept: float
    """Captions of the concept that show it."""
    caption: float
    """Captions of the concept of which all is right."""
    old: float
    """The base model's own captions of which all is right."""
    class_drawn: float
    """Captions of the class alone that show the concept."""
    old_pixels: str
    """Hash of the pictures of the base model's own captions, to the bit."""


class _Captions:
    """A family that encodes a caption of its own for each picture of a batch, whatever the prompt says."""

    def __init__(self, family: Family, captions: Sequence[str]) -> None:
        self._family, self._captions = family, captions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def prompt_arguments(self, prompt: str, negative: str, width: int, height: int) -> dict[str, Any]:
        """What the pipeline is called with, a row for each caption."""
        told = [self._family.prompt_arguments(text, negative, width, height) for text in self._captions]
        return {name: torch.cat([each[name] for each in told]) for name in told[0]}


def draw_captions(family: Family, captions: Sequence[str]) -> torch.Tensor:
    """A picture of each caption, [B, 3, 64, 64]; number n has the seed n."""
    prompt = Prompt("", width=PIXELS, height=PIXELS, steps=STEPS, scale=GUIDANCE)
    drawn = []
    for first in range(0, len(captions), AT_ONCE):
        some = captions[first : first + AT_ONCE]
        several: Any = _Captions(family, some)
        drawn.append(draw_batch(several, prompt, SAMPLER, range(first, first + len(some))))
    return torch.cat(drawn)


def load(model: Path, method: Method, concept: Concept, file: Path | None) -> Family:
    """The model with what `method` has trained, as `sd-train sample` loads it."""
    kind = None if file is None else method.file_kind
    options = SampleOptions(
        model=str(file if kind == "model" else model),
        prompts=(),
        loras=(ChosenLora(file),) if file is not None and kind == "network" else (),
        embeddings=(),
        output_dir=model.parent,
        sampler=SAMPLER,
        count=1,
        grid=False,
        mixed_precision="no",
        clip_skip=None,
        v2=False,
        v_parameterization=None,
        sdxl=False,
        vae=None,
    )
    device = open_device("no")
    family = load_model(options, device)
    family.to(device.device, device.weight_dtype)
    if file is not None and kind == "embedding":
        install_embeddings(read_embeddings([file]), family)
    return family


def old_scenes() -> list[Scene]:
    """Scenes of the base model's own world, one thing and two."""
    rng = np.random.default_rng(_OLD_SEED)
    return [random_scene(rng) for _ in range(OLD_COUNT)]


def score(family: Family, concept: Concept) -> tuple[Scores, npt.NDArray[np.uint8]]:
    """What a model draws of a concept, of what it knew and of the class; and the pictures of the concept."""
    asked, plain, old = concept.asked(ASKED_COUNT), concept.plain_asked(CLASS_COUNT), old_scenes()
    shown = _pictures(draw_captions(family, [concept.caption(scene) for scene in asked]))
    class_shown = _pictures(draw_captions(family, [caption(scene) for scene in plain]))
    pixels = draw_captions(family, [caption(scene) for scene in old])
    scores = Scores(
        concept=_share([concept.shows(look(picture)) for picture in shown]),
        caption=_share([right(*pair) for pair in zip(asked, shown, strict=True)]),
        old=_share([kept(*pair) for pair in zip(old, _pictures(pixels), strict=True)]),
        class_drawn=_share([concept.shows(look(picture)) for picture in class_shown]),
        old_pixels=hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
    )
    return scores, np.stack(shown)


def kept(scene: Scene, picture: Picture) -> bool:
    """Whether a picture shows all that an old caption says, and nothing in two colours."""
    return right(scene, picture) and all(thing.lower is None for thing in look(picture).things)


def _pictures(pixels: torch.Tensor) -> list[Picture]:
    return [to_picture(each) for each in pixels]


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)
