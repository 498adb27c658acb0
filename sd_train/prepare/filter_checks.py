"""What the guides tell people to take out of a dataset: which images have it, as findings and by image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sd_train.doctor.copies import near_copies
from sd_train.doctor.finding import Finding, Kind, Place, Sight, found
from sd_train.doctor.looks import Look
from sd_train.prepare.filter_measure import LETTERS, SHARPNESS

CHECKS: dict[str, Kind] = {
    kind.name: kind for kind in (
        Kind("broken", "error", "Cannot be read", "The file is cut off, damaged or no image.",
             "get it again, or leave it out"),
        Kind("small", "warning", "Too small", "The shorter side is below {limit} pixels (--min_size).",
             "get a larger version, or leave it out"),
        Kind("bytes", "warning", "Suspiciously small file",
             "At {side}x{side} pixels and above, a file below {limit:,} bytes (--min_bytes) is usually an enlarged or "
             "heavily compressed picture, or a drawing of few colours.", "look at it; leave it out unless it is clean"),
        Kind("aspect", "warning", "Extreme shape", "One side is more than {limit:g} times the other (--max_aspect); "
             "most of it is cut off or lost in training.", "cut it into parts, or leave it out"),
        Kind("uniform", "warning", "Almost uniform", "There is hardly anything in the picture (--min_contrast).",
             "leave it out"),
        Kind("blurred", "warning", "Blurred", "The variance of the Laplacian, of the picture at 512 pixels, is below "
             "{limit:g} (--min_sharpness). Smooth drawings and shallow focus come out low too.", "look at it"),
        Kind("copy", "warning", "Same picture again", "The pixels are equal; the one that is kept is named.",
             "keep one of each group"),
        Kind("near_copy", "warning", "Nearly the same picture", "Another size, compression, crop or the mirror image; "
             "the largest one is kept.", "keep one of each group"),
        Kind("text", "note", "Text or a watermark, perhaps", "Spots like letters stand in a row of {limit} or more "
             "(--min_letters). It is a guess: fences and windows look the same.", "look at it"),
    )
}  # fmt: skip
"""By name, in the order in which they are reported within a severity."""

SMALL_FILE_SIDE = 768
"""From this size on `bytes` counts."""
_FLAT = 24
"""Levels that the colours of a uniform picture's 16x16 version may span."""


@dataclass(frozen=True)
class FilterLimits:
    """From where on something counts."""

    min_size: int
    min_bytes: int
    max_aspect: float
    min_contrast: float
    min_sharpness: float
    min_letters: int


@dataclass
class Filtered:
    """What was found."""

    findings: list[Finding] = field(default_factory=list)
    reasons: dict[Path, list[str]] = field(default_factory=dict)
    """Of each image that is left out: the names of the checks, and what was seen."""
    reported: dict[Path, list[str]] = field(default_factory=dict)
    """Of each image with something that is reported only."""


def run_checks(
    looks: Mapping[Path, Look], limits: FilterLimits, checks: Collection[str], report_only: Collection[str],
    captions: Mapping[Path, int], folder: Path,
) -> Filtered:
    """Run `checks`; copies are looked for among what is left after the others.

    Args:
        looks: at every image, in order.
        limits: from where on something counts.
        checks: names in `CHECKS`.
        report_only: those of them that leave nothing out.
        captions: how many each image has; one with more is kept before its copies.
        folder: in which all images are.
    """
    result = Filtered()
    values = {"small": limits.min_size, "bytes": limits.min_bytes, "aspect": limits.max_aspect,
              "blurred": limits.min_sharpness, "text": limits.min_letters}  # fmt: skip

    def note(name: str, sights: Sequence[Sight], left_out: Collection[Path]) -> None:
        told = result.reported if name in report_only else result.reasons
        for sight in sights:
            if sight.path in left_out:
                told.setdefault(sight.path, []).append(f"{name}: {sight.note}" if sight.note else name)
        result.findings.extend(found(CHECKS[name], Place(), sights, limit=values.get(name), side=SMALL_FILE_SIDE))

    for name in CHECKS:
        if name in checks and name not in ("copy", "near_copy"):
            sights = [Sight(path, text) for path, look in looks.items() if (text := _seen(name, path, look, limits))]
            note(name, sights, [sight.path for sight in sights])
    left = {path: look for path, look in looks.items() if not look.trouble and path not in result.reasons}
    # The best first: it is the one that is kept.
    order = sorted(left, key=lambda path: _rank(path, left[path], captions))
    for name, groups in (("copy", _exact), ("near_copy", _near)):
        if name in checks:
            sights, dropped = [], set[Path]()
            for number, (kept, others) in enumerate(groups([path for path in order if path not in result.reasons],
                                                           left), start=1):
                sights.append(Sight(kept, "is kept", number))
                name_of_kept = kept.relative_to(folder).as_posix()
                sights += [Sight(path, f"{text} of {name_of_kept}", number) for path, text in others]
                dropped |= {path for path, _ in others}
            note(name, sights, dropped)
    names = list(CHECKS)
    severities = ("error", "warning", "note")
    result.findings.sort(key=lambda each: (severities.index(each.kind.severity), names.index(each.kind.name)))
    return result


def _rank(path: Path, look: Look, captions: Mapping[Path, int]) -> tuple[int, int, int, str]:
    width, height = look.size or (0, 0)
    return -width * height, -captions[path], -path.stat().st_size, str(path)


def _exact(order: Sequence[Path], looks: Mapping[Path, Look]) -> Iterator[tuple[Path, list[tuple[Path, str]]]]:
    """(the one that is kept, the others) of each group of equal pictures."""
    by_content: dict[bytes, list[Path]] = defaultdict(list)
    for path in order:
        by_content[looks[path].digest].append(path)
    for first, *others in by_content.values():
        if others:
            yield first, [(path, "copy") for path in others]


def _near(order: Sequence[Path], looks: Mapping[Path, Look]) -> Iterator[tuple[Path, list[tuple[Path, str]]]]:
    """The same for near copies: each picture that is left out looks like the one that is kept, not only like a chain
    of others."""
    alike: dict[Path, dict[Path, bool]] = defaultdict(dict)
    for pair in near_copies({path: looks[path] for path in order}):
        alike[pair.first][pair.second] = alike[pair.second][pair.first] = pair.mirrored
    gone: set[Path] = set()
    for path in order:
        others = [(other, "mirror image" if turned else "version") for other, turned in alike[path].items()
                  if other not in gone] if path not in gone else []  # fmt: skip
        if others:
            gone |= {path, *(other for other, _ in others)}
            yield path, others


def _seen(name: str, path: Path, look: Look, limits: FilterLimits) -> str | None:
    """What check `name` sees in an image; None: nothing."""
    if look.trouble:
        return (look.message.removeprefix(f"{path}: ") or look.trouble) if name == "broken" else None
    width, height = look.size or (0, 0)
    match name:
        case "small" if min(width, height) < limits.min_size:
            return f"{width}x{height}"
        case "bytes" if width * height >= SMALL_FILE_SIDE**2 and path.stat().st_size < limits.min_bytes:
            return f"{path.stat().st_size:,} bytes for {width}x{height}"
        case "aspect" if max(width, height) > limits.max_aspect * min(width, height):
            return f"{width}x{height}"
        case "uniform" if _uniform(look, limits):
            return f"contrast {look.contrast:.1f}"
        case "blurred" if look.figures[SHARPNESS] < limits.min_sharpness and not _uniform(look, limits):
            return f"sharpness {look.figures[SHARPNESS]:.1f}"
        case "text" if look.figures[LETTERS] >= limits.min_letters:
            return f"{look.figures[LETTERS]:.0f} in a row"
    return None


def _uniform(look: Look, limits: FilterLimits) -> bool:
    if look.contrast >= limits.min_contrast or look.small is None:
        return False
    return int(np.ptp(look.small.reshape(-1, 3), axis=0).max()) <= _FLAT
