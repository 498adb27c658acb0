"""`sd-train explain IMAGE COMMAND ...`: when an image is shown, with which crop, caption and timestep."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_train.commands.plan import TRAINING_COMMANDS
from sd_train.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sd_train.data.index import ImageIndex
    from sd_train.plan import Prepared

USAGE = """usage: sd-train explain IMAGE COMMAND [--most N] [--json] [OPTIONS OF THE COMMAND]

Say when `sd-train COMMAND OPTIONS` shows an image, with which crop, flip, caption, timestep and weight. It is computed
from the seed and the dataset, so give --seed as the training has it (a run prints its seed, and writes it into
NAME-config.toml, which --config_file reads).

  IMAGE      path of the image, or its file name; FILE.parquet/ROW for an image inside a parquet file
  COMMAND    train_network, fine_tune, train_db, train_textual_inversion, or one of sd-scripts' other names for them
  --most N   at most so many times; default 20
  --json     print it as JSON, without the limit unless --most is given

For instance: sd-train explain photos/cat.jpg train_network --config_file out/lora-config.toml"""


@dataclass(frozen=True)
class Showing:
    """One time that an image is shown."""

    update: int
    """From 1, as --save_every_n_steps counts."""
    epoch: int
    """From 1."""
    batch: int
    """Micro-batch within the update over all processes, from 1."""
    bucket: tuple[int, int]
    resized: tuple[int, int]
    crop_top_left: tuple[int, int]
    flipped: bool
    caption: str
    timestep: int | None
    """None: `--timestep_sampling importance` chooses it by the losses of the updates before."""
    weight: float


def main(argv: Sequence[str]) -> int:
    """Print when the image is shown and return 0.

    Raises:
        UserError: if the image is not in the dataset, or the training would not begin.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    most = _take_most(words)
    if len(words) < 2 or words[1] not in TRAINING_COMMANDS:
        given = words[1] if len(words) > 1 else "nothing"
        raise ConfigError(f"explain: {given!r} is no training command; write sd-train explain IMAGE train_network ...")
    from sd_train.entry import load_config

    command, *added = TRAINING_COMMANDS[words[1]]
    config = load_config(command, [*added, *words[2:]])
    from sd_train.plan import prepare
    from sd_train.report import say_line

    prepared = prepare(config, trains=False)
    if not prepared.device.is_main:
        return 0
    found = [
        (path, shown, [*_first(showings(prepared, number, row), None if as_json and most is None else most or 20)])
        for number, index in enumerate(prepared.plan.indexes)
        for row in find(index, words[0])
        for path, shown in [(str(index.path(row)), float(index.repeats[row]))]
    ]
    if not found:
        raise DataError(_not_found(prepared, words[0]))
    if as_json:
        print(json.dumps(
            [{"path": path, "repeats": repeats, "shown": list(map(asdict, times))} for path, repeats, times in found],
            indent=1,
        ))  # fmt: skip
        return 0
    say_line(f"seed: {prepared.progress.seed}")
    for path, repeats, times in found:
        say_line(f"{path}: {repeats:g} times an epoch; training of {prepared.plan.total_steps} updates")
        for time in times:
            say_line(_in_words(time))
        if not times:
            say_line("  never shown: the training ends before")
    return 0


def _take_most(words: list[str]) -> int | None:
    if "--most" not in words:
        return None
    place = words.index("--most")
    value = words[place + 1] if place + 1 < len(words) else ""
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"--most = {value!r}: must be a whole number from 1; write for example --most 20")
    del words[place : place + 2]
    return int(value)


def _first(times: Iterator[Showing], most: int | None) -> Iterator[Showing]:
    for number, time in enumerate(times):
        if most is not None and number >= most:
            return
        yield time


def find(index: ImageIndex, wanted: str) -> list[int]:
    """Rows of `index` whose file is `wanted`: by path, else by the end of the path."""
    target = os.path.realpath(wanted)
    parts = Path(wanted).parts
    near = [row for row, key in enumerate(index.keys) if Path(key).name == Path(wanted).name]
    same = [row for row in near if os.path.realpath(index.path(row)) == target]
    return same or [row for row in near if index.path(row).parts[-len(parts) :] == parts]


def showings(prepared: Prepared, number: int, row: int) -> Iterator[Showing]:
    """Each time that image `row` of dataset `number` is shown, in order."""
    from sd_train.data.captions import sample_caption
    from sd_train.data.images import sample_view

    updates, plan = prepared.updates, prepared.plan
    settings, record = updates.settings, plan.indexes[number].record(row)
    by_losses = prepared.config.noise.timestep_sampling == "importance"
    for epoch in range(plan.epochs):
        for place in updates.appearances(number, row, epoch):
            if place.step >= plan.total_steps:
                continue
            view = sample_view(record, settings.seed, place.sample_epoch, place.repeat)
            draws = updates.draw(place.step, [place.place], *record.bucket)
            yield Showing(
                update=place.step + 1,
                epoch=epoch + 1,
                batch=place.micro + 1,
                bucket=record.bucket,
                resized=view.resized,
                crop_top_left=(view.crop[1], view.crop[0]),
                flipped=view.flip,
                caption=sample_caption(
                    record, settings.seed, place.sample_epoch, place.repeat, place.step, plan.total_steps,
                    settings.caption_variants,
                ),
                timestep=None if by_losses else int(draws.timesteps[0]),
                weight=record.weight * place.share,
            )  # fmt: skip


def _in_words(time: Showing) -> str:
    top, left = time.crop_top_left
    flipped = ", flipped" if time.flipped else ""
    timestep = "a timestep by the losses until then" if time.timestep is None else f"timestep {time.timestep}"
    weight = "" if time.weight == 1 else f", weight {time.weight:.4g}"
    return (
        f"  update {time.update} (epoch {time.epoch}, batch {time.batch}): {timestep}, resized to "
        f"{time.resized[0]}x{time.resized[1]}, {time.bucket[0]}x{time.bucket[1]} cut out at left {left} top {top}"
        f"{flipped}{weight}\n    {time.caption!r}"
    )


def _not_found(prepared: Prepared, wanted: str) -> str:
    plan = prepared.plan
    if any(find(index, wanted) for index in plan.validation):
        return f"{wanted}: is kept for validation (validation_split), so it is never trained on"
    names = {Path(key).name for index in plan.indexes for key in index.keys}
    near = difflib.get_close_matches(Path(wanted).name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else "`sd-train plan COMMAND ... --json` lists the images"
    return f"{wanted}: no image of the dataset that is trained on has this path; {hint}"
