"""sd-scripts' latents files beside the images: what is in them, which are to be made, and making them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sd_train.data.content import ahead
from sd_train.data.encoding import Encode, Encoder, Shown
from sd_train.data.images import Decoded, Picture, centred_view, decode, unit_range, view_pixels
from sd_train.data.npz import Mismatch, npz_path, read_npz, readable
from sd_train.data.record import ImageRecord
from sd_train.data.resize import cut_mask
from sd_train.diffusion.draws import normal_rows
from sd_train.errors import DataError
from sd_train.files import write_whole
from sd_train.prepare.listing import too_long
from sd_train.randomness import derive

MARK = "sd_train"
"""Entry of a file that was made here: what its latents depend on beside the image. sd-scripts reads past it."""


@dataclass(frozen=True)
class LatentsFile:
    """One file of latents."""

    record: ImageRecord
    path: Path
    stands: Literal["missing", "stale", "fits", "foreign"]
    """Whether it is there; "stale": for another bucket, image or autoencoder; "foreign": it fits as far as it tells,
    and was made by another program."""


@dataclass(frozen=True)
class LatentsOptions:
    """What all files of a folder have in common."""

    suffix: str
    """"_sd" or "_sdxl"."""
    encoder: str
    """Digest of the autoencoder."""
    seed: int
    batch_size: int
    workers: int
    trust: bool = False
    """Whether any file that has the shape is kept, whatever made it."""
    overwrite: bool = False


def look_for(record: ImageRecord, options: LatentsOptions) -> LatentsFile:
    """The file of `record` and whether it can be kept."""
    path = npz_path(record.path, record.size, options.suffix)
    if too_long(path) or not path.is_file():
        return LatentsFile(record, path, "missing")
    # What is made anew keeps the entries that other trainings may want.
    entries, mark = _entries(path)
    again = replace(record, subset=replace(
        record.subset, flip_aug=record.subset.flip_aug or "latents_flipped" in entries,
        alpha_mask=record.subset.alpha_mask or "alpha_mask" in entries,
    ))  # fmt: skip
    older = not options.trust and path.stat().st_mtime_ns < record.path.stat().st_mtime_ns
    if options.overwrite or older:
        return LatentsFile(again, path, "stale")
    try:
        read_npz(path, record)
    except Mismatch:
        return LatentsFile(again, path, "stale")
    if options.trust or mark == _mark(record, options):
        return LatentsFile(record, path, "fits")
    return LatentsFile(again, path, "foreign" if mark is None else "stale")


def _entries(path: Path) -> tuple[Sequence[str], bytes | None]:
    """The names of what is in the file at `path` and our mark; nothing of a damaged file."""
    try:
        with readable(), np.load(path, allow_pickle=False) as file:
            return file.files, file[MARK].tobytes() if MARK in file.files else None
    except Mismatch:
        return (), None


def _mark(record: ImageRecord, options: LatentsOptions) -> bytes:
    told = f"1 {options.encoder} {options.seed} {record.resized} {record.bucket} {record.subset.resize_interpolation}"
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class _Prepared:
    pictures: list[Picture]
    mask: NDArray[np.float32] | None
    """[height, width] of the bucket, with `alpha_mask`."""


def _prepare(record: ImageRecord) -> _Prepared | DataError:
    try:
        decoded = decode(record.path)
        if decoded.size != record.size:
            return DataError(f"{record.path}: the image has changed meanwhile; give the command again")
        pixels = unit_range(view_pixels(decoded.pixels, record, centred_view(record, False)))
    except DataError as problem:
        return problem
    pictures = [Picture(pixels, None)]
    if record.subset.flip_aug:
        pictures.append(Picture(np.ascontiguousarray(pixels[:, :, ::-1]), None))
    return _Prepared(pictures, _alpha(decoded, record) if record.subset.alpha_mask else None)


def _alpha(decoded: Decoded, record: ImageRecord) -> NDArray[np.float32]:
    """[height, width] of the bucket: 1 where the picture is opaque."""
    if decoded.alpha is None:
        return np.ones(record.bucket[::-1], np.float32)
    cut = cut_mask(decoded.alpha, record.resized, record.bucket, centred_view(record, False).crop)
    return cut.astype(np.float32) / np.float32(255)


def make_files(
    files: Sequence[LatentsFile], encode: Encode, options: LatentsOptions, progress: Callable[[], object]
) -> Iterator[tuple[LatentsFile, DataError | None]]:
    """Encode and write each of `files`, those of one bucket together; yields each one that is through.

    The draw from the autoencoder's posterior is a function of the seed and the image's path within the folder.

    Raises:
        DataError: if what the autoencoder gives is not finite.
        DiskError: if the disk refuses.
    """
    masks: dict[int, NDArray[np.float32] | None] = {}
    drawn: dict[int, list[NDArray[np.float32]]] = {}
    done: list[int] = []

    def keep(chosen: list[Shown], rows: dict[str, Tensor]) -> None:
        streams = [derive(options.seed, "latents file", files[one.place].record.key, int(one.flip)) for one in chosen]
        noise = normal_rows(streams, tuple(rows["mean"].shape[1:]))
        latents = (rows["mean"] + (0.5 * rows["logvar"]).exp() * noise).numpy()
        for one, row in zip(chosen, latents, strict=True):
            drawn.setdefault(one.place, []).append(row)
            if len(drawn[one.place]) == 1 + files[one.place].record.subset.flip_aug:
                _write(files[one.place], drawn.pop(one.place), masks.pop(one.place), options)
                done.append(one.place)

    encoder = Encoder(encode, options.batch_size, keep)
    order = sorted(range(len(files)), key=lambda place: (files[place].record.bucket, place))
    prepared = ahead(lambda place: _prepare(files[place].record), order, options.workers, options.batch_size + 8)
    for place, found in zip(order, prepared, strict=True):
        progress()
        if isinstance(found, DataError):
            yield files[place], found
            continue
        masks[place] = found.mask
        for flip, picture in enumerate(found.pictures):
            encoder.add(Shown(files[place].record.path, picture, place, bool(flip)))
        while done:
            yield files[done.pop(0)], None
    encoder.finish()
    while done:
        yield files[done.pop(0)], None


def _write(
    file: LatentsFile, latents: Sequence[NDArray[np.float32]], mask: NDArray[np.float32] | None, options: LatentsOptions
) -> None:
    arrays = _arrays(file.record, latents, mask)
    arrays[MARK] = np.frombuffer(_mark(file.record, options), np.uint8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    write_whole(file.path, write, "train_data_dir")


def _arrays(
    record: ImageRecord, latents: Sequence[NDArray[np.float32]], mask: NDArray[np.float32] | None
) -> dict[str, NDArray[np.generic]]:
    """sd-scripts' entries.

    `crop_ltrb` has its form, margins left and top and the bucket's sides less those right and bottom; they are those
    that are really cut off, where sd-scripts writes those of the picture fitted into the bucket.
    """
    left, top = centred_view(record, False).crop
    right, bottom = (record.resized[side] - record.bucket[side] - cut for side, cut in ((0, left), (1, top)))
    arrays: dict[str, NDArray[np.generic]] = {
        "latents": latents[0],
        "original_size": np.array(record.size, np.int64),
        "crop_ltrb": np.array([left, top, record.bucket[0] - right, record.bucket[1] - bottom], np.float64),
    }
    if record.subset.flip_aug:
        arrays["latents_flipped"] = latents[1]
    if mask is not None:
        arrays["alpha_mask"] = mask
    return arrays


def sharing(records: Sequence[ImageRecord], suffix: str) -> Mapping[Path, Path]:
    """Images whose file would be that of another one of the same name and size, which is the value."""
    first: dict[Path, Path] = {}
    return {
        record.path: owner for record in records
        if (owner := first.setdefault(npz_path(record.path, record.size, suffix), record.path)) != record.path
    }
