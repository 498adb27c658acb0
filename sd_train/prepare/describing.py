"""What captioning and tagging have in common: which images are to be described, opened ahead in batches, and the text
files beside them."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sd_train.config.textfile import printable
from sd_train.errors import DataError, DiskError, Problems
from sd_train.files import write_text

BROKEN = 3
"""Exit code where images were left out because they cannot be read, or their text has no place."""
MOST_AT_ONCE = 4096
MOST_WORKERS = 64

Seen = TypeVar("Seen")
"""What a model is shown of an image."""


@dataclass
class Troubles:
    """Images that could not be described; each is told at once, and their number at the end."""

    names: list[Path] = field(default_factory=list)

    def tell(self, image: Path, message: str) -> None:
        """Say on standard error that `image` is left out."""
        self.names.append(image)
        print(f"warning: {printable(message)}", file=sys.stderr)

    def summary(self, tried: int, images: int, done: str) -> None:
        """Say on standard error what became of `tried` of the `images`."""
        left_out = f"; {len(self.names)} left out, as said above" if self.names else ""
        print(f"{tried - len(self.names)} of {images} images {done}{left_out}", file=sys.stderr)

    @property
    def exit_code(self) -> int:
        return BROKEN if self.names else 0


@dataclass(frozen=True)
class Work:
    """Which images are to be described into which files beside them."""

    missing: list[tuple[Path, Path]]
    """(image, its text file), sorted."""
    existing: int
    """Images whose text is there already."""
    shared: list[tuple[Path, Path]]
    """(image, the image before it whose name differs in its extension alone): they have one text file."""


def text_file(image: Path, extension: str) -> Path:
    """The text file of `image`; `Path.with_suffix` refuses extensions such as `.a.b`."""
    return image.with_name(os.path.splitext(image.name)[0] + extension)


def find_work(images: Sequence[Path], extension: str, again: bool) -> Work:
    """Split `images` by whether their text is to be written; with `again` what is there does not count."""
    first = dict[Path, Path]()
    shared, missing, existing = list[tuple[Path, Path]](), list[tuple[Path, Path]](), 0
    for image in images:
        target = text_file(image, extension)
        if target in first:
            shared.append((image, first[target]))
            continue
        first[target] = image
        if not again and _is_there(target):
            existing += 1
        else:
            missing.append((image, target))
    return Work(missing, existing, shared)


def tell_work(work: Work, extension: str) -> None:
    """Say on standard error what is left as it is."""
    for image, first in work.shared:
        print(f"note: {printable(str(image))}: has the same text file as {printable(first.name)}, which is the one "
              "that is described", file=sys.stderr)  # fmt: skip
    if work.existing:
        have = "image has" if work.existing == 1 else "images have"
        print(f"note: {work.existing} {have} a {extension} file already and stay as they are; --overwrite describes "
              "anew", file=sys.stderr)  # fmt: skip


def write_sidecar(image: Path, target: Path, text: str, troubles: Troubles) -> bool:
    """Write `text` and a line break to `target`, unless that is what it holds; False if its name is too long.

    Raises:
        DiskError: if the disk refuses.
    """
    content = text + "\n"
    try:
        if target.read_bytes() == content.encode():
            return True
    except OSError:
        pass  # It is not there, or will say so when it is written.
    try:
        write_text(target, content, "--caption_extension")
    except DiskError:
        if len(os.fsencode(target.name)) <= 255:
            raise
        troubles.tell(image, f"{image}: the name of its text file would be too long ({target.suffix}); shorten the "
                      "image's name, or choose a shorter --caption_extension")  # fmt: skip
        return False
    return True


def opened_ahead(
    images: Sequence[Path], see: Callable[[Path], Seen], batch_size: int, workers: int, troubles: Troubles
) -> Iterator[list[tuple[int, Seen]]]:
    """Batches of (place in `images`, what `see` makes of it), in order; `workers` threads open the next ones.

    What cannot be read is told and left out, and batches are full without it.
    """
    batch = list[tuple[int, Seen]]()
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque[tuple[int, Future[Seen]]]()
        rest = enumerate(images)
        try:
            while True:
                for place, image in itertools.islice(rest, batch_size + workers - len(ahead)):
                    ahead.append((place, pool.submit(see, image)))
                if not ahead:
                    break
                place, seen = ahead.popleft()
                try:
                    batch.append((place, seen.result()))
                except DataError as problem:
                    troubles.tell(images[place], str(problem))
                if len(batch) == batch_size:
                    yield batch
                    batch = []
        finally:
            for _, waiting in ahead:
                waiting.cancel()
    if batch:
        yield batch


def default_workers() -> int:
    """Threads that open images where `--max_data_loader_n_workers` does not say."""
    return max(1, min(4, os.cpu_count() or 1))


def check_numbers(given: argparse.Namespace, problems: Problems) -> None:
    """Note a number of images or threads that cannot be."""
    if not 1 <= given.batch_size <= MOST_AT_ONCE:
        problems.add("--batch_size", given.batch_size, f"must be 1 to {MOST_AT_ONCE}", "write e.g. --batch_size 8")
    workers = given.max_data_loader_n_workers
    if workers is not None and not 0 <= workers <= MOST_WORKERS:
        way_out = "leave it out, or write e.g. --max_data_loader_n_workers 4"
        problems.add("--max_data_loader_n_workers", workers, f"must be 0 to {MOST_WORKERS}", way_out)


def _is_there(path: Path) -> bool:
    # Not Path.exists: that raises for names that are too long.
    return os.path.exists(path)
