"""Captions: which file holds them, and what one sample's prompt is made of them.

The rules and the order of random draws are those of sd-scripts (`BaseDataset.process_caption`), less its mistakes:
epochs are counted from 1 for `caption_dropout_every_n_epochs`; `keep_tokens_separator` never stays in the prompt;
prefix and suffix go onto the line that was chosen; tags are joined with the separator that they were split at.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Collection
from pathlib import Path

from sd_train.config.textfile import read_text
from sd_train.data.config import SubsetConfig
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError
from sd_train.randomness import stream

TEXT_EXTENSIONS = (".txt", ".caption", ".captions", ".tags", ".cap")
"""Where captions are looked for when the configured extension finds none, to name it in the message."""

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_WILDCARD = re.compile(r"\{([^}]+)\}")


def caption_name(image: str, extension: str, names: Collection[str]) -> str | None:
    """The caption file of `image` among the `names` of its folder, which `os.path.normcase` has been applied to.

    `<stem><extension>`, else the stem without the four numbers `_x_y_w_h` of a face crop; None if there is neither.
    """
    stem = os.path.splitext(image)[0]
    parts = stem.split("_")
    stems = [stem] if len(parts) < 5 else [stem, "_".join(parts[:-4])]
    return next((name for name in (stem + extension for stem in stems) if os.path.normcase(name) in names), None)


def read_caption(path: Path, enable_wildcard: bool) -> str:
    """The caption in `path`: its first line, or with wildcards all lines that are not blank; stripped.

    A first line that is blank gives an empty caption.

    Raises:
        DataError: if the file is empty, not UTF-8 or cannot be read.
    """
    text = read_text(path, DataError)
    if not text:
        raise DataError(f"{path}: the caption file is empty; write the caption, or one blank line for no caption")
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line) if enable_wildcard else lines[0]


def process_caption(
    caption: str, subset: SubsetConfig, rng: random.Random, epoch: int, step: int, max_train_steps: int
) -> str:
    """The prompt of one sample.

    Args:
        caption: as the index has it, several lines with `enable_wildcard`.
        epoch: from zero.
        step: updates done, for the token warm-up.
        max_train_steps: where the training ends, for a warm-up given as a fraction.
    """
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return ""
    if subset.caption_dropout_every_n_epochs > 0 and (epoch + 1) % subset.caption_dropout_every_n_epochs == 0:
        return ""
    lines = caption.split("\n")
    line = rng.choice(lines) if subset.enable_wildcard and len(lines) > 1 else lines[0]
    if subset.caption_prefix:
        line = f"{subset.caption_prefix} {line}"
    if subset.caption_suffix:
        line = f"{line} {subset.caption_suffix}"
    if subset.enable_wildcard:
        line = _fill_wildcards(line, rng)
    divided = bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in line
    if divided or subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0:
        line = _arrange(line, subset, rng, step, max_train_steps)
    if subset.secondary_separator:
        line = line.replace(subset.secondary_separator, subset.caption_separator)
    return line


def sample_caption(record: ImageRecord, seed: int, epoch: int, repeat: int, step: int, max_train_steps: int) -> str:
    """The prompt of one sample; `epoch` from zero, `step` the updates done (for the token warm-up alone)."""
    rng = stream(seed, "caption", epoch, record.key, repeat)
    return process_caption(record.caption, record.subset, rng, epoch, step, max_train_steps)


def _fill_wildcards(line: str, rng: random.Random) -> str:
    """Every `{a|b|c}` becomes one of its choices, left to right; `{{` and `}}` become plain braces."""
    line = line.replace("{{", _OPEN).replace("}}", _CLOSE)
    line = _WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), line)
    return line.replace(_OPEN, "{").replace(_CLOSE, "}")


def _arrange(line: str, subset: SubsetConfig, rng: random.Random, step: int, max_train_steps: int) -> str:
    """Token warm-up, then shuffle, then dropout of the tags that are not kept."""
    head, tags, tail = _split(line, subset)
    warmup: float = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_train_steps)
    if step < warmup:
        tags = tags[: math.floor(step * ((len(tags) - subset.token_warmup_min) / warmup)) + subset.token_warmup_min]
    if subset.shuffle_caption:
        rng.shuffle(tags)
    if subset.caption_tag_dropout_rate > 0:
        tags = [tag for tag in tags if rng.random() >= subset.caption_tag_dropout_rate]
    separator = subset.caption_separator
    return (separator if separator[-1].isspace() else separator + " ").join(head + tags + tail)


def _split(line: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """(fixed head, free tags, fixed tail). Empty tags go only where `keep_tokens_separator` divides the caption."""
    divider = subset.keep_tokens_separator
    if divider and divider in line:
        head, tags, *rest = line.split(divider, 2)
        tail = rest[0].replace(divider, subset.caption_separator) if rest else ""
        return _tags(head, subset), _tags(tags, subset), _tags(tail, subset)
    every = [tag.strip() for tag in line.strip().split(subset.caption_separator)]
    return every[: subset.keep_tokens], every[subset.keep_tokens :], []


def _tags(part: str, subset: SubsetConfig) -> list[str]:
    return [tag for tag in (piece.strip() for piece in part.split(subset.caption_separator)) if tag]
