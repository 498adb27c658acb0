"""Room for saves on the disk: what is free, what a save needs, and when one that failed is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sd_train.errors import DiskError
from sd_train.files import free_bytes

OnDiskFull = Literal["wait", "stop"]

RETRY_SECONDS = 60.0
"""After a save that the disk refused although there seemed to be room, as with quotas."""
LOOKS_EVERY = 2.0
"""Seconds, while the end waits for room."""
SPARE = 1 << 20
"""Bytes beside the tensors: headers, JSON, folders."""


@dataclass
class Room:
    """Whether the next save fits, in the output folder."""

    folder: Path
    clock: Callable[[], float] = time.monotonic
    _not_before: float = field(default=float("-inf"), init=False)
    """By the clock."""

    def check(self, path: Path, needed: int) -> None:
        """Raise before a byte is written if `needed` bytes are not there.

        Raises:
            DiskError: with what is free.
        """
        free = free_bytes(self.folder)
        if free is not None and free < needed + SPARE:
            raise DiskError(
                f"{path}: cannot be written ({in_units(needed + SPARE)} are needed and {in_units(free)} are free); "
                "free space or choose another --output_dir",
                full=True,
            )

    def wait(self) -> None:
        """Let some time pass, before another look."""
        time.sleep(LOOKS_EVERY)

    def refused(self) -> None:
        """The disk has refused a save that should have fitted: not at once again."""
        self._not_before = self.clock() + RETRY_SECONDS

    def may_try(self, needed: int) -> bool:
        """Whether a save that failed may fit by now."""
        free = free_bytes(self.folder)
        return self.clock() >= self._not_before and (free is None or free >= needed + SPARE)


def in_units(count: int) -> str:
    """Bytes, in kB, MB or GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
