"""Moving images out of a dataset with all that belongs to them; nothing is overwritten, and nothing deleted."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from sd_train.config.textfile import read_text
from sd_train.data.folders import Folder, list_folder
from sd_train.errors import DataError, DiskError
from sd_train.files import SHORTENED, tidy, write_text, write_whole
from sd_train.prepare.metadata import json_text

JOURNAL = "filter_images.json"
"""In the folder that images are moved to: what was moved and why."""

Journal = Mapping[str, list[str]]
"""Path within the folder of images -> reasons."""


def read_journal(folder: Path) -> dict[str, list[str]]:
    """What earlier calls moved to `folder`.

    Raises:
        DataError: if the journal is damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path, DataError))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not all(isinstance(each, list) for each in content.values()):
        raise DataError(f"{path}: is damaged; rename it, or give another --move_to")
    return content


def move_images(folder: Path, keys: Sequence[str], target: Path, journal: Journal) -> int:
    """Move the images `keys` of `folder` to the same places in `target`, with the files that belong to them alone.

    An image goes last: whoever is interrupted finds it again.

    Returns:
        How many were moved.

    Raises:
        DataError: if something else has one of the names there; then nothing is moved.
        DiskError: if the disk refuses.
    """
    leaving, listed = {*keys}, dict[Path, Folder]()
    moves = [
        (folder / name, target / name) for key in keys for name in (*_belonging(folder, key, leaving, listed), key)
    ]
    if taken := [str(after) for before, after in moves if os.path.lexists(after) and not _same(before, after)]:
        raise DataError(f"--move_to: {len(taken)} names are taken, the first is {taken[0]}; give an empty folder")
    if not moves:
        return 0
    # Copies to another disk that were killed.
    names = {JOURNAL, *(after.name for _, after in moves)}
    for place in {target, *(after.parent for _, after in moves)}:
        tidy(place, lambda name: name in names or SHORTENED.fullmatch(name) is not None)
    write_text(target / JOURNAL, json_text(journal), "--move_to")
    for before, after in moves:
        try:
            after.parent.mkdir(parents=True, exist_ok=True)
            _move(before, after)
        except OSError as problem:
            raise DiskError(f"{before}: cannot be moved to {after} ({problem.strerror}); give the command again "
                            "when it can, or another --move_to") from None  # fmt: skip
    return len(keys)


def _same(before: Path, after: Path) -> bool:
    """Whether it is there already: a copy to another disk was interrupted before its end."""
    if before.is_symlink():
        return after.is_symlink() and os.path.realpath(before) == os.path.realpath(after)
    return after.is_file() and not after.is_symlink() and filecmp.cmp(before, after, shallow=False)


def _move(before: Path, after: Path) -> None:
    if before.is_symlink():
        # What a relative link names is found from its own folder alone.
        if not after.is_symlink():
            os.symlink(os.path.join(before.parent.absolute(), os.readlink(before)), after)
        os.unlink(before)
        return
    try:
        os.rename(before, after)
    except OSError as problem:
        if problem.errno != errno.EXDEV:
            raise
        # Another disk.
        write_whole(after, lambda temporary: _copy(before, temporary), "--move_to")
        os.unlink(before)


def _copy(before: Path, after: Path) -> None:
    shutil.copy2(before, after)


def _belonging(folder: Path, key: str, leaving: Set[str], known: dict[Path, Folder]) -> list[str]:
    """Files that have the name of image `key` with another extension, or are its latents; none that an image which
    stays needs too. `known`: folders that were listed before."""
    image = folder / key
    if image.parent not in known:
        known[image.parent] = list_folder(image.parent)
    listed = known[image.parent]
    above = key[: len(key) - len(image.name)]
    twins = [name for name in listed.images if os.path.splitext(name)[0] == image.stem and name != image.name]
    # Of several that all leave, the last one takes the files along.
    stay = [name for name in twins if above + name not in leaving]
    if stay or any(name > image.name for name in twins):
        return []
    names = [name for name in listed.others if os.path.splitext(name)[0] == image.stem or _is_latents(name, image.stem)]
    return [above + name for name in names]


def _is_latents(name: str, stem: str) -> bool:
    """`STEM_WWWWxHHHH_sd.npz` and its like."""
    if not (name.startswith(stem + "_") and name.endswith(("_sd.npz", "_sdxl.npz"))):
        return False
    width, _, height = name[len(stem) + 1 :].split("_")[0].partition("x")
    return width.isdecimal() and height.isdecimal()
