"""What is saved and when: model files under sd-scripts' names, with states beside them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sd_train.beside import Beside
from sd_train.device import out_of_memory
from sd_train.errors import DiskError, RunError
from sd_train.files import size_of
from sd_train.guard import ASK_OTHERS_EVERY
from sd_train.names import FileNames, Moment
from sd_train.optim.inference import InferenceWeights
from sd_train.report import Report
from sd_train.retention import Retention
from sd_train.room import OnDiskFull, Room
from sd_train.save_copy import MOST_COPIED, AsyncSave, CopyMemory, SaveCopy, copied_bytes
from sd_train.save_forms import Export, save_own
from sd_train.snapshot import all_finite
from sd_train.state import StateParts, order_of, save_state, state_bytes, write_state
from sd_train.types import Progress

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3
"""Tries of the last save where the disk refuses for another reason than that it is full."""

Ended = Callable[[RunError | None], None]
"""Told that a save is whole, or why the disk has refused it or there was no memory to write it."""


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
    and under the name of its update; so is what finds no memory to be written beside the training, without a copy.
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
    async_save: AsyncSave = "never"
    """Whether saves are written beside the training; "auto": where the copy has at most `MOST_COPIED` bytes."""
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
        # What is being written may be what is wanted.
        wanted = wanted and not self._beside.busy
        if self.share is None:
            return wanted
        return step % ASK_OTHERS_EVERY == 0 and bool(self.share(int(wanted)))

    def __post_init__(self) -> None:
        self.room = Room(self.names.folder, self.clock)
        self._owed: bool | None = None
        """Whether the save that the disk has refused has a state; None: none is owed."""
        self._beside, self._memory = Beside(), CopyMemory()
        self._copy: SaveCopy | None = None

    def __enter__(self) -> Checkpoint:
        self._beside.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._beside.__exit__(kind, *rest)

    def __call__(self, progress: Progress) -> None:
        """Save where it is due, then delete what is old."""
        due = self.due(progress)
        if not self.is_main:
            return
        self._beside.collect()
        # A state that the disk has refused is made good with whatever is saved next.
        state = self.intervals.state or bool(self._owed)
        for moment in due:
            self._try(self.names.stem(moment), progress, state, moment)

    def _try(self, stem: str, progress: Progress, state: bool, moment: Moment | None = None) -> None:
        """Save, if the disk lets us; a refusal is told once and remembered. `moment`: when that was due."""
        step = progress.step

        def ended(problem: RunError | None) -> None:
            if problem is None:
                self._owed = None if state or not self._owed else self._owed
                self.last_saved = self.last_saved if moment is None else self.clock()
                return
            if self._owed is None:
                logger.warning(
                    "%s\n  not saved after update %d; the training goes on, and saves as soon as there is room",
                    problem, step,
                )  # fmt: skip
            self._owed = state or bool(self._owed)

        self._begin(stem, progress, state, moment, ended)

    def _begin(self, stem: str, progress: Progress, state: bool, moment: Moment | None, ended: Ended) -> None:
        """Save, beside the training where that is chosen; `ended` is then told after a later update.

        Raises:
            RunError: if the weights are not finite.
        """
        if not self.is_main:
            return
        try:
            copy = self._copied(stem, progress, state)
            if copy is None:
                self.save(stem, progress, state=state)
        except DiskError as problem:
            ended(problem)
            return
        if copy is None:
            self._delete_old(moment, state)
            ended(None)
            return
        told, saved = self.metadata(progress), list[tuple[list[Path], Path | None]]()
        put_state = partial(write_state, content=copy.state) if state and copy.state else None

        def work() -> None:
            copy.ready()
            saved.append(self._refusable(lambda: self._write(stem, told, copy, put_state)))
            self._tell(*saved[0])
            self._delete_old(moment, state)

        def over(problem: Exception | None) -> None:
            if problem is not None and not isinstance(problem, DiskError):
                if not out_of_memory(problem):
                    raise problem
                self._without_copies()
                problem = RunError(f"{self.names.model(stem)}: not written, no memory for it beside the training")
            if problem is None:
                self._upload(*saved[0])
            ended(problem)

        self._beside.add(work, over)

    def _copied(self, stem: str, progress: Progress, state: bool) -> SaveCopy | None:
        """A copy to write; None where the training is to wait for the save. What was saved earlier is whole then.

        Raises:
            RunError: as `save`.
            DiskError: if there is no room.
        """
        chosen = self.async_save
        if chosen == "never" or (chosen == "auto" and copied_bytes(self.parts, state) > MOST_COPIED):
            self._beside.settle()
            return None
        with self.report.untimed():
            # What is saved after the same update is written from the same copy.
            if not self._beside.busy or self._copy is None or self._copy.step != progress.step:
                self._beside.settle()
                self._copy = None
                if self.async_save != chosen:
                    # What was saved before had not found the memory.
                    return None
            self._check(stem, progress, state)
            try:
                copy = self._copy or self._memory.take(self.parts, progress)
                if state and copy.state is None:
                    copy = self._memory.with_state(copy, self.parts, progress)
            except (RuntimeError, MemoryError) as problem:
                if not out_of_memory(problem):
                    raise
                self._beside.settle()
                self._without_copies()
                return None
            self._copy = copy
        return copy

    def _without_copies(self) -> None:
        """There is no memory for them: from here on the training waits for its saves."""
        if self.async_save != "never":
            logger.warning("no memory for saves beside the training: from here on it waits (--async_save never)")
        self._copy, self.async_save = None, "never"
        self._memory.free()

    def _delete_old(self, moment: Moment | None, state: bool) -> None:
        """Delete what the save of `moment`, which is whole, has made old."""
        if moment is not None and (gone := self.retention.delete(self.names, moment, logger.warning, state)):
            self.report.message(f"deleted {', '.join(path.name for path in gone)}")

    def _needed(self, state: bool) -> int:
        """Bytes of a save."""
        parts = self.parts
        model = self.model_bytes or sum(tensor.nbytes for tensor in parts.trainable.tensors().values())
        return model * (1 if parts.ema is None else 2) + (state_bytes(parts) if state else 0)

    def _check(self, stem: str, progress: Progress, state: bool) -> None:
        """Raise before a byte is written if this save is not to be.

        Raises:
            RunError: if the weights are not finite.
            DiskError: if there is no room.
        """
        path = self.names.model(stem)
        average = {} if self.parts.ema is None else self.parts.ema.tensors
        if not all_finite([*self.parts.trainable.tensors().values(), *average.values()]):
            raise RunError(
                f"{path}: not written, the weights at step {progress.step} are not finite; go back to an earlier save "
                "and use a lower learning rate"
            )
        self.room.check(path, self._needed(state))

    def save(self, stem: str, progress: Progress, *, state: bool) -> None:
        """Write the model file, and a state if asked.

        Raises:
            RunError: if the weights are not finite.
            DiskError: if the disk refuses.
        """
        if not self.is_main:
            return
        self._beside.settle()
        self._check(stem, progress, state)
        with self.report.untimed():
            saved = self._refusable(lambda: self.write(stem, progress, state=state))
        self._tell(*saved)
        self._upload(*saved)

    def _refusable(self, write: Callable[[], tuple[list[Path], Path | None]]) -> tuple[list[Path], Path | None]:
        """What `write` gives; where the disk refuses, it is not asked again at once."""
        try:
            return write()
        except DiskError:
            self.room.refused()
            raise

    def _tell(self, models: Sequence[Path], state: Path | None) -> None:
        self.report.message(f"saved {' and '.join(map(str, [*models, *([state] if state else [])]))}")

    def _upload(self, models: Sequence[Path], state: Path | None) -> None:
        if self.saved is not None:
            with self.report.untimed():
                self.saved(models, state)

    def write(self, stem: str, progress: Progress, *, state: bool) -> tuple[list[Path], Path | None]:
        """Write what a save has; the models' files, and the state's folder.

        Raises:
            DiskError: if the disk refuses.
        """
        parts = self.parts
        put_state = (lambda path: save_state(path, progress, parts)) if state else None
        return self._write(stem, self.metadata(progress), None, put_state)

    def _write(
        self, stem: str, told: Mapping[str, str], copy: SaveCopy | None, put_state: Callable[[Path], None] | None
    ) -> tuple[list[Path], Path | None]:
        """Write a copy, or what lives; `told`: the files' metadata."""
        ema = self.parts.ema
        models = [self.names.model(stem), *([self.names.average(stem)] if ema else [])]
        weights = InferenceWeights(self.parts.trainable, self.parts.optimizer)
        with weights.for_inference() if copy is None else nullcontext():
            self.export(self.parts.trainable, models[0], told, None if copy is None else copy.weights)
            if ema is not None:
                average = {**told, "ss_ema_decay": str(ema.decay)}
                self.export(self.parts.trainable, models[1], average, ema.tensors if copy is None else copy.average)
        with suppress(OSError):
            self.model_bytes = size_of(models[0])
        if put_state is None:
            return models, None
        written = self.names.state(stem)
        put_state(written)
        return models, written

    def now(self, progress: Progress) -> None:
        """A model file and a state, because somebody asks for them."""
        self._try(self.names.at_step(progress.step), progress, True)

    def best(self, progress: Progress) -> None:
        """The file of the lowest validation loss, in place of the one before; states belong to the regular saves."""

        def ended(problem: RunError | None) -> None:
            if problem is not None:
                # Later weights would not be the best ones.
                logger.warning("%s\n  the best weights so far are not saved; the training goes on", problem)

        self._begin(self.names.best, progress, False, None, ended)

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
