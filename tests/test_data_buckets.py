"""Buckets as properties, and the policy `merge`; test_conformance.py compares them with sd-scripts'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_train.data.buckets import assign, assign_many, bucket_resolutions, merge_small
from sd_train.data.settings import DatasetConfig
from sd_train.errors import DataError

SIDES = st.integers(1, 12000)


def dataset(resolution: list[int], enable_bucket: bool = True, **others: Any) -> DatasetConfig:
    return DatasetConfig(batch_size=1, resolution=(resolution[0], resolution[1]), enable_bucket=enable_bucket, **others)


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


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(SIDES, SIDES), max_size=30), st.booleans())
def test_buckets_are_numbered_in_their_order(sizes: list[tuple[int, int]], no_upscale: bool) -> None:
    rows = assign_many(np.array(sizes).reshape(-1, 2), dataset([640, 512], bucket_no_upscale=no_upscale))
    buckets, numbers = rows.numbered()
    assert buckets == sorted({(width, height) for width, height in rows.bucket.tolist()})
    assert [buckets[number] for number in numbers] == [tuple(bucket) for bucket in rows.bucket.tolist()]


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(200, 3000), st.integers(200, 3000), st.sampled_from([0.5, 1, 1, 3])), max_size=25),
    st.integers(1, 9),
    st.booleans(),
)
def test_merging_leaves_no_small_bucket(images: list[tuple[int, int, float]], batch: int, no_upscale: bool) -> None:
    config = replace(dataset([640, 512], bucket_no_upscale=no_upscale), batch_size=batch, bucket_policy="merge")
    sizes, repeats = np.array([image[:2] for image in images]).reshape(-1, 2), np.array([image[2] for image in images])
    before = assign_many(sizes, config)
    after = merge_small(sizes, before, repeats, config)
    samples = Counter[tuple[int, ...]]()
    for bucket, repeat in zip(map(tuple, after.bucket.tolist()), repeats.tolist(), strict=True):
        samples[bucket] += repeat
    assert set(samples) <= set(map(tuple, before.bucket.tolist()))
    for bucket, count in samples.items():
        members = (after.bucket == bucket).all(axis=1)
        others = [other for other in samples if other != bucket and (not no_upscale or (sizes[members] >= other).all())]
        assert count >= batch or not others
    same = (after.bucket == before.bucket).all(axis=1)
    assert (after.resized[same] == before.resized[same]).all()
    assert (after.resized >= after.bucket).all()
    # Just covered: one side fits, but for rounding.
    assert ((after.resized[~same] - after.bucket[~same]).min(axis=1) == 0).all()
    assert not no_upscale or (after.resized <= sizes).all()
    error = after.bucket[:, 0] / after.bucket[:, 1] - sizes[:, 0] / sizes[:, 1]
    assert np.allclose(after.aspect_error, error)


def assigned(sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(width, height) for width, height in assign_many(np.array(sizes), dataset([512, 512])).bucket.tolist()]


def merged(sizes: list[tuple[int, int]], batch_size: int, repeats: int = 1, **options: Any) -> list[tuple[int, int]]:
    config = replace(dataset([512, 512], **options), batch_size=batch_size)
    table = np.array(sizes)
    rows = merge_small(table, assign_many(table, config), np.full(len(sizes), float(repeats)), config)
    return [(width, height) for width, height in rows.bucket.tolist()]


def test_a_small_bucket_goes_where_least_is_cropped() -> None:
    # 640x384 cut to 576x448: 0.771 of it is kept; to 704x320: 0.758; to 384x640: 0.36.
    large = [(704, 320)] * 4 + [(576, 448)] * 4 + [(384, 640)] * 4
    assert merged([(640, 384), *large], 4) == [(576, 448), *large]
    # The smallest first: one 640x384 joins the two 704x320, and as three they fill a batch.
    assert merged([(640, 384), *[(704, 320)] * 2, *[(320, 704)] * 3], 3) == [(704, 320)] * 3 + [(320, 704)] * 3
    # With two buckets too small one is left, and it may stay small.
    assert merged([(640, 384), (384, 640), (384, 640)], 9) == [(384, 640)] * 3


def test_left_over_images_make_the_next_buckets_batches_full() -> None:
    square, wide, tall = (512, 512), (576, 448), (320, 704)
    # One too many of the squares, three of the wide ones: the one that is nearer to the other shape goes.
    given = [*[square] * 4, (560, 512), *[wide] * 7]
    assert merged(given, 4) == [*[square] * 4, *[wide] * 8]
    # Three too few: one comes back.
    given = [*[square] * 7, (560, 480), *[wide] * 4]
    assert assigned(given) == [*[square] * 7, *[wide] * 5]
    assert merged(given, 4) == [*[square] * 8, *[wide] * 4]
    # A tall picture would lose more than half of itself; and a bucket never becomes smaller than a batch.
    given = [*[tall] * 5, *[square] * 7]
    assert merged(given, 4) == given
    assert merged([*[square] * 5, *[wide] * 4], 4) == [*[square] * 5, *[wide] * 4]
    # Seen three times each, four images fill three batches of four.
    given = [*[square] * 5, *[wide] * 7]
    assert Counter(merged(given, 4, repeats=3)) == Counter([*[square] * 4, *[wide] * 8])
    assert merged(given, 3, repeats=3) == given


def test_large_pictures_do_not_become_small_ones_by_merging() -> None:
    def small_and_large(large: int, small: int) -> list[tuple[int, int]]:
        config = replace(dataset([1024, 1024], bucket_no_upscale=True), batch_size=4)
        sizes = np.array([(1100, 1100)] * large + [(256, 256)] * small + [(1100, 950)] * 4)
        rows = merge_small(sizes, assign_many(sizes, config), np.ones(len(sizes)), config)
        return [(width, height) for width, height in rows.bucket.tolist()]

    # Both are left over, and the wider ones' bucket is full.
    assert small_and_large(5, 7)[:5] == [(1024, 1024)] * 5
    # Too few: into the wider ones' bucket, not to a sixteenth of their size.
    assert small_and_large(2, 4)[0] == small_and_large(2, 4)[-1] != (256, 256)


def test_nothing_is_enlarged_by_merging_without_upscale() -> None:
    large = [(512, 512)] * 4
    assert merged([(300, 300), *large], 4, bucket_no_upscale=True) == [(256, 256), *large]
    assert merged([(300, 300), *large], 4) == [(512, 512)] * 5
    assert merged([(600, 400), *[(448, 384)] * 4], 4, bucket_no_upscale=True) == [(448, 384)] * 5
