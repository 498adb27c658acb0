"""The text files that lie beside images: which there are, and what is in them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sd_train.config.textfile import printable, read_text
from sd_train.data.captions import caption_name
from sd_train.data.folders import list_folder
from sd_train.errors import DataError

_SHOWN = 5
_Item = TypeVar("_Item")


class Sidecars:
    """Text files beside images, found by listing each folder once."""

    def __init__(self) -> None:
        self._names: dict[Path, set[str]] = {}

    def find(self, image: Path, extension: str) -> Path | None:
        """The file of `image` with `extension`, by the rules of training; None if there is none."""
        folder = image.parent
        if (names := self._names.get(folder)) is None:
            names = self._names[folder] = {os.path.normcase(name) for name in list_folder(folder).others}
        name = caption_name(image.name, extension, names)
        return None if name is None else folder / name


@dataclass
class Passed:
    """Files that a command passed over, and why."""

    missing: list[str] = field(default_factory=list)
    """Images without a text file: said, and no failure."""
    broken: list[str] = field(default_factory=list)
    """Messages about what could not be read: said, and the exit code is 3."""

    def read(self, path: Path) -> str | None:
        """The text of `path` with plain newlines; None, noted, if it cannot be read."""
        try:
            return read_text(path, DataError)
        except DataError as problem:
            self.broken.append(str(problem))
            return None

    def lines(self, missing: str) -> list[str]:
        """What to print; `missing` is what is said of images without a file, after their number."""
        found = []
        if self.missing:
            found.append(f"{numbered(len(self.missing), 'image')} {missing}: {shown(self.missing)}")
        found += [f"skipped: {printable(message)}" for message in self.broken]
        return found


def shown(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + more


def numbered(count: int, noun: str) -> str:
    """`count` with its `noun`, in the plural where it belongs."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def with_progress(items: Sequence[_Item], what: str) -> Iterable[_Item]:
    """`items`, with a bar that says `what` is done where someone looks on."""
    if not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="file")
