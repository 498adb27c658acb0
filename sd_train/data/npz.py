"""sd-scripts' latents beside the images: `<stem>_WWWWxHHHH_sd.npz`, `..._sdxl.npz`, and the old `<stem>.npz`.

Width and height in the name are the original image's. sd-scripts takes a file with the right keys, whatever bucket it
was made for; here it must match in everything that it tells of.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.data.folders import IMAGE_EXTENSIONS
from sd_train.data.masks import LATENT_CELL
from sd_train.data.record import ImageRecord
from sd_train.errors import DataError

SUFFIX = ".npz"

LOGVAR = -30.0
"""Log-variance of a row that is a sample itself: drawing from it gives it back to 3e-7."""


@dataclass(frozen=True, eq=False)
class NpzRows:
    """What one file gives for its image. h and w are an eighth of the bucket's sides."""

    latents: NDArray[np.float32]
    """[4, h, w], a sample of the autoencoder's posterior, unscaled."""
    flipped: NDArray[np.float32] | None
    """The same of the mirrored image, with `flip_aug`."""
    mask: NDArray[np.float32] | None
    """[h, w], the weight of each place's loss, with `alpha_mask`."""

    def rows(self) -> list[dict[str, NDArray[np.float32]]]:
        """As the autoencoder would give them, of the image and, with `flip_aug`, of the mirrored image."""
        rows = []
        for latents, step in ((self.latents, 1), (self.flipped, -1)):
            if latents is not None:
                rows.append({"mean": latents, "logvar": np.full_like(latents, LOGVAR)})
                if self.mask is not None:
                    rows[-1]["mask"] = np.ascontiguousarray(self.mask[:, ::step])
        return rows


class Mismatch(Exception):
    """A file does not fit its image; the message is the reason, short and the same for all files of its kind."""


def find_npz(image: Path, size: tuple[int, int], suffix: str) -> Path | None:
    """The file that sd-scripts would have written for `image` of `size` (width, height), if there is one.

    `suffix`: "_sd" or "_sdxl". Files of the old name do not tell which of the two they are for.
    """
    for path in (npz_path(image, size, suffix), image.with_suffix(SUFFIX)):
        # pathlib's own question fails where a name is longer than the file system takes.
        if os.path.isfile(path):
            return path
    return None


def npz_path(image: Path, size: tuple[int, int], suffix: str) -> Path:
    """Where sd-scripts keeps the latents of `image` of `size` (width, height)."""
    return image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}{suffix}{SUFFIX}")


def has_npz(folder: Path) -> bool:
    """Whether any .npz file is in `folder`: most have none, and need not be searched for each image."""
    return folder.is_dir() and any(name.endswith(".npz") for name in os.listdir(folder))


class LatentsFolders:
    """Which .npz files of latents lie where images are missing. sd-scripts trains such entries of metadata files."""

    def __init__(self, suffix: str) -> None:
        self._sized = re.compile(rf"(.+)_\d{{4,}}x\d{{4,}}{re.escape(suffix)}")
        self._folders: dict[str, dict[str, list[str]]] = {}
        """For each folder the files of each image, by its name without extension."""

    def find(self, image: str) -> list[str]:
        """The names of the files that stand for `image`, with or without extension, in its folder."""
        folder, name = os.path.split(image)
        if folder not in self._folders:
            self._folders[folder] = self._listed(folder)
        stem, extension = os.path.splitext(name)
        # Without extension a name may still hold a dot.
        return self._folders[folder].get(stem if extension.lower() in IMAGE_EXTENSIONS else name, [])

    def _listed(self, folder: str) -> dict[str, list[str]]:
        try:
            stems = sorted(name.removesuffix(SUFFIX) for name in os.listdir(folder) if name.endswith(SUFFIX))
        except OSError:
            return {}
        found: dict[str, list[str]] = {}
        for stem in stems:
            if sized := self._sized.fullmatch(stem):
                found.setdefault(sized[1], []).append(stem + SUFFIX)
        for stem in stems:
            # The old name; where both are there, the new one, which tells more.
            found.setdefault(stem, [stem + SUFFIX])
        return found


def stands_alone(path: Path) -> bool:
    """Whether an index's `path` is a file of latents, in place of an image that is not there."""
    return path.suffix == SUFFIX


@contextmanager
def readable() -> Iterator[None]:
    """Damage to an .npz file as a `Mismatch`."""
    try:
        yield
    # What NumPy and zipfile raise on damaged and foreign files.
    except (OSError, ValueError, KeyError, EOFError, AttributeError, NotImplementedError, zipfile.BadZipFile):
        raise Mismatch("damaged, or no .npz file") from None


def original_size(path: Path) -> tuple[int, int]:
    """(width, height) of the image that the latents in `path` were made of.

    Raises:
        DataError: if the file cannot be read or does not tell.
    """
    try:
        with readable(), np.load(path, allow_pickle=False) as file:
            numbers = np.ravel(file["original_size"]).tolist() if "original_size" in file.files else []
    except Mismatch as reason:
        raise DataError(f"{path}: {reason}; bring the image back, or remove the file") from None
    if len(numbers) != 2 or not all(isinstance(number, int) and 0 < number < 2**31 for number in numbers):
        raise DataError(f"{path}: does not tell the size of its image (original_size); bring the image back")
    return numbers[0], numbers[1]


def misfit(record: ImageRecord) -> str | None:
    """Why the file of latents that `record` stands for cannot be trained as it is asked for; looks at shapes alone."""
    path, subset, (width, height) = record.path, record.subset, record.bucket
    shape = (4, height // LATENT_CELL, width // LATENT_CELL)
    wanted: dict[str, tuple[int, ...]] = {"latents": shape}
    if subset.flip_aug:
        wanted["latents_flipped"] = shape
    if subset.alpha_mask:
        wanted["alpha_mask"] = (height, width)
    try:
        with readable(), zipfile.ZipFile(path) as file:
            found = {name: _shape(file, name) for name in wanted if f"{name}.npy" in file.namelist()}
    except Mismatch as reason:
        return f"{path}: {reason}; bring the image back, or remove the file"
    for name, expected in wanted.items():
        if name not in found:
            option = "flip_aug" if name == "latents_flipped" else "alpha_mask"
            return f"{path}: {name} is not in it; " + (
                "bring the image back" if name == "latents" else f"switch {option} off, or bring the image back")
        if found[name] != expected:
            return (f"{path}: its {name} have the shape {found[name]}, but with this resolution and these bucket "
                    f"options its image ({record.size[0]}x{record.size[1]}) goes to the bucket {width}x{height}, which "
                    f"needs {expected}; train with the options that they were made with, or bring the image back")
    return None


def _shape(file: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with file.open(f"{name}.npy") as member:
        read = np.lib.format.read_array_header_1_0
        if np.lib.format.read_magic(member) != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape: tuple[int, ...] = read(member)[0]
        return shape


def read_npz(path: Path, record: ImageRecord) -> NpzRows:
    """The latents in `path` for `record`, with what its subset needs.

    Raises:
        Mismatch: if it is not for this image, size, bucket and options, or cannot be read.
    """
    subset, (width, height) = record.subset, record.bucket
    if subset.conditioning_data_dir is not None:
        raise Mismatch("the masks of conditioning_data_dir are not in it")
    with readable(), np.load(path, allow_pickle=False) as file:
        found = {
            name: np.asarray(file[name])
            for name in ("latents", "original_size", "latents_flipped", "alpha_mask")
            if name in file.files
        }
    shape = (4, height // LATENT_CELL, width // LATENT_CELL)
    latents = _array(found, "latents", shape)
    if tuple(np.ravel(found.get("original_size", ())).tolist()) != record.size:
        raise Mismatch("another original size")
    flipped = _array(found, "latents_flipped", shape) if subset.flip_aug else None
    mask = None
    if subset.alpha_mask:
        alpha = _array(found, "alpha_mask", (height, width))
        cells = alpha[: shape[1] * LATENT_CELL, : shape[2] * LATENT_CELL]
        share = cells.reshape(shape[1], LATENT_CELL, shape[2], LATENT_CELL).mean(axis=(1, 3), dtype=np.float64)
        mask = (subset.unmasked_weight + (1 - subset.unmasked_weight) * share).astype(np.float32)
    return NpzRows(latents, flipped, mask)


def read_alone(record: ImageRecord) -> NpzRows:
    """The latents that `record` stands for, whose image is not there.

    Raises:
        DataError: if they do not fit any more or are damaged.
    """
    try:
        return read_npz(record.path, record)
    except Mismatch as reason:
        raise DataError(f"{record.path}: {reason}; there is no image to encode in its place, bring it back") from None


def summary(taken: Sequence[Path], unfit: Iterable[tuple[Path, str]]) -> list[str]:
    """What to tell about the files that are used in place of their images, and about each kind of mismatch."""
    notes = []
    if taken:
        old = sum(1 for path in taken if not path.stem.endswith(("_sd", "_sdxl")))
        doubt = f" ({old} of them have old names, which do not tell for which kind of model they are)" if old else ""
        notes.append(f"latents of {len(taken)} images are taken from .npz files{doubt}, the first is {taken[0]}")
    by_reason: dict[str, list[Path]] = {}
    for path, reason in unfit:
        by_reason.setdefault(reason, []).append(path)
    count = len(taken) + sum(map(len, by_reason.values()))
    for reason, paths in sorted(by_reason.items()):
        notes.append(
            f"{len(paths)} of {count} .npz files of latents do not match and are not used: {reason}, the first is "
            f"{paths[0]}"
        )
    return notes


def _array(found: dict[str, NDArray[np.generic]], name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    array = found.get(name)
    if array is None:
        raise Mismatch(f"{name} is not in it")
    if array.shape != shape or array.dtype.kind != "f":
        raise Mismatch(f"{name} is for another bucket" if array.ndim == len(shape) else f"{name} has no such shape")
    numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise Mismatch(f"{name} holds numbers that are not finite")
    return numbers
