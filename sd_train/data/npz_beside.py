"""Which of sd-scripts' files of latents lie beside the images of a dataset."""

from __future__ import annotations

import os
from pathlib import Path

from sd_train.data.index import ImageIndex
from sd_train.data.npz import SUFFIX, find_npz, has_npz

Unfit = list[tuple[Path, str]]
"""Files that are not used, and why."""


def files_beside(index: ImageIndex, suffix: str | None) -> tuple[dict[int, Path], Unfit]:
    """By image of `index`: its file of latents, or the one that stands for an image that is not there.

    `suffix`: "_sd" or "_sdxl"; None: only the latter. Files that are older than their images are not among them.
    """
    files = {place: index.path(place) for place, key in enumerate(index.keys) if key.endswith(SUFFIX)}
    unfit: Unfit = []
    if suffix is None:
        return files, unfit
    any_there: dict[tuple[int, str], bool] = {}
    for place, (subset, key) in enumerate(zip(index.subset_of.tolist(), index.keys, strict=True)):
        folder = subset, os.path.dirname(key)
        if folder not in any_there:
            any_there[folder] = has_npz(index.path(place).parent)
        if not any_there[folder] or place in files:
            continue
        width, height = index.sizes[place].tolist()
        path = find_npz(index.path(place), (width, height), suffix)
        if path is not None and path.stat().st_mtime_ns < index.stats[place, 1]:
            unfit.append((path, "older than the image"))
        elif path is not None:
            files[place] = path
    return files, unfit
