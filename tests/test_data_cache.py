"""Caches: exact rows, nothing encoded twice, damage found, sd-scripts' latents taken only where they match."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_train.commands import cache as command
from sd_train.data import store as store_module
from sd_train.data.cache import DiskCache, FillOptions, MemoryCache
from sd_train.data.content import ContentHashes, ahead, content_digest
from sd_train.data.images import centred_view, decode, prepare
from sd_train.data.index import ImageIndex, IndexOptions, build_indexes
from sd_train.data.npz import Mismatch, find_npz, read_npz
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.shards import read_head
from sd_train.data.store import RowStore, default_cache_dir, key_array
from sd_train.errors import ConfigError, DataError, RunError

NPZ = Path(__file__).parent / "data" / "conformance" / "latents_npz"
GOLDEN = {"sd15_new_0300x0200_sd": (300, 200), "sd15_alpha_0130x0130_sd": (130, 130)}


class Encode:
    """A linear "autoencoder": means of 8x8 pixels; counts the pictures that it is given."""

    def __init__(self) -> None:
        self.pictures, self.batches = 0, list[int]()

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        self.pictures += len(pixels)
        self.batches.append(len(pixels))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([mean, mean.mean(dim=1, keepdim=True)], dim=1)
        return {"mean": mean, "logvar": -mean.abs() - 3}


def options(batch_size: int = 2, **more: Any) -> FillOptions:
    return FillOptions(**{"batch_size": batch_size, "workers": 1, "progress": lambda count: None, **more})


def put_images(folder: Path, count: int, seed: int = 0, mode: str = "RGB", size: tuple[int, int] = (72, 64)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = size if number % 2 else size[::-1]
        pixels = rng.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")


def indexed(*folders: Path, dataset: dict[str, Any] | None = None, **subset: Any) -> list[ImageIndex]:
    """One dataset of `folders`, buckets from 64x64 on."""
    kept = {"class_tokens": "frog", **subset}
    subsets = tuple(SubsetConfig(folder, origin=str(folder), **kept) for folder in folders)
    sizes = {"resolution": (72, 72), "enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 8}
    config = DatasetConfig(batch_size=2, subsets=subsets, origin="x.toml", **{**sizes, **(dataset or {})})
    return list(build_indexes([config], IndexOptions(allow_missing_captions=True)).training)


def disk(folder: Path, encoder: str = "vae", suffix: str | None = None) -> DiskCache:
    return DiskCache(RowStore(folder / "latents"), encoder, suffix)


def expected(index: ImageIndex, place: int, flip: bool) -> dict[str, Tensor]:
    record = index.record(place)
    picture = prepare(record, centred_view(record, flip))
    rows = Encode()(torch.from_numpy(picture.pixels)[None])
    if picture.mask is not None:
        rows["mask"] = torch.from_numpy(picture.mask)[None]
    return rows


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "latents").glob("*.safetensors"))


def encoded(folder: Path, indexes: list[ImageIndex], **more: Any) -> int:
    """Fill a new cache object in `folder`; how many pictures had to be encoded."""
    encode = Encode()
    disk(folder, **more).fill(indexes, encode, options())
    return encode.pictures


def random_rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(count, 7, 5, generator=make).to(torch.bfloat16),
        "pooled": torch.randn(count, 3, generator=make),
        "count": torch.arange(count),
    }


def names(count: int, start: int = 0) -> list[bytes]:
    # Keys that end in zeros must not be taken for shorter ones.
    return [number.to_bytes(4, "big") + bytes(12) for number in range(start, start + count)]


@pytest.mark.parametrize("make", [lambda folder: MemoryCache(), disk])
@pytest.mark.parametrize("workers", [0, 3])
def test_rows_are_what_encoding_gives(tmp_path: Path, make: Callable[[Path], Any], workers: int) -> None:
    put_images(tmp_path / "plain", 5)
    put_images(tmp_path / "clear", 4, 1, "RGBA")
    [index] = indexed(tmp_path / "plain", tmp_path / "clear", flip_aug=True)
    # Only one of the two subsets has masks.
    clear = replace(index.dataset.subsets[1], alpha_mask=True, unmasked_weight=0.25)
    index = replace(index, dataset=replace(index.dataset, subsets=(index.dataset.subsets[0], clear)))
    cache, done, encode = make(tmp_path / "cache"), list[int](), Encode()
    cache.fill([index], encode, options(3, workers=workers, progress=done.append))
    assert encode.pictures == 18
    assert max(encode.batches) == 3
    assert sum(done) == 9
    for bucket in range(len(index.buckets)):
        places = np.flatnonzero(index.bucket_of == bucket).tolist()
        flips = [place % 2 == 0 for place in places]
        rows = cache.rows(0, places, flips)
        assert set(rows) == {"mean", "logvar", "mask"}
        for row, (place, flip) in enumerate(zip(places, flips, strict=True)):
            for name, value in expected(index, place, flip).items():
                assert torch.equal(rows[name][row], value[0]), (name, place)
            if place < 5:
                assert (rows["mask"][row] == 1).all()
    plain = np.flatnonzero((index.bucket_of == 0) & (index.subset_of == 0)).tolist()
    assert "mask" not in cache.rows(0, plain, [False] * len(plain))


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 6)
    assert encoded(tmp_path / "cache", indexed(tmp_path / "a")) == 6
    assert encoded(tmp_path / "cache", indexed(tmp_path / "a")) == 0
    (tmp_path / "a").rename(tmp_path / "moved")
    (tmp_path / "moved" / "0.png").rename(tmp_path / "moved" / "zero.png")
    shutil.copy(tmp_path / "moved" / "1.png", tmp_path / "moved" / "copy.png")
    again = indexed(tmp_path / "moved")
    assert encoded(tmp_path / "cache", again) == 0
    # The same content twice within one fill.
    assert encoded(tmp_path / "other", again) == 6
    put_images(tmp_path / "moved", 1, seed=9)
    assert encoded(tmp_path / "cache", indexed(tmp_path / "moved")) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"resize_interpolation": "nearest"},
        {"alpha_mask": True},
        {"alpha_mask": True, "unmasked_weight": 0.5},
        {"dataset": {"resolution": (96, 96)}},
    ],
)
def test_a_row_serves_nothing_else(tmp_path: Path, change: dict[str, Any]) -> None:
    put_images(tmp_path / "a", 2, mode="RGBA", size=(90, 90))
    encoded(tmp_path / "cache", indexed(tmp_path / "a"))
    changed = indexed(tmp_path / "a", **change)
    assert encoded(tmp_path / "cache", changed) == 2
    assert encoded(tmp_path / "cache", changed, encoder="another vae") == 2
    assert encoded(tmp_path / "cache", indexed(tmp_path / "a", flip_aug=True)) == 2
    assert encoded(tmp_path / "cache", changed) == 0


def test_a_changed_mask_makes_new_rows(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 2)
    put_images(tmp_path / "masks", 2, seed=1)
    masked = {"conditioning_data_dir": tmp_path / "masks"}
    assert encoded(tmp_path / "cache", indexed(tmp_path / "a", **masked)) == 2
    assert encoded(tmp_path / "cache", indexed(tmp_path / "a", **masked)) == 0
    put_images(tmp_path / "masks", 1, seed=2)
    index = indexed(tmp_path / "a", **masked)
    assert encoded(tmp_path / "cache", index) == 1
    cache = disk(tmp_path / "cache")
    cache.fill(index, Encode(), options())
    assert torch.equal(cache.rows(0, [0], [False])["mask"], expected(index[0], 0, False)["mask"])


def test_ranks_share_the_work_and_an_interrupted_fill_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_images(tmp_path / "a", 7)
    index = indexed(tmp_path / "a")
    ranks = [disk(tmp_path / "cache") for _ in range(2)]
    counts = []
    for rank, cache in enumerate(ranks):
        encode = Encode()
        cache.fill(index, encode, options(rank=rank, world=2))
        counts.append(encode.pictures)
        if rank == 0:
            with pytest.raises(DataError, match="latents of 3 images are missing"):
                cache.ready()
    assert sorted(counts) == [3, 4]
    for cache in ranks:
        cache.ready()
        assert torch.equal(cache.rows(0, [3], [False])["mean"], expected(index[0], 3, False)["mean"])

    shutil.rmtree(tmp_path / "cache" / "latents")
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    calls = Encode()

    def stopping(pixels: Tensor) -> dict[str, Tensor]:
        if len(calls.batches) == 2:
            raise KeyboardInterrupt
        return calls(pixels)

    with pytest.raises(KeyboardInterrupt):
        disk(tmp_path / "cache").fill(index, stopping, options())
    assert encoded(tmp_path / "cache", index) == 7 - calls.pictures


def test_two_processes_may_fill_at_once(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 8)
    script = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import test_data_cache as t\n"
        f"place = Path({str(tmp_path)!r}); print(t.encoded(place / 'cache', t.indexed(place / 'a')))"
    )
    root = Path(__file__).parent.parent
    running = [
        subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert all(0 <= int(process.communicate(timeout=120)[0]) <= 8 for process in running)
    index = indexed(tmp_path / "a")
    cache = disk(tmp_path / "cache")
    encode = Encode()
    cache.fill(index, encode, options())
    assert encode.pictures == 0
    assert torch.equal(cache.rows(0, [5], [False])["mean"], expected(index[0], 5, False)["mean"])


@pytest.mark.parametrize("damage", ["bit in a row", "bit in the head", "cut off", "foreign", "empty"])
def test_damage_is_found_and_encoded_anew(tmp_path: Path, damage: str) -> None:
    put_images(tmp_path / "a", 4, size=(64, 64))
    index = indexed(tmp_path / "a")
    encoded(tmp_path / "cache", index)
    [shard] = shards(tmp_path / "cache")
    data = bytearray(shard.read_bytes())
    head = read_head(shard)
    if damage == "bit in a row":
        data[head.start + 2 * head.row_bytes + 100] ^= 4
    elif damage == "bit in the head":
        data[head.start - 24 * 4 + 5] ^= 1
    elif damage == "cut off":
        del data[-1:]
    else:
        data[:] = b"something else entirely" if damage == "foreign" else b""
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.name}.*--repair"):
        command.main(["verify", "--cache_dir", str(tmp_path / "cache")])
    cache, encode = disk(tmp_path / "cache"), Encode()
    cache.fill(index, encode, options())
    assert encode.pictures == (1 if damage == "bit in a row" else 4)
    assert "1 rows are damaged" in cache.notes[0] if damage == "bit in a row" else shard.name in cache.notes[0]
    assert "sd-train cache verify --repair" in cache.notes[1]
    for place in range(4):
        assert torch.equal(cache.rows(0, [place], [False])["mean"], expected(index[0], place, False)["mean"])
    assert command.main(["verify", "--repair", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert command.main(["verify", "--cache_dir", str(tmp_path / "cache")]) == 0
    assert encoded(tmp_path / "cache", index) == 0


def test_damage_found_while_training_names_the_file_and_the_way_out(tmp_path: Path) -> None:
    writer = RowStore(tmp_path / "texts")
    writer.put(names(3), random_rows(3))
    writer.flush()
    [shard] = (tmp_path / "texts").iterdir()
    for change in ("flip", "cut"):
        reader = RowStore(tmp_path / "texts")
        handles = reader.locate(names(3))
        with shard.open("rb+") as file:
            if change == "flip":
                file.seek(-1, os.SEEK_END)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last ^ 128]))
            else:
                file.truncate(shard.stat().st_size - 5000)
        with pytest.raises(DataError) as caught:
            reader.rows(handles)
        assert str(shard) in str(caught.value)
        assert f"sd-train cache verify --repair --cache_dir {tmp_path}" in str(caught.value)
        assert reader.locate(names(3)).min() == -1


def test_store_gives_back_every_bit(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "texts")
    parts = [random_rows(4, seed) for seed in range(3)]
    for number, rows in enumerate(parts):
        store.put(names(4, 4 * number), rows)
        if number:
            store.flush()
    other = {"states": torch.full((1, 2), float("nan"))}
    store.put(names(1, 99), other)
    store.flush()
    assert len(store) == 13
    again = RowStore(tmp_path / "texts")
    wanted = np.random.default_rng(0).permutation(12)
    found = again.rows(again.locate(key_array(names(12))[wanted]))
    for name in parts[0]:
        joined = torch.cat([rows[name] for rows in parts])[torch.from_numpy(wanted)]
        assert found[name].dtype == joined.dtype
        assert found[name].is_contiguous()
        assert torch.equal(found[name], joined)
    handles = again.locate([*names(1, 50), *names(1, 99)])
    assert handles[0] == -1
    assert torch.isnan(again.rows(handles[1:])["states"]).all()
    with pytest.raises(ValueError, match="unlike layout"):
        again.rows([int(handles[1]), int(again.locate(names(1))[0])])


def test_other_tools_can_open_a_shard(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    store = RowStore(tmp_path / "texts")
    store.put(names(2), random_rows(2))
    store.flush()
    [path] = (tmp_path / "texts").iterdir()
    tensors = load_file(path)
    assert bytes(tensors["keys"].numpy()[1]) == names(2)[1]
    assert len(tensors["rows"]) == 2


def test_what_is_not_finite_names_the_image(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 3, size=(64, 64))

    def broken(pixels: Tensor) -> dict[str, Tensor]:
        rows = Encode()(pixels)
        rows["mean"][1, 0, 0, 0] = float("nan")
        return rows

    for cache in (MemoryCache(), disk(tmp_path / "cache")):
        with pytest.raises(DataError, match=r"1\.png: its mean .* is not finite"):
            cache.fill(indexed(tmp_path / "a"), broken, options(3))


def test_broken_images_are_named(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 3, size=(64, 64))
    index = indexed(tmp_path / "a")
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:500])
    for cache in (MemoryCache(), disk(tmp_path / "cache")):
        with pytest.raises(DataError, match=r"1\.png"):
            cache.fill(index, Encode(), options(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--cache_dir"):
        disk(tmp_path / "file")


def test_contents_are_remembered_by_path_size_and_time(tmp_path: Path) -> None:
    put_images(tmp_path / "a", 3)
    paths = sorted((tmp_path / "a").iterdir())
    stats = np.array([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    hashes = ContentHashes(tmp_path / "cache")
    assert hashes.known(paths, stats) == [None] * 3
    digests = hashes.digests([*paths, tmp_path / "none.png"], np.vstack([stats, [[1, 1]]]))
    assert digests[:3] == [content_digest(decode(path)) for path in paths]
    assert isinstance(digests[3], DataError)
    assert "none.png" in str(digests[3])
    assert ContentHashes(tmp_path / "cache").known(paths, stats) == digests[:3]
    assert hashes.known(paths, stats + 1) == [None] * 3
    assert ContentHashes(None).digests(paths, stats) == digests[:3]
    # What it knows can be found out again: a damaged file is no reason to stop.
    hashes.close()
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(b"no database" * 100) if path.suffix == ".sqlite" else path.unlink()
    assert ContentHashes(tmp_path / "cache").digests(paths, stats) == digests[:3]


def test_contents_that_cannot_be_written_to_are_copied(tmp_path: Path) -> None:
    put_images(tmp_path / "images", 2)
    paths = sorted((tmp_path / "images").glob("*.png"))
    stats = np.array([(path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
    hashes = ContentHashes(tmp_path)
    known = hashes.digests(paths[:1], stats[:1])
    hashes.close()
    # SQLite cannot open its journal, as in a folder that is read-only.
    (tmp_path / "contents.sqlite-wal").mkdir()
    hashes = ContentHashes(tmp_path)
    assert hashes.known(paths, stats) == [*known, None]
    assert hashes.digests(paths, stats) == hashes.known(paths, stats)


def test_contents_differ_by_pixels_shape_and_transparency(tmp_path: Path) -> None:
    seen = set()
    for number, (mode, size) in enumerate([("RGB", (8, 6)), ("RGB", (6, 8)), ("RGBA", (8, 6))]):
        path = tmp_path / f"{number}.png"
        Image.new(mode, size, (255, 255, 255, 0)[: len(mode)]).save(path)
        seen.add(content_digest(decode(path)))
    assert len(seen) == 3
    Image.open(tmp_path / "0.png").save(tmp_path / "0.bmp")
    assert content_digest(decode(tmp_path / "0.bmp")) in seen


def test_ahead_keeps_order_and_raises() -> None:
    assert list(ahead(lambda number: number * 2, range(50), 4, 7)) == list(range(0, 100, 2))
    found = ahead(lambda number: 1 // number, [1, 0], 2, 2)
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def golden(folder: Path, name: str, suffix: str = "", **subset: Any) -> ImageIndex:
    """The image that sd-scripts made the latents `name` of, with them beside it, in the bucket they were made for."""
    width, height = GOLDEN[name]
    folder.mkdir()
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "img.png")
    tail = suffix or name[name.index("_0") :]
    shutil.copy(NPZ / f"{name}.npz", folder / f"img{tail}.npz")
    resolution = {"resolution": (256, 256) if width == 300 else (128, 128), "bucket_reso_steps": 64}
    [index] = indexed(folder, dataset=resolution, **subset)
    assert index.buckets == [(320, 192) if width == 300 else (128, 128)]
    return index


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("suffix", ["", ".old"])
def test_latents_of_sd_scripts_take_the_place_of_encoding(tmp_path: Path, suffix: str, memory: bool) -> None:
    index = golden(tmp_path / "a", "sd15_new_0300x0200_sd", flip_aug=True)
    if suffix:
        next((tmp_path / "a").glob("*.npz")).rename(tmp_path / "a" / "img.npz")
    cache, encode = MemoryCache("_sd") if memory else disk(tmp_path / "cache", suffix="_sd"), Encode()
    cache.fill([index], encode, options())
    assert encode.pictures == 0
    assert "latents of 1 images are taken from .npz files" in cache.notes[0]
    assert ("old names" in cache.notes[0]) == bool(suffix)
    with np.load(NPZ / "sd15_new_0300x0200_sd.npz") as file:
        for flip, name in ((False, "latents"), (True, "latents_flipped")):
            rows = cache.rows(0, [0], [flip])
            drawn = rows["mean"] + (0.5 * rows["logvar"]).exp() * torch.randn(rows["mean"].shape)
            np.testing.assert_allclose(drawn[0].numpy(), file[name], atol=3e-6)
            assert np.array_equal(rows["mean"][0].numpy(), file[name])
    # SDXL's suffix is another name, and without a suffix nobody looks.
    for other in (None, "_sdxl") if not suffix else (None,):
        assert encoded(tmp_path / f"cache{other}", [index], suffix=other) == 2


def test_alpha_mask_in_latents_of_sd_scripts(tmp_path: Path) -> None:
    index = golden(tmp_path / "a", "sd15_alpha_0130x0130_sd", alpha_mask=True, unmasked_weight=0.5)
    cache = disk(tmp_path / "cache", suffix="_sd")
    cache.fill([index], Encode(), options())
    with np.load(NPZ / "sd15_alpha_0130x0130_sd.npz") as file:
        share = file["alpha_mask"].reshape(16, 8, 16, 8).mean(axis=(1, 3))
        rows = cache.rows(0, [0], [False])
        assert np.array_equal(rows["mean"][0].numpy(), file["latents"])
        np.testing.assert_allclose(rows["mask"][0].numpy(), 0.5 + 0.5 * share, atol=1e-6)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("another bucket", {"latents": np.zeros((4, 40, 24), np.float32)}),
        ("another bucket", {"latents_flipped": np.zeros((4, 2, 2), np.float32)}),
        ("another original size", {"original_size": np.array([300, 201])}),
        ("not finite", {"latents": np.full((4, 24, 40), np.nan, np.float32)}),
        ("latents_flipped is not in it", {"latents_flipped": None}),
        ("latents is not in it", {"latents": None}),
        ("damaged", {"latents": np.zeros((4, 24, 40), object)}),
        ("damaged", b"PK\3\4 nonsense"),
        ("damaged", b""),
        ("older than the image", {}),
    ],
)
def test_latents_that_do_not_match_are_left_alone_and_told(tmp_path: Path, reason: str, change: Any) -> None:
    index = golden(tmp_path / "a", "sd15_new_0300x0200_sd", flip_aug=True)
    [path] = (tmp_path / "a").glob("*.npz")
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        with np.load(path) as file:
            arrays = {**{name: file[name] for name in file.files}, **change}
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    if reason.startswith("older"):
        os.utime(path, ns=(0, int(index.stats[0, 1]) - 1))
    for cache in (MemoryCache("_sd"), disk(tmp_path / "cache", suffix="_sd")):
        encode = Encode()
        cache.fill([index], encode, options())
        assert encode.pictures == 2
        assert torch.equal(cache.rows(0, [0], [False])["mean"], expected(index, 0, False)["mean"])
        [note] = cache.notes
        assert note.startswith("1 of 1 .npz files of latents do not match and are not used")
        assert reason in note
        assert str(path) in note


def test_latents_names(tmp_path: Path) -> None:
    for name in ("a.b_0512x0768_sd.npz", "a_12000x0064_sdxl.npz", "c.npz"):
        (tmp_path / name).write_bytes(b"")
    assert find_npz(tmp_path / "a.b.png", (512, 768), "_sd") == tmp_path / "a.b_0512x0768_sd.npz"
    assert find_npz(tmp_path / "a.b.png", (512, 768), "_sdxl") is None
    assert find_npz(tmp_path / "a.b.png", (768, 512), "_sd") is None
    assert find_npz(tmp_path / "a.jpg", (12000, 64), "_sdxl") == tmp_path / "a_12000x0064_sdxl.npz"
    assert find_npz(tmp_path / "c.webp", (1, 1), "_sd") == tmp_path / "c.npz"


def test_latents_without_the_masks_of_a_folder_do_not_match(tmp_path: Path) -> None:
    index = golden(tmp_path / "a", "sd15_new_0300x0200_sd")
    record = index.record(0)
    masked = replace(record, subset=replace(record.subset, conditioning_data_dir=tmp_path))
    with pytest.raises(Mismatch, match="masks"):
        read_npz(next((tmp_path / "a").glob("*.npz")), masked)


def test_command_tells_and_cleans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache_dir = tmp_path / "cache"
    put_images(tmp_path / "a", 4, size=(64, 64))
    index = indexed(tmp_path / "a")
    encoded(cache_dir, index)
    rows = Encode()(torch.zeros(1, 3, 64, 64))
    twice = RowStore(cache_dir / "latents")
    keys = read_head(shards(cache_dir)[0]).keys
    two = {name: row.repeat(2, 1, 1, 1) for name, row in rows.items()}
    twice.put(np.concatenate([keys[:1], key_array(names(1))]), two)
    twice.flush()
    leftover = cache_dir / "latents" / ".x.safetensors.1.tmp"
    leftover.write_bytes(b"123")
    os.utime(leftover, (0, 0))
    newest, folder = shards(cache_dir)[0], str(cache_dir)
    os.utime(shards(cache_dir)[1], (1e9, 1e9))

    assert command.main(["inspect", "--json", "--cache_dir", folder]) == 0
    told = json.loads(capsys.readouterr().out)["kinds"]
    assert (told["latents"]["shards"], told["latents"]["rows"], told["latents"]["leftovers"]) == (2, 6, 1)
    assert told["latents"]["unused_days"] > 1000 > 1 > told["latents"]["last_used_days"]
    assert told["texts"]["rows"] == 0
    command.main(["inspect", "--cache_dir", folder])
    assert "6 rows in 2 files" in capsys.readouterr().out

    command.main(["gc", "--cache_dir", folder])
    assert "would remove" in capsys.readouterr().out
    assert leftover.exists()
    command.main(["gc", "--yes", "--cache_dir", folder])
    assert not leftover.exists()
    assert sorted(len(read_head(path)) for path in shards(cache_dir)) == [1, 4]
    assert encoded(cache_dir, index) == 0
    for path in shards(cache_dir):
        os.utime(path, (1e9, 1e9) if path == newest else None)
    command.main(["gc", "--older_than", "30", "--yes", "--cache_dir", folder])
    assert encoded(cache_dir, index) == 4
    command.main(["gc", "--all", "--yes", "--cache_dir", folder])
    assert not shards(cache_dir)
    with pytest.raises(ConfigError, match="no folder"):
        command.main(["inspect", "--cache_dir", str(tmp_path / "nowhere")])


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SD_TRAIN_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "sd_train"
    monkeypatch.setenv("SD_TRAIN_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
