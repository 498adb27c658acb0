"""Pictures from a model: drawn, explained as A1111's web UI does it, saved, put beside others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from sd_train.errors import RunError
from sd_train.families.base import Family
from sd_train.files import write_whole
from sd_train.prompts import Prompt
from sd_train.samplers import LABELS, canonical_sampler, make_sampler

Picture = np.ndarray[Any, np.dtype[np.uint8]]
"""[height, width, 3], red, green, blue."""


def draw_pixels(
    family: Family,
    prompt: Prompt,
    sampler: str,
    seed: int,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """The picture of `prompt`, [3, height, width] in about [-1, 1], float32.

    Args:
        sampler: for a prompt that names none.
        seed: in place of the prompt's.
        autocast: the precision that the networks compute in.
        on_step: called after each step.

    Raises:
        RunError: if the model gives values that are not finite.
    """
    return draw_batch(family, prompt, sampler, [seed], autocast, on_step)[0]


def draw_batch(
    family: Family,
    prompt: Prompt,
    sampler: str,
    seeds: Sequence[int],
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """A picture of `prompt` for each of `seeds`, [B, 3, height, width] in about [-1, 1], float32.

    The starting noise of each, [channels, height / 8, width / 8], is the first that torch.Generator("cpu") gives after
    its seed, as in diffusers and in A1111 with its random numbers from the CPU: every device and every batch draws the
    same picture but for rounding. What a sampler adds on its way comes from the same generator. `draw_pixels` has the
    arguments.

    Raises:
        RunError: if the model gives values that are not finite.
    """
    name = prompt.sampler or sampler
    pipeline: Any = family.pipeline(make_sampler(name, family.prediction, prompt.steps, family.zero_terminal_snr))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    assert family.latent is not None
    shape = family.latent.shape(prompt.width, prompt.height)
    noise = torch.cat([torch.randn(1, *shape, generator=generator) for generator in generators])
    extra = {} if on_step is None else {"callback_on_step_end": _after_step(on_step)}
    with torch.no_grad(), _evaluating(family.networks.values()):
        with autocast():
            told = family.prompt_arguments(prompt.text, prompt.negative, prompt.width, prompt.height)
            latents: Tensor = pipeline(
                **{key: _repeated(value, len(seeds)) for key, value in told.items()},
                latents=noise,
                generator=generators,
                width=prompt.width,
                height=prompt.height,
                num_inference_steps=prompt.steps,
                guidance_scale=prompt.scale,
                output_type="latent",
                **extra,
            ).images
        # The pipeline itself would not see to an autoencoder that is kept in another precision; one after another, as
        # it is what takes the most memory.
        pixels = torch.cat([family.decode_latents(each) for each in latents.split(1)])
    if not torch.isfinite(pixels).all():
        raise RunError(
            "the picture holds values that are not finite; try another --mixed_precision, and while training a lower "
            "learning rate"
        )
    return pixels.float()


def _repeated(value: Any, count: int) -> Any:
    """`value` for so many pictures: what is no tensor, such as a size, holds for all of them."""
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value


def _after_step(on_step: Callable[[], object]) -> Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]:
    def after(pipeline: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        on_step()
        return values

    return after


def to_picture(pixels: Tensor) -> Picture:
    """[3, height, width] in about [-1, 1] -> [height, width, 3], 0 to 255."""
    levels = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    picture: Picture = levels.permute(1, 2, 0).cpu().numpy()
    return picture


def parameters_text(prompt: Prompt, sampler: str, seed: int, more: Mapping[str, object]) -> str:
    """How a picture came about, in the words and marks of A1111's web UI, which reads them back from the picture.

    Args:
        sampler: for a prompt that names none.
        seed: in place of the prompt's.
        more: what stands behind the usual settings; None: not known, left out.
    """
    settings: dict[str, object] = {
        "Steps": prompt.steps,
        "Sampler": LABELS[canonical_sampler(prompt.sampler or sampler)],
        "CFG scale": f"{prompt.scale:g}",
        "Seed": seed,
        "Size": f"{prompt.width}x{prompt.height}",
        **more,
    }
    listed = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    negative = f"\nNegative prompt: {prompt.negative}" if prompt.negative else ""
    return f"{prompt.text}{negative}\n{listed}".strip()


def _quoted(value: object) -> str:
    """A1111's rule: in quotation marks, as JSON, where a value holds one of the marks between values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def save_picture(path: Path, picture: Picture, text: str, option: str = "--output_dir") -> None:
    """Write a PNG with `text` where A1111 looks for it.

    Raises:
        RunError: if the disk refuses; it advises another `option`.
    """
    about = PngInfo()
    about.add_text("parameters", text)
    write_whole(path, lambda file: Image.fromarray(picture).save(file, format="PNG", pnginfo=about), option)


def make_grid(pictures: Sequence[Picture | None], columns: int) -> Picture:
    """`pictures` in rows of `columns`, each in the middle of its cell, on black; None is one that is missing."""
    shapes = [(0, 0) if picture is None else picture.shape[:2] for picture in pictures]
    heights = [max(shape[0] for shape in shapes[row : row + columns]) for row in range(0, len(shapes), columns)]
    widths = [max((shape[1] for shape in shapes[column::columns]), default=0) for column in range(columns)]
    grid: Picture = np.zeros((sum(heights), sum(widths), 3), np.uint8)
    for place, picture in enumerate(pictures):
        if picture is not None:
            row, column = divmod(place, columns)
            height, width, _ = picture.shape
            top = sum(heights[:row]) + (heights[row] - height) // 2
            left = sum(widths[:column]) + (widths[column] - width) // 2
            grid[top : top + height, left : left + width] = picture
    return grid


@contextmanager
def _evaluating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Every module of `networks` in evaluation mode, and afterwards each in its own mode again."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
