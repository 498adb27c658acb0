"""Which files of a folder are images, and what to say when there are none."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from sd_train.errors import Problem


def _plugin(name: str) -> bool:
    """Whether the Pillow plugin `name` is installed; it is imported, so that Pillow knows its format."""
    if find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except ImportError:
        # Built for another Pillow or system: its files are then named as unreadable.
        return False
    return True


def image_extensions() -> frozenset[str]:
    """Extensions of image files, lower case: what Pillow always reads, and .avif and .jxl where it can."""
    found = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    # Pillow brings AVIF since 11.3.
    if find_spec("PIL._avif") is not None or _plugin("pillow_avif"):
        found.add(".avif")
    if _plugin("pillow_jxl"):
        found.add(".jxl")
    return frozenset(found)


IMAGE_EXTENSIONS = image_extensions()
_OTHER_IMAGES = frozenset(
    {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".tga", ".tif", ".tiff"}
)
_PLUGINS = {".avif": "pillow-avif-plugin", ".jxl": "pillow-jxl-plugin"}
_LEGACY_FOLDER = re.compile(r"\s*\d+\s*(_.*)?")


@dataclass(frozen=True)
class Folder:
    """The names in a folder, without its sub-folders' contents."""

    images: list[str]
    """Sorted."""
    others: list[str]
    """Files that are no images, sorted."""
    folders: list[str]
    """Sub-folders, sorted."""


def list_folder(path: Path) -> Folder:
    """List `path`, not recursively; names that begin with a dot are left out, as sd-scripts does.

    Pipes, sockets and devices are left out too: reading one may wait for ever.

    Raises:
        OSError: if the folder cannot be listed.
    """
    images, others, folders = [], [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                folders.append(entry.name)
            elif not _is_file(entry):
                continue
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                images.append(entry.name)
            else:
                others.append(entry.name)
    return Folder(sorted(images), sorted(others), sorted(folders))


def holds_image(path: Path) -> bool:
    """Whether at least one file directly in `path` is an image by its extension."""
    with os.scandir(path) as entries:
        return any(
            os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS
            and not entry.name.startswith(".")
            and _is_file(entry)
            for entry in entries
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a regular file, or a link to one; a link to nothing counts, so that reading it is an error."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        # Links that lead to one another lead to nothing.
        return True


def no_images(where: str, path: Path) -> Problem:
    """The problem of a folder without images: what it holds instead, and what to do."""
    listed = list_folder(path)
    legacy = [name for name in listed.folders if _LEGACY_FOLDER.fullmatch(name)]
    inner = legacy or [name for name in listed.folders if _holds_image_if_readable(path / name)]
    known = ", ".join(sorted(IMAGE_EXTENSIONS))
    value = repr(str(path))
    if inner:
        example = path / inner[0]
        found = f"{_number(len(inner), 'sub-folder')} such as {inner[0]!r}"
        way_out = f"give the folder one level down: image_dir = '{example}', with a [[datasets.subsets]] for each"
        if legacy:
            number, _, words = legacy[0].partition("_")
            way_out += f", num_repeats = {int(number)}" + (f" and class_tokens = {words!r}" if words else "")
        return Problem(where, value, f"no image lies directly in this folder, only {found}", way_out)
    extensions = Counter(os.path.splitext(name)[1].lower() for name in listed.others)
    unreadable = {extension: count for extension, count in extensions.items() if extension in _OTHER_IMAGES}
    if unreadable:
        found = ", ".join(f"{_number(count, 'file')} {extension}" for extension, count in sorted(unreadable.items()))
        plugins = [f"pip install {_PLUGINS[extension]}" for extension in sorted(unreadable) if extension in _PLUGINS]
        return Problem(where, value, f"no image that can be read lies in this folder, only {found}",
                       " or ".join([*plugins, f"convert them to one of {known}"]))
    found = "it is empty" if not listed.others and not listed.folders else (
        f"it holds {_number(len(listed.others), 'other file')} and {_number(len(listed.folders), 'folder')}")
    return Problem(where, value, f"no image lies in this folder ({found})", f"put images ({known}) there or correct it")


def _holds_image_if_readable(path: Path) -> bool:
    try:
        return holds_image(path)
    except OSError:
        return False


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
