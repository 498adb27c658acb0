"""Buckets, crops, pixels and kohya's latents beside those of sd-scripts, for `tools/conformance.py`."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance_cases import REFUSED, Case, Intended, Part, read_dataset
from PIL import Image

from sd_train.data.buckets import Assignments, assign_many, bucket_resolutions
from sd_train.data.cache import DiskCache, FillOptions
from sd_train.data.images import centred_view, prepare, view_geometry
from sd_train.data.index import ImageIndex, ImageRecord, IndexOptions, build_indexes
from sd_train.data.npz import Mismatch, find_npz, read_npz
from sd_train.data.settings import DatasetConfig
from sd_train.data.store import RowStore

SETTINGS = ("resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
            "bucket_no_upscale")  # fmt: skip
NO_AREA = Intended(
    "a bucket without area: sd-scripts goes on until it cuts or encodes nothing; here the image is named and refused",
    lambda case: case.ours == REFUSED and 0 in case.theirs["bucket"],
)
REAL_CROP = Intended(
    "SDXL is told the crop that was made; sd-scripts tells one that it computes apart from it (its issue #1443)",
    lambda case: case.ours["told"] == case.theirs["made"] and case.ours["told flipped"] == case.theirs["made flipped"],
)


def settings_of(golden: dict[str, Any]) -> dict[str, Any]:
    """The dataset keys of a row of the golden file."""
    return {"enable_bucket": True} | {name: golden[name] for name in SETTINGS if name in golden}


def title(settings: dict[str, Any]) -> str:
    """`512x512, 256 to 1024 by 64`."""
    size = "x".join(map(str, settings["resolution"]))
    if not settings["enable_bucket"]:
        return f"{size} without buckets"
    limits = [settings[f"{name}_bucket_reso"] for name in ("min", "max")]
    ending = " without upscale" if settings["bucket_no_upscale"] else ""
    return f"{size} {limits[0]} to {limits[1]} by {settings['bucket_reso_steps']}{ending}"


def picture_folder(place: Path, width: int = 8, height: int = 8) -> Path:
    """A folder in `place` with one picture: red from left to right, green from top to bottom, blue by their sum."""
    folder = place / f"picture {width} {height}"
    folder.mkdir()
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256]
    Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).save(folder / "img.png")
    return folder


def bucket_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`buckets.json`: lists of buckets, and where each size goes."""
    folder = str(picture_folder(place))
    lists, rows = list[Case](), list[Case]()
    for row in golden["settings"]:
        settings = settings_of(row)
        name, dataset = title(settings), read_dataset(place, settings, {"image_dir": folder})
        limits = dataset.min_bucket_reso, dataset.max_bucket_reso
        if "adjusted_min_max" in row:
            lists.append(Case(f"{name}: limits", row["adjusted_min_max"], [*limits]))
        if row.get("predefined") is not None:
            buckets = bucket_resolutions(dataset.resolution, *limits, dataset.bucket_reso_steps)
            lists.append(Case(f"{name}: buckets", row["predefined"], [list(bucket) for bucket in buckets]))
        assigned = assign_many(np.array(golden["sizes"]), dataset)
        if row.get("sorted_used_resos") is not None:
            # sd-scripts was asked for more sizes than are listed.
            used = [list(bucket) for bucket in assigned.numbered()[0] if 0 not in bucket]
            lists.append(Case(f"{name}: buckets that it does not use", [],
                              [bucket for bucket in used if bucket not in row["sorted_used_resos"]]))  # fmt: skip
        for number, (size, theirs) in enumerate(zip(golden["sizes"], row["results"], strict=True)):
            keys = ("bucket", "resized", "aspect error")
            found: Any = dict(zip(keys, theirs, strict=True)) if isinstance(theirs, list) else REFUSED
            rows.append(Case(f"{name}: {size[0]}x{size[1]}", found, _assigned(assigned, number)))
    return [Part("bucket lists", lists), Part("sizes", rows, [NO_AREA])]


def _assigned(rows: Assignments, number: int) -> Any:
    if not rows.usable[number]:
        return REFUSED
    return {
        "bucket": rows.bucket[number].tolist(), "resized": rows.resized[number].tolist(),
        "aspect error": float(rows.aspect_error[number]),
    }  # fmt: skip


def crop_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`crop.json`: where each size is cut, and what SDXL is told of that."""
    folder = str(picture_folder(place))
    made, told = list[Case](), list[Case]()
    for row in golden["settings"]:
        settings = settings_of(row)
        dataset = read_dataset(place, settings, {"image_dir": folder})
        assigned = assign_many(np.array(golden["sizes"]), dataset)
        for number, (size, theirs) in enumerate(zip(golden["sizes"], row["results"], strict=True)):
            name = f"{title(settings)}: {size[0]}x{size[1]}"
            record = _record(size, assigned, number, dataset) if assigned.usable[number] else None
            made.append(Case(name, _box(theirs), REFUSED if record is None else _our_box(record)))
            if isinstance(theirs, list) and record is not None:
                (left, top, right, _), width = theirs[0], record.resized[0]
                made_here = {"made": [top, left], "made flipped": [top, width - right]}
                told.append(Case(name, {"told": theirs[3], "told flipped": theirs[4], **made_here},
                                 {**_our_told(record), **made_here}))  # fmt: skip
    return [Part("crop boxes", made, [NO_AREA]), Part("crop_top_left for SDXL", told, [REAL_CROP])]


def _record(size: list[int], rows: Assignments, number: int, dataset: DatasetConfig) -> ImageRecord:
    (width, height), (bucket, resized) = size, (rows.bucket[number].tolist(), rows.resized[number].tolist())
    path = dataset.subsets[0].image_dir / "img.png"
    return ImageRecord(
        path, path.name, dataset.subsets[0], (width, height), (bucket[0], bucket[1]), (resized[0], resized[1]), "", 1.0,
        is_reg=False,
    )  # fmt: skip


def _box(theirs: Any) -> Any:
    if not isinstance(theirs, list):
        return REFUSED
    (left, top, right, bottom), original, target = theirs[0], theirs[2], theirs[5]
    return {"box": theirs[0], "original": original, "target": target, "bucket": [right - left, bottom - top]}


def _our_box(record: ImageRecord) -> Any:
    view = centred_view(record, flip=False)
    geometry, (left, top) = view_geometry(record, view), view.crop
    return {
        "box": [left, top, left + record.bucket[0], top + record.bucket[1]], "original": list(geometry.original),
        "target": list(geometry.target), "bucket": list(record.bucket),
    }  # fmt: skip


def _our_told(record: ImageRecord) -> dict[str, Any]:
    plain, flipped = (view_geometry(record, centred_view(record, flip)) for flip in (False, True))
    return {"told": list(plain.crop), "told flipped": list(flipped.crop)}


def pixel_parts(golden: dict[str, Any], images: Path, place: Path) -> list[Part]:
    """`pixels.json`: photographs as the autoencoder gets them."""
    cases, records = list[Case](), dict[str, dict[str, ImageRecord]]()
    for theirs in golden["cases"]:
        settings = {
            "resolution": theirs["resolution"], "enable_bucket": True, "min_bucket_reso": theirs["min"],
            "max_bucket_reso": theirs["max"], "bucket_reso_steps": theirs["steps"],
            "bucket_no_upscale": theirs["no_upscale"], "resize_interpolation": theirs["interpolation"],
        }  # fmt: skip
        name = f"{title(settings)} {theirs['interpolation']}"
        if name not in records:
            dataset = read_dataset(place, settings, {"image_dir": str(images), "caption_extension": ".txt"})
            (index,) = build_indexes([dataset], IndexOptions(allow_missing_captions=True)).training
            records[name] = {index.keys[row]: index.record(row) for row in range(len(index))}
        record = records[name][theirs["image"]]
        floats = prepare(record, centred_view(record, flip=False)).pixels
        levels = np.rint((floats.transpose(1, 2, 0) * 0.5 + 0.5) * 255).astype(np.uint8)
        ours = {
            "size": list(record.size), "bucket": list(record.bucket), "resized": list(record.resized),
            "sha256_rgb": hashlib.sha256(np.ascontiguousarray(levels).tobytes()).hexdigest(),
        }  # fmt: skip
        cases.append(Case(f"{name}: {theirs['image']}", {key: theirs[key] for key in ours}, ours))
    return [Part("pixels", cases)]


BUCKETS = {
    "sd15": {"resolution": 256, "bucket_reso_steps": 64},
    "sdxl": {"resolution": 384, "bucket_reso_steps": 32},
    "sd15_alpha": {"resolution": 128, "bucket_reso_steps": 64},
}
"""Dataset keys that lead each kind of file to its bucket."""
CHECKS = Intended(
    "latents are read where they match, whatever is asked; sd-scripts looks for the keys alone, or not at all",
    lambda case: case.theirs is True and case.ours is False and ("OTHER bucket" in case.name or "skip" in case.name),
)
EMPTY = Intended("a damaged file is left alone and its image encoded; sd-scripts ends with a traceback",
                 lambda case: case.theirs == "EOFError" and case.ours is False)  # fmt: skip


def latents_parts(golden: dict[str, Any], folder: Path, place: Path) -> list[Part]:
    """`latents_npz`: the files that sd-scripts wrote, its names for them, and when it takes them."""
    contents = [_read_latents(name, entry, folder, place) for name, entry in golden["files"].items()]
    names = [_find(asked, name, place) for asked, name in golden["facts"]["names"].items()]
    first = "sd15_new_0300x0200_sd.npz"
    checks = list(_taken(golden["is_disk_cached_latents_expected"], folder / first, place))
    return [Part("latents", contents), Part("latents: names", names),
            Part("latents: taken", checks, [CHECKS, EMPTY])]  # fmt: skip


def _index(name: str, entry: dict[str, Any], place: Path, **subset: Any) -> ImageIndex:
    """The picture that the latents `name` were made of."""
    kind = name.split("_0")[0].removesuffix(".npz").removesuffix("_old").removesuffix("_new")
    root = place / f"of {name}"
    root.mkdir()
    folder = picture_folder(root, *entry["image_size_wh"])
    keys = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 1024, **BUCKETS[kind]}
    dataset = read_dataset(root, keys, {"image_dir": str(folder), "class_tokens": "x", **subset})
    (index,) = build_indexes([dataset], IndexOptions()).training
    return index


def _read_latents(name: str, entry: dict[str, Any], folder: Path, place: Path) -> Case:
    arrays = entry["arrays"]
    flips, masked = [False, True][: 1 + ("latents_flipped" in arrays)], "alpha_mask" in arrays
    index = _index(name, entry, place, flip_aug=len(flips) > 1, alpha_mask=masked)
    record, suffix = index.record(0), "_sdxl" if "sdxl" in name else "_sd"
    width, height = record.size
    tail = "" if "old" in name else f"_{width:04d}x{height:04d}{suffix}"
    shutil.copy(folder / name, record.path.with_name(f"img{tail}.npz"))
    encoded = list[int]()

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded.append(len(pixels))
        rows = torch.zeros(len(pixels), 4, record.bucket[1] // 8, record.bucket[0] // 8)
        return {"mean": rows, "logvar": rows}

    cache = DiskCache(RowStore(place / f"cache {name}" / "latents"), "autoencoder", suffix)
    cache.fill([index], encode, FillOptions(batch_size=1, workers=0, progress=lambda count: None))
    theirs = {"bucket": entry["bucket_reso_wh"], "resized": entry["resized_size_wh"], "encoded": []}
    ours: dict[str, Any] = {"bucket": list(record.bucket), "resized": list(record.resized), "encoded": encoded}
    for flip in flips:
        rows, key = cache.rows(0, [0], [flip]), "latents_flipped" if flip else "latents"
        theirs[key] = [arrays[key]["shape"], arrays[key]["first4"], round(arrays[key]["sum"], 3)]
        found = rows["mean"][0]
        ours[key] = [list(found.shape), found.flatten()[:4].tolist(), round(float(found.double().sum()), 3)]
        if masked:
            theirs["mask"] = round(arrays["alpha_mask"]["sum"] / 64, 3)
            ours["mask"] = round(float(rows["mask"].double().sum()), 3)
    return Case(name, theirs, ours)


def _find(asked: str, name: str, place: Path) -> Case:
    """`sd d/a.b.png 512x768` -> the file that is looked for."""
    kind, rest = asked.split(" ", 1)
    image, size = rest.rsplit(" ", 1)
    width, height = map(int, size.split("x"))
    path = place / "names" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    found = find_npz(place / "names" / image, (width, height), f"_{kind}")
    path.unlink()
    return Case(asked, name, None if found is None else found.relative_to(place / "names").as_posix())


def _taken(golden: dict[str, Any], file: Path, place: Path) -> Iterator[Case]:
    entry = {"image_size_wh": [300, 200]}
    record = _index(f"{file.name} taken", entry, place).record(0)
    damaged = place / "damaged.npz"
    for name, theirs in golden.items():
        path, wanted = file, record
        if "flip wanted" in name:
            wanted = replace(record, subset=replace(record.subset, flip_aug=True))
        if name.startswith("flip wanted, absent") or "without a latents key" in name:
            np.savez(damaged, **({"arr_0": np.zeros(1)} if "without" in name else _without(file, "latents_flipped")))
            path = damaged
        elif "alpha_mask" in name:
            wanted = replace(record, subset=replace(record.subset, alpha_mask=True))
        elif "OTHER bucket" in name:
            wanted = replace(record, bucket=(512, 512), resized=(768, 512))
        elif "empty file" in name:
            damaged.write_bytes(b"")
            path = damaged
        elif "missing" in name:
            path = place / "nowhere.npz"
        try:
            read_npz(path, wanted)
            ours = True
        except Mismatch:
            ours = False
        yield Case(name, theirs, ours)


def _without(file: Path, name: str) -> dict[str, Any]:
    with np.load(file) as arrays:
        return {key: arrays[key] for key in arrays.files if key != name}
