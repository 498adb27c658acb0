"""What is wrong with the pictures themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from sd_train.data.buckets import assign_many
from sd_train.data.settings import DatasetConfig
from sd_train.doctor import kinds
from sd_train.doctor.finding import Finding, Kind, Sight, found
from sd_train.doctor.looks import Look, Trouble, readable
from sd_train.doctor.survey import Item, SubsetSurvey

TINY_GROWTH = 4.0
MUCH_GROWTH = 2.0
MUCH_CUT = 0.25
"""Share of the picture's area."""

_FORMATS = {
    ".png": {"PNG"}, ".jpg": {"JPEG", "MPO"}, ".jpeg": {"JPEG", "MPO"}, ".webp": {"WEBP"}, ".bmp": {"BMP", "DIB"},
    ".avif": {"AVIF"}, ".jxl": {"JXL"},
}  # fmt: skip
_TURNS = {
    2: "mirrored", 3: "upside down", 4: "mirrored, upside down", 5: "mirrored, on its side", 6: "on its side",
    7: "mirrored, on its side", 8: "on its side",
}  # fmt: skip
_TROUBLES: dict[Trouble, Kind] = {
    "missing_file": kinds.MISSING_FILE,
    "empty_file": kinds.EMPTY_FILE,
    "not_an_image": kinds.FOREIGN,
    "broken_header": kinds.BROKEN_HEADER,
    "truncated": kinds.TRUNCATED,
}


def check_images(
    subset: SubsetSurvey, dataset: DatasetConfig, looks: Mapping[Path, Look], skip_broken: bool
) -> Iterator[Finding]:
    """Files that cannot be read, unusual contents, pictures that do not fit their buckets.

    Args:
        skip_broken: whether a run would leave out what cannot be read.
    """
    if skip_broken:
        broken = [item for item in subset.items if looks[item.path].trouble]
        yield from found(kinds.LEFT_OUT, subset.place, (_sight(item, looks[item.path].message) for item in broken))
    for trouble, kind in () if skip_broken else _TROUBLES.items():
        broken = [item for item in subset.items if looks[item.path].trouble == trouble]
        yield from found(kind, subset.place, (_sight(item, looks[item.path].message) for item in broken))
    whole = [item for item in subset.items if not looks[item.path].trouble]
    yield from _contents(subset, whole, looks)
    yield from _fits(subset, dataset, whole, looks)
    if subset.config.face_crop_aug_range is not None:
        yield from _faces(subset, whole, looks)


def _sight(item: Item, message: str) -> Sight:
    # The path stands beside the note anyway.
    return Sight(item.path, message.removeprefix(f"{item.path}: "))


def _contents(subset: SubsetSurvey, items: list[Item], looks: Mapping[Path, Look]) -> Iterator[Finding]:
    def those(kind: Kind, note: Callable[[Look, Path], str | None]) -> list[Finding]:
        noted = ((item.path, note(looks[item.path], item.path)) for item in items)
        return found(kind, subset.place, (Sight(path, text) for path, text in noted if text is not None))

    yield from those(kinds.WRONG_EXTENSION, _wrong_extension)
    yield from those(kinds.ROTATED, lambda look, _: _TURNS.get(look.orientation))
    yield from those(kinds.ANIMATED, lambda look, _: (
        f"{look.frames} frames" if look.frames > 1 and look.format != "MPO" else None))
    yield from those(kinds.CMYK, lambda look, _: look.mode if look.mode in ("CMYK", "LAB", "YCCK") else None)
    yield from those(kinds.SIXTEEN_BIT, lambda look, _: look.mode if look.sixteen_bit else None)
    yield from those(kinds.PALETTE, lambda look, _: "" if look.mode in ("P", "PA") else None)
    yield from those(kinds.BLANK, lambda look, _: (
        "" if look.contrast < 1 and look.grey | _flat(look) and not _invisible(look) else None))
    grey = [look.grey for look in readable(looks[item.path] for item in items)]
    if sum(grey) * 2 < len(grey):
        yield from those(kinds.GREY, lambda look, _: "" if look.grey and look.contrast >= 1 else None)
    yield from those(kinds.INVISIBLE, lambda look, _: "" if _invisible(look) else None)
    transparent = [look.alpha is not None and look.alpha[1] < 1 for look in (looks[item.path] for item in items)]
    if not subset.config.alpha_mask:
        yield from those(kinds.TRANSPARENT, lambda look, _: _transparency(look))
    elif any(transparent):
        yield from those(kinds.ALPHA_ABSENT, lambda look, _: (
            "" if look.alpha is None or look.alpha[1] == 1 else None))


def _wrong_extension(look: Look, path: Path) -> str | None:
    expected = _FORMATS.get(os.path.splitext(path.name)[1].lower())
    return f"holds {look.format}" if expected is not None and look.format not in expected else None


def _flat(look: Look) -> bool:
    return look.small is not None and int(np.ptp(look.small.reshape(-1, 3), axis=0).max()) <= 3


def _invisible(look: Look) -> bool:
    return look.alpha is not None and look.alpha[0] == 0


def _transparency(look: Look) -> str | None:
    if look.alpha is None or look.alpha[1] == 1 or _invisible(look):
        return None
    return f"{1 - look.alpha[0]:.0%} transparent" if look.alpha[0] < 0.995 else "a few pixels"


def _fits(
    subset: SubsetSurvey, dataset: DatasetConfig, items: list[Item], looks: Mapping[Path, Look]
) -> Iterator[Finding]:
    """How much pictures are enlarged and cut by their buckets."""
    shown = [(item, size) for item in items if (size := looks[item.path].size) is not None]
    shown = [(item, size) for item, size in shown if (size[0] * size[1]) ** 0.5 > dataset.skip_image_resolution]
    if not shown:
        return
    sizes = np.array([size for _, size in shown], dtype=np.int64)
    rows = assign_many(sizes, dataset)
    usable = rows.usable
    growth = np.where(usable, (rows.resized / sizes).max(axis=1), 0)
    kept = np.where(usable, rows.bucket.prod(axis=1) / np.maximum(rows.resized.prod(axis=1), 1), 1)
    cut = 1 - kept if not (subset.config.random_crop or subset.config.face_crop_aug_range) else np.zeros(len(shown))

    def those(rows_of: np.ndarray, note: Callable[[int], str]) -> list[Sight]:
        return [Sight(shown[row][0].path, note(row)) for row in np.flatnonzero(rows_of).tolist()]

    def enlarged(row: int) -> str:
        return f"{sizes[row, 0]}x{sizes[row, 1]} to {rows.resized[row, 0]}x{rows.resized[row, 1]}"

    yield from found(kinds.NO_BUCKET, subset.place, those(~usable, lambda row: f"{sizes[row, 0]}x{sizes[row, 1]}"))
    yield from found(kinds.TINY, subset.place, those(growth > TINY_GROWTH, enlarged), limit=f"{TINY_GROWTH:g}")
    middle = (growth > MUCH_GROWTH) & (growth <= TINY_GROWTH)
    yield from found(kinds.ENLARGED, subset.place, those(middle, enlarged), limit=f"{MUCH_GROWTH:g}")
    sights = those(cut > MUCH_CUT, lambda row: (
        f"{sizes[row, 0]}x{sizes[row, 1]} for {rows.bucket[row, 0]}x{rows.bucket[row, 1]}: {cut[row]:.0%} is cut off"))
    kind = kinds.CROPPED if dataset.enable_bucket else kinds.CROPPED_SQUARE
    resolution = f"{dataset.resolution[0]}x{dataset.resolution[1]}"
    yield from found(kind, subset.place, sights, limit=MUCH_CUT, resolution=resolution)


def _faces(subset: SubsetSurvey, items: list[Item], looks: Mapping[Path, Look]) -> Iterator[Finding]:
    """sd-scripts' names `<stem>_<x>_<y>_<width>_<height>`: centre and size of the face in pixels."""
    outside, missing = [], []
    for item in items:
        parts = os.path.splitext(os.path.basename(item.key))[0].split("_")[-4:]
        size = looks[item.path].size
        if len(parts) < 4 or not all(part.isdecimal() for part in parts) or size is None:
            missing.append(Sight(item.path))
            continue
        x, y, width, height = map(int, parts)
        if not (x < size[0] and y < size[1] and 0 < width <= size[0] and 0 < height <= size[1]):
            outside.append(Sight(item.path, f"face {width}x{height} at ({x}, {y}) in {size[0]}x{size[1]}"))
    yield from found(kinds.FACE_OUTSIDE, subset.place, outside)
    yield from found(kinds.FACE_MISSING, subset.place, missing)
