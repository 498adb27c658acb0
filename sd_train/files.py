"""Files appear complete or not at all: temporary name, fsync, rename.

What a process that was killed leaves behind has names that no other program gives: `.NAME.PID-HOST.tmp`, unfinished,
and for the moment between two renames `.NAME.PID-HOST.old`, whole. `tidy` puts that right. In the names of files that
leave no room for more, a digest stands for NAME.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sd_train.errors import DiskError, RunError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LEFT = re.compile(r"\.(.+)\.(\d+)(?:-([0-9a-f]{6}))?\.(tmp|old)")
_HOST = hashlib.blake2b(platform.node().encode(), digest_size=3).hexdigest()
"""Tells machines and containers that write into the same folder apart."""
LONGEST_NAME = 255
"""Bytes of a file's name on the usual file systems."""
SHORTENED = re.compile("[0-9a-f]{32}")
"""What stands in a temporary name for one that leaves no room; for `tidy`."""
_START_WRITING = 2
"""Linux's SYNC_FILE_RANGE_WRITE."""
_STALE_SECONDS = 3600.0
"""Nothing is written for so long by another machine's process: it is gone."""


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; its rename is durable enough without.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _share(path: Path) -> None:
    # safetensors makes files that only their owner can read; web UIs often run as another user.
    if os.name == "posix":
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    # Linux tells it; elsewhere it has to be changed to be read, which other threads' files may notice.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_folder(path: Path, option: str = "--output_dir") -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        way_out = f"choose another {option}"
        raise DiskError(f"{path}: cannot be made ({problem}); {way_out}", full=problem.errno in _FULL) from None


def probe_folder(folder: Path, option: str) -> None:
    """Find out whether files can be written into `folder`; nothing is left behind.

    Raises:
        RunError: if not; `option` is what the message advises to change.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise RunError(f"{folder}: nothing can be written there ({reason}); choose another {option}") from None
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.isdir(place))


def write_whole(path: Path, write: Callable[[Path], None], option: str = "--output_dir") -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Raises:
        DiskError: if the disk refuses; nothing half-written stays behind. It advises another `option`.
    """
    _make_folder(path.parent, option)
    temporary = temporary_name(path)
    try:
        write(temporary)
        _share(temporary)
        _sync_file(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise _refused(path, problem, option) from None
    finally:
        # A name that is too long cannot even be looked for; that must not hide why the file was not written.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, option: str = "--output_dir") -> None:
    """Write UTF-8 text with plain newlines, whole or not at all.

    Raises:
        DiskError: if the disk refuses. It advises another `option`.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    write_whole(path, write, option)


def write_folder(path: Path, fill: Callable[[Path], None], option: str = "--output_dir") -> None:
    """Let `fill` write files and folders into a temporary folder beside `path`, then move it there.

    An old `path` goes last.

    Raises:
        DiskError: if the disk refuses; an old `path` is then still whole. It advises another `option`.
    """
    _make_folder(path.parent, option)
    temporary, old = _beside(path, "tmp"), _beside(path, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        for entry in sorted(temporary.rglob("*"), reverse=True):
            if entry.is_dir():
                _sync_folder(entry)
            else:
                _share(entry)
                _sync_file(entry)
        _sync_folder(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise _refused(path, problem, option) from None
    finally:
        # Where the disk refused, or a second Ctrl-C came, between the two renames.
        if os.path.exists(old) and not os.path.exists(path):
            with contextlib.suppress(OSError):
                os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        # Where the old folder could not be moved back it is the only one.
        if os.path.exists(path):
            _discard(old, temporary)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{_HOST}.{kind}")


def temporary_name(path: Path) -> Path:
    """Where what is to become `path` may be put together: `tidy` takes it away if this process is killed."""
    temporary, name = _beside(path, "tmp"), os.fsencode(path.name)
    if len(name) <= LONGEST_NAME < len(os.fsencode(temporary.name)):
        # Names may be as long as the file system takes; there is no room for more in them.
        return _beside(path.with_name(hashlib.blake2b(name, digest_size=16).hexdigest()), "tmp")
    return temporary


def _refused(path: Path, problem: OSError, option: str) -> DiskError:
    way_out = f"free space or choose another {option}"
    return DiskError(f"{path}: cannot be written ({problem}); {way_out}", full=problem.errno in _FULL)


def _discard(old: Path, temporary: Path) -> None:
    """Delete `old`, if it is there; it is called `temporary` before, so that what has the name of one is whole."""
    with contextlib.suppress(OSError):
        os.replace(old, temporary)
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that it holds: nobody sees one that is half deleted.

    Raises:
        OSError: if the disk refuses.
    """
    if path.is_dir() and not path.is_symlink():
        hidden = path if _LEFT.fullmatch(path.name) else _beside(path, "tmp")
        if hidden != path:
            os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink()


@dataclass(frozen=True)
class Tidied:
    """What `tidy` found of runs that were killed."""

    put_back: tuple[Path, ...] = ()
    """Files and folders that were about to be replaced, and are there again."""
    removed: tuple[Path, ...] = ()
    """Unfinished ones."""


def tidy(folder: Path, is_ours: Callable[[str], bool]) -> Tidied:
    """Put right what processes that are gone left in `folder`, of files whose name `is_ours`.

    What the disk refuses stays as it is: it is in nobody's way.
    """
    left: dict[str, list[tuple[Path, str]]] = {"old": [], "tmp": []}
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not (found := _LEFT.fullmatch(entry.name)) or not is_ours(found[1]):
            continue
        # An old one whose place is empty is put back wherever it comes from: it is whole.
        missing = found[4] == "old" and not os.path.exists(folder / found[1])
        if missing or _is_gone(int(found[2]), found[3] or _HOST, entry):
            left[found[4]].append((entry, found[1]))
    put_back, removed = list[Path](), list[Path]()
    for old, name in left["old"]:
        if not os.path.exists(folder / name):
            # An old one is whole at any time; whether the one that was to take its place is, nothing tells.
            with contextlib.suppress(OSError):
                os.replace(old, folder / name)
                put_back.append(folder / name)
    for temporary, _ in left["tmp"]:
        with contextlib.suppress(OSError):
            remove(temporary)
            removed.append(temporary)
    for old, _ in left["old"]:
        if os.path.exists(old):
            _discard(old, old.with_suffix(".tmp"))
            removed.append(old)
    return Tidied(tuple(put_back), tuple(removed))


def _is_gone(process: int, host: str, entry: Path) -> bool:
    """Whether no process has this number, or only this one: in containers they all have the same.

    Of another machine's processes nothing is known but when they last wrote to `entry`.
    """
    import psutil

    if host != _HOST:
        with contextlib.suppress(OSError):
            written = max(each.stat().st_mtime for each in (entry, *entry.rglob("*")))
            return time.time() - written > _STALE_SECONDS
        return False
    try:
        return process == os.getpid() or not psutil.pid_exists(process)
    except OverflowError:
        return True  # No process has so large a number.


def begin_writing(file: BinaryIO, start: int, count: int) -> None:
    """Let the disk begin with `count` bytes of an open file, without waiting for it; only Linux is asked.

    Otherwise it begins when the file is synced, and whoever writes has nothing to do meanwhile.
    """
    if sys.platform == "linux" and (call := getattr(_library(), "sync_file_range", None)) is not None:
        wide = ctypes.c_int64
        call(ctypes.c_int(file.fileno()), wide(start), wide(count), ctypes.c_uint(_START_WRITING))


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder.

    Raises:
        OSError: if they cannot be looked at.
    """
    files = [entry for entry in path.rglob("*") if entry.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def free_bytes(folder: Path) -> int | None:
    """What is free where `folder` is or will be; None where the system does not tell."""
    try:
        return shutil.disk_usage(nearest_folder(folder)).free
    except OSError:
        return None


def sha256(path: Path, offset: int = 0) -> str:
    """SHA-256 of the bytes of `path` from `offset` on, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
