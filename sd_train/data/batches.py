"""Updates and their micro-batches: the order of `order.Order`, prepared ahead, starting anywhere."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sd_train.config.textfile import printable
from sd_train.data.captions import sample_caption
from sd_train.data.images import View, prepare, sample_view, view_geometry
from sd_train.data.index import ImageIndex
from sd_train.data.order import MicroBatch, Order
from sd_train.data.record import ImageRecord
from sd_train.diffusion.draws import Draws
from sd_train.errors import DataError, UserError
from sd_train.types import QUARANTINE, Batch, Progress, Update

if TYPE_CHECKING:
    from torch import Tensor

    from sd_train.data.cache import LatentRows
    from sd_train.data.texts import TextRows

logger = logging.getLogger(__name__)

Draw = Callable[[int, Sequence[int], int, int], Draws]
"""(update, places of the samples in it, width, height) -> noise and timesteps."""

DrawFixed = Callable[[Sequence[str], int, int], "Tensor"]
"""(keys, width, height) -> latent noise that is the same whenever an image is seen."""


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
    last_epoch: int | None = None
    """The training's last epoch, where the bucket policy `carry` flushes what is left; None: nowhere."""
    caption_variants: int | None = None
    """Draw captions from so many versions of each, see `captions.sample_caption`."""
    pin: bool = False
    """Put batches into memory that a GPU copies from by itself; copies from other memory wait for it."""


@dataclass(frozen=True)
class Appearance:
    """One time that an image is shown; computed, not stored."""

    step: int
    """Update, from zero."""
    epoch: int
    index: int
    """Number of the update within its epoch."""
    micro: int
    """Number of the micro-batch within the update, over all ranks."""
    row: int
    """Number of the sample within the micro-batch."""
    place: int
    """Number of the sample within the update, which its noise and timestep are drawn by."""
    repeat: int
    """With `sample_epoch`, what crop, flip and caption are drawn by."""
    sample_epoch: int
    """The epoch that the sample belongs to; with the bucket policy `carry` it may be before `epoch`."""
    share: float
    """Of the sample's weight: 1, or one over the number of its copies where the batch was filled."""


@dataclass(frozen=True)
class _Task:
    """One micro-batch to prepare."""

    step: int
    slot: MicroBatch
    first_place: int
    micro: int
    padding: bool
    end: int
    """Updates of the whole training, for a token warm-up that is a fraction of it."""


class Updates:
    """All updates of a training, a pure function of the settings: asking for update n needs none before it.

    An epoch without micro-batches (bucket policy `carry`, or `num_repeats` well below 1) has no update:
    `starting_at` goes on to the next one. `Update.last_in_epoch` is true of the last update that an epoch has, after
    which `Progress` stands at the start of the epoch that follows, be that empty or not.
    """

    def __init__(self, indexes: Sequence[ImageIndex], settings: BatchSettings, draw: Draw) -> None:
        self.indexes, self.settings, self.draw = indexes, settings, draw
        self.draw_fixed: DrawFixed | None = None
        """Takes the place of the latent noise of `draw`, where latents are drawn once for each image."""
        self.cache: LatentRows | None = None
        """Where rows come from instead of pixels, once it is filled."""
        self.texts: TextRows | None = None
        """Where encoded captions come from, once it is filled."""
        self._pins = settings.pin
        self.per_update = settings.accumulation * settings.world
        """Micro-batches of an update, over all ranks; the last update of an epoch may have fewer."""
        self.order = Order(indexes, settings.seed, self.per_update, settings.last_epoch)

    def batches_in(self, epoch: int) -> int:
        """Micro-batches of `epoch`, over all ranks."""
        return self.order.batches_in(epoch)

    def updates_in(self, epoch: int) -> int:
        """Updates of `epoch`."""
        return self.order.updates_in(epoch)

    def updates_before(self, epoch: int) -> int:
        """Updates of all epochs before `epoch`."""
        return self.order.updates_before(epoch)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, number within it) of update number `step`, from zero."""
        return self.order.epoch_of(step)

    def slots(self, epoch: int) -> list[MicroBatch]:
        """The micro-batches of `epoch` in their order, over all ranks; each within one bucket."""
        order = self.order.epoch(epoch)
        return [order.batch(number) for number in range(len(order))]

    def appearances(self, number: int, row: int, epoch: int) -> list[Appearance]:
        """Every time that `epoch` shows image `row` of dataset `number`, in the order of training."""
        order = self.order.epoch(epoch)
        found = []
        for place in order.find(number, row):
            index, micro = divmod(place.batch, self.per_update)
            before = range(index * self.per_update, place.batch)
            first = sum(len(order.batch(batch).records) for batch in before)
            found.append(Appearance(
                step=self.updates_before(epoch) + index,
                epoch=epoch,
                index=index,
                micro=micro,
                row=place.row,
                place=first + place.row,
                repeat=place.repeat,
                sample_epoch=place.epoch,
                share=place.share,
            ))
        return found

    def largest(self, progress: Progress, end: int) -> Update:
        """The micro-batch with the most pixels of the epoch that `progress` stands in, or of the first one after it
        that has any, as an update of its own, once for each rank; nothing of the training goes by it."""
        areas = [np.array(index.buckets, np.int64).prod(axis=1)[index.bucket_of] for index in self.indexes]
        epoch, slot = progress.epoch, None
        while slot is None:
            slot, epoch = self.order.epoch(epoch).heaviest(areas), epoch + 1
        task = _Task(progress.step, slot, self.settings.rank * len(slot.records), self.settings.rank, False, end)
        samples = slot.planned * self.settings.world
        return Update(progress.step, epoch - 1, 0, False, samples, map(self._prepare, [task]))

    def starting_at(self, progress: Progress, end: int) -> Iterator[Update]:
        """Updates from `progress` on until `end` (over all runs of the training), endlessly over epochs.

        Those in the quarantine of `progress` keep their number and have neither samples nor batches.
        """
        settings = self.settings
        workers = min(settings.workers, 1) if self.cache is not None else settings.workers
        if not workers:
            for update, tasks in self._planned(progress, end):
                update.batches = map(self._prepare, tasks)
                yield update
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            planned = self._planned(progress, end)
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

    def _planned(self, progress: Progress, end: int) -> Iterator[tuple[Update, list[_Task]]]:
        step, epoch, index = progress.step, progress.epoch, progress.index
        left_out = {entry["step"] for entry in progress.extra.get(QUARANTINE, ())}
        while step < end:
            count = self.updates_in(epoch)
            while index < count and step < end:
                order = self.order.epoch(epoch)
                first = index * self.per_update
                stop = first if step in left_out else min(first + self.per_update, len(order))
                slots = [order.batch(number) for number in range(first, stop)]
                samples = sum(slot.planned for slot in slots)
                last = index + 1 == count
                yield Update(step, epoch, index, last, samples, iter(())), self._tasks(step, slots, end)
                step, index = step + 1, index + 1
            epoch, index = epoch + 1, 0

    def _tasks(self, step: int, slots: list[MicroBatch], end: int) -> list[_Task]:
        rank, world = self.settings.rank, self.settings.world
        places = np.cumsum([0, *(len(slot.records) for slot in slots)])
        tasks = []
        # Every rank gets the same number of micro-batches; what is missing is filled with samples of weight zero.
        for micro in range(rank, -(-len(slots) // world) * world, world):
            real = micro < len(slots)
            slot = slots[micro] if real else slots[0]
            tasks.append(_Task(step, slot, int(places[min(micro, len(slots))]), micro, not real, end))
        return tasks

    def _prepare(self, task: _Task) -> Batch:
        """The micro-batch of `task`.

        Raises:
            DataError: if it cannot be made; it names the file, or those that it may be.
        """
        index = self.indexes[task.slot.dataset]
        records = [index.record(row) for row in task.slot.records.tolist()]
        with _naming(records):
            batch = self._batch(task, records)
        return self._pinned(batch) if self._pins else batch

    def _pinned(self, batch: Batch) -> Batch:
        """`batch` in memory that a GPU copies from by itself, where the system gives such memory."""
        try:
            # In the threads that prepare ahead. PyTorch keeps such memory and hands it out again.
            return replace(batch, **{each.name: _pin(getattr(batch, each.name)) for each in fields(batch)})
        except RuntimeError as problem:
            self._pins = False
            reason = str(problem).splitlines()[0]
            logger.warning("batches are copied to the GPU from ordinary memory, which takes longer: %s", reason)
            return batch

    def _batch(self, task: _Task, records: list[ImageRecord]) -> Batch:
        settings, slot = self.settings, task.slot
        # What is random about a sample goes by the epoch that it belongs to, which may be before the running one.
        samples = list(zip(records, slot.epochs.tolist(), slot.repeats.tolist(), strict=True))
        views = [sample_view(record, settings.seed, epoch, repeat) for record, epoch, repeat in samples]
        captions = [
            sample_caption(record, settings.seed, epoch, repeat, task.step, task.end, settings.caption_variants)
            for record, epoch, repeat in samples
        ]
        width, height = records[0].bucket
        draws = self.draw(task.step, range(task.first_place, task.first_place + len(records)), width, height)
        keys = [record.key for record in records]
        weights = np.array([record.weight for record in records]) * (0.0 if task.padding else slot.shares)
        pixels = images = mask = None
        if self.cache is None:
            pixels, mask = _pictures(records, views)
        else:
            images = dict(self.cache.rows(slot.dataset, slot.records.tolist(), [view.flip for view in views]))
            mask = images.pop("mask", None)
        return Batch(
            keys=[printable(key) for key in keys],
            paths=[printable(str(record.path)) for record in records],
            captions=captions,
            pixels=pixels,
            images=images,
            noise=draws.noise,
            latent_noise=draws.latent_noise if self.draw_fixed is None else self.draw_fixed(keys, width, height),
            timesteps=draws.timesteps,
            more_noise=draws.more,
            weight=torch.tensor(weights, dtype=torch.float32),
            mask=mask,
            texts=None if self.texts is None else self.texts.rows(captions),
            geometry=[view_geometry(record, view) for record, view in zip(records, views, strict=True)],
            micro=task.micro,
        )


def _pin(value: Any) -> Any:
    """A tensor, or those of a table, in pinned memory; what is neither, as it is."""
    if isinstance(value, dict):
        return {name: _pin(each) for name, each in value.items()}
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


@contextmanager
def _naming(records: Sequence[ImageRecord]) -> Iterator[None]:
    """Whatever goes wrong inside is told with the images' names: it may happen in a thread, hours after the start."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        names = ", ".join(dict.fromkeys(printable(str(record.path)) for record in records))
        raise DataError(
            f"{names}: cannot be prepared ({type(problem).__name__}: {problem}); look at it with sd-train doctor, or "
            "leave it out"
        ) from problem


def _pictures(records: Sequence[ImageRecord], views: Sequence[View]) -> tuple[Tensor, Tensor | None]:
    """Pixels [B, 3, H, W], and the masks [B, H / 8, W / 8] if there is any, with ones for pictures without."""
    pictures = []
    for record, view in zip(records, views, strict=True):
        with _naming([record]):
            pictures.append(prepare(record, view))
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    masks = [picture.mask for picture in pictures]
    shape = next((mask.shape for mask in masks if mask is not None), None)
    if shape is None:
        return pixels, None
    rows = [np.ones(shape, np.float32) if mask is None else mask for mask in masks]
    return pixels, torch.from_numpy(np.stack(rows))
