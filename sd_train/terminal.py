"""What is printed reaches the terminal as text: captions, names and metadata of files cannot steer it."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_STEERING = re.compile(
    "[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    # Back to the start of the line is what progress bars begin and end with; inside, it hides what stands before.
    "|(?<=[^\r])\r(?=[^\r\n])"
)
"""Control characters (C0 but for tab and line break, DEL, C1) and those that change the direction of the text."""


def escaped(text: str) -> str:
    r"""`text` with control characters as in JSON, `\u001b`; line breaks and tabs stay."""
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Plain:
    """A stream in whose text control characters are escaped; everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(escaped(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def plain_streams() -> Iterator[None]:
    """While the block runs standard output and standard error take any text, and none steers the terminal."""
    before = sys.stdout, sys.stderr
    for stream in before:
        # Captions and file names may hold what a console or a log file cannot; that is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Without a terminal, as under pythonw, there may be no stream at all.
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, _Plain) else cast(TextIO, _Plain(stream)) for stream in before
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
