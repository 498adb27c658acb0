"""The index of a dataset: every image with its size, bucket, caption, repeats and weight, in columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_train.config.textfile import printable
from sd_train.data.buckets import Assignments, Size, assign_many, too_small
from sd_train.data.config import DatasetConfig
from sd_train.data.headers import read_size
from sd_train.data.record import ImageRecord
from sd_train.data.subset import SubsetFiles, first_names, read_subset
from sd_train.errors import DataError, Problem, Problems

__all__ = ["ImageIndex", "ImageRecord", "balance", "build_index"]

MOST_SAMPLES = 100_000_000
"""Samples of an epoch; their order is kept in memory."""

MUCH_ENLARGED = 4


@dataclass(frozen=True)
class ImageIndex:
    """N images in columns, in the order of subsets and file names. Images that are never used are not in it."""

    dataset: DatasetConfig
    paths: list[str]
    """Path of each image within its subset."""
    captions: list[str]
    subset_of: NDArray[np.int32]
    """[N]: number of the subset."""
    sizes: NDArray[np.int32]
    """[N, 2]"""
    resized: NDArray[np.int32]
    """[N, 2]"""
    aspect_error: NDArray[np.float64]
    """[N]"""
    bucket_of: NDArray[np.int32]
    """[N]: number in `buckets`."""
    repeats: NDArray[np.int64]
    """[N]: how many times each image is seen in an epoch, at least once."""
    weights: NDArray[np.float32]
    """[N]"""
    buckets: list[Size]
    """The sizes that occur, sorted."""
    num_train_images: int
    """Images times repeats of the subsets that are learned."""
    num_reg_images: int
    """Images times `num_repeats` of the regularisation subsets, before they are balanced (as sd-scripts counts)."""
    captions_of_folders: tuple[tuple[str, list[str]], ...]
    """(folder name, captions) of each subset, with those of regularisation images that are not used."""
    warnings: tuple[str, ...]
    """What is unusual but allowed."""

    def __len__(self) -> int:
        return len(self.paths)

    def record(self, number: int) -> ImageRecord:
        """The image at `number`."""
        subset = self.dataset.subsets[int(self.subset_of[number])]
        return ImageRecord(
            path=subset.image_dir / self.paths[number],
            key=self.paths[number],
            subset=subset,
            size=(int(self.sizes[number, 0]), int(self.sizes[number, 1])),
            bucket=self.buckets[int(self.bucket_of[number])],
            resized=(int(self.resized[number, 0]), int(self.resized[number, 1])),
            caption=self.captions[number],
            weight=float(self.weights[number]),
            is_reg=subset.is_reg,
        )

    @property
    def is_reg(self) -> NDArray[np.bool_]:
        """[N]: whether each image is there for regularisation."""
        kinds: NDArray[np.bool_] = np.array([subset.is_reg for subset in self.dataset.subsets])[self.subset_of]
        return kinds

    def image_count(self, subset: int) -> int:
        """Images in the folder of subset number `subset`, used or not."""
        return len(self.captions_of_folders[subset][1])

    def bucket_counts(self) -> list[int]:
        """Samples of an epoch in each of `buckets`, repeats counted."""
        counts = np.zeros(len(self.buckets), dtype=np.int64)
        np.add.at(counts, self.bucket_of, self.repeats)
        return [int(count) for count in counts]

    @property
    def mean_aspect_error(self) -> float:
        """Mean distance of the images' width/height from their buckets', repeats not counted."""
        return float(np.abs(self.aspect_error).mean())

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """For each folder, how many captions hold each tag (split at ",", stripped, lower case; no repeats).

        sd-scripts' `BaseDataset.set_tag_frequency`; folders of the same name are counted together.
        """
        frequency: dict[str, Counter[str]] = {}
        for folder, captions in self.captions_of_folders:
            counter = frequency.setdefault(folder, Counter())
            for caption in captions:
                counter.update(tag.lower() for tag in map(str.strip, caption.split(",")) if tag)
        return {folder: dict(counter) for folder, counter in frequency.items()}


def build_index(dataset: DatasetConfig, *, allow_missing_captions: bool, prior_loss_weight: float) -> ImageIndex:
    """List the images of `dataset`, read their captions and headers, assign buckets, balance regularisation images.

    Raises:
        DataError: with every problem of all subsets: no image, captions missing or unreadable, headers unreadable,
            images that no bucket can take.
    """
    problems, warnings = Problems(), list[str]()
    listed = [read_subset(subset, allow_missing_captions, problems, warnings) for subset in dataset.subsets]
    repeats = _repeats(listed, warnings)
    _check_total(dataset, repeats, problems)
    used = [np.flatnonzero(counts) for counts in repeats]
    paths = [files.images[row] for files, rows in zip(listed, used, strict=True) for row in rows]
    captions = [files.captions[row] for files, rows in zip(listed, used, strict=True) for row in rows]
    subset_of = np.repeat(np.arange(len(listed), dtype=np.int32), [len(rows) for rows in used])
    sizes = _sizes(dataset, paths, subset_of, problems)
    problems.raise_if_any(DataError)
    if not paths:
        raise DataError(f"{dataset.origin}: no image to learn; add a subset with images and is_reg = false")
    rows = assign_many(sizes, dataset)
    _check_usable(dataset, paths, subset_of, sizes, rows)
    warnings += _much_enlarged(paths, sizes, rows.resized)
    codes, bucket_of = np.unique(rows.bucket[:, 0] << 32 | rows.bucket[:, 1], return_inverse=True)
    is_reg = np.array([subset.is_reg for subset in dataset.subsets])[subset_of]
    return ImageIndex(
        dataset=dataset,
        paths=paths,
        captions=captions,
        subset_of=subset_of,
        sizes=sizes.astype(np.int32),
        resized=rows.resized.astype(np.int32),
        aspect_error=rows.aspect_error,
        bucket_of=bucket_of.astype(np.int32),
        repeats=np.concatenate(repeats)[np.concatenate(repeats) > 0],
        weights=np.where(is_reg, prior_loss_weight, 1.0).astype(np.float32),
        buckets=[(int(code >> 32), int(code & 0xFFFFFFFF)) for code in codes],
        num_train_images=_nominal(listed, is_reg=False),
        num_reg_images=_nominal(listed, is_reg=True),
        captions_of_folders=tuple((files.subset.image_dir.resolve().name, files.captions) for files in listed),
        warnings=tuple(map(printable, warnings)),
    )


def _much_enlarged(paths: Sequence[str], sizes: NDArray[np.int64], resized: NDArray[np.int64]) -> list[str]:
    growth = (resized / sizes).max(axis=1)
    found = np.flatnonzero(growth > MUCH_ENLARGED)
    if not len(found):
        return []
    (width, height), (new_width, new_height) = sizes[found[0]], resized[found[0]]
    return [
        f"{len(found)} of {len(paths)} images are enlarged more than {MUCH_ENLARGED} times, the first is "
        f"{paths[found[0]]} ({width}x{height} to {new_width}x{new_height}); give larger ones or none"
    ]


def balance(repeats: Sequence[int], total: int) -> NDArray[np.int64]:
    """How many times each regularisation image is used, against `total` samples that are learned.

    sd-scripts' rule (`DreamBoothDataset`): images are taken in order with their own `repeats` until the sum reaches
    `total` (the last one counts whole, so it may overshoot); if they do not suffice, each further pass adds one to
    each image in order until it does. Images that are not reached get 0.
    """
    own = np.asarray(repeats, dtype=np.int64)
    before = np.cumsum(own) - own
    result = np.where(before < total, own, 0)
    missing = total - int(result.sum())
    if missing > 0 and len(own):
        passes, rest = divmod(missing, len(own))
        result = result + passes
        result[:rest] += 1
    return result


def _nominal(listed: Sequence[SubsetFiles], is_reg: bool) -> int:
    return sum(len(files.images) * files.subset.num_repeats for files in listed if files.subset.is_reg == is_reg)


def _repeats(listed: Sequence[SubsetFiles], warnings: list[str]) -> list[NDArray[np.int64]]:
    """For each subset, how many times each of its images is seen in an epoch."""
    own = [np.full(len(files.images), files.subset.num_repeats, dtype=np.int64) for files in listed]
    reg = [number for number, files in enumerate(listed) if files.subset.is_reg]
    if reg:
        balanced = balance(np.concatenate([own[number] for number in reg]).tolist(), _nominal(listed, is_reg=False))
        if unused := int((balanced == 0).sum()):
            warnings.append(f"{unused} of {len(balanced)} regularisation images are not used: there are as many as "
                            "images to learn, repeats counted, without them")
        ends = np.cumsum([len(own[number]) for number in reg])[:-1]
        for number, counts in zip(reg, np.split(balanced, ends), strict=True):
            own[number] = counts
    return own


def _check_total(dataset: DatasetConfig, repeats: Sequence[NDArray[np.int64]], problems: Problems) -> None:
    total = sum(int(counts.sum()) for counts in repeats)
    if total > MOST_SAMPLES:
        problems.add(dataset.origin, None, f"an epoch would have {total:,} samples (images x num_repeats), more than "
                     f"{MOST_SAMPLES:,}", "lower num_repeats and train more epochs instead")


def _sizes(
    dataset: DatasetConfig, paths: Sequence[str], subset_of: NDArray[np.int32], problems: Problems
) -> NDArray[np.int64]:
    """[N, 2]: size of each image; unreadable headers are noted, subset by subset."""
    sizes = np.ones((len(paths), 2), dtype=np.int64)
    failed: dict[int, list[str]] = {}
    for row, (path, subset) in enumerate(zip(paths, subset_of.tolist(), strict=True)):
        try:
            sizes[row] = read_size(dataset.subsets[subset].image_dir / path)
        except DataError as problem:
            failed.setdefault(subset, []).append(str(problem))
    for subset, messages in failed.items():
        problems.add(dataset.subsets[subset].origin, None, f"{len(messages)} images cannot be read: "
                     + first_names(messages, "\n      "), "mend or remove them")
    return sizes


def _check_usable(
    dataset: DatasetConfig, paths: Sequence[str], subset_of: NDArray[np.int32], sizes: NDArray[np.int64],
    rows: Assignments,
) -> None:
    problems = Problems()
    small = np.flatnonzero(~rows.usable)
    for row in small[:20].tolist():
        path = dataset.subsets[int(subset_of[row])].image_dir / paths[row]
        problems.extend([too_small(str(path), (int(sizes[row, 0]), int(sizes[row, 1])), dataset)])
    if len(small) > 20:
        problems.extend([Problem(dataset.origin, None, f"{len(small) - 20} more images are too small", "as above")])
    problems.raise_if_any(DataError)
