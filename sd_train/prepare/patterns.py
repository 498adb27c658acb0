"""Users' regular expressions: wrong ones are named, and none runs for ever."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sd_train.errors import ConfigError, Problems

SECONDS = 2.0
"""That one text may take; what is sound takes microseconds."""
_SHOWN = 60


def compile_pattern(where: str, text: str, problems: Problems, flags: int = 0) -> re.Pattern[str] | None:
    """The regular expression `text`; None, noted, if it is none."""
    try:
        return re.compile(text, flags)
    except (re.error, OverflowError, RecursionError) as problem:
        problems.add(where, text, f"is no regular expression ({problem})", "a \\ before a sign takes it as it is")
        return None


def check_replacement(where: str, pattern: re.Pattern[str], text: str, problems: Problems) -> None:
    """Note a replacement that names groups that `pattern` does not have."""
    try:
        pattern.sub(text, "")
    except (re.error, IndexError) as problem:
        rule = f"is no replacement for {pattern.pattern!r} ({problem})"
        problems.add(where, text, rule, "\\1 is the pattern's first group, \\\\ a backslash")


class _TooLong(Exception):
    """Raised where the regular expression stands when its time is over."""


@contextmanager
def limited(text: str) -> Iterator[None]:
    """Stop the block, which matches patterns on `text`, when it takes too long.

    Only the main thread can be stopped, and not on Windows.

    Raises:
        ConfigError: if it was stopped.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except _TooLong:
        start = text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")
        raise ConfigError(
            f"a regular expression takes more than {SECONDS:.0f} seconds on {start!r}; write it without repetitions "
            "inside of repetitions, such as (a+)+"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
