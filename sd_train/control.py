"""`output_dir/control`: a file into which commands are written while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sd_train.guard import ASK_OTHERS_EVERY

Order = Literal["save", "sample", "stop", "pause", "resume"]
ORDERS: tuple[Order, ...] = get_args(Order)
_LONGEST = 4096
"""Bytes that are read of the file; the commands are words."""
_LOOKS_EVERY = 0.5
"""Seconds, while a run is paused."""


@dataclass
class Control:
    """Reads commands from a file, one a line, after an update; the file is then deleted.

    All ranks get the same ones: the first reads, `share` tells the others.
    """

    path: Path
    say: Callable[[str], None]
    """Told of each command."""
    is_main: bool = True
    share: Callable[[int], int] | None = None
    """Gives every rank the main rank's number; None where there is one rank only."""
    sleep: Callable[[float], None] = time.sleep
    _refused: bool = field(default=False, init=False)
    """Whether the file could not be read or deleted, which is told once."""

    def orders(self, step: int) -> list[Order]:
        """The commands to be followed after update `step`, each once, in the order of `ORDERS`."""
        if self.share is not None and step % ASK_OTHERS_EVERY:
            return []
        found = self._read(step) if self.is_main else []
        if self.share is None:
            return found
        told = self.share(sum(1 << ORDERS.index(order) for order in found))
        return [order for place, order in enumerate(ORDERS) if told >> place & 1]

    def wait(self, step: int, stopped: Callable[[], bool]) -> list[Order]:
        """Wait until a command or `stopped` ends the pause; the commands that came with the end."""
        if self.is_main:
            self.say(f"paused after update {step}; write resume or stop into {self.path}")
        while True:
            found = self._read(step) if self.is_main else []
            ends = self.is_main and (stopped() or bool({"resume", "stop"} & {*found}))
            code = int(ends) << len(ORDERS) | sum(1 << ORDERS.index(order) for order in found)
            told = code if self.share is None else self.share(code)
            if told >> len(ORDERS):
                return [order for place, order in enumerate(ORDERS) if told >> place & 1 and order != "pause"]
            self.sleep(_LOOKS_EVERY)

    def _read(self, step: int) -> list[Order]:
        """What the file says; it is gone afterwards."""
        try:
            with self.path.open("rb") as file:
                text = file.read(_LONGEST).decode("utf-8", "replace")
            self.path.unlink()
        except FileNotFoundError:
            return []
        except OSError as problem:
            if not self._refused:
                self.say(f"{self.path}: cannot be read and deleted ({problem.strerror}); nothing of it is done")
            self._refused = True
            return []
        words = text.lower().replace(",", " ").split()
        for word in words:
            if word not in ORDERS:
                self.say(f"{self.path}: {word[:40]!r} is no command; use one of {', '.join(ORDERS)}")
        orders = [order for order in ORDERS if order in words]
        if orders:
            self.say(f"control file after update {step}: {', '.join(orders)}")
        return orders


def forget_orders(path: Path, say: Callable[[str], None]) -> None:
    """Delete what was written before the run began: nobody meant this run."""
    if not path.is_file():
        return
    try:
        path.unlink()
    except OSError as problem:
        say(f"{path}: was there before the run, cannot be deleted ({problem.strerror}) and is not followed")
    else:
        say(f"{path}: was there before the run began, and is deleted")
