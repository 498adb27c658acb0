"""Files that nothing reads, masks, and images that are never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from sd_train.data.folders import holds_image
from sd_train.data.images import load_mask
from sd_train.data.index import ImageIndex, Indexes
from sd_train.data.masks import check_aspect
from sd_train.data.settings import DatasetConfig
from sd_train.doctor import kinds
from sd_train.doctor.finding import Finding, Place, Sight, found
from sd_train.doctor.looks import Look
from sd_train.doctor.survey import SubsetSurvey, Survey
from sd_train.errors import DataError

_UNREAD_IMAGES = frozenset(
    {".gif", ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jfif", ".jp2", ".psd", ".svg", ".tga", ".ico", ".exr"}
)
_SIDE_FILES = frozenset({".npz", ".json", ".jsonl", ".toml", ".safetensors", ".csv", ".md", ".yaml", ".parquet"})
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "icon\r"})


def check_files(subset: SubsetSurvey, survey: Survey, skip_broken: bool) -> Iterator[Finding]:
    """Files and sub-folders of the subset's folder that are not used, and images that should be there.

    Args:
        skip_broken: whether a run would leave out images that are missing.
    """
    folder, place = subset.config.image_dir, subset.place

    def extension(name: str) -> str:
        return os.path.splitext(name)[1].lower()

    own = subset.config.caption_extension
    orphans = [name for name in subset.others if name.endswith(own)] if subset.config.metadata_file is None else []
    yield from found(kinds.CAPTION_ORPHAN, place, (Sight(folder / name) for name in orphans))
    unread = [name for name in subset.others if extension(name) in _UNREAD_IMAGES]
    yield from found(kinds.UNSUPPORTED, place, (Sight(folder / name) for name in unread))
    known = {*orphans, *unread}
    stray = [
        name for name in subset.others
        if name not in known and extension(name) not in _SIDE_FILES and name.lower() not in _SYSTEM_FILES
    ]
    yield from found(kinds.STRAY, place, (Sight(folder / name) for name in stray))
    read = {os.path.realpath(path) for other in survey.subsets
            for path in (other.config.image_dir, other.config.conditioning_data_dir) if path is not None}
    inner = [folder / name for name in subset.folders]
    hidden = [path for path in inner if os.path.realpath(path) not in read and _has_images(path)]
    if subset.config.metadata_file is None:
        yield from found(kinds.HIDDEN, place, map(Sight, hidden))
    missing = kinds.LEFT_OUT if skip_broken else kinds.METADATA_IMAGE_MISSING
    yield from found(missing, place, (Sight(folder / name) for name in subset.absent))
    yield from found(kinds.METADATA_ENTRY_MISSING, place, (Sight(folder / name) for name in subset.unlisted))


def _has_images(path: Path) -> bool:
    try:
        return holds_image(path)
    except OSError:
        return False


def check_masks(subset: SubsetSurvey, looks: Mapping[Path, Look]) -> tuple[list[Finding], dict[str, float]]:
    """Findings about the mask files of `subset`, and of each readable mask (by the image's key) its mean in [0, 1]."""
    folder, place = subset.config.conditioning_data_dir, subset.place
    coverage: dict[str, float] = {}
    if folder is None:
        return [], coverage
    missing, broken, black, white, shape = [], list[Sight](), list[Sight](), list[Sight](), list[Sight]()
    for item in subset.items:
        if item.mask is None:
            missing.append(Sight(item.path))
            continue
        try:
            mask = load_mask(item.mask)
        except DataError as problem:
            reason = str(problem).removeprefix(f"{item.mask}: ").rpartition("; ")[0]
            broken.append(Sight(item.mask, reason))
            continue
        mean = coverage[item.key] = float(mask.mean()) / 255
        size = looks[item.path].size
        if mask.max() == 0:
            black.append(Sight(item.mask, item.key))
        elif mask.min() == 255:
            white.append(Sight(item.mask, item.key))
        try:
            check_aspect(mask, item.mask, size or (mask.shape[1], mask.shape[0]), item.path)
        except DataError:
            shape.append(Sight(item.mask, f"{mask.shape[1]}x{mask.shape[0]}, {item.key} is {size and size[0]}x"
                               f"{size and size[1]}; {mean:.0%} white"))
    stems = {os.path.splitext(os.path.basename(item.key))[0] for item in subset.items}
    weight = subset.config.unmasked_weight
    nothing = ": nothing is learned from it" if weight == 0 else ""
    findings = [
        *found(kinds.MASK_MISSING, place, missing),
        *found(kinds.MASK_BROKEN, place, broken),
        *found(kinds.MASK_SHAPE, place, shape),
        *found(kinds.MASK_BLACK, place, black, weight=weight, nothing=nothing),
        *(found(kinds.MASK_WHITE, place, white) if len(white) < len(coverage) else []),
        *found(kinds.MASK_ORPHAN, place, (Sight(folder / name) for name in subset.masks
                                        if os.path.splitext(name)[0] not in stems)),
    ]
    return findings, coverage


def check_shown(survey: Survey, looks: Mapping[Path, Look], indexes: Indexes | None) -> Iterator[Finding]:
    """Images that the settings never show, and buckets that do not fill a batch."""
    for number, dataset in enumerate(survey.datasets):
        shown = None if indexes is None else _shown_keys(dataset, indexes)
        for subset in survey.of(number):
            limit = dataset.skip_image_resolution
            small = [
                item for item in subset.items
                if (size := looks[item.path].size) is not None and (size[0] * size[1]) ** 0.5 <= limit
            ]
            yield from found(kinds.SKIPPED, subset.place, (
                Sight(item.path, "{}x{}".format(*(looks[item.path].size or (0, 0)))) for item in small), limit=limit)
            if not shown:
                continue
            left_out = {item.key for item in small}
            unused = [
                item for item in subset.items
                if (subset.place.subset, item.key) not in shown and item.key not in left_out
                and not looks[item.path].trouble
            ]
            kind = kinds.REG_UNUSED if subset.config.is_reg else kinds.NEVER_SHOWN
            yield from found(kind, subset.place, (Sight(item.path) for item in unused))
        for index in () if indexes is None else indexes.training:
            if index.dataset.origin == dataset.origin:
                yield from _short_batches(index, Place(dataset.origin, number))


def _shown_keys(dataset: DatasetConfig, indexes: Indexes) -> set[tuple[int | None, str]]:
    """(subset, key) of each image of the dataset that is trained or kept for validation."""
    return {
        (int(subset), key)
        for index in (*indexes.training, *indexes.validation)
        if index.dataset.origin == dataset.origin
        for subset, key in zip(index.subset_of.tolist(), index.keys, strict=True)
    }


def _short_batches(index: ImageIndex, place: Place) -> Iterator[Finding]:
    if index.dataset.bucket_policy != "keep":
        return
    sights = []
    counts = index.bucket_counts()
    for bucket, count in enumerate(counts):
        if 0 < count < index.dataset.batch_size:
            width, height = index.buckets[bucket]
            rows = np.flatnonzero(index.bucket_of == bucket).tolist()
            note = f"{width}x{height}: {count:g} sample{'' if count == 1 else 's'} an epoch"
            sights += [Sight(index.path(row), note, bucket + 1) for row in rows]
    yield from found(kinds.SHORT_BATCH, place, sights, batch_size=index.dataset.batch_size)

