"""The metadata that the preparation's commands build up: a JSON file that is read, added to and written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_train.config.textfile import read_text
from sd_train.errors import DataError, DiskError, Problems
from sd_train.files import tidy, write_whole

Metadata = dict[str, dict[str, Any]]
"""{image: {"caption": text, "tags": text, "image_size": [width, height], ...}}; other keys are kept as they are."""
LINES = ".jsonl"
"""Files with an object a line, which names its image as `image_path`."""


def read_metadata(path: Path) -> Metadata:
    """What the metadata file at `path` holds, `.json` or `.jsonl` by its name.

    Raises:
        DataError: if it is no JSON object of objects, or a line is none with an `image_path`.
    """
    if path.suffix.lower() == LINES:
        return _read_lines(path)
    try:
        content = json.loads(read_text(path, DataError))
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: is no JSON ({problem}); give a metadata file, or another name") from None
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{path}: is no metadata, an object of objects by image; give another file")
    return content


def _read_lines(path: Path) -> Metadata:
    found: Metadata = {}
    for number, line in enumerate(read_text(path, DataError).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("image_path"), str):
            raise DataError(f"{path}:{number}: is no object with an image_path; give another file")
        found[entry.pop("image_path")] = entry
    return found


def check_target(path: Path, problems: Problems) -> None:
    """Note a place where no metadata of one object can be written."""
    if path.is_dir():
        problems.add("OUT.json", str(path), "is a folder", "give a file's name, such as meta.json")
    if path.suffix.lower() == LINES:
        problems.add("OUT.json", str(path), "would be read line by line", "end its name in .json")


def start_from(in_json: Path | None, out_json: Path) -> Metadata:
    """What a command adds to: `in_json`, else what is in `out_json` already, else nothing.

    Raises:
        DataError: if a file is no metadata, or `in_json` does not exist.
    """
    if in_json is not None:
        if not in_json.is_file():
            raise DataError(f"--in_json = {in_json}: there is no such file; give one, or leave it out")
        return read_metadata(in_json)
    return read_metadata(out_json) if out_json.is_file() else {}


def write_metadata(path: Path, metadata: Mapping[str, Mapping[str, Any]]) -> bool:
    """Write `metadata` whole, with what was there kept as `NAME.json.bak`; False where nothing has changed.

    Raises:
        DiskError: if the disk refuses.
    """
    content = json_text(metadata).encode()
    # A process that was killed has left what it was writing.
    tidy(path.parent, {path.name, path.name + ".bak"}.__contains__)
    if path.is_file():
        before = read_bytes(path)
        if before == content:
            return False
        backup = path.with_name(path.name + ".bak")
        write_whole(backup, lambda temporary: _put(temporary, before), "place for the metadata")
    write_whole(path, lambda temporary: _put(temporary, content), "place for the metadata")
    return True


def read_bytes(path: Path) -> bytes:
    """What is in the file at `path`, which is about to be replaced.

    Raises:
        DiskError: if it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as problem:
        raise DiskError(f"{path}: is there and cannot be read ({problem.strerror}), so no backup can be kept; check "
                        "its permissions, or give another name") from None  # fmt: skip


def json_text(content: object) -> str:
    """`content` as JSON to be read by people; escaped where a file's name is no UTF-8, as text cannot hold it."""
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content, indent=2) + "\n"
    return text


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
