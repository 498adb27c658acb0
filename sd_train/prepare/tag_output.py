"""Where tags go: text files beside the images, or one metadata file in JSON or JSON Lines."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sd_train.config.textfile import read_text
from sd_train.errors import DataError
from sd_train.files import tidy, write_text, write_whole
from sd_train.prepare.describing import Troubles, find_work, tell_work, text_file, write_sidecar
from sd_train.prepare.entries import match_entries
from sd_train.prepare.listing import metadata_key, tidy_folders
from sd_train.prepare.metadata import Metadata, json_text, read_bytes, read_metadata, write_metadata

_SAVE_SECONDS = 30.0


class TagOutput(Protocol):
    """Where the tags of images are kept."""

    def missing(self, again: bool) -> list[Path]:
        """The images that have no tags there; with `again` all of them."""

    def existing(self, image: Path) -> str:
        """The tags that `image` has there.

        Raises:
            DataError: if they cannot be read.
        """

    def put(self, image: Path, text: str, size: tuple[int, int]) -> bool:
        """Keep `text`, the tags of `image` with `size`; False if there is no place for them.

        Raises:
            DiskError: if the disk refuses.
        """

    def close(self) -> None:
        """Write what has been put and is not yet there.

        Raises:
            DiskError: if the disk refuses.
        """


class TextFiles:
    """A text file beside each image."""

    def __init__(self, images: Sequence[Path], extension: str, troubles: Troubles) -> None:
        self._images, self._extension, self._troubles = images, extension, troubles

    def missing(self, again: bool) -> list[Path]:
        work = find_work(self._images, self._extension, again)
        tell_work(work, self._extension)
        tidy_folders((image.parent for image in self._images), self._extension)
        return [image for image, _ in work.missing]

    def existing(self, image: Path) -> str:
        target = text_file(image, self._extension)
        try:
            return read_text(target, DataError) if target.is_file() else ""
        except OSError:
            return ""  # Its name is too long, as `put` will say.

    def put(self, image: Path, text: str, size: tuple[int, int]) -> bool:
        return write_sidecar(image, text_file(image, self._extension), text, self._troubles)

    def close(self) -> None:
        """Each file is whole already."""


class TagFile:
    """One metadata file, `.json` or `.jsonl`: tags and size of images, by absolute paths where they have no entry yet;
    other entries are kept."""

    def __init__(self, path: Path, images: Sequence[Path], folder: Path) -> None:
        """`images` lie in `folder`.

        Raises:
            DataError: if `path` is there and no metadata.
        """
        self._path, self._images = path, images
        self._lines = path.suffix.lower() == ".jsonl"
        self._metadata: Metadata = {}
        tidy(path.parent, lambda name: name == path.name)
        if path.is_file():
            self._metadata = read_metadata(path)
        self._keys = match_entries(images, folder, self._metadata).keys
        self._changed = self._kept_before = False
        self._saved = time.monotonic()

    def missing(self, again: bool) -> list[Path]:
        return [image for image in self._images if again or "tags" not in self._entry(image)]

    def existing(self, image: Path) -> str:
        return str(self._entry(image).get("tags") or "")

    def put(self, image: Path, text: str, size: tuple[int, int]) -> bool:
        entry = {**self._entry(image), "tags": text, "image_size": list(size)}
        self._metadata[self._key(image)] = entry
        self._changed = True
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self.close()
        return True

    def close(self) -> None:
        if not self._changed:
            return
        # In the order of their names: the same bytes, wherever an interrupted command went on.
        ordered = dict(sorted(self._metadata.items()))
        if self._lines:
            text = "".join(_line({"image_path": key, **entry}) for key, entry in ordered.items())
            before = read_bytes(self._path) if self._path.is_file() else None
            if before != text.encode():
                if before is not None and not self._kept_before:
                    write_whole(self._path.with_name(self._path.name + ".bak"), _writer(before), "--output_path")
                write_text(self._path, text, "--output_path")
        elif self._kept_before:
            write_text(self._path, json_text(ordered), "--output_path")
        else:
            write_metadata(self._path, ordered)
        self._changed, self._kept_before = False, True
        self._saved = time.monotonic()

    def _entry(self, image: Path) -> dict[str, Any]:
        return self._metadata.get(self._key(image), {})

    def _key(self, image: Path) -> str:
        return self._keys.get(image) or metadata_key(image, image.parent, full_path=True)


def _writer(content: bytes) -> Any:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _line(entry: Mapping[str, object]) -> str:
    """A line of JSON; escaped where a file's name is no UTF-8, as text cannot hold it."""
    line = json.dumps(entry, ensure_ascii=False) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(entry) + "\n"
    return line
