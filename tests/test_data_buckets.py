"""Buckets against sd-scripts' own answers, and as properties."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_train.data.buckets import assign, assign_many, bucket_resolutions, crop_box
from sd_train.data.config import DatasetConfig
from sd_train.errors import DataError

GOLDEN = json.loads((Path(__file__).parent / "data/buckets.json").read_text(encoding="utf-8"))
SIDES = st.integers(1, 12000)


def dataset(resolution: list[int], enable_bucket: bool = True, **others: Any) -> DatasetConfig:
    return DatasetConfig(batch_size=1, resolution=(resolution[0], resolution[1]), enable_bucket=enable_bucket, **others)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: "-".join(map(str, case["settings"].values())))
def test_equals_sd_scripts(case: dict[str, Any]) -> None:
    config = dataset(**case["settings"])
    if "buckets" in case:
        limits = config.min_bucket_reso, config.max_bucket_reso, config.bucket_reso_steps
        assert [list(bucket) for bucket in bucket_resolutions(config.resolution, *limits)] == case["buckets"]
    rows = assign_many(np.array(GOLDEN["sizes"]), config)
    for number, expected in enumerate(case["rows"]):
        if expected is None or 0 in expected[:2]:
            assert not rows.usable[number]
            continue
        bucket, resized = tuple(rows.bucket[number].tolist()), tuple(rows.resized[number].tolist())
        assert [*bucket, *resized] == expected[:4]
        if len(expected) > 4:
            assert list(crop_box(resized, bucket)) == expected[4:]
        size = GOLDEN["sizes"][number]
        assert rows.aspect_error[number] == bucket[0] / bucket[1] - size[0] / size[1]


def test_limits_are_rounded_to_steps() -> None:
    assert bucket_resolutions((512, 512), 300, 1000, 64) == bucket_resolutions((512, 512), 256, 1024, 64)
    with pytest.raises(ValueError, match="below one step"):
        bucket_resolutions((512, 512), 63, 1024, 64)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=20), st.sampled_from(["off", "upscale", "no_upscale"]))
def test_nearest_bucket_covers_and_one_image_is_assigned_as_many(sizes: list[tuple[int, int]], mode: str) -> None:
    config = dataset([640, 512], enable_bucket=mode != "off", bucket_no_upscale=mode == "no_upscale")
    rows = assign_many(np.array(sizes), config)
    ratios = [width / height for width, height in bucket_resolutions((640, 512), 256, 1024, 64)]
    for number, size in enumerate(sizes):
        if not rows.usable[number]:
            assert mode == "no_upscale"
            with pytest.raises(DataError, match=r"photo\.png.*bucket_no_upscale = false"):
                assign(size, config, "photo.png")
            continue
        one = assign(size, config)
        assert [*one.bucket, *one.resized] == [*rows.bucket[number], *rows.resized[number]]
        assert one.resized[0] >= one.bucket[0]
        assert one.resized[1] >= one.bucket[1]
        if mode == "no_upscale":
            assert one.resized[0] <= size[0] + 1
            assert one.resized[1] <= size[1] + 1
        elif mode == "upscale" and size not in bucket_resolutions((640, 512), 256, 1024, 64):
            aspect = size[0] / size[1]
            assert abs(one.bucket[0] / one.bucket[1] - aspect) == min(abs(ratio - aspect) for ratio in ratios)


def test_a_size_that_is_a_bucket_keeps_it() -> None:
    for size in bucket_resolutions((512, 512), 256, 1024, 64):
        assert assign(size, dataset([512, 512])).bucket == size
