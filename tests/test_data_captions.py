"""Captions: sd-scripts' answers, the places where they were mistakes, caption files."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_train.data.captions import caption_name, process_caption, read_caption, sample_caption
from sd_train.data.config import SubsetConfig
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "data/captions.json").read_text(encoding="utf-8"))
MENDED = {
    "a, b ||| c, d ||| e, f ||| g": "a, b, c, d, e, f, g",
    "l1 a\nl2 b": "PRE l1 a SUF",
    "a;b;c;d": {True: "c; a; b; d", False: "a;b;c;d"},
}


def subset(**options: Any) -> SubsetConfig:
    return SubsetConfig(image_dir=Path("photos"), **options)


def prompt(caption: str, seed: int = 0, epoch: int = 0, step: int = 0, **options: Any) -> str:
    return process_caption(caption, subset(**options), random.Random(seed), epoch, step, 100)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_sd_scripts_with_the_same_draws(case: dict[str, Any]) -> None:
    rng, options = random.Random(case.get("seed", 0)), subset(**case["options"])
    epoch, step, end = case.get("epoch", 1) - 1, case.get("step", 0), case.get("max_steps", 0)
    results = [process_caption(case["caption"], options, rng, epoch, step, end) for _ in range(case.get("n", 1))]
    mended = MENDED.get(case["caption"], case["result"])
    expected = mended[options.shuffle_caption] if isinstance(mended, dict) else mended
    assert results == (expected if "n" in case else [expected])


def test_kept_parts_are_joined_when_nothing_shuffles() -> None:
    assert prompt("a, b ||| c, d ||| e", keep_tokens_separator="|||") == "a, b, c, d, e"
    assert prompt("a; b|||c", keep_tokens_separator="|||", caption_separator=";") == "a; b; c"
    assert prompt("a,  b", keep_tokens_separator="|||") == "a,  b"


@given(st.text(alphabet="ab,| {}\n;"), st.booleans(), st.integers(0, 3), st.integers(0, 9))
def test_separator_never_stays_and_no_tag_is_invented(caption: str, shuffle: bool, keep: int, seed: int) -> None:
    options: dict[str, Any] = {"shuffle_caption": shuffle, "keep_tokens": keep, "keep_tokens_separator": "||"}
    result = prompt(caption, seed, **options)
    assert "||" not in result
    assert not Counter(result.replace(",", "").replace(" ", "")) - Counter(caption)


def test_prefix_and_suffix_go_onto_the_chosen_line() -> None:
    options: dict[str, Any] = {"enable_wildcard": True, "caption_prefix": "PRE", "caption_suffix": "{s|t}"}
    results = {prompt("one\ntwo\nthree", seed, **options) for seed in range(100)}
    assert results == {f"PRE {line} {end}" for line in ("one", "two", "three") for end in "st"}


def test_dropout_epochs_are_counted_from_one() -> None:
    dropped = [epoch for epoch in range(7) if prompt("a cat", epoch=epoch, caption_dropout_every_n_epochs=3) == ""]
    assert dropped == [2, 5]


def test_dropout_rates_are_shares() -> None:
    rng, options = random.Random(0), subset(caption_dropout_rate=0.3)
    dropped = sum(process_caption("a", options, rng, 0, 0, 0) == "" for _ in range(4000))
    assert 0.27 < dropped / 4000 < 0.33


def test_a_sample_depends_on_its_name_alone() -> None:
    def caption(key: str = "a.png", epoch: int = 0, repeat: int = 0, seed: int = 1, step: int = 0) -> str:
        text = ", ".join(map(str, range(30)))
        options = subset(shuffle_caption=True)
        record = ImageRecord(Path(key), key, options, (8, 8), (8, 8), (8, 8), text, 1.0, False)
        return sample_caption(record, seed, epoch, repeat, step, 100)

    assert caption() == caption(step=7)
    assert len({caption(), caption(key="b.png"), caption(epoch=1), caption(repeat=1), caption(seed=2)}) == 5
    state = random.getstate()
    caption()
    assert random.getstate() == state


@pytest.mark.parametrize("case", GOLDEN["files"], ids=lambda case: f"{case['image']}-{case['captions'][0]!r}")
def test_caption_files(case: dict[str, Any], tmp_path: Path) -> None:
    for name, text in case["files"].items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    name = caption_name(case["image"], ".txt", set(case["files"]))
    found = case["class_tokens"] or "" if name is None else read_caption(tmp_path / name, case["enable_wildcard"])
    assert [found] == case["captions"]


def test_caption_files_of_windows_and_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfred, blue\r\nsecond\r\n")
    assert read_caption(path, False) == "red, blue"
    assert read_caption(path, True) == "red, blue\nsecond"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt: the caption file is empty"):
        read_caption(path, False)
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: byte 1 is not UTF-8"):
        read_caption(path, False)
