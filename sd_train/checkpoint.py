"""What is saved and when: model files under sd-scripts' names, with states beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd_train.errors import DiskError, RunError
from sd_train.families.sources import CastSource, DictSource
from sd_train.families.streaming import write_tensors
from sd_train.files import size_of
from sd_train.guard import ASK_OTHERS_EVERY
from sd_train.lora_files.writing import to_diffusers
from sd_train.names import FileNames, Moment
from sd_train.optim.inference import InferenceWeights
from sd_train.report import Report
from sd_train.retention import Retention
from sd_train.room import OnDiskFull, Room
from sd_train.snapshot import all_finite
from sd_train.state import StateParts, order_of, save_state, state_bytes
from sd_train.trainables.base import Trainable
from sd_train.types import Progress

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Tries of the last save where the disk refuses for another reason than that it is full."""

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
        written = CastSource(DictSource(content.tensors), dtype)
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
    """Writes what is due after an update.

    What the disk refuses while the training goes on is saved as soon as there is room, with the weights of that time
    and under the name of its update.
    """

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
    on_disk_full: OnDiskFull = "wait"
    """What the end of the training does."""
    model_bytes: int = 0
    """Of a saved file, as far as is known before the first."""
    stopping: Callable[[], bool] = lambda: False
    """Whether somebody asks for the end, as with Ctrl-C."""
    last_saved: float | None = field(default=None, init=False)
    """By the clock; None before the first update of this process."""
    _due: tuple[int, list[Moment]] = field(default=(0, []), init=False)
    """An update, and what is to be saved after it."""

    def due(self, progress: Progress) -> list[Moment]:
        """What is to be saved after an update; every rank gets the same answer, however often it asks."""
        if self._due[0] != progress.step:
            due = self.intervals.due(progress, self.end_epoch)
            if self._wanted(progress.step) and not due:
                due = [("step", progress.step)]
            self._due = progress.step, due
        return self._due[1]

    def _wanted(self, step: int) -> bool:
        """Whether the minutes have passed, or there is room for what the disk has refused; the first process, which
        saves, decides, and the others are told now and then."""
        minutes, now = self.intervals.every_n_minutes, self.clock()
        if self.last_saved is None:
            self.last_saved = now
        wanted = minutes is not None and now - self.last_saved >= 60 * minutes
        wanted = wanted or (self._owed is not None and self.room.may_try(self._needed(self._owed)))
        if self.share is None:
            return wanted
        return step % ASK_OTHERS_EVERY == 0 and bool(self.share(int(wanted)))

    def __post_init__(self) -> None:
        self.room = Room(self.names.folder, self.clock)
        self._owed: bool | None = None
        """Whether the save that the disk has refused has a state; None: none is owed."""

    def __call__(self, progress: Progress) -> None:
        """Save where it is due, then delete what is old."""
        due = self.due(progress)
        if not self.is_main:
            return
        # A state that the disk has refused is made good with whatever is saved next.
        state = self.intervals.state or bool(self._owed)
        for moment in due:
            if self._try(self.names.stem(moment), progress, state=state):
                self.last_saved = self.clock()
                if gone := self.retention.delete(self.names, moment, logger.warning, state):
                    self.report.message(f"deleted {', '.join(path.name for path in gone)}")

    def _try(self, stem: str, progress: Progress, *, state: bool) -> bool:
        """Save, if the disk lets us; a refusal is told once and remembered."""
        try:
            self.save(stem, progress, state=state)
        except DiskError as problem:
            if self._owed is None:
                logger.warning(
                    "%s\n  not saved after update %d; the training goes on, and saves as soon as there is room",
                    problem, progress.step,
                )  # fmt: skip
            self._owed = state or bool(self._owed)
            return False
        self._owed = None if state or not self._owed else self._owed
        return True

    def _needed(self, state: bool) -> int:
        """Bytes of a save."""
        parts = self.parts
        model = self.model_bytes or sum(tensor.nbytes for tensor in parts.trainable.tensors().values())
        return model * (1 if parts.ema is None else 2) + (state_bytes(parts) if state else 0)

    def save(self, stem: str, progress: Progress, *, state: bool) -> None:
        """Write the model file, and a state if asked.

        Raises:
            RunError: if the weights are not finite.
            DiskError: if the disk refuses.
        """
        if not self.is_main:
            return
        path = self.names.model(stem)
        average = {} if self.parts.ema is None else self.parts.ema.tensors
        if not all_finite([*self.parts.trainable.tensors().values(), *average.values()]):
            raise RunError(
                f"{path}: not written, the weights at step {progress.step} are not finite; go back to an earlier save "
                "and use a lower learning rate"
            )
        self.room.check(path, self._needed(state))
        with self.report.untimed():
            try:
                models, written = self.write(stem, progress, state=state)
            except DiskError:
                self.room.refused()
                raise
        self.report.message(f"saved {' and '.join(map(str, [*models, *([written] if written else [])]))}")
        if self.saved is not None:
            with self.report.untimed():
                self.saved(models, written)

    def write(self, stem: str, progress: Progress, *, state: bool) -> tuple[list[Path], Path | None]:
        """Write what a save has; the models' files, and the state's folder.

        Raises:
            DiskError: if the disk refuses.
        """
        ema, told = self.parts.ema, self.metadata(progress)
        models = [self.names.model(stem), *([self.names.average(stem)] if ema else [])]
        with InferenceWeights(self.parts.trainable, self.parts.optimizer).for_inference():
            self.export(self.parts.trainable, models[0], told, None)
            if ema is not None:
                average = {**told, "ss_ema_decay": str(ema.decay)}
                self.export(self.parts.trainable, models[1], average, ema.tensors)
        with suppress(OSError):
            self.model_bytes = size_of(models[0])
        if not state:
            return models, None
        written = self.names.state(stem)
        save_state(written, progress, self.parts)
        return models, written

    def now(self, progress: Progress) -> None:
        """A model file and a state, because somebody asks for them."""
        self._try(self.names.at_step(progress.step), progress, state=True)

    def best(self, progress: Progress) -> None:
        """The file of the lowest validation loss, in place of the one before; states belong to the regular saves."""
        try:
            self.save(self.names.best, progress, state=False)
        except DiskError as problem:
            # Later weights would not be the best ones.
            logger.warning("%s\n  the best weights so far are not saved; the training goes on", problem)

    def finish(self, progress: Progress) -> None:
        """The final file."""
        self._at_the_end(self.names.last, progress, state=self.intervals.state or self.intervals.state_at_end)

    def interrupted(self, progress: Progress) -> None:
        """Stopped early: a model file and a state, so that nothing is lost."""
        stem = self.names.at_step(progress.step)
        self._at_the_end(stem, progress, state=True)
        self.report.message(f"stopped at step {progress.step}; go on with --resume {self.names.state(stem)}")

    def _at_the_end(self, stem: str, progress: Progress, *, state: bool) -> None:
        """Save; where room is all that lacks, wait for it if that is wanted.

        Raises:
            DiskError: if there is none, or somebody gives up waiting.
        """
        asked, waits, failed = self.stopping(), False, 0
        while True:
            try:
                self.save(stem, progress, state=state)
            except DiskError as problem:
                gives_up = self.stopping() and not asked
                # A disk across a network may be away for a moment.
                failed += not problem.full
                if failed >= _MOST_FAILURES or self.on_disk_full == "stop" or gives_up:
                    raise self._unsaved(problem, progress) from None
                if not waits:
                    what = "waiting for room" if problem.full else "trying again"
                    logger.warning("%s\n  %s; Ctrl-C gives up what is not saved", problem, what)
                waits = True
            else:
                return
            self.room.wait()
            while not self.room.may_try(self._needed(state)) and (asked or not self.stopping()):
                self.room.wait()

    def _unsaved(self, problem: DiskError, progress: Progress) -> DiskError:
        """The same problem, and what is left to go on from."""
        states = sorted(self.names.states(), key=order_of)
        onward = f"then go on with --resume {states[-1]}" if states else "no state of this training was saved"
        return DiskError(f"{problem}; the weights of update {progress.step} are lost; {onward}", full=problem.full)
