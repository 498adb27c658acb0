"""Captions as properties, variants, broken files; test_conformance.py compares them with sd-scripts'."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_train.data.captions import (
    caption_of,
    caption_variants,
    needs_variants,
    process_caption,
    sample_caption,
)
from sd_train.data.record import ImageRecord
from sd_train.data.scan import FolderScan, scan_folder
from sd_train.data.settings import SubsetConfig


def subset(**options: Any) -> SubsetConfig:
    return SubsetConfig(image_dir=Path("photos"), **options)


def prompt(caption: str, seed: int = 0, epoch: int = 0, step: int = 0, **options: Any) -> str:
    return process_caption(caption, subset(**options), random.Random(seed), epoch, step, 100)


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


def test_caption_files_of_windows_and_broken_ones(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "a.txt"

    def scanned() -> FolderScan:
        return scan_folder(tmp_path, ".txt", None)

    path.write_bytes(b"\xef\xbb\xbfred, blue\r\nsecond\r\n")
    assert caption_of(scanned().texts[0], False) == "red, blue"
    assert caption_of(scanned().texts[0], True) == "red, blue\nsecond"
    path.write_bytes(b"")
    assert re.search(r"a\.txt: the caption file is empty", scanned().caption_problems[0])
    path.write_bytes("für".encode("latin-1"))
    assert re.search(r"a\.txt: byte 1 is not UTF-8", scanned().caption_problems[0])


TEXTS = st.text(alphabet="ab,|{} ;\n", max_size=24)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "enable_wildcard": st.booleans(),
        "shuffle_caption": st.booleans(),
        "caption_tag_dropout_rate": st.sampled_from([0.0, 0.3, 1.0]),
        "caption_dropout_rate": st.sampled_from([0.0, 0.3, 1.0]),
        "caption_dropout_every_n_epochs": st.integers(0, 3),
        "keep_tokens": st.integers(0, 2),
        "keep_tokens_separator": st.sampled_from(["", "||"]),
        "secondary_separator": st.sampled_from([None, ";"]),
        "caption_prefix": st.sampled_from([None, "pre, {x|y}"]),
        "caption_suffix": st.sampled_from([None, "suf"]),
        "token_warmup_min": st.integers(0, 4),
        "token_warmup_step": st.sampled_from([0, 0.3, 1, 2.5, 7, 400]),
    },
)


def record_of(caption: str, **options: Any) -> ImageRecord:
    return ImageRecord(Path("a.png"), "a.png", subset(**options), (8, 8), (8, 8), (8, 8), caption, 1.0, False)


@settings(deadline=None, max_examples=200)
@example("a,b,aa,bb,ab,ba", {"shuffle_caption": True, "token_warmup_step": 7}, 3, 30, 0)
@given(TEXTS, OPTIONS, st.integers(1, 5), st.integers(0, 30), st.integers(0, 9))
def test_every_caption_is_among_its_variants(
    caption: str, options: dict[str, Any], variants: int, end: int, seed: int
) -> None:
    record = record_of(caption, **options)
    listed = caption_variants(record, seed, variants, end)
    assert len(set(listed)) == len(listed)
    shown = {
        sample_caption(record, seed, epoch, repeat, step, end, variants)
        for epoch in range(4)
        for repeat in range(4)
        for step in range(0, end + 2, 2)
    }
    assert shown <= set(listed)
    if needs_variants(record.subset) is None:
        plain = {sample_caption(record, seed, epoch, 0, 0, end) for epoch in range(9)}
        assert plain <= set(caption_variants(record, seed, None, end))
        assert len(listed) <= 2


def test_variants_are_drawn_about_evenly_and_all_of_them() -> None:
    record = record_of(", ".join(map(str, range(30))), shuffle_caption=True, caption_dropout_rate=0.25)
    listed = caption_variants(record, 3, 4, 0)
    assert len(listed) == 5
    assert listed[-1] == ""
    drawn = Counter(sample_caption(record, 3, epoch, repeat, 0, 0, 4) for epoch in range(100) for repeat in range(10))
    assert set(drawn) == set(listed)
    assert 200 < drawn[""] < 300
    assert all(140 < drawn[text] < 235 for text in listed[:-1])


def test_stages_of_the_warmup_are_listed_once_each() -> None:
    record = record_of("a, b, c, d", token_warmup_step=1_000_000)
    assert caption_variants(record, 0, 3, 0) == ["a", "a, b", "a, b, c", "a, b, c, d"]
    assert caption_variants(record_of("a, b", caption_dropout_rate=1.0), 0, 3, 0) == [""]
    assert caption_variants(record_of("a, b", caption_dropout_every_n_epochs=2), 0, None, 0) == ["a, b", ""]


def test_the_option_that_makes_captions_vary_is_named() -> None:
    given_options: list[dict[str, Any]] = [
        {"shuffle_caption": True}, {"enable_wildcard": True}, {"caption_tag_dropout_rate": 0.1},
        {"token_warmup_step": 0.5},
    ]  # fmt: skip
    for options in given_options:
        assert needs_variants(subset(**options)) == next(iter(options))
    fixed = {"caption_dropout_rate": 0.5, "keep_tokens": 1, "caption_prefix": "x", "secondary_separator": ";"}
    assert needs_variants(subset(**fixed)) is None
