"""The bucket columns of an index: where each of many images goes, in as few bytes as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_train.data.buckets import Assignments, Size, assign_many, merge_small
from sd_train.data.columns import TextColumn
from sd_train.data.settings import DatasetConfig

MUCH_ENLARGED = 4

_CHUNK = 1 << 15
"""Images whose intermediate results, some twenty numbers each, are held at once."""


@dataclass(frozen=True)
class BucketColumns:
    """Where each of N images goes."""

    buckets: list[Size]
    """The sizes that occur, sorted."""
    bucket_of: NDArray[np.int32]
    """[N]: number in `buckets`."""
    resized: NDArray[np.int32]
    """[N, 2]"""
    aspect_error: NDArray[np.float64]
    """[N]"""
    unusable: NDArray[np.int64]
    """Images that no bucket can take."""


def assign_columns(
    sizes: NDArray[np.int32], repeats: NDArray[np.float64], dataset: DatasetConfig
) -> BucketColumns:
    """Buckets of images of `sizes` [N, 2] that are seen `repeats` [N] times, by the settings of `dataset`."""
    count = len(sizes)
    codes = np.empty(count, np.int64)
    resized, error = np.empty((count, 2), np.int32), np.empty(count)
    known, unusable, row = set[int](), list[NDArray[np.int64]](), 0
    for part in _parts(sizes, repeats, dataset):
        end = row + len(part.bucket)
        codes[row:end] = part.bucket[:, 0] << 32 | part.bucket[:, 1]
        resized[row:end], error[row:end] = part.resized, part.aspect_error
        known.update(np.unique(codes[row:end]).tolist())
        unusable.append(np.flatnonzero(~part.usable) + row)
        row = end
    table = np.array(sorted(known), np.int64)
    bucket_of = np.empty(count, np.int32)
    for row in range(0, count, _CHUNK):
        bucket_of[row : row + _CHUNK] = np.searchsorted(table, codes[row : row + _CHUNK])
    buckets = [(code >> 32, code & 0xFFFFFFFF) for code in table.tolist()]
    return BucketColumns(buckets, bucket_of, resized, error, np.concatenate([np.zeros(0, np.int64), *unusable]))


def _parts(
    sizes: NDArray[np.int32], repeats: NDArray[np.float64], dataset: DatasetConfig
) -> Iterator[Assignments]:
    if dataset.bucket_policy == "merge" and dataset.enable_bucket:
        # Which buckets are small is known only of all images.
        whole = sizes.astype(np.int64)
        yield merge_small(whole, assign_many(whole, dataset), repeats, dataset)
        return
    for row in range(0, len(sizes), _CHUNK):
        yield assign_many(sizes[row : row + _CHUNK].astype(np.int64), dataset)


def much_enlarged(keys: TextColumn, sizes: NDArray[np.int32], resized: NDArray[np.int32]) -> list[str]:
    """A warning if images are enlarged more than `MUCH_ENLARGED` times."""
    found = np.flatnonzero((resized > MUCH_ENLARGED * sizes).any(axis=1))
    if not len(found):
        return []
    (width, height), (new_width, new_height) = sizes[found[0]], resized[found[0]]
    return [
        f"{len(found)} of {len(keys)} images are enlarged more than {MUCH_ENLARGED} times, the first is "
        f"{keys[int(found[0])]} ({width}x{height} to {new_width}x{new_height}); give larger ones or none"
    ]
