"""Metadata files: .json as sd-scripts' fine-tuning reads it, .jsonl as sd-scripts or as diffusers' `datasets`.

A .json file is one object, `{image: {"caption": ..., "tags": ..., "image_size": [width, height]}}`; a .jsonl file has
one object a line, with the image in `image_path` (sd-scripts) or `file_name` (datasets). Other keys are ignored.
Entries are read one at a time, so that a million of them take the file's text and two columns.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sd_train.config.textfile import read_text
from sd_train.data.columns import TextColumn
from sd_train.data.folders import list_folder
from sd_train.data.npz import SUFFIX, LatentsFolders
from sd_train.data.settings import SubsetConfig
from sd_train.errors import DataError, Problem, Problems

_SHOWN = 5
_SPACE = re.compile(r"[ \t\n\r]*")
_IMAGE_KEYS = ("image_path", "file_name")


@dataclass(frozen=True)
class Entries:
    """The N entries of a metadata file, as they stand."""

    keys: TextColumn
    captions: TextColumn
    described: NDArray[np.bool_]
    """[N]: whether the entry holds a caption or tags, empty or not."""
    sizes: NDArray[np.int32]
    """[N, 2]: `image_size`, (0, 0) where it is not given."""


@dataclass(frozen=True)
class Resolved:
    """The images that N keys stand for, sorted."""

    keys: TextColumn
    """Paths within the root, with extension; absolute where they lie outside of it."""
    rows: NDArray[np.int64]
    """[N]: which entry each is."""
    missing: Mapping[int, str]
    """Message for each that is not on disk, by its place in `keys`."""
    latents: NDArray[np.int64]
    """Places in `keys` of images that are not on disk, but have sd-scripts' latents there."""


@dataclass(frozen=True)
class Latents:
    """sd-scripts' latents files as a run uses them."""

    suffix: str
    """"_sd" or "_sdxl"."""
    used: bool
    """Whether the run caches latents, so that they may stand for images that are not on disk."""


def metadata_root(subset: SubsetConfig) -> Path:
    """Where relative keys start: `image_dir`; without it, or for images inside .parquet files, the file's folder."""
    file = subset.metadata_file
    assert file is not None
    if file.suffix.lower() not in (".json", ".jsonl"):
        return file if file.is_dir() else file.parent
    return subset.image_dir if subset.image_dir != Path() else file.parent


def compose(caption: str | None, tags: str | None, subset: SubsetConfig) -> str:
    """The caption of an entry: its caption, then its tags behind `caption_separator`, as sd-scripts joins them.

    Without wildcards the first line counts. With `enable_wildcard` every line that is not blank is kept, and the tags
    are appended to each. Either may be missing; tags alone are the caption (sd-scripts drops them with wildcards).
    """
    lines = (caption or "").split("\n")
    lines = [line for line in lines if line.strip()] if subset.enable_wildcard else lines[:1]
    lines = [line for line in lines if line.strip()]
    if not lines:
        lines = (tags or "").split("\n")
        return "\n".join(line for line in lines if line.strip()) if subset.enable_wildcard else lines[0]
    if tags and tags.strip():
        end = subset.caption_separator + tags.replace("\n", subset.caption_separator)
        lines = [line + end for line in lines]
    return "\n".join(lines)


class _Texts:
    """A column in the making."""

    def __init__(self) -> None:
        self._data, self._ends = bytearray(), array("q")

    def add(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._data))

    def column(self) -> TextColumn:
        if not self._ends:
            return TextColumn.of(())
        return TextColumn(np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, np.int64))


class _Wrong:
    """Wrong entries, by what is wrong with them: the first five of each kind are shown."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, place: str, rule: str, way_out: str) -> None:
        places = self._found.setdefault((rule, way_out), [])
        self._counts[rule, way_out] = self._counts.get((rule, way_out), 0) + 1
        if len(places) < _SHOWN:
            places.append(place)

    def __bool__(self) -> bool:
        return bool(self._found)

    def note(self, path: Path, problems: Problems) -> None:
        for (rule, way_out), places in self._found.items():
            more = self._counts[rule, way_out] - len(places)
            first, *others = places
            also = f" (also {', '.join(others)}{f' and {more} more' if more else ''})" if others else ""
            problems.extend([Problem(f"{path}:{first}", None, rule + also, way_out)])


def read_metadata(subset: SubsetConfig, problems: Problems) -> Entries:
    """Read the .json or .jsonl file of `subset`; wrong entries are noted and left out.

    Raises:
        DataError: if the file cannot be read or its syntax is broken, with the line.
    """
    path = subset.metadata_file
    assert path is not None
    lines = _json_lines(path) if path.suffix.lower() == ".jsonl" else _json_object(path)
    keys, captions, described, sizes, wrong = _Texts(), _Texts(), bytearray(), array("i"), _Wrong()
    for line, key, entry in lines:
        if isinstance(entry, dict) and key is None:
            key = next((entry[name] for name in _IMAGE_KEYS if entry.get(name) is not None), None)
        if not isinstance(entry, dict):
            place = f"{line}" if key is None else f"{line}: {key!r}"
            wrong.add(place, "must be an object {...}", 'write {"caption": "..."}')
        elif not isinstance(key, str) or not key.strip() or "\0" in key:
            wrong.add(f"{line}", f"names no image ({' or '.join(_IMAGE_KEYS)} must be its path)",
                      'write {"file_name": "a.png", "text": "..."}')
        else:
            named = line, key
            caption, tags = (_text(entry, name, named, wrong) for name in _columns(entry, subset))
            keys.add(key)
            captions.add(compose(caption, tags, subset))
            described.append(caption is not None or tags is not None)
            sizes.extend(_size(entry, named, wrong))
    wrong.note(path, problems)
    found = Entries(
        keys.column(), captions.column(), np.frombuffer(described, bool), np.frombuffer(sizes, np.int32).reshape(-1, 2)
    )
    if not len(found.keys) and not wrong:
        problems.add(subset.origin, str(path), "holds no image", "add entries or leave the subset out")
    return found


def _columns(entry: Mapping[str, object], subset: SubsetConfig) -> tuple[str, str | None]:
    """Where an entry's caption and tags stand. With `caption_column` no tags; `text` stands in for `caption`."""
    if subset.caption_column is not None:
        return subset.caption_column, None
    return "caption" if entry.get("caption") is not None else "text", "tags"


def _text(entry: Mapping[str, object], name: str | None, place: tuple[int, str], wrong: _Wrong) -> str | None:
    """The text at `name`; None if there is none, or something else, which is noted."""
    value = None if name is None else entry.get(name)
    if value is None or isinstance(value, str):
        return value
    way_out = 'write "a, b" in place of ["a", "b"]' if isinstance(value, list) else "put it in quotes"
    wrong.add(f"{place[0]}: {place[1]!r}.{name}", "must be text", way_out)
    return ""


def _size(entry: Mapping[str, object], place: tuple[int, str], wrong: _Wrong) -> tuple[int, int]:
    value = entry.get("image_size")
    if value is None:
        return 0, 0
    if isinstance(value, list) and len(value) == 2:
        width, height = value
        if type(width) is int and type(height) is int and 0 < width < 2**31 and 0 < height < 2**31:
            return width, height
    wrong.add(f"{place[0]}: {place[1]!r}.image_size", "must be [width, height] in whole pixels",
              "correct it or leave it out")
    return 0, 0


def _json_lines(path: Path) -> Iterator[tuple[int, None, object]]:
    """(line, None, value) of each line that is not blank."""
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield number, None, json.loads(text)
            except UnicodeDecodeError as problem:
                raise DataError(f"{path}:{number}: byte {problem.start} is not UTF-8; save the file as UTF-8") from None
            except json.JSONDecodeError as problem:
                raise DataError(f"{path}:{number}:{problem.colno}: not valid JSON: {problem.msg}; a .jsonl file has "
                                "one object {...} on each line") from None
            except (ValueError, RecursionError):
                raise DataError(f"{path}:{number}: is nested too deep or holds a number that is too long; correct "
                                "it") from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct metadata_file") from None
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); check metadata_file") from None


def _json_object(path: Path) -> Iterator[tuple[int, str, object]]:
    """(line, key, value) of each entry of the object in `path`, without ever holding all of their values."""
    text = read_text(path, DataError)
    decoder, line, counted = json.JSONDecoder(), 1, 0
    try:
        position = _behind(text, 0, "{")
        if position is None:
            raise json.JSONDecodeError("the file must hold one object {...}", text, 0)
        closed = _behind(text, position, "}")
        while closed is None:
            start = _skip(text, position)
            key, position = decoder.raw_decode(text, start)
            if not isinstance(key, str):
                raise json.JSONDecodeError("a key must be text in quotes", text, start)
            after = _behind(text, position, ":")
            if after is None:
                raise json.JSONDecodeError("':' must follow a key", text, position)
            value, position = decoder.raw_decode(text, _skip(text, after))
            line, counted = line + text.count("\n", counted, start), start
            yield line, key, value
            closed = _behind(text, position, "}")
            comma = _behind(text, position, ",")
            if closed is None and comma is None:
                raise json.JSONDecodeError("',' or '}' must follow an entry", text, position)
            position = comma or position
        if _skip(text, closed) != len(text):
            raise json.JSONDecodeError("more text follows the object", text, _skip(text, closed))
    except json.JSONDecodeError as problem:
        raise DataError(f"{path}:{problem.lineno}:{problem.colno}: not valid JSON: {problem.msg}; the file must hold "
                        '{"image": {"caption": "..."}, ...} (one object a line: name it .jsonl)') from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: behind line {line} is nested too deep or holds a number that is too long; correct "
                        "it") from None


def _skip(text: str, position: int) -> int:
    """The first place from `position` on that is no blank."""
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _behind(text: str, position: int, sign: str) -> int | None:
    """The place behind `sign`, if that is what comes next."""
    if text.startswith(sign, position):
        return position + 1
    place = _skip(text, position)
    return place + 1 if text.startswith(sign, place) else None


class _Folder:
    """The images of one folder, by name and by stem."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.problem: str | None = None
        """Why the folder that is there cannot be listed."""
        self._names = set[str]()
        try:
            self._names.update(list_folder(Path(path)).images)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            pass
        except OSError as problem:
            self.problem = problem.strerror
        self._stems: dict[str, str] | None = None

    def find(self, name: str) -> list[str]:
        """The files that `name` may stand for: itself, else those that have it as stem."""
        if name in self._names:
            return [name]
        if self._stems is None:
            self._stems = {}
            for known in sorted(self._names):
                # One text, not a list: there may be a million.
                stem = os.path.splitext(known)[0]
                self._stems[stem] = f"{self._stems[stem]}/{known}" if stem in self._stems else known
        if name in self._stems:
            return self._stems[name].split("/")
        # Hidden files and unusual extensions, named on purpose.
        return [name] if os.path.isfile(os.path.join(self._path, name)) else []


def resolve(
    keys: TextColumn, subset: SubsetConfig, root: Path, problems: Problems, latents: Latents
) -> Resolved:
    """Find the image of each of `keys`: a path, absolute or from `root`, with extension or without.

    Where `latents` are used they take the place of an image that is not there. Keys that several files fit, several
    keys of the same file, and folders that cannot be listed are noted.
    """
    start = os.path.join(os.path.abspath(root), "")
    folders: dict[str, _Folder] = {}
    found, missing, ambiguous, alone = list[str](), set[int](), list[str](), set[int]()
    beside, ends = LatentsFolders(latents.suffix), set[str]()
    for row, key in enumerate(keys):
        name, files = _find(key, start, folders)
        if not files and (instead := _latents(key, start, beside)):
            alone.add(row)
            if latents.used:
                name, files = instead
        if len(files) > 1:
            ambiguous.append(f"{key!r} ({' or '.join(files)})")
            ends |= {os.path.splitext(file)[1] for file in files}
        if not files:
            missing.add(row)
        found.append(key if not files else os.path.join(name, files[0]) if name else files[0])
    where = subset.origin
    for folder, listed in folders.items():
        if listed.problem is not None:
            problems.add(where, os.path.join(start, folder), f"the folder of images that {subset.metadata_file} names "
                         f"cannot be read ({listed.problem})", "check its permissions")
    if ambiguous:
        problems.add(where, str(subset.metadata_file), f"{len(ambiguous)} keys fit several files: "
                     + ", ".join(ambiguous[:_SHOWN]) + (" ..." if len(ambiguous) > _SHOWN else ""),
                     "write their extensions" if ends != {SUFFIX} else "remove the latents that are stale")
    rows = sorted(range(len(found)), key=found.__getitem__)
    twice = [found[row] for before, row in pairwise(rows) if found[before] == found[row]]
    if twice:
        names = list(dict.fromkeys(twice))
        problems.add(where, str(subset.metadata_file), f"{len(names)} images have several entries: "
                     + ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else ""), "leave one of each")
    messages = {
        place: f"{root / found[row]}: there is no such image; correct its key in {subset.metadata_file}"
        for place, row in enumerate(rows) if row in missing
    } if missing else {}
    places = [place for place, row in enumerate(rows) if row in alone] if alone else []
    return Resolved(
        TextColumn.of(found[row] for row in rows), np.array(rows, np.int64), messages, np.array(places, np.int64)
    )


def _latents(key: str, start: str, beside: LatentsFolders) -> tuple[str, list[str]] | None:
    """(folder, names) of the latents files that stand for `key`, as `_find` gives those of images."""
    for folder, name in _places(key, start):
        if names := beside.find(os.path.join(start, folder, name)):
            return folder, names
    return None


def _find(key: str, start: str, folders: dict[str, _Folder]) -> tuple[str, list[str]]:
    """(folder, names) of the files that `key` may stand for; the folder from `start` on, if they lie below it."""
    for folder, name in _places(key, start):
        if folder not in folders:
            folders[folder] = _Folder(os.path.join(start, folder))
        if files := folders[folder].find(name):
            return folder, files
    return "", []


def _places(key: str, start: str) -> Iterator[tuple[str, str]]:
    """(folder, name) of what `key` may mean: as it stands and, with backslashes, as Windows means it."""
    for path in (key, key.replace("\\", "/")) if "\\" in key else (key,):
        path = os.path.normpath(path) if path[0] == "." or "/." in path or "//" in path else path
        if path.startswith(start):
            path = path[len(start) :]
        yield os.path.split(path) if "/" in path or os.sep in path else ("", path)
