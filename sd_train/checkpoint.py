"""What is saved and when: model files under sd-scripts' names, with states beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd_train.errors import RunError
from sd_train.files import write_tensors
from sd_train.guard import ASK_OTHERS_EVERY
from sd_train.lora_files.writing import to_diffusers
from sd_train.names import FileNames, Moment
from sd_train.optim.inference import InferenceWeights
from sd_train.report import Report
from sd_train.retention import Retention
from sd_train.snapshot import all_finite
from sd_train.state import StateParts, save_state
from sd_train.trainables.base import Trainable
from sd_train.types import Progress

logger = logging.getLogger(__name__)

Export = Callable[[Trainable, Path, Mapping[str, str], Mapping[str, Tensor] | None], None]
"""Writes a trainable's weights, or other tensors of the same names, with metadata."""


def save_own(
    trainable: Trainable, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None
) -> None:
    """In the trainable's own format."""
    trainable.save(path, metadata, tensors)


def diffusers_lora(family: str, dtype: torch.dtype) -> Export:
    """As diffusers' (PEFT's) LoRA of a model of `family`, in `dtype`."""

    def save(
        trainable: Trainable, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None
    ) -> None:
        content = to_diffusers(trainable.tensors() if tensors is None else tensors, family, metadata)
        written = {name: tensor.to(dtype) for name, tensor in content.tensors.items()}
        write_tensors(path, written, {**metadata, **content.metadata})

    return save


@dataclass(frozen=True)
class Intervals:
    """When something is saved."""

    every_n_steps: int | None
    every_n_epochs: int | None
    state: bool
    """`--save_state`: a state beside every model file."""
    state_at_end: bool
    every_n_minutes: float | None = None

    def due(self, progress: Progress, end_epoch: int) -> list[Moment]:
        """The saves that are due after an update, whatever the clock says; the last epoch is the final file alone."""
        moments: list[Moment] = []
        if self.every_n_steps and progress.step % self.every_n_steps == 0:
            moments.append(("step", progress.step))
        at_epoch_end = progress.index == 0 and progress.step > 0
        due = self.every_n_epochs and at_epoch_end and progress.epoch % self.every_n_epochs == 0
        if due and progress.epoch < end_epoch:
            moments.append(("epoch", progress.epoch))
        return moments


@dataclass
class Checkpoint:
    """Writes what is due after an update."""

    names: FileNames
    intervals: Intervals
    parts: StateParts
    metadata: Callable[[Progress], Mapping[str, str]]
    report: Report
    end_epoch: int
    is_main: bool
    export: Export = save_own
    """How the model file is written."""
    saved: Callable[[Sequence[Path], Path | None], None] | None = None
    """Told of the models (files or folders) and of the state of each save, as uploads are."""
    retention: Retention = field(default_factory=Retention)
    clock: Callable[[], float] = time.monotonic
    """Seconds, for `--save_every_n_minutes`."""
    share: Callable[[int], int] | None = None
    """Gives every rank the main rank's number; None where there is one rank only."""
    last_saved: float | None = field(default=None, init=False)
    """By the clock; None before the first update of this process."""
    _due: tuple[int, list[Moment]] = field(default=(0, []), init=False)
    """An update, and what is to be saved after it."""

    def due(self, progress: Progress) -> list[Moment]:
        """What is to be saved after an update; every rank gets the same answer, however often it asks."""
        if self._due[0] != progress.step:
            due = self.intervals.due(progress, self.end_epoch)
            if self._minutes_passed(progress.step) and not due:
                due = [("step", progress.step)]
            self._due = progress.step, due
        return self._due[1]

    def _minutes_passed(self, step: int) -> bool:
        """By the clock of the first process, which saves; the others are asked along now and then."""
        minutes, now = self.intervals.every_n_minutes, self.clock()
        if self.last_saved is None:
            self.last_saved = now
        passed = minutes is not None and now - self.last_saved >= 60 * minutes
        if self.share is None or minutes is None:
            return passed
        return step % ASK_OTHERS_EVERY == 0 and bool(self.share(int(passed)))

    def __call__(self, progress: Progress) -> None:
        """Save where it is due, then delete what is old."""
        due = self.due(progress)
        if not self.is_main:
            return
        for moment in due:
            self.save(self.names.stem(moment), progress, state=self.intervals.state)
            self.last_saved = self.clock()
            if gone := self.retention.delete(self.names, moment, logger.warning):
                self.report.message(f"deleted {', '.join(path.name for path in gone)}")

    def save(self, stem: str, progress: Progress, *, state: bool) -> None:
        """Write the model file, and a state if asked."""
        if not self.is_main:
            return
        path = self.names.model(stem)
        average = {} if self.parts.ema is None else self.parts.ema.tensors
        if not all_finite([*self.parts.trainable.tensors().values(), *average.values()]):
            raise RunError(
                f"{path}: not written, the weights at step {progress.step} are not finite; go back to an earlier save "
                "and use a lower learning rate"
            )
        with self.report.untimed():
            models, written = self.write(stem, progress, state=state)
        self.report.message(f"saved {' and '.join(map(str, [*models, *([written] if written else [])]))}")
        if self.saved is not None:
            with self.report.untimed():
                self.saved(models, written)

    def write(self, stem: str, progress: Progress, *, state: bool) -> tuple[list[Path], Path | None]:
        """Write what a save has; the models' files, and the state's folder."""
        path, ema, told = self.names.model(stem), self.parts.ema, self.metadata(progress)
        with InferenceWeights(self.parts.trainable, self.parts.optimizer).for_inference():
            self.export(self.parts.trainable, path, told, None)
            if ema is not None:
                own = {**told, "ss_ema_decay": str(ema.decay)}
                self.export(self.parts.trainable, self.names.average(stem), own, ema.tensors)
        if state:
            save_state(self.names.state(stem), progress, self.parts)
        models = [path, *([self.names.average(stem)] if ema else [])]
        return models, self.names.state(stem) if state else None

    def now(self, progress: Progress) -> None:
        """A model file and a state, because somebody asks for them."""
        self.save(self.names.at_step(progress.step), progress, state=True)

    def best(self, progress: Progress) -> None:
        """The file of the lowest validation loss, in place of the one before; states belong to the regular saves."""
        self.save(self.names.best, progress, state=False)

    def finish(self, progress: Progress) -> None:
        """The final file."""
        self.save(self.names.last, progress, state=self.intervals.state or self.intervals.state_at_end)

    def interrupted(self, progress: Progress) -> None:
        """Stopped early: a model file and a state, so that nothing is lost."""
        stem = self.names.at_step(progress.step)
        self.save(stem, progress, state=True)
        self.report.message(f"stopped at step {progress.step}; go on with --resume {self.names.state(stem)}")
