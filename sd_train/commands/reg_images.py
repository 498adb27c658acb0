"""What `sd-train make_reg_images` does once its options are read: look, load, draw what is missing, save."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from sd_train.build import quiet_libraries
from sd_train.commands.make_reg_images import RegImageOptions
from sd_train.commands.sample_pictures import Described, Task, load_model, progress, reason_of, request_of, say
from sd_train.data.folders import IMAGE_EXTENSIONS
from sd_train.data.words import Words
from sd_train.device import Device, open_device
from sd_train.drawing import draw_batch, save_picture, to_picture
from sd_train.errors import ConfigError, RunError
from sd_train.families.registry import check_model
from sd_train.files import probe_folder, write_text
from sd_train.prompts import Prompt

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(\d{5,})\.png")
_REG_FOLDER = re.compile(r"\d+_.+")
_BETWEEN = re.compile(r"\n|, (?=[A-Z][\w ]*: )")
"""Between two settings in a picture's text."""


@dataclass(frozen=True)
class Folder:
    """The pictures of one class, drawn and to be drawn."""

    options: RegImageOptions
    prompt: Prompt
    """With its size."""

    def path(self, number: int) -> Path:
        """Of a picture."""
        return self.options.drawn.output_dir / f"{number:05d}.png"

    @cached_property
    def described(self) -> Described:
        """The words of pictures' texts."""
        return Described(self.options.drawn, (), Words({}))

    def seed(self, number: int) -> int:
        """Of a picture."""
        return (self.prompt.seed or 0) + number

    def text(self, number: int) -> str:
        """The PNG's `parameters`."""
        return self.described.text(Task(self.prompt, self.seed(number)))

    def drawn(self) -> set[int]:
        """The numbers of the pictures that are there, each drawn as it would be now.

        Raises:
            ConfigError: if one was drawn otherwise.
        """
        folder = self.options.drawn.output_dir
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        found = {name: int(number[1]) for name in names if (number := _NUMBERED.fullmatch(name))}
        problems = [problem for name, number in found.items() if (problem := self._otherwise(folder / name, number))]
        if problems:
            shown = f"{problems[0]}" + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
            raise ConfigError(
                f"--output_dir = {folder}: {shown}; give the same options, name another folder, or remove the pictures"
            )
        return set(found.values())

    def _otherwise(self, path: Path, number: int) -> str | None:
        """What sets the picture at `path` apart from number `number` as it would be drawn now; None: nothing."""
        try:
            with Image.open(path) as picture:
                text = str(picture.info.get("parameters", ""))
        except (OSError, UnidentifiedImageError):
            return f"{path.name} is no picture"
        if not text:
            return f"{path.name} does not say how it was drawn"
        there, here = (_BETWEEN.split(_without_version(each)) for each in (text, self.text(number)))
        if there == here:
            return None
        old, new = ([part for part in one if part not in other] for one, other in ((there, here), (here, there)))
        return f"{path.name} was drawn otherwise ({', '.join(old) or 'no more'}; now {', '.join(new) or 'no more'})"

    def others(self) -> list[str]:
        """Images in the folder that are not ours."""
        folder = self.options.drawn.output_dir
        if not folder.is_dir():
            return []
        images = (entry.name for entry in folder.iterdir() if entry.suffix.lower() in IMAGE_EXTENSIONS)
        return sorted(name for name in images if not _NUMBERED.fullmatch(name))


def _without_version(text: str) -> str:
    return text.rpartition(", Version: ")[0] or text


def draw_missing(options: RegImageOptions) -> None:
    """Draw and save every picture that is not there; paths go to standard output.

    Of several processes each sees to the numbers that are its own, which needs no word between them.

    Raises:
        UserError: if the folder holds other pictures, or the model cannot be loaded or drawn with.
    """
    quiet_libraries()
    kind = check_model(request_of(options.drawn))
    side = int(kind.configs["unet"].get("sample_size") or 64) * kind.latent.factor
    (prompt,) = options.drawn.prompts
    folder = Folder(options, replace(prompt, width=prompt.width or side, height=prompt.height or side))
    device = open_device(options.drawn.mixed_precision)
    own = range(device.rank, options.num_images, device.world)
    there = folder.drawn()
    missing = [number for number in own if number not in there]
    if others := folder.others():
        raise ConfigError(
            f"--output_dir = {options.drawn.output_dir}: holds {len(others)} other images ({others[0]}), which a "
            "training would take for regularisation images too; name a folder of their own"
        )
    if there and device.is_main:
        say(f"{len(there)} pictures are there already")
    if missing:
        probe_folder(options.drawn.output_dir, "--output_dir")
        try:
            _draw(folder, missing, device)
        except KeyboardInterrupt:
            say("stopped; the same command again draws what is missing")
            raise
    _write_captions(folder, sorted(there))
    if device.is_main:
        say(_how_to_use(options.drawn.output_dir, prompt.text, options.captions))
    device.close()


def _draw(folder: Folder, missing: Sequence[int], device: Device) -> None:
    options = folder.options
    say(f"loading {options.drawn.model}")
    batches = [missing[start : start + options.batch_size] for start in range(0, len(missing), options.batch_size)]
    try:
        family = load_model(options.drawn, device)
        family.to(device.device, device.weight_dtype)
        with progress(len(batches) * folder.prompt.steps) as (show, on_step):
            for place, numbers in enumerate(batches):
                began = time.monotonic()
                seeds = [folder.seed(number) for number in numbers]
                pixels = draw_batch(family, folder.prompt, options.drawn.sampler, seeds, device.autocast, on_step)
                for number, picture in zip(numbers, pixels, strict=True):
                    save_picture(folder.path(number), to_picture(picture), folder.text(number))
                    print(folder.path(number), flush=True)
                _write_captions(folder, numbers)
                done = place * options.batch_size + len(numbers)
                show(f"{done} of {len(missing)} drawn, the last {len(numbers)} in {time.monotonic() - began:.1f} s")
    except (torch.OutOfMemoryError, MemoryError) as problem:
        more = ", or a smaller --batch_size" if options.batch_size > 1 else ""
        raise RunError(reason_of(problem) + more) from None
    except (RuntimeError, ValueError) as problem:
        # A sampler that cannot so few steps, or memory on the CPU.
        raise RunError(
            f"could not be drawn: {reason_of(problem)}; try another --sampler, more --steps, another size or a smaller "
            "--batch_size"
        ) from None


def _write_captions(folder: Folder, numbers: Sequence[int]) -> None:
    """The prompt beside each picture; captions that are there stay as they are."""
    ending = folder.options.captions
    for number in numbers if ending is not None else ():
        path = folder.path(number).with_suffix(ending or "")
        if not path.exists():
            write_text(path, folder.prompt.text + "\n")


def _how_to_use(folder: Path, text: str, captions: str | None) -> str:
    """The lines of a dataset file, and the folder for `--reg_data_dir`."""
    place = folder.absolute()
    lines = [
        "a dataset file takes them as",
        "",
        "  [[datasets.subsets]]",
        f"  image_dir = {json.dumps(str(place), ensure_ascii=False)}",
        "  is_reg = true",
        f"  class_tokens = {json.dumps(text, ensure_ascii=False)}",
        *([f'  caption_extension = "{captions}"'] if captions else []),
        "",
    ]
    if _REG_FOLDER.fullmatch(place.name):
        lines.append(f"without a dataset file: --reg_data_dir {json.dumps(str(place.parent), ensure_ascii=False)}")
    else:
        name = json.dumps(f"1_{text}", ensure_ascii=False)
        lines.append(
            f"without a dataset file: name the folder {name} and give the one that it lies in as --reg_data_dir"
        )
    return "\n".join(lines)
