"""Indexes made of columns alone, for tests that need no image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sd_train.data.columns import TextColumn
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig, SubsetConfig


def make_index(
    buckets: Sequence[int], repeats: Sequence[float] | float = 1, folder: Path = Path("photos"), **options: Any
) -> ImageIndex:
    """An index of one image for each of `buckets`, which says the number of its bucket; bucket n is (64 + 8 n) x 64.

    `options` are those of the dataset; `subset` holds those of its only subset, `captions` the captions, `weights`
    the weights. Images are called 0.png, 1.png and so on and have the size of their bucket.
    """
    count = len(buckets)
    weights = np.broadcast_to(np.asarray(options.pop("weights", 1.0), np.float32), count)
    captions = options.pop("captions", [f"caption {number}" for number in range(count)])
    subset = SubsetConfig(folder, **options.pop("subset", {}))
    dataset = DatasetConfig(resolution=(64, 64), subsets=(subset,), **{"batch_size": 1, **options})
    used = sorted(set(buckets))
    sizes = np.array([(64 + 8 * bucket, 64) for bucket in buckets], np.int32).reshape(-1, 2)
    whole = np.broadcast_to(np.asarray(repeats, np.float64), count)
    return ImageIndex(
        dataset=dataset,
        keys=TextColumn.of(f"{number}.png" for number in range(count)),
        captions=TextColumn.of(captions),
        masks=None,
        subset_of=np.zeros(count, np.int32),
        sizes=sizes,
        resized=sizes,
        aspect_error=np.zeros(count),
        bucket_of=np.array([used.index(bucket) for bucket in buckets], np.int32),
        repeats=whole,
        weights=weights,
        stats=np.zeros((count, 2), np.int64),
        buckets=[(64 + 8 * bucket, 64) for bucket in used],
        num_train_images=count,
        num_reg_images=0,
        captions_of_folders=(("photos", captions),),
        warnings=(),
    )
