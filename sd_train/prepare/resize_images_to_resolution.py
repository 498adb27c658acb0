"""`sd-train resize_images_to_resolution`: copies of images, scaled down to one or several areas."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sd_train.data.folders import list_folder
from sd_train.data.images import decode
from sd_train.data.resize import cut_out
from sd_train.data.settings import Interpolation
from sd_train.errors import ConfigError, DataError, Problems
from sd_train.files import write_whole
from sd_train.prepare.arguments import Parser, check_images_folder
from sd_train.prepare.listing import find_images, tidy_folders, too_long

Size = tuple[int, int]

_INTERPOLATIONS: dict[str, Interpolation] = {
    "area": "area", "cubic": "cubic", "lanczos4": "lanczos", "lanczos": "lanczos", "nearest": "nearest",
    "linear": "linear", "bilinear": "bilinear", "bicubic": "bicubic", "box": "box",
}  # fmt: skip

_ABOUT = """Write a copy of each image of SRC for each of --max_resolution into DST, as NAME+WxH.jpg: scaled down, in
its own aspect ratio, to that area at most; smaller images keep their size. Images are turned upright and transparency
becomes white. Copies that are there are left alone. The exit code is 3 if an image cannot be read or copied;
all others are done."""


def main(argv: Sequence[str]) -> int:
    """Write the copies that are missing; 3 if an image cannot be read.

    Raises:
        UserError: if the arguments are wrong or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    resolutions = _checked(given)
    images = find_images(given.src_img_folder, given.recursive)
    names = _names(images)
    end = ".png" if given.save_as_png else ".jpg"
    tidy_folders((given.dst_img_folder / image.parent.relative_to(given.src_img_folder) for image in images), end)
    written, kept, broken = 0, 0, list[str]()
    others = _others(images) if given.copy_associated_files else {}
    for image in images:
        folder = given.dst_img_folder / image.parent.relative_to(given.src_img_folder)
        targets = {each: folder / f"{names[image]}+{each[0]}x{each[1]}{end}" for each in resolutions}
        missing = {each: path for each, path in targets.items() if given.overwrite or not os.path.exists(path)}
        kept += len(targets) - len(missing)
        beside = others.get(image.with_suffix(""), ())
        if any(map(too_long, (*targets.values(), *_copies(beside, targets.values())))):
            broken.append(f"{image}: its name leaves no room for that of its copies; rename it")
            continue
        try:
            _write_copies(image, missing, given)
        except DataError as problem:
            broken.append(str(problem))
            continue
        written += len(missing)
        for copy, other in _copies(beside, targets.values()).items():
            if given.overwrite or not os.path.exists(copy):
                write_whole(copy, partial(_copy, other), "dst_img_folder")
    print(f"{given.dst_img_folder}: {written} copies written, {kept} were there")
    for text in broken:
        print(f"error: {text}", file=sys.stderr)
    return 3 if broken else 0


def _names(images: Sequence[Path]) -> dict[Path, str]:
    """What the copies of each image are called: its stem, or its whole name where others have the same stem."""
    stems = Counter(image.with_suffix("") for image in images)
    return {image: image.stem if stems[image.with_suffix("")] == 1 else image.name for image in images}


def scaled(size: Size, most: Size, multiple: int) -> tuple[Size, Size]:
    """(size to resize an image of `size` to, size to cut that to) for an area of at most `most`'s.

    The second is the first with sides that are multiples of `multiple`, 0 where one is shorter.
    """
    (width, height), area = size, most[0] * most[1]
    resized = size
    if width * height > area:
        # In whole numbers: a fraction less than 512 would be 511, and 448 as a multiple of 64.
        resized = max(1, math.isqrt(area * width // height)), max(1, math.isqrt(area * height // width))
    return resized, (resized[0] - resized[0] % multiple, resized[1] - resized[1] % multiple)


def _write_copies(image: Path, targets: dict[Size, Path], given: argparse.Namespace) -> None:
    pixels = decode(image).pixels if targets else None
    for resolution, path in targets.items():
        assert pixels is not None
        resized, target = scaled((pixels.shape[1], pixels.shape[0]), resolution, given.divisible_by)
        if min(target) == 0:
            raise DataError(
                f"{image}: a side of {min(resized)} pixels is shorter than --divisible_by {given.divisible_by}; remove "
                "it, or give a smaller number"
            )
        crop = (resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2
        copy = Image.fromarray(cut_out(pixels, resized, target, crop, _INTERPOLATIONS[given.interpolation]))

        def write(temporary: Path, copy: Image.Image = copy) -> None:
            with temporary.open("wb") as stream:
                if given.save_as_png:
                    copy.save(stream, "PNG")
                else:
                    copy.save(stream, "JPEG", quality=100, subsampling=0)

        write_whole(path, write, "dst_img_folder")


def _others(images: Sequence[Path]) -> dict[Path, list[Path]]:
    """The files beside images that belong to them, such as captions, by their paths without extension."""
    found: dict[Path, list[Path]] = {}
    for folder in dict.fromkeys(image.parent for image in images):
        for name in list_folder(folder).others:
            if not name.endswith(".npz"):
                found.setdefault(folder / os.path.splitext(name)[0], []).append(folder / name)
    return found


def _copies(others: Sequence[Path], targets: Collection[Path]) -> dict[Path, Path]:
    """Where files that belong to an image are copied to for each of its copies, with what is copied."""
    return {target.with_name(target.stem + other.suffix): other for other in others for target in targets}


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _checked(given: argparse.Namespace) -> list[Size]:
    """The resolutions.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    check_images_folder(given.src_img_folder, problems)
    if given.dst_img_folder.exists() and not given.dst_img_folder.is_dir():
        problems.add("dst_img_folder", str(given.dst_img_folder), "is a file", "give a folder")
    if given.recursive and given.dst_img_folder.resolve().is_relative_to(given.src_img_folder.resolve()):
        problems.add("dst_img_folder", str(given.dst_img_folder), "lies in the folder whose images are copied, and its "
                     "copies would be copied again", "give another one")  # fmt: skip
    elif given.dst_img_folder.resolve() == given.src_img_folder.resolve():
        problems.add("dst_img_folder", str(given.dst_img_folder), "is the folder of the images, whose copies would be "
                     "copied again", "give another one")  # fmt: skip
    found = []
    for text in dict.fromkeys(given.max_resolution.split(",")):
        width, _, height = text.strip().lower().partition("x")
        if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
            problems.add("--max_resolution", text, "is no WIDTHxHEIGHT in pixels", "write e.g. 512x512,384x384")
        else:
            found.append((int(width), int(height)))
    if given.divisible_by < 1:
        problems.add("--divisible_by", given.divisible_by, "must be 1 or more", "leave it out")
    problems.raise_if_any(ConfigError)
    return list(dict.fromkeys(found))


def _parser() -> argparse.ArgumentParser:
    parser = Parser("resize_images_to_resolution", _ABOUT)
    add = parser.add_argument
    add("src_img_folder", type=Path, metavar="SRC", help="folder of the images")
    add("dst_img_folder", type=Path, metavar="DST", help="folder of the copies")
    add("--max_resolution", default="512x512,384x384,256x256,128x128", metavar="WxH,...", help="areas (default "
        "512x512,384x384,256x256,128x128)")  # fmt: skip
    add("--divisible_by", type=int, default=1, metavar="N", help="cut sides to multiples of it, at the centre "
        "(default 1)")  # fmt: skip
    add("--interpolation", choices=tuple(_INTERPOLATIONS), default="area", help="default area")
    add("--save_as_png", action="store_true", help="write PNG in place of JPEG of quality 100")
    add("--copy_associated_files", action="store_true", help="also copy what has an image's name with another "
        "extension, as captions have")  # fmt: skip
    add("--recursive", action="store_true", help="also the images in sub-folders, into such")
    add("--overwrite", action="store_true", help="write copies that are there again")
    return parser
