"""Edits of captions that can be taken back: what was there and what is, noted before anything changes.

Each edit is a file `.caption_edits/NUMBER.json` in the folder that it was made in: `.pending.json` until all files are
changed, `.undone.json` after it was taken back. A process that was killed leaves one that can be finished or undone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd_train.config.textfile import printable, read_text
from sd_train.errors import DataError, DiskError
from sd_train.files import temporary_name, tidy, write_whole
from sd_train.prepare.sidecars import with_progress

FOLDER = ".caption_edits"
State = Literal["pending", "done", "undone"]
_NAMES: dict[State, re.Pattern[str]] = {
    "pending": re.compile(r"(\d+)\.pending\.json"),
    "done": re.compile(r"(\d+)\.json"),
    "undone": re.compile(r"(\d+)\.undone\.json"),
}


@dataclass(frozen=True)
class FileEdit:
    """A file's content before and after."""

    path: Path
    before: str
    after: str


@dataclass(frozen=True)
class Entry:
    """One edit in the journal."""

    path: Path
    number: int
    state: State


class Journal:
    """The edits of one target, in a folder shared with those of others."""

    def __init__(self, base: Path, target: str) -> None:
        """`base`: the folder that files are named from; `target`: what the edits were asked of."""
        self._base, self._target = base, target

    def _entries(self) -> list[Entry]:
        folder = self._base / FOLDER
        if not folder.is_dir():
            return []
        found = [
            Entry(path, int(match[1]), state)
            for path in folder.iterdir()
            for state, pattern in _NAMES.items()
            if (match := pattern.fullmatch(path.name))
        ]
        return sorted(found, key=lambda entry: entry.number)

    def last(self) -> Entry | None:
        """The last edit of the target that stands, whole or cut off."""
        standing = [entry for entry in self._entries() if entry.state != "undone"]
        return next((entry for entry in reversed(standing) if self._read(entry)["target"] == self._target), None)

    def find(self, number: int) -> Entry | None:
        """The edit with this number, as it is now."""
        return next((entry for entry in self._entries() if entry.number == number), None)

    def _read(self, entry: Entry) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(read_text(entry.path, DataError))
        except (ValueError, RecursionError) as problem:
            raise DataError(f"{entry.path}: is damaged ({problem}); move it away, that edit cannot be undone") from None
        files = content.get("files") if isinstance(content, dict) and "target" in content else None
        if not isinstance(files, list) or not all(map(_is_edit, files)):
            raise DataError(f"{entry.path}: is no edit of captions; move it away")
        return content

    def begin(self, edits: Sequence[FileEdit], command: Sequence[str]) -> Entry:
        """Note `edits`, which are about to be made.

        Raises:
            DiskError: if they cannot be noted.
        """
        number = 1 + max((entry.number for entry in self._entries()), default=0)
        path = self._base / FOLDER / f"{number:04}.pending.json"
        files = [[self._name(edit.path), edit.before, edit.after] for edit in edits]
        content = {"target": self._target, "command": list(command), "files": files}
        # ASCII, as JSON alone can write file names that are no UTF-8.
        text = json.dumps(content, indent=1) + "\n"
        write_whole(path, lambda temporary: _put(temporary, text), "folder, as edits are noted in that of the captions")
        return Entry(path, number, "pending")

    def _name(self, path: Path) -> str:
        try:
            return path.relative_to(self._base.resolve()).as_posix()
        except ValueError:
            return str(path)

    def carry_out(self, entry: Entry, undo: bool) -> tuple[int, list[str]]:
        """Make or take back an edit: how many files were changed, and what is the matter with others.

        A whole one of which nothing can be taken back stands as it did.

        Raises:
            DataError: if the journal is damaged.
            DiskError: if the disk refuses; the edit can then be carried out again.
        """
        changed, done, foreign, places = 0, 0, list[str](), dict[Path, set[str]]()
        for name, before, after in with_progress(self._read(entry)["files"], "writing"):
            path = self._base.resolve() / name
            old, new = (after, before) if undo else (before, after)
            places.setdefault(path.parent, set()).add(path.name)
            try:
                now = path.read_bytes()
            except OSError:
                now = None
            done += now == new.encode()
            if now == old.encode():
                replace_file(path, new.encode())
                changed += 1
            elif now != new.encode():
                matter = "is gone" if now is None else "was changed meanwhile"
                foreign.append(f"{printable(str(path))}: {matter}")
        # A process that was killed has left what it was writing.
        for folder, names in places.items():
            tidy(folder, names.__contains__)
        if entry.state == "done" and foreign and not (changed or done):
            return 0, foreign
        ending = ".undone.json" if undo else ".json"
        os.replace(entry.path, entry.path.with_name(f"{entry.number:04}{ending}"))
        return changed, foreign


def _is_edit(item: object) -> bool:
    """Whether `item` is [file, text before, text after], texts that files can hold."""
    if not isinstance(item, list) or len(item) != 3 or not all(isinstance(part, str) for part in item):
        return False
    try:
        "".join(item[1:]).encode()
    except UnicodeEncodeError:
        return False
    return True


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of `path` in one step, with its permissions.

    Raises:
        DiskError: if the disk refuses.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as problem:
        way_out = "make room or check permissions, then --finish or --undo"
        raise DiskError(f"{path}: cannot be written ({problem}); {way_out}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
