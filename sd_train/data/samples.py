"""The samples of one dataset, epoch by epoch: how many of each image, and their shuffled order within the buckets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sd_train.randomness import derive

if TYPE_CHECKING:
    from sd_train.data.index import ImageIndex

Numbers = NDArray[np.int32]
Counts = NDArray[np.int64]
Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class Run:
    """Samples of one dataset, bucket after bucket."""

    records: Numbers
    repeats: Numbers
    epochs: Numbers
    counts: Counts
    """[buckets]: samples of each."""


class Samples:
    """The samples of one dataset, epoch by epoch."""

    def __init__(self, index: ImageIndex, number: int, seed: int) -> None:
        self.index, self.number, self.seed = index, number, seed
        self._whole = np.floor(index.repeats).astype(np.int32)
        self._varying = np.flatnonzero(index.repeats != self._whole)
        self._rates = index.repeats[self._varying].astype(np.float64)
        self._phases = np.zeros(len(self._varying))
        subsets = index.subset_of[self._varying]
        for subset in np.unique(subsets).tolist():
            rows = np.flatnonzero(subsets == subset)
            dealt = permutation(len(rows), seed, "phases", number, subset)
            # In the middle of its share of [0, 1), so that rounding cannot move a sample to another epoch.
            self._phases[rows[dealt]] = (np.arange(len(rows)) + 0.5) / len(rows)
        self._whole[self._varying] = 0
        self._each = np.bincount(index.bucket_of, weights=self._whole, minlength=len(index.buckets)).astype(np.int64)

    @property
    def vary(self) -> bool:
        """Whether the samples of an epoch differ from those of another."""
        return len(self._varying) > 0

    def counts(self, epoch: int) -> Numbers:
        """[N]: samples of each image in `epoch`."""
        counts = self._whole.copy()
        counts[self._varying] += (self._drawn(epoch + 1) - self._drawn(epoch)).astype(np.int32)
        return counts

    def before(self, epoch: int) -> Counts:
        """[buckets]: samples of all epochs before `epoch`."""
        total = self._each * epoch
        if self.vary:
            buckets = self.index.bucket_of[self._varying]
            total += np.bincount(buckets, self._drawn(epoch), minlength=len(total)).astype(np.int64)
        return total

    def ordered(self, epoch: int, wanted: NDArray[np.bool_] | None = None) -> Run:
        """The samples of `epoch`, shuffled within their buckets; of the buckets that are `wanted` [buckets] alone."""
        counts = self.counts(epoch)
        once = bool((counts == 1).all())
        records = np.arange(len(counts), dtype=np.int32)
        if not once:
            records = np.repeat(records, counts)
        keys = _random_keys(len(records), self.seed, "samples", epoch, self.number)
        buckets = self.index.bucket_of[records]
        if wanted is None:
            order = _sorted_within(buckets, keys)
        else:
            chosen = np.flatnonzero(wanted[buckets])
            order = chosen[_sorted_within(buckets[chosen], keys[chosen])]
        sizes = np.bincount(buckets[order], minlength=len(self._each)).astype(np.int64)
        del keys, buckets
        repeats = np.zeros(len(order), np.int32)
        if not once:
            firsts = np.cumsum(counts) - counts
            repeats = (order - firsts[records[order]]).astype(np.int32)
        epochs = np.broadcast_to(np.int32(epoch), len(order))
        return Run(records[order], repeats, epochs, sizes)

    def _drawn(self, epoch: int) -> NDArray[np.float64]:
        return np.floor(epoch * self._rates + self._phases)


def tail(run: Run, counts: Counts) -> Run:
    """The last `counts` [buckets] samples of each bucket."""
    rows = _spread(np.cumsum(run.counts) - counts, counts)
    return Run(run.records[rows], run.repeats[rows], run.epochs[rows], counts)


def interleave(first: Run, second: Run) -> Run:
    """For each bucket the samples of `first`, then those of `second`."""
    counts = first.counts + second.counts
    offsets = np.cumsum(counts) - counts
    rows = _spread(offsets, first.counts), _spread(offsets + first.counts, second.counts)

    def merged(mine: Numbers, others: Numbers) -> Numbers:
        result = np.empty(len(mine) + len(others), np.int32)
        result[rows[0]], result[rows[1]] = mine, others
        return result

    return Run(
        merged(first.records, second.records),
        merged(first.repeats, second.repeats),
        merged(first.epochs, second.epochs),
        counts,
    )


def _spread(starts: Counts, counts: Counts) -> Counts:
    """`counts` numbers from each of `starts` on, one group behind the other."""
    shifts = starts - (np.cumsum(counts) - counts)
    result: Counts = np.arange(int(counts.sum())) + np.repeat(shifts, counts)
    return result


def _sorted_within(groups: Numbers, keys: Keys) -> Counts:
    """The order by group, then by key; stable."""
    if not len(keys):
        return np.zeros(0, np.int64)
    # Sorting numbers is much faster than sorting by them: group, upper bits of the key and place share one number.
    group_bits, place_bits = int(groups.max()).bit_length(), len(keys).bit_length()
    codes = keys >> np.uint64(group_bits + place_bits) << np.uint64(place_bits)
    codes |= np.arange(len(keys), dtype=np.uint64)
    codes |= groups.astype(np.uint64) << np.uint64(64 - group_bits) if group_bits else np.uint64(0)
    codes.sort()
    order = (codes & np.uint64((1 << place_bits) - 1)).view(np.int64)
    codes >>= np.uint64(place_bits)
    if len(tied := np.flatnonzero(codes[1:] == codes[:-1])):
        # Where the upper bits do not tell keys apart, the whole keys decide.
        places = np.union1d(tied, tied + 1)
        rows = order[places]
        order[places] = rows[np.lexsort((keys[rows], groups[rows]))]
    return order


def permutation(count: int, seed: int, *parts: str | int) -> Counts:
    """A uniform permutation of `count` numbers that depends on nothing but `seed` and `parts`."""
    return _sorted_within(np.broadcast_to(np.int32(0), count), _random_keys(count, seed, *parts))


def _random_keys(count: int, seed: int, *parts: str | int) -> Keys:
    """[count] 64-bit numbers; sorting by them is a uniform permutation. `random_raw` is stable over NumPy releases."""
    raw: Keys = np.random.PCG64(derive(seed, "order", *parts)).random_raw(count)
    return raw
