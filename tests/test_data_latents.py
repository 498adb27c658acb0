"""Fine-tuning metadata whose images are not on disk, but for which sd-scripts' latents stand there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_train.data.cache import DiskCache, FillOptions, MemoryCache
from sd_train.data.index import ImageIndex, Indexes, IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.store import RowStore
from sd_train.errors import DataError

GOLDEN = Path(__file__).parent / "data" / "conformance" / "latents_npz"
PLAIN, ALPHA = "sd15_new_0300x0200_sd.npz", "sd15_alpha_0130x0130_sd.npz"
CACHED = IndexOptions(caches_latents=True)


def encode(pixels: Tensor) -> dict[str, Tensor]:
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    mean = torch.cat([mean, mean[:, :1]], dim=1)
    return {"mean": mean, "logvar": mean}


def place(folder: Path, **files: str) -> None:
    """Put golden files into `folder`, each under the name without extension that is its key."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, source in files.items():
        shutil.copy(GOLDEN / source, folder / f"{name}.npz")


def build(
    folder: Path, keys: list[str], options: IndexOptions = CACHED, resolution: int = 256, split: float = 0,
    **subset: Any,
) -> Indexes:
    file = folder / "meta.json"
    file.write_text(json.dumps({key: {"caption": f"c {key}"} for key in keys}), encoding="utf-8")
    own = SubsetConfig(folder, metadata_file=file, origin="data.toml:3", **subset)
    dataset = DatasetConfig(2, (resolution, resolution), style="fine_tuning", enable_bucket=True, min_bucket_reso=64,
                            validation_split=split, subsets=(own,), origin="data.toml:1")  # fmt: skip
    return build_indexes([dataset], options)


def refusal(*args: Any, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        build(*args, **more)
    return str(caught.value)


def caches(folder: Path, index: ImageIndex) -> list[MemoryCache | DiskCache]:
    filled: list[MemoryCache | DiskCache] = [MemoryCache(), DiskCache(RowStore(folder / "latents"), "vae")]
    for cache in filled:
        cache.fill([index], encode, FillOptions(batch_size=2, workers=1, progress=lambda count: None))
    return filled


def test_latents_are_trained_without_their_image(tmp_path: Path) -> None:
    place(tmp_path / "a", img_0300x0200_sd=PLAIN, old=PLAIN)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "a" / "there.png")
    [index] = build(tmp_path / "a", ["img.png", "old", "there"], flip_aug=True).training
    assert list(index.keys) == ["img_0300x0200_sd.npz", "old.npz", "there.png"]
    assert index.sizes.tolist() == [[300, 200]] * 3
    assert index.buckets == [(320, 192)]
    assert list(index.captions) == ["c img.png", "c old", "c there"]
    for cache in caches(tmp_path, index):
        with np.load(GOLDEN / PLAIN) as file:
            for flip, name in ((False, "latents"), (True, "latents_flipped")):
                rows = cache.rows(0, [0, 1, 2], [flip] * 3)
                assert np.array_equal(rows["mean"][:2].numpy(), np.stack([file[name]] * 2))
                assert (rows["logvar"][:2] == -30).all()
                assert torch.equal(rows["mean"][2, 0], torch.ones(24, 40))
    # The rows that are kept are found again, and those of another file are not taken for them.
    again = DiskCache(RowStore(tmp_path / "latents"), "vae")
    again.fill([index], lambda pixels: pytest.fail("encoded again"), FillOptions(2, 0, lambda count: None))
    with np.load(GOLDEN / PLAIN) as file:
        np.savez(tmp_path / "a" / "old.npz", **{**dict(file), "latents": file["latents"] + 1})
    [index] = build(tmp_path / "a", ["img.png", "old", "there"], flip_aug=True).training
    again = DiskCache(RowStore(tmp_path / "latents"), "vae")
    again.fill([index], encode, FillOptions(2, 0, lambda count: None))
    means = again.rows(0, [0, 1], [False, False])["mean"]
    assert torch.allclose(means[1], means[0] + 1)


def test_masks_of_latents_without_image(tmp_path: Path) -> None:
    place(tmp_path / "a", img_0130x0130_sd=ALPHA)
    [index] = build(tmp_path / "a", ["img"], resolution=128, alpha_mask=True).training
    assert index.buckets == [(128, 128)]
    for cache in caches(tmp_path, index):
        mask = cache.rows(0, [0], [False])["mask"]
        with np.load(GOLDEN / ALPHA) as file:
            cells = file["alpha_mask"].reshape(16, 8, 16, 8).mean(axis=(1, 3), dtype=np.float64)
        np.testing.assert_allclose(mask[0].numpy(), cells, atol=1e-6)


@pytest.mark.parametrize("key", ["sub/img", "sub/img.jpg", "sub\\img.png", "./sub/img.webp", "{root}/sub/img"])
def test_every_way_to_write_the_key(tmp_path: Path, key: str) -> None:
    place(tmp_path / "sub", img_0300x0200_sd=PLAIN, img1_0300x0200_sd=PLAIN, img_0300x0200_sdxl=ALPHA)
    [index] = build(tmp_path, [key.format(root=tmp_path)]).training
    assert list(index.keys) == ["sub/img_0300x0200_sd.npz"]


def test_a_dot_in_a_name_without_extension(tmp_path: Path) -> None:
    place(tmp_path, **{"x.v1": PLAIN, "x": ALPHA})
    [index] = build(tmp_path, ["x.v1"]).training
    assert list(index.keys) == ["x.v1.npz"]


def test_without_a_cache_the_message_names_the_way_out(tmp_path: Path) -> None:
    place(tmp_path, img_0300x0200_sd=PLAIN)
    message = refusal(tmp_path, ["img.png", "gone"], IndexOptions())
    assert "2 of its 2 images are not on disk" in message
    assert "gone, img.png; 1 of them have sd-scripts' latents (.npz) there: give --cache_latents" in message
    assert "--cache_latents" not in refusal(tmp_path, ["gone"], IndexOptions())


def test_latents_for_another_bucket_name_both(tmp_path: Path) -> None:
    place(tmp_path, img_0300x0200_sd=PLAIN)
    message = refusal(tmp_path, ["img"], resolution=128)
    assert "img_0300x0200_sd.npz: its latents have the shape (4, 24, 40)" in message
    assert "(300x200) goes to the bucket 128x128, which needs (4, 16, 16)" in message
    assert "alpha_mask is not in it; switch alpha_mask off" in refusal(tmp_path, ["img"], alpha_mask=True)
    place(tmp_path, b_0130x0130_sd=ALPHA)
    assert "switch flip_aug off" in refusal(tmp_path, ["b"], resolution=128, flip_aug=True)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_damaged_latents_without_image(tmp_path: Path, content: bytes) -> None:
    place(tmp_path, good=PLAIN)
    (tmp_path / "bad.npz").write_bytes(content)
    message = refusal(tmp_path, ["bad", "good"])
    assert "bad.npz: damaged, or no .npz file; bring the image back" in message
    skipping = IndexOptions(caches_latents=True, skip_broken_images=True)
    [index] = build(tmp_path, ["bad", "good"], skipping).training
    assert list(index.keys) == ["good.npz"]
    assert "bad.npz" in index.left_out[0]


def test_foreign_latents_without_image(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "b.npz", original_size=np.array([300, 200]))
    np.savez(tmp_path / "c.npz", original_size=np.array([-300, 200]))
    assert "a.npz: does not tell the size of its image" in refusal(tmp_path, ["a"])
    assert "b.npz: latents is not in it" in refusal(tmp_path, ["b"])
    assert "c.npz: does not tell the size of its image" in refusal(tmp_path, ["c"])


def test_several_files_of_latents_for_one_image(tmp_path: Path) -> None:
    place(tmp_path, img_0300x0200_sd=PLAIN, img_0130x0130_sd=ALPHA)
    message = refusal(tmp_path, ["img"])
    assert "'img' (img_0130x0130_sd.npz or img_0300x0200_sd.npz)" in message
    assert "remove the latents that are stale" in message
    (tmp_path / "img_0130x0130_sd.npz").unlink()
    assert "several entries: img_0300x0200_sd.npz" in refusal(tmp_path, ["img", str(tmp_path / "img.png")])


def test_equal_latents_are_kept_for_validation_together(tmp_path: Path) -> None:
    place(tmp_path, a=PLAIN, b=PLAIN, c=ALPHA)
    with np.load(GOLDEN / PLAIN) as file:
        np.savez(tmp_path / "c.npz", **{**dict(file), "latents": file["latents"] + 1})
    found = build(tmp_path, ["a", "b", "c"], IndexOptions(caches_latents=True, verify_images=True), split=0.3)
    assert [list(index.keys) for index in found.training] == [["a.npz", "b.npz"]]
    assert [list(index.keys) for index in found.validation] == [["c.npz"]]


def test_latents_that_change_while_training_are_an_error(tmp_path: Path) -> None:
    place(tmp_path, a=PLAIN)
    [index] = build(tmp_path, ["a"]).training
    place(tmp_path, a=ALPHA)
    with pytest.raises(DataError, match=r"a\.npz: latents is for another bucket; there is no image to encode"):
        caches(tmp_path, index)
