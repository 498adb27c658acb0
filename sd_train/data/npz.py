"""sd-scripts' latents beside the images: `<stem>_WWWWxHHHH_sd.npz`, `..._sdxl.npz`, and the old `<stem>.npz`.

Width and height in the name are the original image's. sd-scripts takes a file with the right keys, whatever bucket it
was made for; here it must match in everything that it tells of.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.data.masks import LATENT_CELL
from sd_train.data.record import ImageRecord

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
    stem = image.with_suffix("")
    for name in (f"{stem}_{size[0]:04d}x{size[1]:04d}{suffix}.npz", f"{stem}.npz"):
        if Path(name).is_file():
            return Path(name)
    return None


def has_npz(folder: Path) -> bool:
    """Whether any .npz file is in `folder`: most have none, and need not be searched for each image."""
    return folder.is_dir() and any(name.endswith(".npz") for name in os.listdir(folder))


def read_npz(path: Path, record: ImageRecord) -> NpzRows:
    """The latents in `path` for `record`, with what its subset needs.

    Raises:
        Mismatch: if it is not for this image, size, bucket and options, or cannot be read.
    """
    subset, (width, height) = record.subset, record.bucket
    if subset.conditioning_data_dir is not None:
        raise Mismatch("the masks of conditioning_data_dir are not in it")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {
                name: np.asarray(file[name])
                for name in ("latents", "original_size", "latents_flipped", "alpha_mask")
                if name in file.files
            }
    # What NumPy and zipfile raise on damaged and foreign files.
    except (OSError, ValueError, KeyError, EOFError, AttributeError, NotImplementedError, zipfile.BadZipFile):
        raise Mismatch("damaged, or no .npz file") from None
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
