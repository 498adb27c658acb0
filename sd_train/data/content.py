"""What images hold, as digests: the same for the same picture, whatever its file is called and how it is packed."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sd_train.data.images import Decoded, decode
from sd_train.data.npz import stands_alone
from sd_train.errors import DataError, RunError

Stats = NDArray[np.int64]
"""[N, 2]: size in bytes and time of the last change in nanoseconds of N files."""
Item = TypeVar("Item")
Result = TypeVar("Result")

DIGEST_BYTES = 16
NAME = "contents.sqlite"
_TABLE = """CREATE TABLE IF NOT EXISTS contents
    (path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, digest BLOB) WITHOUT ROWID"""
_AT_ONCE = 500
_THREADS = max(1, min(8, os.cpu_count() or 1))


def content_digest(decoded: Decoded) -> bytes:
    """16 bytes that tell pictures apart: SHA-256 of size, pixels and transparency, cut."""
    # Processors have instructions for it, so that it is the fastest of the usual ones.
    digest = hashlib.sha256(f"{decoded.size} {decoded.alpha is None}".encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(decoded.pixels).data)
    if decoded.alpha is not None:
        digest.update(np.ascontiguousarray(decoded.alpha).data)
    return digest.digest()[:DIGEST_BYTES]


def ahead(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, window: int
) -> Iterator[Result]:
    """`function` of each of `items`, in their order, up to `window` of them computed ahead in `workers` threads."""
    if workers < 1:
        yield from map(function, items)
        return
    waiting = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="ahead") as pool:
        futures: deque[Future[Result]] = deque()
        try:
            futures.extend(pool.submit(function, item) for item in islice(waiting, max(1, window)))
            while futures:
                yield futures.popleft().result()
                futures.extend(pool.submit(function, item) for item in islice(waiting, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class ContentHashes:
    """Remembers what files hold by path, size and time of change, in `cache_dir`; None: for this object's life alone.

    Any number of processes may use one `cache_dir`; one object belongs to one thread at a time. Of a folder that cannot
    be written to it takes a copy, and forgets what is new.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._place = ":memory:" if cache_dir is None else str(cache_dir / NAME)
        try:
            if cache_dir is not None:
                cache_dir.mkdir(parents=True, exist_ok=True)
            self._database = self._opened()
        except sqlite3.OperationalError as problem:
            try:
                self._database = self._copied()
            except sqlite3.Error:
                raise RunError(f"{self._place}: cannot be opened ({problem}); choose another --cache_dir") from None
        except sqlite3.DatabaseError:
            # It holds nothing that cannot be computed again.
            for tail in ("", "-wal", "-shm"):
                Path(self._place + tail).unlink(missing_ok=True)
            self._database = self._opened()
        except OSError as problem:
            raise RunError(f"{cache_dir}: cannot be made ({problem}); choose another --cache_dir") from None

    def known(self, paths: Sequence[Path], stats: Stats) -> list[bytes | None]:
        """The digest of each image that was seen before with this size and time of change, without reading it."""
        return self._known([_name(path) for path in paths], stats)

    def remember(self, paths: Sequence[Path], stats: Stats, digests: Sequence[bytes]) -> None:
        """Keep what the images at `paths` were found to hold."""
        self._remember([_name(path) for path in paths], stats, digests)

    def digests(self, paths: Sequence[Path], stats: Stats) -> list[bytes | DataError]:
        """`content_digest` of each image; those that are unknown are decoded. Errors name their file."""
        found: dict[int, bytes | DataError] = {}
        unknown = []
        for place, digest in enumerate(self.known(paths, stats)):
            if digest is None:
                unknown.append(place)
            else:
                found[place] = digest
        computed = ahead(_digest_of, (paths[place] for place in unknown), _THREADS, 4 * _THREADS)
        for start in range(0, len(unknown), _AT_ONCE):
            places = unknown[start : start + _AT_ONCE]
            results = dict(zip(places, computed, strict=False))
            good = {place: digest for place, digest in results.items() if isinstance(digest, bytes)}
            self.remember([paths[place] for place in good], stats[list(good)], list(good.values()))
            found.update(results)
        return [found[place] for place in range(len(paths))]

    def of_files(self, paths: Sequence[Path]) -> list[bytes]:
        """16 bytes for each file's bytes as they are, read where they are unknown.

        Raises:
            DataError: if one cannot be read.
        """
        names = [b"file:" + _name(path) for path in paths]
        stats = np.zeros((len(paths), 2), np.int64)
        try:
            for place, path in enumerate(paths):
                found = os.stat(path)
                stats[place] = found.st_size, found.st_mtime_ns
            known = self._known(names, stats)
            unknown = [place for place, digest in enumerate(known) if digest is None]
            new = [hashlib.sha256(paths[place].read_bytes()).digest()[:DIGEST_BYTES] for place in unknown]
        except OSError as problem:
            raise DataError(f"{problem.filename}: cannot be read ({problem.strerror}); check the file") from None
        self._remember([names[place] for place in unknown], stats[unknown], new)
        by_place = dict(zip(unknown, new, strict=True))
        return [by_place[place] if digest is None else digest for place, digest in enumerate(known)]

    def close(self) -> None:
        self._database.close()

    def _opened(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._place, timeout=60, check_same_thread=False)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute(_TABLE)
        database.commit()
        return database

    def _copied(self) -> sqlite3.Connection:
        """What stands in a file that cannot be written to."""
        memory = sqlite3.connect(":memory:", check_same_thread=False)
        file = sqlite3.connect(f"{Path(self._place).absolute().as_uri()}?immutable=1", uri=True)
        try:
            file.backup(memory)
        finally:
            file.close()
        memory.execute(_TABLE)
        return memory

    def _known(self, names: Sequence[bytes], stats: Stats) -> list[bytes | None]:
        found: list[bytes | None] = []
        for start in range(0, len(names), _AT_ONCE):
            chunk = names[start : start + _AT_ONCE]
            marks = ",".join("?" * len(chunk))
            rows = self._run(f"SELECT path, size, changed, digest FROM contents WHERE path IN ({marks})", chunk)
            kept = {name: (size, changed, digest) for name, size, changed, digest in rows}
            for name, (size, changed) in zip(chunk, stats[start : start + _AT_ONCE].tolist(), strict=True):
                entry = kept.get(name)
                found.append(entry[2] if entry is not None and entry[:2] == (size, changed) else None)
        return found

    def _remember(self, names: Sequence[bytes], stats: Stats, digests: Sequence[bytes]) -> None:
        rows = [(name, *stat, digest) for name, stat, digest in zip(names, stats.tolist(), digests, strict=True)]
        if rows:
            self._run("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?)", rows, many=True)

    def _run(self, statement: str, values: Sequence[Any], many: bool = False) -> list[Any]:
        try:
            if many:
                with self._database:
                    self._database.executemany(statement, values)
                return []
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as problem:
            raise RunError(
                f"{self._place}: cannot be used ({problem}); free space, delete the file (it holds nothing that cannot "
                "be computed again) or choose another --cache_dir"
            ) from None


def _name(path: Path) -> bytes:
    return os.fsencode(os.path.abspath(path))


def _digest_of(path: Path) -> bytes | DataError:
    try:
        if stands_alone(path):
            return hashlib.sha256(path.read_bytes()).digest()[:DIGEST_BYTES]
        return content_digest(decode(path))
    except OSError as problem:
        return DataError(f"{path}: cannot be read ({problem.strerror}); check the file")
    except DataError as problem:
        return problem
