"""Dataset files and their images beside sd-scripts', for `tools/conformance.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from conformance_cases import REFUSED, Case, Intended, Part, answer, refusals
from conformance_texts import batches_of
from PIL import Image

from sd_train.config.options import RunConfig
from sd_train.config.parser import load_run_config
from sd_train.data.captions import sample_caption
from sd_train.data.config import load_datasets
from sd_train.data.images import prepare, sample_view
from sd_train.data.index import ImageIndex
from sd_train.data.request import dataset_request
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.plan_data import read_datasets, run_options

ROOT = "<D>"
DATASET_KEYS = ("batch_size", "enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
                "bucket_no_upscale", "validation_split", "validation_seed")  # fmt: skip
SUBSET_KEYS = {field.name for field in fields(SubsetConfig)} - {"origin"}
COUNTS = ("num_train_images", "num_reg_images", "batches", "buckets", "captions")
UNSET = {"min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale", "validation_split",
         "prior_loss_weight", "is_reg", "caption_extension"}  # fmt: skip
"""Keys that are None in sd-scripts where they have no meaning: without buckets, and in some styles."""
SHOWN = 4
"""Captions of a dataset in the golden file."""
CACHED = "latents can be cached"
CAPTIONS_THERE = "every image has a caption or class_tokens"

FILES = [
    refusals("values without sense are errors", {
        "resolution bool": "resolution = True", "resolution negative": "resolution = -256",
        "batch_size bool": "batch_size = True", "caption_extension empty": "caption_extension",
        "caption_separator empty": "caption_separator", "keep_tokens negative": "keep_tokens = -1",
        "dropout 2.0": "caption_dropout_rate = 2.0", "validation_split 1.5": "validation_split = 1.5",
        "face_crop reversed": "face_crop_aug_range",
    }),
    refusals("a folder without images is an error; sd-scripts leaves it out", {"empty folder plus good one": "empty"}),
    refusals("random crops cannot be cached; sd-scripts accepts the file and stops when it caches", {
        "cli --cache_latents + random_crop: is_latent_cacheable": "random_crop",
    }),
    Intended("face crops cannot be cached; sd-scripts caches the centre in their place",
             lambda case: case.theirs != REFUSED != case.ours and case.ours == {**case.theirs, CACHED: False}
             and bool(case.ours["0.0.face_crop_aug_range"])),
    Intended("fractional num_repeats", lambda case: case.name == "num_repeats float" and case.ours != REFUSED
             and case.ours["0.0.num_repeats"] == 1.5),
    Intended("whole numbers are numbers too", lambda case: case.name == "face_crop ints" and case.ours != REFUSED
             and case.ours["0.0.face_crop_aug_range"] == [1, 3]),
]  # fmt: skip
IMAGES = [
    Intended("an image without caption and class_tokens, or with captions of another extension than asked, is an error "
             "unless --allow_missing_captions is given",
             lambda case: {**case.ours, CAPTIONS_THERE: True} == case.theirs
             and "--allow_missing_captions" in case.said),
]  # fmt: skip
FIRST_BATCH = [
    Intended("without buckets an image of another size is resized and cut at the centre",
             lambda case: "cropping and bucketing are disabled" in str(case.theirs) and case.ours != REFUSED),
]  # fmt: skip


@dataclass(frozen=True)
class Read:
    """What a run makes of a case."""

    config: RunConfig
    datasets: Sequence[DatasetConfig]
    indexes: Sequence[ImageIndex]


def config_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`config_matrix.json`: which dataset files are accepted, what they resolve to, and what their images give."""
    root = make_folder(place)
    resolved, images, batches = list[Case](), list[Case](), list[Case]()
    for case in golden["cases"]:
        name = case["name"]
        read, said = answer(partial(_read, case, root, "--allow_missing_captions"))
        theirs: Any = _their_settings(case) if case["accepted"] else REFUSED
        ours: Any = _our_settings(read, root) if isinstance(read, Read) else REFUSED
        if theirs != REFUSED != ours:
            # Only what sd-scripts has too.
            ours = {key: value for key, value in ours.items() if key in theirs}
        resolved.append(Case(name, theirs, ours, said))
        if not case["accepted"] or not isinstance(read, Read):
            continue
        strict, said = answer(partial(_read, case, root))
        found = {**_our_images(read), CAPTIONS_THERE: strict != REFUSED}
        images.append(Case(name, {**_their_images(case), CAPTIONS_THERE: True}, found, said))
        batches.append(_first_batch(case, read))
    return [Part("files", resolved, FILES), Part("images", images, IMAGES), Part("first batch", batches, FIRST_BATCH)]


def make_folder(place: Path) -> Path:
    """The folder of images, captions, masks and metadata files that the dataset files name as <D>."""
    root = place / "D"
    captions = {"a": ("cap a {}, tag", ".txt", 4), "b": ("", "", 3), "c": ("cc {}, tag", ".caption", 2),
                "reg": ("reg {}, tag", ".txt", 3), "cond": ("", "", 4)}  # fmt: skip
    (root / "empty").mkdir(parents=True)
    for folder, (text, extension, count) in captions.items():
        (root / folder).mkdir()
        for number, width in enumerate((320, 360, 400, 440)[:count]):
            stem = root / folder / f"{'a' if folder == 'cond' else folder}_{number}"
            Image.new("RGB", (width, 256)).save(stem.with_suffix(".png"))
            if text:
                stem.with_suffix(extension).write_text(text.format(number), encoding="utf-8")
    entries = {f"a_{number}.png": {"caption": f"meta {number}", "tags": "t1, t2"} for number in range(4)}
    absolute = {str(root / "a" / f"a_{number}.png"): {"caption": f"meta {number}"} for number in range(3)}
    lines = [{"image_path": str(root / "b" / f"b_{number}.png"), "caption": f"jl {number}"} for number in range(3)]
    texts = {
        "meta_rel.json": json.dumps(entries), "meta_abs.json": json.dumps(absolute), "meta_empty.json": "{}",
        "meta_bad.json": "not JSON", "meta_missing.json": json.dumps({"nofile.png": {"caption": "x"}}),
        "meta.jsonl": "\n".join(map(json.dumps, lines)),
    }  # fmt: skip
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")
    (place / "model.safetensors").touch()
    return root


def _read(case: dict[str, Any], root: Path, *more: str) -> Read:
    """Read the options, the dataset file and the images as a run does; nothing is kept between cases."""
    text = case["text"].replace(ROOT, root.as_posix())
    path = root.parent / ("data.json" if text.startswith("{") else "data.toml")
    path.write_text(text, encoding="utf-8")
    words = ["--pretrained_model_name_or_path", str(root.parent / "model.safetensors"), "--dataset_config", str(path),
             "--output_dir", str(root.parent / "out"), "--cache_dir", str(root.parent / "cache")]  # fmt: skip
    config = load_run_config("train_network", [*words, *case.get("argv", ()), *more]).config
    datasets, indexes = read_datasets(config, None, seed=0)
    return Read(config, datasets, indexes.training)


def _their_settings(case: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {CACHED: case["latent_cacheable"]}
    for number, dataset in enumerate(case["datasets"]):
        found[f"{number}.resolution"] = [dataset["width"], dataset["height"]]
        known = {key: dataset[key] for key in (*DATASET_KEYS, "prior_loss_weight")}
        found |= {f"{number}.{key}": value for key, value in known.items() if value is not None or key not in UNSET}
        for row, subset in enumerate(dataset["subsets"]):
            known = {key: value for key, value in subset.items() if key in SUBSET_KEYS | {"img_count"}}
            known = {key: value for key, value in known.items() if value is not None or key not in UNSET}
            if known["image_dir"] is not None:
                known["image_dir"] = known["image_dir"].rstrip("/")
            if "caption_extension" in known:
                # sd-scripts puts the dot before it where it looks for files.
                known["caption_extension"] = "." + known["caption_extension"].lstrip(".")
            found |= {f"{number}.{row}.{key}": value for key, value in known.items()}
    return found


def _our_settings(read: Read, root: Path) -> dict[str, Any]:
    cached = replace(dataset_request("train_network", run_options(read.config)), caches_latents=True)
    found: dict[str, Any] = {CACHED: answer(lambda: load_datasets(cached))[0] != REFUSED}
    for number, (dataset, index) in enumerate(zip(read.datasets, read.indexes, strict=True)):
        found[f"{number}.resolution"] = list(dataset.resolution)
        found |= {f"{number}.{key}": getattr(dataset, key) for key in DATASET_KEYS}
        found[f"{number}.prior_loss_weight"] = read.config.training.prior_loss_weight
        for row, subset in enumerate(dataset.subsets):
            known = {key: _plain(getattr(subset, key), root) for key in SUBSET_KEYS}
            known["img_count"] = index.image_count(row)
            found |= {f"{number}.{row}.{key}": value for key, value in known.items()}
    return found


def _plain(value: object, root: Path) -> object:
    """`value` as the golden file writes it."""
    if isinstance(value, Path):
        return None if value == Path() else value.as_posix().replace(root.as_posix(), ROOT)
    return list(value) if isinstance(value, tuple) else value


def _their_images(case: dict[str, Any]) -> dict[str, Any]:
    return {f"{number}.{key}": dataset[key] for number, dataset in enumerate(case["datasets"]) for key in COUNTS}


def _our_images(read: Read) -> dict[str, Any]:
    found = dict[str, Any]()
    for number, index in enumerate(read.indexes):
        buckets = [[list(bucket), count] for bucket, count in zip(index.buckets, index.bucket_counts(), strict=True)]
        counts = index.num_train_images, index.num_reg_images, batches_of(index)
        values = (*counts, buckets, list(index.captions[:SHOWN]))
        found |= {f"{number}.{key}": value for key, value in zip(COUNTS, values, strict=True)}
    return found


def _first_batch(case: dict[str, Any], read: Read) -> Case:
    """sd-scripts' first batch holds samples that it draws: any of ours."""
    ours = []
    for index in read.indexes:
        for row in range(len(index)):
            record = index.record(row)
            picture = prepare(record, sample_view(record, 0, 0, 0))
            ours.append([list(picture.pixels.shape), sample_caption(record, 0, 0, 0, 0, 1)])
    theirs = case["first_batch"]
    if "error" in theirs:
        return Case(case["name"], f"{theirs['error'][0]}: {theirs['error'][1].split(' / ')[0]}", ours)
    batch = [[theirs["image_shape"][1:], caption] for caption in theirs["captions"]]
    return Case(case["name"], batch, batch if all(sample in ours for sample in batch) else ours)
