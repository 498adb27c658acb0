"""Aspect-ratio buckets: the resolutions that a batch may have, and which one an image goes to.

The rules are sd-scripts' (`BucketManager`, `make_bucket_resolutions`, `trim_and_resize_if_required`); sizes are
(width, height) in pixels throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sd_train.data.settings import DatasetConfig
from sd_train.errors import DataError, Problem

Size = tuple[int, int]
Sizes = NDArray[np.int64]

_AT_ONCE = 1024
"""Images compared with all buckets in one go."""
MOST_LOST = 0.34
"""Of a picture, where it leaves its bucket for the sake of a full batch: a square becomes 3:2, nothing is halved."""


@dataclass(frozen=True)
class Assignment:
    """Where one image goes."""

    bucket: Size
    resized: Size
    """Size after the resize and before the crop to the bucket."""
    aspect_error: float
    """Bucket's width/height less the image's."""


@dataclass(frozen=True)
class Assignments:
    """Where each of N images goes: one row an image."""

    bucket: Sizes
    """[N, 2]"""
    resized: Sizes
    """[N, 2]"""
    aspect_error: NDArray[np.float64]
    """[N]; not finite where the bucket has no area."""

    def numbered(self) -> tuple[list[Size], NDArray[np.int32]]:
        """(the buckets that occur, sorted; [N]: the number of each image's bucket among them)."""
        if not len(self.bucket):
            return [], np.zeros(0, np.int32)
        # Counted, not sorted: sides are small numbers, and a million images take a few milliseconds.
        widths, heights = self.bucket[:, 0], self.bucket[:, 1]
        columns, column_of = _distinct(widths)
        rows, row_of = _distinct(heights)
        cell_of = column_of[widths] * len(rows) + row_of[heights]
        cells, number_of = _distinct(cell_of)
        buckets = [(int(columns[cell // len(rows)]), int(rows[cell % len(rows)])) for cell in cells.tolist()]
        return buckets, number_of[cell_of].astype(np.int32)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """[N]: false where the image is smaller than one bucket step, so that nothing would be left of it."""
        return np.asarray(self.bucket.min(axis=1) > 0)


def bucket_resolutions(resolution: Size, minimum: int, maximum: int, step: int) -> list[Size]:
    """The bucket sizes for a target `resolution`, sorted.

    Each side is a multiple of `step` from `minimum` (rounded down to one) to `maximum` (rounded up), the area at most
    that of `resolution`; for each width the largest height that fits, its mirror image, and the largest square.

    Raises:
        ValueError: if `minimum` is below one step.
    """
    lowest = minimum // step * step
    highest = -(-maximum // step) * step
    if lowest < step:
        raise ValueError(f"the smallest bucket side, {minimum}, is below one step of {step}")
    area = resolution[0] * resolution[1]
    square = int(np.sqrt(area) // step) * step
    found = {(square, square)}
    for width in range(lowest, highest + 1, step):
        height = min(highest, area // width // step * step)
        if height >= lowest:
            found |= {(width, height), (height, width)}
    return sorted(found)


def assign(size: Size, dataset: DatasetConfig, name: str = "the image") -> Assignment:
    """Bucket and resized size of one image of `size`.

    Raises:
        DataError: if nothing of it would be left in a bucket; `name` is what the message calls it.
    """
    rows = assign_many(np.array([size], dtype=np.int64), dataset)
    if not rows.usable[0]:
        raise DataError(str(too_small(name, size, dataset)))
    (bucket_width, bucket_height), (width, height) = rows.bucket[0], rows.resized[0]
    return Assignment(
        bucket=(int(bucket_width), int(bucket_height)),
        resized=(int(width), int(height)),
        aspect_error=float(rows.aspect_error[0]),
    )


def too_small(name: str, size: Size, dataset: DatasetConfig) -> Problem:
    """The problem of an image that no bucket can take."""
    step = dataset.bucket_reso_steps
    return Problem(
        where=name,
        value=f"{size[0]}x{size[1]} pixels",
        rule=f"after scaling down, a side is shorter than bucket_reso_steps ({step}), so no bucket can hold it",
        way_out="remove the image, or set bucket_no_upscale = false",
    )


def assign_many(sizes: Sizes, dataset: DatasetConfig) -> Assignments:
    """Buckets and resized sizes for `sizes` [N, 2] of positive numbers, by the settings of `dataset`.

    With `bucket_no_upscale` an image is only ever scaled down, and the bucket is the resized size cut to whole steps;
    otherwise it goes to the predefined bucket of nearest width/height and is scaled to cover it. Without buckets,
    `resolution` is the only one.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    aspect = sizes[:, 0] / sizes[:, 1]
    if not dataset.enable_bucket:
        bucket = _nearest(sizes, aspect, [dataset.resolution])
        resized = _cover(sizes, aspect, bucket)
    elif not dataset.bucket_no_upscale:
        limits = dataset.min_bucket_reso, dataset.max_bucket_reso
        bucket = _nearest(sizes, aspect, bucket_resolutions(dataset.resolution, *limits, dataset.bucket_reso_steps))
        resized = _cover(sizes, aspect, bucket)
    else:
        resized = _shrink(sizes, aspect, dataset.resolution[0] * dataset.resolution[1], dataset.bucket_reso_steps)
        bucket = resized - resized % dataset.bucket_reso_steps
    with np.errstate(divide="ignore", invalid="ignore"):
        error = bucket[:, 0] / bucket[:, 1] - aspect
    return Assignments(bucket, resized, error)


def merge_small(
    sizes: Sizes, rows: Assignments, repeats: NDArray[np.float64], dataset: DatasetConfig
) -> Assignments:
    """`rows` without buckets that do not fill a batch: the policy `merge`.

    A bucket with fewer samples an epoch than `batch_size` goes, the smallest first, into the bucket among the others
    where the least is cropped, until every bucket fills a batch or one is left. What is cropped is the mean over the
    bucket's samples of the share of the resized picture that is cut away. With `bucket_no_upscale`, where buckets have
    areas of all kinds, what is lost by scaling down counts too, and only buckets that all its images cover without
    being enlarged; without such a one it stays as it is. Then single images go into
    the bucket of the next shape, see `_move_leftovers`.

    Args:
        sizes: [N, 2], the images'.
        rows: from `assign_many`.
        repeats: [N], samples of each image in an epoch; a fraction is the mean over epochs.
        dataset: the settings.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    buckets, bucket_of = rows.numbered()
    table = np.array(buckets, dtype=np.int64).reshape(-1, 2)
    # Sums of fractions are rounded, so that ten times 0.1 is one whole sample.
    samples = np.bincount(bucket_of, weights=repeats, minlength=len(table)).round(6)
    left = table.min(axis=1) > 0
    stays = ~left
    while left.sum() > 1:
        small = np.flatnonzero(left & ~stays & (samples < dataset.batch_size))
        if not len(small):
            break
        smallest = int(small[np.argmin(samples[small])])
        images = np.flatnonzero(bucket_of == smallest)
        left[smallest] = False
        others = np.flatnonzero(left)
        loss = _loss(sizes[images], repeats[images], table[smallest], table[others], not dataset.bucket_no_upscale)
        if not np.isfinite(loss).any():
            left[smallest], stays[smallest] = True, True
            continue
        target = int(others[np.argmin(loss)])
        bucket_of[images] = target
        samples[target] += samples[smallest]
    _move_leftovers(sizes, bucket_of, table, repeats, dataset)
    bucket = table[bucket_of]
    moved = (bucket != rows.bucket).any(axis=1)
    resized, error = rows.resized.copy(), rows.aspect_error.copy()
    aspect = sizes[moved, 0] / sizes[moved, 1]
    resized[moved] = _cover(sizes[moved], aspect, bucket[moved])
    error[moved] = bucket[moved, 0] / bucket[moved, 1] - aspect
    return Assignments(bucket, resized, error)


def _move_leftovers(
    sizes: Sizes, bucket_of: NDArray[np.int32], table: Sizes, repeats: NDArray[np.float64], dataset: DatasetConfig
) -> None:
    """Change `bucket_of` [N] so that the buckets' last batches are full.

    From the narrowest shape to the widest, the images that are left over go into the next bucket that is short too, or
    those that are missing come from there: the ones of which the least is cut away, and whichever cuts away less.
    Nothing moves that would lose more than `MOST_LOST`; nor where images are not all seen equally often.
    """
    if not len(repeats) or (repeats != repeats[0]).any() or repeats[0] != int(repeats[0]) or repeats[0] < 1:
        return
    batch = dataset.batch_size // math.gcd(dataset.batch_size, int(repeats[0]))
    used = np.unique(bucket_of)
    used = used[table[used].min(axis=1) > 0]
    chain = used[np.argsort(table[used, 0] / table[used, 1], kind="stable")].tolist()
    members = {bucket: np.flatnonzero(bucket_of == bucket) for bucket in chain}

    def cheapest(source: int, target: int, count: int) -> tuple[NDArray[np.int64], float]:
        """The `count` images of `source` that lose least in `target`, and what they lose together."""
        if len(members[source]) - count < batch:
            return members[source][:0], np.inf
        lost = _lost(sizes[members[source]], table[source], table[target], not dataset.bucket_no_upscale)
        chosen = np.argsort(lost, kind="stable")[:count]
        return members[source][chosen], float(lost[chosen].sum()) if (lost[chosen] <= MOST_LOST).all() else np.inf

    def moved(here: int, after: int) -> bool:
        """Whether the last batch of `here` is full now."""
        over = len(members[here]) % batch
        (away, away_lost), (near, near_lost) = cheapest(here, after, over), cheapest(after, here, batch - over)
        bucket_of[away if away_lost <= near_lost else near] = after if away_lost <= near_lost else here
        for bucket in (here, after):
            members[bucket] = np.flatnonzero(bucket_of == bucket)
        return min(away_lost, near_lost) < np.inf

    # Only to where a batch is short too: else the same short batch would be in another bucket.
    short = [place for place, bucket in enumerate(chain) if len(members[bucket]) % batch]
    for first, last in pairwise(short):
        before, path = bucket_of.copy(), chain[first : last + 1]
        if len(members[chain[first]]) % batch and not all(moved(*pair) for pair in pairwise(path)):
            bucket_of[:] = before
            members.update({bucket: np.flatnonzero(bucket_of == bucket) for bucket in path})


def crop_box(resized: Size, bucket: Size) -> tuple[int, int]:
    """(left, top) of the centred box of size `bucket` in an image of size `resized`."""
    return (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2


def _nearest(sizes: Sizes, aspect: NDArray[np.float64], buckets: list[Size]) -> Sizes:
    """For each size the bucket equal to it, else that of nearest width/height; the first of equally near ones."""
    table = np.array(buckets, dtype=np.int64)
    ratios, first = np.unique(table[:, 0] / table[:, 1], return_index=True)
    above = np.clip(np.searchsorted(ratios, aspect), 0, len(ratios) - 1)
    below = np.maximum(above - 1, 0)
    error_above, error_below = np.abs(ratios[above] - aspect), np.abs(ratios[below] - aspect)
    chosen = np.where(error_below < error_above, first[below], first[above])
    tied = error_below == error_above
    chosen[tied] = np.minimum(first[below[tied]], first[above[tied]])
    codes = table[:, 0] << 32 | table[:, 1]
    wanted = sizes[:, 0] << 32 | sizes[:, 1]
    place = np.clip(np.searchsorted(codes, wanted), 0, len(codes) - 1)
    return table[np.where(codes[place] == wanted, place, chosen)]


def _loss(
    sizes: Sizes, repeats: NDArray[np.float64], own: Sizes, buckets: Sizes, enlarge: bool
) -> NDArray[np.float64]:
    """[buckets]: the mean of `_lost` over pictures of the bucket `own` [2], for each other bucket."""
    lost = np.zeros(len(buckets))
    for start in range(0, len(sizes), _AT_ONCE):
        some = sizes[start : start + _AT_ONCE]
        pairs, targets = np.repeat(some, len(buckets), axis=0), np.tile(buckets, (len(some), 1))
        each = _lost(pairs, own, targets, enlarge).reshape(len(some), len(buckets))
        lost += repeats[start : start + _AT_ONCE] @ each
    mean: NDArray[np.float64] = lost / repeats.sum()
    return mean


def _lost(sizes: Sizes, own: Sizes, targets: Sizes, enlarge: bool) -> NDArray[np.float64]:
    """[N]: the share of each resized picture that its bucket of `targets` [N, 2] or [2] cuts away.

    Unless they may `enlarge`, what is scaled away against the bucket `own` [2] counts too, and it is infinite where the
    target would enlarge.
    """
    targets = np.broadcast_to(targets, sizes.shape)
    covering = _cover(sizes, sizes[:, 0] / sizes[:, 1], targets)
    kept = targets.prod(axis=1) / covering.prod(axis=1)
    if not enlarge:
        kept *= np.minimum(1.0, targets.prod(axis=1) / own.prod())
        kept[(sizes < targets).any(axis=1)] = -np.inf
    lost: NDArray[np.float64] = 1 - kept
    return lost


def _distinct(values: Sizes) -> tuple[Sizes, Sizes]:
    """(the distinct of some small numbers, sorted; the number of each value among them, by value)."""
    present = np.bincount(values) > 0
    return np.flatnonzero(present), np.cumsum(present) - 1


def _cover(sizes: Sizes, aspect: NDArray[np.float64], bucket: Sizes) -> Sizes:
    """Scaled, with the aspect ratio kept, so that the bucket is just covered."""
    wider = aspect > bucket[:, 0] / bucket[:, 1]
    scale = np.where(wider, bucket[:, 1] / sizes[:, 1], bucket[:, 0] / sizes[:, 0])
    return (sizes * scale[:, None] + 0.5).astype(np.int64)


def _shrink(sizes: Sizes, aspect: NDArray[np.float64], area: int, step: int) -> Sizes:
    """Scaled down to about `area` where larger: one side a multiple of `step`, the side that keeps the ratio better."""

    def whole_steps(length: NDArray[np.float64]) -> Sizes:
        rounded = (length + 0.5).astype(np.int64)
        return rounded - rounded % step

    width = np.sqrt(area * aspect)
    height = area / width
    by_width, by_height = whole_steps(width), whole_steps(height)
    with np.errstate(divide="ignore", invalid="ignore"):
        width_error = np.abs(by_width / whole_steps(by_width / aspect) - aspect)
        height_error = np.abs(whole_steps(by_height * aspect) / by_height - aspect)
    from_width = np.stack([by_width, (by_width / aspect + 0.5).astype(np.int64)], axis=1)
    from_height = np.stack([(by_height * aspect + 0.5).astype(np.int64), by_height], axis=1)
    smaller = np.where((width_error < height_error)[:, None], from_width, from_height)
    larger_than_area = sizes[:, 0] * sizes[:, 1] > area
    return np.where(larger_than_area[:, None], smaller, sizes)
