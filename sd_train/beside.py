"""Work that is done beside the training, one piece after another; what comes of it is told between two updates."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field


@dataclass
class _Job:
    """One piece of work."""

    work: Callable[[], None]
    ended: Callable[[Exception | None], None]
    before: _Job | None
    """The piece that was given before it, if that was still to be done."""
    problem: BaseException | None = None
    thread: threading.Thread = field(init=False)


class Beside:
    """Does one piece of work after another in threads of its own; a context manager that waits for all of it.

    Everything is called by the training's thread.
    """

    def __init__(self) -> None:
        self._jobs: list[_Job] = []
        self._given_up = False

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
            elif issubclass(kind, Exception):
                # What is being saved is from before it; and what broke the training is the problem to show.
                with suppress(Exception):
                    self.settle()
        except KeyboardInterrupt:
            self.interrupt()
            raise
        if kind is not None and not issubclass(kind, Exception):
            self.interrupt()

    @property
    def busy(self) -> bool:
        """Whether there is work that `collect` has not told of."""
        return bool(self._jobs)

    def add(self, work: Callable[[], None], ended: Callable[[Exception | None], None]) -> None:
        """Do `work` after what was given before; `ended`, told what it raised, is called by `collect` or `settle`."""
        job = _Job(work, ended, self._jobs[-1] if self._jobs else None)
        # A daemon: who cannot wait even for what `interrupt` waits for may end the process.
        job.thread = threading.Thread(target=self._do, args=(job,), name="saves", daemon=True)
        job.thread.start()
        # Not before: one that the system does not let start is none to wait for.
        self._jobs.append(job)

    def _do(self, job: _Job) -> None:
        try:
            if job.before is not None:
                job.before.thread.join()
                job.before = None
            if not self._given_up:
                job.work()
        except BaseException as problem:
            job.problem = problem

    def collect(self) -> None:
        """Tell of what has ended.

        Raises:
            Exception: what `ended` makes of what the work raised.
        """
        while self._jobs and not self._jobs[0].thread.is_alive():
            job = self._jobs.pop(0)
            problem = job.problem
            if problem is not None and not isinstance(problem, Exception):
                raise problem
            job.ended(problem)

    def settle(self) -> None:
        """Wait for all of it, and tell of it.

        Raises:
            Exception: as `collect`; the first one, when nothing is left to wait for.
        """
        first: Exception | None = None
        while self._jobs:
            self._jobs[0].thread.join()
            try:
                self.collect()
            except Exception as problem:
                first = problem if first is None else first
        if first is not None:
            raise first

    def interrupt(self) -> None:
        """End the work as Ctrl-C would end it in the training's own thread, and wait until it has cleaned up."""
        self._given_up = True
        for job in self._jobs:
            number = job.thread.ident
            if job.thread.is_alive() and job.before is None and number is not None:
                # Of this one a thread says nothing, should it have come to its end meanwhile.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(SystemExit))
            job.thread.join()
