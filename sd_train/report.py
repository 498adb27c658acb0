"""What a run says while it trains: the progress bar, the lines of a log file, TensorBoard's curves and pictures.

Nothing here stops a training: what cannot be written is told once, and the training goes on without it.
"""

from __future__ import annotations

import io
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sd_train.errors import RunError

logger = logging.getLogger(__name__)

UPDATES_READ_TOGETHER = 10
SECONDS_READ_TOGETHER = 0.5
"""Values stay on their device until so many updates or seconds are waiting; a reading waits for the device."""
SECONDS_BETWEEN_LINES = 30.0
UPDATES_NOT_FINITE = 20
"""With fp16 a few in a row are harmless: their updates are skipped."""
"""Where there is no terminal: a line at least this often, and at every tenth of the training."""


class LossWindow:
    """Mean loss over the last epoch's worth of updates, as sd-scripts' `LossRecorder` has it.

    In the first epoch it holds every loss so far; later each loss takes the place of the one at the same position of
    the epoch before.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.index = 0
        self.total = 0.0

    def add(self, loss: float) -> float:
        """Take in the next update's loss; the mean after it."""
        if self.index < len(self.losses):
            self.total += loss - self.losses[self.index]
            self.losses[self.index] = loss
        else:
            self.total += loss
            self.losses.append(loss)
        self.index += 1
        if not math.isfinite(self.total):
            # Subtracting does not take a NaN back out of a sum.
            self.total = sum(self.losses)
        return self.average

    def end_epoch(self) -> float:
        """The mean over the epoch that ends here."""
        del self.losses[self.index :]
        self.index = 0
        self.total = sum(self.losses)
        return self.average

    @property
    def average(self) -> float:
        return self.total / len(self.losses) if self.losses else 0.0


class EventFile:
    """A TensorBoard event file that warns once and falls silent when it cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None
        with self._harmless():
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            folder.mkdir(parents=True, exist_ok=True)
            # Nanoseconds tell two runs of the same second apart.
            self._file = (folder / f"events.out.tfevents.{time.time_ns()}").open("xb")
            self._records = RecordWriter(self._file)
            self._event, self._summary = event_pb2.Event, summary_pb2.Summary
            self._records.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self.flush()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        # A full disk, a missing package, a protobuf that does not fit: whatever breaks the log must not end a training
        # of many hours, so every exception is taken here.
        try:
            yield
        except Exception as problem:
            logger.warning(
                "TensorBoard: %s cannot be written (%s: %s); the training goes on without it%s",
                self.folder,
                type(problem).__name__,
                problem,
                "; pip install tensorboard" if isinstance(problem, ImportError) else "",
            )
            self._file = None

    def scalars(self, step: int, wall_time: float, values: Mapping[str, float]) -> None:
        """One point for each of `values`, at `step`."""
        if self._file is None:
            return
        with self._harmless():
            points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            event = self._event(wall_time=wall_time, step=step, summary=self._summary(value=points))
            self._records.write(event.SerializeToString())

    def image(self, tag: str, picture: np.ndarray[Any, np.dtype[np.uint8]], step: int) -> None:
        """One picture, [height, width, 3]."""
        if self._file is None:
            return
        with self._harmless():
            from PIL import Image

            stored = io.BytesIO()
            Image.fromarray(picture).save(stored, format="PNG")
            height, width, channels = picture.shape
            value = self._summary.Image(
                height=height, width=width, colorspace=channels, encoded_image_string=stored.getvalue()
            )
            summary = self._summary(value=[self._summary.Value(tag=tag, image=value)])
            self._records.write(self._event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def flush(self) -> None:
        if self._file is not None:
            with self._harmless():
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with self._harmless():
                self._file.close()
            self._file = None


class Console:
    """A progress bar where standard error is a terminal, otherwise a line now and then; messages either way."""

    def __init__(self, total_steps: int, start_step: int, progress: bool) -> None:
        self._progress = progress
        self._total = max(total_steps, 1)
        self._start = self._last_step = start_step
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        if progress and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=start_step, desc="steps", dynamic_ncols=True, file=sys.stderr)

    def update(self, step: int, epoch: int, average: float, speed: float) -> None:
        """`step` updates and `epoch` epochs are done, of late at `speed` images a second."""
        facts = f"avr_loss={average:.4f}, images/s={speed:.2f}"
        if self._bar is not None:
            with self._harmless():
                self._bar.set_postfix_str(facts, refresh=False)
                self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        tenth = step * 10 // self._total > self._last_step * 10 // self._total
        if not self._progress or not (tenth or now - self._last_line >= SECONDS_BETWEEN_LINES):
            return
        remaining = (now - self._started) / max(step - self._start, 1) * max(self._total - step, 0)
        self.write(f"step {step}/{self._total}, {epoch} epochs done: {facts}, {_clock(remaining)} left")
        self._last_step, self._last_line = step, now

    def write(self, text: str) -> None:
        """A line of its own, above the bar."""
        with self._harmless():
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            else:
                print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            with self._harmless():
                self._bar.close()
            self._bar = None

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        # The terminal of a long training may be closed; ValueError is Python's word for a closed stream.
        with suppress(OSError, ValueError):
            yield


@dataclass
class _Point:
    """One update, its values perhaps still on the device."""

    step: int
    epoch: int
    samples: int
    wall_time: float
    values: dict[str, float | Tensor]


class Report:
    """Takes what every update gives and shows it; a context manager.

    `log_dir` is `logging_dir`/`log_prefix`YYYYMMDDHHMMSS as sd-scripts names it; the events lie in its folder
    `tracker_name`.
    """

    def __init__(
        self,
        *,
        logging_dir: Path | None,
        log_prefix: str | None = None,
        total_steps: int,
        start_step: int = 0,
        console: bool = True,
        is_main: bool = True,
        tracker_name: str = "network_train",
    ) -> None:
        self._is_main = is_main
        self._not_finite = 0
        self._total_steps = total_steps
        self._window = LossWindow()
        # A resumed run that was given no state does not know which epoch its first update belongs to.
        self._epoch: int | None = 0 if start_step == 0 else None
        self._waiting: list[_Point] = []
        self._clock = self._last_read = time.monotonic()
        self._console = Console(total_steps, start_step, console) if is_main else None
        self.log_dir: Path | None = None
        self._events: EventFile | None = None
        if logging_dir is not None and is_main:
            self.log_dir = Path(logging_dir) / f"{log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
            self._events = EventFile(self.log_dir / tracker_name)

    def __enter__(self) -> Report:
        self._clock = self._last_read = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What broke the training may also keep the device from being read; the first error is the one to show.
        with suppress(RuntimeError) if problem is not None else nullcontext():
            self.close()

    def update(
        self,
        step: int,
        epoch: int,
        samples: int,
        loss: Tensor | float,
        rates: Mapping[str, float],
        grad_norm: Tensor | float | None = None,
        extra: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Note an update, without waiting for the device.

        Args:
            step: updates done, this one included.
            epoch: whole epochs done; when it grows, this update was its epoch's last.
            samples: images of this update.
            loss: mean loss of this update, without dimensions; a device tensor must not be written to afterwards.
            rates: learning rate by parameter group, shown as `lr/<group>`.
            grad_norm: before clipping.
            extra: more curves, by their full names.
        """
        if not self._is_main:
            return
        values = {"loss/current": loss, **{f"lr/{name}": rate for name, rate in rates.items()}, **(extra or {})}
        if grad_norm is not None:
            values["grad_norm"] = grad_norm
        self._waiting.append(_Point(step, epoch, samples, time.time(), {k: _kept(v) for k, v in values.items()}))
        waited = time.monotonic() - self._last_read
        enough = len(self._waiting) >= UPDATES_READ_TOGETHER or waited >= SECONDS_READ_TOGETHER
        if enough or step >= self._total_steps:
            self.flush()

    def flush(self) -> None:
        """Read what is waiting and write it; this waits for the device."""
        if not self._waiting:
            return
        points, self._waiting = self._waiting, []
        _read(points)
        self._last_read = time.monotonic()
        speed = sum(point.samples for point in points) / max(self._last_read - self._clock, 1e-6)
        self._clock = self._last_read
        for point in points:
            self._not_finite = 0 if math.isfinite(float(point.values["loss/current"])) else self._not_finite + 1
            values = {"loss/average": self._window.add(float(point.values["loss/current"])), **point.values}
            if point is points[-1]:
                values["samples_per_second"] = speed
            self._scalars(point.step, point.wall_time, values)
            before, self._epoch = self._epoch, point.epoch
            if before is not None and point.epoch > before:
                average = self._window.end_epoch()
                self._scalars(point.epoch, point.wall_time, {"loss/epoch_average": average})
        if self._events is not None:
            self._events.flush()
        if self._console is not None:
            self._console.update(points[-1].step, points[-1].epoch, self._window.average, speed)

    def check(self) -> None:
        """Call after `update`.

        Raises:
            RunError: when the loss has not been finite for so long that it will not become so again.
        """
        if self._not_finite >= UPDATES_NOT_FINITE:
            raise RunError(
                f"the loss has not been finite for {self._not_finite} updates: the training has diverged; "
                "go back to an earlier save and use a lower learning rate"
            )

    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float | Tensor]) -> None:
        if self._events is not None:
            self._events.scalars(step, wall_time, {name: float(value) for name, value in values.items()})

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside (sample pictures, saves) does not count in images a second."""
        self.flush()
        started = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - started

    def image(self, tag: str, picture: np.ndarray[Any, np.dtype[np.uint8]], step: int) -> None:
        """Show a picture, [height, width, 3], in TensorBoard."""
        if self._events is not None:
            self._events.image(tag, picture, step)
            self._events.flush()

    def message(self, text: str) -> None:
        """A line on standard error, which leaves the progress bar whole."""
        if self._console is not None:
            self._console.write(text)

    def state(self) -> dict[str, Any]:
        """What the curves need to go on after a resume, as JSON values."""
        self.flush()
        window = self._window
        return {"epoch": self._epoch, "index": window.index, "total": window.total, "losses": list(window.losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` gave; an empty `state` changes nothing."""
        if state:
            self._epoch = None if state["epoch"] is None else int(state["epoch"])
            self._window.index = int(state["index"])
            self._window.total = float(state["total"])
            self._window.losses = [float(loss) for loss in state["losses"]]

    def close(self) -> None:
        """Write what is waiting and end the bar and the file; more calls do nothing."""
        try:
            self.flush()
        finally:
            if self._events is not None:
                self._events.close()
            if self._console is not None:
                self._console.close()


def warn_line(text: str) -> None:
    """A warning on standard error, outside of any progress bar."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def say_line(text: str) -> None:
    """A line on standard output, outside of any progress bar."""
    print(text, flush=True)


def _kept(value: Tensor | float) -> Tensor | float:
    """A tensor on the CPU as a number, which costs nothing; one on a device as it is, without its graph."""
    if not isinstance(value, Tensor):
        return value
    return float(value.item()) if value.device.type == "cpu" else value.detach()


def _read(points: list[_Point]) -> None:
    """Turn every device tensor of `points` into a number, with one transfer."""
    places = [(p.values, name) for p in points for name, value in p.values.items() if isinstance(value, Tensor)]
    if places:
        tensors = [torch.as_tensor(values[name]).float().reshape(()) for values, name in places]
        for (values, name), number in zip(places, torch.stack(tensors).tolist(), strict=True):
            values[name] = number


def _clock(seconds: float) -> str:
    """3661 -> 1:01:01."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
