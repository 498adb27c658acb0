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
from bisect import bisect_right
from collections.abc import Collection
from typing import NamedTuple

from sd_train.data.record import ImageRecord
from sd_train.data.settings import SubsetConfig
from sd_train.randomness import derive, stream

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


def caption_of(text: str, enable_wildcard: bool) -> str:
    """The caption in a caption file's `text`: its first line, or with wildcards all lines that are not blank; stripped.

    A first line that is blank gives an empty caption.
    """
    if not enable_wildcard:
        return text.partition("\n")[0].strip()
    lines = [line.strip() for line in text.split("\n")]
    return "\n".join(line for line in lines if line)


def process_caption(
    caption: str, subset: SubsetConfig, rng: random.Random, epoch: int, step: int, max_train_steps: int
) -> str:
    """The prompt of one sample; with `templates` it has nothing of the caption.

    Args:
        caption: as the index has it, several lines with `enable_wildcard`.
        epoch: from zero.
        step: updates done, for the token warm-up.
        max_train_steps: where the training ends, for a warm-up given as a fraction.
    """
    if subset.templates:
        return rng.choice(subset.templates)
    if _dropped(subset, rng, epoch):
        return ""
    line = _line(caption, subset, rng)
    tags = _split(line, subset)
    return _finish(line, tags, subset, rng, _warmed_up(len(tags.free), subset, step, max_train_steps))


def sample_caption(
    record: ImageRecord,
    seed: int,
    epoch: int,
    repeat: int,
    step: int,
    max_train_steps: int,
    variants: int | None = None,
) -> str:
    """The prompt of one sample.

    Args:
        record: its image.
        seed: of the training.
        epoch: that the sample belongs to, from zero.
        repeat: which of the image's samples in that epoch.
        step: updates done, for the token warm-up alone.
        max_train_steps: where the training ends, for a warm-up given as a fraction.
        variants: None draws each sample's caption on its own; a number draws one of so many fixed versions, the ones
            that `caption_variants` lists. Whether the caption is dropped is drawn for each sample either way.
    """
    rng = stream(seed, "caption", epoch, record.key, repeat)
    if variants is None or record.subset.templates:
        return process_caption(record.caption, record.subset, rng, epoch, step, max_train_steps)
    if _dropped(record.subset, rng, epoch):
        return ""
    variant = derive(seed, "variant", epoch, record.key, repeat) % variants
    rng = stream(seed, "caption variant", record.key, variant)
    line = _line(record.caption, record.subset, rng)
    tags = _split(line, record.subset)
    return _finish(line, tags, record.subset, rng, _warmed_up(len(tags.free), record.subset, step, max_train_steps))


def caption_variants(record: ImageRecord, seed: int, variants: int | None, max_train_steps: int) -> list[str]:
    """Every text that `sample_caption` gives for `record` with so many `variants`, each once, "" last if it may drop.

    All stages of a token warm-up are among them. None is for subsets of which `needs_variants` says no: there is one.
    """
    subset, found = record.subset, dict[str, None]()
    if subset.templates:
        return list(dict.fromkeys(subset.templates))
    if subset.caption_dropout_rate >= 1 or subset.caption_dropout_every_n_epochs == 1:
        return [""]
    for variant in range(variants or 1):
        rng = stream(seed, "caption variant", record.key, variant)
        line = _line(record.caption, subset, rng)
        tags, state = _split(line, subset), rng.getstate()
        for count in _stages(len(tags.free), subset, max_train_steps):
            rng.setstate(state)
            found[_finish(line, tags, subset, rng, count)] = None
        if needs_variants(subset) is None:
            break
    if subset.caption_dropout_rate > 0 or subset.caption_dropout_every_n_epochs > 0:
        found[""] = None
    return list(found)


def needs_variants(subset: SubsetConfig) -> str | None:
    """The option that makes an image's caption differ between samples; None if it is the same or dropped."""
    options = {
        "use_object_template or use_style_template": bool(subset.templates),
        "shuffle_caption": subset.shuffle_caption,
        "enable_wildcard": subset.enable_wildcard,
        "caption_tag_dropout_rate": subset.caption_tag_dropout_rate > 0,
        "token_warmup_step": subset.token_warmup_step > 0,
    }
    return next((name for name, given in options.items() if given), None)


class _Tags(NamedTuple):
    """A caption's tags: those that keep their place at both ends, and those between."""

    head: list[str]
    free: list[str]
    tail: list[str]
    divided: bool
    """Whether `keep_tokens_separator` divides the caption."""


def _dropped(subset: SubsetConfig, rng: random.Random, epoch: int) -> bool:
    """Whether a sample's caption is left out; draws first of all from `rng`, and only if there is a rate."""
    if subset.caption_dropout_rate > 0 and rng.random() < subset.caption_dropout_rate:
        return True
    return subset.caption_dropout_every_n_epochs > 0 and (epoch + 1) % subset.caption_dropout_every_n_epochs == 0


def _line(caption: str, subset: SubsetConfig, rng: random.Random) -> str:
    """The line that is chosen, with prefix and suffix, its wildcards filled."""
    lines = caption.split("\n")
    line = rng.choice(lines) if subset.enable_wildcard and len(lines) > 1 else lines[0]
    if subset.caption_prefix:
        line = f"{subset.caption_prefix} {line}"
    if subset.caption_suffix:
        line = f"{line} {subset.caption_suffix}"
    return _fill_wildcards(line, rng) if subset.enable_wildcard else line


def _fill_wildcards(line: str, rng: random.Random) -> str:
    """Every `{a|b|c}` becomes one of its choices, left to right; `{{` and `}}` become plain braces."""
    line = line.replace("{{", _OPEN).replace("}}", _CLOSE)
    line = _WILDCARD.sub(lambda match: rng.choice(match[1].split("|")), line)
    return line.replace(_OPEN, "{").replace(_CLOSE, "}")


def _finish(line: str, tags: _Tags, subset: SubsetConfig, rng: random.Random, count: int) -> str:
    """The prompt: the first `count` free tags, shuffled, less those that are dropped, joined with what is kept."""
    rate = subset.caption_tag_dropout_rate
    if tags.divided or subset.shuffle_caption or subset.token_warmup_step > 0 or rate > 0:
        free = tags.free[:count]
        if subset.shuffle_caption:
            rng.shuffle(free)
        if rate > 0:
            free = [tag for tag in free if rng.random() >= rate]
        separator = subset.caption_separator
        line = (separator if separator[-1].isspace() else separator + " ").join(tags.head + free + tags.tail)
    if subset.secondary_separator:
        line = line.replace(subset.secondary_separator, subset.caption_separator)
    return line


def _warmed_up(tags: int, subset: SubsetConfig, step: int, max_train_steps: int) -> int:
    """How many of so many free `tags` the token warm-up lets through after `step` updates."""
    if not subset.token_warmup_step or step >= (warmup := _warmup(subset, max_train_steps)):
        return tags
    least = subset.token_warmup_min
    return min(tags, math.floor(step * ((tags - least) / warmup)) + least)


def _warmup(subset: SubsetConfig, max_train_steps: int) -> float:
    """Updates until the captions have all their tags."""
    warmup: float = subset.token_warmup_step
    return math.floor(warmup * max_train_steps) if warmup < 1 else warmup


def _stages(tags: int, subset: SubsetConfig, max_train_steps: int) -> list[int]:
    """All numbers that `_warmed_up` gives from the first update on."""
    steps = range(math.ceil(_warmup(subset, max_train_steps)))
    found, step = list[int](), 0
    while step < len(steps):
        found.append(_warmed_up(tags, subset, step, max_train_steps))
        # The number never falls: on to the first update that has more.
        step = bisect_right(steps, found[-1], key=lambda later: _warmed_up(tags, subset, later, max_train_steps))
    return found if found and found[-1] == tags else [*found, tags]


def _split(line: str, subset: SubsetConfig) -> _Tags:
    """The tags of `line`. Empty ones go only where `keep_tokens_separator` divides the caption."""
    divider = subset.keep_tokens_separator
    if divider and divider in line:
        head, free, *rest = line.split(divider, 2)
        tail = rest[0].replace(divider, subset.caption_separator) if rest else ""
        return _Tags(_tags(head, subset), _tags(free, subset), _tags(tail, subset), True)
    every = [tag.strip() for tag in line.strip().split(subset.caption_separator)]
    return _Tags(every[: subset.keep_tokens], every[subset.keep_tokens :], [], False)


def _tags(part: str, subset: SubsetConfig) -> list[str]:
    return [tag for tag in (piece.strip() for piece in part.split(subset.caption_separator)) if tag]
