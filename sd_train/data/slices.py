"""A part of a dataset as validation sees it: each image as it is, with its whole caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sd_train.data.columns import TextColumn
from sd_train.data.samples import permutation
from sd_train.data.split import first_caption, unchanged_subset

if TYPE_CHECKING:
    from sd_train.data.index import ImageIndex


def fixed_slice(indexes: Sequence[ImageIndex], count: int, seed: int) -> list[ImageIndex]:
    """`count` images of `indexes` (all, if there are fewer), regularisation images aside; which, `seed` says."""
    rows = [np.flatnonzero(~index.is_reg) for index in indexes]
    ends = np.cumsum([len(part) for part in rows])
    total = int(ends[-1])
    chosen = np.sort(permutation(total, seed, "validation slice")[:count])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    firsts = [0, *ends[:-1].tolist()]
    return [
        unchanged_rows(index, own[part - first])
        for index, own, part, first in zip(indexes, rows, parts, firsts, strict=True)
        if len(part)
    ]


def unchanged_rows(index: ImageIndex, rows: NDArray[np.int64]) -> ImageIndex:
    """The images of `index` at `rows`, each once and as it is: in the same bucket, centred, with its whole caption."""
    dataset = index.dataset
    captions = (
        first_caption(index.captions[row], dataset.subsets[int(index.subset_of[row])]) for row in rows.tolist()
    )
    return replace(
        index,
        dataset=replace(
            dataset, subsets=tuple(unchanged_subset(subset) for subset in dataset.subsets), bucket_policy="keep"
        ),
        keys=index.keys.take(rows),
        captions=TextColumn.of(captions),
        masks=None if index.masks is None else index.masks.take(rows),
        subset_of=index.subset_of[rows],
        sizes=index.sizes[rows],
        resized=index.resized[rows],
        aspect_error=index.aspect_error[rows],
        bucket_of=index.bucket_of[rows],
        repeats=np.ones(len(rows)),
        weights=index.weights[rows],
        stats=index.stats[rows],
    )
