"""The files of a folder, read many at a time: names, headers, captions, sizes and times.

A million images must not become a million Python objects that stay; so everything goes into columns, chunk by chunk.
"""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.config.textfile import read_text
from sd_train.data.columns import TextColumn
from sd_train.data.folders import IMAGE_EXTENSIONS
from sd_train.data.headers import HEAD, OPEN_FLAGS, size_by_pillow, size_in_header
from sd_train.errors import DataError

CAPTION_NONE, CAPTION_READ, CAPTION_BAD, CAPTION_EMPTY = range(4)

FULL_STEM, FACE_STEM = 1, 2
"""Kinds of caption file names: `<stem><extension>`, or the stem without the four numbers `_x_y_w_h` of a face crop."""

NO_STAT = (-1, -1)

_CHUNK = 4096
_IMAGES = tuple(os.fsencode(extension) for extension in IMAGE_EXTENSIONS)
_ONE_CASE = os.path.normcase("A") == "A"
"""Whether names that differ in case are different names."""
_UTF8_NAMES = sys.getfilesystemencoding() == "utf-8"
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Folder:
    """Where names start: `path`, open as `descriptor` where the system can start from there; `Path()` for paths."""

    path: Path
    descriptor: int | None = None

    def names(self, names: Sequence[bytes]) -> Sequence[bytes]:
        """What the system takes, together with `descriptor`, for `names`: UTF-8, lone surrogates encoded; b"" stays."""
        names = _system(names)
        if self.descriptor is not None or self.path == Path():
            return names
        start = os.path.join(os.fsencode(self.path), b"")
        return [start + name if name else name for name in names]


@contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """`path`, open while the block runs, which shortens the way to every file.

    Raises:
        OSError: if it is no folder or may not be read.
    """
    if os.open not in os.supports_dir_fd or os.stat not in os.supports_dir_fd:
        yield Folder(path)
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Folder(path, descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Listing:
    """N images of a folder."""

    names: TextColumn
    """Sorted as plain strings."""
    kinds: NDArray[np.uint8]
    """[N]: kind of the caption file's name, 0 where there is no such file."""
    others: NDArray[np.uint8]
    """[N]: bit i is set for an image without caption file that has one of the i-th other extension."""


def list_images(folder: Folder, extension: str, others: Sequence[str]) -> Listing:
    """The images in `folder`, which of them have caption files of `extension`, and which of one of `others`.

    Raises:
        OSError: if the folder cannot be listed.
    """
    images, beside = list[bytes](), array("q")
    with os.scandir(os.fsencode(folder.path)) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            if name.lower().endswith(_IMAGES):
                if _is_file(entry):
                    images.append(name)
            elif _is_file(entry):
                # A number each, where a set of names would need more than the whole index.
                beside.append(hash(name if _ONE_CASE else os.path.normcase(name)))
    names = _sorted(images)
    del images
    found = np.sort(np.frombuffer(beside, np.int64))
    kinds = _caption_kinds(names, extension, found)
    bits = np.zeros(len(names), np.uint8)
    without = np.flatnonzero(kinds == 0)
    if len(found) and len(without):
        bare = names.take(without)
        for bit, other in enumerate(others):
            if other != extension:
                bits[without] |= (_caption_kinds(bare, other, found) > 0).astype(np.uint8) << bit
    return Listing(names, kinds, bits)


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    """As in `folders.list_folder`: a link to nothing counts, so that reading it is an error."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def _system(names: Sequence[bytes]) -> Sequence[bytes]:
    """`names` of a column (UTF-8, lone surrogates encoded) as the system has them."""
    if _UTF8_NAMES and _is_utf8(names):
        return names
    return [os.fsencode(name.decode("utf-8", "surrogatepass")) for name in names]


def _is_utf8(names: Sequence[bytes]) -> bool:
    try:
        b"\n".join(names).decode()
    except UnicodeDecodeError:
        return False
    return True


def _sorted(names: list[bytes]) -> TextColumn:
    """`names` as the system gave them, sorted as strings."""
    if _UTF8_NAMES and all(_is_utf8(names[row : row + _CHUNK]) for row in range(0, len(names), _CHUNK)):
        names.sort()  # UTF-8 sorts as its characters do.
        return TextColumn.of_encoded(names[row : row + _CHUNK] for row in range(0, len(names), _CHUNK))
    return TextColumn.of(sorted(map(os.fsdecode, names)))


def _caption_names(images: Sequence[bytes], kind: int, extension: bytes) -> list[bytes]:
    """The caption file name of this kind of each of `images`; empty where there is none (`captions.caption_name`)."""
    if kind == FULL_STEM:
        return [name[: name.rfind(b".")] + extension for name in images]
    stems = (name[: name.rfind(b".")].rsplit(b"_", 4) for name in images)
    return [stem[0] + extension if len(stem) == 5 else b"" for stem in stems]


def _caption_kinds(images: TextColumn, extension: str, found: NDArray[np.int64]) -> NDArray[np.uint8]:
    """[N]: which kind of caption file name of each image is among the hashes `found`, 0 for none."""
    kinds = np.zeros(len(images), np.uint8)
    if not len(found):
        return kinds
    ending = os.fsencode(extension)
    for kind in (FULL_STEM, FACE_STEM):
        open_rows = np.flatnonzero(kinds == 0)
        candidates = (
            hash(name if _ONE_CASE else os.path.normcase(name))
            for part in images.take(open_rows).encoded(_CHUNK)
            for name in _caption_names(_system(part), kind, ending)
        )
        hashes = np.fromiter(candidates, np.int64, len(open_rows))
        places = np.minimum(np.searchsorted(found, hashes), len(found) - 1)
        kinds[open_rows[found[places] == hashes]] = kind
    return kinds


@dataclass(frozen=True)
class Images:
    """What the headers of N images say."""

    sizes: NDArray[np.int32]
    """[N, 2]: (width, height) upright; (0, 0) where the header cannot be read."""
    stats: NDArray[np.int64]
    """[N, 2]: file size, time of the last change in nanoseconds; -1 where there is no such file."""
    problems: dict[int, str]
    """Row -> message that names the file."""


def read_images(folder: Folder, images: TextColumn) -> Images:
    """The headers of `images` in `folder`."""
    sizes, stats = np.zeros(2 * len(images), np.int32), np.zeros(2 * len(images), np.int64)
    problems: dict[int, str] = {}
    row = 0
    for part in images.encoded(_CHUNK):
        found, times = list[int](), list[int]()
        for name in folder.names(part):
            size: tuple[int, int] | None = None
            try:
                file = os.open(name, OPEN_FLAGS, dir_fd=folder.descriptor)
                try:
                    status = os.fstat(file)
                    times += (status.st_size, status.st_mtime_ns)
                    size = size_in_header(os.read(file, HEAD), file)
                finally:
                    os.close(file)
            except (OSError, ValueError):
                times[len(found) :] = NO_STAT
            if size is None:
                number = len(found) // 2
                path = folder.path / part[number].decode("utf-8", "surrogatepass")
                size = _slowly(path, row + number, problems)
            found += size
        both = slice(2 * row, 2 * (row + len(part)))
        sizes[both], stats[both] = found, times
        row += len(part)
    return Images(sizes.reshape(-1, 2), stats.reshape(-1, 2), problems)


def _slowly(path: Path, row: int, problems: dict[int, str]) -> tuple[int, int]:
    """Size of an image that only Pillow can read; (0, 0) with a message in `problems` where it cannot."""
    try:
        # A pipe would be waited for.
        if not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():
            problems[row] = f"{path}: is no regular file; give an image file"
            return 0, 0
    except (OSError, ValueError):
        pass  # Pillow's reason is the one to tell.
    try:
        return size_by_pillow(path)
    except DataError as problem:
        problems[row] = str(problem)
        return 0, 0


@dataclass(frozen=True)
class Captions:
    """The caption files of N images."""

    texts: TextColumn
    states: NDArray[np.uint8]
    stats: NDArray[np.int64]
    """[N, 2] as in `Images`, of the caption file."""
    problems: dict[int, str]


def read_captions(
    folder: Folder, images: TextColumn, kinds: NDArray[np.uint8], extension: str, with_stats: bool
) -> Captions:
    """The caption file of each of `images`, whose name is of the kind that `kinds` says."""
    states, stats = np.zeros(len(images), np.uint8), np.full(2 * len(images), -1)
    problems: dict[int, str] = {}

    def texts() -> Iterator[list[bytes]]:
        row = 0
        for part in _names_of_kinds(folder, images, kinds, extension):
            contents, found, times = list[bytes](), bytearray(len(part)), list[int]()
            for number, name in enumerate(part):
                if not name:
                    contents.append(b"")
                    times += NO_STAT
                    continue
                content, state, status = b"", CAPTION_BAD, None
                try:
                    file = os.open(name, OPEN_FLAGS, dir_fd=folder.descriptor)
                    try:
                        content = os.read(file, HEAD)
                        if len(content) == HEAD:
                            content = _whole(content, file)
                        if with_stats:
                            status = os.fstat(file)
                    finally:
                        os.close(file)
                    state = CAPTION_READ
                    if not content or not content.isascii() or b"\r" in content or b"\0" in content:
                        content, state = _plain(content)
                except OSError:
                    pass  # `_caption_problem` finds the reason.
                if state != CAPTION_READ:
                    content = b""
                    problems[row + number] = _caption_problem(folder.path / os.fsdecode(os.path.basename(name)), state)
                contents.append(content)
                found[number] = state
                if with_stats:
                    times += NO_STAT if status is None else (status.st_size, status.st_mtime_ns)
            states[row : row + len(part)] = np.frombuffer(found, np.uint8)
            if with_stats:
                stats[2 * row : 2 * (row + len(part))] = times
            row += len(part)
            yield contents

    return Captions(TextColumn.of_encoded(texts()), states, stats.reshape(-1, 2), problems)


def _names_of_kinds(
    folder: Folder, images: TextColumn, kinds: NDArray[np.uint8], extension: str
) -> Iterator[Sequence[bytes]]:
    """The caption file names of `images` as the system takes them, in parts; b"" where there is none."""
    ending, row = extension.encode("utf-8", "surrogatepass"), 0
    for part in images.encoded(_CHUNK):
        chosen = kinds[row : row + len(part)]
        row += len(part)
        names = _caption_names(part, FULL_STEM, ending)
        if not (chosen == FULL_STEM).all():
            both = names, _caption_names(part, FACE_STEM, ending)
            names = [both[kind - 1][number] if kind else b"" for number, kind in enumerate(chosen.tolist())]
        yield folder.names(names)


def _whole(content: bytes, descriptor: int) -> bytes:
    """`content` and the rest of the file."""
    parts = [content]
    while parts[-1]:
        parts.append(os.read(descriptor, 1 << 20))
    return b"".join(parts)


def _plain(content: bytes) -> tuple[bytes, int]:
    """A caption file's text without byte order mark, with plain newlines, and its state."""
    if b"\0" in content:
        return b"", CAPTION_BAD
    if not content.isascii():
        content = content.removeprefix(_MARK)
        if not _is_utf8((content,)):
            return b"", CAPTION_BAD
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content, CAPTION_READ if content else CAPTION_EMPTY


def _caption_problem(path: Path, state: int) -> str:
    if state == CAPTION_EMPTY:
        return f"{path}: the caption file is empty; write the caption, or one blank line for no caption"
    try:
        text = read_text(path, DataError)
    except DataError as problem:
        return str(problem)
    if "\0" in text:
        return f"{path}: holds a null character, as text in UTF-16 does; save the file as UTF-8"
    return f"{path}: could not be read, but can be now; start again"


def _stats(folder: Folder, names: Iterable[Sequence[bytes]], count: int) -> NDArray[np.int64]:
    """[N, 2] as in `Images`, of `count` files; -1 for an empty name and where there is no file."""
    stats, row = np.empty(2 * count, np.int64), 0
    for part in names:
        times: list[int] = []
        for name in part:
            try:
                status = os.stat(name, dir_fd=folder.descriptor) if name else None
            except (OSError, ValueError):
                status = None
            times += NO_STAT if status is None else (status.st_size, status.st_mtime_ns)
        stats[2 * row : 2 * (row + len(part))] = times
        row += len(part)
    return stats.reshape(-1, 2)


def image_stats(folder: Folder, images: TextColumn) -> NDArray[np.int64]:
    """[N, 2]: what `read_images` gives as `stats`, without reading."""
    return _stats(folder, (folder.names(part) for part in images.encoded(_CHUNK)), len(images))


def caption_stats(folder: Folder, images: TextColumn, kinds: NDArray[np.uint8], extension: str) -> NDArray[np.int64]:
    """[N, 2]: what `read_captions` gives as `stats`, without reading."""
    return _stats(folder, _names_of_kinds(folder, images, kinds, extension), len(images))


def hashes(names: TextColumn) -> NDArray[np.int64]:
    """[N]: a 64-bit number for each name, the same within this process."""
    return np.fromiter((hash(name) for part in names.encoded(_CHUNK) for name in part), np.int64, len(names))
