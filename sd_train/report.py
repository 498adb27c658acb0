"""What a run says while it trains: the progress bar or lines, and curves, pictures and texts for its trackers.

Nothing here stops a training: what cannot be written is told once, and the training goes on without it.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sd_train.report_console import Console
from sd_train.report_trackers import EventFile, Hyperparameter, Picture, Tracker

OpenTrackers = Callable[[Path | None, str], Sequence[Tracker]]
"""Opens trackers that write into a folder, if there is one; curves lie in its folder of the given name."""
UPDATES_READ_TOGETHER = 10
SECONDS_READ_TOGETHER = 0.5
"""Values stay on their device until so many updates or seconds are waiting; a reading waits for the device."""


def tensorboard(log_dir: Path | None, name: str) -> list[Tracker]:
    """TensorBoard's event file alone."""
    return [] if log_dir is None else [EventFile(log_dir / name)]


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

    `log_dir` is `logging_dir`/`log_prefix`YYYYMMDDHHMMSS as sd-scripts names it; each run of a training has its own.
    The events lie in its folder `tracker_name`.
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
        open_trackers: OpenTrackers = tensorboard,
    ) -> None:
        self._is_main = is_main
        self._total_steps = total_steps
        self._window = LossWindow()
        # A resumed run that was given no state does not know which epoch its first update belongs to.
        self._epoch: int | None = 0 if start_step == 0 else None
        self._waiting: list[_Point] = []
        self._clock = self._last_read = time.monotonic()
        self._console = Console(total_steps, start_step, console) if is_main else None
        self.log_dir: Path | None = None
        if logging_dir is not None and is_main:
            self.log_dir = Path(logging_dir) / f"{log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"
        self._trackers = tuple(open_trackers(self.log_dir, tracker_name)) if is_main else ()
        self._finals: dict[str, float] = {}
        self._shown = start_step
        self.held_back = 0
        """Updates that are not shown yet when the next ones come: what is found out about them may undo them."""
        self._failed = False

    @property
    def tracks(self) -> bool:
        """Whether anyone takes curves."""
        return bool(self._trackers)

    def __enter__(self) -> Report:
        self._clock = self._last_read = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = problem is not None
        # What broke the training may also keep the device from being read; the first error is the one to show.
        with suppress(RuntimeError) if problem is not None else nullcontext():
            self.close()

    def describe(self, config_text: str, hyperparameters: Mapping[str, Hyperparameter]) -> None:
        """Show the resolved configuration, and what the run is compared by; once, before the first update."""
        for tracker in self._trackers:
            tracker.text("config", config_text)
            tracker.hyperparameters(hyperparameters)
            tracker.flush()

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
            self._flush(len(self._waiting) - self.held_back)

    def passed(self, step: int, epoch: int) -> None:
        """Note an update that was left out, for the mean of its epoch."""
        if self._is_main:
            self._waiting.append(_Point(step, epoch, 0, time.time(), {}))

    def flush(self) -> None:
        """Read what is waiting and write it; this waits for the device."""
        self._flush(len(self._waiting))

    def _flush(self, count: int) -> None:
        if count <= 0:
            return
        points, self._waiting = self._waiting[:count], self._waiting[count:]
        _read(points)
        self._last_read = time.monotonic()
        speed = sum(point.samples for point in points) / max(self._last_read - self._clock, 1e-6)
        self._clock = self._last_read
        for point in points:
            values = point.values
            if values:
                values = {"loss/average": self._window.add(float(values["loss/current"])), **values}
                if point is points[-1]:
                    values["samples_per_second"] = speed
            # An update that is computed anew has its point already.
            new, self._shown = point.step > self._shown, max(point.step, self._shown)
            if new and values:
                self._scalars(point.step, point.wall_time, {tag: float(value) for tag, value in values.items()})
            before, self._epoch = self._epoch, point.epoch
            if before is not None and point.epoch > before:
                average = self._window.end_epoch()
                if new:
                    self._scalars(point.step, point.wall_time, {"loss/epoch_average": average}, point.epoch)
        for tracker in self._trackers:
            tracker.flush()
        if self._console is not None:
            self._console.update(points[-1].step, points[-1].epoch, self._window.average, speed)

    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None = None) -> None:
        self._finals |= {tag: value for tag, value in values.items() if tag.startswith("loss/")}
        for tracker in self._trackers:
            tracker.scalars(step, wall_time, values, epoch)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside (sample pictures, saves) does not count in images a second."""
        self.flush()
        started = time.monotonic()
        try:
            yield
        finally:
            self._clock += time.monotonic() - started

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves that do not come with every update, such as a validation's; `step` updates are done."""
        self.flush()
        self._scalars(step, time.time(), values)

    def image(self, tag: str, picture: Picture, step: int) -> None:
        """Show a picture, [height, width, 3]."""
        for tracker in self._trackers:
            tracker.image(tag, picture, step)
            tracker.flush()

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
        """Go on from what `state()` gave; an empty `state` changes nothing. What is waiting was undone: it is not
        shown."""
        self._waiting.clear()
        if state:
            self._epoch = None if state["epoch"] is None else int(state["epoch"])
            self._window.index = int(state["index"])
            self._window.total = float(state["total"])
            self._window.losses = [float(loss) for loss in state["losses"]]

    def close(self) -> None:
        """Write what is waiting and end the bar and the trackers; more calls do nothing."""
        try:
            self.flush()
        finally:
            for tracker in self._trackers:
                tracker.close(self._finals, self._failed)
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
