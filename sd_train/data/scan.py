"""What lies in a folder of images: names, sizes and captions of all of them in columns, from headers alone."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.data.captions import TEXT_EXTENSIONS
from sd_train.data.columns import TextColumn
from sd_train.data.folder_reader import (
    CAPTION_BAD,
    CAPTION_EMPTY,
    CAPTION_NONE,
    CAPTION_READ,
    Folder,
    Images,
    Listing,
    caption_stats,
    hashes,
    image_stats,
    list_images,
    opened,
    read_captions,
    read_images,
)
from sd_train.data.index_file import FEWEST, UNSETTLED, Kept, KeptIndexes

__all__ = [
    "CAPTION_BAD", "CAPTION_EMPTY", "CAPTION_NONE", "CAPTION_READ", "FileScan", "FolderScan", "scan_files",
    "scan_folder",
]  # fmt: skip


@dataclass(frozen=True)
class FolderScan:
    """N images of a folder, sorted by name as plain strings (as sd-scripts)."""

    images: TextColumn
    """File names."""
    sizes: NDArray[np.int32]
    """[N, 2]: (width, height) upright; (0, 0) where the header cannot be read."""
    texts: TextColumn
    """What stands in each image's caption file, newlines plain, byte order mark gone, not stripped; "" without file."""
    states: NDArray[np.uint8]
    """[N]: CAPTION_NONE (no file), CAPTION_READ, CAPTION_BAD (not readable as UTF-8) or CAPTION_EMPTY (no byte)."""
    stats: NDArray[np.int64]
    """[N, 2]: file size, time of the last change in nanoseconds."""
    image_problems: dict[int, str]
    """Row -> message that names the file."""
    caption_problems: dict[int, str]
    """Row -> message that names the file, of every caption that is bad or empty."""
    other_captions: dict[str, list[int]]
    """Extension -> rows without caption that have a caption file of this extension."""


@dataclass(frozen=True)
class FileScan:
    """N image files of any folders."""

    sizes: NDArray[np.int32]
    """[N, 2]: (width, height) upright; (0, 0) where the header cannot be read."""
    stats: NDArray[np.int64]
    """[N, 2]: file size, time of the last change in nanoseconds."""
    problems: dict[int, str]
    """Row -> message that names the file."""


@dataclass(frozen=True)
class _Found:
    """What the files of N images say."""

    sizes: NDArray[np.int32]
    stats: NDArray[np.int64]
    texts: TextColumn
    states: NDArray[np.uint8]
    caption_stats: NDArray[np.int64]

    @property
    def sound(self) -> NDArray[np.bool_]:
        """[N]: whether there is nothing to tell about an image and its caption."""
        good: NDArray[np.bool_] = (self.states == CAPTION_NONE) | (self.states == CAPTION_READ)
        return good & (self.sizes[:, 0] > 0)


def scan_folder(path: Path, caption_extension: str, keep: KeptIndexes | None) -> FolderScan:
    """Every image directly in `path` with its size and its caption file's text.

    Images are what `folders.list_folder` takes for them, caption files what `captions.caption_name` finds.
    With `keep`, a scan of 5,000 images or more is kept, and next time only files whose size or time has changed are
    read; where it is to be trusted, nothing is looked at but what was broken.

    Raises:
        OSError: if the folder cannot be listed.
    """
    key = ("folder", os.path.abspath(path), caption_extension, *TEXT_EXTENSIONS)
    if keep is not None and keep.trust and (kept := keep.read(*key)) is not None:
        listing, known = _restored(kept)
        rows = np.where(known.sound, np.arange(len(known.sizes)), -1)
        return _read(Folder(path), caption_extension, listing, known, rows)[0]
    started = time.time_ns()
    with opened(path) as folder:
        listing = list_images(folder, caption_extension, TEXT_EXTENSIONS)
        to_keep = keep is not None and len(listing.names) >= FEWEST
        kept = keep.read(*key) if keep is not None and to_keep else None
        if kept is None:
            rows = np.full(len(listing.names), -1)
            scan, found = _read(folder, caption_extension, listing, None, rows, to_keep)
            changed = True
        else:
            before, known = _restored(kept)
            rows = _rows_of(before.names, listing.names)
            if before.names == listing.names:
                listing = Listing(before.names, listing.kinds, listing.others)  # Names in memory twice help nobody.
            same = (rows >= 0) & (before.kinds[rows] == listing.kinds)
            same &= _same_stats(image_stats(folder, listing.names), known.stats[rows], kept.scanned_at)
            same &= _same_stats(caption_stats(folder, listing.names, listing.kinds, caption_extension),
                                known.caption_stats[rows], kept.scanned_at)
            changed = not same.all() or len(rows) != len(known.sizes)
            scan, found = _read(folder, caption_extension, listing, known, np.where(same & known.sound[rows], rows, -1))
    if keep is not None and to_keep and changed:
        keep.write(key, _to_keep(started, listing, found))
    return scan


def _read(
    folder: Folder, extension: str, listing: Listing, known: _Found | None, rows: NDArray[np.int64],
    to_keep: bool = True,
) -> tuple[FolderScan, _Found]:
    """The scan of `listing`, whose image i is row `rows[i]` of `known`, or is read where that is -1."""
    fresh = np.flatnonzero(rows < 0)
    names, kinds = listing.names.take(fresh), listing.kinds[fresh]
    images = read_images(folder, names)
    captions = read_captions(folder, names, kinds, extension, with_stats=to_keep)
    found = _Found(images.sizes, images.stats, captions.texts, captions.states, captions.stats)
    if known is not None:
        found = _merged(known, found, rows)
    without = {extension: np.flatnonzero(listing.others >> bit & 1) for bit, extension in enumerate(TEXT_EXTENSIONS)}
    scan = FolderScan(
        listing.names, found.sizes, found.texts, found.states, found.stats,
        {int(fresh[row]): problem for row, problem in images.problems.items()},
        {int(fresh[row]): problem for row, problem in captions.problems.items()},
        {extension: found_rows.tolist() for extension, found_rows in without.items() if len(found_rows)},
    )  # fmt: skip
    return scan, found


def _merged(known: _Found, fresh: _Found, rows: NDArray[np.int64]) -> _Found:
    """Row `rows[i]` of `known` at i, the rows of `fresh` in turn where that is -1."""
    places = rows.copy()
    places[rows < 0] = len(known.sizes) + np.arange(len(fresh.sizes))
    if np.array_equal(places, np.arange(len(known.sizes))):
        return known
    return _Found(
        np.concatenate([known.sizes, fresh.sizes])[places],
        np.concatenate([known.stats, fresh.stats])[places],
        TextColumn.join([known.texts, fresh.texts]).take(places),
        np.concatenate([known.states, fresh.states])[places],
        np.concatenate([known.caption_stats, fresh.caption_stats])[places],
    )


def _rows_of(before: TextColumn, now: TextColumn) -> NDArray[np.int64]:
    """[N]: where each of the names `now` stands in `before`, -1 if it does not."""
    if before == now:
        return np.arange(len(now))
    old, new = hashes(before), hashes(now)
    order = np.argsort(old)
    places = order[np.minimum(np.searchsorted(old, new, sorter=order), len(old) - 1)]
    return np.where(old[places] == new, places, -1)


def _same_stats(now: NDArray[np.int64], before: NDArray[np.int64], scanned_at: int) -> NDArray[np.bool_]:
    """[N]: whether each file is the one that was scanned, for certain."""
    same: NDArray[np.bool_] = (now == before).all(axis=1) & (before[:, 1] < scanned_at - UNSETTLED)
    return same


def _to_keep(started: int, listing: Listing, found: _Found) -> Kept:
    return Kept(started, {
        "names": listing.names.data, "name_ends": listing.names.ends, "kinds": listing.kinds, "others": listing.others,
        "sizes": found.sizes, "stats": found.stats, "texts": found.texts.data, "text_ends": found.texts.ends,
        "states": found.states, "caption_stats": found.caption_stats,
    })  # fmt: skip


def _restored(kept: Kept) -> tuple[Listing, _Found]:
    columns = kept.columns
    listing = Listing(TextColumn(columns["names"], columns["name_ends"]), columns["kinds"], columns["others"])
    texts = TextColumn(columns["texts"], columns["text_ends"])
    return listing, _Found(columns["sizes"], columns["stats"], texts, columns["states"], columns["caption_stats"])


def scan_files(paths: TextColumn, keep: KeptIndexes | None) -> FileScan:
    """The sizes of the images at `paths`, absolute or relative to the current folder, in any folders.

    Lists of 5,000 or more that begin with the same path are kept as those of folders are.
    """
    if not len(paths):
        return FileScan(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int64), {})
    started, folder, key = time.time_ns(), Folder(Path()), ("files", os.getcwd(), paths[0])
    kept = keep.read(*key) if keep is not None and len(paths) >= FEWEST else None
    if keep is None or kept is None:
        images, changed = read_images(folder, paths), True
    else:
        columns = kept.columns
        rows = _rows_of(TextColumn(columns["paths"], columns["path_ends"]), paths)
        same = rows >= 0
        if not keep.trust:
            same &= _same_stats(image_stats(folder, paths), columns["stats"][rows], kept.scanned_at)
        changed = not same.all() or len(rows) != len(columns["sizes"])
        fresh = np.flatnonzero(~same | (columns["sizes"][rows, 0] == 0))
        found = read_images(folder, paths.take(fresh))
        sizes, stats = columns["sizes"][rows], columns["stats"][rows]
        sizes[fresh], stats[fresh] = found.sizes, found.stats
        images = Images(sizes, stats, {int(fresh[row]): problem for row, problem in found.problems.items()})
    if keep is not None and changed and len(paths) >= FEWEST:
        keep.write(key, Kept(started, {"paths": paths.data, "path_ends": paths.ends, "sizes": images.sizes,
                                       "stats": images.stats}))  # fmt: skip
    return FileScan(images.sizes, images.stats, images.problems)
