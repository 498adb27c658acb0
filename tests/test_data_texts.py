"""Encoded captions on disk: shared by processes, whole after damage and interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_train.data.shards import read_head
from sd_train.data.store import RowStore
from sd_train.data.texts import DiskTexts, TextFill
from sd_train.errors import DataError

CAPTIONS = [f"a photo of frog number {number}, 漢字 😀" for number in range(45)] + [""]


class Encode:
    """Length and number of a caption; counts what it is given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.seen += captions
        return {"states": torch.tensor([[float(len(caption)), *map(float, caption[:20].encode().ljust(20)[:20])]
                                        for caption in captions])}


def how(encode: Encode, rank: int = 0, world: int = 1) -> TextFill:
    return TextFill(encode, lambda count: None, rank, world)


def opened(folder: Path) -> DiskTexts:
    return DiskTexts(RowStore(folder / "texts"), "encoder")


def check(texts: DiskTexts) -> None:
    chosen = [CAPTIONS[7], "", CAPTIONS[7], CAPTIONS[30]]
    assert torch.equal(texts.rows(chosen)["states"], Encode()(chosen)["states"])


def test_a_rank_that_starts_late_still_does_its_share(tmp_path: Path) -> None:
    """Which captions are whose must not depend on what the other rank has written meanwhile."""
    early, late, encode = opened(tmp_path), opened(tmp_path), Encode()
    early.fill(CAPTIONS, how(encode, 0, 2))
    late.fill(CAPTIONS, how(encode, 1, 2))
    assert sorted(encode.seen) == sorted(CAPTIONS)
    for texts in (early, late):
        texts.ready()
        check(texts)


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path) -> None:
    class Failing(Encode):
        def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
            if len(self.seen) >= 32:
                raise KeyboardInterrupt
            return super().__call__(captions)

    first, second = Failing(), Encode()
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path).fill(CAPTIONS, how(first))
    texts = opened(tmp_path)
    texts.fill(CAPTIONS, how(second))
    texts.ready()
    assert (first.seen, second.seen) == (CAPTIONS[:32], CAPTIONS[32:])
    check(texts)
    assert texts.notes == []


def test_damaged_rows_are_encoded_anew_before_the_training(tmp_path: Path) -> None:
    opened(tmp_path).fill(CAPTIONS, how(Encode()))
    (shard,) = (tmp_path / "texts").glob("*.safetensors")
    head, whole = read_head(shard), np.fromfile(shard, np.uint8)
    for row in (7, 30, 45):
        whole[head.start + row * head.row_bytes + 5] ^= 1
    whole.tofile(shard)
    texts, encode = opened(tmp_path), Encode()
    texts.fill(CAPTIONS, how(encode))
    texts.ready()
    assert encode.seen == [CAPTIONS[7], CAPTIONS[30], ""]
    assert "3 rows are damaged" in texts.notes[0]
    assert "verify --repair" in texts.notes[-1]
    check(texts)


def test_missing_captions_are_told_of(tmp_path: Path) -> None:
    texts = opened(tmp_path)
    texts.fill(CAPTIONS, how(Encode(), 0, 2))
    with pytest.raises(DataError, match="23 encoded captions are missing"):
        texts.ready()
