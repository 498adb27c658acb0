"""Text that users write: UTF-8 with or without a byte order mark, any line ending; TOML with line numbers."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.errors import ConfigError, UserError

_DEEPEST = 32
_MOST_BITS = 128
_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]#]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:"[^"]*"|'[^']*'|[\w-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[\w-]+))*)\s*=""")


def read_text(path: Path, error: type[UserError] = ConfigError) -> str:
    """The text of `path` without a byte order mark and with plain newlines.

    Raises:
        UserError: of class `error`, if the file is missing, unreadable or not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: there is no such file; check the path (current folder: {Path.cwd()})") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check the path and its permissions") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path}: byte {problem.start} is not UTF-8; save the file as UTF-8") from None
    except ValueError:
        raise error(f"{str(path)!r}: no file name holds a null character; correct the path") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class TomlFile:
    """A parsed TOML file that knows on which line each key stands."""

    path: Path
    data: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]

    def line(self, *keys: str | int) -> int | None:
        """Line of the key at `keys` (array tables by number), or of the nearest table around it."""
        for length in range(len(keys), 0, -1):
            if (number := self.lines.get(keys[:length])) is not None:
                return number
        return None

    def where(self, *keys: str | int) -> str:
        """`file:line: datasets[0].resolution`, for messages."""
        number = self.line(*keys)
        place = f"{self.path}:{number}" if number else str(self.path)
        return f"{place}: {dotted(keys)}" if keys else place


def dotted(keys: tuple[str | int, ...]) -> str:
    """`("datasets", 0, "resolution")` -> `datasets[0].resolution`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def read_toml(path: Path) -> TomlFile:
    """Parse `path`.

    Raises:
        ConfigError: with the line and column where the syntax breaks.
    """
    text = read_text(path)
    try:
        data: dict[str, Any] = _within_limits(path, lambda: tomllib.loads(text))
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError(f"{path}: not valid TOML: {problem}; strings need quotes, paths single quotes") from None
    return TomlFile(path, data, _key_lines(text))


def read_json(path: Path, way_out: str) -> Any:
    """Parse `path`; `way_out` is what a message about its syntax recommends.

    Raises:
        ConfigError: with the line and column where the syntax breaks, or for a key that stands twice in an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{path}: the key {twice[0]!r} stands twice in one object; remove one")
        return dict(pairs)

    text = read_text(path)
    try:
        return _within_limits(path, lambda: json.loads(text, object_pairs_hook=unique))
    except json.JSONDecodeError as problem:
        place = f"{path}:{problem.lineno}:{problem.colno}"
        raise ConfigError(f"{place}: not valid JSON: {problem.msg}; {way_out}") from None


def printable(text: str) -> str:
    """`text` with what is no UTF-8 (in file names) as escapes, so that it can be printed."""
    return text.encode("utf-8", "backslashreplace").decode()


def _within_limits(path: Path, parse: Callable[[], Any]) -> Any:
    """What `parse` returns, unless it is nested so deep or holds numbers so long that Python itself gives up."""
    def too_long(place: str) -> ConfigError:
        rule = f"a number has more than {_MOST_BITS // 4} digits{place}"
        return ConfigError(f"{path}: {rule}; shorten it, or put it in quotes if it is text")

    too_deep = f"{path}: is nested deeper than {_DEEPEST} levels; close the brackets where they belong"
    try:
        data = parse()
    except (tomllib.TOMLDecodeError, json.JSONDecodeError):
        raise
    except ValueError:
        # int() takes no more than 4300 digits.
        raise too_long("") from None
    except RecursionError:
        raise ConfigError(too_deep) from None
    level: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    for _ in range(_DEEPEST):
        for keys, part in level:
            if isinstance(part, int) and part.bit_length() > _MOST_BITS:
                raise too_long(f" ({dotted(keys)})")
        level = [((*keys, name), inner) for keys, part in level for name, inner in _parts(part)]
        if not level:
            return data
    raise ConfigError(too_deep)


def _parts(value: object) -> list[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []


def _split(name: str) -> list[str]:
    parts = re.findall(r"""\s*("[^"]*"|'[^']*'|[^.\s]+)\s*""", name)
    return [part[1:-1] if part[0] in "\"'" else part for part in parts]


def _key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line of each key and table header; tomllib keeps none, so the lines are read once more."""
    lines: dict[tuple[str | int, ...], int] = {}
    counts: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    for number, line in enumerate(text.split("\n"), start=1):
        if header := _HEADER.match(line):
            path: tuple[str | int, ...] = ()
            names = _split(header[2])
            for depth, name in enumerate(names):
                path = (*path, name)
                if depth == len(names) - 1 and header[1] == "[[":
                    counts[path] = counts.get(path, -1) + 1
                    path = (*path, counts[path])
                elif path in counts:
                    path = (*path, counts[path])
            table = path
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            lines.setdefault((*table, *_split(key[1])), number)
    return lines
