"""Which files a dataset consists of, and which text belongs to each image; nothing that is wrong stops the listing."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sd_train.data.captions import TEXT_EXTENSIONS, caption_name, caption_of
from sd_train.data.folders import list_folder
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.subset import IndexOptions, SubsetReader
from sd_train.doctor.finding import Place
from sd_train.errors import Problems

CaptionState = Literal["none", "read", "zero_bytes", "not_utf8", "unreadable"]


@dataclass(frozen=True)
class CaptionFile:
    """The caption file of an image."""

    path: Path
    state: CaptionState
    text: str
    """All of it, newlines plain, BOM gone; what is not UTF-8 as U+FFFD."""


@dataclass(frozen=True)
class Item:
    """One image of a subset."""

    key: str
    """Path within the subset."""
    path: Path
    caption: str | None
    """What is trained, before prefix, shuffle and the like; lines with wildcards. None: there is none."""
    file: CaptionFile | None
    """Where it stands; None: nowhere, or in metadata."""
    other_captions: tuple[str, ...] = ()
    """Names of caption files with other extensions."""
    mask: Path | None = None


@dataclass(frozen=True)
class SubsetSurvey:
    """The files of a subset."""

    config: SubsetConfig
    place: Place
    items: tuple[Item, ...]
    others: tuple[str, ...] = ()
    """Files that belong to no image, of the subset's own folder."""
    folders: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    """Images that metadata name and that are not there."""
    unlisted: tuple[str, ...] = ()
    """Images in the folder that the metadata do not name."""
    masks: tuple[str, ...] = ()
    """Every file of the mask folder that is an image."""
    problem: str | None = None
    """Why nothing could be listed."""


@dataclass(frozen=True)
class Survey:
    """All subsets of all datasets."""

    datasets: tuple[DatasetConfig, ...]
    subsets: tuple[SubsetSurvey, ...]

    def of(self, dataset: int) -> list[SubsetSurvey]:
        """The subsets of dataset number `dataset`."""
        return [subset for subset in self.subsets if subset.place.dataset == dataset]

    def paths(self) -> list[Path]:
        """Each image file once, in order."""
        return list(dict.fromkeys(item.path for subset in self.subsets for item in subset.items))


def take_survey(datasets: Sequence[DatasetConfig]) -> Survey:
    """List the files of `datasets` and read their captions."""
    subsets = []
    for number, dataset in enumerate(datasets):
        for row, config in enumerate(dataset.subsets):
            place = Place(config.origin, number, row)
            subsets.append(_by_metadata(dataset, config, place) if config.metadata_file else _by_folder(config, place))
    return Survey(tuple(datasets), tuple(subsets))


def read_caption_file(path: Path) -> CaptionFile:
    """The caption file at `path`, whatever it holds."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        return CaptionFile(path, "unreadable", problem.strerror or "")
    state: CaptionState = "read" if data else "zero_bytes"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text, state = data.decode("utf-8", "replace"), "not_utf8"
    return CaptionFile(path, state, text.replace("\r\n", "\n").replace("\r", "\n"))


def _by_folder(config: SubsetConfig, place: Place) -> SubsetSurvey:
    try:
        folder = list_folder(config.image_dir)
    except OSError as problem:
        return SubsetSurvey(config, place, (), problem=f"{config.image_dir}: {problem.strerror}")
    normed = {os.path.normcase(name) for name in folder.others}
    by_lower = {name.lower(): name for name in folder.others}
    items, used = [], set[str]()
    for image in folder.images:
        name = caption_name(image, config.caption_extension, normed)
        file = None if name is None else read_caption_file(config.image_dir / name)
        elsewhere = _other_captions(image, config.caption_extension, by_lower)
        used.update(elsewhere if name is None else [name, *elsewhere])
        caption = config.class_tokens
        if file is not None:
            caption = caption_of(file.text, config.enable_wildcard) if file.state == "read" else None
        items.append(Item(image, config.image_dir / image, caption, file, tuple(elsewhere)))
    others = tuple(name for name in folder.others if name not in used)
    masks = _mask_names(config)
    found = tuple(_with_mask(item, config, masks) for item in items)
    return SubsetSurvey(config, place, found, others, tuple(folder.folders), masks=tuple(masks))


def _other_captions(image: str, extension: str, by_lower: dict[str, str]) -> list[str]:
    names = []
    for other in dict.fromkeys((*TEXT_EXTENSIONS, extension.lower())):
        name = caption_name(image.lower(), other, by_lower.keys())
        if name is not None and not by_lower[name].endswith(extension):
            names.append(by_lower[name])
    return names


def _mask_names(config: SubsetConfig) -> list[str]:
    if config.conditioning_data_dir is None:
        return []
    try:
        return list_folder(config.conditioning_data_dir).images
    except OSError:
        return []


def _with_mask(item: Item, config: SubsetConfig, masks: Sequence[str]) -> Item:
    if config.conditioning_data_dir is None:
        return item
    stem = os.path.splitext(item.key)[0]
    name = next((mask for mask in masks if mask == item.key), None)
    name = name or next((mask for mask in masks if os.path.splitext(mask)[0] == stem), None)
    mask = None if name is None else config.conditioning_data_dir / name
    return Item(item.key, item.path, item.caption, item.file, item.other_captions, mask)


def _by_metadata(dataset: DatasetConfig, config: SubsetConfig, place: Place) -> SubsetSurvey:
    # Broken images and missing captions are what is looked for: they must not stop the reader.
    reader = SubsetReader([dataset], IndexOptions(allow_missing_captions=True, skip_broken_images=True))
    problems = Problems()
    files = reader.read(config, problems, [])
    absent = {row for row in files.broken if not _is_there(files.path(row))}
    items = tuple(
        Item(key, files.path(row), caption, None)
        for row, (key, caption) in enumerate(zip(files.keys, files.captions, strict=True))
        if row not in absent
    )
    found = "; ".join(map(str, problems.found)) or None
    missing = tuple(files.keys[row] for row in sorted(absent))
    unlisted = _unlisted(config.image_dir, {item.path for item in items}) if items else ()
    return SubsetSurvey(config, place, items, absent=missing, unlisted=unlisted, problem=None if items else found)


def _is_there(path: Path) -> bool:
    return path.parent.is_file() or path.is_symlink() or path.exists()


def _unlisted(folder: Path, known: Set[Path]) -> tuple[str, ...]:
    if folder == Path():
        return ()
    try:
        return tuple(name for name in list_folder(folder).images if folder / name not in known)
    except OSError:
        return ()
