"""What caches of latents cost: rows read in a second, milliseconds of a fill beside the encoder."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sd_train.data.cache import DiskCache, FillOptions
from sd_train.data.content import content_digest
from sd_train.data.encoding import centred_pictures
from sd_train.data.images import decode
from sd_train.data.index import IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.store import RowStore, key_array

ROWS = 4000
"""Of 128 KiB: mean and log-variance of 4x64x64 latents in float32."""
BATCH = 4
IMAGES = 256


def cache_figures() -> dict[str, float]:
    """Rows a second and milliseconds an image; one thread of torch, the page cache warm.

    - `floor_latents_per_s`: 4x64x64 means and log-variances copied from memory, in random order and batches of 4
    - `one_file_each_latents_per_s`: the same from one .npz file for each image, as sd-scripts keeps them
    - `first_pass_latents_per_s`, `latents_per_s`: from the store when each row is checked too, and afterwards
    - `fill_ms_64`, `fill_ms_512`: wall time an image of a fill with an encoder that does next to nothing (PNG, batches
      of 4, one thread that decodes); `..._beyond`: without what decoding, hashing and resizing the same images take
      alone; `refill_ms`: where everything is there already
    """
    torch.set_num_threads(1)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        figures.update(_reading(Path(folder)))
    for side in (64, 512):
        with tempfile.TemporaryDirectory() as folder:
            figures.update(_filling(Path(folder), side))
    return figures


def _reading(folder: Path) -> dict[str, float]:
    store = RowStore(folder / "latents")
    keys = key_array([number.to_bytes(16, "big") for number in range(ROWS)])
    make = torch.Generator().manual_seed(0)
    for start in range(0, ROWS, 100):
        rows = {name: torch.randn(100, 4, 64, 64, generator=make) for name in ("mean", "logvar")}
        store.put(keys[start : start + 100], rows)
    store.flush()
    order = np.random.default_rng(0).permutation(ROWS)
    memory = np.zeros((ROWS, 1 << 17), np.uint8)
    memory += 1
    floor = max(_copied(memory, order) for _ in range(3))
    del memory
    store = RowStore(folder / "latents")
    handles = store.locate(keys)
    passes = [_read(store, handles, order) for _ in range(5)]
    for number in range(200):
        mean = rows["mean"][number % 100].numpy()
        np.savez(folder / f"{number}.npz", latents=mean, original_size=np.array([512, 512]), crop_ltrb=np.zeros(4))
    started = time.perf_counter()
    for number in range(200):
        with np.load(folder / f"{number}.npz") as file:
            torch.from_numpy(file["latents"])
    files = 200 / (time.perf_counter() - started)
    return {
        "floor_latents_per_s": round(floor),
        "one_file_each_latents_per_s": round(files),
        "first_pass_latents_per_s": round(passes[0]),
        "latents_per_s": round(max(passes[1:])),
    }


def _copied(memory: np.ndarray, order: np.ndarray) -> float:
    started = time.perf_counter()
    for start in range(0, ROWS, BATCH):
        for half in (slice(0, 1 << 16), slice(1 << 16, None)):
            batch = np.empty((BATCH, 1 << 16), np.uint8)
            for place, row in enumerate(order[start : start + BATCH].tolist()):
                batch[place] = memory[row, half]
    return ROWS / (time.perf_counter() - started)


def _read(store: RowStore, handles: np.ndarray, order: np.ndarray) -> float:
    started = time.perf_counter()
    for start in range(0, ROWS, BATCH):
        store.rows(handles[order[start : start + BATCH]])
    return ROWS / (time.perf_counter() - started)


def _encode(pixels: Tensor) -> dict[str, Tensor]:
    mean = pixels[:, :1, ::8, ::8].expand(-1, 4, -1, -1)
    return {"mean": mean, "logvar": mean}


def _filling(folder: Path, side: int) -> dict[str, float]:
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        # Smooth as photographs are, so that PNG takes about as long to decode.
        coarse = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(images / f"{number}.png")
    subset = SubsetConfig(images, class_tokens="x")
    dataset = DatasetConfig(batch_size=BATCH, resolution=(side, side), subsets=(subset,))
    indexes = build_indexes([dataset], IndexOptions()).training
    workers = min(1, (os.cpu_count() or 1) - 1)
    options = FillOptions(BATCH, workers, lambda count: None)

    def alone() -> None:
        for place in range(IMAGES):
            record = indexes[0].record(place)
            decoded = decode(record.path)
            content_digest(decoded)
            centred_pictures(decoded, record, False)

    decoding = min(_milliseconds(alone) for _ in range(2))
    caches = [DiskCache(RowStore(folder / f"cache{number}" / "latents"), "vae") for number in range(3)]
    filling = min(_milliseconds(lambda cache=cache: cache.fill(indexes, _encode, options)) for cache in caches)
    again = DiskCache(RowStore(folder / "cache0" / "latents"), "vae")
    return {
        f"fill_ms_{side}": round(filling, 3),
        f"fill_ms_{side}_beyond": round(max(0.0, filling - decoding), 3),
        f"refill_ms_{side}": round(_milliseconds(lambda: again.fill(indexes, _encode, options)), 3),
        f"decode_ms_{side}": round(decoding, 3),
    }


def _milliseconds(action: object) -> float:
    assert callable(action)
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1000 / IMAGES
