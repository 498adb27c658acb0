"""Stopping in good order: Ctrl-C or SIGTERM ends the run after the running update, a second Ctrl-C at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

ASK_OTHERS_EVERY = 8
"""Updates."""


class Guard:
    """While it is entered, stop signals are noted instead of ending the process."""

    def __init__(self, agree: Callable[[bool], bool] | None = None) -> None:
        """`agree` tells whether any rank has a flag set; None where there is one rank only."""
        self._agree = agree
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self.stop_requested = False
        self._interrupted = False
        """By Ctrl-C."""

    def __enter__(self) -> Guard:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._noted)
            except ValueError:
                # Only the main thread may set handlers; embedded in another thread the caller has to stop us.
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def should_stop(self, step: int) -> bool:
        """Whether the run is to end after update `step`; all ranks get the same answer."""
        if self._agree is None:
            return self.stop_requested
        # Asking the others waits for them, so it is not done after every update.
        return step % ASK_OTHERS_EVERY == 0 and self._agree(self.stop_requested)

    def _noted(self, number: int, frame: FrameType | None) -> None:
        # Launchers send SIGTERM after a Ctrl-C that their processes have seen themselves: nobody is in a hurry then.
        if self._interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._interrupted = self._interrupted or number == signal.SIGINT
        if self.stop_requested:
            return
        self.stop_requested = True
        # Straight to the terminal: a signal may come in the middle of a print, and a second print would then raise.
        with suppress(OSError):
            os.write(2, b"\nstopping after this update and saving; Ctrl-C again stops at once, without saving\n")
