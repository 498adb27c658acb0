"""What `tools/bench.py data` measures: indexing, ordering and caching, each beside a plain loop of the same run."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from sd_train.data.buckets import assign_many
from sd_train.data.captions import process_caption, sample_caption
from sd_train.data.columns import TextColumn
from sd_train.data.index import ImageIndex, IndexOptions, build_indexes
from sd_train.data.index_file import FEWEST, KeptIndexes
from sd_train.data.order import Order
from sd_train.data.record import ImageRecord
from sd_train.data.scan import scan_files, scan_folder
from sd_train.data.settings import BucketPolicy, DatasetConfig, SubsetConfig

CAPTION = "a tree frog sitting on a leaf, macro photograph, shallow depth of field, looking at the viewer"
RECORDS = 1_000_000
SHAPES = [
    (512, 512), (512, 768), (768, 512), (640, 480), (480, 640), (640, 360), (360, 640), (600, 400), (500, 600),
]  # fmt: skip
OLD = (1_000_000_000, 1_000_000_000)  # Files of this moment would be read again.


def data_figures(images: int, rounds: int, with_cache: bool) -> dict[str, float]:
    """Figures by name; what ends in `_floor` is the plain loop that the figure before it is to be held against.

    One small JPEG file and one caption file are linked `images` times, in memory where there is room. The page cache
    is warm. `..._per_s` of reopening counts image and caption files; memory is what a process of its own holds more
    after the scan than before, and at most on the way, scaled to a million images.
    """
    if images < FEWEST:
        raise SystemExit(f"--images {images}: scans of fewer than {FEWEST} images are not kept; give more")
    with tempfile.TemporaryDirectory(dir=_roomy()) as temporary:
        folder, kept = Path(temporary) / "images", Path(temporary) / "cache"
        _make(folder, images)
        figures = _scans(folder, kept, images, rounds)
        figures.update(_memory(folder, images))
        figures.update(_order(rounds))
        figures.update(_captions(rounds))
        for policy in ("keep", "merge", "fill", "carry"):
            figures[f"fill_of_batches_{policy}"] = round(_fill(Path(temporary), policy), 4)
    if with_cache:
        from bench_cache import cache_figures

        figures.update(cache_figures())
    return figures


def _roomy() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30 else None


def _make(folder: Path, images: int) -> None:
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    Image.fromarray(noise).resize((320, 240)).save(folder / "image_0000000.jpg")
    (folder / "image_0000000.txt").write_text(CAPTION, encoding="utf-8")
    for suffix in (".jpg", ".txt"):
        first = folder / f"image_0000000{suffix}"
        os.utime(first, OLD)
        for number in range(1, images):
            os.link(first, folder / f"image_{number:07d}{suffix}")


def _best(rounds: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest of `rounds`."""
    times = []
    for _ in range(rounds):
        gc.collect()
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def _scans(folder: Path, cache: Path, images: int, rounds: int) -> dict[str, float]:
    """Images or files a second: read, opened again, trusted, as paths of metadata, and as the whole index."""
    names = sorted(os.listdir(folder))
    paths = TextColumn.of(str(folder / name) for name in names if name.endswith(".jpg"))
    arrays = cache.parent / "plain.npy"
    checking, trusting = KeptIndexes(cache, False), KeptIndexes(cache, True)
    subset = SubsetConfig(image_dir=folder, caption_extension=".txt")
    dataset = DatasetConfig(batch_size=4, resolution=(512, 512), enable_bucket=True, subsets=(subset,))

    def read_all() -> None:
        for name in names:
            descriptor = os.open(f"{folder}/{name}", os.O_RDONLY)
            os.read(descriptor, 4096)
            os.close(descriptor)

    def stat_all() -> None:
        for name in names:
            os.stat(f"{folder}/{name}")

    def forget() -> None:
        shutil.rmtree(cache, ignore_errors=True)

    def read_and_keep() -> None:
        forget()
        scan_folder(folder, ".txt", checking)

    figures = {
        "images": float(images),
        "scan_images_per_s": images / _best(rounds, lambda: scan_folder(folder, ".txt", None)),
        "scan_and_keep_images_per_s": images / _best(rounds, read_and_keep),
        "scan_floor": images / _best(rounds, read_all),
        "reopen_files_per_s": 2 * images / _best(rounds, lambda: scan_folder(folder, ".txt", checking)),
        "reopen_floor": 2 * images / _best(rounds, stat_all),
        "trusted_images_per_s": images / _best(rounds, lambda: scan_folder(folder, ".txt", trusting)),
    }
    with arrays.open("wb") as file:
        np.save(file, np.zeros(sum(path.stat().st_size for path in (cache / "index").iterdir()), np.uint8))
    figures["trusted_floor"] = images / _best(rounds, lambda: np.load(arrays))
    figures["paths_images_per_s"] = images / _best(rounds, lambda: scan_files(paths, None))
    index = _best(rounds, lambda: build_indexes([dataset], IndexOptions()))
    figures["whole_index_images_per_s"] = images / index
    options = IndexOptions(cache_dir=cache, trust_index=True)
    figures["whole_trusted_index_images_per_s"] = images / _best(rounds, lambda: build_indexes([dataset], options))
    return {name: round(figure) for name, figure in figures.items()}


_MEASURE = """
import gc, json, sys
from pathlib import Path
from sd_train.data.index import IndexOptions, build_indexes
from sd_train.data.scan import scan_folder
from sd_train.data.settings import DatasetConfig, SubsetConfig

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def measured(folder, what):
    if what == "scan":
        return scan_folder(folder, ".txt", None)
    subset = SubsetConfig(image_dir=folder, caption_extension=".txt")
    dataset = DatasetConfig(batch_size=4, resolution=(512, 512), enable_bucket=True, subsets=(subset,))
    return build_indexes([dataset], IndexOptions())

few, many, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
measured(few, what)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # The peak starts here.
before = memory("VmRSS")
found = measured(many, what)
gc.collect()
print(json.dumps([memory("VmRSS") - before, memory("VmHWM") - before]))
"""


def _memory(folder: Path, images: int) -> dict[str, float]:
    """Gigabytes a million images, of a scan and of the whole index; nothing where the system has no /proc."""
    figures: dict[str, float] = {}
    if not Path("/proc/self/clear_refs").exists():
        return figures
    few = folder.parent / "few"
    _make(few, 10)
    root = Path(__file__).resolve().parents[1]
    for what in ("scan", "index"):
        command = [sys.executable, "-c", _MEASURE, str(few), str(folder), what]
        output = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
        held, most = json.loads(output)
        figures[f"{what}_rss_gb_per_million"] = round(held / images / 1000, 3)
        figures[f"{what}_peak_gb_per_million"] = round(most / images / 1000, 3)
    return figures


def _order(rounds: int) -> dict[str, float]:
    """Seconds that a million records take to be put into buckets and shuffled, and those of the shuffle alone."""
    dataset = DatasetConfig(batch_size=4, resolution=(512, 512), enable_bucket=True,
                            subsets=(SubsetConfig(image_dir=Path()),))  # fmt: skip
    sizes = np.random.default_rng(0).integers(300, 3000, (RECORDS, 2)).astype(np.int32)
    names = TextColumn.of(f"image_{number:07d}.jpg" for number in range(RECORDS))
    zeros = np.zeros(RECORDS, np.int32)
    empty = ImageIndex(
        dataset=dataset, keys=names, captions=names, masks=None, subset_of=zeros, sizes=sizes, resized=sizes,
        aspect_error=zeros.astype(float), bucket_of=zeros, repeats=np.ones(RECORDS), weights=zeros.astype(np.float32),
        stats=np.zeros((RECORDS, 2), np.int64), buckets=[], num_train_images=RECORDS, num_reg_images=0,
        captions_of_folders=(),
    )  # fmt: skip

    def bucketed() -> ImageIndex:
        rows = assign_many(sizes.astype(np.int64), dataset)
        codes, bucket_of = np.unique(rows.bucket[:, 0] << 32 | rows.bucket[:, 1], return_inverse=True)
        buckets = [(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes]
        return replace(empty, resized=rows.resized.astype(np.int32), bucket_of=bucket_of.astype(np.int32),
                       buckets=buckets)  # fmt: skip

    index = bucketed()
    middle = RECORDS // dataset.batch_size // 2
    return {
        "million_entered_in_the_middle_s": round(_best(rounds, lambda: Order([index], 0).epoch(0).batch(middle)), 3),
        "million_bucketed_s": round(_best(rounds, bucketed), 3),
        "million_shuffled_s": round(_best(rounds, lambda: Order([index], 0).epoch(0)), 3),
        "million_bucketed_and_shuffled_s": round(_best(rounds, lambda: Order([bucketed()], 0).epoch(0)), 3),
        "million_permutation_floor_s": round(_best(rounds, lambda: np.random.default_rng(0).permutation(RECORDS)), 3),
    }


def _captions(rounds: int) -> dict[str, float]:
    """Prompts a second: made from captions of ten tags by a given generator, and with each sample's own."""
    subset = SubsetConfig(image_dir=Path(), shuffle_caption=True, keep_tokens=1, caption_dropout_rate=0.1)
    tags = "frog, leaf, green, macro, close-up, looking at viewer, rain, night, sharp focus, depth of field"
    square = (512, 512)
    record = ImageRecord(Path("a.png"), "a.png", subset, square, square, square, tags, 1.0, False)
    rng, count = random.Random(0), 50_000

    def processed() -> None:
        for _ in range(count):
            process_caption(tags, subset, rng, 0, 0, 1000)

    def sampled() -> None:
        for repeat in range(count):
            sample_caption(record, 0, 0, repeat, 0, 1000)

    return {
        "captions_per_s": round(count / _best(rounds, processed)),
        "captions_of_samples_per_s": round(count / _best(rounds, sampled)),
    }


def _fill(folder: Path, policy: BucketPolicy) -> float:
    """Places of batches of 8 that hold a sample, over ten epochs of 200 images of nine shapes."""
    images = folder / "shapes"
    if not images.is_dir():
        images.mkdir()
        shapes = np.random.default_rng(1).integers(0, len(SHAPES), 200)
        for number, shape in enumerate(shapes):
            Image.new("RGB", SHAPES[shape], (number, 0, 0)).save(images / f"{number:03d}.png")
    dataset = DatasetConfig(
        batch_size=8, resolution=(512, 512), enable_bucket=True, bucket_policy=policy,
        subsets=(SubsetConfig(image_dir=images, class_tokens="a shape"),),
    )  # fmt: skip
    order = Order(build_indexes([dataset], IndexOptions()).training, 0)
    batches = [order.epoch(epoch).batch(number) for epoch in range(10) for number in range(order.batches_in(epoch))]
    return sum(len(batch.records) for batch in batches) / (8 * len(batches))
