"""What one image file holds: size, format, transparency, colours, and what it looks like in a few numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from sd_train.data.content import content_digest
from sd_train.data.headers import open_image, orientation, read_size
from sd_train.data.images import Decoded, decode
from sd_train.errors import DataError

Trouble = Literal["", "missing_file", "empty_file", "not_an_image", "broken_header", "truncated"]

SMALL = 16
"""Side of the small picture that near copies are compared by."""
_GREY_DIFFERENCE = 10
_SIGNATURES = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM film"),
    (b"version https://git-lfs", "a Git LFS pointer; run git lfs pull"),
    (b"8BPS", "a Photoshop file"),
    (b"\x89HDF", "an HDF5 file"),
)


@dataclass(frozen=True)
class Look:
    """One image file, seen once. Without pixels (`trouble`) the fields from `format` on have no meaning."""

    size: tuple[int, int] | None
    """(width, height), upright; None where the header cannot be read."""
    trouble: Trouble
    message: str = ""
    format: str = ""
    mode: str = ""
    """Pillow's."""
    frames: int = 1
    orientation: int = 1
    sixteen_bit: bool = False
    alpha: tuple[float, float] | None = None
    """(mean, smallest) of the alpha channel in [0, 1]; None without one."""
    grey: bool = False
    contrast: float = 0.0
    """Standard deviation of the brightness, of 255 levels."""
    digest: bytes = b""
    """Of the decoded content."""
    small: NDArray[np.uint8] | None = None
    """[16, 16, 3]"""
    hashes: NDArray[np.bool_] | None = None
    """[2, 64]: perceptual hash of the picture and of its mirror image."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else was measured, by name."""


Measure = Callable[[Decoded], Mapping[str, float]]
"""Takes more figures of a picture while it is in memory."""


def look_at(
    paths: Sequence[Path], progress: Callable[[], object], measure: Measure | None = None
) -> dict[Path, Look]:
    """Decode every file of `paths`; `progress` is called after each."""

    def one(path: Path) -> Look:
        found = _look(path, measure)
        progress()
        return found

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def _look(path: Path, measure: Measure | None) -> Look:
    try:
        size = read_size(path)
    except DataError as problem:
        trouble, what = _why_unreadable(path)
        return Look(None, trouble, what if what or trouble != "broken_header" else _reason(problem))
    try:
        decoded = decode(path)
        with open_image(path) as image:
            facts = _Facts(
                image.format or "", image.mode, int(getattr(image, "n_frames", 1)), orientation(image),
                image.mode.startswith("I") or ";16" in str(getattr(image, "tile", "")),
            )
    except DataError as problem:
        return Look(size, "truncated", _reason(problem))
    look = _describe(size, facts, decoded)
    return look if measure is None else replace(look, figures=measure(decoded))


def _reason(problem: DataError) -> str:
    """Without the way out, which the finding has."""
    return str(problem).rpartition("; ")[0]


@dataclass(frozen=True)
class _Facts:
    format: str
    mode: str
    frames: int
    orientation: int
    sixteen_bit: bool


def _describe(size: tuple[int, int], facts: _Facts, decoded: Decoded) -> Look:
    pixels, alpha = decoded.pixels, decoded.alpha
    bright = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    step = max(1, max(pixels.shape[:2]) // 512)
    red, green, blue = (np.ascontiguousarray(pixels[::step, ::step, channel]) for channel in range(3))
    spread = cv2.max(cv2.absdiff(red, green), cv2.absdiff(green, blue))
    return Look(
        size=size,
        trouble="",
        format=facts.format,
        mode=facts.mode,
        frames=facts.frames,
        orientation=facts.orientation,
        sixteen_bit=facts.sixteen_bit,
        alpha=None if alpha is None else (float(alpha.mean()) / 255, float(alpha.min()) / 255),
        grey=bool(np.quantile(spread, 0.999) <= _GREY_DIFFERENCE),
        contrast=float(bright.std()),
        digest=content_digest(decoded),
        small=np.asarray(cv2.resize(pixels, (SMALL, SMALL), interpolation=cv2.INTER_AREA), dtype=np.uint8),
        hashes=perceptual_hashes(bright),
    )


def perceptual_hashes(bright: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """[2, 64]: the hash of a grey picture [height, width] and that of its mirror image.

    Signs, against their median, of the 8x8 lowest frequencies of the discrete cosine transform of the picture scaled
    to 32x32 (Zauner 2010, "Implementation and Benchmarking of Perceptual Image Hash Functions", section 3.2.1), the
    mean left out. Mirroring changes the sign of every other column.
    """
    table = np.asarray(cv2.resize(bright, (32, 32), interpolation=cv2.INTER_AREA), dtype=np.float32)
    waves = np.asarray(cv2.dct(table), dtype=np.float32)[:8, :8]
    mirrored = waves * np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    rows = np.stack([waves.ravel(), mirrored.ravel()])
    rows[:, 0] = 0
    return np.asarray(rows > np.median(rows[:, 1:], axis=1, keepdims=True))


def _why_unreadable(path: Path) -> tuple[Trouble, str]:
    """What a file without a readable header is, and in words where that can be told."""
    try:
        if path.parent.is_file():
            return "broken_header", ""
        if not os.path.exists(path):
            return "missing_file", "a link to nothing" if path.is_symlink() else ""
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as problem:
        return "broken_header", problem.strerror or ""
    if not start:
        return "empty_file", ""
    what = _content(start)
    return ("not_an_image", f"it is {what}") if what else ("broken_header", "")


def _content(start: bytes) -> str:
    if start[4:8] == b"ftyp":
        brand = start[8:12].decode("ascii", "replace")
        return "a HEIC photograph" if brand.startswith(("hei", "hev", "mif", "msf")) else f"a film ({brand.strip()})"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page; the download failed"
    if text.startswith((b"<?xml", b"<svg")):
        return "an SVG or XML file"
    for signature, name in _SIGNATURES:
        if start.startswith(signature):
            return name
    return "text" if _is_text(start) else ""


def _is_text(start: bytes) -> bool:
    """Whether it reads as UTF-8 without control characters; a character may be cut off at the end."""
    for cut in range(4):
        try:
            words = start[: len(start) - cut].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return all(character.isprintable() or character in "\t\r\n" for character in words)
    return False


def readable(looks: Iterable[Look]) -> list[Look]:
    """Those whose pixels could be read."""
    return [look for look in looks if not look.trouble]
