"""Updates and their micro-batches: order from (seed, epoch), starting anywhere, prepared ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from sd_train.config.textfile import printable
from sd_train.data.cache import MemoryCache
from sd_train.data.captions import sample_caption
from sd_train.data.images import prepare, sample_view, view_geometry
from sd_train.data.index import ImageIndex
from sd_train.diffusion.schedule import Draws
from sd_train.randomness import derive
from sd_train.types import Batch, Progress, Update

Draw = Callable[[int, Sequence[int], int, int], Draws]
"""(update, places of the samples in it, width, height) -> noise and timesteps."""


@dataclass(frozen=True)
class BatchSettings:
    """What the order and grouping of the samples depend on."""

    seed: int
    accumulation: int
    """Micro-batches of each rank in an update."""
    workers: int
    """Threads that prepare batches ahead; 0 prepares in the training's own thread."""
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class _Slot:
    """The samples of one micro-batch: entries `start` to `stop` of an epoch's order of one dataset."""

    dataset: int
    records: np.ndarray
    repeats: np.ndarray


@dataclass(frozen=True)
class _Task:
    """One micro-batch to prepare."""

    step: int
    epoch: int
    slot: _Slot
    first_place: int
    micro: int
    padding: bool
    end: int
    """Updates of the whole training, for a token warm-up that is a fraction of it."""


class Updates:
    """All updates of a training, a pure function of the settings: asking for update n needs none before it."""

    def __init__(
        self,
        indexes: Sequence[ImageIndex],
        batch_sizes: Sequence[int],
        settings: BatchSettings,
        draw: Draw,
    ) -> None:
        self.indexes, self.batch_sizes, self.settings = indexes, batch_sizes, settings
        self.draw = draw
        self.cache: MemoryCache | None = None
        """Where rows come from instead of pixels, once it is filled."""
        self._samples: list[tuple[np.ndarray, np.ndarray]] = []
        self.batches_per_epoch = 0
        for index, size in zip(indexes, batch_sizes, strict=True):
            records = np.repeat(np.arange(len(index)), index.repeats)
            starts = np.cumsum(index.repeats) - index.repeats
            repeats = np.arange(len(records)) - np.repeat(starts, index.repeats)
            self._samples.append((records, repeats))
            counts = np.bincount(index.bucket_of[records], minlength=len(index.buckets))
            self.batches_per_epoch += int(np.sum(-(-counts // size)))
        self.per_update = settings.accumulation * settings.world
        self.per_epoch = -(-self.batches_per_epoch // self.per_update)

    def slots(self, epoch: int) -> list[_Slot]:
        """The micro-batches of an epoch in their order, over all ranks; each within one bucket."""
        seed = self.settings.seed
        slots: list[_Slot] = []
        for number, (records, repeats) in enumerate(self._samples):
            buckets = self.indexes[number].bucket_of[records]
            order = np.lexsort((_random_keys(len(records), seed, "samples", epoch, number), buckets))
            ends = np.flatnonzero(np.diff(buckets[order], append=-1)) + 1
            start = 0
            for end in ends:
                for first in range(start, int(end), self.batch_sizes[number]):
                    chosen = order[first : min(first + self.batch_sizes[number], int(end))]
                    slots.append(_Slot(number, records[chosen], repeats[chosen]))
                start = int(end)
        return [slots[place] for place in np.argsort(_random_keys(len(slots), seed, "batches", epoch), kind="stable")]

    def starting_at(self, progress: Progress, end: int) -> Iterator[Update]:
        """Updates from `progress` on until `end` (over all runs of the training), endlessly over epochs."""
        settings = self.settings
        workers = min(settings.workers, 1) if self.cache is not None else settings.workers
        if not workers:
            for update, tasks in self._planned(progress.step, progress.epoch, progress.index, end):
                update.batches = map(self._prepare, tasks)
                yield update
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            planned = self._planned(progress.step, progress.epoch, progress.index, end)
            ahead: deque[tuple[Update, list[Future[Batch]]]] = deque()

            def submit(count: int) -> None:
                for update, tasks in islice(planned, count):
                    ahead.append((update, [pool.submit(self._prepare, task) for task in tasks]))

            try:
                submit(2 + 2 * workers // max(1, settings.accumulation))
                while ahead:
                    update, futures = ahead.popleft()
                    update.batches = (future.result() for future in futures)
                    yield update
                    submit(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _planned(self, step: int, epoch: int, index: int, end: int) -> Iterator[tuple[Update, list[_Task]]]:
        while step < end:
            slots = self.slots(epoch)
            while index < self.per_epoch and step < end:
                chosen = slots[index * self.per_update : (index + 1) * self.per_update]
                samples = sum(len(slot.records) for slot in chosen)
                last = index + 1 == self.per_epoch
                yield Update(step, epoch, index, last, samples, iter(())), self._tasks(step, epoch, chosen, end)
                step, index = step + 1, index + 1
            epoch, index = epoch + 1, 0

    def _tasks(self, step: int, epoch: int, slots: list[_Slot], end: int) -> list[_Task]:
        rank, world = self.settings.rank, self.settings.world
        places = np.cumsum([0, *(len(slot.records) for slot in slots)])
        tasks = []
        # Every rank gets the same number of micro-batches; what is missing is filled with samples of weight zero.
        for micro in range(rank, -(-len(slots) // world) * world, world):
            real = micro < len(slots)
            slot = slots[micro] if real else slots[0]
            tasks.append(_Task(step, epoch, slot, int(places[min(micro, len(slots))]), micro, not real, end))
        return tasks

    def _prepare(self, task: _Task) -> Batch:
        settings, slot = self.settings, task.slot
        index = self.indexes[slot.dataset]
        records = [index.record(int(place)) for place in slot.records]
        repeats = [int(repeat) for repeat in slot.repeats]
        views = [
            sample_view(record, settings.seed, task.epoch, repeat)
            for record, repeat in zip(records, repeats, strict=True)
        ]
        width, height = records[0].bucket
        places = range(task.first_place, task.first_place + len(records))
        draws = self.draw(task.step, places, width, height)
        pixels = images = None
        if self.cache is None:
            pictures = [
                prepare(record, view)[0]
                for record, view in zip(records, views, strict=True)
            ]
            pixels = torch.from_numpy(np.stack(pictures))
        else:
            images = self.cache.rows(slot.dataset, [int(p) for p in slot.records], [view.flip for view in views])
        weights = [0.0 if task.padding else record.weight for record in records]
        return Batch(
            keys=[printable(record.key) for record in records],
            captions=[
                sample_caption(record, settings.seed, task.epoch, repeat, task.step, task.end)
                for record, repeat in zip(records, repeats, strict=True)
            ],
            pixels=pixels,
            images=images,
            noise=draws.noise,
            latent_noise=draws.latent_noise,
            timesteps=draws.timesteps,
            weight=torch.tensor(weights, dtype=torch.float32),
            geometry=[view_geometry(record, view) for record, view in zip(records, views, strict=True)],
            micro=task.micro,
        )


def _random_keys(count: int, seed: int, *parts: str | int) -> np.ndarray:
    """[count] 64-bit numbers; sorting by them is a uniform permutation. `random_raw` is stable over NumPy releases."""
    raw: np.ndarray = np.random.PCG64(derive(seed, "order", *parts)).random_raw(count)
    return raw
