"""Which entry of metadata stands for which image of a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_train.prepare.listing import from_here, metadata_key


@dataclass(frozen=True)
class Matched:
    """Images and metadata side by side."""

    keys: dict[Path, str]
    """The entry of each image that has one."""
    without_entry: tuple[Path, ...]
    """Images that the metadata do not name."""
    without_image: tuple[str, ...]
    """Entries whose image is not among those looked for."""


def match_entries(images: Sequence[Path], folder: Path, known: Collection[str]) -> Matched:
    """Find the entry of each of `images`, which lie in `folder`: keys are paths, absolute or within it.

    Backslashes, paths from the current folder as sd-scripts' --full_path writes them, and keys without extension are
    taken too; the latter where only one image fits.
    """
    names = {image: (metadata_key(image, folder, True), metadata_key(image, folder, False)) for image in images}
    whole = {name for pair in names.values() for name in pair}
    stems = Counter(os.path.splitext(within)[0] for _, within in names.values())
    keys = {}
    for image, (absolute, within) in names.items():
        wanted = [absolute, within, "./" + within, within.replace("/", "\\")]
        if str(image) in known and from_here(str(image), folder):
            wanted.append(str(image))
        if stems[os.path.splitext(within)[0]] == 1:
            wanted += [key for key in (os.path.splitext(absolute)[0], os.path.splitext(within)[0]) if key not in whole]
        if (key := next((each for each in wanted if each in known), None)) is not None:
            keys[image] = key
    found = set(keys.values())
    return Matched(
        keys, tuple(image for image in images if image not in keys), tuple(key for key in known if key not in found)
    )
