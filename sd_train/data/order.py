"""The order of a training: which samples stand in which micro-batch of which epoch.

A pure function of (indexes, seed, policy): entering epoch e needs no epoch before it, beyond those that a carried batch
reaches back to. Everything is in columns; what a micro-batch holds becomes an object when it is asked for.

Counts: in epoch e an image with r repeats an epoch has floor((e + 1) r + phase) - floor(e r + phase) samples, r where r
is whole. The phases of a subset's images are evenly spaced over [0, 1) and dealt out by the seed, so every epoch has
its share of each subset.

Policies (`DatasetConfig.bucket_policy`): with `keep` and `merge` a bucket's last batch of an epoch is short; `fill`
repeats its samples in turn until it is whole, each weighted by one over its number of copies; with `carry` a bucket's
samples of all epochs are one stream that is cut into whole batches, each of which belongs to the epoch that completes
it, so an epoch may have no batch at all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sd_train.data.samples import Counts, Numbers, Run, Samples, interleave, permutation, tail

if TYPE_CHECKING:
    from sd_train.data.index import ImageIndex


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one micro-batch, all of one bucket. R is its rows, copies included."""

    dataset: int
    records: Numbers
    """[R]: numbers in the dataset's index."""
    repeats: Numbers
    """[R]: which of the image's samples in their epoch it is, from zero."""
    epochs: Numbers
    """[R]: the epoch that each sample belongs to: the running one, or with `carry` one before it."""
    shares: NDArray[np.float32]
    """[R]: 1, or one over the number of the sample's copies where the batch was filled."""
    planned: int
    """Samples without copies; the first rows."""


@dataclass(frozen=True)
class Place:
    """One row of an epoch's micro-batches."""

    batch: int
    """Number of the micro-batch within the epoch, in the order of training."""
    row: int
    repeat: int
    epoch: int
    """The epoch that the sample belongs to."""
    share: float


@dataclass(frozen=True)
class _Part:
    """The micro-batches of one dataset in an epoch: rows `starts` to `stops` of `run`, before they are shuffled."""

    run: Run
    starts: Numbers
    stops: Numbers
    fill_to: int
    """Rows of a filled batch; 0: batches are as long as they are."""
    left: Run | None
    """With `carry`, what goes on to the next epoch."""


@dataclass(frozen=True)
class EpochOrder:
    """The micro-batches of one epoch, over all ranks."""

    epoch: int
    parts: tuple[_Part, ...]
    firsts: Counts
    """[datasets + 1]: number of each dataset's first batch before the shuffle."""
    shuffled: Numbers
    """[batches]: which of the unshuffled batches comes when."""

    def __len__(self) -> int:
        return len(self.shuffled)

    def batch(self, number: int) -> MicroBatch:
        """The micro-batch at `number` in the order of training."""
        place = int(self.shuffled[number])
        dataset = int(np.searchsorted(self.firsts, place, side="right")) - 1
        part = self.parts[dataset]
        place -= int(self.firsts[dataset])
        start, stop = int(part.starts[place]), int(part.stops[place])
        rows = np.arange(start, stop)
        shares = np.ones(stop - start, np.float32)
        if part.fill_to > len(rows):
            turns = np.arange(part.fill_to) % len(rows)
            shares = (1 / np.bincount(turns)[turns]).astype(np.float32)
            rows = start + turns
        run = part.run
        return MicroBatch(dataset, run.records[rows], run.repeats[rows], run.epochs[rows], shares, stop - start)

    def heaviest(self, areas: Sequence[Numbers]) -> MicroBatch | None:
        """The micro-batch with the most pixels; None where the epoch has none.

        `areas`: of each dataset [N] pixels that its images have in their buckets.
        """
        best, found = 0, None
        for dataset, (part, area) in enumerate(zip(self.parts, areas, strict=True)):
            if not len(part.starts):
                continue
            pixels = np.maximum(part.stops - part.starts, part.fill_to) * area[part.run.records[part.starts]]
            place = int(pixels.argmax())
            if int(pixels[place]) > best:
                best, found = int(pixels[place]), place + int(self.firsts[dataset])
        return None if found is None else self.batch(int(np.flatnonzero(self.shuffled == found)[0]))

    def find(self, dataset: int, record: int) -> list[Place]:
        """Every row that shows `record` of `dataset`, in the order of training."""
        part, found = self.parts[dataset], list[Place]()
        # A sample that is carried to the next epoch lies behind the last batch of its bucket, which may not show it.
        unshuffled = np.searchsorted(part.starts, np.flatnonzero(part.run.records == record), side="right") - 1
        for place in np.unique(unshuffled[unshuffled >= 0]).tolist():
            number = int(np.flatnonzero(self.shuffled == place + self.firsts[dataset])[0])
            batch = self.batch(number)
            found += [
                Place(number, row, int(batch.repeats[row]), int(batch.epochs[row]), float(batch.shares[row]))
                for row in np.flatnonzero(batch.records == record).tolist()
            ]
        return sorted(found, key=lambda place: (place.batch, place.row))


class Order:
    """The order of a whole training.

    Args:
        indexes: the datasets, with batch size and policy in `ImageIndex.dataset`.
        seed: of the training.
        per_update: micro-batches in an update, over all ranks.
        last_epoch: where what `carry` has left is flushed as short batches; what comes after it starts anew. None:
            nowhere.
    """

    def __init__(
        self, indexes: Sequence[ImageIndex], seed: int, per_update: int = 1, last_epoch: int | None = None
    ) -> None:
        self.indexes, self.seed, self.per_update, self.last_epoch = indexes, seed, per_update, last_epoch
        self._samples = [Samples(index, number, seed) for number, index in enumerate(indexes)]
        carries = any(index.dataset.bucket_policy == "carry" for index in indexes)
        self.constant = not carries and not any(samples.vary for samples in self._samples)
        """Whether all epochs have the same number of batches."""
        self._first_batches = self._count_batches(0)
        self._sums = [0]
        self._running: EpochOrder | None = None

    def counts(self, dataset: int, epoch: int) -> Numbers:
        """[N]: how many times each image of `dataset` is planned in `epoch` (with `carry` some are seen later)."""
        return self._samples[dataset].counts(epoch)

    def batches_in(self, epoch: int) -> int:
        """Micro-batches of `epoch`, over all ranks."""
        return self._first_batches if self.constant else self._count_batches(epoch)

    def batches_by_bucket(self, dataset: int, epoch: int) -> Counts:
        """[buckets]: micro-batches of each bucket of `dataset` in `epoch`."""
        size = self.indexes[dataset].dataset.batch_size
        before, after = self._span(dataset, epoch)
        if not self._carries(dataset):
            return -(-after // size)
        return (-(-after // size) if epoch == self.last_epoch else after // size) - before // size

    def filled_in(self, epoch: int) -> int:
        """Copies that fill the short batches of `epoch`."""
        return sum(
            int((-self._span(number, epoch)[1] % index.dataset.batch_size).sum())
            for number, index in enumerate(self.indexes)
            if index.dataset.bucket_policy == "fill"
        )

    def carried_after(self, epoch: int) -> int:
        """Samples that wait at the end of `epoch` for batches of later ones."""
        if epoch == self.last_epoch:
            return 0
        return sum(
            int((self._span(number, epoch)[1] % index.dataset.batch_size).sum())
            for number, index in enumerate(self.indexes)
            if self._carries(number)
        )

    def updates_in(self, epoch: int) -> int:
        """Updates of `epoch`; 0 where it completes no batch."""
        return -(-self.batches_in(epoch) // self.per_update)

    def updates_before(self, epoch: int) -> int:
        """Updates of all epochs before `epoch`."""
        if self.constant:
            return epoch * self.updates_in(0)
        while len(self._sums) <= epoch:
            self._sums.append(self._sums[-1] + self.updates_in(len(self._sums) - 1))
        return self._sums[epoch]

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, number within it) of update number `step`, from zero."""
        if self.constant:
            return divmod(step, self.updates_in(0))
        while self._sums[-1] <= step:
            self.updates_before(len(self._sums))
        epoch = bisect_right(self._sums, step) - 1
        return epoch, step - self._sums[epoch]

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of `epoch`; that of the last one asked for is kept."""
        if self._running is not None and self._running.epoch == epoch:
            return self._running
        previous = self._running if self._running is not None and self._running.epoch == epoch - 1 else None
        lefts = [part.left for part in previous.parts] if previous is not None else [None] * len(self.indexes)
        self._running = previous = None
        parts = tuple(self._part(number, epoch, left) for number, left in enumerate(lefts))
        firsts = np.cumsum([0, *(len(part.starts) for part in parts)])
        shuffled = permutation(int(firsts[-1]), self.seed, "batches", epoch).astype(np.int32)
        self._running = EpochOrder(epoch, parts, firsts, shuffled)
        return self._running

    def _carries(self, dataset: int) -> bool:
        return self.indexes[dataset].dataset.bucket_policy == "carry"

    def _count_batches(self, epoch: int) -> int:
        return sum(int(self.batches_by_bucket(number, epoch).sum()) for number in range(len(self.indexes)))

    def _span(self, dataset: int, epoch: int) -> tuple[Counts, Counts]:
        """[buckets] each: where the samples of `epoch` begin and end: in the stream with `carry`, else from 0."""
        samples = self._samples[dataset]
        before, after = samples.before(epoch), samples.before(epoch + 1)
        if not self._carries(dataset):
            return before - before, after - before
        if self.last_epoch is not None and epoch > self.last_epoch:
            origin = samples.before(self.last_epoch + 1)
            return before - origin, after - origin
        return before, after

    def _part(self, dataset: int, epoch: int, left: Run | None) -> _Part:
        """The batches of `dataset` in `epoch`; `left` is what the epoch before it has left, if that is known."""
        size = self.indexes[dataset].dataset.batch_size
        run = self._samples[dataset].ordered(epoch)
        carries = self._carries(dataset)
        if carries:
            carried = left if left is not None else self._left_before(dataset, epoch)
            run = interleave(carried, run) if len(carried.records) else run
        used = run.counts // size * size if carries and epoch != self.last_epoch else run.counts
        batches = -(-used // size)
        offsets = np.cumsum(run.counts) - run.counts
        # The n-th batch starts n times the size further on, less what the buckets before its own leave unused.
        shifts = offsets - size * (np.cumsum(batches) - batches)
        starts = np.arange(int(batches.sum()), dtype=np.int32) * np.int32(size)
        starts += np.repeat(shifts, batches).astype(np.int32)
        stops = np.minimum(starts + np.int32(size), np.repeat(offsets + used, batches).astype(np.int32))
        fill_to = size if self.indexes[dataset].dataset.bucket_policy == "fill" else 0
        rest = tail(run, run.counts - used) if carries else None
        return _Part(run, starts, stops, fill_to, rest)

    def _left_before(self, dataset: int, epoch: int) -> Run:
        """What the epochs before `epoch` have left of their streams: the orders that it lies in are computed."""
        samples, size = self._samples[dataset], self.indexes[dataset].dataset.batch_size
        missing = self._span(dataset, epoch)[0] % size
        left = tail(samples.ordered(epoch, np.zeros(len(missing), np.bool_)), missing * 0)
        while missing.any():
            epoch -= 1
            run = samples.ordered(epoch, missing > 0)
            taken = np.minimum(missing, run.counts)
            left = interleave(tail(run, taken), left)
            missing = missing - taken
        return left
