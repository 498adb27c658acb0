"""The index of a dataset: every image with its size, bucket, caption, repeats and weight, in columns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sd_train.config.textfile import printable
from sd_train.data.assignment import assign_columns, much_enlarged
from sd_train.data.buckets import Size, too_small
from sd_train.data.columns import TextColumn
from sd_train.data.content import ContentHashes
from sd_train.data.npz import SUFFIX, misfit
from sd_train.data.record import ImageRecord
from sd_train.data.settings import DatasetConfig
from sd_train.data.split import choose_validation, unchanged, verify, verify_masks
from sd_train.data.subset import IndexOptions, SubsetFiles, SubsetReader, first_names
from sd_train.errors import DataError, Problem, Problems

__all__ = ["ImageIndex", "ImageRecord", "IndexOptions", "Indexes", "balance", "build_indexes"]

MOST_SAMPLES = 100_000_000
"""Samples of an epoch; their order is kept in memory."""

_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class ImageIndex:
    """N images in columns, in the order of subsets and file names. Images that are never used are not in it."""

    dataset: DatasetConfig
    keys: TextColumn
    """Path of each image within its subset."""
    captions: TextColumn
    masks: TextColumn | None
    """Name of each image's mask in its subset's `conditioning_data_dir`, "" without; None: no subset has any."""
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
    repeats: NDArray[np.float64]
    """[N]: how many times each image is seen in an epoch, above zero; the mean over epochs where not whole."""
    weights: NDArray[np.float32]
    """[N]: of the loss."""
    stats: NDArray[np.int64]
    """[N, 2]: file size in bytes and time of the last change in nanoseconds."""
    buckets: list[Size]
    """The sizes that occur, sorted."""
    num_train_images: int
    """Images times repeats of the subsets that are learned, to the nearest whole number."""
    num_reg_images: int
    """Images times `num_repeats` of the regularisation subsets, before they are balanced (as sd-scripts counts)."""
    captions_of_folders: tuple[tuple[str, Sequence[str]], ...]
    """(folder or metadata file, captions) of each subset, with those of regularisation images that are not used."""
    warnings: tuple[str, ...] = ()
    """What is unusual but allowed."""
    left_out: tuple[str, ...] = ()
    """What is wrong with each image that `skip_broken_images` left out, its path first."""
    roots: tuple[Path, ...] = ()
    """Where the keys of each subset start; empty: `image_dir`."""

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, number: int) -> Path:
        """The file of the image at `number`; an image inside a parquet file is FILE.parquet/ROW."""
        subset = int(self.subset_of[number])
        root = self.roots[subset] if self.roots else self.dataset.subsets[subset].image_dir
        return root / self.keys[number]

    def record(self, number: int) -> ImageRecord:
        """The image at `number`."""
        subset = self.dataset.subsets[int(self.subset_of[number])]
        mask = self.masks[number] if self.masks is not None else ""
        return ImageRecord(
            path=self.path(number),
            key=self.keys[number],
            subset=subset,
            size=(int(self.sizes[number, 0]), int(self.sizes[number, 1])),
            bucket=self.buckets[int(self.bucket_of[number])],
            resized=(int(self.resized[number, 0]), int(self.resized[number, 1])),
            caption=self.captions[number],
            weight=float(self.weights[number]),
            is_reg=subset.is_reg,
            mask=subset.conditioning_data_dir / mask if mask and subset.conditioning_data_dir else None,
            bucketed=self.dataset.enable_bucket,
        )

    @property
    def is_reg(self) -> NDArray[np.bool_]:
        """[N]: whether each image is there for regularisation."""
        kinds: NDArray[np.bool_] = np.array([subset.is_reg for subset in self.dataset.subsets], bool)[self.subset_of]
        return kinds

    def image_count(self, subset: int) -> int:
        """Images in the folder of subset number `subset`, used or not."""
        return len(self.captions_of_folders[subset][1])

    def bucket_counts(self) -> list[int]:
        """Samples of an epoch in each of `buckets`, repeats counted (to the nearest whole number)."""
        counts = np.bincount(self.bucket_of, weights=self.repeats, minlength=len(self.buckets))
        return [int(count) for count in np.rint(counts)]

    @property
    def mean_aspect_error(self) -> float:
        """Mean distance of the images' width/height from their buckets', repeats not counted."""
        return float(np.abs(self.aspect_error).mean())

    def tag_frequency(self) -> dict[str, dict[str, int]]:
        """For each folder, how many captions hold each tag (split at ",", stripped, lower case; no repeats).

        sd-scripts' `BaseDataset.set_tag_frequency`; folders of the same name are counted together, metadata files
        stand for their folder.
        """
        frequency: dict[str, Counter[str]] = {}
        for folder, captions in self.captions_of_folders:
            counter = frequency.setdefault(folder, Counter())
            for caption in captions:
                counter.update(tag.lower() for tag in map(str.strip, caption.split(",")) if tag)
        return {folder: dict(counter) for folder, counter in frequency.items()}


@dataclass(frozen=True)
class Indexes:
    """What is learned and what is kept for validation."""

    training: tuple[ImageIndex, ...]
    """One for each dataset, in their order."""
    validation: tuple[ImageIndex, ...]
    """One for each dataset with a `validation_split` that keeps an image: each image once and never changed."""


@dataclass(frozen=True)
class _Listing:
    """The files of one dataset, a group for each subset, and what to say of them."""

    dataset: DatasetConfig
    files: list[SubsetFiles]
    warnings: list[str]
    left_out: tuple[str, ...] = ()


def build_indexes(datasets: Sequence[DatasetConfig], options: IndexOptions) -> Indexes:
    """List the images of `datasets`, read their captions and headers, choose the images that are kept for
    validation, balance regularisation images, assign buckets.

    Raises:
        DataError: with every problem of all datasets: no image, captions missing or unreadable, images unreadable,
            metadata that is wrong, masks missing, images that no bucket can take.
    """
    problems, verifies = Problems(), options.verify_images or options.skip_broken_images
    decodes = verifies or any(item.validation_split for item in datasets)
    with closing(ContentHashes(options.cache_dir if decodes else None)) as hashes:
        reader = SubsetReader(datasets, options, partial(verify, hashes=hashes) if verifies else None)
        listings = [_list(dataset, reader, hashes, problems) for dataset in datasets]
        listed = [(listing.dataset, listing.files) for listing in listings]
        chosen = choose_validation(listed, hashes, options.seed, problems, [listing.warnings for listing in listings])
    training, validation = list[ImageIndex](), list[ImageIndex]()
    for listing, rows in zip(listings, chosen, strict=True):
        kept = [files.where(~own) for files, own in zip(listing.files, rows, strict=True)]
        index = _training_index(_Listing(listing.dataset, kept, listing.warnings, listing.left_out), options, problems)
        if index is not None:
            training.append(index)
        if any(own.any() for own in rows) and (index := _validation_index(listing, rows, problems)) is not None:
            validation.append(index)
    problems.raise_if_any(DataError)
    return Indexes(tuple(training), tuple(validation))


def _list(dataset: DatasetConfig, reader: SubsetReader, hashes: ContentHashes, problems: Problems) -> _Listing:
    """Read every subset of `dataset`; images that are broken or too small for it are taken out."""
    warnings, left_out, listed = list[str](), list[str](), list[SubsetFiles]()
    options = reader.options
    for subset in dataset.subsets:
        files = reader.read(subset, problems, warnings)
        broken = dict(files.broken)
        if options.verify_images or options.skip_broken_images:
            broken |= verify_masks(files, hashes)
        messages = [broken[row] for row in sorted(broken)]
        if messages and options.skip_broken_images:
            left_out += messages
            warnings.append(f"{subset.origin}: {len(messages)} of {len(files)} images cannot be read and are left "
                            "out: " + first_names(messages, "\n      "))
        elif messages:
            problems.add(subset.origin, None, f"{len(messages)} images cannot be read: "
                         + first_names(messages, "\n      "),
                         "mend or remove them, or give --skip_broken_images to train without them")
        usable = np.ones(len(files), bool)
        usable[list(broken)] = False
        listed.append(_large_enough(files.where(usable), dataset, warnings))
        if len(files) and not len(listed[-1]) and (not messages or options.skip_broken_images):
            problems.add(subset.origin, None, f"none of its {len(files)} images is left: each is broken or not above "
                         "skip_image_resolution", "give other images or leave the subset out")
    return _Listing(dataset, listed, warnings, tuple(map(printable, left_out)))


def _large_enough(files: SubsetFiles, dataset: DatasetConfig, warnings: list[str]) -> SubsetFiles:
    """`files` without those whose sqrt(width x height) is not above `skip_image_resolution`."""
    limit = dataset.skip_image_resolution
    if limit <= 0:
        return files
    large = np.sqrt(files.sizes.astype(np.float64).prod(axis=1)) > limit
    if not large.all():
        names = [files.keys[row] for row in np.flatnonzero(~large)[:6].tolist()]
        count = int((~large).sum())
        warnings.append(f"{files.subset.origin}: {count} of {len(files)} images are left out because "
                        f"sqrt(width x height) is not above skip_image_resolution ({limit:g}): "
                        + first_names(names, count=count))
    return files.where(large)


def _training_index(listing: _Listing, options: IndexOptions, problems: Problems) -> ImageIndex | None:
    """The index of what is learned; None if there is nothing, or something is wrong, which is then noted."""
    dataset, warnings = listing.dataset, list(listing.warnings)
    known = len(problems.found)
    repeats = _repeats(listing.files, warnings)
    total = sum(float(counts.sum()) for counts in repeats)
    if total > MOST_SAMPLES:
        problems.add(dataset.origin, None, f"an epoch would have {total:,.0f} samples (images x num_repeats), more "
                     f"than {MOST_SAMPLES:,}", "lower num_repeats and train more epochs instead")
    elif total == 0 and not known:
        problems.extend([Problem(dataset.origin, None, "no image to learn",
                                 "add a subset with images and is_reg = false")])
    if not total or total > MOST_SAMPLES:
        return None
    weights = [
        subset.loss_weight * (options.prior_loss_weight if subset.is_reg else 1.0) for subset in dataset.subsets
    ]
    return _index(_Listing(dataset, listing.files, warnings, listing.left_out), repeats, weights, problems)


def _validation_index(
    listing: _Listing, chosen: Sequence[NDArray[np.bool_]], problems: Problems
) -> ImageIndex | None:
    """The index of the images that are kept: each once, as it is."""
    files = [unchanged(files.where(own)) for files, own in zip(listing.files, chosen, strict=True)]
    dataset = replace(listing.dataset, subsets=tuple(part.subset for part in files), bucket_policy="keep", warnings=())
    weights = [subset.loss_weight for subset in dataset.subsets]
    return _index(_Listing(dataset, files, []), [np.ones(len(part)) for part in files], weights, problems)


def _index(
    listing: _Listing, repeats: Sequence[NDArray[np.float64]], weights: Sequence[float], problems: Problems
) -> ImageIndex | None:
    """The columns of the images with `repeats`; None if no bucket can take some of them, which is noted."""
    dataset = listing.dataset
    used = [files.where(counts > 0) for files, counts in zip(listing.files, repeats, strict=True)]
    subset_of = np.repeat(np.arange(len(used), dtype=np.int32), [len(files) for files in used])
    sizes = _joined([files.sizes for files in used])
    counts = _joined([own[own > 0] for own in repeats])
    columns = assign_columns(sizes, counts, dataset)
    if len(columns.unusable):
        _note_small(used, columns.unusable, dataset, problems)
        return None
    keys = TextColumn.join([files.keys for files in used])
    captions = TextColumn.join([files.captions for files in used])
    index = ImageIndex(
        dataset=dataset,
        keys=keys,
        captions=captions,
        masks=_masks(used),
        subset_of=subset_of,
        sizes=sizes,
        resized=columns.resized,
        aspect_error=columns.aspect_error,
        bucket_of=columns.bucket_of,
        repeats=counts,
        weights=np.array(weights, np.float32)[subset_of],
        stats=_joined([files.stats for files in used]),
        buckets=columns.buckets,
        num_train_images=_nominal(listing.files, is_reg=False),
        num_reg_images=_nominal(listing.files, is_reg=True),
        captions_of_folders=_captions_of_folders(listing.files, used, captions),
        warnings=tuple(map(printable, [*listing.warnings, *much_enlarged(keys, sizes, columns.resized)])),
        left_out=listing.left_out,
        roots=tuple(files.root for files in used),
    )
    if any(files.latents_only for files in used):
        _note_misfits(index, problems)
    return index


def _note_misfits(index: ImageIndex, problems: Problems) -> None:
    """Name the first five files of latents without image that cannot be trained as their subsets ask for."""
    paths = [row for row, key in enumerate(index.keys) if key.endswith(SUFFIX)]
    found = [text for row in paths if (text := misfit(index.record(row))) is not None]
    if found:
        problems.add(index.dataset.origin, None, f"{len(found)} of {len(paths)} latents without image do not fit: "
                     + first_names(found, "\n      "), "mend them all")


def _joined(parts: Sequence[NDArray[_Number]]) -> NDArray[_Number]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _masks(used: Sequence[SubsetFiles]) -> TextColumn | None:
    if all(files.masks is None for files in used):
        return None
    return TextColumn.join([
        TextColumn(np.zeros(0, np.uint8), np.zeros(len(files), np.int64)) if files.masks is None else files.masks
        for files in used
    ])


def _captions_of_folders(
    files: Sequence[SubsetFiles], used: Sequence[SubsetFiles], captions: TextColumn
) -> tuple[tuple[str, Sequence[str]], ...]:
    """The captions of each subset; where all of its images are used they share the memory of `captions`."""
    result, row = list[tuple[str, Sequence[str]]](), 0
    for whole, part in zip(files, used, strict=True):
        texts = whole.captions
        if len(part) == len(captions):
            texts = captions
        elif len(part) == len(whole):
            ends, starts = captions.ends, captions.starts
            starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if starts is None else starts
            texts = TextColumn(captions.data, ends[row : row + len(part)], starts[row : row + len(part)])
        result.append((whole.name, texts))
        row += len(part)
    return tuple(result)


def balance(repeats: Sequence[float] | NDArray[np.float64], total: int) -> NDArray[np.float64]:
    """How many times each regularisation image is used, against `total` samples that are learned.

    sd-scripts' rule (`DreamBoothDataset`): images are taken in order with their own `repeats` until the sum reaches
    `total` (the last one counts whole, so it may overshoot); if they do not suffice, each further pass adds one to
    each image in order until it does. Images that are not reached get 0.
    """
    own = np.asarray(repeats, dtype=np.float64)
    before = np.cumsum(own) - own
    result = np.where(before < total, own, 0)
    missing = math.ceil(total - float(result.sum()))
    if missing > 0 and len(own):
        passes, rest = divmod(missing, len(own))
        result = result + passes
        result[:rest] += 1
    return result


def _nominal(listed: Sequence[SubsetFiles], is_reg: bool) -> int:
    return round(sum(len(files) * files.subset.num_repeats for files in listed if files.subset.is_reg == is_reg))


def _repeats(listed: Sequence[SubsetFiles], warnings: list[str]) -> list[NDArray[np.float64]]:
    """For each subset, how many times each of its images is seen in an epoch."""
    own = [np.full(len(files), files.subset.num_repeats, dtype=np.float64) for files in listed]
    reg = [number for number, files in enumerate(listed) if files.subset.is_reg]
    if reg:
        balanced = balance(np.concatenate([own[number] for number in reg]), _nominal(listed, is_reg=False))
        if unused := int((balanced == 0).sum()):
            warnings.append(f"{unused} of {len(balanced)} regularisation images are not used: there are as many as "
                            "images to learn, repeats counted, without them")
        ends = np.cumsum([len(own[number]) for number in reg])[:-1]
        for number, counts in zip(reg, np.split(balanced, ends), strict=True):
            own[number] = counts
    return own


def _note_small(
    used: Sequence[SubsetFiles], small: NDArray[np.int64], dataset: DatasetConfig, problems: Problems
) -> None:
    """Name the first 20 images that no bucket can take."""
    shown, first = small[:20], 0
    for files in used:
        for row in shown[(shown >= first) & (shown < first + len(files))] - first:
            size = int(files.sizes[row, 0]), int(files.sizes[row, 1])
            problems.extend([too_small(str(files.path(int(row))), size, dataset)])
        first += len(files)
    if len(small) > 20:
        problems.extend([Problem(dataset.origin, None, f"{len(small) - 20} more images are too small", "as above")])
