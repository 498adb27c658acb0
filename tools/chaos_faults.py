"""Faults at chosen moments of a training, for `chaos.py`: kills, signals, disks that refuse. For a process of its own.

A moment is the n-th passing of a place. Places are the methods that an update consists of, and every line of the
modules that save while something is saved. Both are counted alike in every run, so a moment comes again.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import sd_train

Action = Literal["kill", "term", "int", "int twice", "no room", "bad disk"]

PACKAGE = Path(sd_train.__file__).parent
SAVING = (
    "checkpoint.py", "files.py", "names.py", "retention.py", "room.py", "save_copy.py", "state.py",
    "trainables/files.py", "families/streaming.py", "families/layout_folder.py",
)  # fmt: skip
"""The modules whose lines are places."""


@dataclass(frozen=True)
class Moment:
    """The `number`-th passing of a place, from 1."""

    place: str
    number: int
    step: int
    """Updates that were whole by then."""
    saving: bool
    """Whether something was being saved."""


@dataclass
class Faults:
    """Counts passings in this process, and does something at one of them."""

    output: Path
    moment: Moment | None = None
    action: Action = "kill"
    refusals: int = 1
    """How many calls of the disk fail, from that moment on."""
    unreadable: Path | None = None
    """A folder whose files cannot be read."""
    clock: float = 0.0
    """Seconds that the wall clock is wrong by."""
    journal: Path | None = None
    """Gets a line for each file or folder that appears in the output folder, or goes."""
    passed: list[Moment] | None = None
    """Gets every moment, where it is given."""
    after: Callable[[int], None] | None = None
    """Told of each update that has ended."""
    _counts: Counter[str] = field(default_factory=Counter)
    _step: int = 0
    _saving: int = 0
    _refusing: int = 0
    _again: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)
    """What is saved beside the training passes places too."""

    def install(self) -> None:
        """From here on; there is no way back."""
        from sd_train import build, room
        from sd_train.beside import Beside
        from sd_train.checkpoint import Checkpoint
        from sd_train.device import Updater
        from sd_train.names import FileNames
        from sd_train.optim.ema import Ema
        from sd_train.report import Report
        from sd_train.types import Progress

        self._files = {str(PACKAGE / name): name for name in SAVING}
        # What the disk refuses here it takes when it is asked again.
        room.RETRY_SECONDS = 0.0
        passed: list[tuple[Any, str]] = [
            (Updater, "backward"), (Updater, "reduce"), (Updater, "apply"), (Ema, "update"), (Report, "update"),
            (build, "load_family"),
            (build, "make_optimizer"), (build, "fill_caches"), (build, "load_state"),
        ]  # fmt: skip
        for owner, name in passed:
            self._wrap(owner, name, self._passing)
        self._wrap(Progress, "advance", self._advancing)
        watched: list[tuple[Any, str]] = [
            (Checkpoint, "__call__"), (Checkpoint, "finish"), (Checkpoint, "interrupted"), (FileNames, "tidy"),
            (FileNames, "remove_existing"), (build, "write_text"), (Beside, "_do"),
        ]  # fmt: skip
        for owner, name in watched:
            self._wrap(owner, name, self._watching)
        for owner, name in ((Checkpoint, "save"), (Beside, "_do")):
            self._wrap(owner, name, self._in_save)
        for name in ("fsync", "replace", "mkdir"):
            self._wrap(os, name, self._refusable)
        self._wrap(os, "replace", self._journaled)
        self._wrap(os, "unlink", self._journaled)
        real = time.time
        time.time = lambda: real() + self.clock
        if self.unreadable is not None:
            sys.addaudithook(self._opened)

    def _wrap(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        function = getattr(owner, name)
        setattr(owner, name, functools.wraps(function)(functools.partial(wrapper, function, name))
                if owner is os else _method(wrapper, function, name))

    def _passing(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        self._hit(name)
        return function(*arguments, **named)

    def _advancing(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        function(*arguments, **named)
        self._step = arguments[0].step
        if self.after is not None:
            self.after(self._step)
        self._hit(name)

    def _watching(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        outer = sys.gettrace()
        sys.settrace(self._called)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(outer)

    def _in_save(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        with self._lock:
            self._saving += 1
        try:
            return function(*arguments, **named)
        finally:
            with self._lock:
                self._saving -= 1

    def _refusable(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        if self._refusing:
            self._refusing -= 1
            number = errno.ENOSPC if self.action == "no room" else errno.EIO
            raise OSError(number, os.strerror(number))
        return function(*arguments, **named)

    def _journaled(self, function: Callable[..., Any], name: str, *arguments: Any, **named: Any) -> Any:
        # Deleting a folder gives its files relative to a descriptor; they are hidden by then.
        ours = [Path(path) for path in arguments if not named and Path(path).parent == self.output]
        visible = [path for path in ours if not path.name.startswith(".")]
        goes = bool(visible) and visible[0] == Path(arguments[0])
        if goes:
            self._note(f"- {visible[0].name}")
        result = function(*arguments, **named)
        if visible and not goes:
            back = Path(arguments[0]).name.endswith(".old")
            self._note(f"{'=' if back else '+'} {visible[0].name}")
        return result

    def _note(self, line: str) -> None:
        if self.journal is not None:
            with self.journal.open("ab", buffering=0) as file:
                file.write(f"{line}\n".encode())

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = Path(os.fsdecode(arguments[0]))
            if path.parent == self.unreadable and path.suffix == ".safetensors":
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _called(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self._hit(f"{self._files[frame.f_code.co_filename]}:{frame.f_lineno}")
        return self._line

    def _hit(self, place: str) -> None:
        self._counts[place] += 1
        if self.passed is not None:
            self.passed.append(Moment(place, self._counts[place], self._step, self._saving > 0))
        here = self.moment is not None and place == self.moment.place and self._counts[place] == self.moment.number
        if here or self._again:
            self._act()

    def _act(self) -> None:
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "int" | "int twice":
                # The second one comes at the next place.
                self._again = self.action == "int twice" and not self._again
                os.kill(os.getpid(), signal.SIGINT)
            case _:
                self._refusing = self.refusals


def _method(wrapper: Callable[..., Any], function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return wrapper(function, name, *arguments, **named)

    return call
