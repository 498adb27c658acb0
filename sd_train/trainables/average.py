"""The moving average in place of what is trained, for previews and validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sd_train.optim.ema import Ema
from sd_train.trainables.base import Trainable, swapped_in


@dataclass(frozen=True)
class AverageWeights:
    """A trainable and the average of its weights."""

    trainable: Trainable
    ema: Ema

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Predictions with the average and without dropout."""
        with swapped_in(self.trainable, self.ema.tensors), self.trainable.for_inference():
            yield
