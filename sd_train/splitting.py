"""Micro-batches that do not fit into memory are computed in parts, with the same noise and the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from sd_train.device import free_memory
from sd_train.types import Batch

Size = tuple[int, int]
"""Height and width of a bucket, in pixels."""


class TooLarge(Exception):
    """A micro-batch did not fit; the next attempt takes smaller parts."""


@dataclass
class Splitting:
    """Knows how many samples of each bucket fit at once; nothing is known before something did not.

    A sample's noise, loss, weight and what dropout leaves out of it are its own, so the sum of the parts' losses is
    that of the whole.
    """

    say: Callable[[str], None]
    most: dict[Size, tuple[int, int]] = field(default_factory=dict)
    """Samples at once, and the update (from zero) from which on: those before it, computed anew, are as they were."""

    def parts(self, batch: Batch, step: int) -> Iterator[Batch]:
        """`batch` of update number `step` whole, or in parts of what fits."""
        size, since = self.most.get(_size(batch), (len(batch.keys), 0))
        if size >= len(batch.keys) or step < since:
            yield batch
            return
        for start in range(0, len(batch.keys), size):
            yield rows(batch, slice(start, start + size))

    def learn(self, part: Batch, step: int) -> bool:
        """Note that `part` of update number `step` (from zero) did not fit; False if nothing smaller is left."""
        count = len(part.keys)
        if count == 1:
            return False
        height, width = _size(part)
        _, since = self.most.get((height, width), (count, step))
        self.most[height, width] = (count + 1) // 2, min(since, step)
        self.say(
            f"update {step + 1}: out of memory with {count} images of {width}x{height} at once; from here on those are "
            f"computed {(count + 1) // 2} at a time, with the same noise and result"
        )
        return True

    def free(self) -> None:
        """Give memory back before the next attempt."""
        free_memory()


def rows(batch: Batch, which: slice) -> Batch:
    """Some samples of `batch`, as a batch."""

    def some(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[which] for name, tensor in table.items()}

    return replace(
        batch,
        keys=batch.keys[which],
        paths=batch.paths[which],
        captions=batch.captions[which],
        pixels=None if batch.pixels is None else batch.pixels[which],
        images=None if batch.images is None else some(batch.images),
        noise=batch.noise[which],
        latent_noise=batch.latent_noise[which],
        timesteps=batch.timesteps[which],
        weight=batch.weight[which],
        mask=None if batch.mask is None else batch.mask[which],
        texts=None if batch.texts is None else some(batch.texts),
        geometry=batch.geometry[which],
        rows=(which.start, len(batch.keys)),
        more_noise=some(batch.more_noise),
    )


def _size(batch: Batch) -> Size:
    return batch.geometry[0].target
