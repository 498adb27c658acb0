"""Many short texts in two arrays: a million file names cost their bytes, not a Python object each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 13


Places = NDArray[np.int64] | NDArray[np.int32]


def _narrow(places: NDArray[np.int64]) -> Places:
    """Half the memory, where all of `places` fit."""
    return places if len(places) and int(places.max()) >= 1 << 31 else places.astype(np.int32)


class TextColumn(Sequence[str]):
    """N texts, immutable. File names that are not UTF-8 (lone surrogates) come back as they went in."""

    __slots__ = ("data", "ends", "starts")

    def __init__(
        self, data: NDArray[np.uint8], ends: Places, starts: Places | None = None
    ) -> None:
        self.data = data
        """All texts, in their order."""
        self.ends = ends
        """[N]: where each ends in `data`, ascending."""
        self.starts = starts
        """[N]: where each starts; None: where the one before it ends. A view of another column has its own."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextColumn:
        """The column that holds `texts`."""
        source = iter(texts)
        return cls.of_encoded(
            [text.encode("utf-8", "surrogatepass") for text in part]
            for part in iter(lambda: list(islice(source, _CHUNK)), [])
        )

    @classmethod
    def of_encoded(cls, parts: Iterable[Sequence[bytes]]) -> TextColumn:
        """The column that holds the texts of all `parts`, in UTF-8 (lone surrogates encoded like other characters)."""
        data, lengths = bytearray(), [np.zeros(0, np.int64)]
        for part in parts:
            data += b"".join(part)
            lengths.append(np.fromiter(map(len, part), np.int64, len(part)))
        # A view, not a copy: the texts may be half of the memory.
        column = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
        column.flags.writeable = False
        return cls(column, _narrow(np.cumsum(np.concatenate(lengths))))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> TextColumn: ...
    def __getitem__(self, place: int | slice) -> str | TextColumn:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        row = int(place)
        if row < 0:
            row += len(self)
        if not 0 <= row < len(self):
            raise IndexError(f"text {place} of {len(self)}")
        start = int(self.starts[row]) if self.starts is not None else int(self.ends[row - 1]) if row else 0
        return self.data[start : int(self.ends[row])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        for part in self.encoded():
            for text in part:
                yield text.decode("utf-8", "surrogatepass")

    def encoded(self, chunk: int = _CHUNK) -> Iterator[list[bytes]]:
        """The texts in UTF-8, at most `chunk` at a time; a million bytes objects would outweigh what they hold."""
        for row in range(0, len(self), chunk):
            starts, ends = self._starts(slice(row, row + chunk)).tolist(), self.ends[row : row + chunk].tolist()
            first = starts[0]
            data = self.data[first : ends[-1]].tobytes()
            yield [data[start - first : end - first] for start, end in zip(starts, ends, strict=True)]

    def parts_of(self, part_of: Callable[[str], str]) -> TextColumn | None:
        """The column of what `part_of` makes of each text, without a copy; None if that is not always a part of it."""
        starts, ends, row = np.empty_like(self.ends), np.empty_like(self.ends), 0
        for chunk in self.encoded():
            firsts = self._starts(slice(row, row + len(chunk))).tolist()
            for first, text in zip(firsts, chunk, strict=True):
                part = part_of(text.decode("utf-8", "surrogatepass")).encode("utf-8", "surrogatepass")
                offset = text.find(part)
                if offset < 0:
                    return None
                starts[row] = first + offset
                ends[row] = first + offset + len(part)
                row += 1
        return TextColumn(self.data, ends, starts)

    def _starts(self, rows: slice) -> Places:
        if self.starts is not None:
            return self.starts[rows]
        first = rows.start or 0
        before = np.zeros(1, self.ends.dtype) if first == 0 else self.ends[first - 1 : first]
        return np.concatenate([before, self.ends[rows][:-1]])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        if isinstance(other, TextColumn) and self.starts is None and other.starts is None:
            return np.array_equal(self.ends, other.ends) and np.array_equal(self.data, other.data)
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    def __repr__(self) -> str:
        return f"TextColumn({list(self[:3])}{', ...' if len(self) > 3 else ''})"

    def take(self, rows: NDArray[np.int64]) -> TextColumn:
        """The texts at `rows`, in their order."""
        rows = np.asarray(rows, np.int64)
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(rows))):
            return self
        starts = self._starts(slice(0, len(self)))[rows] if len(rows) else rows
        lengths = (self.ends[rows] - starts).astype(np.int64)
        ends = np.cumsum(lengths)
        data = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
        # The place of every byte takes eight; so only of some texts at a time.
        for row in range(0, len(rows), _CHUNK):
            part = slice(row, row + _CHUNK)
            first = int(ends[row] - lengths[row])
            offsets = starts[part] - (ends[part] - lengths[part])  # Byte j of the result is byte j + offset of `data`.
            last = int(ends[part][-1])
            np.take(self.data, np.repeat(offsets, lengths[part]) + np.arange(first, last), out=data[first:last])
        return TextColumn(data, _narrow(ends))

    @staticmethod
    def join(columns: Sequence[TextColumn]) -> TextColumn:
        """The texts of all `columns`, one behind the other."""
        if len(columns) == 1:
            return columns[0]
        if not columns:
            return TextColumn.of(())
        offsets = np.cumsum([0, *(len(column.data) for column in columns[:-1])])
        pairs = list(zip(columns, offsets, strict=True))
        views = any(column.starts is not None for column in columns)
        return TextColumn(
            np.concatenate([column.data for column in columns]),
            _narrow(np.concatenate([column.ends + offset for column, offset in pairs])),
            _narrow(np.concatenate([column._starts(slice(0, len(column))) + offset for column, offset in pairs]))
            if views else None,
        )
