"""Captions encoded once: what the text encoder makes of every caption that a training can show."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from sd_train.data.cache import CHECK_AT_START
from sd_train.data.captions import caption_variants
from sd_train.data.index import ImageIndex
from sd_train.data.store import Handles, RowStore
from sd_train.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

EncodeTexts = Callable[[Sequence[str]], "dict[str, Tensor]"]
_FORMAT = 1
_BATCH = 16


class TextRows(Protocol):
    """Where batches take encoded captions from."""

    def rows(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """[B] captions -> stacked rows, by name as `Family.encode_texts` gives them."""
        ...


@dataclass(frozen=True)
class TextFill:
    """How captions are encoded."""

    encode: EncodeTexts
    progress: Callable[[int], object]
    rank: int = 0
    world: int = 1


def all_captions(indexes: Iterable[ImageIndex], seed: int, variants: int | None, end: int) -> list[str]:
    """Every prompt that the samples of `indexes` can have, each once, in order of first use.

    `variants`: versions of each caption that varies; `end`: updates of the training, for a token warm-up.
    """
    found: dict[str, None] = {}
    for index in indexes:
        for row in range(len(index)):
            found.update(dict.fromkeys(caption_variants(index.record(row), seed, variants or 1, end)))
    return list(found)


def _batches(captions: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(captions), _BATCH):
        yield captions[start : start + _BATCH]


class MemoryTexts:
    """Encoded captions in memory, on the CPU."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, captions: Sequence[str], how: TextFill) -> None:
        """Encode `captions`; every rank keeps them all."""
        for chosen in _batches(captions):
            encoded = {name: rows.cpu() for name, rows in how.encode(chosen).items()}
            for row, caption in enumerate(chosen):
                self._rows[caption] = {name: rows[row].clone() for name, rows in encoded.items()}
            how.progress(len(chosen))

    def rows(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """[B] captions -> stacked rows by name."""
        found = [self._rows[caption] for caption in captions]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}


class DiskTexts:
    """Encoded captions in the cache folder, named by caption and encoder."""

    def __init__(self, store: RowStore, encoder: str) -> None:
        self.store, self.encoder = store, encoder
        self.notes: list[str] = []
        """What is worth telling about damage, after `fill`."""
        self._keys: dict[str, bytes] = {}
        self._handles: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, caption: str) -> bytes:
        """What the store calls `caption`, encoded by this encoder: 16 bytes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"texts {_FORMAT} {self.encoder}\n".encode())
        digest.update(caption.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def fill(self, captions: Sequence[str], how: TextFill) -> None:
        """Encode those of `captions` that the store does not hold intact, this rank's share of them.

        What is done is kept, whatever happens later; `ready` has to follow when all ranks are through.

        Raises:
            RunError: if the disk refuses.
        """
        self._keys = {caption: self.key(caption) for caption in captions}
        self.store.refresh()
        self.notes = [f"{path}: not used, {reason}" for path, reason in self.store.damaged.items()]
        self._check(self._locate(captions))
        if self.notes:
            cache_dir = self.store.folder.parent
            self.notes.append(f"remove what is damaged: sd-train cache verify --repair --cache_dir {cache_dir}")
        mine = captions[how.rank :: how.world]
        missing = [caption for caption, handle in zip(mine, self._locate(mine).tolist(), strict=True) if handle < 0]
        how.progress(len(mine) - len(missing))
        try:
            for chosen in _batches(missing):
                encoded = {name: rows.cpu() for name, rows in how.encode(chosen).items()}
                self.store.put([self._keys[caption] for caption in chosen], encoded)
                how.progress(len(chosen))
        finally:
            self.store.flush()

    def _locate(self, captions: Sequence[str]) -> Handles:
        return self.store.locate([self._keys[caption] for caption in captions])

    def _check(self, handles: Handles) -> None:
        """Look at every row, where that takes seconds; those that are damaged are not found again."""
        there = np.unique(handles[handles >= 0])
        if self.store.bytes_of(there) > CHECK_AT_START:
            return
        damaged = int((~self.store.check(there)).sum())
        if damaged:
            self.notes.append(f"{self.store.folder}: {damaged} rows are damaged and are encoded anew")

    def ready(self) -> None:
        """Look again at what all ranks have written.

        Raises:
            DataError: if a caption is missing.
        """
        self.store.refresh()
        captions = list(self._keys)
        self._handles = dict(zip(captions, self._locate(captions).tolist(), strict=True))
        absent = [caption for caption, handle in self._handles.items() if handle < 0]
        if absent:
            raise DataError(
                f"{self.store.folder}: {len(absent)} encoded captions are missing, the first is {absent[0]!r}; was the "
                "folder emptied, or is --cache_dir not the same for all processes? Start again"
            )

    def rows(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """[B] captions -> stacked rows by name.

        Raises:
            DataError: if a row is damaged.
        """
        return self.store.rows([self._handles[caption] for caption in captions])
