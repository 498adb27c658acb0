"""Which images a command of the preparation is about, and what they are called in metadata."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from sd_train.data.folders import list_folder
from sd_train.errors import DataError
from sd_train.files import LONGEST_NAME, SHORTENED, tidy


def find_images(folder: Path, recursive: bool) -> list[Path]:
    """The images in `folder`, with `recursive` in its sub-folders too, sorted; links to folders above end the descent.

    Raises:
        DataError: if the folder cannot be listed, or holds none.
    """
    try:
        found = sorted(_images(folder, recursive, set()))
    except OSError as problem:
        raise DataError(f"{folder}: cannot be listed ({problem.strerror}); give a folder that can") from None
    if not found:
        way_out = "give another folder" if recursive else "give another folder, or --recursive for its sub-folders"
        raise DataError(f"{folder}: holds no images; {way_out}")
    return found


def _images(folder: Path, recursive: bool, above: set[tuple[int, int]]) -> Iterator[Path]:
    here = os.stat(folder)
    place = here.st_dev, here.st_ino
    if place in above:
        return
    listed = list_folder(folder)
    yield from (folder / name for name in listed.images)
    for name in listed.folders if recursive else ():
        yield from _images(folder / name, recursive, above | {place})


def metadata_key(image: Path, folder: Path, full_path: bool) -> str:
    """What `image` is called in metadata: its absolute path, or its path within `folder`, with its extension.

    sd-scripts writes names without extension where paths are not full, which its own training cannot read; ours are
    read by both.
    """
    if full_path:
        return os.path.join(_whole_path(image.parent.absolute()), image.name)
    return image.relative_to(folder).as_posix()


def from_here(key: str, folder: Path) -> bool:
    """Whether `key` of metadata is a relative path from the current folder, and none within `folder`.

    sd-scripts' --full_path is the folder as its command was given it, be it absolute or not.
    """
    return not os.path.isabs(key) and os.path.isfile(key) and not os.path.exists(folder / key)


@cache
def _whole_path(folder: Path) -> str:
    """`folder`, absolute, without `..`: the same however users write it. Links stay where they can."""
    path = os.path.abspath(folder)
    # Behind a link, `..` leads elsewhere than it reads.
    return path if ".." not in folder.parts or _is_same(path, folder) else os.path.realpath(folder)


def _is_same(one: str, other: Path) -> bool:
    return os.path.exists(one) and os.path.samefile(one, other)


def too_long(path: Path) -> bool:
    """Whether `path` ends in a name that file systems refuse."""
    return len(os.fsencode(path.name)) > LONGEST_NAME


def tidy_folders(folders: Iterable[Path], extension: str) -> None:
    """Remove what commands that were killed left unfinished in `folders`, of files that end in `extension`."""
    for folder in dict.fromkeys(folders):
        tidy(folder, lambda name: name.endswith(extension) or SHORTENED.fullmatch(name) is not None)
