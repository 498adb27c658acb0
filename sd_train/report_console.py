"""The progress bar, or lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal: a line at least this often, and at every tenth of the training."""


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
        # Uploads speak from another thread: the bar may end between two lines.
        bar = self._bar
        with self._harmless():
            if bar is not None:
                bar.write(text, file=sys.stderr)
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


def _clock(seconds: float) -> str:
    """3661 -> 1:01:01."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
