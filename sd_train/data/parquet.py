"""Images inside .parquet files, as diffusers' `datasets` lays them out; each is called FILE.parquet/ROW.

A column `image` holds `{bytes, path}` (or bytes alone), another one the caption. Rows are stored in groups that can
only be read whole, so the last groups are kept.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sd_train.data.columns import TextColumn
from sd_train.data.index_file import UNSETTLED, Kept, KeptIndexes
from sd_train.data.metadata_files import compose, metadata_root
from sd_train.data.settings import SubsetConfig
from sd_train.errors import DataError

SUFFIX = ".parquet"
KEPT_BYTES = 256 * 2**20
"""Of the row groups that were read last; one of them is kept whatever its size."""

Size = tuple[int, int]

_IMAGE = "image"
_CAPTIONS = ("caption", "text")


@dataclass(frozen=True)
class ParquetRows:
    """The N images of .parquet files, in the order of files and rows."""

    keys: TextColumn
    """FILE.parquet/ROW; for a row that only names its image, the path."""
    captions: TextColumn
    described: NDArray[np.bool_]
    """[N]: whether the row holds a caption, empty or not."""
    sizes: NDArray[np.int32]
    """[N, 2]: (width, height) upright; (0, 0) for a broken image."""
    stats: NDArray[np.int64]
    """[N, 2]: bytes of the image, time of the file's last change in nanoseconds."""
    broken: dict[int, str]
    """What is wrong with images that cannot be read, by row."""
    largest: int
    """Bytes of the images of the largest row group."""


@dataclass(frozen=True)
class _File:
    """What one .parquet file holds."""

    path: Path
    changed: int
    """Time of the last change in nanoseconds."""
    metadata: Any
    starts: tuple[int, ...]
    """First row of each row group, and the number of all rows."""
    names: tuple[str, ...]
    nested: bool
    """Whether images are `{bytes, path}`, not bytes alone."""
    has_paths: bool


def is_parquet(metadata_file: Path) -> bool:
    """Whether `metadata_file` is a .parquet file or a folder of such."""
    return metadata_file.suffix.lower() == SUFFIX or metadata_file.is_dir()


def image_bytes(path: Path) -> bytes:
    """The encoded image in FILE.parquet/ROW; safe to call from several threads.

    Raises:
        DataError: if the file or the row cannot be read or holds no image.
    """
    file = _described(path.parent)
    row = int(path.name) if path.name.isdecimal() else -1
    if not 0 <= row < file.starts[-1]:
        raise DataError(f"{path}: the file has {file.starts[-1]} rows, from 0 on; correct the row")
    group = int(np.searchsorted(file.starts, row, side="right")) - 1
    data = _GROUPS.images(file, group)[row - file.starts[group]].as_py()
    if data is None:
        raise DataError(f"{path}: the row holds no image; remove it")
    return bytes(data)


def read_parquet(
    subset: SubsetConfig, size_of: Callable[[Path], Size], keep: KeptIndexes | None, warnings: list[str]
) -> ParquetRows:
    """The rows of the .parquet file, or of all such files in the folder, that `subset` names.

    Sizes are read with `size_of`, a row group at a time, and kept in `keep` until a file changes.

    Raises:
        DataError: if there is no file, one cannot be read or lacks the columns, or pyarrow is not installed.
    """
    place = subset.metadata_file
    assert place is not None
    paths = sorted(place.glob(f"*{SUFFIX}")) if place.is_dir() else [place]
    if not paths:
        inner = sorted({path.parent for path in place.glob(f"*/*{SUFFIX}")})
        raise DataError(f"{place}: holds no {SUFFIX} file; "
                        + (f"write metadata_file = '{inner[0]}'" if inner else "correct metadata_file"))
    tables = [_table(file, subset, size_of, keep) for file in map(_described, paths)]
    largest = max(table.largest for table in tables)
    if sum(int(table.stats[:, 0].sum()) for table in tables) > KEPT_BYTES and largest > KEPT_BYTES // 16:
        warnings.append(f"{subset.origin}: {place} is stored in groups of up to {largest / 2**20:.0f} MB, each read "
                        "whole for one image of a shuffled batch; cache the latents, or write it with a smaller "
                        "row_group_size")
    starts = np.cumsum([0, *(len(table.keys) for table in tables)]).tolist()
    return ParquetRows(
        TextColumn.join([table.keys for table in tables]),
        TextColumn.join([table.captions for table in tables]),
        np.concatenate([table.described for table in tables]),
        np.concatenate([table.sizes for table in tables]),
        np.concatenate([table.stats for table in tables]),
        {start + row: text for start, table in zip(starts, tables, strict=False) for row, text in table.broken.items()},
        largest,
    )


def _table(
    file: _File, subset: SubsetConfig, size_of: Callable[[Path], Size], keep: KeptIndexes | None
) -> ParquetRows:
    """All rows of one file."""
    count, started = file.starts[-1], time.time_ns()
    key = "parquet", os.path.abspath(file.path), str(file.changed), str(file.path.stat().st_size)
    kept = keep.read(*key) if keep is not None else None
    keys, broken = dict[int, str](), dict[int, str]()
    if kept is not None:
        sizes, lengths = kept.columns["sizes"], kept.columns["lengths"]
    else:
        sizes, lengths = np.zeros((count, 2), np.int32), np.zeros(count, np.int64)
        for group, start in enumerate(file.starts[:-1]):
            lengths[start : file.starts[group + 1]] = _lengths(file, group)
            keys |= _named(file, group, lengths, subset)
            for row in range(start, file.starts[group + 1]):
                try:
                    sizes[row] = size_of(file.path.parent / keys.get(row, f"{file.path.name}/{row}"))
                except DataError as problem:
                    broken[row] = str(problem)
        if keep is not None and not keys and not broken and started - file.changed > UNSETTLED:
            keep.write(key, Kept(started, {"sizes": sizes, "lengths": lengths}))
    texts = list(_texts(file, _caption_column(file, subset)))
    return ParquetRows(
        TextColumn.of(keys.get(row, f"{file.path.name}/{row}") for row in range(count)),
        TextColumn.of(compose(text, None, subset) for text in texts),
        np.array([text is not None for text in texts], bool),
        sizes,
        np.stack([np.maximum(lengths, 0), np.full(count, file.changed)], axis=1),
        broken,
        max((int(part.sum()) for part in np.split(lengths, file.starts[1:-1])), default=0),
    )


def _lengths(file: _File, group: int) -> NDArray[np.int64]:
    """Bytes of each image of a row group, -1 where there are none."""
    compute = importlib.import_module("pyarrow.compute")
    lengths = compute.fill_null(compute.binary_length(_GROUPS.images(file, group)), -1)
    return np.asarray(lengths.to_numpy(), np.int64)


def _named(file: _File, group: int, lengths: NDArray[np.int64], subset: SubsetConfig) -> dict[int, str]:
    """The paths of the images that a row group only names, by row."""
    start, end = file.starts[group], file.starts[group + 1]
    if not file.has_paths or (lengths[start:end] >= 0).all():
        return {}
    base = os.path.abspath(subset.image_dir if subset.image_dir != Path() else metadata_root(subset))
    images = _read(file, group, f"{_IMAGE}.path").to_pylist()
    return {
        row: os.path.join(base, image["path"])
        for row, image in enumerate(images, start)
        if lengths[row] < 0 and image is not None and image["path"] is not None
    }


def _texts(file: _File, column: str | None) -> Iterator[str | None]:
    """The caption of each row."""
    for group, (start, end) in enumerate(pairwise(file.starts)):
        yield from [None] * (end - start) if column is None else _read(file, group, column).to_pylist()


def _caption_column(file: _File, subset: SubsetConfig) -> str | None:
    """The column of captions; None if the file has neither `caption` nor `text`."""
    wanted = (subset.caption_column,) if subset.caption_column is not None else _CAPTIONS
    found = next((name for name in wanted if name in file.names), None)
    if found is None and subset.caption_column is not None:
        raise DataError(f"{file.path}: has no column {subset.caption_column!r}, only {', '.join(file.names)}; correct "
                        "caption_column")
    if found is not None:
        kind = file.metadata.schema.to_arrow_schema().field(found).type
        types = importlib.import_module("pyarrow").types
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(inner) or types.is_large_string(inner)):
            raise DataError(f"{file.path}: column {found!r} is {kind}, not text; name another with caption_column")
    return found


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    """pyarrow's parquet module; what goes wrong inside the block is a `DataError` that names the file."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        failures = importlib.import_module("pyarrow").ArrowException
    except ImportError:
        raise DataError(f"{path}: {SUFFIX} files are read with the package pyarrow, which is not installed; run: pip "
                        "install pyarrow") from None
    try:
        yield parquet
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct metadata_file") from None
    except (OSError, failures) as problem:
        reason = str(problem).partition("\n")[0]
        raise DataError(f"{path}: cannot be read as {SUFFIX} ({reason}); write the file anew") from None


def _described(path: Path) -> _File:
    with _readable(path) as parquet:
        changed = path.stat().st_mtime_ns
        return _GROUPS.file(path, changed) or _GROUPS.keep(_describe(path, changed, parquet))


def _describe(path: Path, changed: int, parquet: Any) -> _File:
    metadata = parquet.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    types = importlib.import_module("pyarrow").types
    nested, inner = False, None
    if _IMAGE in schema.names:
        kind = schema.field(_IMAGE).type
        inner = {field.name: field.type for field in kind} if types.is_struct(kind) else None
        nested = inner is not None
        kind = inner.get("bytes") if inner is not None else kind
    else:
        kind = None
    if kind is None or not (types.is_binary(kind) or types.is_large_binary(kind)):
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(f"{path}: has no column {_IMAGE!r} with images (a struct with the field bytes, or binary), but "
                        f"{found}; write it as diffusers' datasets does")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    starts = tuple(int(start) for start in np.cumsum([0, *counts]))
    return _File(path, changed, metadata, starts, tuple(schema.names), nested, inner is not None and "path" in inner)


def _read(file: _File, group: int, column: str) -> Any:
    """A column of a row group, as pyarrow's ChunkedArray."""
    with _readable(file.path) as parquet, parquet.ParquetFile(file.path, metadata=file.metadata) as opened:
        return opened.read_row_group(group, columns=[column], use_threads=False).column(0)


class _Groups:
    """The files that were opened and the images of the row groups that were read last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[Path, _File] = {}
        self._images: OrderedDict[tuple[Path, int, int], Any] = OrderedDict()
        self._bytes = 0

    def file(self, path: Path, changed: int) -> _File | None:
        file = self._files.get(path)
        return file if file is not None and file.changed == changed else None

    def keep(self, file: _File) -> _File:
        self._files[file.path] = file
        return file

    def images(self, file: _File, group: int) -> Any:
        """The encoded images of a row group, as pyarrow's ChunkedArray of bytes."""
        key = file.path, file.changed, group
        # Held while reading, so that two threads never read the same group.
        with self._lock:
            if key not in self._images:
                found = _read(file, group, f"{_IMAGE}.bytes" if file.nested else _IMAGE)
                if file.nested:
                    found = importlib.import_module("pyarrow.compute").struct_field(found, "bytes")
                while self._images and self._bytes + found.nbytes > KEPT_BYTES:
                    self._bytes -= self._images.popitem(last=False)[1].nbytes
                self._images[key] = found
                self._bytes += found.nbytes
            self._images.move_to_end(key)
            return self._images[key]


_GROUPS = _Groups()
