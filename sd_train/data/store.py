"""Rows of tensors on disk, by key: what caches of latents and of text-encoder outputs are kept in.

Rows stand packed in shards (`shards.py`), which appear complete or not at all and are never changed, so that any number
of processes may read and write one folder at once. Two that write the same row cost disk space and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sd_train.data.shards import (
    SUFFIX,
    BadShard,
    Bytes,
    Keys,
    Layout,
    ShardHead,
    checksum,
    layout_of,
    read_head,
    write_shard,
)
from sd_train.errors import DataError, RunError

if TYPE_CHECKING:
    from torch import Tensor

Handles = NDArray[np.int64]
"""[N]: where each row is, for the store that gave it; -1 for a row that it does not have."""

SHARD_BYTES = 256 << 20
FLUSH_SECONDS = 30.0
TOUCH_SECONDS = 3600.0


def default_cache_dir() -> Path:
    """Where caches are kept without --cache_dir: $SD_TRAIN_CACHE, else sd_train in the user's cache folder.

    That is $XDG_CACHE_HOME or ~/.cache (XDG Base Directory Specification), on Windows %LOCALAPPDATA%.
    """
    if given := os.environ.get("SD_TRAIN_CACHE"):
        return Path(given)
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "sd_train" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sd_train"


def key_array(keys: Sequence[bytes] | Keys) -> Keys:
    """`keys`, 16 bytes each, as the store has them: [N], S16."""
    return keys if isinstance(keys, np.ndarray) else np.frombuffer(b"".join(keys), "S16")


@dataclass
class _Shard:
    path: Path
    head: ShardHead
    checked: NDArray[np.bool_]
    """[N]: whether each row was found to have its checksum."""
    bad: NDArray[np.bool_]
    """[N]: whether it was found not to."""
    table: Bytes | None = None
    """[N, bytes of a row], mapped."""
    gone: bool = False


@dataclass
class _Pending:
    keys: list[Keys] = field(default_factory=list)
    blocks: list[Bytes] = field(default_factory=list)


class RowStore:
    """All rows of one kind, in one folder of a cache folder.

    Rows are put with `put` and found again after `flush`; rows of other processes after `refresh`. Reading may go on
    in several threads at once, everything else in one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: dict[Path, str] = {}
        """Files that are no whole shards, and why."""
        self._shards: list[_Shard] = []
        self._known: dict[str, _Shard] = {}
        self._sorted: tuple[Keys, Handles] | None = None
        self._pending: dict[Layout, _Pending] = {}
        self._pending_bytes, self._pending_since = 0, 0.0
        self._writing: Future[list[Path]] | None = None
        self.refresh()

    def __len__(self) -> int:
        """Rows that can be found, each key counted once."""
        return len(np.unique(self._table()[0]))

    def refresh(self) -> None:
        """Look for shards that have come or gone since; handles stay valid.

        Raises:
            RunError: if the folder cannot be read.
        """
        try:
            names = {name for name in os.listdir(self.folder) if name.endswith(SUFFIX) and not name.startswith(".")}
        except FileNotFoundError:
            names = set()
        except OSError as problem:
            raise RunError(f"{self.folder}: cannot be read ({problem}); choose another --cache_dir") from None
        for name, shard in self._known.items():
            if (name not in names) != shard.gone:
                shard.gone, self._sorted = name not in names, None
        self.damaged = {path: reason for path, reason in self.damaged.items() if path.name in names}
        for name in sorted(names - self._known.keys()):
            self._open(self.folder / name)

    def put(self, keys: Sequence[bytes] | Keys, rows: Mapping[str, Tensor]) -> None:
        """Keep row i of each tensor of `rows`, each [B, ...], under key i of `keys`; written from time to time.

        Raises:
            RunError: if the disk refuses.
        """
        import torch

        flat = {name: rows[name].detach().to("cpu").contiguous() for name in sorted(rows)}
        layout, row_bytes = layout_of(
            [
                (name, str(rows.dtype).removeprefix("torch."), tuple(rows.shape[1:]), rows[0].numel() * rows.itemsize)
                for name, rows in flat.items()
            ]
        )
        block = np.zeros((len(keys), row_bytes), np.uint8)
        for part, tensor in zip(layout, flat.values(), strict=True):
            block[:, part.start : part.start + part.size] = tensor.view(len(keys), -1).view(torch.uint8).numpy()
        pending = self._pending.setdefault(layout, _Pending())
        pending.keys.append(key_array(keys))
        pending.blocks.append(block)
        if not self._pending_bytes:
            self._pending_since = time.monotonic()
        self._pending_bytes += block.nbytes
        if self._pending_bytes >= SHARD_BYTES or time.monotonic() - self._pending_since >= FLUSH_SECONDS:
            self._finish_writing()
            self._start_writing()

    def flush(self) -> None:
        """Write what was put; it can be found afterwards.

        Raises:
            RunError: if the disk refuses.
        """
        self._finish_writing()
        self._start_writing()
        self._finish_writing()

    def _start_writing(self) -> None:
        """Write in a thread of its own: encoding need not wait for the disk."""
        if not self._pending:
            return
        todo, self._pending, self._pending_bytes = self._pending, {}, 0

        def write() -> list[Path]:
            return [
                write_shard(self.folder, layout, np.concatenate(pending.keys), pending.blocks)
                for layout, pending in todo.items()
            ]

        thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing = thread.submit(write)
        thread.shutdown(wait=False)

    def _finish_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            for path in writing.result():
                self._open(path)

    def locate(self, keys: Sequence[bytes] | Keys) -> Handles:
        """The handle of each of `keys` in their shape, -1 for those that are not there. Marks the rest as used now."""
        keys = key_array(keys)
        known, handles = self._table()
        if not len(known):
            return np.full(keys.shape, -1, np.int64)
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        found = np.where(known[places] == keys, handles[places], -1)
        for number in np.unique(found[found >= 0] >> 32).tolist():
            shard = self._shards[number]
            if shard.table is None:
                # Mapped now, a file that is removed later can still be read (but for Windows).
                self._map(shard)
                self._touch(shard.path)
        return found

    def check(self, handles: Handles) -> NDArray[np.bool_]:
        """[N]: whether each row has its checksum; `locate` does not find again those that have not."""
        intact = np.ones(len(handles), np.bool_)
        # In the order of the disk.
        for place in np.argsort(handles, kind="stable").tolist():
            number, row = divmod(int(handles[place]), 1 << 32)
            intact[place] = self._is_intact(self._shards[number], row)
        return intact

    def bytes_of(self, handles: Handles) -> int:
        """Bytes on disk of the rows at `handles`."""
        numbers, counts = np.unique(handles >> 32, return_counts=True)
        pairs = zip(numbers.tolist(), counts.tolist(), strict=True)
        return sum(self._shards[number].head.row_bytes * count for number, count in pairs)

    def rows(self, handles: Sequence[int] | Handles) -> dict[str, Tensor]:
        """The rows at `handles`, all of one layout, stacked by name: [B, ...], exactly as they were put.

        Raises:
            DataError: if a row is damaged (each is checked when it is first read); it names the file and the way out.
        """
        import torch

        found: list[tuple[Bytes, int]] = []
        layout: Layout | None = None
        for handle in handles.tolist() if isinstance(handles, np.ndarray) else handles:
            shard, row = self._shards[handle >> 32], handle & 0xFFFFFFFF
            if not shard.checked[row] and not self._is_intact(shard, row):
                raise DataError(
                    f"{shard.path}: row {row} is damaged; run `sd-train cache verify --repair --cache_dir "
                    f"{self.folder.parent}` and start again, what is missing is encoded anew"
                )
            if layout is not None and shard.head.layout != layout:
                raise ValueError(f"rows of unlike layout: {layout}, {shard.head.layout}")
            layout = shard.head.layout
            found.append((self._map(shard), row))
        stacked = {}
        for part in layout or ():
            start, end = part.start, part.start + part.size
            gathered = np.empty((len(found), part.size), np.uint8)
            for place, (table, row) in enumerate(found):
                gathered[place] = table[row, start:end]
            stacked[part.name] = torch.from_numpy(gathered).view(getattr(torch, part.dtype)).view(-1, *part.shape)
        return stacked

    def _is_intact(self, shard: _Shard, row: int) -> bool:
        if not shard.checked[row] and not shard.bad[row]:
            try:
                # A file that was cut off after it was mapped would end the process without a word.
                whole = shard.gone or os.stat(shard.path).st_size >= shard.head.file_bytes
            except FileNotFoundError:
                whole = True
            table = self._map(shard) if whole else None
            intact = table is not None and checksum(table[row]) == shard.head.sums[row]
            shard.checked[row], shard.bad[row] = intact, not intact
            if not intact:
                self._sorted = None
        return bool(shard.checked[row])

    def _open(self, path: Path) -> None:
        try:
            head = read_head(path)
        except FileNotFoundError:
            return
        except (BadShard, OSError) as problem:
            self.damaged[path] = str(problem)
            return
        none = np.zeros(len(head), np.bool_)
        self._known[path.name] = shard = _Shard(path, head, none, none.copy())
        self._shards.append(shard)
        self._sorted = None

    def _map(self, shard: _Shard) -> Bytes:
        if shard.table is None:
            import torch

            head = shard.head
            try:
                # NumPy's and Python's own mappings hold a file descriptor each; torch's do not.
                mapped = torch.from_file(str(shard.path), False, head.file_bytes, dtype=torch.uint8).numpy()
            except RuntimeError as problem:
                raise DataError(
                    f"{shard.path}: cannot be read any more ({str(problem).splitlines()[0]}); leave --cache_dir as it "
                    "is while training, and start again"
                ) from None
            shard.table = mapped[head.start :].reshape(len(head), head.row_bytes)
        return shard.table

    def _table(self) -> tuple[Keys, Handles]:
        """All keys that can be found, sorted, and the handle of each."""
        if self._sorted is None:
            keys, handles = [np.empty(0, "S16")], [np.empty(0, np.int64)]
            for number, shard in enumerate(self._shards):
                if not shard.gone:
                    good = np.flatnonzero(~shard.bad)
                    keys.append(shard.head.keys[good])
                    handles.append((number << 32) + good)
            joined = np.concatenate(keys)
            order = np.argsort(joined, kind="stable")
            self._sorted = joined[order], np.concatenate(handles)[order]
        return self._sorted

    @staticmethod
    def _touch(path: Path) -> None:
        # The time of change says when a shard was last used, for `sd-train cache gc`; a cache may be read-only.
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > TOUCH_SECONDS:
                os.utime(path)
