"""The guarantee of the order: every image its planned number of times, from anywhere, for any workers and ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_train.data.batches import Appearance, BatchSettings, Updates
from sd_train.data.captions import sample_caption
from sd_train.data.images import sample_view
from sd_train.data.index import ImageIndex
from sd_train.data.order import MicroBatch, Order
from sd_train.data.samples import permutation
from sd_train.data.settings import SubsetConfig
from sd_train.diffusion.draws import Draws, DrawSettings, draw
from sd_train.types import Batch, Progress, Update
from tests.indexes import make_index

EPOCHS = 4
POLICIES = ["keep", "merge", "fill", "carry"]


@st.composite
def datasets(draw_from: st.DrawFn) -> list[ImageIndex]:
    found = []
    for _ in range(draw_from(st.integers(1, 2))):
        buckets = draw_from(st.lists(st.integers(0, 3), min_size=1, max_size=14))
        kinds = draw_from(st.lists(st.sampled_from([1, 1, 2, 3, 0.5, 2.5, 0.3]), min_size=1, max_size=2))
        repeats = [kinds[row % len(kinds)] for row in range(len(buckets))]
        policy, size = draw_from(st.sampled_from(POLICIES)), draw_from(st.integers(1, 5))
        found.append(make_index(buckets, repeats, batch_size=size, bucket_policy=policy))
    return found


def slots_of(order: Order, epoch: int) -> list[MicroBatch]:
    found = order.epoch(epoch)
    return [found.batch(number) for number in range(len(found))]


def samples_of(slot: MicroBatch) -> list[tuple[int, int, int, int]]:
    """(dataset, record, epoch of the sample, repeat) of each planned sample."""
    rows = zip(slot.records.tolist(), slot.epochs.tolist(), slot.repeats.tolist(), strict=True)
    return [(slot.dataset, *row) for row in rows][: slot.planned]


def planned(order: Order, number: int, epoch: int) -> list[tuple[int, int, int, int]]:
    counts = order.counts(number, epoch).tolist()
    return [(number, record, epoch, repeat) for record, count in enumerate(counts) for repeat in range(count)]


def same(first: Sequence[MicroBatch], second: Sequence[MicroBatch]) -> bool:
    return len(first) == len(second) and all(
        mine.dataset == other.dataset
        and mine.planned == other.planned
        and all(np.array_equal(getattr(mine, name), getattr(other, name)) for name in
                ("records", "repeats", "epochs", "shares"))
        for mine, other in zip(first, second, strict=True)
    )


@settings(deadline=None, max_examples=80)
@given(datasets(), st.integers(0, 99), st.none() | st.integers(0, EPOCHS - 1))
def test_every_sample_is_shown_as_planned(indexes: list[ImageIndex], seed: int, last: int | None) -> None:
    order = Order(indexes, seed, last_epoch=last)
    epochs = [slots_of(order, epoch) for epoch in range(EPOCHS)]
    for number, index in enumerate(indexes):
        policy, size = index.dataset.bucket_policy, index.dataset.batch_size
        plans = [planned(order, number, epoch) for epoch in range(EPOCHS)]
        shown = [
            [sample for slot in slots if slot.dataset == number for sample in samples_of(slot)] for slots in epochs
        ]
        if policy != "carry":
            assert [sorted(samples) for samples in shown] == plans
        else:
            waiting = Counter[tuple[int, int, int, int]]()
            for epoch, (plan, samples) in enumerate(zip(plans, shown, strict=True)):
                waiting.update(plan)
                waiting.subtract(samples)
                assert set(waiting.values()) <= {0, 1}
                buckets = Counter(int(index.bucket_of[sample[1]]) for sample in waiting.elements())
                assert max(buckets.values(), default=0) < (1 if epoch == last else size)
        for epoch, slots in enumerate(epochs):
            mine = [slot for slot in slots if slot.dataset == number]
            for slot in mine:
                assert len({int(index.bucket_of[record]) for record in slot.records}) == 1
                assert slot.planned <= len(slot.records) <= size
                assert float(slot.shares.sum()) == pytest.approx(slot.planned)
                assert policy != "fill" or len(slot.records) == size
                assert policy == "fill" or slot.planned == len(slot.records)
                assert policy != "carry" or slot.planned == size or epoch == last
                assert policy != "carry" or int(slot.epochs.max()) == epoch or epoch == last
            short = Counter(int(index.bucket_of[slot.records[0]]) for slot in mine if slot.planned < size)
            assert max(short.values(), default=0) <= 1
            in_buckets = Counter(int(index.bucket_of[slot.records[0]]) for slot in mine)
            expected = [in_buckets[bucket] for bucket in range(len(index.buckets))]
            assert order.batches_by_bucket(number, epoch).tolist() == expected


@settings(deadline=None, max_examples=80)
@given(datasets(), st.integers(0, 99), st.integers(1, 6), st.none() | st.integers(0, EPOCHS - 1))
def test_any_epoch_and_update_is_entered_directly(
    indexes: list[ImageIndex], seed: int, per_update: int, last: int | None
) -> None:
    order = Order(indexes, seed, per_update, last)
    epochs = [slots_of(order, epoch) for epoch in range(EPOCHS)]
    step = 0
    for epoch in reversed(range(EPOCHS)):
        assert same(slots_of(Order(indexes, seed, per_update, last), epoch), epochs[epoch])
        assert same(slots_of(order, epoch), epochs[epoch])
    for epoch, slots in enumerate(epochs):
        entered = Order(indexes, seed, per_update, last)
        assert entered.batches_in(epoch) == len(slots)
        assert entered.updates_in(epoch) == -(-len(slots) // per_update)
        assert entered.updates_before(epoch) == step
        for index in range(entered.updates_in(epoch)):
            assert Order(indexes, seed, per_update, last).epoch_of(step) == (epoch, index)
            step += 1
        assert entered.filled_in(epoch) == sum(len(slot.records) - slot.planned for slot in slots)
        carrying = [number for number, found in enumerate(indexes) if found.dataset.bucket_policy == "carry"]
        come = sum(int(order.counts(number, before).sum()) for number in carrying for before in range(epoch + 1))
        gone = sum(slot.planned for before in epochs[: epoch + 1] for slot in before if slot.dataset in carrying)
        assert entered.carried_after(epoch) == come - gone


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0, 2.5, 3.7]), min_size=1, max_size=40), st.integers(0, 9))
def test_fractional_repeats_are_met_by_every_epoch_and_over_all(repeats: list[float], seed: int) -> None:
    order = Order([make_index([0] * len(repeats), repeats)], seed)
    rates, total = np.array(repeats), np.zeros(len(repeats))
    for epoch in range(12):
        counts = order.counts(0, epoch)
        assert (counts >= np.floor(rates)).all()
        assert (counts <= np.ceil(rates)).all()
        total += counts
        assert (np.abs(total - rates * (epoch + 1)) < 1).all()
    for rate in {*repeats} if len({rate for rate in repeats if rate % 1}) == 1 else ():
        alike = rates == rate
        for epoch in range(12):
            assert abs(order.counts(0, epoch)[alike].sum() - rate * alike.sum()) <= 1


def test_the_order_of_whole_repeats_is_the_documented_one() -> None:
    """Sorted by bucket and random number, cut, and the batches sorted by random numbers: runs of old go on."""
    buckets, repeats = [2, 0, 1, 1, 0, 2, 2, 0, 1, 0], [1, 2, 3, 1, 2, 1, 1, 2, 1, 1]
    slots = slots_of(Order([make_index(buckets, repeats, batch_size=2)], 7), 3)
    assert [list(zip(slot.records.tolist(), slot.repeats.tolist(), strict=True)) for slot in slots] == [
        [(8, 0), (2, 2)], [(4, 0)], [(7, 1), (1, 0)], [(6, 0), (0, 0)], [(5, 0)], [(3, 0)], [(2, 0), (2, 1)],
        [(4, 1), (7, 0)], [(9, 0), (1, 1)],
    ]  # fmt: skip
    assert sorted(permutation(1000, 1, "a").tolist()) == list(range(1000))


class NumberRows:
    """Rows of a cache that hold nothing but what was asked for."""

    def __init__(self, masked: bool = False) -> None:
        self.masked = masked

    def rows(self, number: int, places: Sequence[int], flips: Sequence[bool]) -> dict[str, torch.Tensor]:
        asked = torch.tensor([[number, place, int(flip)] for place, flip in zip(places, flips, strict=True)])
        mask = {"mask": torch.full((len(places), 8, 8), 0.5)} if self.masked else {}
        return {"mean": asked, **mask}


class CaptionRows:
    """Encoded captions that hold nothing but their lengths."""

    def rows(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"states": torch.tensor([len(caption) for caption in captions])}


def updates_of(indexes: list[ImageIndex], **options: Any) -> Updates:
    chosen = BatchSettings(**{"seed": 5, "accumulation": 1, "workers": 0, **options})

    def drawn(step: int, places: Sequence[int], width: int, height: int) -> Draws:
        return draw(DrawSettings(chosen.seed), step, places, (1, 2, 2))

    updates = Updates(indexes, chosen, drawn)
    updates.cache = NumberRows()
    return updates


def read(updates: Updates, end: int, step: int = 0) -> list[tuple[Update, list[Batch]]]:
    epoch, index = updates.epoch_of(step)
    progress = Progress(seed=5, session_id=0, started_at=0.0, step=step, epoch=epoch, index=index)
    return [(update, list(update.batches)) for update in updates.starting_at(progress, end)]


def facts(update: Update, batches: Sequence[Batch]) -> list[Any]:
    """What an update and its batches are, in values that can be compared."""
    found: list[Any] = [update.step, update.epoch, update.index, update.last_in_epoch, update.samples]
    for batch in batches:
        rows = (batch.images or {})["mean"] if batch.pixels is None else batch.pixels
        tensors = [rows, batch.noise, batch.timesteps, batch.weight]
        found += [batch.keys, batch.captions, batch.geometry, batch.micro, *(row.tolist() for row in tensors)]
    return found


@settings(deadline=None, max_examples=40)
@given(datasets(), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, 4]), st.data())
def test_ranks_together_show_the_plan_from_any_update(
    indexes: list[ImageIndex], accumulation: int, world: int, workers: int, data: st.DataObject
) -> None:
    options = {"accumulation": accumulation, "world": world, "last_epoch": EPOCHS - 1}
    runs = [updates_of(indexes, **options, rank=rank) for rank in range(world)]
    end = runs[0].updates_before(EPOCHS)
    whole = [read(run, end) for run in runs]
    seen: Counter[tuple[int, int]] = Counter()
    assert [update.step for update, _ in whole[0]] == list(range(end))
    for parts in zip(*whole, strict=True):
        update = parts[0][0]
        assert {(other.samples, other.epoch, other.index, other.last_in_epoch) for other, _ in parts} == {
            (update.samples, update.epoch, update.index, update.last_in_epoch)
        }
        assert update.last_in_epoch == (update.index + 1 == runs[0].updates_in(update.epoch))
        assert len({len(batches) for _, batches in parts}) == 1
        together = [batch for _, batches in parts for batch in batches]
        assert sum(float(batch.weight.sum()) for batch in together) == pytest.approx(update.samples)
        noise = [row.numpy().tobytes() for batch in together if batch.weight.any() for row in batch.noise]
        assert len(set(noise)) == len(noise)
        for batch in together:
            for (number, place, _), share in zip((batch.images or {})["mean"].tolist(), batch.weight, strict=True):
                seen[(number, place)] += round(float(share) * 60)
    for number in range(len(indexes)):
        counts = np.sum([runs[0].order.counts(number, epoch) for epoch in range(EPOCHS)], axis=0)
        for record, count in enumerate(counts.tolist()):
            assert seen[(number, record)] == 60 * count
    if end:
        step = data.draw(st.integers(0, end - 1))
        entered = read(updates_of(indexes, **options, rank=world - 1, workers=workers), end, step)
        assert [facts(*part) for part in entered] == [facts(*part) for part in whole[-1][step:]]


@settings(deadline=None, max_examples=40)
@given(datasets(), st.integers(1, 3))
def test_appearances_are_what_the_run_shows(indexes: list[ImageIndex], accumulation: int) -> None:
    updates = updates_of(indexes, accumulation=accumulation)
    shown: dict[tuple[int, int], list[Appearance]] = {}
    for epoch in range(3):
        slots = updates.slots(epoch)
        for number, slot in enumerate(slots):
            index, micro = divmod(number, accumulation)
            first = sum(len(before.records) for before in slots[index * accumulation : number])
            for row, record in enumerate(slot.records.tolist()):
                shown.setdefault((slot.dataset, record), []).append(Appearance(
                    updates.updates_before(epoch) + index, epoch, index, micro, row, first + row,
                    int(slot.repeats[row]), int(slot.epochs[row]), float(slot.shares[row]),
                ))  # fmt: skip
    for number, found in enumerate(indexes):
        for record in range(len(found)):
            listed = [place for epoch in range(3) for place in updates.appearances(number, record, epoch)]
            assert listed == shown.get((number, record), [])


def test_carry_goes_on_over_epochs_without_a_batch() -> None:
    updates = updates_of([make_index([0] * 3, batch_size=8, bucket_policy="carry")], last_epoch=6)
    assert [updates.updates_in(epoch) for epoch in range(8)] == [0, 0, 1, 0, 0, 1, 1, 0]
    assert [updates.order.carried_after(epoch) for epoch in range(8)] == [3, 6, 1, 4, 7, 2, 0, 3]
    found = read(updates, 3)
    assert [(update.epoch, update.index, update.last_in_epoch, update.samples) for update, _ in found] == [
        (2, 0, True, 8), (5, 0, True, 8), (6, 0, True, 5)
    ]  # fmt: skip
    assert [updates.epoch_of(step) for step in range(3)] == [(2, 0), (5, 0), (6, 0)]
    assert sum(Counter(key for _, (batch,) in found for key in batch.keys).values()) == 21


def test_carried_samples_keep_the_draws_of_their_own_epoch() -> None:
    subset = {"flip_aug": True, "shuffle_caption": True}
    options: dict[str, Any] = {"batch_size": 4, "bucket_policy": "carry", "captions": ["a, b, c, d, e, f"] * 5}
    index = make_index([0] * 5, 2.5, subset=subset, **options)
    updates = updates_of([index], last_epoch=5)
    carried = 0
    for update, (batch,) in read(updates, updates.updates_before(6)):
        slot = updates.slots(update.epoch)[update.index]
        flips = (batch.images or {})["mean"][:, 2].tolist()
        for row, (_, number, epoch, repeat) in enumerate(samples_of(slot)):
            record = index.record(number)
            assert bool(flips[row]) == sample_view(record, 5, epoch, repeat).flip
            assert batch.captions[row] == sample_caption(record, 5, epoch, repeat, 0, 1)
            carried += epoch < update.epoch
    assert carried > 5


def test_filled_batches_count_and_weigh_their_samples_once() -> None:
    updates = updates_of([make_index([0] * 3, batch_size=8, bucket_policy="fill", weights=[1.0, 0.5, 2.0])])
    ((update, (batch,)),) = read(updates, 1)
    assert update.samples == 3
    assert updates.order.filled_in(0) == 5
    assert Counter(batch.keys).most_common() == [(batch.keys[0], 3), (batch.keys[1], 3), (batch.keys[2], 2)]
    weights = {"0.png": 1.0, "1.png": 0.5, "2.png": 2.0}
    for key, weight in weights.items():
        mine = [float(part) for name, part in zip(batch.keys, batch.weight, strict=True) if name == key]
        assert len(set(mine)) == 1
        assert sum(mine) == pytest.approx(weight)
    assert len({row.numpy().tobytes() for row in batch.noise}) == 8


def write_images(folder: Path, buckets: Sequence[int]) -> None:
    generator = np.random.default_rng(0)
    for number, bucket in enumerate(buckets):
        pixels = generator.integers(0, 256, (64, 64 + 8 * bucket, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.parametrize("policy", POLICIES)
def test_workers_prepare_the_same_pictures(tmp_path: Path, policy: str) -> None:
    buckets = [0, 0, 0, 1, 1]
    write_images(tmp_path, buckets)
    options: dict[str, Any] = {"flip_aug": True, "shuffle_caption": True, "caption_dropout_rate": 0.2}
    captions = [f"{number}, a, b, c, d" for number in range(5)]
    chosen = {"batch_size": 2, "bucket_policy": policy, "subset": options, "captions": captions}
    index = make_index(buckets, 1.5, tmp_path, **chosen)
    found = []
    for workers in (0, 1, 4):
        updates = updates_of([index], workers=workers, accumulation=2, last_epoch=3)
        updates.cache = None
        found.append([facts(*part) for part in read(updates, 6)])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6


def test_batches_hold_paths_masks_and_what_caches_give(tmp_path: Path) -> None:
    write_images(tmp_path, [0, 0])
    index = make_index([0, 0], 1, tmp_path, batch_size=2, subset={"alpha_mask": True})
    updates = updates_of([index])
    updates.cache, updates.texts = None, CaptionRows()
    updates.draw_fixed = lambda keys, width, height: torch.tensor([[len(keys), width, height]])
    ((_, (batch,)),) = read(updates, 1)
    assert [Path(path) for path in batch.paths] == [tmp_path / key for key in batch.keys]
    assert batch.pixels is not None
    assert batch.pixels.shape == (2, 3, 64, 64)
    assert batch.mask is not None
    assert batch.mask.shape == (2, 8, 8)
    assert batch.mask.dtype == torch.float32
    assert 0.3 < float(batch.mask.mean()) < 0.7
    assert batch.latent_noise.tolist() == [[2, 64, 64]]
    assert batch.texts is not None
    assert batch.texts["states"].tolist() == [len(caption) for caption in batch.captions]

    updates.cache = NumberRows(masked=True)
    ((_, (cached,)),) = read(updates, 1)
    assert cached.pixels is None
    assert cached.mask is not None
    assert float(cached.mask.sum()) == 64
    assert set(cached.images or {}) == {"mean"}
    assert (cached.keys, cached.captions) == (batch.keys, batch.captions)


def test_a_mask_of_ones_stands_in_where_only_some_have_one(tmp_path: Path) -> None:
    write_images(tmp_path, [0, 0])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "1.png")
    index = make_index([0, 0], 1, tmp_path, batch_size=2)
    masked = SubsetConfig(tmp_path, alpha_mask=True, unmasked_weight=0.25)
    dataset = replace(index.dataset, subsets=(index.dataset.subsets[0], masked))
    updates = updates_of([replace(index, dataset=dataset, subset_of=np.array([1, 0], np.int32))])
    updates.cache = None
    ((_, (batch,)),) = read(updates, 1)
    assert batch.mask is not None
    by_key = dict(zip(batch.keys, batch.mask, strict=True))
    assert float(by_key["1.png"].min()) == 1.0
    assert 0.25 < float(by_key["0.png"].mean()) < 1.0


def test_captions_are_drawn_from_variants(tmp_path: Path) -> None:
    write_images(tmp_path, [0])
    caption = ", ".join(map(str, range(20)))
    index = make_index([0], 40, tmp_path, subset={"shuffle_caption": True}, captions=[caption])
    for variants, expected in ((None, 40), (3, 3)):
        found = read(updates_of([index], caption_variants=variants), 40)
        assert len({batch.captions[0] for _, (batch,) in found}) == expected


def test_for_a_gpu_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    updates = updates_of([make_index([0] * 2, batch_size=2)], pin=True)
    updates.texts = CaptionRows()
    ((update, (batch,)),) = read(updates, 1)
    assert facts(update, [batch]) == facts(*read(updates_of([make_index([0] * 2, batch_size=2)]), 1)[0])
    fields = [batch.noise, batch.latent_noise, batch.timesteps, batch.weight]
    rows = [*(batch.images or {}).values(), *(batch.texts or {}).values(), *batch.more_noise.values()]
    assert {id(tensor) for tensor in (*fields, *rows)} == {id(tensor) for tensor in pinned}


def test_without_memory_to_pin_batches_come_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    indexes = [make_index([0] * 2)]
    found = [facts(*part) for part in read(updates_of(indexes, pin=True, workers=1), 2)]
    assert found == [facts(*part) for part in read(updates_of(indexes), 2)]
    assert caplog.text.count("from ordinary memory") == 1
