"""Encoded pictures that batches are made of, in memory or on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sd_train.data.content import ContentHashes, ahead, content_digest
from sd_train.data.encoding import Encode, Encoder, FillOptions, Shown, centred_pictures
from sd_train.data.images import decode
from sd_train.data.index import ImageIndex
from sd_train.data.npz import (
    Mismatch,
    NpzRows,
    read_alone,
    read_npz,
    stands_alone,
    summary,
)
from sd_train.data.npz_beside import Unfit, files_beside
from sd_train.data.row_names import RowNames
from sd_train.data.store import Handles, RowStore
from sd_train.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DiskCache", "Encode", "FillOptions", "LatentRows", "MemoryCache"]

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]

CHECK_AT_START = 2 << 30
"""Bytes of rows that are read and checked before anything is encoded; in larger caches each row when first read."""

_REMEMBER_EVERY = 256


class LatentRows(Protocol):
    """Where batches take encoded pictures from."""

    def rows(self, number: int, places: Sequence[int], flips: Sequence[bool]) -> dict[str, Tensor]:
        """The rows of images `places` of dataset `number`, all of one bucket: [B, ...] by name, on the CPU.

        The names are those that the encode function gives, and "mask", [B, height / 8, width / 8], where any of these
        images has one (then it is 1 everywhere for the others).
        """
        ...


@dataclass(frozen=True)
class _Kinds:
    """What is known of N images beside their pictures."""

    masked: Flags
    mirrored: Flags
    """[N]: whether they are also shown mirrored."""
    order: Numbers
    """[N]: images of one bucket and of equal `masked` side by side."""

    @classmethod
    def of(cls, index: ImageIndex) -> _Kinds:
        masked = np.array([subset.masked for subset in index.dataset.subsets], bool)[index.subset_of]
        mirrored = np.array([subset.flip_aug for subset in index.dataset.subsets], bool)[index.subset_of]
        return cls(masked, mirrored, np.lexsort((masked, index.bucket_of)))


def _gathered(masked: Flags, gather: Callable[[Numbers], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `gather` gives for a batch whose images are `masked` or not; masks of 1 for those that are not."""
    places = np.arange(len(masked))
    if masked.all() or not masked.any():
        return gather(places)
    result: dict[str, Tensor] = {}
    for some in (places[masked], places[~masked]):
        for name, part in gather(some).items():
            if name not in result:
                result[name] = part.new_ones((len(masked), *part.shape[1:]))
            result[name][torch.from_numpy(some)] = part
    return result


class MemoryCache:
    """What `encode` makes of each picture, as is and, with `flip_aug`, mirrored; on the CPU.

    `npz_suffix`: as for `DiskCache`.
    """

    def __init__(self, npz_suffix: str | None = None) -> None:
        self.npz_suffix = npz_suffix
        self.notes: list[str] = []
        """What is worth telling about .npz files, after `fill`."""
        self._indexes: Sequence[ImageIndex] = ()
        self._kinds: list[_Kinds] = []
        self._slots: list[Numbers] = []
        """For each dataset [N, 2]: where each image is in its table, as is and mirrored."""
        self._tables: dict[tuple[int, int, bool], dict[str, Tensor]] = {}
        """By dataset, bucket and whether there are masks."""

    def __len__(self) -> int:
        return sum(len(next(iter(table.values()))) for table in self._tables.values())

    def fill(self, indexes: Sequence[ImageIndex], encode: Encode, options: FillOptions) -> None:
        """Encode every picture of `indexes`; each rank all of them.

        Raises:
            DataError: if a picture cannot be read, or what comes out is not finite.
        """
        self._indexes, self._kinds, self._slots, self._tables = indexes, [], [], {}
        taken, unfit = list[Path](), Unfit()
        for number, index in enumerate(indexes):
            kinds = _Kinds.of(index)
            counts = (1 + kinds.mirrored.astype(np.int64))[kinds.order]
            groups = (2 * index.bucket_of + kinds.masked)[kinds.order]
            before = np.cumsum(counts) - counts
            slots = np.empty((len(index), 2), np.int64)
            slots[kinds.order, 0] = before - before[np.searchsorted(groups, groups)]
            slots[:, 1] = slots[:, 0] + 1
            self._kinds.append(kinds)
            self._slots.append(slots)
            sizes = dict(zip(*np.unique(np.repeat(groups, counts), return_counts=True), strict=True))
            files, older = files_beside(index, self.npz_suffix)
            wanted = {int(group): int(count) for group, count in sizes.items()}
            mismatched = self._fill_one(number, wanted, encode, options, files)
            taken += [path for place, path in files.items() if place not in mismatched]
            unfit += older + [(files[place], mismatched[place]) for place in sorted(mismatched)]
        self.notes = summary(taken, unfit)

    def _fill_one(
        self, number: int, sizes: dict[int, int], encode: Encode, options: FillOptions, files: Mapping[int, Path]
    ) -> dict[int, str]:
        """Fill the tables of a dataset; those images whose .npz file in `files` does not match, with the reason."""
        index, kinds = self._indexes[number], self._kinds[number]
        mismatched: dict[int, str] = {}

        def read(place: int) -> list[Shown] | NpzRows:
            record = index.record(place)
            if stands_alone(record.path):
                return read_alone(record)
            if place in files:
                try:
                    return read_npz(files[place], record)
                except Mismatch as reason:
                    mismatched[place] = str(reason)
            pictures = centred_pictures(decode(record.path), record, bool(kinds.mirrored[place]))
            return [Shown(record.path, picture, place, bool(flip)) for flip, picture in enumerate(pictures)]

        def keep(chosen: list[Shown], rows: dict[str, Tensor]) -> None:
            put([(shown.place, shown.flip) for shown in chosen], rows)

        def put(chosen: list[tuple[int, bool]], rows: dict[str, Tensor]) -> None:
            bucket, masked = int(index.bucket_of[chosen[0][0]]), "mask" in rows
            table = self._tables.setdefault((number, bucket, masked), {})
            slots = torch.tensor([int(self._slots[number][place, int(flip)]) for place, flip in chosen])
            for name, encoded in rows.items():
                if name not in table:
                    table[name] = torch.empty((sizes[2 * bucket + masked], *encoded.shape[1:]), dtype=encoded.dtype)
                table[name][slots] = encoded

        encoder = Encoder(encode, options.batch_size, keep)
        order = kinds.order.tolist()
        for place, found in zip(order, ahead(read, order, options.workers, options.window), strict=True):
            if isinstance(found, NpzRows):
                for flip, rows in enumerate(found.rows()):
                    put([(place, bool(flip))], {name: torch.from_numpy(row[None]) for name, row in rows.items()})
            else:
                for one in found:
                    encoder.add(one)
            options.progress(1)
        encoder.finish()
        return mismatched

    def rows(self, number: int, places: Sequence[int], flips: Sequence[bool]) -> dict[str, Tensor]:
        """See `LatentRows`."""
        wanted = np.asarray(places, np.int64)
        masked = self._kinds[number].masked[wanted]
        slots = self._slots[number][wanted, np.asarray(flips, np.int64)]
        bucket = int(self._indexes[number].bucket_of[wanted[0]])

        def gather(some: Numbers) -> dict[str, Tensor]:
            table = self._tables[number, bucket, bool(masked[some[0]])]
            chosen = torch.from_numpy(slots[some])
            return {name: torch.index_select(encoded, 0, chosen) for name, encoded in table.items()}

        return _gathered(masked, gather)


class DiskCache:
    """Encoded pictures in a store, named by all that determines them (`RowNames`).

    So a row stays valid when the dataset moves, and none is ever used for something else. `encoder` is a digest of
    everything about the autoencoder that determines rows. With `npz_suffix` ("_sd" or "_sdxl") sd-scripts' latents
    beside the images take the place of encoding where they match; what they hold is copied into the store.
    """

    def __init__(self, store: RowStore, encoder: str, npz_suffix: str | None = None) -> None:
        self.store, self.npz_suffix = store, npz_suffix
        self.cache_dir = store.folder.parent
        self.hashes = ContentHashes(self.cache_dir)
        self.names = RowNames(encoder, self.hashes)
        self.notes: list[str] = []
        """What is worth telling about damage and .npz files, after `fill`."""
        self._indexes: Sequence[ImageIndex] = ()
        self._kinds: list[_Kinds] = []
        self._handles: list[Handles] = []
        """For each dataset [N, 2]: the row of each image, as is and mirrored; -1 where there is none."""
        self._npz: list[dict[int, Path]] = []
        """For each dataset the .npz files that are no older than their images."""

    def fill(self, indexes: Sequence[ImageIndex], encode: Encode, options: FillOptions) -> None:
        """Encode every picture of `indexes` that the store does not have intact, of this rank's share.

        What is done is kept, whatever happens later. With several ranks `ready` has to follow when all are through.

        Raises:
            DataError: if a picture cannot be read, or what comes out is not finite.
            RunError: if the disk refuses.
        """
        self._indexes, self._kinds = indexes, [_Kinds.of(index) for index in indexes]
        self._handles = [np.full((len(index), 2), -1, np.int64) for index in indexes]
        mine = [kinds.order[options.rank :: options.world] for kinds in self._kinds]
        self.store.refresh()
        self.notes = [f"{path}: not used, {reason}" for path, reason in self.store.damaged.items()]
        beside = [files_beside(index, self.npz_suffix) for index in indexes]
        self._npz = [files for files, _ in beside]
        self._locate()
        self._check()
        if self.notes:
            self.notes.append(f"remove what is damaged: sd-train cache verify --repair --cache_dir {self.cache_dir}")
        try:
            self._take_npz(mine, [each for _, unfit in beside for each in unfit])
            seen = set[bytes]()
            for number, order in enumerate(mine):
                missing = self._missing(number)[order]
                options.progress(int((~missing).sum()))
                self._encode(number, order[missing], encode, options, seen)
        finally:
            self.store.flush()
        if options.world == 1:
            self.ready()

    def ready(self) -> None:
        """Find the rows that other processes have written.

        Raises:
            DataError: if any are missing.
        """
        self.store.refresh()
        self._locate()
        absent = [(index, np.flatnonzero(self._missing(number))) for number, index in enumerate(self._indexes)]
        if count := sum(len(places) for _, places in absent):
            first = next(index.path(int(places[0])) for index, places in absent if len(places))
            raise DataError(
                f"{self.store.folder}: the latents of {count} images are missing, the first is {first}; was the folder "
                "emptied, an image changed, or is --cache_dir not the same for all processes? Start again"
            )

    def rows(self, number: int, places: Sequence[int], flips: Sequence[bool]) -> dict[str, Tensor]:
        """See `LatentRows`.

        Raises:
            DataError: if a row is damaged.
        """
        wanted = np.asarray(places, np.int64)
        handles = self._handles[number][wanted, np.asarray(flips, np.int64)]
        return _gathered(self._kinds[number].masked[wanted], lambda some: self.store.rows(handles[some]))

    def _missing(self, number: int) -> Flags:
        """[N]: whether a row of the image is missing."""
        handles = self._handles[number]
        missing: Flags = (handles[:, 0] < 0) | (self._kinds[number].mirrored & (handles[:, 1] < 0))
        return missing

    def _locate(self) -> None:
        """Look for the rows that are missing."""
        for number, (index, handles) in enumerate(zip(self._indexes, self._handles, strict=True)):
            missing = self._missing(number)
            if files := {place: path for place, path in self._npz[number].items() if missing[place]}:
                places = np.array(list(files), np.int64)
                contents = self.hashes.of_files(list(files.values()))
                handles[places] = self.store.locate(self.names.keys(index, places, contents, npz=True))
            rest = np.flatnonzero(self._missing(number))
            known = self.hashes.known([index.path(place) for place in rest.tolist()], index.stats[rest])
            seen = rest[np.array([content is not None for content in known], bool)]
            contents = [content for content in known if content is not None]
            handles[seen] = self.store.locate(self.names.keys(index, seen, contents, npz=False))

    def _check(self) -> None:
        """Look at every row, where that takes seconds; those that are damaged count as missing."""
        everything = np.concatenate([np.empty(0, np.int64), *(found.reshape(-1) for found in self._handles)])
        there = np.unique(everything[everything >= 0])
        if self.store.bytes_of(there) > CHECK_AT_START:
            return
        damaged = there[~self.store.check(there)]
        if len(damaged):
            self.notes.append(f"{self.store.folder}: {len(damaged)} rows are damaged and are encoded anew")
            for handles in self._handles:
                handles[np.isin(handles, damaged)] = -1
            # The same may stand elsewhere too.
            self._locate()

    def _take_npz(self, mine: Sequence[Numbers], unfit: Unfit) -> None:
        """Copy matching .npz files into the store, for those images of `mine` that have no rows."""
        taken: list[Path] = []
        for number, index in enumerate(self._indexes):
            share = set(mine[number][self._missing(number)[mine[number]]].tolist())
            files = {place: path for place, path in self._npz[number].items() if place in share}
            places, contents = np.array(list(files), np.int64), self.hashes.of_files(list(files.values()))
            for keys, (place, path) in zip(
                self.names.keys(index, places, contents, npz=True), files.items(), strict=True
            ):
                record = index.record(place)
                try:
                    found = (read_alone(record) if stands_alone(record.path) else read_npz(path, record)).rows()
                except Mismatch as reason:
                    unfit.append((path, str(reason)))
                    continue
                for flip, rows in enumerate(found):
                    tensors = {name: torch.from_numpy(row[None]) for name, row in rows.items()}
                    self.store.put(keys[flip : flip + 1], tensors)
                taken.append(path)
        self.notes += summary(taken, unfit)
        if taken:
            self.store.flush()
            self._locate()

    def _encode(
        self, number: int, places: Numbers, encode: Encode, options: FillOptions, seen: set[bytes]
    ) -> None:
        """Encode the images `places` of dataset `number`, each content once."""
        index, mirrored = self._indexes[number], self._kinds[number].mirrored
        known = self.hashes.known([index.path(place) for place in places.tolist()], index.stats[places])
        contents = dict(zip(places.tolist(), known, strict=True))
        new: dict[int, bytes] = {}

        def read(place: int) -> tuple[int, bytes, list[Shown]]:
            record = index.record(place)
            decoded = decode(record.path)
            pictures = centred_pictures(decoded, record, bool(mirrored[place]))
            shown = [Shown(record.path, picture, place, bool(flip)) for flip, picture in enumerate(pictures)]
            return place, contents[place] or content_digest(decoded), shown

        def remember() -> None:
            self.hashes.remember([index.path(place) for place in new], index.stats[list(new)], list(new.values()))
            new.clear()

        def keep(chosen: list[Shown], rows: dict[str, Tensor]) -> None:
            self.store.put([one.key for one in chosen], rows)

        encoder = Encoder(encode, options.batch_size, keep)
        try:
            for place, content, shown in ahead(read, places.tolist(), options.workers, options.window):
                if contents[place] is None:
                    new[place] = content
                    if len(new) >= _REMEMBER_EVERY:
                        remember()
                keys = self.names.keys(index, np.array([place]), [content], npz=False)[0]
                # A dataset that has moved is recognised by its contents only now.
                there = self.store.locate(keys)
                for one, handle in zip(shown, there.tolist(), strict=False):
                    key = keys[int(one.flip) : int(one.flip) + 1].tobytes()
                    if handle < 0 and key not in seen:
                        seen.add(key)
                        encoder.add(replace(one, key=key))
                options.progress(1)
            encoder.finish()
        finally:
            remember()
