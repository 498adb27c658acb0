"""`--debug_dataset`: the real batches as the model will see them, in a window or as a page with sheets."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sd_train.files import write_text, write_whole
from sd_train.html import element, figure, page, picture
from sd_train.plan import Prepared
from sd_train.plan_report import describe
from sd_train.types import Batch, Progress, Update

MOST_SAMPLES = 96
"""Samples on the page; a window goes on as long as one likes."""
_LISTED = 8
"""Batches that are also listed as text."""
_SIDE = 224
"""Longest side of a picture on a sheet."""
_LINE = 15
_COLUMNS = 6
_ROWS = 4
"""Of a sheet; a batch of more pictures than a row holds goes on in the next one."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Sample:
    """One sample as the objective will get it."""

    pixels: Pixels
    """[height, width, 3]"""
    mask: NDArray[np.float32] | None
    """[height / 8, width / 8]"""
    path: str
    caption: str
    facts: str
    """Crop, flip, weight and the like, in words."""


@dataclass(frozen=True)
class ShownBatch:
    """One micro-batch."""

    title: str
    epoch: int
    step: int
    samples: tuple[Sample, ...]


def shown_batches(prepared: Prepared) -> Iterator[ShownBatch]:
    """The batches from where the run stands to its end; every picture is really read."""
    updates, progress = prepared.updates, prepared.progress
    start = Progress(
        seed=progress.seed, session_id=0, started_at=0.0, step=progress.step, epoch=progress.epoch, index=progress.index
    )
    for update in updates.starting_at(start, prepared.plan.total_steps):
        for batch in update.batches:
            yield _shown(update, batch, updates.per_update)


def _shown(update: Update, batch: Batch, per_update: int) -> ShownBatch:
    assert batch.pixels is not None
    height, width = batch.pixels.shape[2:]
    of = f", batch {batch.micro + 1} of its {per_update}" if per_update > 1 else ""
    title = f"epoch {update.epoch + 1}, update {update.step + 1}{of}: {width}x{height}"
    levels = ((batch.pixels.permute(0, 2, 3, 1) * 0.5 + 0.5) * 255).round().clamp(0, 255).byte().numpy()
    samples = []
    for row in range(len(batch.keys)):
        geometry = batch.geometry[row]
        facts = [
            f"file {geometry.original[1]}x{geometry.original[0]}",
            f"resized {geometry.resized[1]}x{geometry.resized[0]}",
            f"crop left {geometry.crop[1]} top {geometry.crop[0]}",
            *(["flipped"] if geometry.flipped else []),
            f"weight {float(batch.weight[row]):.4g}",
            "timestep by the losses" if "share" in batch.more_noise else f"timestep {int(batch.timesteps[row])}",
        ]
        mask = None if batch.mask is None else batch.mask[row].numpy()
        if mask is not None:
            facts.append(f"mask {float(mask.mean()):.0%}")
        samples.append(Sample(levels[row], mask, batch.paths[row], batch.captions[row], ", ".join(facts)))
    return ShownBatch(title, update.epoch, update.step, tuple(samples))


def show_dataset(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Show what the run will train on: in a window where there is one, else as files, whose paths are said."""
    if has_window():
        _in_windows(prepared)
        return
    batches = first_batches(prepared)
    for batch in batches[:_LISTED]:
        say(batch.title)
        for sample in batch.samples:
            say(f"  {Path(sample.path).name}: {sample.facts}\n    caption: {sample.caption!r}")
    page_path, *sheets = write_sheets(prepared, batches, prepared.config.saving.output_dir)
    say(f"the first {len(batches)} batches with pictures: {page_path.absolute()}")
    for sheet in sheets:
        say(f"  as a picture: {sheet}")


def has_window() -> bool:
    """Whether OpenCV can open a window here: a display, and a build with windows (not opencv-python-headless)."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return False
    try:
        cv2.namedWindow("sd_train")
        cv2.destroyWindow("sd_train")
    except cv2.error:
        return False
    return True


def _in_windows(prepared: Prepared) -> None:
    """S or a blank: next step; E: next epoch; Esc or Q: end; a closed window ends too."""
    name, skipped = "sd_train: S next step, E next epoch, Esc end", -1
    cv2.namedWindow(name, cv2.WINDOW_AUTOSIZE)
    try:
        for batch in shown_batches(prepared):
            if batch.epoch <= skipped:
                continue
            for part in _sheets([batch]):
                sheet = np.asarray(draw_sheet(part))
                cv2.imshow(name, np.ascontiguousarray(sheet[:, :, ::-1]))
                wish = _key_pressed(name)
                if wish == "end":
                    return
                if wish == "epoch":
                    skipped = batch.epoch
                    break
    finally:
        cv2.destroyAllWindows()


def _key_pressed(window: str) -> Literal["step", "epoch", "end"]:
    while True:
        key = cv2.waitKey(100) & 0xFF
        if key in (27, ord("q"), ord("Q")) or cv2.getWindowProperty(window, cv2.WND_PROP_VISIBLE) < 1:
            return "end"
        if key in (ord("s"), ord("S"), ord(" ")):
            return "step"
        if key in (ord("e"), ord("E")):
            return "epoch"


def first_batches(prepared: Prepared) -> list[ShownBatch]:
    """The batches that the page shows."""
    batches, samples = list[ShownBatch](), 0
    for batch in shown_batches(prepared):
        batches.append(batch)
        samples += len(batch.samples)
        if samples >= MOST_SAMPLES:
            break
    return batches


def write_sheets(prepared: Prepared, batches: list[ShownBatch], folder: Path) -> list[Path]:
    """Write `NAME-dataset.html` and PNG sheets in place of earlier ones; returns the paths, the page first."""
    name = prepared.names.last
    path = folder / f"{name}-dataset.html"
    write_text(path, _page(prepared, batches))
    paths = [path]
    for number, part in enumerate(_sheets(batches), 1):
        path = folder / f"{name}-dataset-{number:02d}.png"
        write_whole(path, partial(draw_sheet(part).save, format="PNG"))
        paths.append(path)
    # What an earlier call has left would be taken for this one's.
    older = re.compile(re.escape(name) + r"-dataset-\d{2,}\.png")
    for path in folder.iterdir():
        if older.fullmatch(path.name) and path not in paths:
            path.unlink(missing_ok=True)
    return paths


def _sheets(batches: Sequence[ShownBatch]) -> list[list[ShownBatch]]:
    """What stands on each sheet."""
    rows = _rows(batches)
    return [[batch for row in rows[first : first + _ROWS] for batch in row] for first in range(0, len(rows), _ROWS)]


def _rows(batches: Sequence[ShownBatch]) -> list[list[ShownBatch]]:
    """Batches side by side, until a row has `_COLUMNS` pictures; longer ones in parts."""
    rows, wide = list[list[ShownBatch]](), 0
    for batch in batches:
        for first in range(0, len(batch.samples), _COLUMNS):
            title = f"{batch.title} (continued)" if first else batch.title
            part = replace(batch, title=title, samples=batch.samples[first : first + _COLUMNS])
            if not rows or wide + len(part.samples) > _COLUMNS:
                rows.append([])
                wide = 0
            rows[-1].append(part)
            wide += len(part.samples)
    return rows


def _page(prepared: Prepared, batches: list[ShownBatch]) -> str:
    title = f"{prepared.names.last}: what will be trained on"
    about = "The first batches as the model will see them. Where a mask takes weight away, pictures are dark red."
    body = [element("h1", title), element("pre", describe(prepared.plan, prepared.config)), element("p", about)]
    for batch in batches:
        figures = [
            figure(
                picture(np.asarray(with_mask(sample)), Path(sample.path).name, longest=256),
                [Path(sample.path).name, sample.caption or "(no caption)", sample.facts],
            )
            for sample in batch.samples
        ]
        body += [element("h2", batch.title), element("div", *figures, class_="pictures")]
    return page(title, body)


def with_mask(sample: Sample) -> Image.Image:
    """The picture; where its mask takes weight away it is darkened and red."""
    picture = Image.fromarray(sample.pixels)
    if sample.mask is None:
        return picture
    weight = Image.fromarray((sample.mask.clip(0, 1) * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BOX)
    return Image.composite(picture, Image.blend(picture, Image.new("RGB", picture.size, (120, 0, 0)), 0.75), weight)


def draw_sheet(batches: Sequence[ShownBatch]) -> Image.Image:
    """A PNG sheet: rows of pictures, with captions and facts below them."""
    font = ImageFont.load_default(11)
    grouped = _rows(batches)
    width = 8 + max(sum(len(batch.samples) for batch in row) for row in grouped) * (_SIDE + 8)
    rows = [_draw_row(row, width, font) for row in grouped]
    sheet = Image.new("RGB", (width, sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _draw_row(
    batches: Sequence[ShownBatch], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> Image.Image:
    texts = [[_wrapped(sample) for sample in batch.samples] for batch in batches]
    longest = max(len(lines) for batch in texts for lines in batch)
    row = Image.new("RGB", (width, 24 + _SIDE + 8 + _LINE * longest + 8), "white")
    drawing, left = ImageDraw.Draw(row), 8
    for batch, captions in zip(batches, texts, strict=True):
        drawing.text((left, 5), batch.title, fill="black", font=font)
        for sample, lines in zip(batch.samples, captions, strict=True):
            shown = with_mask(sample)
            shown.thumbnail((_SIDE, _SIDE))
            row.paste(shown, (left, 24))
            for number, line in enumerate(lines):
                drawing.text((left, 24 + _SIDE + 6 + number * _LINE), line, fill="black", font=font)
            left += _SIDE + 8
    return row


def _wrapped(sample: Sample) -> list[str]:
    letters = _SIDE // 6
    lines = textwrap.wrap(Path(sample.path).name, letters)[:1]
    caption = textwrap.wrap(sample.caption or "(no caption)", letters) or ["(no caption)"]
    lines += caption[:5] + (["..."] if len(caption) > 5 else [])
    return lines + textwrap.wrap(sample.facts, letters)
