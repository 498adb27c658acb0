"""`sd-train prepare_buckets_latents`: each image's bucket into the metadata, its latents into a file beside it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd_train.data.buckets import assign
from sd_train.data.headers import read_size
from sd_train.data.record import ImageRecord
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import ConfigError, DataError, ModelError, Problems, RunError
from sd_train.files import probe_folder
from sd_train.prepare.arguments import Parser, check_images_folder
from sd_train.prepare.entries import match_entries
from sd_train.prepare.listing import find_images, metadata_key, tidy_folders, too_long
from sd_train.prepare.metadata import check_target, read_metadata, write_metadata

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 5
_CELL = 8
_LEAST_STEP = 32
"""Steps of buckets are multiples of it, for some families of twice that."""
_INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")

_ABOUT = """Put images into buckets by the rules of the training, and write their latents beside them, under
sd-scripts' names (STEM_WWWWxHHHH_sd.npz, ..._sdxl.npz) and with its contents: a draw from the autoencoder's posterior,
which --seed and the image's name determine. OUT_JSON is IN_JSON with each image's train_resolution. Trainings with
cache_latents and the same resolution and bucket options take these files in place of encoding.

Only images that IN_JSON names are prepared. What is there and fits is kept, so an interrupted command is simply given
again; what was made for another bucket, image or autoencoder is made anew. Files of other programs are kept if they
fit as far as they tell: --overwrite makes all of them anew. The exit code is 3 if there were images that cannot be
read; all others are done."""


@dataclass(frozen=True)
class _Found:
    """The images, by what can be done with them."""

    records: list[ImageRecord]
    broken: dict[Path, str]
    unfit: dict[Path, str]


def main(argv: Sequence[str]) -> int:
    """Write what is missing; 3 if an image cannot be read.

    Raises:
        UserError: if the arguments are wrong, the metadata or the model cannot be read, or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    dataset = _checked(given)
    metadata = read_metadata(given.in_json)
    images = find_images(given.train_data_dir, given.recursive)
    matched = match_entries(images, given.train_data_dir, metadata)
    _tell("images have no entry in IN_JSON and are left out", [str(image) for image in matched.without_entry])
    _tell_left(matched.without_image, given.train_data_dir)
    if not matched.keys:
        raise DataError(
            f"{given.in_json}: names none of the {len(images)} images in {given.train_data_dir}; give the metadata of "
            "this folder, and --recursive if its images lie in sub-folders"
        )
    probe_folder(given.out_json.absolute().parent, "OUT_JSON")
    found = _records(list(matched.keys), dataset, given.train_data_dir)
    _tell("images are too small for a bucket and are left out", list(found.unfit.values()))
    broken = dict(found.broken)
    broken |= _latents(given, found.records)
    whole = [record for record in found.records if record.path not in broken]
    for record in whole:
        metadata[matched.keys[record.path]]["train_resolution"] = list(record.bucket)
    written = write_metadata(given.out_json, metadata)
    print(f"{given.out_json}: {'written' if written else 'is as it was'}, {len(whole)} images in "
          f"{len({record.bucket for record in whole})} buckets")  # fmt: skip
    _count(whole)
    for problem in broken.values():
        print(f"error: {problem}", file=sys.stderr)
    return 3 if broken else 0


def _tell_left(keys: Sequence[str], folder: Path) -> None:
    """Tell of entries that are left out, and of those among them whose images a training would find."""
    there = {key for key in keys if os.path.isfile(folder / key)}
    _tell("entries are about images in sub-folders, or hidden ones, and are kept as they are; --recursive takes those "
          "in sub-folders", sorted(there))  # fmt: skip
    _tell("entries are about images that are not in the folder and are kept as they are",
          [key for key in keys if key not in there])  # fmt: skip


def _count(records: Sequence[ImageRecord]) -> None:
    counts: dict[tuple[int, int], int] = {}
    for record in records:
        counts[record.bucket] = counts.get(record.bucket, 0) + 1
    for (width, height), count in sorted(counts.items()):
        print(f"  {width}x{height}: {count}")


def _tell(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        print(f"note: {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}", file=sys.stderr)


def _records(images: Sequence[Path], dataset: DatasetConfig, folder: Path) -> _Found:
    found = _Found([], {}, {})
    for image in images:
        try:
            size = read_size(image)
        except DataError as problem:
            found.broken[image] = str(problem)
            continue
        try:
            place = assign(size, dataset, str(image))
        except DataError as problem:
            found.unfit[image] = str(problem)
            continue
        found.records.append(ImageRecord(
            path=image, key=metadata_key(image, folder, False), subset=dataset.subsets[0], size=size,
            bucket=place.bucket, resized=place.resized, caption="", weight=1.0, is_reg=False, bucketed=True,
        ))  # fmt: skip
    return found


def _latents(given: argparse.Namespace, records: Sequence[ImageRecord]) -> dict[Path, str]:
    """Write the files that are missing; the images that cannot be read, with the reason."""
    # torch takes seconds to import, and wrong arguments need not wait for it.
    from tqdm import tqdm

    # It tells of kernels that only its 4-bit layers would use, whenever another library imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from sd_train.device import open_device, out_of_memory
    from sd_train.families.autoencoder import Autoencoder
    from sd_train.families.parts import ModelRequest, multiple_of, read_model
    from sd_train.prepare.latents import LatentsOptions, look_for, make_files, sharing

    parts = read_model(ModelRequest(given.model_name_or_path, given.v2, None, given.sdxl, given.vae, guess=True,
                                    option="model_name_or_path"))  # fmt: skip
    device = open_device("no")
    encoder = Autoencoder(parts, device.device)
    if (encoder.channels, encoder.factor) != (4, _CELL):
        raise ModelError(
            f"{given.model_name_or_path}: its latents have {encoder.channels} channels at 1/{encoder.factor} of the "
            f"size; sd-scripts' files hold 4 at 1/{_CELL}, so use --cache_latents_to_disk in the training instead"
        )
    if given.bucket_reso_steps % (multiple := multiple_of(parts.family)):
        raise ConfigError(
            f"--bucket_reso_steps = {given.bucket_reso_steps}: trainings of this model take multiples of {multiple}; "
            f"write {multiple}, as the training does"
        )
    suffix = "_sdxl" if parts.family.startswith("sdxl") else "_sd"
    workers = given.max_data_loader_n_workers
    options = LatentsOptions(
        suffix, encoder.digest(), given.seed, given.batch_size,
        min(8, os.cpu_count() or 1) if workers is None else workers, given.skip_existing, given.overwrite,
    )  # fmt: skip
    tidy_folders((record.path.parent for record in records), ".npz")
    shared = sharing(records, suffix)
    _tell("images share the name of their latents with another one and have none of their own: rename them",
          [str(path) for path in shared])  # fmt: skip
    files = [look_for(record, options) for record in records if record.path not in shared]
    long = [file for file in files if too_long(file.path)]
    _tell("images have names too long for a file of latents beside them, and are encoded when they are trained",
          [str(file.record.path) for file in long])  # fmt: skip
    foreign = [file for file in files if file.stands == "foreign"]
    _tell("files of latents are another program's and fit as far as they tell; --overwrite makes them anew",
          [str(file.path) for file in foreign])  # fmt: skip
    wanted = [file for file in files if file.stands in ("missing", "stale") and not too_long(file.path)]
    broken: dict[Path, str] = {}
    made = 0

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        return encoder.encode(device.move(pixels))

    with tqdm(desc="encoding", unit="image", total=len(wanted), disable=not sys.stderr.isatty()) as bar:
        try:
            for file, problem in make_files(wanted, encode, options, bar.update):
                if problem is not None:
                    broken[file.record.path] = str(problem)
                else:
                    made += 1
        except (RuntimeError, MemoryError) as problem:
            if not out_of_memory(problem):
                raise
            raise RunError(
                f"out of memory on {device.device} after {made} files, which are kept; give the command again with a "
                "smaller --batch_size or --max_resolution"
            ) from None
    kept = sum(file.stands in ("fits", "foreign") for file in files)
    print(f"latents: {made} files written, {kept} kept ({parts.family}, *{suffix}.npz)")
    return broken


def _checked(given: argparse.Namespace) -> DatasetConfig:
    """The buckets that the arguments ask for.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    check_images_folder(given.train_data_dir, problems)
    if not given.in_json.is_file():
        problems.add("in_json", str(given.in_json), "there is no such file",
                     "make it with merge_captions_to_metadata or merge_dd_tags_to_metadata")  # fmt: skip
    check_target(given.out_json, problems)
    resolution = _resolution(given.max_resolution, problems)
    if given.bucket_reso_steps < 1 or given.bucket_reso_steps % _LEAST_STEP:
        problems.add("--bucket_reso_steps", given.bucket_reso_steps, "must be a multiple of 64, or of 32 for SDXL",
                     "write what the training has")  # fmt: skip
    else:
        given.min_bucket_reso, given.max_bucket_reso = _limits(given, resolution, problems)
    for name, least in (("batch_size", 1), ("max_data_loader_n_workers", 0), ("seed", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            problems.add(f"--{name}", value, f"must be {least} or more", "leave it out")
    if given.skip_existing and given.overwrite:
        problems.add("--overwrite", None, "contradicts --skip_existing", "leave out one of the two")
    problems.raise_if_any(ConfigError)
    assert resolution is not None
    if given.mixed_precision != "no":
        print(f"note: --mixed_precision {given.mixed_precision} has no effect: latents are always computed in float32",
              file=sys.stderr)  # fmt: skip
    subset = SubsetConfig(
        given.train_data_dir, flip_aug=given.flip_aug, alpha_mask=given.alpha_mask,
        resize_interpolation=given.resize_interpolation, origin="prepare_buckets_latents",
    )  # fmt: skip
    return DatasetConfig(
        batch_size=given.batch_size, resolution=resolution, style="fine_tuning", enable_bucket=True,
        min_bucket_reso=given.min_bucket_reso, max_bucket_reso=given.max_bucket_reso,
        bucket_reso_steps=given.bucket_reso_steps, bucket_no_upscale=given.bucket_no_upscale, subsets=(subset,),
    )  # fmt: skip


def _limits(given: argparse.Namespace, resolution: tuple[int, int] | None, problems: Problems) -> tuple[int, int]:
    """Shortest and longest side, whole steps as the training makes of them; its rules hold here too."""
    step, least, most = given.bucket_reso_steps, given.min_bucket_reso, given.max_bucket_reso
    smallest, largest = least // step * step, -(-most // step) * step
    if smallest < step:
        problems.add("--min_bucket_reso", least, f"is less than one step of {step}", "give one step or more")
    elif largest < smallest:
        problems.add("--max_bucket_reso", most, "is less than --min_bucket_reso", "swap them")
    elif resolution is None:
        pass
    elif min(resolution) < smallest:
        problems.add("--max_resolution", given.max_resolution, f"a side is shorter than --min_bucket_reso ({least})",
                     f"give --min_bucket_reso {max(min(resolution) // step, 1) * step}")  # fmt: skip
    elif max(resolution) > largest:
        problems.add("--max_resolution", given.max_resolution, f"a side is longer than --max_bucket_reso ({most})",
                     f"give e.g. --max_bucket_reso {-(-2 * max(resolution) // step) * step}")  # fmt: skip
    return smallest, largest


def _resolution(text: str, problems: Problems) -> tuple[int, int] | None:
    """`512,512` or `512`."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        problems.add("--max_resolution", text, "is no width and height in pixels", "write e.g. 512,512")
        return None
    return numbers[0], numbers[-1]


def _parser() -> argparse.ArgumentParser:
    parser = Parser("prepare_buckets_latents", _ABOUT)
    add = parser.add_argument
    add("train_data_dir", type=Path, help="folder of the images")
    add("in_json", type=Path, help="metadata to read")
    add("out_json", type=Path, help="metadata to write; the same file is fine, what was there is kept as .bak")
    add("model_name_or_path", help="the model whose autoencoder encodes: a file, a diffusers folder or a hub id")
    add("--vae", metavar="PATH", help="autoencoder in its place: a file, a folder or a whole model")
    add("--v2", action="store_true", help="the model is a Stable Diffusion 2.x one (only checked)")
    add("--sdxl", action="store_true", help="the model is an SDXL one (only checked)")
    add("--batch_size", type=int, default=1, metavar="N", help="pictures encoded at once (default 1)")
    add("--max_data_loader_n_workers", type=int, metavar="N", help="threads that read images ahead (default: one for "
        "each processor, at most 8)")  # fmt: skip
    add("--max_resolution", default="512,512", metavar="W,H", help="the training's resolution (default 512,512)")
    add("--min_bucket_reso", type=int, default=256, metavar="PIXELS", help="shortest side (default 256)")
    add("--max_bucket_reso", type=int, default=1024, metavar="PIXELS", help="longest side (default 1024)")
    add("--bucket_reso_steps", type=int, default=64, metavar="PIXELS", help="sides are multiples of it (default 64)")
    add("--bucket_no_upscale", action="store_true", help="never enlarge an image")
    add("--resize_interpolation", choices=_INTERPOLATIONS, help="as in the training (default: area to shrink, Lanczos "
        "to enlarge)")  # fmt: skip
    add("--mixed_precision", choices=("no", "fp16", "bf16"), default="no", help="accepted; latents are always computed "
        "in float32")  # fmt: skip
    add("--full_path", action="store_true", help="accepted; keys are found whether they are full paths or not")
    add("--flip_aug", action="store_true", help="also the latents of the mirrored images")
    add("--alpha_mask", action="store_true", help="also the transparency, for a masked loss")
    add("--skip_existing", action="store_true", help="keep every file that has the right shape, as sd-scripts does")
    add("--overwrite", action="store_true", help="make all files anew")
    add("--recursive", action="store_true", help="also the images in sub-folders")
    add("--seed", type=int, default=0, metavar="N", help="of the draws from the posterior (default 0)")
    return parser
